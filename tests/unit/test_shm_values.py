"""Shared memory computes what the plain loop in rank order computes, bit for bit, on every rank."""

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

PLAIN: dict[ReduceOp, Callable[[Tensor, Tensor], Tensor]] = {
    ReduceOp.SUM: torch.add,
    ReduceOp.PRODUCT: torch.mul,
    ReduceOp.MIN: torch.minimum,
    ReduceOp.MAX: torch.maximum,
}
many = settings(
    max_examples=40,
    deadline=None,
    phases=UNSHRUNK,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def values(rank: int, size: int, dtype: torch.dtype) -> Tensor:
    """What a rank brings: fractions of all magnitudes and both signs, or any whole numbers."""
    seeded = torch.Generator().manual_seed(rank * 100_003 + size)
    if dtype.is_floating_point:
        spread = 10.0 ** torch.randint(-3, 3, (size,), generator=seeded)
        return (torch.randn(size, generator=seeded) * spread).to(dtype)
    low, high = (0, 2) if dtype is torch.bool else (0, 100)
    return torch.randint(low, high, (size,), generator=seeded).to(dtype)


def plain(parts: list[Tensor], op: ReduceOp) -> Tensor:
    """Left to right; 16-bit floats in float32, rounded once."""
    dtype = parts[0].dtype
    wide = torch.float32 if dtype in HALF else dtype
    result = parts[0].to(wide)
    for part in parts[1:]:
        result = PLAIN[op](result, part.to(wide))
    return result.to(dtype)


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same bits; zeros of either sign, and NaNs, are told apart."""
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


worlds, sizes = st.integers(1, 5), st.sampled_from(SIZES)
dtypes, ops, flags = st.sampled_from(SENDABLE), st.sampled_from(OPS), st.booleans()


@many
@given(world=worlds, size=sizes, dtype=dtypes, op=ops, shared=flags, later=flags)
def test_all_reduce(
    world: int, size: int, dtype: torch.dtype, op: ReduceOp, shared: bool, later: bool
) -> None:
    def body(group: ShmGroup) -> Tensor:
        mine = values(group.rank, size, dtype)
        tensor = group.share(mine).copy_(mine) if shared else mine
        for turn in range(2):  # twice: slots and headers are used in turns
            if turn:
                tensor.copy_(values(group.rank, size, dtype))
            if later:
                group.start_all_reduce(tensor, op).wait()
            else:
                group.all_reduce(tensor, op)
        return tensor.clone()

    expected = plain([values(rank, size, dtype) for rank in range(world)], op)
    assert all(same(t, expected) for t in on_shm_ranks(world, body, slot_bytes=SLOT_BYTES))


@many
@given(world=worlds, size=sizes, dtype=dtypes, op=ops, root=st.integers(0, 4), shared=flags)
def test_reduce_and_broadcast(
    world: int, size: int, dtype: torch.dtype, op: ReduceOp, root: int, shared: bool
) -> None:
    root %= world

    def body(group: ShmGroup) -> tuple[Tensor, Tensor]:
        mine = values(group.rank, size, dtype)
        tensor = group.share(mine).copy_(mine) if shared else mine.clone()
        group.reduce(tensor, op, root)
        reduced = tensor.clone()
        group.broadcast(tensor, root)
        return reduced, tensor.clone()

    parts = [values(rank, size, dtype) for rank in range(world)]
    expected = plain(parts, op)
    results = on_shm_ranks(world, body, slot_bytes=SLOT_BYTES)
    for rank, (reduced, everywhere) in enumerate(results):
        assert same(reduced, expected if rank == root else parts[rank])
        assert same(everywhere, expected)


@many
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
    world, whole = len(lengths), sum(lengths)

    def body(group: ShmGroup) -> tuple[Tensor, Tensor]:
        mine = values(group.rank, whole, dtype)
        vector = group.share(mine).copy_(mine) if shared else mine
        parts = list(torch.split_with_sizes(vector, lengths))
        own = parts[group.rank]
        output = own if alias else torch.zeros_like(own)
        group.reduce_scatter(output, parts, op)
        reduced = output.clone()
        group.all_gather(parts, output)
        return reduced, vector.clone()

    expected = plain([values(rank, whole, dtype) for rank in range(world)], op)
    expected_parts = torch.split_with_sizes(expected, lengths)
    results = on_shm_ranks(world, body, slot_bytes=SLOT_BYTES)
    for (reduced, vector), part in zip(results, expected_parts, strict=True):
        assert same(reduced, part)
        assert same(vector, expected)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("op", [ReduceOp.MIN, ReduceOp.MAX])
def test_zeros_of_either_sign_do_not_depend_on_the_way(op: ReduceOp, shared: bool) -> None:
    def body(group: ShmGroup) -> Tensor:
        mine = torch.zeros(5003) * (1.0 if group.rank % 2 else -1.0)
        tensor = group.share(mine).copy_(mine) if shared else mine
        group.all_reduce(tensor, op)
        return tensor.clone()

    parts = [torch.zeros(5003) * (1.0 if rank % 2 else -1.0) for rank in range(3)]
    expected = plain(parts, op)
    assert all(same(t, expected) for t in on_shm_ranks(3, body, slot_bytes=SLOT_BYTES))


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("dtype", HALF)
def test_short_floats_are_added_as_long_ones(dtype: torch.dtype, shared: bool) -> None:
    """2048 + 1 + 1 + 1 stays 2048 in float16 if every sum is rounded; rounded once it is 2052."""
    big = 1 / torch.finfo(dtype).eps * 2
    parts = [big, 1.0, 1.0, 1.0]

    def body(group: ShmGroup) -> Tensor:
        mine = torch.full((1009,), parts[group.rank], dtype=dtype)
        tensor = group.share(mine).copy_(mine) if shared else mine
        group.all_reduce(tensor)
        return tensor.clone()

    rounded = torch.tensor(big, dtype=dtype)
    for part in parts[1:]:
        rounded = rounded + torch.tensor(part, dtype=dtype)
    assert float(rounded) == big
    expected = torch.full((1009,), big + 3.0).to(dtype)
    assert float(expected[0]) > big
    assert all(same(t, expected) for t in on_shm_ranks(4, body, slot_bytes=SLOT_BYTES))


def test_a_tensor_longer_than_many_rounds_of_slots() -> None:
    def body(group: ShmGroup) -> Tensor:
        tensor = values(group.rank, 1_000_003, torch.float32)
        group.all_reduce(tensor)
        return tensor

    expected = plain([values(rank, 1_000_003, torch.float32) for rank in range(3)], ReduceOp.SUM)
    assert all(same(t, expected) for t in on_shm_ranks(3, body, slot_bytes=SLOT_BYTES))


def test_operations_of_all_kinds_may_follow_each_other() -> None:
    """A slot that is used too early shows in the values: ranks run at different speeds."""
    generator = torch.Generator().manual_seed(5)
    plan = [
        (int(kind), int(torch.randint(1, 30_000, (1,), generator=generator)), int(root))
        for kind, root in torch.randint(0, 3, (120, 2), generator=generator).tolist()
    ]

    def body(group: ShmGroup) -> None:
        for kind, size, root in plan:
            tensor = values(group.rank, size, torch.float32)
            if kind == 0:
                group.broadcast(tensor, root)
                expected = values(root, size, torch.float32)
            elif kind == 1:
                group.all_reduce(tensor)
                parts = [values(rank, size, torch.float32) for rank in range(3)]
                expected = plain(parts, ReduceOp.SUM)
            else:
                outputs = [torch.empty(size) for _ in range(3)]
                group.all_gather(outputs, tensor)
                tensor, expected = outputs[root], values(root, size, torch.float32)
            assert same(tensor, expected), (kind, size, root)

    on_shm_ranks(3, body, slot_bytes=SLOT_BYTES, timeout_s=60)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("pieces", [1, 3, 8])
def test_vectors_are_cut_between_cache_lines(size: int, pieces: int) -> None:
    cut = cut_evenly(torch.zeros(size), pieces)
    starts = [piece.storage_offset() for piece in cut if piece.numel()]
    assert len(cut) == pieces and sum(piece.numel() for piece in cut) == size
    assert all(start * torch.int8.itemsize % 64 == 0 for start in starts)


@pytest.mark.parametrize("place", range(4))
def test_a_part_may_be_the_output(place: int) -> None:
    parts = [values(rank, 1009, torch.float32) for rank in range(4)]
    expected = plain(parts, ReduceOp.SUM)
    combine(parts, parts[place], ReduceOp.SUM, Scratch())
    assert same(parts[place], expected)
