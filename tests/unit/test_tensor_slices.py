"""Tensor slices and their assembly, and the safetensors file."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError, TensorSpec, deserialize, serialize

from distplat.platform import tensor_file
from distplat.platform.errors import ProtocolError
from distplat.platform.tensor_file import decode, encode, to_bytes
from distplat.platform.tensor_slices import (
    ITEM_BYTES,
    Bytes,
    RawTensor,
    TensorEntry,
    TensorSlice,
    assemble_tensors,
    extract_part,
)

SHAPES = st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple)


def whole(shape: tuple[int, ...], dtype: str = "int32") -> RawTensor:
    """Return a tensor with distinct elements."""
    data = np.arange(math.prod(shape), dtype=np.int32).view(np.uint8)
    return RawTensor(dtype, shape, data)


def cuts(length: int, draw: Any) -> list[tuple[int, int]]:
    inner = draw(st.lists(st.integers(0, length), max_size=3))
    bounds = sorted({0, length, *inner})
    return list(itertools.pairwise(bounds))


@given(SHAPES, st.data())
def test_assemble_tensors_inverts_extract_part(shape: tuple[int, ...], data: st.DataObject) -> None:
    tensor = whole(shape)
    dim = data.draw(st.integers(0, len(shape) - 1))
    bundles = []
    blocks = data.draw(st.sampled_from([n for n in range(1, 6) if shape[dim] % n == 0]))
    for start, stop in cuts(shape[dim] // blocks, data.draw):
        slab = (dim, start, stop)
        for run in [*cuts(TensorSlice(shape, slab, None, blocks).size, data.draw)]:
            tensor_slice = TensorSlice(shape, slab, data.draw(st.sampled_from([run])), blocks)
            entry = TensorEntry("model/w", tensor_slice, "int32", 0)
            bundles.append(([extract_part(tensor, tensor_slice)], (entry,)))
    order = data.draw(st.permutations(bundles))
    [(key, result)] = assemble_tensors(order).items()
    assert key == "model/w"
    assert result.shape == shape
    assert np.array_equal(result.data, tensor.data)


def zero_part(
    tensor_slice: TensorSlice, dtype: str = "int32"
) -> tuple[list[Bytes], tuple[TensorEntry, ...]]:
    data = np.zeros(tensor_slice.size * ITEM_BYTES[dtype], np.uint8)
    return [data], (TensorEntry("model/w", tensor_slice, dtype, 0),)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([zero_part(TensorSlice((4,), None, (0, 3)))], "'model/w' have 3 of 4"),
        ([zero_part(TensorSlice((4,))), zero_part(TensorSlice((4,), None, (3, 4)))], "have 5 of 4"),
        ([zero_part(TensorSlice((4,))), zero_part(TensorSlice((5,)))], "different tensors"),
        (
            [zero_part(TensorSlice((4,), None, (0, 2))), zero_part(TensorSlice((4,)), "int64")],
            "different tensors",
        ),
    ],
)
def test_inconsistent_parts_are_rejected(parts: Any, message: str) -> None:
    with pytest.raises(ProtocolError, match=message):
        assemble_tensors(parts)


def test_scalar_may_be_in_two_parts() -> None:
    step = TensorSlice(())
    first, second = zero_part(step), zero_part(step)
    first[0][0][:] = 1
    assert assemble_tensors([first, second])["model/w"].data.tolist() == [1, 1, 1, 1]


def bits_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


@pytest.mark.parametrize("dtype", sorted(ITEM_BYTES))
def test_safetensors_loads_encoded_file(dtype: str) -> None:
    torch_dtype = getattr(torch, dtype)
    bits = torch.arange(48, dtype=torch.uint8) % 2  # 0 and 1 are also valid for bool
    tensors = {
        "a.weight": bits.view(torch_dtype).reshape(2, -1) if dtype != "bool" else bits.bool(),
        "step": torch.ones((), dtype=torch.float32),
        "none": torch.zeros(0, 3, dtype=torch_dtype),
    }
    wholes = {
        name: RawTensor(str(t.dtype)[6:], tuple(t.shape), bits_of(t).numpy())
        for name, t in tensors.items()
    }
    content = b"".join(encode(wholes))
    read = safetensors.torch.load(content)
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype is tensor.dtype
        assert read[name].shape == tensor.shape
        assert torch.equal(bits_of(read[name]), bits_of(tensor))
    assert to_bytes(wholes) == content == safetensors.torch.save(tensors)
    decoded = decode(content)
    assert {n: (w.dtype, w.shape, w.data.tobytes()) for n, w in decoded.items()} == {
        n: (w.dtype, w.shape, w.data.tobytes()) for n, w in wholes.items()
    }


def test_tensor_order_and_names_match_safetensors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_file, "_PIECE_BYTES", 3)
    names = [
        "w",
        "W",
        "w.10",
        "w.2",
        'a"\\\n\x01\x1f\x7f/',
        "\xe9",
        "\u2028",
        "\ufffd",
        "\U0001f600",
    ]
    tensors = {
        f"{name}{suffix}": torch.full(shape, 1).to(getattr(torch, dtype))
        for name in names
        for suffix, dtype in enumerate(ITEM_BYTES)
        for shape in [[(), (0,), (2, 3)][suffix % 3]]
    }
    wholes = {
        name: RawTensor(str(t.dtype)[6:], tuple(t.shape), bits_of(t).numpy())
        for name, t in tensors.items()
    }
    assert to_bytes(wholes) == b"".join(encode(wholes)) == safetensors.torch.save(tensors)
    assert to_bytes({}) == safetensors.torch.save({})


def test_encode_does_not_copy_tensors() -> None:
    data = np.arange(16, dtype=np.uint8)
    _header, part = encode(
        {"w": RawTensor("uint8", (16,), data), "x": RawTensor("uint8", (0,), data[:0])}
    )
    assert np.shares_memory(np.frombuffer(part, np.uint8), data)


def test_tensor_with_too_few_bytes_is_rejected() -> None:
    with pytest.raises(ValueError, match="'w': 15 bytes for 16"):
        to_bytes({"w": RawTensor("float32", (4,), np.zeros(15, np.uint8))})


def test_decode_reads_files_of_safetensors() -> None:
    content = safetensors.torch.save({"w": torch.ones(2, 3)}, {"who": "the library"})
    assert decode(content)["w"].shape == (2, 3)


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"{}",
        b'{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}',
        b'{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,80]}}',
        b'{"w":{"dtype":"F99","shape":[2],"data_offsets":[0,8]}}',
        b'{"w":{"dtype":"F32"}}',
        b'{"w":{"dtype":"F32","shape":[2.0],"data_offsets":[0,8]}}',
        b'{"w":{"dtype":"F32","shape":[-1,-2],"data_offsets":[0,8]}}',
        b'{"w":{"dtype":"F64","shape":"","data_offsets":[0,8]}}',
        b'{"w":{"dtype":"F64","shape":{},"data_offsets":[0,8]}}',
        b'{"w":{"dtype":"F64","shape":null,"data_offsets":[0,8]}}',
        b'{"w":{"dtype":"F64","shape":[],"data_offsets":{"0":0,"8":8}}}',
        b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
        b'"v":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}',
        b'{"w":{"dtype":["F32"],"shape":[2],"data_offsets":[0,8]}}',
        b'{"w":[]}',
        b"[]",
        b"5",
        b'{"w":' + b"[" * 100_000,
        b'{"\xff":{}}',
        b"nonsense",
    ],
)
def test_invalid_file_is_rejected(header: bytes) -> None:
    content = len(header).to_bytes(8, "little") + header + bytes(8)
    with pytest.raises(ValueError):
        decode(content)
    with pytest.raises(ValueError):
        decode(content[:5])


def safetensors_decode(content: bytes) -> dict[str, tuple[str, tuple[int, ...], bytes]] | None:
    """Return type, shape and bytes by name, or None if safetensors rejects the file."""
    try:
        tensors = deserialize(content)  # type: ignore[no-untyped-call]
    except SafetensorError:
        return None
    return {n: (t["dtype"], tuple(t["shape"]), bytes(t["data"])) for n, t in tensors}


def our_decode(content: bytes) -> dict[str, tuple[str, tuple[int, ...], bytes]] | None:
    try:
        tensors = decode(content)
    except ValueError:
        return None
    formats = tensor_file._FORMAT_NAMES
    return {n: (formats[t.dtype], t.shape, t.data.tobytes()) for n, t in tensors.items()}


def test_damaged_file_is_handled_as_by_safetensors() -> None:
    """Flip each bit of the header, and truncate the file after each byte."""
    tensors = {
        "a.weight": torch.arange(6.0).reshape(2, 3),
        "none": torch.zeros(0, 2, dtype=torch.int8),
        "step": torch.ones((), dtype=torch.int64),
        "w": torch.arange(3, dtype=torch.uint8),
    }
    content = safetensors.torch.save(tensors, {"who": "the library"})
    assert our_decode(content) == safetensors_decode(content) is not None
    for bit in range(8 * (8 + int.from_bytes(content[:8], "little"))):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        assert our_decode(bytes(damaged)) == safetensors_decode(bytes(damaged)), bytes(damaged)
    for size in range(len(content)):
        assert our_decode(content[:size]) is safetensors_decode(content[:size]) is None
    assert our_decode(content + b"1") is safetensors_decode(content + b"1") is None


def test_decode_does_not_copy_tensors() -> None:
    """A copy as in safetensors would hold the GIL."""
    content = to_bytes({"w": RawTensor("float32", (4,), np.arange(16, dtype=np.uint8))})
    data = decode(content)["w"].data
    assert np.shares_memory(data, np.frombuffer(content, np.uint8))
    assert not data.flags.writeable, "the file's content is read-only"


def test_decoded_elements_are_aligned() -> None:
    """Torch may require alignment, and a header of another writer may have any length."""
    content = to_bytes({"w": RawTensor("float64", (1,), np.arange(8, dtype=np.uint8))})
    length = int.from_bytes(content[:8], "little")
    unaligned = (length + 1).to_bytes(8, "little") + content[8 : 8 + length] + b" " + content[-8:]
    assert our_decode(unaligned) == safetensors_decode(unaligned) == our_decode(content)
    assert all(decode(file)["w"].data.ctypes.data % 8 == 0 for file in (content, unaligned))


def test_file_without_tensors_round_trips() -> None:
    assert decode(b"".join(encode({}))) == {}


def test_dtype_without_torch_equivalent_is_rejected() -> None:
    spec = TensorSpec(dtype="float8_e8m0fnu", shape=[0], data_ptr=0, data_len=0)
    with pytest.raises(ValueError, match="F8_E8M0"):
        decode(serialize({"w": spec}))


def test_strided_array_is_written_contiguously() -> None:
    data = np.arange(16, dtype=np.uint8)[::2]
    assert (
        decode(to_bytes({"w": RawTensor("uint8", (8,), data)}))["w"].data.tolist() == data.tolist()
    )
