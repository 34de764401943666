"""Delayed gradients without threads: a schedule defines the order of the ranks' pushes."""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from jobs import job_of
from torch import Tensor

from distplat.platform.ledger import PushId, Verdict
from distplat.platform.shard_map import ShardPlan
from distplat.platform.spec import Consistency
from distplat.strategies.loop.control import StepControl
from distplat.strategies.server.dense_store import DenseStore

Gradient = Callable[[Tensor, int, int], Tensor]
"""Returns the gradient at parameters [m], of a rank, in its step."""


def async_plan(
    world: int, steps: int, consistency: Consistency, *, shards: int = 1, **job: Any
) -> ShardPlan:
    """Build the plan of an asynchronous run `run`, attempt 1; `job` replaces fields."""
    fields = {"strategy": "ps-async", "steps": steps, "global_batch_size": world, **job}
    return ShardPlan(job_of(workers=world, **fields), "run", 1, world, steps, shards, consistency)


def run_schedule(
    plan: ShardPlan, start: Tensor, gradient: Gradient, ranks: Sequence[int]
) -> DenseStore:
    """
    Push in the order of `ranks`; each rank computes on the parameters pulled after its last push.

    Args:
        plan: of one shard.
        start: initial parameters, shape [m].
        gradient: of a rank.
        ranks: rank of each push.
    """
    shard = DenseStore(plan, start.clone())
    shard.restore(0)
    views = []
    for rank in range(plan.world):
        shard.pull(rank)
        views.append(start.clone())
    steps = [0] * plan.world
    for rank in ranks:
        push = PushId(plan.run, plan.attempt, rank, steps[rank], steps[rank] * plan.world + rank)
        push_now(shard, push, gradient(views[rank], rank, steps[rank]))
        shard.pull(rank)
        views[rank] = shard.params.clone()
        steps[rank] += 1
    return shard


def push_now(
    shard: DenseStore, push: PushId, gradient: Tensor, control: StepControl | None = None
) -> Verdict:
    """Push a gradient to an asynchronous shard and apply it, as a server does."""
    verdict = shard.push(push, gradient, control)
    if verdict is Verdict.NEW:
        assert shard.commit(push.seq, None)
    return verdict


@cache
def noise(size: int, *key: int) -> Tensor:
    """Draw a vector that depends only on the key, shape [size]; do not modify it."""
    seed = sum(part * 10_007**place for place, part in enumerate(key)) + 1
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))
