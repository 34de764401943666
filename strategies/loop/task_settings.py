"""
What a task says itself, looked at before the first step.

The order of samples is a function of the epoch, and a learning rate is a factor for each step. In
a task's attributes there may be modules, and what is trained beside the model.
"""

from __future__ import annotations

import hashlib
import math
from array import array
from collections.abc import Iterable, Iterator, Mapping
from numbers import Real
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import Dataset

from distplat.platform.errors import Problem, SpecError
from distplat.platform.lr_schedules import TaskSchedule
from distplat.platform.progress import UNBOUNDED
from distplat.platform.sampler import Sampler
from distplat.platform.spec import Job
from distplat.strategies.algorithms.seeds import order_seed
from distplat.strategies.loop.checks import method_location, no_return
from distplat.strategies.loop.seeding import preserve_rng_state, seed_all, seed_quickly
from distplat.strategies.task import Task, method_of, overrides

_EPOCHS = 2
"""That are kept: loaders read ahead into the next one."""

_BATCHES = (
    "must give one sample after the other, not batches: the job has `global_batch_size`. A train "
    "function takes batches of any size, by a DataLoader with a batch_sampler"
)


class TaskOrder:
    """
    What a task's `sampler` gives for each epoch.

    Args:
        task: has a `sampler` of its own.
        data: its training samples.
        seed: of the job.

    Raises:
        ValueError: it gives no order that all ranks could follow; says what is wrong.
    """

    def __init__(self, task: Task, data: Dataset[Any], seed: int) -> None:
        self._task, self._data, self._seed = task, data, seed
        self._kept: dict[int, NDArray[np.int64]] = {}
        first = self._read(0)
        self.size = len(first)  #: samples of an epoch
        if not self.size:
            raise self._wrong("gave no samples for epoch 0")
        if not np.array_equal(first, self._read(0)):
            text = (
                "gave two orders when it was asked twice for epoch 0, and ranks and restarts need "
                "the same: draw from the global generators, which are seeded before each call, or "
                "from one that you make in sampler() and seed with `epoch`"
            )
            raise self._wrong(text)
        self._kept[0] = first

    def __call__(self, epoch: int) -> NDArray[np.int64]:
        """
        Give the order of an epoch, shape [size].

        Raises:
            ValueError: see the class; or the epoch is longer or shorter than the first.
        """
        if epoch not in self._kept:
            order = self._read(epoch)
            if len(order) != self.size:
                text = f"gave {len(order)} samples for epoch {epoch}, {self.size} for epoch 0"
                raise self._wrong(f"{text}: all epochs must have as many, for so many steps it has")
            self._kept = {k: v for k, v in self._kept.items() if abs(k - epoch) < _EPOCHS}
            self._kept[epoch] = order
        return self._kept[epoch]

    def digest(self) -> str:
        """Fingerprint of the first epoch's order."""
        return hashlib.sha256(self(0).tobytes()).hexdigest()[:16]

    def _read(self, epoch: int) -> NDArray[np.int64]:
        with preserve_rng_state():
            seed_quickly(order_seed(self._seed, epoch))
            indices = self._task.sampler(self._data, epoch)
            order = self._numbers(indices)
        size = len(self._data)  # type: ignore[arg-type]
        outside = order[(order < 0) | (order >= size)]
        if len(outside):
            text = f"gave the sample {outside[0]} for epoch {epoch}, and the data has {size}: 0 to"
            raise self._wrong(f"{text} {size - 1}")
        order.setflags(write=False)
        return order

    def _numbers(self, indices: Any) -> NDArray[np.int64]:
        """Take what it gave: numbers in a tensor, an array, a list, or from a sampler of torch."""
        if isinstance(indices, torch.Tensor):
            indices = indices.detach().cpu().numpy()
        if not isinstance(indices, Iterable):
            what = f"a {type(indices).__name__}{no_return(indices)}"
            raise self._wrong(f"must give numbers of samples, got {what}")
        listed = indices if isinstance(indices, np.ndarray) else list(indices)
        try:
            order = np.asarray(listed)
        except ValueError:  # lists of several lengths
            raise self._wrong(_BATCHES) from None
        if order.ndim != 1:
            raise self._wrong(_BATCHES)
        if order.size and order.dtype.kind not in "iu":
            raise self._wrong(f"must give whole numbers, got {listed[0]!r}")
        return order.astype(np.int64)

    def _wrong(self, text: str) -> ValueError:
        return ValueError(f"{method_location(self._task, 'sampler')}sampler() {text}")


def order_of(task: Task, data: Dataset[Any], seed: int) -> TaskOrder | None:
    """
    Give the order that a task wants; None: it leaves that to the job.

    Args:
        task: the user's.
        data: what its `train_data` gave.
        seed: of the job.

    Raises:
        ValueError: see `TaskOrder`.
    """
    return TaskOrder(task, data, seed) if overrides(type(task), "sampler") else None


def digest_of(sampler: Sampler) -> str:
    """Fingerprint what a task says of the order; empty: nothing."""
    return sampler.order.digest() if isinstance(sampler.order, TaskOrder) else ""


def task_parameters(task: Task, model: nn.Module) -> dict[str, Tensor]:
    """
    Find the trainable parameters in a task's attributes that are not the model's.

    Looked at are parameters, leaf tensors that require a gradient, and modules, alone or in lists,
    tuples and dicts.

    Args:
        task: after its model() was called.
        model: what that gave.

    Returns:
        By path of attributes, such as `log_var` or `heads.0.weight`; each tensor once.
    """
    seen = {id(parameter) for parameter in model.parameters()}
    parameters: dict[str, Tensor] = {}
    for name, leaf in _leaves(vars(task)):
        named = {"": leaf} if isinstance(leaf, Tensor) and leaf.is_leaf else {}
        if isinstance(leaf, nn.Module):
            named = {f".{path}": p for path, p in leaf.named_parameters()}
        for path, tensor in named.items():
            if tensor.requires_grad and id(tensor) not in seen:
                seen.add(id(tensor))
                parameters[name + path] = tensor
    return parameters


def task_modules(task: Task, model: nn.Module) -> list[nn.Module]:
    """Give the modules in a task's attributes that are not the model's own, outermost ones."""
    return [module for _, module in named_task_modules(task, model)]


def named_task_modules(task: Task, model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Give them with the paths of attributes at which they are."""
    own = {id(module) for module in model.modules()}
    modules = ((name, leaf) for name, leaf in _leaves(vars(task)) if isinstance(leaf, nn.Module))
    return [(name, module) for name, module in modules if id(module) not in own]


def _leaves(value: object, *within: object) -> Iterator[tuple[str, object]]:
    """Give what nested mappings, lists and tuples hold, with paths; one in itself is left out."""
    items: Iterable[tuple[object, object]] = ()
    if isinstance(value, Mapping):
        items = value.items()
    elif isinstance(value, list | tuple):
        items = enumerate(value)
    for key, item in items:
        if isinstance(item, nn.Module) or not isinstance(item, Mapping | list | tuple):
            yield str(key), item
        elif not any(item is one for one in (value, *within)):
            yield from ((f"{key}.{rest}", leaf) for rest, leaf in _leaves(item, value, *within))


def with_task_schedule(job: Job, task: Task, steps: int) -> Job:
    """
    Give the job with the rates that its task says; the job as it is, where the task says none.

    Args:
        job: the run.
        task: the user's.
        steps: of the run.

    Raises:
        SpecError: the run has no number of steps.
        ValueError: a factor is no number, negative or not finite; names the step.
    """
    if not overrides(type(task), "lr"):
        return job
    if steps == UNBOUNDED:
        text = "alone does not say how many steps there are, and the task's lr(step, total) asks"
        raise SpecError(Problem(("max_time_s",), text, "give `steps` or `epochs`, too"))
    seed_all(job.seed)
    own = method_of(task, "lr")
    factors = array("d", (_factor(task, own(step, steps), step) for step in range(steps)))
    return job.with_schedule(TaskSchedule(factors))


def schedule_digest(job: Job) -> str:
    """Fingerprint what a task says of the rates; empty: nothing."""
    own = job.task_schedule
    return "" if own is None else hashlib.sha256(own.factors.tobytes()).hexdigest()[:16]


def _factor(task: Task, value: object, step: int) -> float:
    wrong = f"{method_location(task, 'lr')}lr() must give a number, 0 or more"
    if not isinstance(value, Real) or isinstance(value, bool):
        what = f"a {type(value).__name__} for step {step}{no_return(value)}"
        raise ValueError(f"{wrong}; got {what}")
    factor = float(value)
    if not (math.isfinite(factor) and factor >= 0):
        raise ValueError(f"{wrong}; got {factor} for step {step}")
    return factor
