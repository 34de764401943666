"""The helper that runs ranks as threads says what went wrong, and where a stuck rank is."""

import threading

import pytest
from rank_threads import on_ranks


def test_a_stuck_rank_is_shown_with_what_it_is_doing() -> None:
    released = threading.Event()

    def waits_for_ever(rank: int) -> None:
        if rank == 1:
            released.wait(60)

    with pytest.raises(TimeoutError) as caught:
        on_ranks(2, waits_for_ever, timeout_s=0.1)
    released.set()
    assert "ranks [1] are still running after 0.1 s\nrank 1 is in:\n" in str(caught.value)
    assert "in waits_for_ever\n    released.wait(60)" in str(caught.value)


def test_the_first_error_lets_the_others_go() -> None:
    over = threading.Event()

    def body(rank: int) -> None:
        if rank == 0:
            raise KeyError("as asked")
        assert over.wait(60)
        raise ValueError("only an effect")

    with pytest.raises(KeyError, match="as asked"):
        on_ranks(2, body, failed=over.set)
