"""
Inputs and results of a reference: samples of each virtual rank and micro-batch, seeds, and learning
rates.
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
from distplat.strategies.loop.batches import SampleRun, count_samples, sample_runs
from distplat.strategies.loop.seeding import preserve_rng_state
from distplat.strategies.loop.streams import is_stream, rows_of
from distplat.strategies.loop.task_settings import TaskOrder
from distplat.strategies.model.tensor_optimizer import class_of
from distplat.strategies.sparse.modules import RowSource, Sharded, tables_of
from distplat.strategies.sparse.rows import initial_rows
from distplat.strategies.task import Task, overrides

TABLES_ATTRIBUTE = "_rows_of_reference"
"""Attribute of the task that holds the tables."""


class TorchRowWiseAdagrad(torch.optim.Optimizer):
    """Adagrad with one number of state for each row; torch has none."""

    def __init__(
        self, params: Iterable[Tensor], lr: float, initial_accumulator_value: float, eps: float
    ) -> None:
        defaults = {"lr": lr, "first": initial_accumulator_value, "eps": eps}
        super().__init__(list(params), defaults)

    @torch.no_grad()
    @override
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
    """Return a factory for the job's optimizer of rows."""
    options = spec.optimizer.model_dump(exclude={"name"})
    if spec.optimizer.name == "RowWiseAdagrad":
        return partial(TorchRowWiseAdagrad, **options)
    return partial(getattr(torch.optim, spec.optimizer.name), **options)


def with_rows(task: Task, seed: int) -> Task:
    """Patch a task so that its model looks up rows in tables held by the task."""
    patched: Any = task
    original = patched.model

    def model() -> nn.Module:
        built: nn.Module = original()
        setattr(patched, TABLES_ATTRIBUTE, _PlainTables(built, seed))
        return built

    patched.model = model
    return task


class _PlainTables(nn.Module):
    """All tables of a model, with the same initial values as on servers."""

    def __init__(self, model: nn.Module, seed: int) -> None:
        super().__init__()
        self.weights = nn.ParameterList()
        for name, module in tables_of(model).items():
            rows = module.num_embeddings
            if rows is None:
                raise ValueError(
                    f"{name} has no num_embeddings: a plain loop cannot replace the table"
                )
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
    """Seed set before each sample is loaded."""
    collate_seed: int
    """Seed set before collate()."""
    seed: int | None = None
    """Seed set before the forward; None: the generators continue."""


class ReferenceSamples(NamedTuple):
    """The samples of an epoch."""

    size: int
    order: TaskOrder | None = None
    """The task's own order; None: the job's."""
    stream: bool = False
    """Whether the data is a stream, read from its start in every pass."""


Batches = Sequence[Sequence[Sequence[MicroBatch]]]
"""Micro-batches by step and rank."""


TermWeights = dict[str, float]
"""Weights by term of a loss."""

Tensors = dict[str, Tensor]
"""Tensors by name."""

ROWS = f"task:{TABLES_ATTRIBUTE}."
"""Prefix of the names of embedding tables."""


@dataclass(frozen=True)
class Recipe:
    """Optimizers, learning rates and options of a training."""

    optimizer: Callable[[Task, Tensors], Sequence[torch.optim.Optimizer]]
    """Builds the optimizers of parameters by name."""
    rates: Sequence[Callable[[float], float]]
    """By step: the scheduled learning rate as a function of the base learning rate."""
    rows: Callable[[Iterable[Tensor]], torch.optim.Optimizer]
    """Builds the optimizer of embedding tables, whose gradients are sparse."""
    clip_norm: float | None = None
    autocast: bool = False
    """Forward under bfloat16 autocast."""
    seed: int = 0
    every: int = 1
    """Steps between recorded states; the last step is always recorded."""


@dataclass
class Trained:
    """Result of a training, by a reference or by the engine."""

    states: dict[int, Tensors]
    """Model state by completed steps; of an engine run some may be missing, but not the last."""
    losses: list[float] = field(default_factory=list)
    used: list[set[str]] = field(default_factory=list)
    """References only, by step: parameters with a gradient."""
    draws: bool = False
    """References only: whether a forward drew random numbers."""


def recipe_of(job: Job, task: Task, every: int = 1) -> Recipe:
    """
    Return the recipe of a job.

    Args:
        job: with `steps` set.
        task: the user's task.
        every: see `Recipe`.

    Raises:
        SpecError: the plain loop does not support the job's training.
    """
    if job.precision == "fp16":
        text = "verify does not support loss scaling"
        raise SpecError(Problem(("precision",), text, "verify with `--set precision=bf16`"))
    spec, tables, rates = job.optimizer, job.embeddings, _rates(job, task)
    rows = torch.optim.SGD if tables is None else row_optimizer(tables)
    is_task_optimizer = isinstance(spec, TaskOptimizer)
    optimizer = _build_task_optimizers if is_task_optimizer else partial(_build_optimizers, spec)
    autocast = job.precision == "bf16"
    return Recipe(optimizer, rates, rows, job.clip_norm, autocast, job.seed, every)


def _rates(job: Job, task: Task) -> list[Callable[[float], float]]:
    """Return the scheduled rate of each step, by the task's `lr` or else the job's schedule."""
    steps, schedule = job.steps or 0, job.lr_schedule
    if overrides(type(task), "lr"):
        return [partial(mul, float(task.lr(step, steps))) for step in range(steps)]
    return [partial(schedule.rate, step=step, total_steps=steps) for step in range(steps)]


def _build_task_optimizers(task: Task, named: Tensors) -> Sequence[torch.optim.Optimizer]:
    """Build the task's own optimizers, for the parameters among the tensors."""
    parameters = [(name, p) for name, p in named.items() if isinstance(p, nn.Parameter)]
    optimizers = task.optimizer(parameters)
    return optimizers if isinstance(optimizers, list | tuple) else [optimizers]


def _build_optimizers(
    spec: Optimizer, task: Task, named: Tensors
) -> Sequence[torch.optim.Optimizer]:
    """Build one torch optimizer for each class, with a param group for each of the job's."""
    patterns = [group.match.replace(" ", "").split(",") for group in spec.groups] + [["*"]]
    arguments: list[dict[str, Any]] = [*(group.arguments() for group in spec.groups), {}]
    class_names = [group.name or spec.name for group in spec.groups] + [spec.name]
    params: list[list[Tensor]] = [[] for _ in patterns]
    for name, tensor in named.items():
        matches = (n for n, group in enumerate(patterns) for p in group if fnmatchcase(name, p))
        params[next(matches)].append(tensor)
    optimizers = []
    for class_name in dict.fromkeys(class_names):
        param_groups = [
            {"params": tensors, **options}
            for group_class, tensors, options in zip(class_names, params, arguments, strict=True)
            if tensors and group_class == class_name
        ]
        defaults = spec.arguments() if class_name == spec.name else {"lr": 0.0}
        if param_groups:
            optimizers.append(class_of(class_name)(param_groups, **defaults))
    return optimizers


def split_batches(job: Job, samples: ReferenceSamples, *, merged: bool = False) -> Batches:
    """
    Split the batches as the job's strategy does.

    Args:
        job: with `steps` set.
        samples: of the data set.
        merged: merge the ranks' micro-batches, for models that compute across ranks.
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
            runs = sample_runs(sampler, step, rank, micro)
            first = step_seed(job.seed, step, rank)
            ranks.append([_micro_batch(run, None if n else first) for n, run in enumerate(runs)])
        schedule.append([_merge(ranks)] if merged else ranks)
    return schedule


def whole_batches(job: Job, samples: ReferenceSamples) -> Batches:
    """Return whole batches, for a single rank."""
    sampler, steps = _sampler(job, samples, 1), range(job.steps or 0)
    return [
        [[_micro_batch(run, None) for run in sample_runs(sampler, step, 0, 1)]] for step in steps
    ]


def _micro_batch(run: SampleRun, seed: int | None) -> MicroBatch:
    positions = range(run.first, run.first + len(run.ids))
    seeds = [derive_seed(run.seed, position) for position in positions]
    return MicroBatch(run.ids, seeds, collate_seed(run.seed, run.first), seed)


def _merge(ranks: list[list[MicroBatch]]) -> list[MicroBatch]:
    count = max(len(forwards) for forwards in ranks)
    merged = []
    for number in range(count):
        group = [forward for forwards in ranks for forward in forwards[number : number + 1]]
        ids = [index for forward in group for index in forward.ids]
        seeds = [seed for forward in group for seed in forward.sample_seeds]
        merged.append(MicroBatch(ids, seeds, group[0].collate_seed, group[0].seed))
    return merged


def _sampler(job: Job, samples: ReferenceSamples, world: int) -> Sampler:
    data, sizes = job.data, (samples.size, job.global_batch_size, world, job.seed)
    return Sampler(*sizes, data.shuffle, data.drop_last, samples.order, samples.stream)


def load_stream(data: Any, schedule: Batches, seed: int) -> Any:
    """Load all samples of a stream that a schedule needs; return other data unchanged."""
    if not is_stream(data):
        return data
    last = max(max(forward.ids) for ranks in schedule for rank in ranks for forward in rank)
    loaded: list[Any] = []
    with preserve_rng_state():
        for epoch in itertools.count():
            seed_all(order_seed(seed, epoch))
            if hasattr(data, "set_epoch"):
                data.set_epoch(epoch)
            samples = iter(rows_of(data))
            for position in itertools.count():
                seed_all(derive_seed(epoch_seed(seed, epoch), position))
                try:
                    loaded.append(next(samples))
                except StopIteration:
                    break
                if len(loaded) > last:
                    return loaded
    raise AssertionError("unreachable: the loop returns when all samples are loaded")


def load_batch(task: Task, data: Any, forward: MicroBatch) -> tuple[Any, int]:
    """
    Load and collate the samples of a micro-batch, without changing the random generators.

    Returns:
        The batch, and its number of samples; see `count_samples`.
    """
    getitems = None if isinstance(data, Subset) else getattr(data, "__getitems__", None)
    with preserve_rng_state():
        if getitems is not None:
            seed_all(forward.sample_seeds[0])
            samples = getitems(forward.ids)
        else:
            samples = []
            for index, seed in zip(forward.ids, forward.sample_seeds, strict=True):
                seed_all(seed)
                samples.append(data[index])
        seed_all(forward.collate_seed)
        batch = task.collate(samples)
        return batch, count_samples(batch, samples)


def terms_of(
    task: Task, data: Any, step: Sequence[Sequence[MicroBatch]]
) -> tuple[TermWeights, int] | None:
    """Return the weights of a step's loss terms, and its samples; None: the loss is one term."""
    if not overrides(type(task), "weights"):
        return None
    forwards = [forward for forwards in step for forward in forwards]
    total: TermWeights = {}
    for forward in forwards:
        for name, weight in task.weights(load_batch(task, data, forward)[0]).items():
            total[name] = total.get(name, 0.0) + float(weight)
    return total, sum(len(forward.ids) for forward in forwards)


def merge_terms(loss: Any, step_terms: tuple[TermWeights, int] | None, samples: int) -> Any:
    """Return a loss of several terms as (sum over samples, weight); see `terms_of`."""
    if step_terms is None:
        return loss
    weights, step_samples = step_terms
    shares = {name: step_samples / weight if weight else 0.0 for name, weight in weights.items()}
    return sum(loss[name] * share for name, share in shares.items()), samples


def seed_all(seed: int) -> None:
    """Seed the generators of torch, numpy and Python."""
    torch.manual_seed(seed)
    np.random.seed((seed ^ (seed >> 32)) % 2**32)
    random.seed(seed)
