"""Index, rows and initial values of an embedding table, compared with dicts and arrays."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jobs import job_of

from distplat.platform.shard_map import TablePlan, TableSpec, plan_of
from distplat.strategies.algorithms.seeds import mix
from distplat.strategies.sparse.routing import route, server_of
from distplat.strategies.sparse.rows import (
    MOST_BY_ARRAY,
    ArrayIndex,
    HashIndex,
    RowIndex,
    Rows,
    build_index,
    initial_rows,
)

SPEC = TableSpec("users", 1000, 8, 1.0)


def plan(servers: int, partition: str = "hash") -> TablePlan:
    optimizer = {"name": "SGD", "lr": 0.1}
    tables = {"servers": servers, "partition": partition, "optimizer": optimizer}
    job = job_of(embeddings=tables, steps=1)
    return plan_of(job, "run", 0, (SPEC,), 1, rewinds=False)


IDS = st.integers(0, 2**62) | st.integers(0, 50)


SMALL_IDS = st.integers(0, 99)


@given(st.lists(st.lists(SMALL_IDS, unique=True, max_size=40), max_size=8))
def test_array_index_matches_a_dict(batches: list[list[int]]) -> None:
    check_against_a_dict(ArrayIndex(100), batches, (7, 99))


@given(st.lists(st.lists(IDS, unique=True, max_size=40), max_size=8))
def test_hash_index_matches_a_dict(batches: list[list[int]]) -> None:
    check_against_a_dict(HashIndex(), batches, (7, 2**61))


def check_against_a_dict(
    index: RowIndex, batches: list[list[int]], missing: tuple[int, ...]
) -> None:
    model = dict[int, int]()
    for batch in batches:
        new = [i for i in batch if i not in model]
        slots = index.add(np.array(new, np.int64))
        model |= dict(zip(new, slots.tolist(), strict=True))
        queries = np.array([*batch, *missing], np.int64)
        assert index.find(queries).tolist() == [model.get(int(i), -1) for i in queries]
    assert index.ids.tolist() == list(model)
    assert sorted(model.values()) == list(range(len(index)))


@pytest.mark.parametrize("rows", [None, 80_000, MOST_BY_ARRAY + 1])
def test_index_grows_and_keeps_its_ids(rows: int | None) -> None:
    index, ids = build_index(rows), np.random.default_rng(0).permutation(40_000)
    for part in np.array_split(ids, 17):
        index.add(part)
    assert index.find(ids).tolist() == list(range(40_000))
    assert (index.find(ids + 40_000) == -1).all()


def test_array_index_rejects_an_id_beyond_its_end() -> None:
    with pytest.raises(IndexError):
        ArrayIndex(10).find(np.array([10]))


def test_build_index_hashes_large_or_unbounded_tables() -> None:
    assert isinstance(build_index(MOST_BY_ARRAY), ArrayIndex)
    assert isinstance(build_index(MOST_BY_ARRAY + 1), HashIndex)
    assert isinstance(build_index(None), HashIndex)


def test_hash_index_resolves_collisions() -> None:
    """All ids have the same slot in the smallest table."""
    ids = np.arange(200_000, dtype=np.int64)
    colliding = ids[(mix(ids.astype(np.uint64)) & np.uint64(1023)) == 5][:150]
    index = HashIndex()
    index.add(colliding)
    assert index.find(colliding[::-1]).tolist() == list(range(150))[::-1]


@pytest.mark.parametrize("width", [1, 3, 64, 5000])
def test_rows_grow_in_place(width: int) -> None:
    rows = Rows(width, fill=0.5)
    for count in (0, 1, 7, 8, 1000):
        before = len(rows.array)
        rows.grow(count)
        assert rows.array.shape == (count, width)
        assert (rows.array[before:] == 0.5).all()
        rows.array[before:] = np.arange(before, count)[:, None]
    assert (rows.array == np.arange(1000)[:, None]).all()


def test_initial_rows_depend_on_seed_table_and_id() -> None:
    ids = np.arange(1000)
    rows = initial_rows(SPEC, 3, ids)
    shuffled = np.random.default_rng(0).permutation(1000)
    assert np.array_equal(initial_rows(SPEC, 3, ids[shuffled]), rows[shuffled])
    assert np.array_equal(initial_rows(SPEC, 3, np.array([17])), rows[17:18])
    other = TableSpec("items", 1000, 8, 1.0)
    for different in (initial_rows(SPEC, 4, ids), initial_rows(other, 3, ids)):
        assert (different == rows).mean() < 1e-3
    assert len(np.unique(rows)) > 7500  # neither rows nor columns repeat


def test_initial_rows_are_normally_distributed() -> None:
    rows = initial_rows(TableSpec("t", None, 50, 0.1), 0, np.arange(20_000))
    assert abs(rows.mean()) < 1e-3
    assert abs(rows.std() - 0.1) < 1e-3
    assert abs(rows).max() < 0.35
    within_one_sigma = (abs(rows) < 0.1).mean()
    assert 0.66 < within_one_sigma < 0.70  # 0.683 of a normal distribution
    correlations = np.corrcoef(rows[:, :10].T) - np.eye(10)
    assert abs(correlations).max() < 0.03
    assert (initial_rows(TableSpec("t", None, 4, 0.0), 0, np.arange(3)) == 0).all()


def test_initial_rows_are_stable() -> None:
    """Checkpoints omit untouched rows, so another formula would change saved tables."""
    rows = initial_rows(TableSpec("users", None, 3, 1.0), 7, np.array([0, 2**62]))
    assert rows.tobytes().hex() == PINNED


PINNED = "aee351bf4951a1bf1ae080bd7347503c353fb8bd0deb2fbf"


@given(st.lists(IDS, unique=True), st.integers(1, 5))
def test_route_sends_each_id_to_its_server(ids: list[int], servers: int) -> None:
    queries = np.array(ids, np.int64)
    routed, order = route(plan(servers), SPEC, queries)
    assert np.array_equal(routed.ids, queries if order is None else queries[order])
    assert (routed.cuts[0], routed.cuts[-1]) == (0, len(ids))
    for server in range(servers):
        part = routed.ids[routed.part(server)]
        assert servers == 1 or (server_of(plan(servers), SPEC, part) == server).all()


@pytest.mark.parametrize("partition", ["hash", "range"])
@pytest.mark.parametrize("servers", [1, 2, 3, 7])
def test_servers_get_even_parts(partition: str, servers: int) -> None:
    counts = np.bincount(server_of(plan(servers, partition), SPEC, np.arange(1000)))
    assert len(counts) == servers
    assert counts.sum() == 1000
    assert counts.max() < 1.35 * 1000 / servers


def test_index_of_a_server_is_filled_evenly() -> None:
    """The ids of a server must not share the bits that select the slot."""
    ids = np.arange(100_000)
    server_ids = ids[server_of(plan(4), SPEC, ids) == 0]
    slots = mix(server_ids.astype(np.uint64)) & np.uint64(63)
    assert np.bincount(slots.astype(np.int64), minlength=64).min() > 300
