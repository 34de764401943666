"""
Whether trained parameters share memory with other tensors: apart they would not be equal any more.

Parameters move into one vector, and with servers on from there. What looks at the memory that they
had goes on with the values of then.
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
    See that no trained parameter shares memory with another tensor.

    Args:
        model: the user's.
        trained: parameters, by name.
        kept: the task, whose attributes are looked at as the model's are; None: there is none.

    Raises:
        SpecError: two do; names them.
    """
    trained_ids = {id(p) for p in trained.values()}
    others: list[tuple[str, Tensor]] = [*model.named_parameters(), *model.named_buffers()]
    registered = trained_ids | {id(one) for _, one in others}
    others = [(name, one) for name, one in others if id(one) not in trained_ids]
    attributes = [*_attributes(model), *(() if kept is None else _held(vars(kept), "task:"))]
    others += [(name, one) for name, one in attributes if id(one) not in registered]
    spans = [_span(name, one, trained=True) for name, one in trained.items() if _is_here(one)]
    spans += [_span(name, one, trained=False) for name, one in others if _is_here(one)]
    active: list[_MemoryRange] = []
    for span in sorted(spans, key=lambda one: one[:2]):
        active = [one for one in active if one.stop > span.start]
        for one in active:
            if (one.trained or span.trained) and _overlap(one, span):
                text = f"{one.name!r} and {span.name!r} are different tensors in the same memory"
                read = {one.name, span.name} & {name for name, _ in attributes}
                raise SpecError(Problem(("task",), text, _READ if read else TIE))
        active.append(span)


def _is_here(tensor: Tensor) -> bool:
    known = tensor.layout is torch.strided and tensor.device.type != "meta"
    return known and tensor.numel() > 0


def _span(name: str, tensor: Tensor, *, trained: bool) -> _MemoryRange:
    start = tensor.data_ptr()
    return _MemoryRange(start, start + _reach(tensor) * tensor.itemsize, name, tensor, trained)


def _reach(tensor: Tensor) -> int:
    """Give how many elements from a tensor's first one its last one lies, and one more."""
    pairs = zip(tensor.shape, tensor.stride(), strict=True)
    return 1 + sum((size - 1) * stride for size, stride in pairs)


def _overlap(one: _MemoryRange, other: _MemoryRange) -> bool:
    """Whether an element of two tensors whose spans overlap is the same one: columns have gaps."""
    first, second = one.tensor, other.tensor
    if first.itemsize != second.itemsize or (_is_dense(first) and _is_dense(second)):
        return True
    begin, size = min(one.start, other.start), first.itemsize
    marks = torch.zeros((max(one.stop, other.stop) - begin) // size, dtype=torch.bool)
    _elements(marks, first, (one.start - begin) // size).fill_(True)
    return bool(_elements(marks, second, (other.start - begin) // size).any())


def _is_dense(tensor: Tensor) -> bool:
    return math.prod(tensor.shape) == _reach(tensor)


def _elements(marks: Tensor, tensor: Tensor, offset: int) -> Tensor:
    """Give the marks of a tensor's elements; of those that are one element, one."""
    strides = tensor.stride()
    pairs = zip(tensor.shape, strides, strict=True)
    return marks.as_strided([size if stride else 1 for size, stride in pairs], strides, offset)


def _attributes(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Give tensors that modules hold and have not registered, but what a hook makes anew."""
    for prefix, module in model.named_modules():
        made_by_hooks = {_made_by(hook) for hook in module._forward_pre_hooks.values()}
        own = {name: value for name, value in vars(module).items() if name not in made_by_hooks}
        yield from _held(own, f"{prefix}." if prefix else "")


def _made_by(hook: object) -> object:
    """Name the attribute that a pre-hook of torch's norms and pruning writes in each forward."""
    return getattr(hook, "name", None) or getattr(hook, "_tensor_name", None)


def _held(values: Mapping[str, object], prefix: str) -> Iterator[tuple[str, Tensor]]:
    """Give tensors among some values, and in lists and dicts of them."""
    for name, value in values.items():
        inside: Sequence[tuple[object, object]] = [(name, value)]
        if isinstance(value, list | tuple):
            inside = [(f"{name}.{number}", item) for number, item in enumerate(value)]
        elif isinstance(value, dict):
            if name in ("_parameters", "_buffers"):
                continue
            inside = [(f"{name}.{key}", item) for key, item in value.items()]
        for key, item in inside:
            if isinstance(item, Tensor):
                yield f"{prefix}{key}", item
