"""
Slices of tensors: the parts that ranks hold of a whole tensor, and their assembly.

Ranks hold the state of a model in different ways, but a checkpoint holds whole tensors by the
model's own names. So every part is described by its position:

    whole tensor [4, 6]        slab of dimension 1, 2..4      run 5..11 of all its elements
    . . . . . .                . . # # . .                    . . . . . #
    . . . . . .                . . # # . .                    # # # # # .
    . . . . . .                . . # # . .                    . . . . . .
    . . . . . .                . . # # . .                    . . . . . .

A slab is a rank's part under tensor parallelism; a run is a shard of a flat vector; a run of a slab
is both. Where a tensor stacks several matrices, such as query, key and value, a slab has the same
range of each of these blocks. Data is bytes here: the process that writes files does not import
torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from distplat.platform.errors import ProtocolError

Bytes: TypeAlias = NDArray[np.uint8]

ITEM_BYTES = {
    "bool": 1,
    "uint8": 1,
    "int8": 1,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "int16": 2,
    "uint16": 2,
    "float16": 2,
    "bfloat16": 2,
    "int32": 4,
    "uint32": 4,
    "float32": 4,
    "int64": 8,
    "uint64": 8,
    "float64": 8,
    "complex64": 8,
}
"""Bytes per element, by torch's dtype name."""


@dataclass(frozen=True)
class TensorSlice:
    """Position of a part in a whole tensor."""

    shape: tuple[int, ...]
    """Shape of the whole tensor."""
    slab: tuple[int, int, int] | None = None
    """Dimension, first and last index (exclusive) within a block; None: the whole tensor."""
    run: tuple[int, int] | None = None
    """First and last element (exclusive) of the slab in row-major order; None: the whole slab."""
    blocks: int = 1
    """Number of equal consecutive blocks in the slab's dimension."""

    @property
    def slab_shape(self) -> tuple[int, ...]:
        """Shape of the slab, with a dimension for blocks before the split one."""
        if self.slab is None:
            return self.shape
        dim, start, stop = self.slab
        return (*self.shape[:dim], self.blocks, stop - start, *self.shape[dim + 1 :])

    @property
    def size(self) -> int:
        """Number of elements of the part."""
        first, last = self.run or (0, math.prod(self.slab_shape))
        return last - first


@dataclass(frozen=True)
class TensorEntry:
    """One part of one tensor, within a list of arrays."""

    key: str
    """`<file>/<name>`: `model/0.weight`, `optimizer/exp_avg/0.weight`."""
    tensor_slice: TensorSlice
    dtype: str
    """torch's dtype name, for example `float32`."""
    array: int
    """Index of the array."""
    offset: int = 0
    """First element within the array."""


@dataclass(frozen=True)
class RawTensor:
    """A whole tensor, as bytes."""

    dtype: str
    shape: tuple[int, ...]
    data: Bytes
    """Elements in row-major order, shape [elements * bytes per element]."""


Bundle = tuple[list[Bytes], tuple[TensorEntry, ...]]
"""Arrays, and their contents."""


def assemble_tensors(bundles: Iterable[Bundle]) -> dict[str, RawTensor]:
    """
    Assemble whole tensors from the parts of all ranks; a part that is a whole tensor is not copied.

    Several ranks may have the same value without dimensions; the first one counts.

    Raises:
        ProtocolError: parts are missing, overlap, or belong to different tensors.
    """
    wholes: dict[str, RawTensor] = {}
    covered: dict[str, int] = {}
    for arrays, entries in bundles:
        for entry in entries:
            key, tensor_slice, size = entry.key, entry.tensor_slice, ITEM_BYTES[entry.dtype]
            if key in wholes and not tensor_slice.shape:
                continue
            first = entry.offset * size
            part = arrays[entry.array][first : first + tensor_slice.size * size]
            if key not in wholes:
                is_all = tensor_slice.slab is None and tensor_slice.run is None
                data = part if is_all else np.zeros(math.prod(tensor_slice.shape) * size, np.uint8)
                wholes[key], covered[key] = RawTensor(entry.dtype, tensor_slice.shape, data), 0
            tensor = wholes[key]
            if (tensor.dtype, tensor.shape) != (entry.dtype, tensor_slice.shape):
                raise ProtocolError(f"parts of {key!r} are of different tensors")
            if tensor.data is not part and covered[key] < math.prod(tensor.shape):
                _put(tensor, tensor_slice, part)
            covered[key] += tensor_slice.size
    for key, tensor in wholes.items():
        if covered[key] != math.prod(tensor.shape):
            raise ProtocolError(
                f"the parts of {key!r} have {covered[key]} of {math.prod(tensor.shape)} elements"
            )
    return wholes


def extract_part(whole: RawTensor, tensor_slice: TensorSlice) -> Bytes:
    """Copy a part of a whole tensor, shape [bytes of the part]."""
    return np.array(_part(whole, tensor_slice), copy=True).reshape(-1)


def group_by_file(wholes: Mapping[str, RawTensor]) -> dict[str, dict[str, RawTensor]]:
    """Group tensors by the file in their key: `model/0.weight` is `0.weight` of `model`."""
    files: dict[str, dict[str, RawTensor]] = {}
    for key, tensor in wholes.items():
        file, _, name = key.partition("/")
        files.setdefault(file, {})[name] = tensor
    return files


def _put(whole: RawTensor, tensor_slice: TensorSlice, part: Bytes) -> None:
    if tensor_slice.run is not None and tensor_slice.slab is not None:
        _slab(whole, tensor_slice)[_indices(tensor_slice)] = part.reshape(
            -1, ITEM_BYTES[whole.dtype]
        )
    else:
        view = _part(whole, tensor_slice)
        view[...] = part.reshape(view.shape)


def _part(whole: RawTensor, tensor_slice: TensorSlice) -> Bytes:
    """Return a part's bytes: a view, or a copy for a run of a slab."""
    if tensor_slice.run is None:
        return _slab(whole, tensor_slice)
    if tensor_slice.slab is None:
        first, last = tensor_slice.run
        size = ITEM_BYTES[whole.dtype]
        return whole.data[first * size : last * size]
    part: Bytes = _slab(whole, tensor_slice)[_indices(tensor_slice)]
    return part


def _slab(whole: RawTensor, tensor_slice: TensorSlice) -> Bytes:
    """Return a view of a slab, shape [*slab_shape, bytes per element]."""
    if tensor_slice.slab is None:
        return whole.data.reshape(*whole.shape, ITEM_BYTES[whole.dtype])
    dim, start, stop = tensor_slice.slab
    block = whole.shape[dim] // tensor_slice.blocks
    shape = (*whole.shape[:dim], tensor_slice.blocks, block, *whole.shape[dim + 1 :])
    blocks = whole.data.reshape(*shape, ITEM_BYTES[whole.dtype])
    return blocks[(slice(None),) * (dim + 1) + (slice(start, stop),)]


def _indices(tensor_slice: TensorSlice) -> tuple[NDArray[np.intp], ...]:
    """Return the positions of a run's elements in its slab, by dimension."""
    assert tensor_slice.run is not None, "only for runs"
    return np.unravel_index(np.arange(*tensor_slice.run), tensor_slice.slab_shape)
