"""
A model whose trainable parameters lie in one flat vector, and whose gradients lie in another.

    model.layers[0].weight   .bias   pad  model.layers[1].weight  ...
    |------------------------|-------|--|------------------------|
    params [n]   views of it are the parameters: moving the vector moves the model
    grads  [n]   views of it are the gradients: backward adds into it, nothing is packed

A push sends one vector, an all-reduce reduces one vector, and an optimizer updates one vector. Each
tensor starts on a cache line; the padding between tensors is zero and stays zero under every
supported optimizer. Parameters of several dtypes lie in segments of one dtype each
(platform/vector_layout.py); see docs/decisions/flat_vectors.md.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from operator import attrgetter

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from distplat.platform.errors import Problem, SpecError
from distplat.platform.fork_guard import ForkGuard
from distplat.platform.vector_layout import Segment
from distplat.strategies.model.gradients import Gradients
from distplat.strategies.model.parameter_layout import (
    GroupOf,
    Slot,
    bits_of,
    by_type,
    dtype_name,
    first_non_finite,
    lay_out,
    owners_of,
    room_for,
    scale_in_place,
    squared_norm_of,
    trainable,
    typed_views,
    unfreeze_error,
)
from distplat.strategies.model.shared_memory import TIE, check_memory
from distplat.strategies.sparse.modules import dense_parameters

_MODULE_CHECK_STEPS = 3
"""First steps in which all modules are traversed to detect parameters added after the start."""

TORN = -1
"""Version of parameters that are partially overwritten and must not be used."""


_COPIED_BYTES = 2**18
"""Minimum size at which copying a gradient is faster than zeroing the old one and adding."""


_REQUIRES_GRAD = attrgetter("requires_grad")


class FlatModel:
    """
    A model whose parameters and gradients are views of flat vectors.

    Frozen parameters keep their own memory, which a forward may write to. With `unfreezes` the
    vector also reserves space for them at its end. This tail is unused until a frozen parameter
    becomes trainable, at a step on which all ranks agree (`activate_tail`).

    Args:
        model: on its device; its parameters become views of the vector, in place.
        extra: trainable parameters outside the model, by name.
        unfreezes: whether frozen parameters may become trainable later.
        group_of: returns the number of a parameter's optimizer group.
        takes: returns whether the optimizer can update a parameter of a name and shape; other
            frozen parameters stay frozen.
        owned: whether `.grad` stays the tensor that autograd created, see `Gradients`; `grads`
            then holds only gradients for which `ready` was called.

    Raises:
        ValueError: no trainable parameter, or trainable parameters on several devices.
        SpecError: trainable parameters that cannot be part of a vector; names them.
    """

    def __init__(
        self,
        model: nn.Module,
        extra: Mapping[str, Tensor] | None = None,
        *,
        unfreezes: bool = False,
        group_of: GroupOf = lambda name: 0,
        takes: Callable[[str, Sequence[int]], bool] = lambda name, shape: True,
        owned: bool = False,
    ) -> None:
        self.model, self._owns_grads = model, owned
        self.process = ForkGuard()  #: of the vectors, whose memory may be shared
        named = by_type(trainable(model, extra or {}))
        trained = {name for name, _ in named}
        self.extra = {name: p for name, p in (extra or {}).items() if name in trained}
        check_memory(model, dict(named))
        frozen = [(n, p) for n, p in model.named_parameters() if not p.requires_grad]
        may_unfreeze = [(n, p) for n, p in frozen if unfreezes and takes(n, p.shape)]
        tail = by_type(room_for(may_unfreeze, named, model))
        movable = {id(p) for _, p in tail}
        self._fixed = [(name, p) for name, p in frozen if id(p) not in movable]
        self.parameters = [p for _, p in named + tail]  #: in the order of `slots`
        self._trained = len(named)  #: number of parameters before the tail
        self.slots, self.layout, dtype = lay_out(named, tail, group_of)
        device = self.parameters[0].device
        self.params = torch.zeros(self.layout.size, dtype=dtype, device=device)
        self.grads = torch.zeros_like(self.params)
        self.unsaved: frozenset[str] = frozenset()  #: frozen parameters not saved in checkpoints
        self.version = 0  #: number of updates applied to `params`; `TORN`: partially overwritten
        for slot, parameter in zip(self.slots, self.parameters, strict=True):
            slot.view(self.params).copy_(parameter.detach())
        self.present: NDArray[np.bool_] = np.arange(len(self.slots)) < self._trained
        """By slot: whether a backward of this step produced a gradient on this rank. Before the
        first step: whether the slot is trained."""
        #: by slot of the tail: whether it is trained; whether it is unfrozen but not yet trained
        self.active, self.unfrozen = np.zeros((2, len(tail)), np.bool_)
        self._owners = owners_of(model, self.parameters)
        self._module_checks = 0
        self.began = False  #: whether this rank has run a backward in this step
        self._copies = False  #: whether hooks call `ready` in each backward
        self._check_finite = False  #: whether `ready` checks gradients for NaN and infinity
        self._bind_views()

    @property
    def size(self) -> int:
        """Number of elements of a flat vector, including padding and tail."""
        return self.params.numel()

    @property
    def mixed(self) -> bool:
        """Whether the parameters have several dtypes, which makes the vectors byte vectors."""
        return len({segment.dtype for segment in self.layout.segments}) > 1

    @property
    def trained_slots(self) -> list[Slot]:
        """Slots of the initially trainable parameters, which precede the tail."""
        return self.slots[: self._trained]

    def digest(self) -> str:
        """Return a hash of names, shapes and dtypes; equal on all ranks that train one model."""
        text = repr((self.slots, self.layout.tail, self.params.dtype))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def state_dict(self) -> dict[str, Tensor]:
        """Return the model's state dict plus the extra parameters by name, without copying."""
        return {**self.model.state_dict(), **{k: p.detach() for k, p in self.extra.items()}}

    def move(self, params: Tensor, grads: Tensor) -> None:
        """
        Replace the flat vectors by others of shape [n] and the same dtype.

        Nothing is copied: the caller has filled `params`.
        """
        self.params, self.grads = params, grads
        self._bind_views()

    @contextmanager
    def with_params(self, params: Tensor) -> Iterator[None]:
        """Let the model compute with other parameters, shape [n]; only between steps."""
        live = [*zip(self._live_slots, self._live_parameters, strict=True)]
        for slot, parameter in live:
            parameter.data = slot.view(params)
        try:
            yield
        finally:
            for slot, parameter in live:
                parameter.data = slot.view(self.params)

    def written(self, params: Tensor, before: Tensor) -> str | None:
        """
        Return the name of a parameter written inside `with_params`, or None.

        Args:
            params: the vector passed to `with_params`, shape [n].
            before: a copy of `params` from before the block.
        """
        for slot, parameter in zip(self._live_slots, self._live_parameters, strict=True):
            view, old = slot.view(params), bits_of(slot.view(before))
            if parameter.data_ptr() != view.data_ptr() or not torch.equal(bits_of(view), old):
                return slot.name
        return None

    def typed(self, vector: Tensor) -> list[Tensor]:
        """View the trained segments of a vector of this model, each in its own dtype."""
        return typed_views(vector, self.segments)

    @property
    def segments(self) -> tuple[Segment, ...]:
        """Trained segments of the vectors, including the tail once a tail parameter is trained."""
        segments = self.layout.segments
        if self.active.any():
            return segments
        return tuple(segment for segment in segments if segment.start < self.layout.tail)

    def slots_in(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Yield index, first and last (exclusive) element of each slot in a range of the vector."""
        for index, slot in enumerate(self.slots):
            first, last = max(start, slot.offset), min(stop, slot.stop)
            if first < last:
                yield index, first, last

    def elements_of(
        self, slot: Slot, first: int, last: int, start: int
    ) -> tuple[tuple[int, int] | None, int]:
        """
        Convert a range of vector elements to elements of a slot; they differ in byte vectors.

        Args:
            slot: a slot of this model.
            first: first vector element, inside the slot.
            last: last vector element, exclusive.
            start: vector element from which the returned offset counts.

        Returns:
            First and last (exclusive) element of the slot, None for the whole slot; and the offset
            of the first element.
        """
        item = slot.dtype.itemsize // self.params.itemsize if self.mixed else 1
        whole = (first, last) == (slot.offset, slot.stop)
        run = None if whole else ((first - slot.offset) // item, (last - slot.offset) // item)
        return run, (first - start) // item

    def begin_step(self) -> None:
        """
        Zero the gradients and clear `present`.

        Raises:
            SpecError: a frozen parameter had a gradient, but `activate_tail` was not called.
        """
        lost = self.unfrozen & self.present[self._trained :]
        if lost.any():
            name = self.slots[self._trained + int(lost.argmax())].name
            raise unfreeze_error(self.version, f"{name!r} cannot be unfrozen under this strategy")
        for run in self._zeroed:
            run.zero_()
        self.present[:] = self.began = False
        self.gradients.begin()

    def before_backward(self) -> None:
        """
        Prepare for a micro-batch's backward; call it after forward and loss.

        Raises:
            SpecError: see `Gradients.before_backward`.
        """
        self.process.exit_if_forked()  # before backward writes into memory that a fork shares
        self.gradients.before_backward()
        self._detect_unfrozen()
        self.began = True

    def collect(self) -> None:
        """
        Update `grads` and `present` after a backward.

        Raises:
            SpecError: see `Gradients.collect`.
        """
        self.gradients.collect()
        self._detect_unfrozen()
        for number in np.flatnonzero(self.unfrozen).tolist():
            index = self._trained + number
            grad = self.parameters[index].grad
            if grad is not None:  # not a view of `grads`; it holds the sum over micro-batches
                self.slots[index].view(self.grads).copy_(grad)
                self.present[index] = True

    def copy_when_ready(self, copies: bool, *, check_finite: bool = False) -> None:
        """
        Choose whether large gradients are copied by hooks or accumulated; only between steps.

        Args:
            copies: hooks call `ready` for every trained slot in every backward, and the caller
                calls `zero_missing` in each step. Large gradients then need no zeroing.
            check_finite: `ready` checks copied gradients for NaN and infinity, see `finite`.
        """
        self._copies, self._check_finite = copies, check_finite
        self._bind_views()

    def zero_missing(self) -> None:
        """Zero the gradients of a step in which this rank ran no backward."""
        if not self.began:
            self.gradients.zero_missing()

    @property
    def tail_in_use(self) -> bool:
        """Whether a parameter of the tail is trained or unfrozen on this rank."""
        return bool(self.active.any() or self.unfrozen.any())

    def activate_tail(self, present: NDArray[np.bool_], step: int) -> None:
        """
        Start to train frozen parameters that have a gradient; all ranks call this in each step.

        This rank's gradients of these parameters are already in the vector.

        Args:
            present: by slot, whether it has a gradient on any rank.
            step: for error messages.

        Raises:
            SpecError: this rank ran a backward in which such a parameter was frozen.
        """
        new = present[self._trained :] & ~self.active
        if not new.any():
            return
        for number in np.flatnonzero(new & ~self.unfrozen).tolist() if self.began else ():
            name = self.slots[self._trained + number].name
            raise unfreeze_error(step, f"{name!r} is frozen on this worker, on others not")
        self.enable_tail(new)

    def enable_tail(self, union: NDArray[np.bool_]) -> None:
        """Start to train frozen parameters, with their values in `params`."""
        self.active |= union
        self.unfrozen &= ~self.active
        for number in np.flatnonzero(self.active).tolist():
            self.parameters[self._trained + number].requires_grad_(True)
        self._bind_views()

    def fill_tail(self) -> None:
        """Copy the frozen parameters into `params`, after a checkpoint was loaded."""
        for number in np.flatnonzero(~self.active).tolist():
            index = self._trained + number
            self.slots[index].view(self.params).copy_(self.parameters[index].detach())

    def trained_names(self) -> frozenset[str]:
        """Return the names of the parameters that are views of the vector."""
        return frozenset(slot.name for slot in self._live_slots)

    @property
    def unfreezes(self) -> bool:
        """Whether this rank has a gradient of an unfrozen parameter that is not yet trained."""
        return bool((self.present[self._trained :] & ~self.active).any())

    def name(self, slot: int) -> str:
        """Return the name of a slot's parameter."""
        return self.slots[slot].name

    def first_non_finite(self, *, unseen: bool = False) -> int | None:
        """
        Return the slot of the first parameter whose gradient is not finite, or None.

        Args:
            unseen: skip gradients that `ready` found finite; valid only until a reduced sum
                overwrites them.
        """
        segments = self.layout.segments if self.tail_in_use else self.segments
        finite = map(self.gradients.finite, range(self._trained if unseen else 0))
        runs = [(slot.offset, slot.stop) for slot in itertools.compress(self.slots, finite)]
        return first_non_finite(self.grads, segments, self.layout.pieces, runs)

    def squared_norm(self) -> float:
        """Return the gradient's sum of squares, in float64."""
        return squared_norm_of(self.grads, self.segments)

    def scale_gradients(self, scale: float) -> None:
        """Multiply the gradient by a number; a scale of 1 is a no-op."""
        scale_in_place(self.typed(self.grads), scale)

    def _detect_unfrozen(self) -> None:
        if any(map(_REQUIRES_GRAD, self._frozen)):
            requires_grad = [p.requires_grad for p in self.parameters[self._trained :]]
            self.unfrozen |= np.array(requires_grad) & ~self.active

    def _live_indices(self) -> list[int]:
        """Return the slots whose parameters are views of the vector."""
        active = (self._trained + np.flatnonzero(self.active)).tolist()
        return [*range(self._trained), *active]

    def check_layout(self, step: int) -> list[str]:
        """
        Copy parameters whose data left the vector back into it, between backward and exchange.

        Args:
            step: for error messages.

        Returns:
            Names of parameters to which user code assigned other data (`param.data = ...`);
            `params` holds the new values.

        Raises:
            SpecError: a parameter was added, replaced or removed; or an unfrozen parameter was
                changed while it was frozen, so that its values may differ between ranks.
        """
        self.process.exit_if_forked()
        self._check_objects(step)
        if any(map(_REQUIRES_GRAD, self._outside)):
            name = next(name for name, p in self._fixed if p.requires_grad)
            raise unfreeze_error(step, f"{name!r} has requires_grad=True; it was frozen at first")
        for number in np.flatnonzero(self.unfrozen).tolist():
            index = self._trained + number
            slot, parameter = self.slots[index], self.parameters[index]
            if not torch.equal(parameter.detach(), slot.view(self.params)):
                raise unfreeze_error(step, f"{slot.name!r} was changed while it was frozen")
        if self._module_checks < _MODULE_CHECK_STEPS:
            self._module_checks += 1
            self._check_modules(step)
        pointers = list(map(Tensor.data_ptr, self._live_parameters))
        if pointers == self._pointers:
            return []
        pairs = zip(pointers, self._pointers, strict=True)
        moved = [number for number, (new, old) in enumerate(pairs) if new != old]
        live = self._live_indices()
        return [self._copy_back(live[number], step) for number in moved]

    def _check_objects(self, step: int) -> None:
        """Check that the modules still hold the parameters of the start."""
        for parameters, key, name, parameter in self._owners:
            if parameters.get(key) is not parameter:
                text = f"step {step + 1}: the parameter {name!r} was replaced or removed"
                raise SpecError(Problem(("task",), text, "write into it: param.data.copy_(...)"))

    def _check_modules(self, step: int) -> None:
        known = {id(parameter) for parameter in self.parameters}
        for name, parameter in dense_parameters(self.model):
            if parameter.requires_grad and parameter.numel() and id(parameter) not in known:
                text = f"step {step + 1}: {name!r} was not there when the run began"
                hint = "make all layers before training begins: before prepare(), or in model()"
                raise SpecError(Problem(("task",), text, hint))

    def _copy_back(self, index: int, step: int) -> str:
        """Copy a parameter's data into the vector and make the parameter a view of it again."""
        slot, parameter = self.slots[index], self.parameters[index]
        data = parameter.data
        if (tuple(data.shape), data.dtype) != (slot.shape, slot.dtype):
            text = (
                f"step {step + 1}: the data of {slot.name!r} were replaced by {dtype_name(data)} "
                f"{[*data.shape]}; it was {slot.dtype} {[*slot.shape]}"
            )
            hint = "convert it before training begins: before prepare(), or in model()"
            raise SpecError(Problem(("task",), text, hint))
        begin, end = self.params.data_ptr(), self.params.data_ptr() + self.params.nbytes
        if begin <= data.data_ptr() < end:
            text = f"step {step + 1}: {slot.name!r} shares the memory of another parameter"
            raise SpecError(Problem(("task",), text, TIE))
        view = slot.view(self.params)
        view.copy_(data)
        parameter.data = view
        return slot.name

    def _bind_views(self) -> None:
        """Make parameters and gradients views of the current vectors."""
        live = self._live_indices()
        slots = self._live_slots = [self.slots[index] for index in live]
        self._live_parameters = [self.parameters[index] for index in live]
        frozen = np.flatnonzero(~self.active) + self._trained
        self._frozen = [self.parameters[index] for index in frozen.tolist()]
        self._outside = [p for _, p in self._fixed]
        for slot, parameter in zip(slots, self._live_parameters, strict=True):
            parameter.data = slot.view(self.params)
        self._pointers = list(map(Tensor.data_ptr, self._live_parameters))
        names = [slot.name for slot in slots]
        parameters, owned = self._live_parameters, self._owns_grads
        self.gradients = Gradients(names, parameters, self.present, live, owned=owned)
        trained = enumerate(self.trained_slots if self._copies else ())
        copied = [n for n, slot in trained if slot.size * slot.dtype.itemsize >= _COPIED_BYTES]
        views = [slot.view(self.grads) for slot in slots]
        self.gradients.bind_views(views, copied, check_finite=self._check_finite)
        used = self.size if self.active.any() else self.layout.tail
        self._zeroed = [*_without(self.grads[:used], [self.slots[index] for index in copied])]


def _without(vector: Tensor, slots: Sequence[Slot]) -> Iterator[Tensor]:
    """Yield the ranges of a vector between some slots, which are in ascending order."""
    start = 0
    for slot in slots:
        if start < slot.offset:
            yield vector[start : slot.offset]
        start = slot.stop
    if start < len(vector):
        yield vector[start:]
