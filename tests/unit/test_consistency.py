"""Properties of `Consistency`."""

from distplat.platform.spec import SYNCHRONOUS, Consistency


def test_workers_need_private_parameters_if_servers_do_not_wait() -> None:
    assert not SYNCHRONOUS.private
    assert Consistency(asynchronous=True).private
    assert Consistency(backup_workers=1).private


def test_only_asynchronous_servers_have_dynamic_tasks() -> None:
    assert Consistency(asynchronous=True).dynamic_tasks
    assert not Consistency(backup_workers=1).dynamic_tasks
