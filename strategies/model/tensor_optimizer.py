"""Optimizers that look at whole tensors, or are several, over the parameters in a run."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from typing_extensions import override

from distplat.platform.model_options import EMA
from distplat.platform.optimizers import Optimizer
from distplat.platform.vector_layout import Layout, plain_layout
from distplat.strategies.model.ema import AVERAGE, AVERAGED, AveragedVector
from distplat.strategies.model.lamb import LAMB
from distplat.strategies.model.optimizer_state import UPDATES, WHOLE, Presence
from distplat.strategies.model.parameter_layout import dtype_name, segments_of, typed
from distplat.strategies.torch_compat import avoid_compiler_import


class VectorOptimizer(ABC):
    """
    An optimizer of a run of the flat vector, and the average that is kept beside it.

    Args:
        vector: shape [n]; updated in place.
        layout: what lies where; None: a single parameter.
        ema: the average of the vector; None: there is none.
    """

    gradient: Tensor

    def __init__(self, vector: Tensor, layout: Layout | None, ema: EMA | None) -> None:
        avoid_compiler_import()
        self._layout = layout or plain_layout(vector.numel(), dtype_name(vector))
        self._vector = vector
        self._slots = np.array([piece.slot for piece in self._layout.pieces], np.int64)
        starts = np.array([piece.start for piece in self._layout.pieces], np.int64)
        self._at_first = starts < self._layout.tail  #: who is no tail
        self._average = None if ema is None else AveragedVector(ema, vector, self._layout)

    @abstractmethod
    def step(
        self, rates: Sequence[float], present: Presence = None, *, applied: bool = True
    ) -> None:
        """
        Make an update from `gradient`.

        Args:
            rates: learning rates, see `rate_of`.
            present: see `Presence`.
            applied: False: the step is left out, so that the average stays, too. In another one it
                moves, also where this run of the vector has no gradient.
        """

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """Give what it remembers by name; no copies."""

    @abstractmethod
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state` of an equal optimizer gave; copied. Nothing: as if it were new."""

    @abstractmethod
    def use(self, gradient: Tensor) -> None:
        """Take gradients from another vector from now on, shape [n]."""

    @property
    def average(self) -> Tensor:
        """The average of the vector, shape [n]; without one, and before an update, the vector."""
        return self._vector if self._average is None else self._average.values

    @property
    def state_bytes(self) -> int:
        """Memory that the state takes."""
        average = 0 if self._average is None else self._average.state_bytes
        return average + sum(value.nbytes for value in self._kept())

    @abstractmethod
    def _kept(self) -> Iterable[Tensor]:
        """Give the tensors of the state, the average apart."""

    def _averaged(self) -> dict[str, Tensor]:
        """Give what `state` has of the average; nothing before the first update."""
        state = {} if self._average is None else self._average.state()
        return {AVERAGE: state[AVERAGE], UPDATES: state[AVERAGED]} if state else {}

    def _load_average(self, state: Mapping[str, Tensor]) -> None:
        if self._average is not None:
            named = {AVERAGE: AVERAGE, AVERAGED: UPDATES}
            self._average.load({key: state[name] for key, name in named.items() if name in state})


class TensorOptimizer(VectorOptimizer):
    """
    Torch's optimizers, with each parameter of a run as a tensor of its own shape.

    There is one for each class that the groups name. Kernels are those that torch takes by itself,
    so a run has the bits of a plain loop: beside Muon's matrix products AdamW's own cost little.

    Args:
        spec: name and arguments; `spec.whole`.
        vector: shape [n]; updated in place. It is cut at the bounds of parameters.
        gradient: shape [n].
        layout: what lies where; None: a single parameter.
        ema: see `FlatOptimizer`.
    """

    def __init__(
        self,
        spec: Optimizer,
        vector: Tensor,
        gradient: Tensor,
        layout: Layout | None = None,
        ema: EMA | None = None,
    ) -> None:
        super().__init__(vector, layout, ema)
        segments = self._layout.segments
        self._dtypes = [segments[at].dtype for at in segments_of(self._layout).tolist()]
        self._parameters = [nn.Parameter(one) for one in self._views(vector)]
        self.use(gradient)
        self._make(spec)

    def _make(self, spec: Optimizer) -> None:
        """Have an optimizer of each class that is named, all with param groups of their own."""
        variants = spec.variants()
        placed = zip(self._layout.pieces, self._parameters, strict=True)
        params: list[list[nn.Parameter]] = [[] for _ in variants]
        for piece, parameter in placed:
            params[piece.group].append(parameter)
        self._torch: list[torch.optim.Optimizer] = []
        groups: dict[int, dict[str, Any]] = {}
        state_of: dict[int, Any] = {}
        for name in dict.fromkeys(one.name for one in variants):
            numbers = [number for number, one in enumerate(variants) if one.name == name]
            some = [{"params": params[n], **variants[n].arguments()} for n in numbers]
            optim: torch.optim.Optimizer = class_of(name)(some, **variants[numbers[0]].arguments())
            optim.state.clear()  # Adagrad's, which it makes again with an update
            self._torch.append(optim)
            groups |= dict(zip(numbers, optim.param_groups, strict=True))
            state_of |= {id(p): optim.state for number in numbers for p in params[number]}
        self._groups = [groups[number] for number in range(len(variants))]
        """By number, see `Piece.group`."""
        self._states = [state_of[id(one)] for one in self._parameters]
        """What is remembered of a parameter stands there, by the parameter."""

    @override
    def step(
        self, rates: Sequence[float], present: Presence = None, *, applied: bool = True
    ) -> None:
        """Update the parameters by torch's optimizer; `rates`: by parameter group."""
        updated = self._at_first if present is None else np.asarray(present, np.bool_)[self._slots]
        for parameter, own, has in zip(self._parameters, self._gradients, updated, strict=True):
            parameter.grad = own if has else None
        for group, rate in zip(self._groups, rates, strict=True):
            group["lr"] = rate
        with torch.no_grad():
            for one in self._torch:
                inspect.unwrap(type(one).step)(one)
            if self._average is not None and applied:
                self._average.update(tail=bool((updated & ~self._at_first).any()))

    @override
    def state(self) -> dict[str, Tensor]:
        """Give what it remembers, see `WHOLE`; tensors are no copies."""
        state_dict = {
            f"{WHOLE}{name}/{slot}": value
            for slot, state, parameter in zip(
                self._slots.tolist(), self._states, self._parameters, strict=True
            )
            for name, value in state.get(parameter, {}).items()
            if isinstance(value, Tensor)
        }
        return state_dict | self._averaged()

    @override
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state` of an equal optimizer gave; copied. Nothing: as if it were new."""
        indices = {slot: number for number, slot in enumerate(self._slots.tolist())}
        for one in self._torch:
            one.state.clear()
        for key, value in state.items():
            name, _, slot = key.removeprefix(WHOLE).rpartition("/")
            if key.startswith(WHOLE) and int(slot) in indices:
                index = indices[int(slot)]
                kept = self._states[index][self._parameters[index]]
                kept[name] = value.to(self._vector.device if value.ndim else "cpu", copy=True)
        self._load_average(state)

    @override
    def use(self, gradient: Tensor) -> None:
        """Take gradients from another vector from now on, shape [n]."""
        self.gradient = gradient
        self._gradients = self._views(gradient)

    @override
    def _kept(self) -> Iterable[Tensor]:
        kept = (
            value for one in self._torch for state in one.state.values() for value in state.values()
        )
        return (value for value in kept if isinstance(value, Tensor))

    def _views(self, vector: Tensor) -> list[Tensor]:
        """View a vector as the parameters, each in its own shape."""
        views = []
        for piece, dtype in zip(self._layout.pieces, self._dtypes, strict=True):
            assert piece.shape is not None, "the vector is cut at the bounds of parameters"
            views.append(typed(vector, piece.start, piece.stop, dtype).view(piece.shape))
        return views


def class_of(name: str) -> Any:
    """Give the class of an optimizer that a job names; all but one are torch's."""
    return LAMB if name == LAMB.__name__ else getattr(torch.optim, name)
