"""
A model whose trainable parameters lie in one flat vector, and whose gradients lie in another.

    model.layers[0].weight   .bias   pad  model.layers[1].weight  ...
    |------------------------|-------|--|------------------------|
    params [n]   views of it are the parameters: moving the vector moves the model
    grads  [n]   views of it are the gradients: backward adds into it, nothing is packed

So "push" hands over one vector, "all-reduce" reduces one, an optimizer updates one. Each tensor
starts on a cache line; the padding between is zero and stays zero under every optimizer we allow.
Parameters of several types lie in segments of one type each (platform/vector_layout.py); see
docs/decisions/flat_vectors.md.
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

_THOROUGH_STEPS = 3
"""Steps in which the modules are walked, too, to see whether they were changed."""

TORN = -1
"""Version of parameters that are in the middle of being replaced: good for nothing."""


_COPIED_BYTES = 2**18
"""From this size on it is quicker to copy a gradient than to set the old one to zero and add."""


_REQUIRES_GRAD = attrgetter("requires_grad")


class FlatModel:
    """
    A model moved onto flat vectors.

    Frozen parameters stay in memory of their own, which a forward may write to. With `unfreezes`
    they have room in the vector, too, behind the others: nobody touches this tail until one of them
    takes part in training, from a step on which all ranks agree (`activate_tail`).

    Args:
        model: on its device; its parameters are re-pointed, in place.
        extra: trainable parameters that lie outside of the model, by name; trained like its own.
        unfreezes: whether frozen parameters may take part in training later.
        group_of: gives the number of a parameter's group in the optimizer.
        takes: says whether the optimizer can update a parameter, by name and shape; one that it
            cannot stays frozen.
        owned: whether `.grad` stays the tensor that autograd has made, see `Gradients`; `grads`
            then has what `ready` was called for.

    Raises:
        ValueError: nothing to train, or trainable parameters of several devices.
        SpecError: trainable parameters that cannot lie in a vector; names them.
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
        self.model, self._owned = model, owned
        self.process = ForkGuard()  #: of these vectors, which others may share
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
        self._trained = len(named)  #: how many of them are no tail
        self.slots, self.layout, dtype = lay_out(named, tail, group_of)
        device = self.parameters[0].device
        self.params = torch.zeros(self.layout.size, dtype=dtype, device=device)
        self.grads = torch.zeros_like(self.params)
        self.unsaved: frozenset[str] = frozenset()  #: frozen ones that checkpoints leave out
        self.version = 0  #: updates that `params` has had; `TORN`: half replaced by another rank's
        for slot, parameter in zip(self.slots, self.parameters, strict=True):
            slot.view(self.params).copy_(parameter.detach())
        self.present: NDArray[np.bool_] = np.arange(len(self.slots)) < self._trained
        """By slot: whether a backward of this step has given it a gradient, on this rank. Until the
        first step begins: who is trained."""
        #: by slot of the tail: whether it takes part in training; whether it would, but does not
        self.active, self.unfrozen = np.zeros((2, len(tail)), np.bool_)
        self._owners = owners_of(model, self.parameters)
        self._looked = 0
        self.began = False  #: whether this rank has computed anything in this step
        self._copies = False  #: whether hooks call `ready` in each backward
        self._looks = False  #: whether `ready` looks for NaN and infinity
        self._point()

    @property
    def size(self) -> int:
        """Elements of the flat vectors, padding and tail included."""
        return self.params.numel()

    @property
    def mixed(self) -> bool:
        """Whether the parameters are of several types, and the vectors therefore of bytes."""
        return len({one.dtype for one in self.layout.segments}) > 1

    @property
    def trained_slots(self) -> list[Slot]:
        """Parameters that are no tail: the first ones of `slots`."""
        return self.slots[: self._trained]

    def digest(self) -> str:
        """Fingerprint of names, shapes and types: equal on all ranks that train one model."""
        text = repr((self.slots, self.layout.tail, self.params.dtype))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def state_dict(self) -> dict[str, Tensor]:
        """Give the model's state, and parameters from outside of it by their names; no copies."""
        return {**self.model.state_dict(), **{k: p.detach() for k, p in self.extra.items()}}

    def move(self, params: Tensor, grads: Tensor) -> None:
        """
        Go on in other vectors, of shape [n] and the same dtype; their content becomes the model's.

        Nothing is copied: whoever hands the vectors over has filled `params`.
        """
        self.params, self.grads = params, grads
        self._point()

    @contextmanager
    def with_params(self, params: Tensor) -> Iterator[None]:
        """Have the model compute with other parameters for a while, shape [n], between steps."""
        housed = [*zip(self._housed_slots, self._housed, strict=True)]
        for slot, parameter in housed:
            parameter.data = slot.view(params)
        try:
            yield
        finally:
            for slot, parameter in housed:
                parameter.data = slot.view(self.params)

    def written(self, params: Tensor, before: Tensor) -> str | None:
        """
        Name a parameter that was written in the block of `with_params`; None: none was.

        Args:
            params: what the model computes with, shape [n].
            before: a copy of them from the time before.
        """
        for slot, parameter in zip(self._housed_slots, self._housed, strict=True):
            view, old = slot.view(params), bits_of(slot.view(before))
            if parameter.data_ptr() != view.data_ptr() or not torch.equal(bits_of(view), old):
                return slot.name
        return None

    def typed(self, vector: Tensor) -> list[Tensor]:
        """View what is trained of a vector of this model by segment, each in its own type."""
        return typed_views(vector, self.segments)

    @property
    def segments(self) -> tuple[Segment, ...]:
        """What is trained of the vectors: the tail once a parameter there takes part."""
        every = self.layout.segments
        if self.active.any():
            return every
        return tuple(one for one in every if one.start < self.layout.tail)

    def slots_in(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Give the slots that lie in a run of the flat vector: index, first element, last one."""
        for index, slot in enumerate(self.slots):
            first, last = max(start, slot.offset), min(stop, slot.stop)
            if first < last:
                yield index, first, last

    def elements_of(
        self, slot: Slot, first: int, last: int, start: int
    ) -> tuple[tuple[int, int] | None, int]:
        """
        Count elements of a slot where the vector's are bytes.

        Args:
            slot: one of this model's.
            first: element of the vector, in the slot.
            last: one behind it, in the slot.
            start: element of the vector from which offsets are to be counted.

        Returns:
            First and last element of the slot, None: all of them; and the place of the first.
        """
        item = slot.dtype.itemsize // self.params.itemsize if self.mixed else 1
        all_of_it = (first, last) == (slot.offset, slot.stop)
        run = None if all_of_it else ((first - slot.offset) // item, (last - slot.offset) // item)
        return run, (first - start) // item

    def begin_step(self) -> None:
        """
        Set the gradients to zero and forget which parameters had one.

        Raises:
            SpecError: a parameter that was frozen had one, and nobody called `activate_tail`.
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
        Called after forward and loss of a micro-batch, before its backward.

        Raises:
            SpecError: see `Gradients.before_backward`.
        """
        self.process.exit_if_forked()  # before backward writes into memory that a fork shares
        self.gradients.before_backward()
        self._look_for_unfrozen()
        self.began = True

    def collect(self) -> None:
        """
        Called after a backward: `grads` and `present` are then right.

        Raises:
            SpecError: see `Gradients.collect`.
        """
        self.gradients.collect()
        self._look_for_unfrozen()
        for number in np.flatnonzero(self.unfrozen).tolist():
            index = self._trained + number
            grad = self.parameters[index].grad
            if grad is not None:  # in memory of its own, and the sum so far
                self.slots[index].view(self.grads).copy_(grad)
                self.present[index] = True

    def copy_when_ready(self, copies: bool, *, looks: bool = False) -> None:
        """
        Save the pass that sets large gradients to zero, or do it again; between two steps.

        Args:
            copies: hooks call `ready` for every trained slot in every backward, and somebody calls
                `zero_missing` in each step.
            looks: `ready` looks for NaN and infinity in what it copies, see `finite`.
        """
        self._copies, self._looks = copies, looks
        self._point()

    def zero_missing(self) -> None:
        """Set gradients to zero that no backward has made; needed where none was called."""
        if not self.began:
            self.gradients.zero_missing()

    @property
    def tail_in_use(self) -> bool:
        """Whether this rank has gradients, or will have, behind the slots trained at first."""
        return bool(self.active.any() or self.unfrozen.any())

    def activate_tail(self, present: NDArray[np.bool_], step: int) -> None:
        """
        Have frozen parameters take part that have a gradient; all ranks call this in each step.

        What this rank has of these gradients is in the vector already.

        Args:
            present: by slot, whether it has a gradient on any rank.
            step: for messages.

        Raises:
            SpecError: this rank has computed something, and without one of them.
        """
        new = present[self._trained :] & ~self.active
        if not new.any():
            return
        for number in np.flatnonzero(new & ~self.unfrozen).tolist() if self.began else ():
            name = self.slots[self._trained + number].name
            raise unfreeze_error(step, f"{name!r} is frozen on this worker, on others not")
        self.take_over_tail(new)

    def take_over_tail(self, union: NDArray[np.bool_]) -> None:
        """Have frozen parameters take part in training, with the values that `params` has."""
        self.active |= union
        self.unfrozen &= ~self.active
        for number in np.flatnonzero(self.active).tolist():
            self.parameters[self._trained + number].requires_grad_(True)
        self._point()

    def fill_tail(self) -> None:
        """Have `params` hold the frozen parameters as they are now; a checkpoint was read."""
        for number in np.flatnonzero(~self.active).tolist():
            index = self._trained + number
            self.slots[index].view(self.params).copy_(self.parameters[index].detach())

    def trained_names(self) -> frozenset[str]:
        """Give the names of the parameters that live in the vector by now."""
        return frozenset(slot.name for slot in self._housed_slots)

    @property
    def unfreezes(self) -> bool:
        """Whether this rank has a gradient of a frozen parameter that takes no part yet."""
        return bool((self.present[self._trained :] & ~self.active).any())

    def name(self, slot: int) -> str:
        """Give the name of a slot's parameter."""
        return self.slots[slot].name

    def first_non_finite(self, *, unseen: bool = False) -> int | None:
        """
        Give the slot of the first parameter whose gradient is not finite; None: all are.

        Args:
            unseen: leave those out that `ready` has seen to be finite; no sum was written over
                them since.
        """
        segments = self.layout.segments if self.tail_in_use else self.segments
        seen = map(self.gradients.finite, range(self._trained if unseen else 0))
        runs = [(one.offset, one.stop) for one in itertools.compress(self.slots, seen)]
        return first_non_finite(self.grads, segments, self.layout.pieces, runs)

    def squared_norm(self) -> float:
        """Give the sum of squares of the gradient, in float64."""
        return squared_norm_of(self.grads, self.segments)

    def scale_gradients(self, scale: float) -> None:
        """Multiply the gradient by a number; by 1 costs nothing."""
        scale_in_place(self.typed(self.grads), scale)

    def _look_for_unfrozen(self) -> None:
        if any(map(_REQUIRES_GRAD, self._frozen)):
            wanted = [p.requires_grad for p in self.parameters[self._trained :]]
            self.unfrozen |= np.array(wanted) & ~self.active

    def _live(self) -> list[int]:
        """Give the slots whose parameters live in the vector."""
        active = (self._trained + np.flatnonzero(self.active)).tolist()
        return [*range(self._trained), *active]

    def check_layout(self, step: int) -> list[str]:
        """
        Take in parameters whose data have left the vector, between backward and exchange.

        Args:
            step: for messages.

        Returns:
            Names of parameters to which user code has assigned other data (`param.data = ...`):
            `params` has the new values.

        Raises:
            SpecError: the model has other parameters than it had; or one that is frozen no more
                has not the values that it had, which is what others have. Names it.
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
        if self._looked < _THOROUGH_STEPS:
            self._looked += 1
            self._check_modules(step)
        now = list(map(Tensor.data_ptr, self._housed))
        if now == self._pointers:
            return []
        moved = [i for i, (a, b) in enumerate(zip(now, self._pointers, strict=True)) if a != b]
        live = self._live()
        return [self._bring_back(live[number], step) for number in moved]

    def _check_objects(self, step: int) -> None:
        """Compare the parameters that the modules have now with those they had."""
        for held, key, name, parameter in self._owners:
            if held.get(key) is not parameter:
                text = f"step {step + 1}: the parameter {name!r} was replaced or removed"
                raise SpecError(Problem(("task",), text, "write into it: param.data.copy_(...)"))

    def _check_modules(self, step: int) -> None:
        known = {id(parameter) for parameter in self.parameters}
        for name, parameter in dense_parameters(self.model):
            if parameter.requires_grad and parameter.numel() and id(parameter) not in known:
                text = f"step {step + 1}: {name!r} was not there when the run began"
                hint = "make all layers before training begins: before prepare(), or in model()"
                raise SpecError(Problem(("task",), text, hint))

    def _bring_back(self, index: int, step: int) -> str:
        """Copy a parameter's data into the vector and have the parameter there again."""
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

    def _point(self) -> None:
        """Make parameters and gradients views of the present vectors."""
        live = self._live()
        slots = self._housed_slots = [self.slots[index] for index in live]
        self._housed = [self.parameters[index] for index in live]
        behind = np.flatnonzero(~self.active) + self._trained
        self._frozen = [self.parameters[index] for index in behind.tolist()]
        self._outside = [p for _, p in self._fixed]
        for slot, parameter in zip(slots, self._housed, strict=True):
            parameter.data = slot.view(self.params)
        self._pointers = list(map(Tensor.data_ptr, self._housed))
        names = [slot.name for slot in slots]
        self.gradients = Gradients(names, self._housed, self.present, live, owned=self._owned)
        trained = enumerate(self.trained_slots if self._copies else ())
        copied = [n for n, slot in trained if slot.size * slot.dtype.itemsize >= _COPIED_BYTES]
        views = [slot.view(self.grads) for slot in slots]
        self.gradients.point(views, copied, looks=self._looks)
        used = self.size if self.active.any() else self.layout.tail
        self._zeroed = [*_without(self.grads[:used], [self.slots[index] for index in copied])]


def _without(vector: Tensor, slots: Sequence[Slot]) -> Iterator[Tensor]:
    """Give the runs of a vector between some slots, which rise."""
    start = 0
    for slot in slots:
        if start < slot.offset:
            yield vector[start : slot.offset]
        start = slot.stop
    if start < len(vector):
        yield vector[start:]
