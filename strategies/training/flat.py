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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from distplat.platform.errors import Problem, SpecError
from distplat.platform.vector_layout import Layout, Piece, Segment
from distplat.strategies.sparse.modules import dense_parameters
from distplat.strategies.training.gradients import Gradients
from distplat.strategies.training.segments import (
    dtype_name,
    first_non_finite,
    scale_in_place,
    squared_norm_of,
    typed_views,
)

_ALIGN = 16
"""Elements: a multiple of a cache line for every dtype of 4 bytes and more."""

_LINE_BYTES = 64
_BLOCK_BYTES = 4096
"""Vectors of several types are a multiple of it: shards of them end between two elements."""

_THOROUGH_STEPS = 3
"""Steps after which the modules are walked in any case, to see whether they were changed."""

TORN = -1
"""Version of parameters that are in the middle of being replaced: good for nothing."""


@dataclass(frozen=True)
class Slot:
    """Where one parameter lies."""

    name: str
    shape: tuple[int, ...]
    offset: int
    """First element in the flat vector."""
    stop: int
    """Its last one, exclusive."""
    dtype: torch.dtype

    @property
    def size(self) -> int:
        """Number of elements of the parameter."""
        return int(torch.Size(self.shape).numel())

    def view(self, vector: Tensor) -> Tensor:
        """Give this parameter's part of a flat vector, in its own type and shape."""
        run = vector[self.offset : self.stop]
        return (run if run.dtype == self.dtype else run.view(self.dtype)).view(self.shape)


class FlatModel:
    """
    A model moved onto flat vectors.

    Args:
        model: on its device; its parameters are re-pointed, in place.
        extra: trainable parameters that lie outside of the model, by name; trained like its own.

    Raises:
        ValueError: nothing to train, or trainable parameters of several devices.
        SpecError: trainable parameters that cannot lie in a vector; names them.
    """

    def __init__(self, model: nn.Module, extra: Mapping[str, nn.Parameter] | None = None) -> None:
        self.model, self.extra = model, dict(extra or {})
        named = _trainable(model, self.extra)
        _check_memory(model, named)
        named = _by_type(named)
        self._parameters = [p for _, p in named]
        self.slots, self.layout, dtype = _lay_out(named)
        device = self._parameters[0].device
        self.params = torch.zeros(self.layout.size, dtype=dtype, device=device)
        for slot, parameter in zip(self.slots, self._parameters, strict=True):
            slot.view(self.params).copy_(parameter.detach())
        self.grads = torch.zeros_like(self.params)
        self.version = 0  #: updates that `params` has had; `TORN`: half replaced by another rank's
        self._gradients = Gradients([slot.name for slot in self.slots], self._parameters)
        self._homes = _homes(model, self._parameters)
        self._looked = 0
        self._point()

    @property
    def size(self) -> int:
        """Elements of the flat vectors, padding included."""
        return self.params.numel()

    @property
    def mixed(self) -> bool:
        """Whether the parameters are of several types, and the vectors therefore of bytes."""
        return len({one.dtype for one in self.layout.segments}) > 1

    @property
    def present(self) -> NDArray[np.bool_]:
        """By slot: whether a backward of this step has given it a gradient, on this rank."""
        return self._gradients.present

    def digest(self) -> str:
        """Fingerprint of names, shapes and types: equal on all ranks that train one model."""
        text = repr((self.slots, self.params.dtype))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def move(self, params: Tensor, grads: Tensor) -> None:
        """
        Go on in other vectors, of shape [n] and the same dtype; their content becomes the model's.

        Nothing is copied: whoever hands the vectors over has filled `params`.
        """
        self.params, self.grads = params, grads
        self._point()

    def typed(self, vector: Tensor) -> list[Tensor]:
        """View a vector of this model by segment, each in its own type."""
        return typed_views(vector, self.layout.segments)

    def begin_step(self) -> None:
        """Set the gradients to zero and forget which parameters had one."""
        self.grads.zero_()
        self._gradients.begin()

    def before_backward(self) -> None:
        """
        Be told that forward and loss of a micro-batch are over, and that its backward comes.

        Raises:
            SpecError: see `Gradients.before_backward`.
        """
        self._gradients.before_backward()

    def take_in(self) -> None:
        """
        Be told that a backward is over: `grads` and `present` are then right.

        Raises:
            SpecError: see `Gradients.take_in`.
        """
        self._gradients.take_in()

    def ready(self, place: int) -> None:
        """Be told by a hook that the backward under way has finished a slot's gradient."""
        self._gradients.ready(place)

    def name(self, slot: int) -> str:
        """Give the name of a slot's parameter."""
        return self.slots[slot].name

    def first_non_finite(self) -> int | None:
        """Give the slot of the first parameter whose gradient is not finite; None: all are."""
        return first_non_finite(self.grads, self.layout)

    def squared_norm(self) -> float:
        """Give the sum of squares of the gradient, in float64."""
        return squared_norm_of(self.grads, self.layout.segments)

    def scale_gradients(self, scale: float) -> None:
        """Multiply the gradient by a number; by 1 costs nothing."""
        scale_in_place(self.typed(self.grads), scale)

    def check_layout(self, step: int, *, thorough: bool = False) -> list[str]:
        """
        Take in parameters whose data have left the vector, between backward and exchange.

        Args:
            step: for messages.
            thorough: walk the modules, too; the first steps do it in any case.

        Returns:
            Names of parameters to which user code has assigned other data (`param.data = ...`):
            `params` has the new values.

        Raises:
            SpecError: the model has other parameters than it had; names them.
        """
        self._check_objects(step)
        if thorough or self._looked < _THOROUGH_STEPS:
            self._looked += 1
            self._check_modules(step)
        now = list(map(Tensor.data_ptr, self._parameters))
        if now == self._pointers:
            return []
        moved = [i for i, (a, b) in enumerate(zip(now, self._pointers, strict=True)) if a != b]
        return [self._bring_back(place, step) for place in moved]

    def _check_objects(self, step: int) -> None:
        """Compare the parameters that the modules have now with those they had."""
        for (held, key, name), parameter in self._homes:
            if held.get(key) is not parameter:
                text = f"step {step + 1}: the parameter {name!r} was replaced or removed"
                raise SpecError(Problem(("task",), text, "write into it: param.data.copy_(...)"))

    def _check_modules(self, step: int) -> None:
        known = {id(parameter) for parameter in self._parameters}
        for name, parameter in dense_parameters(self.model):
            if parameter.requires_grad and parameter.numel() and id(parameter) not in known:
                text = f"step {step + 1}: {name!r} was not trained when the run began"
                hint = "build it in model() with requires_grad=True; freeze it in the first step"
                raise SpecError(Problem(("task",), text, hint))

    def _bring_back(self, place: int, step: int) -> str:
        """Copy a parameter's data into the vector and have the parameter there again."""
        slot, parameter = self.slots[place], self._parameters[place]
        data = parameter.data
        if (tuple(data.shape), data.dtype) != (slot.shape, slot.dtype):
            text = (
                f"step {step + 1}: the data of {slot.name!r} were replaced by {dtype_name(data)} "
                f"{[*data.shape]}; it was {slot.dtype} {[*slot.shape]}"
            )
            raise SpecError(Problem(("task",), text))
        begin, end = self.params.data_ptr(), self.params.data_ptr() + self.params.nbytes
        if begin <= data.data_ptr() < end:
            text = f"step {step + 1}: {slot.name!r} shares the memory of another parameter"
            raise SpecError(Problem(("task",), text, _TIE))
        view = slot.view(self.params)
        view.copy_(data)
        parameter.data = view
        return slot.name

    def _point(self) -> None:
        """Make parameters and gradients views of the present vectors."""
        for slot, parameter in zip(self.slots, self._parameters, strict=True):
            parameter.data = slot.view(self.params)
        self._pointers = list(map(Tensor.data_ptr, self._parameters))
        self._gradients.point([slot.view(self.grads) for slot in self.slots])


_TIE = "tie parameters by giving both modules the same nn.Parameter"


def _trainable(
    model: nn.Module, extra: Mapping[str, nn.Parameter]
) -> list[tuple[str, nn.Parameter]]:
    """
    Give the parameters to be trained; an empty one has nothing to train.

    Raises:
        ValueError, SpecError: see `FlatModel`.
    """
    found = [(name, p) for name, p in dense_parameters(model) if p.requires_grad and p.numel()]
    known = {id(p) for _, p in found}
    found += [(k, p) for k, p in extra.items() if id(p) not in known and p.requires_grad]
    if not found:
        raise ValueError("the model has no trainable parameter")
    first_name, first = found[0]
    for name, p in found:
        if p.device != first.device:
            raise ValueError(
                f"trainable parameters must share a device: {first_name} is on {first.device}, "
                f"{name} is on {p.device}"
            )
        if not p.is_floating_point():
            text = f"trainable parameters must be real numbers: {name!r} is {p.dtype}"
            hint = "keep a complex one as real numbers, and use torch.view_as_complex in forward"
            raise SpecError(Problem(("task",), text, hint))
    return found


def _by_type(named: Sequence[tuple[str, nn.Parameter]]) -> list[tuple[str, nn.Parameter]]:
    """Sort parameters by type, in the order in which types first occur; else as they are."""
    order = list(dict.fromkeys(p.dtype for _, p in named))
    return sorted(named, key=lambda one: order.index(one[1].dtype))


def _lay_out(
    named: Sequence[tuple[str, nn.Parameter]],
) -> tuple[list[Slot], Layout, torch.dtype]:
    """Give each parameter, sorted by type, its place; what lies where; the vector's type."""
    dtypes = {p.dtype for _, p in named}
    mixed = len(dtypes) > 1
    slots: list[Slot] = []
    segments: list[Segment] = []
    offset = stop = 0
    for name, p in named:
        length, align = (p.nbytes, _LINE_BYTES) if mixed else (p.numel(), _ALIGN)
        stop = offset + length
        slots.append(Slot(name, tuple(p.shape), offset, stop, p.dtype))
        offset += -(-length // align) * align
        goes_on = bool(segments) and segments[-1].dtype == dtype_name(p)
        start = segments.pop().start if goes_on else slots[-1].offset
        segments.append(Segment(start, offset, dtype_name(p)))
    size = -(-stop // _BLOCK_BYTES) * _BLOCK_BYTES if mixed else stop
    segments[-1] = Segment(segments[-1].start, size, segments[-1].dtype)
    pieces = tuple(Piece(place, slot.offset, slot.stop) for place, slot in enumerate(slots))
    layout = Layout(size, tuple(segments), pieces, len(slots), size)
    return slots, layout, torch.uint8 if mixed else slots[0].dtype


def _check_memory(model: nn.Module, trained: Sequence[tuple[str, nn.Parameter]]) -> None:
    """
    See that no trained parameter shares memory with another tensor: apart they would not be equal.

    Raises:
        SpecError: two do; names them.
    """
    mine = {id(p) for _, p in trained}
    others = [(n, p) for n, p in model.named_parameters() if id(p) not in mine]
    spans = [
        (tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes, name, id(tensor) in mine)
        for name, tensor in [*trained, *others, *model.named_buffers()]
        if tensor.numel() and tensor.is_contiguous() and tensor.device.type != "meta"
    ]
    spans.sort(key=lambda span: span[:2])
    end, holder, holder_trained = 0, "", False
    for start, stop, name, is_trained in spans:
        if start < end and (is_trained or holder_trained):
            text = f"{holder!r} and {name!r} are different tensors in the same memory"
            raise SpecError(Problem(("task",), text, _TIE))
        if stop > end:
            end, holder, holder_trained = stop, name, is_trained


_Home = tuple[tuple[dict[str, nn.Parameter | None], str, str], nn.Parameter]


def _homes(model: nn.Module, parameters: Sequence[nn.Parameter]) -> list[_Home]:
    """Give where the modules hold each parameter: module's table, key, name."""
    wanted = {id(parameter) for parameter in parameters}
    found: list[_Home] = []
    for prefix, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None and id(parameter) in wanted:
                name = f"{prefix}.{key}" if prefix else key
                found.append(((module._parameters, key, name), parameter))
    return found
