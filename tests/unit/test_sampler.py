"""Samples of each rank: disjoint, complete, independent of the world and of earlier calls."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from distplat.platform.sampler import Sampler

sizes, batches, worlds, parts = (
    st.integers(1, 200),
    st.integers(1, 40),
    st.integers(1, 9),
    st.integers(1, 6),
)


def make_sampler(size: int, batch: int, world: int = 1, drop_last: bool = False) -> Sampler:
    return Sampler(size, batch, world, seed=7, drop_last=drop_last)


@given(sizes, batches, worlds, parts, st.booleans())
def test_epoch_is_disjoint_and_complete(
    size: int, batch: int, world: int, parts: int, drop_last: bool
) -> None:
    assume(not drop_last or size >= batch)
    sampler = make_sampler(size, batch, world, drop_last)
    seen = [
        int(i)
        for step in range(sampler.steps_per_epoch)
        for rank in range(world)
        for micro in sampler.micro_batches(step, rank, parts)
        for i in micro
    ]
    left_out = size % batch if drop_last else 0
    assert len(seen) == len(set(seen)) == size - left_out
    assert set(seen) <= set(range(size))


@given(sizes, batches, worlds, st.integers(0, 50))
def test_union_of_ranks_is_independent_of_world(
    size: int, batch: int, world: int, step: int
) -> None:
    single, parallel = make_sampler(size, batch), make_sampler(size, batch, world)
    ranks = np.concatenate([parallel.rank_ids(step, rank) for rank in range(world)])
    np.testing.assert_array_equal(ranks, single.batch_ids(step))
    assert len(ranks) == single.batch_size(step)


@given(sizes, batches, worlds, st.booleans(), st.integers(0, 50))
def test_first_position_is_index_in_epoch_order(
    size: int, batch: int, world: int, drop_last: bool, step: int
) -> None:
    assume(not drop_last or size >= batch)
    sampler = make_sampler(size, batch, world, drop_last)
    first = step - step % sampler.steps_per_epoch
    steps = range(first, first + sampler.steps_per_epoch)
    order = [int(i) for other in steps for i in sampler.batch_ids(other)]
    for rank in range(world):
        ids, position = sampler.rank_ids(step, rank), sampler.first_position(step, rank)
        assert order[position : position + len(ids)] == ids.tolist()


@given(sizes, batches, worlds, parts, st.integers(0, 50))
def test_parts_are_even_and_micro_batches_are_not_empty(
    size: int, batch: int, world: int, parts: int, step: int
) -> None:
    sampler = make_sampler(size, batch, world)
    shares = [len(sampler.rank_ids(step, rank)) for rank in range(world)]
    assert max(shares) - min(shares) <= 1
    for rank in range(world):
        micro = [len(ids) for ids in sampler.micro_batches(step, rank, parts)]
        assert len(micro) == min(parts, shares[rank])
        assert sum(micro) == shares[rank]
        assert not micro or max(micro) - min(micro) <= 1 <= min(micro)


@pytest.mark.parametrize(
    ("size", "drop_last", "steps", "last"),
    [(40, False, 5, 8), (40, True, 5, 8), (37, False, 5, 5), (37, True, 4, 8), (3, False, 1, 3)],
)
def test_last_batch_of_epoch(size: int, drop_last: bool, steps: int, last: int) -> None:
    sampler = make_sampler(size, 8, drop_last=drop_last)
    assert sampler.steps_per_epoch == steps
    assert sampler.batch_size(steps - 1) == len(sampler.batch_ids(steps - 1)) == last
    assert sampler.batch_size(steps) == len(sampler.batch_ids(steps)) == min(8, size)
    assert [sampler.epoch_of(s) for s in (0, steps - 1, steps, 2 * steps)] == [0, 0, 1, 2]


@pytest.mark.parametrize(("size", "drop_last"), [(0, False), (0, True), (7, True)])
def test_rejects_too_few_samples_for_one_batch(size: int, drop_last: bool) -> None:
    with pytest.raises(ValueError, match=rf"has {size} samples: no batch of 8 fits"):
        make_sampler(size, 8, drop_last=drop_last)


def order(seed: int, epoch: int, shuffle: bool = True) -> list[int]:
    sampler = Sampler(20, 20, 1, seed, shuffle)
    return [int(i) for i in sampler.batch_ids(epoch)]


def test_order_changes_with_epoch_and_seed() -> None:
    orders = [order(seed, epoch) for seed in range(3) for epoch in range(3)]
    assert len({tuple(o) for o in orders}) == 9
    assert all(sorted(o) == list(range(20)) for o in orders)


def test_without_shuffle_every_epoch_is_in_order() -> None:
    assert order(0, 0, False) == order(1, 3, False) == list(range(20))


GOLDEN = "[0, 8, 5, 1, 7, 3, 4, 6, 2, 9]"
"""numpy guarantees the stream of Philox but not that of `permutation`. If this test fails, runs
are not reproducible across the two numpy versions: document it."""

SCRIPT = """
from distplat.platform.sampler import Sampler
print(Sampler(10, 10, 1, 3).batch_ids(2).tolist())
"""


def test_order_matches_golden_value() -> None:
    assert str(Sampler(10, 10, 1, 3).batch_ids(2).tolist()) == GOLDEN


def test_order_is_the_same_in_a_new_process() -> None:
    process = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True
    )
    assert process.stdout.strip() == GOLDEN


@given(st.lists(st.integers(0, 30), min_size=1, max_size=12))
def test_rank_ids_do_not_depend_on_earlier_calls(steps: list[int]) -> None:
    sampler = make_sampler(23, 5, 2)
    for step in steps:
        np.testing.assert_array_equal(
            sampler.rank_ids(step, 1), make_sampler(23, 5, 2).rank_ids(step, 1)
        )
    np.testing.assert_array_equal(sampler.batch_ids(0), make_sampler(23, 5).batch_ids(0))


def test_batch_ids_are_read_only() -> None:
    with pytest.raises(ValueError, match="read-only"):
        make_sampler(10, 5).batch_ids(0)[0] = 99


def test_more_parts_than_samples_need_no_memory() -> None:
    """`gradient_accumulation` may be any number."""
    sampler = Sampler(37, 8, 2, 0)
    found = sampler.micro_batches(0, 0, 4_000_000_000)
    assert [len(ids) for ids in found] == [1, 1, 1, 1]
    assert Sampler(9, 8, 8, 0).micro_batches(1, 5, 3) == [], "the batch has one sample"
