"""Ring all-reduce: schedules, sums on every rank, and traffic."""

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
def test_schedule_of_three_ranks(rank: int) -> None:
    r = rank
    assert list(reduce_scatter_steps(rank, 3)) == [
        (r % 3, (r - 1) % 3),
        ((r - 1) % 3, (r - 2) % 3),
    ]
    assert list(all_gather_steps(rank, 3)) == [((r + 1) % 3, r % 3), (r % 3, (r - 1) % 3)]


def test_schedule_of_one_rank_is_empty() -> None:
    assert list(reduce_scatter_steps(0, 1)) == list(all_gather_steps(0, 1)) == []


@given(st.integers(2, 12))
def test_rank_receives_the_chunks_of_its_left_neighbour(world: int) -> None:
    for steps in (reduce_scatter_steps, all_gather_steps):
        for rank in range(world):
            arriving = [recv for _, recv in steps(rank, world)]
            leaving = [send for send, _ in steps((rank - 1) % world, world)]
            assert arriving == leaving
            assert len(arriving) == world - 1


@given(st.integers(2, 12))
def test_reduce_scatter_completes_chunk_r_plus_1_on_rank_r(world: int) -> None:
    summands = [[{rank} for _ in range(world)] for rank in range(world)]  # [rank][chunk] -> ranks
    for moves in zip(*(reduce_scatter_steps(rank, world) for rank in range(world)), strict=True):
        sent = [set(summands[rank][send]) for rank, (send, _) in enumerate(moves)]
        for rank, (_, recv) in enumerate(moves):
            assert summands[rank][recv].isdisjoint(sent[rank - 1])  # no gradient is added twice
            summands[rank][recv] |= sent[rank - 1]
    for rank in range(world):
        assert summands[rank][(rank + 1) % world] == set(range(world))


def ring_all_reduce(vector: torch.Tensor, group: Collective) -> int:
    """All-reduce in place by the schedules; return the bytes that this rank sent."""
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
def test_every_rank_gets_the_sum_with_the_expected_traffic(world: int, size: int) -> None:
    parts = [torch.arange(size, dtype=torch.float32) * (rank + 1) - rank for rank in range(world)]
    expected = torch.stack(parts).sum(0)  # integers: exact in any order
    fabric = Fabric(world)

    def body(rank: int) -> tuple[torch.Tensor, int]:
        vector = parts[rank].clone()
        return vector, ring_all_reduce(vector, fabric.collective(rank))

    results = on_ranks(world, body)
    chunks = [4 * (stop - start) for start, stop in split_evenly(size, world)]
    for rank, (vector, sent_bytes) in enumerate(results):
        assert torch.equal(vector, expected)
        # Each phase sends all chunks except one: 2 (N-1) of N.
        not_sent = (
            chunks[(rank + 1) % world] + chunks[(rank + 2) % world] if world > 1 else 8 * size
        )
        assert sent_bytes == 8 * size - not_sent
    if size % world == 0:
        assert {sent for _, sent in results} == {2 * (world - 1) * 4 * size // world}


def test_all_reduce_keeps_the_dtype() -> None:
    fabric = Fabric(3)

    def body(rank: int) -> torch.Tensor:
        vector = torch.full((7,), rank + 1, dtype=torch.int64)
        ring_all_reduce(vector, fabric.collective(rank))
        return vector

    for vector in on_ranks(3, body):
        assert torch.equal(vector, torch.full((7,), 6))
