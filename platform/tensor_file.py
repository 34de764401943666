"""
The safetensors format, bytes in and bytes out, a piece at a time.

    8 bytes   length of the header, little end first
    header    JSON: name -> {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
    data      the tensors one after another

The library's own writer wants tensors of torch or numpy: the driver has no torch, and numpy no
bfloat16. What is written here is read by the library, and a test holds that.
(https://github.com/huggingface/safetensors, "Format")
"""

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from distplat.platform.pieces import ITEM_BYTES, Bytes, Whole

TASK_PREFIX = "task:"
"""Begins the names of parameters that a task keeps itself, where they stand beside the model's."""

_ALIGN = 8
_CODES = {
    "bool": "BOOL",
    "uint8": "U8",
    "int8": "I8",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "int16": "I16",
    "uint16": "U16",
    "float16": "F16",
    "bfloat16": "BF16",
    "int32": "I32",
    "uint32": "U32",
    "float32": "F32",
    "int64": "I64",
    "uint64": "U64",
    "float64": "F64",
    "complex64": "C64",
}
_NAMES = {code: name for name, code in _CODES.items()}


def encode(tensors: Mapping[str, Whole]) -> Iterator[bytes | memoryview]:
    """Give a file's content, in pieces; tensors of the largest elements first, to be aligned."""
    order = sorted(tensors, key=lambda name: (-ITEM_BYTES[tensors[name].dtype], name))
    header, offset = {}, 0
    for name in order:
        whole = tensors[name]
        end = offset + whole.data.nbytes
        header[name] = {
            "dtype": _CODES[whole.dtype],
            "shape": list(whole.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGN)
    yield len(text).to_bytes(8, "little")
    yield text
    for name in order:
        yield tensors[name].data.data


def decode(content: bytes) -> dict[str, Whole]:
    """
    Read a file's content; the tensors are views of it.

    Raises:
        ValueError: it is no such file.
    """
    length = int.from_bytes(content[:8], "little")
    if not 0 < length <= len(content) - 8:
        raise ValueError("no safetensors header")
    header = json.loads(content[8 : 8 + length])
    data = np.frombuffer(content, np.uint8, offset=8 + length)
    return {name: _tensor(facts, data) for name, facts in header.items() if name != "__metadata__"}


def split_task(content: bytes) -> tuple[bytes, bytes | None]:
    """
    Separate what a task has trained beside its model.

    Args:
        content: a file's, with both.

    Returns:
        The model's file, and the task's with names of its attributes; None: there is nothing.
    """
    length = int.from_bytes(content[:8], "little")
    if f'"{TASK_PREFIX}'.encode() not in content[8 : 8 + length]:
        return content, None
    tensors = decode(content)
    names = [name for name in tensors if name.startswith(TASK_PREFIX)]
    task = {name.removeprefix(TASK_PREFIX): tensors.pop(name) for name in names}
    return b"".join(encode(tensors)), b"".join(encode(task))


def _tensor(facts: dict[str, Any], data: Bytes) -> Whole:
    try:
        dtype, shape = _NAMES[facts["dtype"]], tuple(facts["shape"])
        first, last = facts["data_offsets"]
        size = math.prod(shape) * ITEM_BYTES[dtype]
    except (KeyError, TypeError) as error:
        raise ValueError(f"a tensor is described wrongly: {error}") from None
    if not (0 <= first <= last <= len(data) and last - first == size):
        raise ValueError("a tensor lies outside of the file")
    return Whole(dtype, shape, data[first:last])
