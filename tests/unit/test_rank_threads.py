"""`on_ranks` raises the first error, and shows the stack of a blocked rank."""

import threading

import pytest
from rank_threads import on_ranks


def test_timeout_shows_the_stack_of_a_blocked_rank() -> None:
    released = threading.Event()

    def block(rank: int) -> None:
        if rank == 1:
            released.wait(60)

    with pytest.raises(TimeoutError) as caught:
        on_ranks(2, block, timeout_s=0.1)
    released.set()
    assert "ranks [1] are still running after 0.1 s\nrank 1 is in:\n" in str(caught.value)
    assert "in block\n    released.wait(60)" in str(caught.value)


def test_first_error_is_raised_and_releases_the_other_ranks() -> None:
    released = threading.Event()

    def body(rank: int) -> None:
        if rank == 0:
            raise KeyError("the cause")
        assert released.wait(60)
        raise ValueError("only an effect")

    with pytest.raises(KeyError, match="the cause"):
        on_ranks(2, body, failed=released.set)
