"""Reductions through shared memory are bit-identical to a plain loop in rank order."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rank_threads import UNSHRUNK
from shm_ranks import on_shm_ranks
from torch import Tensor

from distplat.actors.collectives.shm.kernels import Scratch, combine, cut_evenly
from distplat.actors.collectives.shm.shm_group import ShmGroup
from distplat.strategies.collective import SENDABLE, ReduceOp

OPS = (ReduceOp.SUM, ReduceOp.PRODUCT, ReduceOp.MIN, ReduceOp.MAX)
SLOT_BYTES = 16 * 1024
SIZES = (0, 1, 2, 127, 128, 129, 1009, 2048, 2049, 4093, 16381, 40009)
HALF = (torch.float16, torch.bfloat16)

TORCH_OPS: dict[ReduceOp, Callable[[Tensor, Tensor], Tensor]] = {
    ReduceOp.SUM: torch.add,
    ReduceOp.PRODUCT: torch.mul,
    ReduceOp.MIN: torch.minimum,
    ReduceOp.MAX: torch.maximum,
}
property_settings = settings(
    max_examples=40,
    deadline=None,
    phases=UNSHRUNK,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def values(rank: int, size: int, dtype: torch.dtype) -> Tensor:
    """Return a rank's input: floats of various magnitudes and both signs, or integers."""
    generator = torch.Generator().manual_seed(rank * 100_003 + size)
    if dtype.is_floating_point:
        scale = 10.0 ** torch.randint(-3, 3, (size,), generator=generator)
        return (torch.randn(size, generator=generator) * scale).to(dtype)
    low, high = (0, 2) if dtype is torch.bool else (0, 100)
    return torch.randint(low, high, (size,), generator=generator).to(dtype)


def reduce_in_rank_order(parts: list[Tensor], op: ReduceOp) -> Tensor:
    """Reduce from left to right; 16-bit floats in float32, rounded once."""
    dtype = parts[0].dtype
    sum_dtype = torch.float32 if dtype in HALF else dtype
    result = parts[0].to(sum_dtype)
    for part in parts[1:]:
        result = TORCH_OPS[op](result, part.to(sum_dtype))
    return result.to(dtype)


def has_same_bits(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors are bit-identical, including signs of zeros and NaNs."""
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


worlds, sizes = st.integers(1, 5), st.sampled_from(SIZES)
dtypes, ops, flags = st.sampled_from(SENDABLE), st.sampled_from(OPS), st.booleans()


@property_settings
@given(world=worlds, size=sizes, dtype=dtypes, op=ops, shared=flags, asynchronous=flags)
def test_all_reduce(
    world: int, size: int, dtype: torch.dtype, op: ReduceOp, shared: bool, asynchronous: bool
) -> None:
    def body(group: ShmGroup) -> Tensor:
        values_ = values(group.rank, size, dtype)
        tensor = group.share(values_).copy_(values_) if shared else values_
        for repetition in range(2):  # twice: slots and headers alternate
            if repetition:
                tensor.copy_(values(group.rank, size, dtype))
            if asynchronous:
                group.start_all_reduce(tensor, op).wait()
            else:
                group.all_reduce(tensor, op)
        return tensor.clone()

    expected = reduce_in_rank_order([values(rank, size, dtype) for rank in range(world)], op)
    assert all(has_same_bits(t, expected) for t in on_shm_ranks(world, body, slot_bytes=SLOT_BYTES))


@property_settings
@given(world=worlds, size=sizes, dtype=dtypes, op=ops, root=st.integers(0, 4), shared=flags)
def test_reduce_and_broadcast(
    world: int, size: int, dtype: torch.dtype, op: ReduceOp, root: int, shared: bool
) -> None:
    root %= world

    def body(group: ShmGroup) -> tuple[Tensor, Tensor]:
        values_ = values(group.rank, size, dtype)
        tensor = group.share(values_).copy_(values_) if shared else values_.clone()
        group.reduce(tensor, op, root)
        reduced = tensor.clone()
        group.broadcast(tensor, root)
        return reduced, tensor.clone()

    parts = [values(rank, size, dtype) for rank in range(world)]
    expected = reduce_in_rank_order(parts, op)
    results = on_shm_ranks(world, body, slot_bytes=SLOT_BYTES)
    for rank, (reduced, broadcast) in enumerate(results):
        assert has_same_bits(reduced, expected if rank == root else parts[rank])
        assert has_same_bits(broadcast, expected)


@property_settings
@given(
    lengths=st.lists(sizes, min_size=1, max_size=5),
    dtype=dtypes,
    op=ops,
    shared=flags,
    alias=flags,
)
def test_reduce_scatter_and_all_gather(
    lengths: list[int], dtype: torch.dtype, op: ReduceOp, shared: bool, alias: bool
) -> None:
    world, total = len(lengths), sum(lengths)

    def body(group: ShmGroup) -> tuple[Tensor, Tensor]:
        values_ = values(group.rank, total, dtype)
        vector = group.share(values_).copy_(values_) if shared else values_
        parts = list(torch.split_with_sizes(vector, lengths))
        part = parts[group.rank]
        output = part if alias else torch.zeros_like(part)
        group.reduce_scatter(output, parts, op)
        reduced = output.clone()
        group.all_gather(parts, output)
        return reduced, vector.clone()

    expected = reduce_in_rank_order([values(rank, total, dtype) for rank in range(world)], op)
    expected_parts = torch.split_with_sizes(expected, lengths)
    results = on_shm_ranks(world, body, slot_bytes=SLOT_BYTES)
    for (reduced, vector), part in zip(results, expected_parts, strict=True):
        assert has_same_bits(reduced, part)
        assert has_same_bits(vector, expected)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("op", [ReduceOp.MIN, ReduceOp.MAX])
def test_sign_of_zero_matches_rank_order(op: ReduceOp, shared: bool) -> None:
    def body(group: ShmGroup) -> Tensor:
        values_ = torch.zeros(5003) * (1.0 if group.rank % 2 else -1.0)
        tensor = group.share(values_).copy_(values_) if shared else values_
        group.all_reduce(tensor, op)
        return tensor.clone()

    parts = [torch.zeros(5003) * (1.0 if rank % 2 else -1.0) for rank in range(3)]
    expected = reduce_in_rank_order(parts, op)
    assert all(has_same_bits(t, expected) for t in on_shm_ranks(3, body, slot_bytes=SLOT_BYTES))


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("dtype", HALF)
def test_16_bit_floats_are_summed_in_float32(dtype: torch.dtype, shared: bool) -> None:
    """2048 + 1 + 1 + 1 is 2048 in float16 if each sum is rounded, and 2052 if rounded once."""
    large = 1 / torch.finfo(dtype).eps * 2
    parts = [large, 1.0, 1.0, 1.0]

    def body(group: ShmGroup) -> Tensor:
        values_ = torch.full((1009,), parts[group.rank], dtype=dtype)
        tensor = group.share(values_).copy_(values_) if shared else values_
        group.all_reduce(tensor)
        return tensor.clone()

    rounded = torch.tensor(large, dtype=dtype)
    for part in parts[1:]:
        rounded = rounded + torch.tensor(part, dtype=dtype)
    assert float(rounded) == large
    expected = torch.full((1009,), large + 3.0).to(dtype)
    assert float(expected[0]) > large
    assert all(has_same_bits(t, expected) for t in on_shm_ranks(4, body, slot_bytes=SLOT_BYTES))


def test_tensor_longer_than_many_slots() -> None:
    def body(group: ShmGroup) -> Tensor:
        tensor = values(group.rank, 1_000_003, torch.float32)
        group.all_reduce(tensor)
        return tensor

    expected = reduce_in_rank_order(
        [values(rank, 1_000_003, torch.float32) for rank in range(3)], ReduceOp.SUM
    )
    assert all(has_same_bits(t, expected) for t in on_shm_ranks(3, body, slot_bytes=SLOT_BYTES))


def test_random_sequence_of_operations() -> None:
    """A slot that is reused too early changes the values: ranks run at different speeds."""
    generator = torch.Generator().manual_seed(5)
    plan = [
        (int(operation), int(torch.randint(1, 30_000, (1,), generator=generator)), int(root))
        for operation, root in torch.randint(0, 3, (120, 2), generator=generator).tolist()
    ]

    def body(group: ShmGroup) -> None:
        for operation, size, root in plan:
            tensor = values(group.rank, size, torch.float32)
            if operation == 0:
                group.broadcast(tensor, root)
                expected = values(root, size, torch.float32)
            elif operation == 1:
                group.all_reduce(tensor)
                parts = [values(rank, size, torch.float32) for rank in range(3)]
                expected = reduce_in_rank_order(parts, ReduceOp.SUM)
            else:
                outputs = [torch.empty(size) for _ in range(3)]
                group.all_gather(outputs, tensor)
                tensor, expected = outputs[root], values(root, size, torch.float32)
            assert has_same_bits(tensor, expected), (operation, size, root)

    on_shm_ranks(3, body, slot_bytes=SLOT_BYTES, timeout_s=60)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("pieces", [1, 3, 8])
def test_cut_evenly_cuts_at_cache_lines(size: int, pieces: int) -> None:
    parts = cut_evenly(torch.zeros(size), pieces)
    starts = [part.storage_offset() for part in parts if part.numel()]
    assert len(parts) == pieces and sum(part.numel() for part in parts) == size
    assert all(start * torch.int8.itemsize % 64 == 0 for start in starts)


@pytest.mark.parametrize("index", range(4))
def test_combine_with_input_as_output(index: int) -> None:
    parts = [values(rank, 1009, torch.float32) for rank in range(4)]
    expected = reduce_in_rank_order(parts, ReduceOp.SUM)
    combine(parts, parts[index], ReduceOp.SUM, Scratch())
    assert has_same_bits(parts[index], expected)
