"""
The safetensors format, bytes in and bytes out, without torch: the driver has none.

Tensors are bytes here (`RawTensor`), so that bfloat16, which numpy lacks, needs no case of its own.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from io import BytesIO
from typing import Any

import numpy as np
from safetensors import TensorSpec, serialize

from distplat.platform.tensor_slices import ITEM_BYTES, Bytes, RawTensor

TASK_PREFIX = "task:"
"""Begins the names of parameters that a task keeps itself, where they stand beside the model's."""

EMA_PREFIX = "ema:"
"""Begins the names of averaged weights, where they stand beside the weights."""

_PIECE_BYTES = 64 * 2**20
"""What is copied at a time: other threads go on between two."""
_LENGTH_BYTES = 8
"""A file begins with the length of its header."""
_HEADER_BYTES = 100_000_000
"""The longest header that the library reads."""
_METADATA = "__metadata__"
"""Key of the header that names no tensor."""

_EMPTY = {dtype: TensorSpec(dtype=dtype, shape=[0], data_ptr=0, data_len=0) for dtype in ITEM_BYTES}
_ORDER = {dtype: number for number, dtype in enumerate(json.loads(serialize(_EMPTY)[8:]))}
"""Which types the library writes first."""
_FORMAT_NAMES = {dtype: spec.dtype for dtype, spec in _EMPTY.items()}
_NAMES = {name: dtype for dtype, name in _FORMAT_NAMES.items()}
"""torch's names of types by the format's."""


def encode(tensors: Mapping[str, RawTensor]) -> Iterator[bytes | memoryview]:
    """
    Give a file's content in parts, which are made when they are asked for.

    The bytes are the library's. That makes all of a file in one call, in which no other thread of
    the process runs (`docs/decisions/tensor_files.md`).

    Returns:
        The header, then the elements of each tensor that has some, not copied.

    Raises:
        ValueError: a tensor's bytes are not as many as its shape has.
    """
    names = sorted(tensors, key=lambda name: (_ORDER[tensors[name].dtype], name))
    header, end = dict[str, dict[str, object]](), 0
    for name in names:
        tensor, start = tensors[name], end
        end += math.prod(tensor.shape) * ITEM_BYTES[tensor.dtype]
        if end - start != tensor.data.nbytes:
            raise ValueError(f"{name!r}: {tensor.data.nbytes} bytes for {end - start}")
        header[name] = {
            "dtype": _FORMAT_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in names:
        if tensors[name].data.nbytes:
            yield np.ascontiguousarray(tensors[name].data).data.cast("B")


def to_bytes(tensors: Mapping[str, RawTensor]) -> bytes:
    """Give a file's content, see `encode`; other threads go on meanwhile."""
    file = BytesIO()
    for part in encode(tensors):
        for start in range(0, len(part), _PIECE_BYTES):
            file.write(part[start : start + _PIECE_BYTES])
    return file.getvalue()


def decode(content: bytes) -> dict[str, RawTensor]:
    """
    Read a file's content.

    Tensors are not copied, and cannot be written to. The library copies all of them in one call, in
    which no other thread of the process runs (`docs/decisions/tensor_files.md`).

    Raises:
        ValueError: it is no such file, or has a type that torch has not.
    """
    first = _LENGTH_BYTES + int.from_bytes(content[:_LENGTH_BYTES], "little")
    if not _LENGTH_BYTES < first <= min(len(content), _LENGTH_BYTES + _HEADER_BYTES):
        raise ValueError("it has no header of tensors, or not all of it")
    try:
        header = json.loads(content[_LENGTH_BYTES:first].decode())
        header.pop(_METADATA, None)
        bounds = sorted((*entry["data_offsets"], name) for name, entry in header.items())
        return _views(header, bounds, np.frombuffer(content, np.uint8)[first:])
    except KeyError as error:
        raise ValueError(f"tensors of type {error} are not read") from None
    except (AttributeError, TypeError, RecursionError) as error:
        raise ValueError(f"its header is not one of tensors: {error}") from None


def _views(
    header: Mapping[str, Any], bounds: Sequence[tuple[int, int, str]], data: Bytes
) -> dict[str, RawTensor]:
    """Give each tensor its bytes, which lie one behind the other; see `decode`."""
    tensors, end = dict[str, RawTensor](), 0
    for start, stop, name in bounds:
        dtype, sizes = _NAMES[header[name]["dtype"]], header[name]["shape"]
        shape = tuple(sizes)
        if type(sizes) is not list or not all(
            type(size) is int and size >= 0 for size in (start, stop, *shape)
        ):
            raise ValueError(f"{name!r} has no shape")
        if start != end or stop - start != math.prod(shape) * ITEM_BYTES[dtype]:
            raise ValueError(f"{name!r} has bytes {start} to {stop}, and {shape} of {dtype}")
        part, end = data[start:stop], stop
        aligned = part.ctypes.data % ITEM_BYTES[dtype] == 0
        tensors[name] = RawTensor(dtype, shape, part if aligned else part.copy())
    if end != len(data):
        raise ValueError(f"it has {len(data)} bytes of tensors, its header says {end}")
    return tensors


def split_task_tensors(content: bytes, prefix: str = TASK_PREFIX) -> tuple[bytes, bytes | None]:
    """
    Separate what stands beside a model: what its task has trained, or an average of it.

    Args:
        content: a file's, with both.
        prefix: begins the names of the second.

    Returns:
        The model's file, and the other's without the prefix; None: there is nothing.
    """
    if f'"{prefix}'.encode() not in content:  # which spares most files the reading
        return content, None
    tensors = decode(content)
    names = [name for name in tensors if name.startswith(prefix)]
    if not names:
        return content, None
    others = {name.removeprefix(prefix): tensors.pop(name) for name in names}
    return to_bytes(tensors), to_bytes(others)
