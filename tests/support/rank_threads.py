"""Ranks as threads of the test: started together, waited for with a deadline, errors passed on."""

import threading
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def on_ranks(
    world: int,
    body: Callable[[int], T],
    *,
    timeout_s: float = 30.0,
    meanwhile: Callable[[], None] = lambda: None,
) -> list[T]:
    """
    Call `body(rank)` in one thread per rank; give what they return, in rank order.

    Args:
        world: number of ranks.
        body: what each does.
        timeout_s: how long all may take together.
        meanwhile: called once all have begun.

    Raises:
        whatever a rank raised first: what others raise after it is only its effect.
        TimeoutError: ranks that are still at it after `timeout_s` seconds.
    """
    results: dict[int, T] = {}
    errors: list[BaseException] = []

    def run(rank: int) -> None:
        try:
            results[rank] = body(rank)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(r,), daemon=True) for r in range(world)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + timeout_s
    meanwhile()
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    if errors:
        raise errors[0]
    stuck = [rank for rank, thread in enumerate(threads) if thread.is_alive()]
    if stuck:
        raise TimeoutError(f"ranks {stuck} are still running after {timeout_s:g} s")
    return [results[rank] for rank in range(world)]
