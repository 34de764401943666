"""Layout of parameters in a flat vector, and views of its ranges in their own dtypes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from distplat.platform.errors import Problem, SpecError
from distplat.platform.vector_layout import Layout, Piece, Segment
from distplat.strategies.algorithms.reduce import squared_norm
from distplat.strategies.sparse.modules import dense_parameters


def dtype_name(tensor: Tensor) -> str:
    """Return the name of a tensor's dtype, for example `float32`."""
    return str(tensor.dtype).removeprefix("torch.")


def typed(vector: Tensor, start: int, stop: int, dtype: str) -> Tensor:
    """View a range of a vector in its own dtype, with one dimension."""
    run, torch_dtype = vector[start:stop], getattr(torch, dtype)
    return run if run.dtype == torch_dtype else run.view(torch_dtype)


def typed_views(vector: Tensor, segments: Sequence[Segment]) -> list[Tensor]:
    """View segments of a vector, each in its own dtype."""
    return [typed(vector, segment.start, segment.stop, segment.dtype) for segment in segments]


def segments_of(layout: Layout) -> NDArray[np.int64]:
    """Return the index of each piece's segment."""
    ends = np.array([segment.stop for segment in layout.segments], np.int64)
    starts = np.array([piece.start for piece in layout.pieces], np.int64)
    return np.searchsorted(ends, starts, side="right")


def scale_in_place(runs: Sequence[Tensor], scale: float) -> None:
    """Multiply vectors by a number, in place; a scale of 1 is a no-op."""
    if scale != 1.0:
        for run in runs:
            run.mul_(scale)


def squared_norm_of(
    vector: Tensor, segments: Sequence[Segment], duplicate_ranges: Sequence[tuple[int, int]] = ()
) -> float:
    """
    Return the sum of squares of a vector, in float64.

    Args:
        vector: shape [n].
        segments: of the vector.
        duplicate_ranges: ranges to skip, in ascending order.
    """
    return sum(squared_norm(run) for run in _views_without(vector, segments, duplicate_ranges))


def _views_without(
    vector: Tensor, segments: Sequence[Segment], skipped: Sequence[tuple[int, int]]
) -> Iterator[Tensor]:
    """Yield views of a vector by segment, each in its own dtype, without ascending ranges."""
    for segment in segments:
        at, end = segment.start, segment.stop
        for start, stop in [*skipped, (end, end)]:
            start, stop = min(max(start, at), end), min(max(stop, at), end)
            if at < start:
                yield typed(vector, at, start, segment.dtype)
            at = max(at, stop)


def first_non_finite(
    vector: Tensor,
    segments: Sequence[Segment],
    pieces: Sequence[Piece],
    finite: Sequence[tuple[int, int]] = (),
) -> int | None:
    """
    Return the slot of the first parameter with a non-finite element, or None.

    One pass over the vector; only if it finds such an element are the slots searched.

    Args:
        vector: shape [n].
        segments: of the vector.
        pieces: of the vector's layout.
        finite: ranges already found finite, in ascending order.
    """
    if all(map(is_finite, _views_without(vector, segments, finite))):
        return None
    for segment in segments:
        for piece in pieces:
            if segment.start <= piece.start < segment.stop:
                if not is_finite(typed(vector, piece.start, piece.stop, segment.dtype)):
                    return piece.slot
    return None


def bits_of(tensor: Tensor) -> Tensor:
    """Return a tensor's bytes, to compare values that may be NaN."""
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


def fill(tensor: Tensor, values: Tensor) -> None:
    """Copy values into a tensor of the same shape, which may be expanded."""
    for dim, stride in enumerate(tensor.stride()):
        if stride == 0 and tensor.shape[dim] > 1:
            tensor, values = tensor.narrow(dim, 0, 1), values.narrow(dim, 0, 1)
    tensor.copy_(values)


def is_finite(run: Tensor) -> bool:
    """Return whether all elements are finite."""
    if not run.numel():
        return True
    if math.isfinite(float(run.sum())):  # fast check: a finite sum implies finite elements
        return True
    low, high = run.aminmax()  # the sum of large finite elements may overflow; NaN propagates here
    return math.isfinite(float(low)) and math.isfinite(float(high))


_ALIGN = 16
"""Alignment in elements: a multiple of a cache line for every dtype of at least 4 bytes."""

_LINE_BYTES = 64
_BLOCK_BYTES = 4096
"""Byte vectors are a multiple of this size, so that their shards end between two elements."""

_TAIL_BYTES = 64 << 20
"""Maximum size of the tail, unless the trained parameters are larger."""

NamedParams = list[tuple[str, nn.Parameter]]

GroupOf = Callable[[str], int]
"""Returns the number of a parameter's group by its name, see `Piece.group`."""


@dataclass(frozen=True)
class Slot:
    """Location of one parameter."""

    name: str
    shape: tuple[int, ...]
    offset: int
    """First element in the flat vector."""
    stop: int
    """Last element, exclusive."""
    dtype: torch.dtype

    @property
    def size(self) -> int:
        """Number of elements of the parameter."""
        return int(torch.Size(self.shape).numel())

    def view(self, vector: Tensor) -> Tensor:
        """Return this parameter's part of a flat vector, in its own dtype and shape."""
        run = vector[self.offset : self.stop]
        return (run if run.dtype == self.dtype else run.view(self.dtype)).view(self.shape)


def trainable(model: nn.Module, extra: Mapping[str, Tensor]) -> NamedParams:
    """
    Return the trainable parameters that have elements, by name.

    Args:
        model: its parameters come first.
        extra: parameters outside the model, by name.

    Raises:
        ValueError, SpecError: see `FlatModel`.
    """
    duplicates = extra.keys() & model.state_dict().keys()
    if duplicates:
        name = min(duplicates)
        text = f"the model has a tensor of the name {name!r}, which is that of the task's own"
        raise SpecError(Problem(("task",), text, "rename the submodule"))
    named = [(name, p) for name, p in dense_parameters(model) if p.requires_grad and p.numel()]
    known = {id(p) for _, p in named}
    named += [
        (name, cast(nn.Parameter, p))
        for name, p in extra.items()
        if id(p) not in known and p.requires_grad and p.numel()
    ]
    if not named:
        raise ValueError("the model has no trainable parameter")
    first_name, first = named[0]
    for name, p in named:
        if p.device != first.device:
            raise ValueError(
                f"trainable parameters must share a device: {first_name} is on {first.device}, "
                f"{name} is on {p.device}"
            )
        if not p.is_floating_point():
            text = f"trainable parameters must be real numbers: {name!r} is {p.dtype}"
            hint = "keep a complex one as real numbers, and use torch.view_as_complex in forward"
            raise SpecError(Problem(("task",), text, hint))
    return named


def by_type(named: NamedParams) -> NamedParams:
    """Sort parameters by dtype, in the order in which dtypes first occur; the sort is stable."""
    order = list(dict.fromkeys(p.dtype for _, p in named))
    return sorted(named, key=lambda item: order.index(item[1].dtype))


def room_for(frozen: NamedParams, trained: NamedParams, model: nn.Module) -> NamedParams:
    """
    Return the frozen parameters for which the vector reserves space, to be trained later.

    The list is empty if they are much larger than the trained parameters. A parameter is excluded
    if its dtype would turn the vector into a byte vector, or if it shares memory with another
    tensor.
    """
    tensors = [*model.parameters(), *model.buffers()]
    holders = Counter(t.untyped_storage().data_ptr() for t in tensors if t.numel())
    dtypes = {p.dtype for _, p in trained}
    device = trained[0][1].device
    may_move = [
        (name, p)
        for name, p in frozen
        if p.numel()
        and p.is_floating_point()
        and p.device == device
        and (len(dtypes) > 1 or p.dtype in dtypes)
        and holders[p.untyped_storage().data_ptr()] == 1
    ]
    limit = max(_TAIL_BYTES, sum(p.nbytes for _, p in trained))
    return may_move if sum(p.nbytes for _, p in may_move) <= limit else []


def lay_out(
    named: NamedParams, tail: NamedParams, group_of: GroupOf
) -> tuple[list[Slot], Layout, torch.dtype]:
    """Return the slots of parameters sorted by dtype, the layout, and the vector's dtype."""
    mixed = len({p.dtype for _, p in named}) > 1
    slots: list[Slot] = []
    segments: list[Segment] = []
    end = _append_slots(named, 0, mixed, slots, segments)
    begin = -(-end // _ALIGN) * _ALIGN if tail else end
    segments[-1] = Segment(segments[-1].start, begin, segments[-1].dtype)
    size = _append_slots(tail, begin, mixed, slots, segments) if tail else begin
    segments[-1] = Segment(segments[-1].start, size, segments[-1].dtype)
    pieces = tuple(
        Piece(index, slot.offset, slot.stop, group_of(slot.name), slot.shape)
        for index, slot in enumerate(slots)
    )
    layout = Layout(size, tuple(segments), pieces, len(slots), begin)
    return slots, layout, torch.uint8 if mixed else slots[0].dtype


def _append_slots(
    named: NamedParams, start: int, mixed: bool, slots: list[Slot], segments: list[Segment]
) -> int:
    """Append slots for the parameters, in new segments; return the first free element."""
    offset = stop = start
    for name, p in named:
        length, align = (p.nbytes, _LINE_BYTES) if mixed else (p.numel(), _ALIGN)
        stop = offset + length
        slots.append(Slot(name, tuple(p.shape), offset, stop, p.dtype))
        following = offset + -(-length // align) * align
        extends_segment = offset > start and segments[-1].dtype == dtype_name(p)
        first = segments.pop().start if extends_segment else offset
        segments.append(Segment(first, following, dtype_name(p)))
        offset = following
    return -(-stop // _BLOCK_BYTES) * _BLOCK_BYTES if mixed else stop


Owner = tuple[dict[str, nn.Parameter | None], str, str, nn.Parameter]
"""A module's `_parameters`, a key in it, the parameter's full name, the parameter."""


def owners_of(model: nn.Module, parameters: Sequence[nn.Parameter]) -> list[Owner]:
    """Return the places in modules that hold the parameters."""
    ids = {id(parameter) for parameter in parameters}
    owners: list[Owner] = []
    for prefix, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None and id(parameter) in ids:
                name = f"{prefix}.{key}" if prefix else key
                owners.append((module._parameters, key, name, parameter))
    return owners


def unfreeze_error(step: int, what: str) -> SpecError:
    """Return the error for a frozen parameter that cannot become trainable."""
    hint = "build it with requires_grad=True, and freeze it in the first step"
    return SpecError(Problem(("task",), f"step {step + 1}: {what}", hint))
