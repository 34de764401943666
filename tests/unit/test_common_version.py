"""`CommonVersion`: finds a version that all ranks of a cut model can copy, at any speeds."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distplat.platform.common_version import CommonVersion


@pytest.mark.parametrize(
    ("at_least", "total", "passed", "target"),
    [
        (1, 100, {0: 7, 1: 6}, 8),
        (20, 100, {0: 7, 1: 6}, 20),
        (1, 100, {0: 0, 1: 0}, 1),
        (1, 8, {0: 8, 1: 8}, 8),
        (1, 8, {0: 8, 1: 7}, 8),
    ],
)
def test_first_target_is_one_step_ahead(
    at_least: int, total: int, passed: dict[int, int], target: int
) -> None:
    common = CommonVersion(at_least, total)
    assert not common.observe(passed, set())
    assert common.target == target
    assert common.observe(passed, passed.keys())


def test_target_grows_if_a_rank_passed_it() -> None:
    common = CommonVersion(1, 100)
    targets = []
    for step in range(7, 12):
        common.observe({0: step * 8, 1: 3}, set())
        targets.append(common.target)
    assert targets == [7 * 8 + 1, 8 * 8 + 2, 9 * 8 + 4, 10 * 8 + 8, 11 * 8 + 16 - 4]


def test_rank_with_a_copy_may_advance() -> None:
    common = CommonVersion(1, 100)
    common.observe({0: 7, 1: 6}, set())
    assert not common.observe({0: 50, 1: 7}, {0})
    assert common.target == 8
    assert common.observe({0: 50, 1: 8}, {0, 1})


def test_target_beyond_the_end_is_unreachable() -> None:
    common = CommonVersion(101, 100)
    assert common.is_unreachable and not CommonVersion(100, 100).is_unreachable
    common.observe({0: 100, 1: 100}, set())
    assert common.target == 101, "the target is not reduced to the last version"


class Rank:
    """A rank that makes steps, and copies a requested version when it reaches it."""

    def __init__(self, total: int) -> None:
        self.total, self.steps, self.copied = total, 0, 0
        self.requested: set[int] = set()

    def step(self) -> None:
        self.steps = min(self.total, self.steps + 1)
        if self.steps in self.requested or self.steps == self.total:
            self.copied = self.steps

    def request(self, target: int) -> bool:
        self.requested.add(target)
        return self.copied == target != 0


@given(st.integers(1, 4), st.integers(1, 300), st.data())
def test_ranks_agree_on_one_version(count: int, total: int, data: st.DataObject) -> None:
    """Ranks make up to ten steps between two requests, and are at most one step apart."""
    common, ranks = CommonVersion(1, total), [Rank(total) for _ in range(count)]

    def advance() -> None:
        for _ in range(data.draw(st.integers(0, 10 * count))):
            slowest = min(rank.steps for rank in ranks)
            data.draw(st.sampled_from([r for r in ranks if r.steps == slowest])).step()

    ready: set[int] = set()
    for _ in range(20):
        target, passed = common.target, {}
        for number, rank in enumerate(ranks):
            ready |= {number} if rank.request(target) else set()
            passed[number] = rank.steps
            advance()
        if common.observe(passed, ready):
            assert 0 < target <= total
            assert len(ready) == count
            return
        ready = ready if common.target == target else set()
    for rank in ranks:  # the end of the run is common to all
        while rank.steps < total:
            rank.step()
    for _ in range(2):
        target = common.target
        ready |= {number for number, rank in enumerate(ranks) if rank.request(target)}
        if common.observe(dict.fromkeys(range(count), total), ready):
            return
        ready = ready if common.target == target else set()
    raise AssertionError("no common version")
