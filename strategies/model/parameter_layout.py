"""Which parameters go into a flat vector, and where; runs of it as tensors of their own types."""

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
    """Give the name of a tensor's type, for example `float32`."""
    return str(tensor.dtype).removeprefix("torch.")


def typed(vector: Tensor, start: int, stop: int, dtype: str) -> Tensor:
    """View a run of a vector in its own type, shape [its elements]."""
    run, kind = vector[start:stop], getattr(torch, dtype)
    return run if run.dtype == kind else run.view(kind)


def typed_views(vector: Tensor, segments: Sequence[Segment]) -> list[Tensor]:
    """View some runs of a vector, each in its own type."""
    return [typed(vector, one.start, one.stop, one.dtype) for one in segments]


def segments_of(layout: Layout) -> NDArray[np.int64]:
    """Give the index of each piece's segment."""
    ends = np.array([segment.stop for segment in layout.segments], np.int64)
    starts = np.array([piece.start for piece in layout.pieces], np.int64)
    return np.searchsorted(ends, starts, side="right")


def scale_in_place(runs: Sequence[Tensor], scale: float) -> None:
    """Multiply some vectors by a number; by 1 costs nothing."""
    if scale != 1.0:
        for run in runs:
            run.mul_(scale)


def squared_norm_of(
    vector: Tensor, segments: Sequence[Segment], duplicate_ranges: Sequence[tuple[int, int]] = ()
) -> float:
    """
    Give the sum of squares of a vector, in float64.

    Args:
        vector: shape [n].
        segments: of which types it is.
        duplicate_ranges: runs to be left out, which rise.
    """
    return sum(squared_norm(run) for run in _without(vector, segments, duplicate_ranges))


def _without(
    vector: Tensor, segments: Sequence[Segment], left_out: Sequence[tuple[int, int]]
) -> Iterator[Tensor]:
    """View a vector by segments, each in its own type, without some runs, which rise."""
    for one in segments:
        at = one.start
        for start, stop in [*left_out, (one.stop, one.stop)]:
            start, stop = min(max(start, at), one.stop), min(max(stop, at), one.stop)
            if at < start:
                yield typed(vector, at, start, one.dtype)
            at = max(at, stop)


def first_non_finite(
    vector: Tensor,
    segments: Sequence[Segment],
    pieces: Sequence[Piece],
    seen: Sequence[tuple[int, int]] = (),
) -> int | None:
    """
    Give the slot of the first parameter that has an element which is not finite; None: all are.

    One pass over the vector; slots are looked for only where it found something.

    Args:
        vector: shape [n].
        segments: of which types it is.
        pieces: what lies where.
        seen: runs that are known to be finite, which rise.
    """
    if all(map(is_finite, _without(vector, segments, seen))):
        return None
    for segment in segments:
        for piece in pieces:
            if segment.start <= piece.start < segment.stop:
                if not is_finite(typed(vector, piece.start, piece.stop, segment.dtype)):
                    return piece.slot
    return None


def bits_of(tensor: Tensor) -> Tensor:
    """Give a tensor's bytes, to compare values of which some may be NaN."""
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


def fill(tensor: Tensor, values: Tensor) -> None:
    """Write values of its shape into a tensor, which may be expanded: each element once."""
    for dim, stride in enumerate(tensor.stride()):
        if stride == 0 and tensor.shape[dim] > 1:
            tensor, values = tensor.narrow(dim, 0, 1), values.narrow(dim, 0, 1)
    tensor.copy_(values)


def is_finite(run: Tensor) -> bool:
    """Say whether all elements are finite."""
    if not run.numel():
        return True
    if math.isfinite(float(run.sum())):  # a quicker pass; only finite elements have a finite sum
        return True
    low, high = run.aminmax()  # of large elements the sum may overflow; both NaN where one is
    return math.isfinite(float(low)) and math.isfinite(float(high))


_ALIGN = 16
"""Elements: a multiple of a cache line for every dtype of 4 bytes and more."""

_LINE_BYTES = 64
_BLOCK_BYTES = 4096
"""Vectors of several types are a multiple of it: shards of them end between two elements."""

_TAIL_BYTES = 64 << 20
"""So much may the tail take in any case; else no more than what is trained."""

NamedParams = list[tuple[str, nn.Parameter]]

GroupOf = Callable[[str], int]
"""Gives the number of a parameter's group by its name, see `Piece.group`."""


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


def trainable(model: nn.Module, extra: Mapping[str, Tensor]) -> NamedParams:
    """
    Give the parameters to be trained; an empty one has nothing to train.

    Args:
        model: of which.
        extra: parameters outside of it, by name.

    Raises:
        ValueError, SpecError: see `FlatModel`.
    """
    twice = extra.keys() & model.state_dict().keys()
    if twice:
        text = f"the model has a tensor of the name {min(twice)!r}, which is that of the task's own"
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
    """Sort parameters by type, in the order in which types first occur; else as they are."""
    order = list(dict.fromkeys(p.dtype for _, p in named))
    return sorted(named, key=lambda one: order.index(one[1].dtype))


def room_for(frozen: NamedParams, trained: NamedParams, model: nn.Module) -> NamedParams:
    """
    Give the frozen parameters that may take part in training later: the vector has room for them.

    None where all of them are much larger than what is trained. A vector of one type stays so, and
    what shares its memory with another tensor stays where it is.
    """
    tensors = [*model.parameters(), *model.buffers()]
    holders = Counter(t.untyped_storage().data_ptr() for t in tensors if t.numel())
    types = {p.dtype for _, p in trained}
    device = trained[0][1].device
    may_move = [
        (name, p)
        for name, p in frozen
        if p.numel()
        and p.is_floating_point()
        and p.device == device
        and (len(types) > 1 or p.dtype in types)
        and holders[p.untyped_storage().data_ptr()] == 1
    ]
    limit = max(_TAIL_BYTES, sum(p.nbytes for _, p in trained))
    return may_move if sum(p.nbytes for _, p in may_move) <= limit else []


def lay_out(
    named: NamedParams, tail: NamedParams, group_of: GroupOf
) -> tuple[list[Slot], Layout, torch.dtype]:
    """Give each parameter, sorted by type, its slot; what lies where; the vector's type."""
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
    """Append a slot for each parameter, in segments of their own; give the first free element."""
    offset = stop = start
    for name, p in named:
        length, align = (p.nbytes, _LINE_BYTES) if mixed else (p.numel(), _ALIGN)
        stop = offset + length
        slots.append(Slot(name, tuple(p.shape), offset, stop, p.dtype))
        following = offset + -(-length // align) * align
        goes_on = offset > start and segments[-1].dtype == dtype_name(p)
        first = segments.pop().start if goes_on else offset
        segments.append(Segment(first, following, dtype_name(p)))
        offset = following
    return -(-stop // _BLOCK_BYTES) * _BLOCK_BYTES if mixed else stop


Owner = tuple[dict[str, nn.Parameter | None], str, str, nn.Parameter]
"""A module's table of parameters, a key of it, the parameter's name, the parameter."""


def owners_of(model: nn.Module, parameters: Sequence[nn.Parameter]) -> list[Owner]:
    """Give where the modules hold each parameter."""
    wanted = {id(parameter) for parameter in parameters}
    owners: list[Owner] = []
    for prefix, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None and id(parameter) in wanted:
                name = f"{prefix}.{key}" if prefix else key
                owners.append((module._parameters, key, name, parameter))
    return owners


def unfreeze_error(step: int, what: str) -> SpecError:
    """Say that a parameter takes part in training, or would, and cannot."""
    hint = "build it with requires_grad=True, and freeze it in the first step"
    return SpecError(Problem(("task",), f"step {step + 1}: {what}", hint))
