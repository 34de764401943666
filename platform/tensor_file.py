"""
The safetensors format, bytes in and bytes out, without torch: the driver has none.

Tensors are bytes here (`RawTensor`), so that bfloat16, which numpy lacks, needs no case of its own.
"""

import json
import math
from collections.abc import Iterator, Mapping
from io import BytesIO

import numpy as np
from safetensors import SafetensorError, TensorSpec, deserialize, serialize

from distplat.platform.tensor_slices import ITEM_BYTES, RawTensor

TASK_PREFIX = "task:"
"""Begins the names of parameters that a task keeps itself, where they stand beside the model's."""

EMA_PREFIX = "ema:"
"""Begins the names of averaged weights, where they stand beside the weights."""

_PIECE_BYTES = 64 * 2**20
"""What is copied at a time: other threads go on between two."""


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

    Raises:
        ValueError: it is no such file, or has a type that torch has not.
    """
    try:
        return {
            name: RawTensor(
                _NAMES[entry["dtype"]],
                tuple(entry["shape"]),
                np.frombuffer(entry["data"], np.uint8),
            )
            for name, entry in deserialize(content)  # type: ignore[no-untyped-call]
        }
    except SafetensorError as error:
        raise ValueError(str(error)) from None
    except KeyError as error:
        raise ValueError(f"tensors of type {error} are not read") from None


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
