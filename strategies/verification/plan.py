"""Which samples a virtual rank has in which micro-batch, under which seed, at which rate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from distplat.platform.learning_rate import factor
from distplat.platform.sampler import Sampler
from distplat.platform.spec import Job
from distplat.strategies.catalog import make_strategy
from distplat.strategies.hybrid import Hybrid


@dataclass(frozen=True)
class Forward:
    """One micro-batch: the samples, and how torch's generator is seeded before it (None: not)."""

    ids: list[int]
    seed: int | None = None


Schedule = Sequence[Sequence[Sequence[Forward]]]
"""By step, by rank: micro-batches."""


@dataclass(frozen=True)
class Recipe:
    """How a model is trained."""

    optimizer: str
    """Name of a class in `torch.optim`."""
    arguments: dict[str, Any]
    rates: list[float] = field(default_factory=list)
    """Learning rate of each step."""
    clip_norm: float | None = None
    autocast: bool = False
    """Forward under bfloat16 autocast."""
    seed: int = 0


def recipe_of(job: Job) -> Recipe:
    """Give the recipe of a job, whose field `steps` is set."""
    steps = job.steps or 0
    rates = [job.optimizer.lr * factor(job.lr_schedule, step, steps) for step in range(steps)]
    bf16 = job.precision == "bf16"
    return Recipe(
        job.optimizer.name, job.optimizer.arguments(), rates, job.clip_norm, bf16, job.seed
    )


def parts(job: Job, size: int, *, merged: bool = False) -> Schedule:
    """
    Cut the batches as the job's strategy does.

    Args:
        job: its field `steps` is set.
        size: samples of the data set.
        merged: join the ranks' micro-batches, for models that compute over all ranks at once.
    """
    from distplat.strategies.training.compute import step_seed  # torch

    strategy = make_strategy(job)
    world, micro = strategy.replicas(job), job.gradient_accumulation
    if isinstance(strategy, Hybrid):
        micro = strategy.options.micro(job)
    sampler = _sampler(job, size, world)
    found = []
    for step in range(job.steps or 0):
        ranks = []
        for rank in range(world):
            cut = [ids.tolist() for ids in sampler.micro_batches(step, rank, micro)]
            seeds = [step_seed(job.seed, step, rank), *[None] * len(cut)]
            ranks.append([Forward(ids, seed) for ids, seed in zip(cut, seeds, strict=False)])
        found.append([_join(ranks)] if merged else ranks)
    return found


def union(job: Job, size: int) -> Schedule:
    """Give whole batches, to one rank."""
    sampler = _sampler(job, size, 1)
    return [[[Forward(sampler.batch_ids(step).tolist())]] for step in range(job.steps or 0)]


def _join(ranks: list[list[Forward]]) -> list[Forward]:
    most = max(len(forwards) for forwards in ranks)
    together = [[f for forwards in ranks for f in forwards[at : at + 1]] for at in range(most)]
    return [Forward([i for f in group for i in f.ids], group[0].seed) for group in together]


def _sampler(job: Job, size: int, world: int) -> Sampler:
    data = job.data
    return Sampler(size, job.global_batch_size, world, job.seed, data.shuffle, data.drop_last)
