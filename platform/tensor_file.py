"""
Reads and writes the safetensors format as bytes, without torch, which the driver does not import.

Tensors are bytes here (`RawTensor`), so bfloat16, which numpy lacks, needs no special case.
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
"""Prefix of the task's own parameters in a file with the model's."""

EMA_PREFIX = "ema:"
"""Prefix of averaged weights in a file with the weights."""

_PIECE_BYTES = 64 * 2**20
"""Bytes copied at a time; other threads run in between."""
_LENGTH_BYTES = 8
"""Size of the header's length at the start of a file."""
_HEADER_BYTES = 100_000_000
"""Longest header that the safetensors library reads."""
_METADATA = "__metadata__"
"""Key of the header that is not a tensor."""

_EMPTY = {dtype: TensorSpec(dtype=dtype, shape=[0], data_ptr=0, data_len=0) for dtype in ITEM_BYTES}
_ORDER = {dtype: number for number, dtype in enumerate(json.loads(serialize(_EMPTY)[8:]))}
"""The library's order of dtypes in a file."""
_FORMAT_NAMES = {dtype: spec.dtype for dtype, spec in _EMPTY.items()}
_NAMES = {name: dtype for dtype, name in _FORMAT_NAMES.items()}
"""torch's dtype names by the format's."""


def encode(tensors: Mapping[str, RawTensor]) -> Iterator[bytes | memoryview]:
    """
    Yield a file's content in parts, which are built lazily.

    The bytes equal those of the safetensors library, which would build the file in one call that
    blocks all other threads of the process (`docs/decisions/tensor_files.md`).

    Returns:
        The header, then the elements of each non-empty tensor, not copied.

    Raises:
        ValueError: the size of a tensor's data does not match its shape.
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
    """Return a file's content, see `encode`, without blocking other threads."""
    file = BytesIO()
    for part in encode(tensors):
        for start in range(0, len(part), _PIECE_BYTES):
            file.write(part[start : start + _PIECE_BYTES])
    return file.getvalue()


def decode(content: bytes) -> dict[str, RawTensor]:
    """
    Parse a file's content.

    Tensors are read-only views. The safetensors library would copy all of them in one call that
    blocks all other threads of the process (`docs/decisions/tensor_files.md`).

    Raises:
        ValueError: it is not a safetensors file, or has a dtype that torch lacks.
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
    """Return views of the consecutive tensors; see `decode`."""
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
    Separate the tensors with a prefix: the task's own parameters, or averages.

    Args:
        content: of a file with both.
        prefix: of the names to separate.

    Returns:
        The model's file, and the other file with names without prefix; None: no such tensors.
    """
    if f'"{prefix}'.encode() not in content:  # most files need no parsing
        return content, None
    tensors = decode(content)
    names = [name for name in tensors if name.startswith(prefix)]
    if not names:
        return content, None
    others = {name.removeprefix(prefix): tensors.pop(name) for name in names}
    return to_bytes(tensors), to_bytes(others)
