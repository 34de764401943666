"""
The safetensors format, bytes in and bytes out, without torch: the driver has none.

Tensors are bytes here (`RawTensor`), so that bfloat16, which numpy lacks, needs no case of its own.
"""

from collections.abc import Iterator, Mapping

import numpy as np
from safetensors import SafetensorError, TensorSpec, deserialize, serialize

from distplat.platform.tensor_slices import ITEM_BYTES, RawTensor

TASK_PREFIX = "task:"
"""Begins the names of parameters that a task keeps itself, where they stand beside the model's."""

EMA_PREFIX = "ema:"
"""Begins the names of averaged weights, where they stand beside the weights."""

_NAMES = {
    TensorSpec(dtype=name, shape=[0], data_ptr=0, data_len=0).dtype: name for name in ITEM_BYTES
}
"""torch's names of types by the format's."""


def encode(tensors: Mapping[str, RawTensor]) -> Iterator[bytes]:
    """
    Give a file's content, made when it is asked for.

    A checkpoint's files are asked for one after the other, so that memory holds one of them.
    """
    data = {name: np.ascontiguousarray(tensor.data) for name, tensor in tensors.items()}
    yield serialize(
        {
            name: TensorSpec(
                dtype=tensor.dtype,
                shape=list(tensor.shape),
                data_ptr=data[name].ctypes.data,  # `data` keeps it alive
                data_len=data[name].nbytes,
            )
            for name, tensor in tensors.items()
        }
    )


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
    return b"".join(encode(tensors)), b"".join(encode(others))
