"""
What a reference is told, and what it gives.

Which samples a virtual rank has in which micro-batch, under which seeds, at which learning rate.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from operator import mul
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Subset
from typing_extensions import override

from distplat.platform.errors import Problem, SpecError
from distplat.platform.model_options import Embeddings
from distplat.platform.optimizers import Optimizer, TaskOptimizer
from distplat.platform.sampler import Sampler
from distplat.platform.spec import Job
from distplat.strategies.algorithms.seeds import (
    collate_seed,
    derive_seed,
    epoch_seed,
    order_seed,
    step_seed,
)
from distplat.strategies.catalog import make_strategy
from distplat.strategies.hybrid import Hybrid
from distplat.strategies.loop.batches import SampleRun, sample_runs, samples_of
from distplat.strategies.loop.seeding import preserve_rng_state
from distplat.strategies.loop.streams import is_stream, rows_of
from distplat.strategies.loop.task_settings import TaskOrder
from distplat.strategies.model.tensor_optimizer import class_of
from distplat.strategies.sparse.modules import RowSource, Sharded, tables_of
from distplat.strategies.sparse.rows import initial_rows
from distplat.strategies.task import Task, overrides

KEPT = "_rows_of_reference"
"""Attribute of the task that keeps the tables."""


class TorchRowWiseAdagrad(torch.optim.Optimizer):
    """Adagrad with one number of state for each row; torch has none."""

    def __init__(
        self, params: Iterable[Tensor], lr: float, initial_accumulator_value: float, eps: float
    ) -> None:
        defaults = {"lr": lr, "first": initial_accumulator_value, "eps": eps}
        super().__init__(list(params), defaults)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update the rows that have a gradient."""
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                gradient = weight.grad.coalesce()
                rows, values = gradient.indices()[0], gradient.values()
                state = self.state[weight]
                sums = state.setdefault("sum", weight.new_full((len(weight), 1), group["first"]))
                sums[rows] += values.square().mean(1, keepdim=True)
                weight[rows] -= group["lr"] * values / (sums[rows].sqrt() + group["eps"])


def row_optimizer(spec: Embeddings) -> Callable[[Iterable[Tensor]], torch.optim.Optimizer]:
    """Give what makes the optimizer of rows that a job names."""
    options = spec.optimizer.model_dump(exclude={"name"})
    if spec.optimizer.name == "RowWiseAdagrad":
        return partial(TorchRowWiseAdagrad, **options)
    return partial(getattr(torch.optim, spec.optimizer.name), **options)


def with_rows(task: Task, seed: int) -> Task:
    """Have a task's model find its rows in tables that the task keeps."""
    whole: Any = task
    original = whole.model

    def model() -> nn.Module:
        built: nn.Module = original()
        setattr(whole, KEPT, _PlainTables(built, seed))
        return built

    whole.model = model
    return task


class _PlainTables(nn.Module):
    """All tables of a model, with the first values that servers give them."""

    def __init__(self, model: nn.Module, seed: int) -> None:
        super().__init__()
        self.weights = nn.ParameterList()
        for name, module in tables_of(model).items():
            rows = module.num_embeddings
            if rows is None:
                raise ValueError(f"{name} has no num_embeddings: no plain table can stand for it")
            values = initial_rows(module.spec(name), seed, np.arange(rows))
            self.weights.append(nn.Parameter(torch.from_numpy(values)))
            module.source = _PlainRowSource(self.weights[-1])


class _PlainRowSource(RowSource):
    """One table's rows (see `RowSource`)."""

    def __init__(self, weight: Tensor) -> None:
        self._weight = weight

    @override
    def rows(self, module: Sharded, ids: Tensor) -> tuple[Tensor, Tensor | None]:
        rows = nn.functional.embedding(ids, self._weight, sparse=True)
        if module.padding_idx is not None:
            rows = rows * (ids != module.padding_idx).unsqueeze(1)
        return rows, None


@dataclass(frozen=True)
class MicroBatch:
    """One micro-batch."""

    ids: list[int]
    sample_seeds: list[int]
    """What the generators are seeded with before each sample is read."""
    collate_seed: int
    """What they are seeded with before the samples are put together."""
    seed: int | None = None
    """What they are seeded with before the micro-batch; None: they go on."""


class ReferenceSamples(NamedTuple):
    """The samples of an epoch."""

    size: int
    order: TaskOrder | None = None
    """The task's own; None: as the job says."""
    stream: bool = False
    """Whether it is read from its start, over and over."""


Batches = Sequence[Sequence[Sequence[MicroBatch]]]
"""By step, by rank: micro-batches."""


TermWeights = dict[str, float]
"""By term of a loss."""

Tensors = dict[str, Tensor]
"""Tensors by name."""

ROWS = f"task:{KEPT}."
"""What names of embedding tables begin with."""


@dataclass(frozen=True)
class Recipe:
    """How a model is trained."""

    optimizer: Callable[[Task, Tensors], Sequence[torch.optim.Optimizer]]
    """Makes the optimizers of such parameters."""
    rates: Sequence[Callable[[float], float]]
    """By step: gives the learning rate, of that before the schedule."""
    rows: Callable[[Iterable[Tensor]], torch.optim.Optimizer]
    """The same of embedding tables, whose gradients are sparse."""
    clip_norm: float | None = None
    autocast: bool = False
    """Forward under bfloat16 autocast."""
    seed: int = 0
    every: int = 1
    """The model's state is kept after so many steps, and after the last."""


@dataclass
class Trained:
    """The result of a training; that of a run of the engine has the same form."""

    states: dict[int, Tensors]
    """The model's state by steps done; of a run some may be missing, not the last."""
    losses: list[float] = field(default_factory=list)
    used: list[set[str]] = field(default_factory=list)
    """Of references, by step: parameters that had a gradient."""
    draws: bool = False
    """Of references: whether a forward drew random numbers."""


def recipe_of(job: Job, task: Task, every: int = 1) -> Recipe:
    """
    Give the recipe of a job.

    Args:
        job: its field `steps` is set.
        task: the user's.
        every: see `Recipe`.

    Raises:
        SpecError: the job trains in a way that no plain loop here does.
    """
    if job.precision == "fp16":
        text = "verify has no loop with a loss scale"
        raise SpecError(Problem(("precision",), text, "verify with `--set precision=bf16`"))
    spec, tables, rates = job.optimizer, job.embeddings, _rates(job, task)
    rows = torch.optim.SGD if tables is None else row_optimizer(tables)
    own = isinstance(spec, TaskOptimizer)
    optimizer, autocast = _tasks if own else partial(_optimizer, spec), job.precision == "bf16"
    return Recipe(optimizer, rates, rows, job.clip_norm, autocast, job.seed, every)


def _rates(job: Job, task: Task) -> list[Callable[[float], float]]:
    """Give for each step what makes its rate of `lr`: the task, or else the job's schedule."""
    steps, schedule = job.steps or 0, job.lr_schedule
    if overrides(type(task), "lr"):
        return [partial(mul, float(task.lr(step, steps))) for step in range(steps)]
    return [partial(schedule.rate, step=step, total_steps=steps) for step in range(steps)]


def _tasks(task: Task, named: Tensors) -> Sequence[torch.optim.Optimizer]:
    """Have the task make it; among the tensors are buffers."""
    kinds = nn.Parameter
    returned = task.optimizer([(n, p) for n, p in named.items() if isinstance(p, kinds)])
    return returned if isinstance(returned, list | tuple) else [returned]


def _optimizer(spec: Optimizer, task: Task, named: Tensors) -> Sequence[torch.optim.Optimizer]:
    """Make torch's optimizers, of each class one, with a param group for each of the job's."""
    patterns = [one.match.replace(" ", "").split(",") for one in spec.groups] + [["*"]]
    more: list[dict[str, Any]] = [*(one.arguments() for one in spec.groups), {}]
    kinds = [one.name or spec.name for one in spec.groups] + [spec.name]
    sets: list[list[Tensor]] = [[] for _ in patterns]
    for name, tensor in named.items():
        positions = [at for at, some in enumerate(patterns) for p in some if fnmatchcase(name, p)]
        sets[positions[0]].append(tensor)
    optimizers = []
    for kind in dict.fromkeys(kinds):
        every = zip(kinds, sets, more, strict=True)
        groups = [{"params": some, **own} for one, some, own in every if some and one == kind]
        own = spec.arguments() if kind == spec.name else {"lr": 0.0}
        optimizers += [class_of(kind)(groups, **own)] if groups else []
    return optimizers


def split_batches(job: Job, samples: ReferenceSamples, *, merged: bool = False) -> Batches:
    """
    Cut the batches as the job's strategy does.

    Args:
        job: its field `steps` is set.
        samples: of the data set.
        merged: join the ranks' micro-batches, for models that compute over all ranks at once.
    """
    strategy = make_strategy(job)
    world = strategy.roles(job).replicas(job.scaling.world)
    micro = job.gradient_accumulation
    if isinstance(strategy, Hybrid):
        micro = strategy.options.micro(job)
    sampler = _sampler(job, samples, world)
    schedule = []
    for step in range(job.steps or 0):
        ranks = []
        for rank in range(world):
            cut = sample_runs(sampler, step, rank, micro)
            first = step_seed(job.seed, step, rank)
            ranks.append([_forward(run, None if at else first) for at, run in enumerate(cut)])
        schedule.append([_join(ranks)] if merged else ranks)
    return schedule


def whole_batches(job: Job, samples: ReferenceSamples) -> Batches:
    """Give whole batches, to one rank."""
    sampler, steps = _sampler(job, samples, 1), range(job.steps or 0)
    return [[[_forward(run, None) for run in sample_runs(sampler, step, 0, 1)]] for step in steps]


def _forward(run: SampleRun, seed: int | None) -> MicroBatch:
    positions = range(run.first, run.first + len(run.ids))
    seeds = [derive_seed(run.seed, position) for position in positions]
    return MicroBatch(run.ids, seeds, collate_seed(run.seed, run.first), seed)


def _join(ranks: list[list[MicroBatch]]) -> list[MicroBatch]:
    most = max(len(forwards) for forwards in ranks)
    joined = []
    for at in range(most):
        group = [forward for forwards in ranks for forward in forwards[at : at + 1]]
        ids = [index for forward in group for index in forward.ids]
        seeds = [seed for forward in group for seed in forward.sample_seeds]
        joined.append(MicroBatch(ids, seeds, group[0].collate_seed, group[0].seed))
    return joined


def _sampler(job: Job, samples: ReferenceSamples, world: int) -> Sampler:
    data, given = job.data, (samples.size, job.global_batch_size, world, job.seed)
    return Sampler(*given, data.shuffle, data.drop_last, samples.order, samples.stream)


def numbered(data: Any, schedule: Batches, seed: int) -> Any:
    """Read a stream as far as a schedule goes, pass after pass; give other data as it is."""
    if not is_stream(data):
        return data
    last = max(max(forward.ids) for ranks in schedule for one in ranks for forward in one)
    samples_read: list[Any] = []
    with preserve_rng_state():
        for turn in itertools.count():
            seed_all(order_seed(seed, turn))
            if hasattr(data, "set_epoch"):
                data.set_epoch(turn)
            samples = iter(rows_of(data))
            for position in itertools.count():
                seed_all(derive_seed(epoch_seed(seed, turn), position))
                try:
                    samples_read.append(next(samples))
                except StopIteration:
                    break
                if len(samples_read) > last:
                    return samples_read
    raise AssertionError("it goes on until all are read")


def read(task: Task, data: Any, forward: MicroBatch) -> tuple[Any, int]:
    """
    Read the samples of a micro-batch and put them together; generators stay as they are.

    Returns:
        The batch, and how many samples it is of; see `samples_of`.
    """
    many = None if isinstance(data, Subset) else getattr(data, "__getitems__", None)
    with preserve_rng_state():
        if many is not None:
            seed_all(forward.sample_seeds[0])
            samples = many(forward.ids)
        else:
            samples = []
            for index, seed in zip(forward.ids, forward.sample_seeds, strict=True):
                seed_all(seed)
                samples.append(data[index])
        seed_all(forward.collate_seed)
        batch = task.collate(samples)
        return batch, samples_of(batch, samples)


def terms_of(
    task: Task, data: Any, step: Sequence[Sequence[MicroBatch]]
) -> tuple[TermWeights, int] | None:
    """Give the weights of a step's terms, and its samples; None: a loss is one term."""
    if not overrides(type(task), "weights"):
        return None
    forwards = [forward for forwards in step for forward in forwards]
    total: TermWeights = {}
    for forward in forwards:
        for name, weight in task.weights(read(task, data, forward)[0]).items():
            total[name] = total.get(name, 0.0) + float(weight)
    return total, sum(len(forward.ids) for forward in forwards)


def together(loss: Any, of: tuple[TermWeights, int] | None, samples: int) -> Any:
    """Give a loss of several terms as a sum over samples, with its part of them as weight."""
    if of is None:
        return loss
    weights, every = of
    shares = {name: every / weight if weight else 0.0 for name, weight in weights.items()}
    return sum(loss[name] * share for name, share in shares.items()), samples


def seed_all(seed: int) -> None:
    """Seed the generators of torch, numpy and Python."""
    torch.manual_seed(seed)
    np.random.seed((seed ^ (seed >> 32)) % 2**32)
    random.seed(seed)
