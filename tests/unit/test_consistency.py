"""What follows from when servers apply gradients."""

from distplat.platform.spec import SYNCHRONOUS, Consistency


def test_workers_compute_on_copies_where_servers_do_not_wait() -> None:
    assert not SYNCHRONOUS.private
    assert Consistency(asynchronous=True).private
    assert Consistency(backup_workers=1).private


def test_tasks_are_leased_where_nobody_waits() -> None:
    assert Consistency(asynchronous=True).dynamic_tasks
    assert not Consistency(backup_workers=1).dynamic_tasks
