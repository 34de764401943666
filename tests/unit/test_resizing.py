"""What comes of wishes for another number of ranks, where all ranks change at the same step."""

from hypothesis import given
from hypothesis import strategies as st

from distplat.platform.resizing import Resizing


def asked(world: int, workers: int) -> Resizing:
    brain = Resizing(world)
    brain.wish(workers)
    for rank in brain.to_make:
        brain.made(rank)
    return brain


def test_without_a_wish_nothing_is_due() -> None:
    brain = Resizing(2)
    assert (brain.to_make, brain.to_drop, brain.due, brain.granted) == ([], [], None, False)


def test_newcomers_are_ready_before_the_number_changes() -> None:
    brain = asked(2, 4)
    assert sorted(brain.newcomers) == [2, 3]
    brain.ready(3)
    assert (brain.to_make, brain.due) == ([], None)
    brain.ready(2)
    due = brain.due
    assert (due, brain.granted) == (4, False)
    brain.resized(4)
    assert (brain.granted, brain.newcomers) == (True, {})
    assert brain.due is None


def test_fewer_are_due_at_once() -> None:
    assert asked(4, 1).due == 1


def test_as_many_as_there_are_is_granted_at_once() -> None:
    brain = asked(3, 3)
    assert (brain.due, brain.granted, brain.to_make) == (None, True, [])


def test_a_later_wish_keeps_who_is_still_wanted() -> None:
    brain = asked(2, 5)
    brain.ready(2)
    brain.wish(3)
    assert (brain.to_make, brain.to_drop, brain.due) == ([], [3, 4], 3)
    brain.wish(1)
    assert (brain.to_drop, brain.due) == ([2, 3, 4], 1)


def test_when_one_cannot_come_all_are_let_go() -> None:
    brain = asked(2, 4)
    brain.ready(2)
    brain.dropped(3)
    brain.give_up()
    assert (brain.to_make, brain.to_drop, brain.due) == ([], [2], None)


def test_when_all_is_made_anew_the_wish_stands() -> None:
    brain = asked(2, 4)
    brain.ready(2)
    brain.begin_anew(2)
    assert (brain.to_make, brain.due) == ([2, 3], None)


STEPS = st.one_of(
    st.tuples(st.just("wish"), st.integers(1, 6)),
    st.tuples(st.sampled_from(["ready", "lost"]), st.integers(0, 6)),
    st.tuples(st.sampled_from(["give_up", "anew", "change"]), st.just(0)),
)


@given(st.integers(1, 4), st.lists(STEPS, max_size=30))
def test_only_who_is_wanted_is_made_and_only_who_is_ready_joins(
    world: int, steps: list[tuple[str, int]]
) -> None:
    """The body does what it is told to; `alive` are the newcomers that it has."""
    brain, alive, ready = Resizing(world), set[int](), set[int]()
    for what, number in steps:
        if what == "wish":
            brain.wish(number)
        elif what == "ready" and number in alive:
            brain.ready(number)
            ready.add(number)
        elif what == "lost" and number in alive:
            brain.dropped(number)
            brain.give_up()
            alive.discard(number)
        elif what == "give_up":
            brain.give_up()
        elif what == "anew":
            brain.begin_anew(brain.world)
            alive.clear()
        elif what == "change" and brain.due is not None:
            joining = range(brain.world, brain.due)
            assert ready.issuperset(joining) and alive.issuperset(joining)
            alive.difference_update(joining)
            brain.resized(brain.due)
        for rank in brain.to_drop:
            brain.dropped(rank)
            alive.discard(rank)
        for rank in brain.to_make:
            assert rank >= brain.world and rank not in alive
            brain.made(rank)
            alive.add(rank)
        ready &= alive
        assert set(brain.newcomers) == alive
        assert alive == set(range(brain.world, brain.wanted or 0))
