"""What comes of requests for another number of ranks, where all ranks change at the same step."""

from hypothesis import given
from hypothesis import strategies as st

from distplat.platform.scaling import Resizing


def asked(world: int, workers: int) -> Resizing:
    resizing = Resizing(world)
    resizing.request(workers)
    for rank in resizing.ranks_to_start:
        resizing.newcomer_started(rank)
    return resizing


def test_without_a_wish_nothing_is_due() -> None:
    resizing = Resizing(2)
    assert (resizing.ranks_to_start, resizing.ranks_to_stop) == ([], [])
    assert (resizing.due, resizing.granted) == (None, False)


def test_newcomers_are_ready_before_the_number_changes() -> None:
    resizing = asked(2, 4)
    assert sorted(resizing.newcomers) == [2, 3]
    resizing.newcomer_ready(3)
    assert (resizing.ranks_to_start, resizing.due) == ([], None)
    resizing.newcomer_ready(2)
    due = resizing.due
    assert (due, resizing.granted) == (4, False)
    resizing.resized(4)
    assert (resizing.granted, resizing.newcomers) == (True, {})
    assert resizing.due is None


def test_fewer_are_due_at_once() -> None:
    assert asked(4, 1).due == 1


def test_as_many_as_there_are_is_granted_at_once() -> None:
    resizing = asked(3, 3)
    assert (resizing.due, resizing.granted, resizing.ranks_to_start) == (None, True, [])


def test_a_later_wish_keeps_who_is_still_wanted() -> None:
    resizing = asked(2, 5)
    resizing.newcomer_ready(2)
    resizing.request(3)
    assert (resizing.ranks_to_start, resizing.ranks_to_stop, resizing.due) == ([], [3, 4], 3)
    resizing.request(1)
    assert (resizing.ranks_to_stop, resizing.due) == ([2, 3, 4], 1)


def test_when_one_cannot_come_all_are_let_go() -> None:
    resizing = asked(2, 4)
    resizing.newcomer_ready(2)
    resizing.newcomer_removed(3)
    resizing.cancel()
    assert (resizing.ranks_to_start, resizing.ranks_to_stop, resizing.due) == ([], [2], None)


def test_when_all_is_made_anew_the_wish_stands() -> None:
    resizing = asked(2, 4)
    resizing.newcomer_ready(2)
    resizing.all_restarted(2)
    assert (resizing.ranks_to_start, resizing.due) == ([2, 3], None)


STEPS = st.one_of(
    st.tuples(st.just("request"), st.integers(1, 6)),
    st.tuples(st.sampled_from(["ready", "lost"]), st.integers(0, 6)),
    st.tuples(st.sampled_from(["give_up", "anew", "change"]), st.just(0)),
)


@given(st.integers(1, 4), st.lists(STEPS, max_size=30))
def test_only_who_is_wanted_is_made_and_only_who_is_ready_joins(
    world: int, steps: list[tuple[str, int]]
) -> None:
    """The body does what it is told to; `alive` are the newcomers that it has."""
    resizing, alive, ready = Resizing(world), set[int](), set[int]()
    for what, number in steps:
        if what == "request":
            resizing.request(number)
        elif what == "ready" and number in alive:
            resizing.newcomer_ready(number)
            ready.add(number)
        elif what == "lost" and number in alive:
            resizing.newcomer_removed(number)
            resizing.cancel()
            alive.discard(number)
        elif what == "give_up":
            resizing.cancel()
        elif what == "anew":
            resizing.all_restarted(resizing.world)
            alive.clear()
        elif what == "change" and resizing.due is not None:
            joining = range(resizing.world, resizing.due)
            assert ready.issuperset(joining) and alive.issuperset(joining)
            alive.difference_update(joining)
            resizing.resized(resizing.due)
        for rank in resizing.ranks_to_stop:
            resizing.newcomer_removed(rank)
            alive.discard(rank)
        for rank in resizing.ranks_to_start:
            assert rank >= resizing.world and rank not in alive
            resizing.newcomer_started(rank)
            alive.add(rank)
        ready &= alive
        assert set(resizing.newcomers) == alive
        assert alive == set(range(resizing.world, resizing.target or 0))
