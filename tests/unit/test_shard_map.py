"""Shards: complete, and balanced by number of elements or by speed."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distplat.platform.shard_map import EQUAL_SPEED_RATIO, Shard, ShardMap, cut_shards


@given(st.integers(0, 100_000), st.integers(1, 64))
def test_map_is_complete_and_balanced(total: int, servers: int) -> None:
    shard_map = cut_shards(total, servers)
    assert shard_map.total == total
    assert [shard.index for shard in shard_map.shards] == list(range(servers))
    covered = [i for shard in shard_map.shards for i in (shard.start, shard.stop)]
    assert covered == sorted(covered) and covered[0] == 0 and covered[-1] == total
    assert sum(shard.size for shard in shard_map.shards) == total
    sizes = [shard.size for shard in shard_map.shards]
    assert max(sizes) - min(sizes) < 32


@pytest.mark.parametrize(
    ("total", "servers", "sizes"),
    [
        (1, 3, [1, 0, 0]),
        (5, 3, [2, 2, 1]),
        (47, 3, [16, 16, 15]),
        (48, 3, [16, 16, 16]),
        (160, 3, [64, 48, 48]),
        (100, 1, [100]),
    ],
)
def test_small_models(total: int, servers: int, sizes: list[int]) -> None:
    assert [shard.size for shard in cut_shards(total, servers).shards] == sizes


def test_large_tensor_is_split() -> None:
    """A large embedding must not overload one server."""
    sizes = [shard.size for shard in cut_shards(10_000_000 + 33, 4).shards]
    assert max(sizes) - min(sizes) < 32


@given(st.integers(64, 5000), st.integers(1, 4))
def test_inner_bounds_are_cache_aligned(total: int, servers: int) -> None:
    assert all(shard.start % 16 == 0 for shard in cut_shards(total, servers).shards)


SPEEDS = st.lists(st.floats(1e3, 1e9), min_size=1, max_size=12)


@given(st.integers(0, 100_000), SPEEDS)
def test_map_by_speed_is_complete_and_proportional(total: int, speeds: list[float]) -> None:
    shards = cut_shards(total, len(speeds), speeds=speeds).shards
    covered = [i for shard in shards for i in (shard.start, shard.stop)]
    assert covered == sorted(covered) and covered[0] == 0 and covered[-1] == total
    assert all(a.stop == b.start for a, b in pairwise(shards))
    if total >= 16 * len(speeds):
        assert all(shard.start % 16 == 0 or shard.start == total for shard in shards)
    if max(speeds) > EQUAL_SPEED_RATIO * min(speeds):
        expected = [total * speed / sum(speeds) for speed in speeds]
        assert all(abs(s.size - w) <= 32 for s, w in zip(shards, expected, strict=True))


@given(st.integers(0, 100_000), st.floats(1e3, 1e9), st.lists(st.floats(1.0, 1.2), max_size=8))
def test_servers_of_similar_speed_get_equal_shards(
    total: int, speed: float, factors: list[float]
) -> None:
    speeds = [speed, *(speed * factor for factor in factors)]
    assert cut_shards(total, len(speeds), speeds=speeds) == cut_shards(total, len(speeds))


def test_server_of_half_speed_gets_half_the_elements() -> None:
    sizes = [s.size for s in cut_shards(30_000, 3, speeds=(2e8, 1e8, 2e8)).shards]
    assert sizes == [12_000, 6_000, 12_000]


def test_single_server_has_all_elements() -> None:
    assert cut_shards(3, 1) == ShardMap(1, 3, (Shard(0, 0, 3),))
