"""Resizing: requests for another number of ranks, which takes effect at one step for all ranks."""

from hypothesis import given
from hypothesis import strategies as st

from distplat.platform.scaling import Resizing


def requested(world: int, workers: int) -> Resizing:
    resizing = Resizing(world)
    resizing.request(workers)
    for rank in resizing.ranks_to_start:
        resizing.newcomer_started(rank)
    return resizing


def test_no_request_has_no_effect() -> None:
    resizing = Resizing(2)
    assert (resizing.ranks_to_start, resizing.ranks_to_stop) == ([], [])
    assert (resizing.due, resizing.granted) == (None, False)


def test_world_grows_after_all_newcomers_are_ready() -> None:
    resizing = requested(2, 4)
    assert sorted(resizing.newcomers) == [2, 3]
    resizing.newcomer_ready(3)
    assert (resizing.ranks_to_start, resizing.due) == ([], None)
    resizing.newcomer_ready(2)
    due = resizing.due
    assert (due, resizing.granted) == (4, False)
    resizing.resized(4)
    assert (resizing.granted, resizing.newcomers) == (True, {})
    assert resizing.due is None


def test_world_shrinks_at_once() -> None:
    assert requested(4, 1).due == 1


def test_request_for_the_current_world_is_granted_at_once() -> None:
    resizing = requested(3, 3)
    assert (resizing.due, resizing.granted, resizing.ranks_to_start) == (None, True, [])


def test_later_request_keeps_needed_newcomers() -> None:
    resizing = requested(2, 5)
    resizing.newcomer_ready(2)
    resizing.request(3)
    assert (resizing.ranks_to_start, resizing.ranks_to_stop, resizing.due) == ([], [3, 4], 3)
    resizing.request(1)
    assert (resizing.ranks_to_stop, resizing.due) == ([2, 3, 4], 1)


def test_cancel_stops_all_newcomers() -> None:
    resizing = requested(2, 4)
    resizing.newcomer_ready(2)
    resizing.newcomer_removed(3)
    resizing.cancel()
    assert (resizing.ranks_to_start, resizing.ranks_to_stop, resizing.due) == ([], [2], None)


def test_request_survives_a_restart_of_all_ranks() -> None:
    resizing = requested(2, 4)
    resizing.newcomer_ready(2)
    resizing.all_restarted(2)
    assert (resizing.ranks_to_start, resizing.due) == ([2, 3], None)


EVENTS = st.one_of(
    st.tuples(st.just("request"), st.integers(1, 6)),
    st.tuples(st.sampled_from(["ready", "lost"]), st.integers(0, 6)),
    st.tuples(st.sampled_from(["cancel", "restart", "resize"]), st.just(0)),
)


@given(st.integers(1, 4), st.lists(EVENTS, max_size=30))
def test_only_requested_ranks_start_and_only_ready_ranks_join(
    world: int, events: list[tuple[str, int]]
) -> None:
    """The loop plays the controller; `alive` are the started newcomers."""
    resizing, alive, ready = Resizing(world), set[int](), set[int]()
    for event, number in events:
        if event == "request":
            resizing.request(number)
        elif event == "ready" and number in alive:
            resizing.newcomer_ready(number)
            ready.add(number)
        elif event == "lost" and number in alive:
            resizing.newcomer_removed(number)
            resizing.cancel()
            alive.discard(number)
        elif event == "cancel":
            resizing.cancel()
        elif event == "restart":
            resizing.all_restarted(resizing.world)
            alive.clear()
        elif event == "resize" and resizing.due is not None:
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
