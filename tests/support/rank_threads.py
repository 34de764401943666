"""Ranks as threads of the test: started together, joined with a deadline, errors re-raised."""

import threading
import time
import traceback
from collections.abc import Callable, Mapping
from typing import TypeVar

from hypothesis import Phase

from distplat.actors.user_errors import frame_of

T = TypeVar("T")

UNSHRUNK = tuple(phase for phase in Phase if phase not in (Phase.shrink, Phase.explain))
"""`phases` of hypothesis tests that run threads: shrinking an example that hangs takes minutes."""


def on_ranks(
    world: int,
    body: Callable[[int], T],
    *,
    timeout_s: float = 100.0,
    meanwhile: Callable[[], None] = lambda: None,
    failed: Callable[[], None] = lambda: None,
) -> list[T]:
    """
    Call `body(rank)` in one thread per rank; return the results in rank order.

    Args:
        world: number of ranks.
        body: called in each thread.
        timeout_s: deadline of all ranks together.
        meanwhile: called once all threads have started.
        failed: called by a rank that has raised, to end the waits of the other ranks.

    Raises:
        BaseException: the first error of a rank: later errors of other ranks are its effects.
        TimeoutError: ranks are still running after `timeout_s`; the message has their stacks.
    """
    results: dict[int, T] = {}
    errors: list[BaseException] = []

    def run(rank: int) -> None:
        try:
            results[rank] = body(rank)
        except BaseException as error:
            errors.append(error)
            failed()

    threads = [threading.Thread(target=run, args=(r,), daemon=True) for r in range(world)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + timeout_s
    meanwhile()
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    if errors:
        raise errors[0]
    stuck = {rank: thread for rank, thread in enumerate(threads) if thread.is_alive()}
    if stuck:
        ranks = f"ranks {[*stuck]} are still running after {timeout_s:g} s"
        raise TimeoutError("\n".join([ranks, *stacks_of(stuck)]))
    return [results[rank] for rank in range(world)]


def stacks_of(threads: Mapping[int, threading.Thread]) -> list[str]:
    """Return the stack of each rank's thread, innermost call last."""
    frames = {rank: frame_of(thread) for rank, thread in threads.items()}
    return [
        f"rank {rank} is in:\n{''.join(traceback.format_stack(frame))}"
        for rank, frame in frames.items()
        if frame is not None
    ]
