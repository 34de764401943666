"""The optimizers of a train function under `ps-async`, as servers run them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import TypeAdapter
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from distplat.platform.errors import Problem, SpecError
from distplat.platform.optimizers import AnyOptimizer
from distplat.platform.shard_map import OwnLoop

_SPECS: TypeAdapter[Any] = TypeAdapter(AnyOptimizer)
_SUPPORTED = ("SGD", "Adam", "AdamW", "RMSprop", "Adagrad", "Adadelta", "Adamax", "NAdam", "RAdam")
_IGNORED_ARGUMENTS = {"params", "foreach", "fused", "capturable", "differentiable"}
"""Arguments that do not affect the result of an update."""

REMEDY = "use `strategy: ring` or `ps-sync`, where each worker runs the update itself"


class OptimizerConfig:
    """
    The fixed configuration of all prepared optimizers, and their current settings.

    Args:
        optimizers: of one class; each parameter is in one group of one of them.

    Raises:
        SpecError: The servers do not support the optimizers; the message says why.
    """

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        names = sorted({type(optimizer).__name__ for optimizer in optimizers})
        name = names[0]
        for cls in map(type, optimizers):
            if cls.__name__ not in _SUPPORTED or cls.__module__.split(".")[0] != "torch":
                what = f"servers of ps-async do not support {cls.__name__}"
                what += f": they support {', '.join(_SUPPORTED)}"
                raise SpecError(Problem(("task",), what, REMEDY))
        if len(names) > 1:
            what = f"servers of ps-async run one class of optimizer, and got {', '.join(names)}"
            raise SpecError(Problem(("task",), what, f"use one class for all, or {REMEDY}"))
        self._groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        groups = enumerate(self._groups, 1)
        self._group_numbers = {id(p): number for number, group in groups for p in group["params"]}
        if len(self._group_numbers) < sum(len(group["params"]) for group in self._groups):
            what = "two optimizers have a parameter in common: servers of ps-async keep one state"
            raise SpecError(Problem(("task",), what, REMEDY))
        default = _SPECS.validate_python({"name": name, "lr": 1.0})
        self._fields = [f for f in type(default).model_fields if f not in ("name", "groups")]
        for optimizer in optimizers:
            _check_arguments(optimizer, self._fields)
        self._flags = [*map(self._flags_of, self._groups)]
        group_specs = [{"match": f"{n}", **flags} for n, flags in enumerate(self._flags, 1)]
        spec = _SPECS.validate_python({"name": name, "lr": 1.0, "groups": group_specs})
        settings = tuple(tuple(n for n, _ in self._numbers_of(group)) for group in self._groups)
        self.own_loop = OwnLoop(spec, settings)

    def group_of(self, parameter: Tensor) -> int:
        """Return the number of a parameter's group, from 1; 0: no group."""
        return self._group_numbers.get(id(parameter), 0)

    def settings(self) -> NDArray[np.float64]:
        """
        Return the current numeric settings, see `OwnLoop.settings`.

        Raises:
            SpecError: A setting that must not change has changed.
        """
        for group, flags in zip(self._groups, self._flags, strict=True):
            if (current := self._flags_of(group)) != flags:
                changed = ", ".join(name for name in flags if flags[name] != current[name])
                what = f"{changed} of an optimizer has changed: servers of ps-async cannot follow"
                raise SpecError(Problem(("task",), what, REMEDY))
        values = [value for group in self._groups for _, value in self._numbers_of(group)]
        return np.array(values, np.float64)

    def _flags_of(self, group: Mapping[str, Any]) -> dict[str, bool]:
        return {k: group[k] for k in self._fields if isinstance(group.get(k), bool)}

    def _numbers_of(self, group: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
        for name in self._fields:
            value = group.get(name)
            if name == "betas" and value is not None:
                yield from zip(("beta1", "beta2"), map(float, value), strict=True)
            elif value is not None and not isinstance(value, bool):
                yield name, float(value)


def _check_arguments(optimizer: Optimizer, supported: Sequence[str]) -> None:
    """Reject non-default arguments that servers do not support."""
    defaults = type(optimizer)([nn.Parameter(torch.zeros(1))], lr=1.0).defaults  # type: ignore[call-arg]
    for group in optimizer.param_groups:
        for name, default in defaults.items():
            if (
                name not in supported
                and name not in _IGNORED_ARGUMENTS
                and group.get(name) != default
            ):
                what = f"{type(optimizer).__name__} has {name}={group.get(name)!r}, which servers "
                raise SpecError(Problem(("task",), what + "of ps-async do not support", REMEDY))
