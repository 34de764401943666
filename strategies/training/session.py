"""
From a job and a task to a loop that is ready to run, in three steps that can wait between.

    prepare      build model and data; talks to nobody
    join         connect the ports, set the strategy up; waits for the others
    Loop.run     train
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import Dataset

from distplat.platform.progress import EvalReport, StepReport
from distplat.platform.sampler import Sampler
from distplat.platform.spec import Job
from distplat.strategies.base import Collective, Context, Shards, Strategy
from distplat.strategies.ports import Tables
from distplat.strategies.sparse.lookups import Lookups, lookups_of
from distplat.strategies.task import Task
from distplat.strategies.training.batches import make_sampler, total_steps
from distplat.strategies.training.flat import FlatModel
from distplat.strategies.training.loop import Loop, Progress


@dataclass
class Prepared:
    """What a worker has before it knows the others."""

    job: Job
    task: Task
    flat: FlatModel
    data: Dataset[Any]
    eval_data: Dataset[Any] | None
    sampler: Sampler
    total_steps: int
    lookups: Lookups | None = None
    """The model's embedding tables, if it has some."""


def prepare(job: Job, task: Task, device: str = "cpu") -> Prepared:
    """
    Build model and data. Seeded before each call of the user's code, so that ranks agree.

    Raises:
        ValueError: a model or data set that cannot be trained; or whatever the task raises.
    """
    torch.manual_seed(job.seed)
    model = task.model()
    if not isinstance(model, torch.nn.Module):
        raise ValueError(f"model() must return a torch.nn.Module, got {type(model).__name__}")
    lookups = lookups_of(model, job)
    flat = FlatModel(model.to(device))
    torch.manual_seed(job.seed)
    data = task.train_data()
    sampler = make_sampler(job, data)
    torch.manual_seed(job.seed)
    eval_data = task.eval_data()
    return Prepared(job, task, flat, data, eval_data, sampler, total_steps(job, sampler), lookups)


def join(
    prepared: Prepared,
    strategy: Strategy[Any],
    rank: int,
    *,
    collective: Collective | None,
    shards: Shards | None,
    tables: Tables | None = None,
    report: Callable[[StepReport | EvalReport], None],
    progress: Progress,
) -> Loop:
    """
    Set the strategy up with its ports and give the loop.

    Raises:
        DistplatError: whatever the ports raise while the ranks find each other.
    """
    p = prepared
    world = p.job.scaling.world
    context = Context(p.job, rank, world, p.total_steps, p.flat, collective, shards, progress.beat)
    start = strategy.setup(context)
    if p.lookups is not None and tables is not None:
        p.lookups.connect(tables, p.total_steps, start)
    return Loop(
        p.job,
        p.task,
        p.data,
        p.eval_data,
        p.flat,
        p.sampler,
        p.total_steps,
        strategy,
        rank,
        report,
        progress,
        start,
        p.lookups,
    )
