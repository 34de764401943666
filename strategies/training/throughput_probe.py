"""
How fast a server node makes updates: measured when a run begins, to cut its shard accordingly.

What takes a shard's time is adding up the ranks' gradients and the optimizer, both element by
element, so a small vector tells of a large one. Only the proportion between servers counts.
"""

import statistics
import time
from collections.abc import Callable

import torch

from distplat.platform.spec import Job
from distplat.strategies.algorithms.reduce import sum_in_order
from distplat.strategies.model.optim import FlatOptimizer, rate_of

_ELEMENTS = 1 << 18
_ROUNDS = 7
_MOST_GRADIENTS = 8


def elements_per_s(
    job: Job, world: int, dtype: str, clock: Callable[[], float] = time.perf_counter
) -> float:
    """
    Measure how many elements of a shard this process updates in a second.

    Args:
        job: names the optimizer.
        world: gradients of a step.
        dtype: of the parameters, by torch's name.
        clock: gives seconds.
    """
    params = torch.zeros(_ELEMENTS, dtype=getattr(torch, dtype))
    total = torch.zeros_like(params)
    gradients = [torch.full_like(params, 0.5) for _ in range(min(world, _MOST_GRADIENTS))]
    optimizer = FlatOptimizer(job.optimizer, params, total)
    seconds = []
    for step in range(_ROUNDS):
        began = clock()
        sum_in_order(gradients, total)
        optimizer.step(rate_of(job, step, _ROUNDS))
        seconds.append(clock() - began)
    return _ELEMENTS / max(1e-9, statistics.median(seconds[1:]))  # the first touches new memory
