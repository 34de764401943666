"""Ranks as threads of the test: started together, waited for with a deadline, errors passed on."""

import threading
import time
import traceback
from collections.abc import Callable, Mapping
from typing import TypeVar

from hypothesis import Phase

from distplat.actors.user_errors import frame_of

T = TypeVar("T")

UNSHRUNK = tuple(phase for phase in Phase if phase not in (Phase.shrink, Phase.explain))
"""`phases` of drawn tests that run threads: to shrink an example that hangs takes minutes."""


def on_ranks(
    world: int,
    body: Callable[[int], T],
    *,
    timeout_s: float = 100.0,
    meanwhile: Callable[[], None] = lambda: None,
    failed: Callable[[], None] = lambda: None,
) -> list[T]:
    """
    Call `body(rank)` in one thread per rank; give what they return, in rank order.

    Args:
        world: number of ranks.
        body: what each does.
        timeout_s: how long all may take together.
        meanwhile: called once all have begun.
        failed: called by a rank that has raised, to have the others wait no longer.

    Raises:
        whatever a rank raised first: what others raise after it is only its effect.
        TimeoutError: ranks that are still at it after `timeout_s` seconds, and where they are.
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
    """Give what each rank's thread is doing, innermost call last."""
    frames = {rank: frame_of(thread) for rank, thread in threads.items()}
    return [
        f"rank {rank} is in:\n{''.join(traceback.format_stack(frame))}"
        for rank, frame in frames.items()
        if frame is not None
    ]
