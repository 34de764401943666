"""Which version all ranks of a cut model are asked for, whatever their speeds."""

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
def test_the_first_question_looks_one_step_ahead(
    at_least: int, total: int, passed: dict[int, int], target: int
) -> None:
    meeting = CommonVersion(at_least, total)
    assert not meeting.observe(passed, set())
    assert meeting.target == target
    assert meeting.observe(passed, passed.keys())


def test_who_was_too_quick_is_asked_for_more() -> None:
    meeting = CommonVersion(1, 100)
    targets = []
    for step in range(7, 12):
        meeting.observe({0: step * 8, 1: 3}, set())
        targets.append(meeting.target)
    assert targets == [7 * 8 + 1, 8 * 8 + 2, 9 * 8 + 4, 10 * 8 + 8, 11 * 8 + 16 - 4]


def test_who_has_its_part_may_go_on() -> None:
    meeting = CommonVersion(1, 100)
    meeting.observe({0: 7, 1: 6}, set())
    assert not meeting.observe({0: 50, 1: 7}, {0})
    assert meeting.target == 8
    assert meeting.observe({0: 50, 1: 8}, {0, 1})


def test_what_no_run_of_this_length_comes_to() -> None:
    meeting = CommonVersion(101, 100)
    assert meeting.is_unreachable and not CommonVersion(100, 100).is_unreachable
    meeting.observe({0: 100, 1: 100}, set())
    assert meeting.target == 101, "not the last one: who asks has that"


class Rank:
    """Makes steps, and copies what it is asked for when it comes by."""

    def __init__(self, total: int) -> None:
        self.total, self.steps, self.copied = total, 0, 0
        self.wanted: set[int] = set()

    def step(self) -> None:
        self.steps = min(self.total, self.steps + 1)
        if self.steps in self.wanted or self.steps == self.total:
            self.copied = self.steps

    def ask(self, target: int) -> bool:
        self.wanted.add(target)
        return self.copied == target != 0


@given(st.integers(1, 4), st.integers(1, 300), st.data())
def test_ranks_that_are_asked_at_any_moment_come_to_one_version(
    count: int, total: int, data: st.DataObject
) -> None:
    """They make up to ten steps between two questions; none is more than one ahead of another."""
    meeting, ranks = CommonVersion(1, total), [Rank(total) for _ in range(count)]

    def advance() -> None:
        for _ in range(data.draw(st.integers(0, 10 * count))):
            slowest = min(rank.steps for rank in ranks)
            data.draw(st.sampled_from([r for r in ranks if r.steps == slowest])).step()

    held: set[int] = set()
    for _ in range(20):
        target, passed = meeting.target, {}
        for number, rank in enumerate(ranks):
            held |= {number} if rank.ask(target) else set()
            passed[number] = rank.steps
            advance()
        if meeting.observe(passed, held):
            assert 0 < target <= total
            assert len(held) == count
            return
        held = held if meeting.target == target else set()
    for rank in ranks:  # at the latest at the end of the run
        while rank.steps < total:
            rank.step()
    for _ in range(2):
        target = meeting.target
        held |= {number for number, rank in enumerate(ranks) if rank.ask(target)}
        if meeting.observe(dict.fromkeys(range(count), total), held):
            return
        held = held if meeting.target == target else set()
    raise AssertionError("no version in common")
