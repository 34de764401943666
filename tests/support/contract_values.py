"""Inputs and expected results of the checks of `Collective`."""

from collections.abc import Iterator

import torch
from torch import Tensor

from distplat.strategies.collective import Collective, ReduceOp

DTYPES = (torch.float32, torch.float64, torch.int64)
SHAPES: tuple[tuple[int, ...], ...] = ((1,), (7,), (2, 3, 5))


def part_of(rank: int, shape: tuple[int, ...] = (7,), dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the input of a rank; at every position all ranks have different values."""
    count = int(torch.Size(shape).numel())
    return ((torch.arange(count) * (rank + 3)) % 11 + rank + 1).view(shape).to(dtype)


def reduce_parts(parts: list[Tensor], op: ReduceOp) -> Tensor:
    """Return the expected reduction of the ranks' tensors."""
    stacked = torch.stack(parts)
    match op:
        case ReduceOp.SUM:
            return stacked.sum(0)
        case ReduceOp.AVG:
            return stacked.sum(0) / len(parts)
        case ReduceOp.MIN:
            return stacked.amin(0)
        case ReduceOp.MAX:
            return stacked.amax(0)
        case ReduceOp.PRODUCT:
            return stacked.prod(0)


def shapes_and_dtypes(op: ReduceOp) -> Iterator[tuple[tuple[int, ...], torch.dtype]]:
    """Yield the supported shapes and dtypes; AVG does not support integers."""
    for dtype in DTYPES:
        if dtype.is_floating_point or op is not ReduceOp.AVG:
            yield from ((shape, dtype) for shape in SHAPES)


def all_parts(group: Collective, shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    return [part_of(rank, shape, dtype) for rank in range(group.world)]
