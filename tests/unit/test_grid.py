"""The grid of ranks: positions, groups and parts."""

from hypothesis import given
from hypothesis import strategies as st

from distplat.platform.recovery import Policy
from distplat.platform.topology import Grid, Position

grids = st.builds(Grid, st.integers(1, 5), st.integers(1, 4), st.integers(1, 5))


def test_example_of_the_documentation() -> None:
    grid = Grid(stages=2, slices=2, replicas=2)
    assert [grid.group(replica) for replica in range(2)] == [(0, 1, 2, 3), (4, 5, 6, 7)]
    assert grid.position(6) == Position(replica=1, stage=1, slice=0)
    assert grid.dp_ranks(1, 0) == (2, 6)
    assert grid.slices_of(1, 0) == (4, 5)
    assert grid.parts() == ((0, 4), (1, 5), (2, 6), (3, 7))


@given(grids)
def test_every_rank_has_one_position(grid: Grid) -> None:
    ranks = range(grid.world)
    assert [grid.rank(grid.position(rank)) for rank in ranks] == [*ranks]
    assert sorted(rank for peers in grid.parts() for rank in peers) == [*ranks]
    assert sorted(rank for r in range(grid.replicas) for rank in grid.group(r)) == [*ranks]
    for rank in ranks:
        position = grid.position(rank)
        assert rank in grid.dp_ranks(position.stage, position.slice)
        assert rank in grid.slices_of(position.replica, position.stage)
        assert rank in grid.group(position.replica)


@given(grids, st.data())
def test_run_continues_while_every_part_has_a_rank(grid: Grid, data: st.DataObject) -> None:
    remaining = data.draw(st.sets(st.integers(0, grid.world - 1)))
    parts = {(grid.position(rank).stage, grid.position(rank).slice) for rank in remaining}
    complete = len(parts) == grid.group_size
    assert Policy(holders=grid.parts()).has_all(remaining) == complete


def test_without_parts_one_rank_is_enough() -> None:
    assert Policy().has_all({3}) and not Policy().has_all(set())
