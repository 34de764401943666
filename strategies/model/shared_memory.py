"""
Check that trained parameters share no memory with other tensors.

Parameters move into a flat vector, and with servers into shared memory. A tensor that shares their
old memory would keep the initial values.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from distplat.platform.errors import Problem, SpecError

TIE = "tie parameters by giving both modules the same nn.Parameter"
_READ = "read it where it is used, as `self.weight.detach()` in forward, or keep a `.clone()` of it"


class _MemoryRange(NamedTuple):
    start: int
    stop: int
    name: str
    tensor: Tensor
    trained: bool


def check_memory(model: nn.Module, trained: Mapping[str, Tensor], kept: object = None) -> None:
    """
    Check that no trained parameter shares memory with another tensor.

    Args:
        model: of the user.
        trained: parameters, by name.
        kept: task whose attributes are also checked; None: only the model is checked.

    Raises:
        SpecError: two tensors share memory; names them.
    """
    trained_ids = {id(p) for p in trained.values()}
    others: list[tuple[str, Tensor]] = [*model.named_parameters(), *model.named_buffers()]
    registered = trained_ids | {id(tensor) for _, tensor in others}
    others = [(name, tensor) for name, tensor in others if id(tensor) not in trained_ids]
    attributes = [*_attributes(model), *(() if kept is None else _tensors_in(vars(kept), "task:"))]
    others += [(name, tensor) for name, tensor in attributes if id(tensor) not in registered]
    spans = [_span(name, t, trained=True) for name, t in trained.items() if _has_memory(t)]
    spans += [_span(name, t, trained=False) for name, t in others if _has_memory(t)]
    active: list[_MemoryRange] = []
    for span in sorted(spans, key=lambda span: span[:2]):
        active = [other for other in active if other.stop > span.start]
        for other in active:
            if (other.trained or span.trained) and _overlap(other, span):
                text = f"{other.name!r} and {span.name!r} are different tensors in the same memory"
                read = {other.name, span.name} & {name for name, _ in attributes}
                raise SpecError(Problem(("task",), text, _READ if read else TIE))
        active.append(span)


def _has_memory(tensor: Tensor) -> bool:
    addressable = tensor.layout is torch.strided and tensor.device.type != "meta"
    return addressable and tensor.numel() > 0


def _span(name: str, tensor: Tensor, *, trained: bool) -> _MemoryRange:
    start = tensor.data_ptr()
    return _MemoryRange(start, start + _extent(tensor) * tensor.itemsize, name, tensor, trained)


def _extent(tensor: Tensor) -> int:
    """Return the number of elements from a tensor's first to its last in memory, inclusive."""
    pairs = zip(tensor.shape, tensor.stride(), strict=True)
    return 1 + sum((size - 1) * stride for size, stride in pairs)


def _overlap(span_a: _MemoryRange, span_b: _MemoryRange) -> bool:
    """Return whether tensors with overlapping spans share an element: strided ones have gaps."""
    a, b = span_a.tensor, span_b.tensor
    if a.itemsize != b.itemsize or (_is_dense(a) and _is_dense(b)):
        return True
    begin, size = min(span_a.start, span_b.start), a.itemsize
    marks = torch.zeros((max(span_a.stop, span_b.stop) - begin) // size, dtype=torch.bool)
    _elements(marks, a, (span_a.start - begin) // size).fill_(True)
    return bool(_elements(marks, b, (span_b.start - begin) // size).any())


def _is_dense(tensor: Tensor) -> bool:
    return math.prod(tensor.shape) == _extent(tensor)


def _elements(marks: Tensor, tensor: Tensor, offset: int) -> Tensor:
    """View the marks of a tensor's elements; an expanded dimension has size 1."""
    strides = tensor.stride()
    pairs = zip(tensor.shape, strides, strict=True)
    return marks.as_strided([size if stride else 1 for size, stride in pairs], strides, offset)


def _attributes(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield unregistered tensors in attributes of modules, except those that hooks recompute."""
    for prefix, module in model.named_modules():
        written_by_hooks = {_written_attribute(hook) for hook in module._forward_pre_hooks.values()}
        own = {name: value for name, value in vars(module).items() if name not in written_by_hooks}
        yield from _tensors_in(own, f"{prefix}." if prefix else "")


def _written_attribute(hook: object) -> object:
    """Return the attribute that a pre-hook of torch's norms or pruning writes in each forward."""
    return getattr(hook, "name", None) or getattr(hook, "_tensor_name", None)


def _tensors_in(values: Mapping[str, object], prefix: str) -> Iterator[tuple[str, Tensor]]:
    """Yield tensors among values, and in their lists and dicts."""
    for name, value in values.items():
        items: Sequence[tuple[object, object]] = [(name, value)]
        if isinstance(value, list | tuple):
            items = [(f"{name}.{number}", item) for number, item in enumerate(value)]
        elif isinstance(value, dict):
            if name in ("_parameters", "_buffers"):
                continue
            items = [(f"{name}.{key}", item) for key, item in value.items()]
        for key, item in items:
            if isinstance(item, Tensor):
                yield f"{prefix}{key}", item
