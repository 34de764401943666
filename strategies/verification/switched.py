"""
A task with some features switched off, so that two ways to train it are comparable.

It is a subclass of the user's class and overrides only what the comparison needs. A job names it
like any other task, with the user's task in `task_args`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import Dataset, IterableDataset
from typing_extensions import override

from distplat.strategies.loop.containers import items_in, rebuilt
from distplat.strategies.loop.seeding import preserve_rng_state
from distplat.strategies.loop.streams import is_stream, rows_of
from distplat.strategies.task import Task, overrides

ENTRY = f"{__name__}:Switched"
"""Entry of the job's field `task`."""


@dataclass(frozen=True)
class Switches:
    """Features of a task that are switched off or changed."""

    double: bool = False
    """Use float64 for model and samples."""
    dropout: bool = True
    """Whether dropout is active."""
    frozen_norm: bool = False
    """Freeze the running statistics of batch norm, and use them; `SyncBatchNorm` is unchanged."""
    samples: int | None = None
    """Number of leading samples to train on; None: all."""


class Switched(Task):
    """Entry point of the job; constructs an object of a subclass of the user's class."""

    def __new__(  # type: ignore[misc]
        cls, entry: str, task_args: Mapping[str, Any], switches: Mapping[str, Any]
    ) -> Task:
        """
        Import the user's class, and return an object of its subclass with the switches set.

        Args:
            entry: `module:Class`.
            task_args: of the user's constructor.
            switches: fields of `Switches`.
        """
        module, _, name = entry.partition(":")
        with preserve_rng_state():  # the import must not change the constructor's random numbers
            cls_ = getattr(importlib.import_module(module), name)
        return switched(cls_, Switches(**switches))(**task_args)

    @override
    def model(self) -> nn.Module:
        """Implemented by the user's class, like all methods here."""
        raise NotImplementedError

    @override
    def train_data(self) -> Dataset[Any]:
        raise NotImplementedError

    @override
    def loss(self, outputs: Any, targets: Any) -> Tensor:
        raise NotImplementedError


def task_fields(entry: str, task_args: Mapping[str, Any], switches: Switches) -> dict[str, Any]:
    """Return the fields of a job that trains the switched task."""
    arguments = {"entry": entry, "task_args": dict(task_args), "switches": asdict(switches)}
    return {"task": ENTRY, "task_args": arguments}


def switched(cls: type[Task], switches: Switches) -> type[Task]:
    """Return a subclass of a task's class with the switches set and no evaluation."""
    base: Any = cls

    def model(self: Any) -> nn.Module:
        if switches.double:
            _convert_own(self, nn.Module, nn.Parameter)
        built = base.model(self)
        return _set(built, switches) if isinstance(built, nn.Module) else built

    def train_data(self: Any) -> Any:
        return _data_of(base.train_data(self), switches)

    def loss(self: Any, outputs: Any, targets: Any) -> Any:
        if switches.double:
            _convert_own(self, Tensor)
        return base.loss(self, outputs, targets)

    def step(self: Any, model: Any, batch: Any) -> Any:
        if switches.double:
            _convert_own(self, Tensor)
        return base.step(self, model, batch)

    def collate(self: Any, samples: list[Any]) -> Any:
        batch = base.collate(self, samples)
        return _converted(batch) if switches.double else batch

    body: dict[str, Any] = {"model": model, "train_data": train_data}
    body |= {"loss": loss} if base.step is Task.step else {"step": step}
    if overrides(base, "collate"):
        body["collate"] = collate
    body |= {"eval_data": lambda self: None, "__module__": cls.__module__}
    return type(cls.__name__, (cls,), body)


def _data_of(data: Any, switches: Switches) -> Any:
    if switches == Switches():
        return data
    return _Stream(data, switches) if is_stream(data) else _SwitchedData(data, switches)


class _SwitchedData(Dataset[Any]):
    """The first samples of a data set, converted as the switches say."""

    def __init__(self, data: Any, switches: Switches) -> None:
        self._data, self._switches = data, switches

    def __len__(self) -> int:
        limit = self._switches.samples
        return len(self._data) if limit is None else min(limit, len(self._data))

    @override
    def __getitem__(self, index: int) -> Any:
        sample = self._data[index]
        return _converted(sample) if self._switches.double else sample


class _Stream(IterableDataset[Any]):
    """The samples of a stream, converted as the switches say."""

    def __init__(self, data: Any, switches: Switches) -> None:
        self._data, self._switches = rows_of(data), switches

    def __len__(self) -> int:
        return len(self._data)

    def set_epoch(self, epoch: int) -> None:
        """Set the stream's epoch, if it supports that."""
        if hasattr(self._data, "set_epoch"):
            self._data.set_epoch(epoch)

    @override
    def __iter__(self) -> Iterator[Any]:
        return map(_converted, self._data) if self._switches.double else iter(self._data)


def _converted(value: Any) -> Any:
    """Return a sample with its floating-point tensors and arrays in float64."""
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, np.ndarray):
        return value.astype(np.float64) if value.dtype.kind == "f" else value
    items = items_in(value)
    return value if items is None else rebuilt(value, [*map(_converted, items)])


def _convert_own(task: Any, *classes: type) -> None:
    """Convert attributes of the task, such as class weights of its loss, to float64."""
    for name, value in [*vars(task).items()]:
        if isinstance(value, nn.Module) and nn.Module in classes:
            value.double()
        elif isinstance(value, nn.Parameter):
            if nn.Parameter in classes:
                value.data = value.data.double()
        elif isinstance(value, Tensor) and Tensor in classes and value.is_floating_point():
            setattr(task, name, value.double())


def _set(model: nn.Module, switches: Switches) -> nn.Module:
    for module in model.modules():
        if not switches.dropout:
            _stop_dropping(module)
        if switches.frozen_norm and isinstance(module, _BatchNorm):
            if not isinstance(module, nn.SyncBatchNorm):
                module.eval()
                module.train = _no_train(module)  # type: ignore[method-assign, assignment]
    return model.double() if switches.double else model


def _no_train(module: nn.Module) -> Callable[..., nn.Module]:
    return lambda mode=True: module


def _stop_dropping(module: nn.Module) -> None:
    """Set every dropout rate to 0: `p` of torch's modules, and attributes named after dropout."""
    if isinstance(module, nn.modules.dropout._DropoutNd):
        module.p = 0.0
    for name, value in vars(module).items():
        if "drop" in name and isinstance(value, float):
            setattr(module, name, 0.0)
