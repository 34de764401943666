"""
A task's own settings, read before the first step.

They are the order of samples by epoch (`sampler`), learning-rate factors by step (`lr`), and
modules and trainable parameters in the task's attributes, outside the model.
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
"""Number of epochs whose orders are cached: loaders prefetch from the next epoch."""

_BATCHES = (
    "must return single samples, not batches: the job has `global_batch_size`. A train function "
    "can have batches of any size, by a DataLoader with a batch_sampler"
)


class TaskOrder:
    """
    The order of samples that a task's `sampler` returns for each epoch.

    Args:
        task: overrides `sampler`.
        data: the training samples.
        seed: seed of the job.

    Raises:
        ValueError: the order is invalid or not reproducible on all ranks.
    """

    def __init__(self, task: Task, data: Dataset[Any], seed: int) -> None:
        self._task, self._data, self._seed = task, data, seed
        self._orders: dict[int, NDArray[np.int64]] = {}
        first = self._read(0)
        self.size = len(first)  #: number of samples in an epoch
        if not self.size:
            raise self._error("gave no samples for epoch 0")
        if not np.array_equal(first, self._read(0)):
            text = (
                "gave two orders when it was called twice for epoch 0, and ranks and restarts need "
                "the same: draw from the global generators, which are seeded before each call, or "
                "from a generator created in sampler() and seeded with `epoch`"
            )
            raise self._error(text)
        self._orders[0] = first

    def __call__(self, epoch: int) -> NDArray[np.int64]:
        """
        Return the order of an epoch, shape [size].

        Raises:
            ValueError: see the class; or the epoch's length differs from the first one's.
        """
        if epoch not in self._orders:
            order = self._read(epoch)
            if len(order) != self.size:
                text = f"gave {len(order)} samples for epoch {epoch}, {self.size} for epoch 0"
                raise self._error(f"{text}: all epochs must have the same number of samples")
            self._orders = {k: v for k, v in self._orders.items() if abs(k - epoch) < _EPOCHS}
            self._orders[epoch] = order
        return self._orders[epoch]

    def digest(self) -> str:
        """Return a hash of the first epoch's order."""
        return hashlib.sha256(self(0).tobytes()).hexdigest()[:16]

    def _read(self, epoch: int) -> NDArray[np.int64]:
        with preserve_rng_state():
            seed_quickly(order_seed(self._seed, epoch))
            indices = self._task.sampler(self._data, epoch)
            order = self._as_array(indices)
        size = len(self._data)  # type: ignore[arg-type]
        outside = order[(order < 0) | (order >= size)]
        if len(outside):
            text = f"gave the sample {outside[0]} for epoch {epoch}, and the data has {size}: 0 to"
            raise self._error(f"{text} {size - 1}")
        order.setflags(write=False)
        return order

    def _as_array(self, indices: Any) -> NDArray[np.int64]:
        """Convert indices in a tensor, an array, a list, or of a torch sampler."""
        if isinstance(indices, torch.Tensor):
            indices = indices.detach().cpu().numpy()
        if not isinstance(indices, Iterable):
            got = f"a {type(indices).__name__}{no_return(indices)}"
            raise self._error(f"must return indices of samples, got {got}")
        listed = indices if isinstance(indices, np.ndarray) else list(indices)
        try:
            order = np.asarray(listed)
        except ValueError:  # lists of different lengths
            raise self._error(_BATCHES) from None
        if order.ndim != 1:
            raise self._error(_BATCHES)
        if order.size and order.dtype.kind not in "iu":
            raise self._error(f"must return whole numbers, got {listed[0]!r}")
        return order.astype(np.int64)

    def _error(self, text: str) -> ValueError:
        return ValueError(f"{method_location(self._task, 'sampler')}sampler() {text}")


def order_of(task: Task, data: Dataset[Any], seed: int) -> TaskOrder | None:
    """
    Return the task's own order of samples; None: the task has no `sampler`.

    Raises:
        ValueError: see `TaskOrder`.
    """
    return TaskOrder(task, data, seed) if overrides(type(task), "sampler") else None


def digest_of(sampler: Sampler) -> str:
    """Return a hash of the task's own order; empty: it has none."""
    return sampler.order.digest() if isinstance(sampler.order, TaskOrder) else ""


def task_parameters(task: Task, model: nn.Module) -> dict[str, Tensor]:
    """
    Find the trainable parameters in a task's attributes that are not the model's.

    These are parameters, leaf tensors that require a gradient, and parameters of modules; also in
    lists, tuples and dicts.

    Args:
        task: the task after its model() was called.
        model: the result of model().

    Returns:
        Tensors by attribute path, such as `log_var` or `heads.0.weight`; each tensor once.
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
    """Return the outermost modules in a task's attributes that are not the model's."""
    return [module for _, module in named_task_modules(task, model)]


def named_task_modules(task: Task, model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the modules of `task_modules` with their attribute paths."""
    in_model = {id(module) for module in model.modules()}
    modules = ((name, leaf) for name, leaf in _leaves(vars(task)) if isinstance(leaf, nn.Module))
    return [(name, module) for name, module in modules if id(module) not in in_model]


def _leaves(value: object, *within: object) -> Iterator[tuple[str, object]]:
    """Return the leaves of nested mappings, lists and tuples with paths; skips cycles."""
    items: Iterable[tuple[object, object]] = ()
    if isinstance(value, Mapping):
        items = value.items()
    elif isinstance(value, list | tuple):
        items = enumerate(value)
    for key, item in items:
        if isinstance(item, nn.Module) or not isinstance(item, Mapping | list | tuple):
            yield str(key), item
        elif not any(item is parent for parent in (value, *within)):
            yield from ((f"{key}.{rest}", leaf) for rest, leaf in _leaves(item, value, *within))


def with_task_schedule(job: Job, task: Task, steps: int) -> Job:
    """
    Return the job with the factors of the task's `lr`; the job unchanged if the task has none.

    Raises:
        SpecError: the run has no number of steps.
        ValueError: a factor is not a number, negative or not finite; names the step.
    """
    if not overrides(type(task), "lr"):
        return job
    if steps == UNBOUNDED:
        text = "alone does not set the number of steps, and the task's lr(step, total) needs it"
        raise SpecError(Problem(("max_time_s",), text, "set `steps` or `epochs`, too"))
    seed_all(job.seed)
    lr = method_of(task, "lr")
    factors = array("d", (_factor(task, lr(step, steps), step) for step in range(steps)))
    return job.with_schedule(TaskSchedule(factors))


def schedule_digest(job: Job) -> str:
    """Return a hash of the task's own learning-rate factors; empty: it has none."""
    schedule = job.task_schedule
    return "" if schedule is None else hashlib.sha256(schedule.factors.tobytes()).hexdigest()[:16]


def _factor(task: Task, value: object, step: int) -> float:
    expected = f"{method_location(task, 'lr')}lr() must return a number, 0 or more"
    if not isinstance(value, Real) or isinstance(value, bool):
        got = f"a {type(value).__name__} for step {step}{no_return(value)}"
        raise ValueError(f"{expected}; got {got}")
    factor = float(value)
    if not (math.isfinite(factor) and factor >= 0):
        raise ValueError(f"{expected}; got {factor} for step {step}")
    return factor
