"""Which samples a virtual rank has in which micro-batch, under which seed, at which rate."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from distplat.platform.learning_rate import factor
from distplat.platform.sampler import Sampler
from distplat.platform.spec import Job
from distplat.strategies.catalog import make_strategy
from distplat.strategies.hybrid import Hybrid
from distplat.strategies.training.compute import step_seed
from distplat.strategies.verification.tables import KEPT, row_optimizer


@dataclass(frozen=True)
class Forward:
    """One micro-batch: the samples, and how torch's generator is seeded before it (None: not)."""

    ids: list[int]
    seed: int | None = None


Schedule = Sequence[Sequence[Sequence[Forward]]]
"""By step, by rank: micro-batches."""


Optimize = Callable[[Iterable[Tensor]], torch.optim.Optimizer]
"""Makes an optimizer of such parameters."""

ROWS = f"task.{KEPT}."
"""What names of embedding tables begin with."""


@dataclass(frozen=True)
class Recipe:
    """How a model is trained."""

    optimizer: Optimize
    factors: list[float]
    """On the learning rate, by step."""
    rows: Optimize
    """Of embedding tables, whose gradients are sparse."""
    clip_norm: float | None = None
    autocast: bool = False
    """Forward under bfloat16 autocast."""
    seed: int = 0


def recipe_of(job: Job) -> Recipe:
    """Give the recipe of a job, whose field `steps` is set."""
    steps, spec, tables = job.steps or 0, job.optimizer, job.embeddings
    factors = [factor(job.lr_schedule, step, steps) for step in range(steps)]
    optimizer = partial(getattr(torch.optim, spec.name), **spec.arguments())
    rows = optimizer if tables is None else row_optimizer(tables)
    autocast = job.precision == "bf16"
    return Recipe(optimizer, factors, rows, job.clip_norm, autocast, job.seed)


def parts(job: Job, size: int, *, merged: bool = False) -> Schedule:
    """
    Cut the batches as the job's strategy does.

    Args:
        job: its field `steps` is set.
        size: samples of the data set.
        merged: join the ranks' micro-batches, for models that compute over all ranks at once.
    """
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


def seed_all(seed: int) -> None:
    """Seed the generators of torch, numpy and Python."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)
