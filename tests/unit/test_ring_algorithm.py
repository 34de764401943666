"""Ring all-reduce: the table of its docstring, sums on every rank, and what it costs."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rank_threads import UNSHRUNK, on_ranks

from distplat.platform.even_split import split_evenly
from distplat.strategies.algorithms.reduce import all_gather_steps, reduce_scatter_steps
from distplat.strategies.collective import Collective
from distplat.strategies.fakes import Fabric


@pytest.mark.parametrize("rank", range(3))
def test_the_table_for_three_ranks(rank: int) -> None:
    r = rank
    assert list(reduce_scatter_steps(rank, 3)) == [
        (r % 3, (r - 1) % 3),
        ((r - 1) % 3, (r - 2) % 3),
    ]
    assert list(all_gather_steps(rank, 3)) == [((r + 1) % 3, r % 3), (r % 3, (r - 1) % 3)]


def test_alone_there_is_nothing_to_do() -> None:
    assert list(reduce_scatter_steps(0, 1)) == list(all_gather_steps(0, 1)) == []


@given(st.integers(2, 12))
def test_what_a_rank_receives_is_what_its_left_neighbour_sends(world: int) -> None:
    for steps in (reduce_scatter_steps, all_gather_steps):
        for rank in range(world):
            arriving = [recv for _, recv in steps(rank, world)]
            leaving = [send for send, _ in steps((rank - 1) % world, world)]
            assert arriving == leaving
            assert len(arriving) == world - 1


@given(st.integers(2, 12))
def test_after_the_first_half_rank_r_has_chunk_r_plus_1_complete(world: int) -> None:
    have = [[{rank} for _ in range(world)] for rank in range(world)]  # rank, chunk -> summands
    for moves in zip(*(reduce_scatter_steps(rank, world) for rank in range(world)), strict=True):
        sent = [set(have[rank][send]) for rank, (send, _) in enumerate(moves)]
        for rank, (_, recv) in enumerate(moves):
            assert have[rank][recv].isdisjoint(sent[rank - 1])  # nothing is added twice
            have[rank][recv] |= sent[rank - 1]
    for rank in range(world):
        assert have[rank][(rank + 1) % world] == set(range(world))


def ring_all_reduce(vector: torch.Tensor, group: Collective) -> int:
    """Sum in place as the tables say; give the bytes that this rank sent."""
    rank, world = group.rank, group.world
    chunks = [vector[a:b] for a, b in split_evenly(vector.numel(), world)]
    left, right = (rank - 1) % world, (rank + 1) % world
    sent_bytes = 0
    for send, recv in reduce_scatter_steps(rank, world):
        group.send(chunks[send], right)
        arriving = torch.empty_like(chunks[recv])
        group.recv(arriving, left)
        chunks[recv].add_(arriving)
        sent_bytes += chunks[send].nbytes
    for send, recv in all_gather_steps(rank, world):
        group.send(chunks[send], right)
        group.recv(chunks[recv], left)
        sent_bytes += chunks[send].nbytes
    return sent_bytes


@settings(max_examples=60, deadline=None, phases=UNSHRUNK)
@given(st.integers(1, 9), st.integers(0, 50))
def test_every_rank_gets_the_sum_for_the_price_of_the_table(world: int, size: int) -> None:
    parts = [torch.arange(size, dtype=torch.float32) * (rank + 1) - rank for rank in range(world)]
    expected = torch.stack(parts).sum(0)  # whole numbers: exact in any order
    fabric = Fabric(world)

    def body(rank: int) -> tuple[torch.Tensor, int]:
        vector = parts[rank].clone()
        return vector, ring_all_reduce(vector, fabric.collective(rank))

    results = on_ranks(world, body)
    chunks = [4 * (stop - start) for start, stop in split_evenly(size, world)]
    for rank, (vector, sent_bytes) in enumerate(results):
        assert torch.equal(vector, expected)
        # All chunks but one in each half: 2 (N-1) of N.
        kept = chunks[(rank + 1) % world] + chunks[(rank + 2) % world] if world > 1 else 8 * size
        assert sent_bytes == 8 * size - kept
    if size % world == 0:
        assert {sent for _, sent in results} == {2 * (world - 1) * 4 * size // world}


def test_the_dtype_is_kept() -> None:
    fabric = Fabric(3)

    def body(rank: int) -> torch.Tensor:
        vector = torch.full((7,), rank + 1, dtype=torch.int64)
        ring_all_reduce(vector, fabric.collective(rank))
        return vector

    for vector in on_ranks(3, body):
        assert torch.equal(vector, torch.full((7,), 6))
