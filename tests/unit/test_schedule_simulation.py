"""Simulated schedules: no deadlock with small buffers, order of messages, known times."""

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


def schedule_of(rows: list[str], chunks: int = 1) -> PipelineSchedule:
    orders = tuple(tuple(map(action, row.split())) for row in rows)
    micro_batches = 1 + max(action_.micro_batch for order in orders for action_ in order)
    return PipelineSchedule("by hand", micro_batches, chunks, False, orders)


BREADTH_FIRST = schedule_of(
    [" ".join(f"F{i}{chunk}" for chunk in ("", "'") for i in range(8))] * 2, chunks=2
)
"""Stage 1 can send eight messages before stage 0 needs the first."""


@pytest.mark.sweep(4)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("stages", range(1, 9))
def test_every_size_runs_with_small_buffers(name: str, stages: int) -> None:
    """All combinations of 1..8 stages and 1..32 micro-batches."""
    for micro_batches in range(1, 33):
        if name == "interleaved" and micro_batches % stages:
            continue
        plan = with_communication(build(name, stages, micro_batches))
        for buffer in (1, 2):
            simulate(plan, Costs(1, 1.5, 1, 0.3), buffer)


@settings(deadline=None)
@given(schedules(), st.sampled_from([1, 2]), st.data())
def test_no_schedule_deadlocks(
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
def test_messages_are_received_in_send_order(
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
def test_communication_keeps_actions_and_sends_right_after_output(
    schedule: PipelineSchedule,
) -> None:
    plan = with_communication(schedule)
    for stage, steps in enumerate(plan.steps):
        assert tuple(s for s in steps if isinstance(s, Action)) == schedule.actions[stage]
        own = [step for step in steps if not isinstance(step, Recv)]
        for before, after in pairwise(own):
            if isinstance(after, Send):
                assert isinstance(before, Action)
                assert output_of(schedule, stage, before) == after.message


def peak_stored(plan: Plan) -> int:
    """Return the maximum number of received messages that a stage stores at once."""
    peak = 0
    for stage, steps in enumerate(plan.steps):
        stored: set[Message] = set()
        for step in steps:
            if isinstance(step, Recv):
                stored.add(step.message)
                peak = max(peak, len(stored))
            elif isinstance(step, Action):
                stored -= {input_of(plan.schedule, stage, step)}
    return peak


@settings(deadline=None, max_examples=40)
@given(schedules(max_micro_batches=16))
def test_buffer_of_one_message_costs_no_time_if_stages_are_equal(
    schedule: PipelineSchedule,
) -> None:
    plan = with_communication(schedule)
    assert simulate(plan, buffer=1).makespan == pytest.approx(simulate(plan).makespan)
    assert peak_stored(plan) <= 1  # no message was received early


def test_messages_of_two_stages() -> None:
    """The example in the docstring of the module."""
    steps = with_communication(schedule_of(["F0 F1 B0 B1", "F0 B0 F1 B1"])).steps
    assert [abbreviation(step) for step in steps[0]] == "F0 s:a0 F1 s:a1 r:g0 B0 r:g1 B1".split()
    assert [abbreviation(step) for step in steps[1]] == "r:a0 F0 B0 s:g0 r:a1 F1 B1 s:g1".split()


def abbreviation(step: Step) -> str:
    if isinstance(step, Action):
        return str(step)
    direction = "s" if isinstance(step, Send) else "r"
    return f"{direction}:{step.message.content[0]}{step.message.micro_batch}"


@pytest.mark.parametrize("buffer", [1, 2, None])
def test_receives_early_if_message_blocks_the_channel(buffer: int | None) -> None:
    plan = with_communication(BREADTH_FIRST)
    assert peak_stored(plan) > 1
    simulate(plan, Costs(send=0.5), buffer)


def test_deadlocks_if_messages_are_received_at_use() -> None:
    plan = with_communication(BREADTH_FIRST)
    with pytest.raises(Deadlock, match=r"stage 0 waits for space .*stage 1 waits for space"):
        simulate(receive_at_use(plan), buffer=1)
    simulate(receive_at_use(plan), buffer=8)


def receive_at_use(plan: Plan) -> Plan:
    """Move every receive directly before its use."""
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


def test_rejects_schedule_that_always_deadlocks() -> None:
    with pytest.raises(ValueError, match="deadlocks: stage 0 with B0, stage 1 with F1"):
        with_communication(schedule_of(["F0 B0 F1 B1", "F0 F1 B0 B1"]))


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
def test_rejects_invalid_plans(
    steps: tuple[tuple[Step, ...], ...], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        simulate(Plan(one_f_one_b(2, 1), steps))


@settings(deadline=None)
@given(st.integers(1, 8), st.integers(1, 32), st.floats(0.1, 5), st.floats(0.1, 5))
def test_bubble_of_gpipe_and_1f1b(p: int, m: int, forward: float, backward: float) -> None:
    for schedule in (gpipe(p, m), one_f_one_b(p, m)):
        simulation = simulate(schedule, Costs(forward, backward, 0))
        assert simulation.bubble == pytest.approx((p - 1) / (m + p - 1))
        assert simulation.makespan == pytest.approx((m + p - 1) * (forward + backward))


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 8), st.integers(1, 4), st.integers(2, 4))
def test_bubble_of_interleaved(p: int, groups: int, v: int) -> None:
    m = p * groups
    assert simulate(interleaved(p, m, v)).bubble == pytest.approx((p - 1) / (v * m + p - 1))


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 8), st.integers(0, 16))
def test_makespan_of_zero_bubble(p: int, more: int) -> None:
    """The bubble is (p - 1) (F + B - W); that of 1F1B is (p - 1) (F + B + W)."""
    m = p + more
    assert simulate(zero_bubble_h1(p, m)).makespan == pytest.approx(3 * m + (p - 1))


def test_slow_stage_and_slow_link_match_hand_computed_times() -> None:
    """Stage 1 takes three units; with a buffer of one message stage 0 must wait to send."""
    schedule = schedule_of(["F0 F1 F2", "F0 F1 F2"])
    slow = [Costs(1, send=0.5), Costs(3)]
    assert starts(simulate(schedule, slow)) == [[0, 1, 2], [1.5, 4.5, 7.5]]
    # a1 is sent when a0 is received (at 1.5), but not before 2; a2 when a1 is received (4.5).
    buffered = with_communication(schedule_of(["F0 F1 F2 F3", "F0 F1 F2 F3"]))
    assert starts(simulate(buffered, slow, 1)) == [[0, 1, 2, 4.5], [1.5, 4.5, 7.5, 10.5]]


def starts(simulation: Any) -> list[list[float]]:
    return [[span.start for span in row] for row in simulation.spans]


def test_larger_buffer_is_never_slower() -> None:
    plan = with_communication(BREADTH_FIRST)
    times = [simulate(plan, Costs(1, 2, 1, 0.7), buffer).makespan for buffer in (1, 2, 3, None)]
    assert times == sorted(times, reverse=True)


def test_bubble_of_measured_spans() -> None:
    forward = Action(ActionKind.FORWARD, 0)
    assert bubble([[Span(forward, 5, 6)], [Span(forward, 6, 7)]]) == 0.5
    assert bubble([]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"costs": [Costs()]}, "1 costs for 2 stages"),
        ({"buffer": 0}, "at least one message, got a buffer of 0"),
    ],
)
def test_rejects_invalid_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        simulate(build("gpipe", 2, 2), **arguments)


def test_rejects_negative_durations() -> None:
    with pytest.raises(ValueError, match="must not be negative"):
        Costs(send=-1)
