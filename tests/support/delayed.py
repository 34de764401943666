"""Gradients that come late, without threads: a schedule says whose push comes when."""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from jobs import job_of
from torch import Tensor

from distplat.platform.ledger import PushId
from distplat.platform.shard_map import ShardPlan
from distplat.platform.spec import Consistency
from distplat.strategies.training.async_shard import AsyncShard

Gradient = Callable[[Tensor, int, int], Tensor]
"""Gradient at parameters [m], of a rank, in its step."""


def async_plan(
    world: int, steps: int, consistency: Consistency, *, shards: int = 1, **job: Any
) -> ShardPlan:
    """Make the plan of an asynchronous run `run`, attempt 1; `job` replaces fields."""
    fields = {"strategy": "ps-async", "steps": steps, "global_batch_size": world, **job}
    made = job_of(workers=world, **fields)
    return ShardPlan(made, "run", 1, world, steps, shards, consistency)


def run_schedule(
    plan: ShardPlan, start: Tensor, gradient: Gradient, ranks: Sequence[int]
) -> AsyncShard:
    """
    Have ranks push in the given order; each computes on what it pulled after its push before.

    Args:
        plan: of one shard.
        start: initial parameters, shape [m].
        gradient: what a rank computes.
        ranks: whose push comes next.
    """
    shard = AsyncShard(plan, start.clone())
    shard.restore(0)
    views = []
    for rank in range(plan.world):
        shard.pull(rank)
        views.append(start.clone())
    steps = [0] * plan.world
    for rank in ranks:
        push = PushId(plan.run, plan.attempt, rank, steps[rank], steps[rank] * plan.world + rank)
        shard.push(push, gradient(views[rank], rank, steps[rank]))
        shard.pull(rank)
        views[rank] = shard.params.clone()
        steps[rank] += 1
    return shard


@cache
def noise(size: int, *key: int) -> Tensor:
    """Draw a vector that depends on the key alone, shape [size]; not to be written into."""
    seed = sum(part * 10_007**place for place, part in enumerate(key)) + 1
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))
