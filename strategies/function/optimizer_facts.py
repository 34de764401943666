"""
A train function's optimizer as servers make it anew: what stays, and the numbers that may change.

    SGD(groups: lr, momentum, nesterov)     stays: class SGD, nesterov of each group
                                            with each push: lr, momentum, ... of each group
"""

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
_KINDS = ("SGD", "Adam", "AdamW", "RMSprop", "Adagrad", "Adadelta", "Adamax", "NAdam", "RAdam")
_OF_TORCH = {"params", "foreach", "fused", "capturable", "differentiable"}
"""What says nothing of the update's result."""

REMEDY = "use `strategy: ring` or `ps-sync`, where each worker makes the update itself"


class OptimizerFacts:
    """
    All prepared optimizers of a train function, as one.

    Args:
        optimizers: of one class; each parameter is in one group of one of them.

    Raises:
        SpecError: servers cannot make their updates; says why.
    """

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        kinds = sorted({type(one).__name__ for one in optimizers})
        name = kinds[0]
        for one in optimizers:
            if type(one).__name__ not in _KINDS or type(one).__module__.split(".")[0] != "torch":
                what = f"servers of ps-async make no updates of {type(one).__name__}"
                what += f": they know {', '.join(_KINDS)}"
                raise SpecError(Problem(("task",), what, REMEDY))
        if len(kinds) > 1:
            what = f"servers of ps-async run one class of optimizer, and got {', '.join(kinds)}"
            raise SpecError(Problem(("task",), what, f"use one class for all, or {REMEDY}"))
        self._groups = [group for one in optimizers for group in one.param_groups]
        groups = enumerate(self._groups, 1)
        self._numbers = {id(one): number for number, group in groups for one in group["params"]}
        if len(self._numbers) < sum(len(group["params"]) for group in self._groups):
            what = "two optimizers have a parameter in common: servers of ps-async keep one state"
            raise SpecError(Problem(("task",), what, REMEDY))
        bare = _SPECS.validate_python({"name": name, "lr": 1.0})
        self._fields = [one for one in type(bare).model_fields if one not in ("name", "groups")]
        for optimizer in optimizers:
            _check_arguments(optimizer, self._fields)
        self._flags = [*map(self._flags_of, self._groups)]
        made = [{"match": f"{n}", **flags} for n, flags in enumerate(self._flags, 1)]
        spec = _SPECS.validate_python({"name": name, "lr": 1.0, "groups": made})
        names = tuple(tuple(n for n, _ in self._numbers_of(group)) for group in self._groups)
        self.own_loop = OwnLoop(spec, names)

    def group_of(self, parameter: Tensor) -> int:
        """Give the number of a parameter's group, from 1; 0: it is in none."""
        return self._numbers.get(id(parameter), 0)

    def settings(self) -> NDArray[np.float64]:
        """
        Give the numbers as they are now, see `OwnLoop.settings`.

        Raises:
            SpecError: something else than these has changed.
        """
        for group, flags in zip(self._groups, self._flags, strict=True):
            if (now := self._flags_of(group)) != flags:
                changed = ", ".join(name for name in flags if flags[name] != now[name])
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


def _check_arguments(optimizer: Optimizer, known: Sequence[str]) -> None:
    """Refuse arguments that servers would not have, where they say something."""
    plain = type(optimizer)([nn.Parameter(torch.zeros(1))], lr=1.0).defaults  # type: ignore[call-arg]
    for group in optimizer.param_groups:
        for name, usual in plain.items():
            if name not in known and name not in _OF_TORCH and group.get(name) != usual:
                what = f"{type(optimizer).__name__} has {name}={group.get(name)!r}, which servers "
                raise SpecError(Problem(("task",), what + "of ps-async do not know", REMEDY))
