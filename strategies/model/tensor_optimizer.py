"""Optimizers over a range of the flat vector that need whole tensors, or mix several classes."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
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
    An optimizer of a range of the flat vector, with an optional moving average.

    Args:
        vector: shape [n]; updated in place.
        layout: of the vector; None: a single parameter.
        ema: options of the moving average; None: no average.
    """

    gradient: Tensor

    def __init__(self, vector: Tensor, layout: Layout | None, ema: EMA | None) -> None:
        avoid_compiler_import()
        self._layout = layout or plain_layout(vector.numel(), dtype_name(vector))
        self._vector = vector
        self._slots = np.array([piece.slot for piece in self._layout.pieces], np.int64)
        starts = np.array([piece.start for piece in self._layout.pieces], np.int64)
        self._trained_from_start = starts < self._layout.tail  #: pieces before the tail
        self._average = None if ema is None else AveragedVector(ema, vector, self._layout)

    @abstractmethod
    def step(
        self, rates: Sequence[float], present: Presence = None, *, applied: bool = True
    ) -> None:
        """
        Update the vector from `gradient`.

        Args:
            rates: learning rates, see `rate_of`.
            present: see `Presence`.
            applied: False: the step is skipped, and the average is not updated. Otherwise the
                average is updated even if this range of the vector has no gradient.
        """

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """Return the optimizer state by name, without copying."""

    @abstractmethod
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Load a copy of the `state` of an equal optimizer; an empty one resets the optimizer."""

    @abstractmethod
    def use(self, gradient: Tensor) -> None:
        """Read gradients from another vector of shape [n] in later steps."""

    @property
    def average(self) -> Tensor:
        """Average of the vector, shape [n]; without average or update, the vector itself."""
        return self._vector if self._average is None else self._average.values

    @property
    def state_bytes(self) -> int:
        """Size of the state in bytes, including the average."""
        average = 0 if self._average is None else self._average.state_bytes
        return average + sum(value.nbytes for value in self._state_tensors())

    @abstractmethod
    def _state_tensors(self) -> Iterable[Tensor]:
        """Return the tensors of the state, without the average."""

    def _average_state(self) -> dict[str, Tensor]:
        """Return the average's entries of `state`; empty before the first update."""
        state = {} if self._average is None else self._average.state()
        return {AVERAGE: state[AVERAGE], UPDATES: state[AVERAGED]} if state else {}

    def _load_average(self, state: Mapping[str, Tensor]) -> None:
        if self._average is not None:
            names = {AVERAGE: AVERAGE, AVERAGED: UPDATES}
            self._average.load({key: state[name] for key, name in names.items() if name in state})


class TensorOptimizer(VectorOptimizer):
    """
    Torch's optimizers, with each parameter of a range as a tensor of its own shape.

    Each class named by the groups has one optimizer with torch's default kernels, so the result has
    the same bits as a plain loop. The unfused AdamW is cheap compared with Muon's matrix products.

    Args:
        spec: name and arguments; `spec.whole`.
        vector: shape [n]; updated in place; contains only whole parameters.
        gradient: shape [n].
        layout: of the vector; None: a single parameter.
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
        self._parameters = [nn.Parameter(view) for view in self._views(vector)]
        self.use(gradient)
        self._build_optimizers(spec)

    def _build_optimizers(self, spec: Optimizer) -> None:
        """Build an optimizer for each class, with the param groups that use the class."""
        variants = spec.variants()
        placed = zip(self._layout.pieces, self._parameters, strict=True)
        params: list[list[nn.Parameter]] = [[] for _ in variants]
        for piece, parameter in placed:
            params[piece.group].append(parameter)
        self._torch: list[torch.optim.Optimizer] = []
        groups: dict[int, dict[str, Any]] = {}
        state_of: dict[int, Any] = {}
        for name in dict.fromkeys(variant.name for variant in variants):
            numbers = [number for number, variant in enumerate(variants) if variant.name == name]
            own = [{"params": params[n], **variants[n].arguments()} for n in numbers]
            optim: torch.optim.Optimizer = class_of(name)(own, **variants[numbers[0]].arguments())
            optim.state.clear()  # Adagrad creates state in its constructor, and again in a step
            self._torch.append(optim)
            groups |= dict(zip(numbers, optim.param_groups, strict=True))
            state_of |= {id(p): optim.state for number in numbers for p in params[number]}
        self._groups = [groups[number] for number in range(len(variants))]
        """Param groups by number, see `Piece.group`."""
        self._states = [state_of[id(parameter)] for parameter in self._parameters]
        """For each parameter, the `state` of its optimizer."""

    @override
    def step(
        self, rates: Sequence[float], present: Presence = None, *, applied: bool = True
    ) -> None:
        updated = self._trained_from_start
        if present is not None:
            updated = np.asarray(present, np.bool_)[self._slots]
        for parameter, grad, has in zip(self._parameters, self._gradients, updated, strict=True):
            parameter.grad = grad if has else None
        for group, rate in zip(self._groups, rates, strict=True):
            group["lr"] = rate
        with torch.no_grad():
            for optimizer in self._torch:
                inspect.unwrap(type(optimizer).step)(optimizer)
            if self._average is not None and applied:
                self._average.update(tail=bool((updated & ~self._trained_from_start).any()))

    @override
    def state(self) -> dict[str, Tensor]:
        """Return the state by the names described at `WHOLE`; tensors are not copied."""
        state_dict = {
            f"{WHOLE}{name}/{slot}": value
            for slot, state, parameter in zip(
                self._slots.tolist(), self._states, self._parameters, strict=True
            )
            for name, value in state.get(parameter, {}).items()
            if isinstance(value, Tensor)
        }
        return state_dict | self._average_state()

    @override
    def load(self, state: Mapping[str, Tensor]) -> None:
        indices = {slot: number for number, slot in enumerate(self._slots.tolist())}
        for optimizer in self._torch:
            optimizer.state.clear()
        for key, value in state.items():
            name, _, slot = key.removeprefix(WHOLE).rpartition("/")
            if key.startswith(WHOLE) and int(slot) in indices:
                index = indices[int(slot)]
                parameter_state = self._states[index][self._parameters[index]]
                device = self._vector.device if value.ndim else "cpu"
                parameter_state[name] = value.to(device, copy=True)
        self._load_average(state)

    @override
    def use(self, gradient: Tensor) -> None:
        self.gradient = gradient
        self._gradients = self._views(gradient)

    @override
    def _state_tensors(self) -> Iterable[Tensor]:
        states = chain.from_iterable(optimizer.state.values() for optimizer in self._torch)
        values = chain.from_iterable(state.values() for state in states)
        return (value for value in values if isinstance(value, Tensor))

    def _views(self, vector: Tensor) -> list[Tensor]:
        """View a vector as parameters, each in its own shape."""
        views = []
        for piece, dtype in zip(self._layout.pieces, self._dtypes, strict=True):
            assert piece.shape is not None, "the vector is cut at the bounds of parameters"
            views.append(typed(vector, piece.start, piece.stop, dtype).view(piece.shape))
        return views


def class_of(name: str) -> Any:
    """Return an optimizer class by name; all except LAMB are torch's."""
    return LAMB if name == LAMB.__name__ else getattr(torch.optim, name)
