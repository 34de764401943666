"""Schedules on paper: no deadlock with little room, messages in order, and times that are known."""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from drawn_schedules import action, schedules
from hypothesis import given, settings
from hypothesis import strategies as st

from distplat.strategies.algorithms.pipeline_schedule import (
    NAMES,
    Action,
    ActionKind,
    Content,
    Message,
    PipelineSchedule,
    Plan,
    Recv,
    Send,
    Step,
    build,
    gpipe,
    input_of,
    interleaved,
    one_f_one_b,
    output_of,
    with_communication,
    zero_bubble_h1,
)
from distplat.strategies.algorithms.simulate import Costs, Deadlock, Span, bubble, simulate

DURATIONS = st.floats(0, 4, allow_subnormal=False)
COSTS = st.builds(Costs, DURATIONS, DURATIONS, DURATIONS, DURATIONS)


def by_hand(rows: list[str], chunks: int = 1) -> PipelineSchedule:
    orders = tuple(tuple(map(action, row.split())) for row in rows)
    micro_batches = 1 + max(one.micro_batch for order in orders for one in order)
    return PipelineSchedule("by hand", micro_batches, chunks, False, orders)


BREADTH_FIRST = by_hand(
    [" ".join(f"F{i}{chunk}" for chunk in ("", "'") for i in range(8))] * 2, chunks=2
)
"""Stage 1 could send eight messages back before stage 0 wants the first."""


@pytest.mark.sweep(4)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("stages", range(1, 9))
def test_every_size_runs_with_little_room(name: str, stages: int) -> None:
    """Stages 1..8 and micro-batches 1..32, all of them."""
    for micro_batches in range(1, 33):
        if name == "interleaved" and micro_batches % stages:
            continue
        plan = with_communication(build(name, stages, micro_batches))
        for buffer in (1, 2):
            simulate(plan, Costs(1, 1.5, 1, 0.3), buffer)


@settings(deadline=None)
@given(schedules(), st.sampled_from([1, 2]), st.data())
def test_no_schedule_stands_still(
    schedule: PipelineSchedule, buffer: int, data: st.DataObject
) -> None:
    costs = data.draw(st.lists(COSTS, min_size=schedule.stages, max_size=schedule.stages))
    plan = with_communication(schedule)
    spans = simulate(plan, costs, buffer).spans
    assert [[span.action for span in row] for row in spans] == [list(o) for o in schedule.actions]
    ends = {
        output_of(schedule, stage, span.action): span.end
        for stage, row in enumerate(spans)
        for span in row
    }
    for stage, row in enumerate(spans):
        for before, after in pairwise(row):
            assert before.end <= after.start
        for span in row:
            needed = input_of(schedule, stage, span.action)
            assert needed is None or ends[needed] <= span.start


@settings(deadline=None)
@given(schedules())
def test_messages_are_received_in_the_order_in_which_they_are_sent(
    schedule: PipelineSchedule,
) -> None:
    plan = with_communication(schedule)
    for source in range(schedule.stages):
        for target in range(schedule.stages):
            sent = [s.message for s in plan.steps[source] if isinstance(s, Send) and s.to == target]
            received = [
                r.message for r in plan.steps[target] if isinstance(r, Recv) and r.source == source
            ]
            assert sent == received
            assert source != target or not sent
    hops = 2 * (schedule.depth - 1) if schedule.stages > 1 else 0
    sends = sum(isinstance(step, Send) for steps in plan.steps for step in steps)
    assert sends == hops * schedule.micro_batches


@settings(deadline=None)
@given(schedules())
def test_the_actions_stay_and_a_send_follows_what_made_it(schedule: PipelineSchedule) -> None:
    plan = with_communication(schedule)
    for stage, steps in enumerate(plan.steps):
        assert tuple(s for s in steps if isinstance(s, Action)) == schedule.actions[stage]
        own = [step for step in steps if not isinstance(step, Recv)]
        for before, after in pairwise(own):
            if isinstance(after, Send):
                assert isinstance(before, Action)
                assert output_of(schedule, stage, before) == after.message


def peak_kept(plan: Plan) -> int:
    """Give how many received messages a stage keeps at once, at most."""
    peak = 0
    for stage, steps in enumerate(plan.steps):
        kept: set[Message] = set()
        for step in steps:
            if isinstance(step, Recv):
                kept.add(step.message)
                peak = max(peak, len(kept))
            elif isinstance(step, Action):
                kept -= {input_of(plan.schedule, stage, step)}
    return peak


@settings(deadline=None, max_examples=40)
@given(schedules(max_micro_batches=16))
def test_room_for_one_message_costs_no_time_where_stages_are_equal(
    schedule: PipelineSchedule,
) -> None:
    plan = with_communication(schedule)
    assert simulate(plan, buffer=1).makespan == pytest.approx(simulate(plan).makespan)
    assert peak_kept(plan) <= 1  # nothing had to be received before its time


def test_the_messages_of_two_stages() -> None:
    """The drawing of the module."""
    steps = with_communication(by_hand(["F0 F1 B0 B1", "F0 B0 F1 B1"])).steps
    assert [_short(step) for step in steps[0]] == "F0 s:a0 F1 s:a1 r:g0 B0 r:g1 B1".split()
    assert [_short(step) for step in steps[1]] == "r:a0 F0 B0 s:g0 r:a1 F1 B1 s:g1".split()


def _short(step: Step) -> str:
    if isinstance(step, Action):
        return str(step)
    way = "s" if isinstance(step, Send) else "r"
    return f"{way}:{step.message.content[0]}{step.message.micro_batch}"


@pytest.mark.parametrize("buffer", [1, 2, None])
def test_a_message_that_is_in_the_way_is_received_early(buffer: int | None) -> None:
    plan = with_communication(BREADTH_FIRST)
    assert peak_kept(plan) > 1
    simulate(plan, Costs(send=0.5), buffer)


def test_received_only_when_needed_the_same_schedule_would_stand_still() -> None:
    plan = with_communication(BREADTH_FIRST)
    with pytest.raises(Deadlock, match=r"stage 0 waits for space .*stage 1 waits for space"):
        simulate(_lazy(plan), buffer=1)
    simulate(_lazy(plan), buffer=8)


def _lazy(plan: Plan) -> Plan:
    """Move every receive to right before its use."""
    rows = []
    for stage, steps in enumerate(plan.steps):
        receives = {step.message: step for step in steps if isinstance(step, Recv)}
        row: list[Step] = []
        for step in steps:
            if isinstance(step, Action):
                needed = input_of(plan.schedule, stage, step)
                row += [receives[needed]] if needed in receives else []
            row += [] if isinstance(step, Recv) else [step]
        rows.append(tuple(row))
    return replace(plan, steps=tuple(rows))


def test_a_schedule_that_can_never_run_is_refused() -> None:
    with pytest.raises(ValueError, match="deadlocks: stage 0 with B0, stage 1 with F1"):
        with_communication(by_hand(["F0 B0 F1 B1", "F0 F1 B0 B1"]))


A0, G0 = Message(Content.ACTIVATION, 0, 0, 1), Message(Content.GRADIENT, 0, 1, 0)
F0, B0 = Action(ActionKind.FORWARD, 0), Action(ActionKind.BACKWARD, 0)


@pytest.mark.parametrize(
    ("steps", "error", "message"),
    [
        (((Recv(G0, 1), F0), (Recv(A0, 0), F0)), Deadlock, "stage 0 waits for .*; stage 1 waits"),
        (((F0, Send(A0, 1)), (F0,)), ValueError, "stage 1 computes F0 without Message"),
        (((Send(A0, 1),), ()), ValueError, "stage 0 sends .* before it has it"),
        (((F0, Send(A0, 1)), (Recv(G0, 0),)), ValueError, "expects .*gradient.* but receives"),
        (((), (Recv(A0, 0), B0)), Deadlock, "stage 1 waits for"),
        (((F0, Send(A0, 1)), (Recv(A0, 0), B0)), ValueError, "stage 1 computes B0 without F0"),
    ],
)
def test_wrong_lists_are_found(
    steps: tuple[tuple[Step, ...], ...], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        simulate(Plan(one_f_one_b(2, 1), steps))


@settings(deadline=None)
@given(st.integers(1, 8), st.integers(1, 32), st.floats(0.1, 5), st.floats(0.1, 5))
def test_the_bubble_of_gpipe_and_1f1b(p: int, m: int, forward: float, backward: float) -> None:
    for schedule in (gpipe(p, m), one_f_one_b(p, m)):
        found = simulate(schedule, Costs(forward, backward, 0))
        assert found.bubble == pytest.approx((p - 1) / (m + p - 1))
        assert found.makespan == pytest.approx((m + p - 1) * (forward + backward))


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 8), st.integers(1, 4), st.integers(2, 4))
def test_the_bubble_of_interleaved(p: int, groups: int, v: int) -> None:
    m = p * groups
    assert simulate(interleaved(p, m, v)).bubble == pytest.approx((p - 1) / (v * m + p - 1))


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 8), st.integers(0, 16))
def test_the_makespan_of_zero_bubble(p: int, more: int) -> None:
    """(p - 1) (F + B - W) beyond the work, where 1F1B has (p - 1) (F + B + W)."""
    m = p + more
    assert simulate(zero_bubble_h1(p, m)).makespan == pytest.approx(3 * m + (p - 1))


def test_a_slow_stage_a_slow_link_and_little_room_by_hand() -> None:
    """Stage 1 takes three units; with room for one message stage 0 must wait to send."""
    schedule = by_hand(["F0 F1 F2", "F0 F1 F2"])
    slow = [Costs(1, send=0.5), Costs(3)]
    assert starts(simulate(schedule, slow)) == [[0, 1, 2], [1.5, 4.5, 7.5]]
    # a1 leaves when a0 is received (1.5 -> 2, else at 2), a2 when a1 is (4.5).
    tight = with_communication(by_hand(["F0 F1 F2 F3", "F0 F1 F2 F3"]))
    assert starts(simulate(tight, slow, 1)) == [[0, 1, 2, 4.5], [1.5, 4.5, 7.5, 10.5]]


def starts(found: Any) -> list[list[float]]:
    return [[span.start for span in row] for row in found.spans]


def test_more_room_is_never_slower() -> None:
    plan = with_communication(BREADTH_FIRST)
    times = [simulate(plan, Costs(1, 2, 1, 0.7), room).makespan for room in (1, 2, 3, None)]
    assert times == sorted(times, reverse=True)


def test_figures_of_measured_spans() -> None:
    one = Action(ActionKind.FORWARD, 0)
    assert bubble([[Span(one, 5, 6)], [Span(one, 6, 7)]]) == 0.5
    assert bubble([]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"costs": [Costs()]}, "1 costs for 2 stages"),
        ({"buffer": 0}, "at least one message, got a buffer of 0"),
    ],
)
def test_arguments_that_make_no_sense(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        simulate(build("gpipe", 2, 2), **arguments)


def test_negative_durations_are_refused() -> None:
    with pytest.raises(ValueError, match="must not be negative"):
        Costs(send=-1)
