"""A measured step of a pipeline beside the ideal one."""

from pathlib import Path
from typing import Any

import pytest
from made_runs import made_run, made_trace

from distplat.platform.pipeline_trace import Trace
from distplat.platform.run_record import read_run
from distplat.strategies.algorithms.gantt import chrome_trace, gantts
from distplat.strategies.algorithms.pipeline_schedule import build
from distplat.strategies.algorithms.simulate import Costs, simulate


def trace(tmp_path: Path, fields: dict[str, Any]) -> Trace:
    found = read_run(made_run(tmp_path, trace=fields)).trace
    assert found is not None
    return found


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "interleaved", "zb-h1"])
def test_the_ideal_of_an_ideal_step_is_itself(schedule: str, tmp_path: Path) -> None:
    (one,) = gantts(trace(tmp_path, made_trace(schedule, 2, 4)))
    expected = simulate(build(schedule, 2, 4), Costs(1, 1, 1))
    assert one.ideal is not None
    assert one.bubble == pytest.approx(expected.bubble) == pytest.approx(one.ideal.bubble)
    assert one.least_bubble == pytest.approx(one.bubble)  # stages are equal
    assert one.pipeline_s == pytest.approx(expected.makespan) == pytest.approx(one.ideal.makespan)


def test_what_messages_cost_is_the_difference(tmp_path: Path) -> None:
    (one,) = gantts(trace(tmp_path, made_trace("1f1b", 3, 4, late_s=0.5, reduce_s=2.0)))
    assert one.ideal is not None
    assert one.ideal.bubble == pytest.approx(2 / 6)
    assert one.bubble > one.ideal.bubble
    assert one.step_s == pytest.approx(one.pipeline_s + 2.0)
    assert [t.reduce_s for t in one.times] == pytest.approx([2.0] * 3)
    assert [t.forward_s for t in one.times] == pytest.approx([1.0] * 3)
    assert [t.backward_s for t in one.times] == pytest.approx([2.0] * 3)


def test_unequal_stages_are_no_bubble_of_the_busiest(tmp_path: Path) -> None:
    fields = made_trace(micro_batches=1)
    kept = [e for e in fields["events"] if (e["stage"], e["kind"]) != (0, "B")]
    (one,) = gantts(trace(tmp_path, fields | {"events": kept}))
    # Stage 0 computes for 1 s, stage 1 behind it for 3 s.
    assert one.pipeline_s == pytest.approx(4)
    assert one.bubble == pytest.approx(0.5)
    assert one.least_bubble == pytest.approx(0.25)


def test_a_chunk_is_a_part_of_its_stage(tmp_path: Path) -> None:
    (one,) = gantts(trace(tmp_path, made_trace("interleaved", 2, 4)))
    assert [t.forward_s for t in one.times] == pytest.approx([1.0] * 2)


def test_replicas_are_told_apart(tmp_path: Path) -> None:
    first, second = gantts(trace(tmp_path, made_trace(replicas=2)))
    assert (first.replica, second.replica) == (0, 1)
    assert second.measured[0][0].start == pytest.approx(0.5)
    assert second.pipeline_s == pytest.approx(first.pipeline_s)


def test_of_slices_the_first_is_shown(tmp_path: Path) -> None:
    fields = made_trace()
    twins = [event | {"tensor": 1, "rank": 9} for event in fields["events"]]
    fields["events"] = twins + fields["events"]
    (one,) = gantts(trace(tmp_path, fields))
    assert len(one.measured[0]) == 8


@pytest.mark.parametrize(
    "change", [{"schedule": "zigzag"}, {"schedule": "interleaved", "micro_batches": 5}]
)
def test_a_schedule_that_is_not_known_has_no_ideal(change: dict[str, Any], tmp_path: Path) -> None:
    (one,) = gantts(trace(tmp_path, made_trace() | change))
    assert one.ideal is None
    assert one.why_not
    assert one.bubble > 0


def test_a_stage_too_many_makes_no_sense(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="an event of stage 1, and there are 1"):
        gantts(trace(tmp_path, made_trace() | {"stages": 1}))


def test_a_trace_without_events_is_no_step(tmp_path: Path) -> None:
    assert gantts(trace(tmp_path, made_trace() | {"events": []})) == []


def test_chrome_events_are_those_of_the_trace(tmp_path: Path) -> None:
    found = trace(tmp_path, made_trace("interleaved", 2, 4, replicas=2, reduce_s=1.0))
    events = chrome_trace(found, gantts(found))["traceEvents"]
    assert isinstance(events, list)
    complete = [event for event in events if event["ph"] == "X"]
    measured = [e for e in complete if e["tid"] != 1]
    assert len(measured) == len(found.events)
    first = next(e for e in measured if e["pid"] == 1 and e["name"] == "F0")
    assert (first["ts"], first["dur"]) == (0.5e6, 0.5e6)  # stage 1, behind half a stage
    assert {e["name"] for e in measured if e["cat"] == "F"} >= {"F0", "F0'", "F3'"}


def test_the_ideal_step_is_a_thread_beside_the_measured_one(tmp_path: Path) -> None:
    found = trace(tmp_path, made_trace("1f1b", 2, 4, replicas=2, late_s=0.5))
    events = chrome_trace(found, gantts(found))["traceEvents"]
    assert isinstance(events, list)
    ideal = [e for e in events if e["ph"] == "X" and e["tid"] == 1]
    assert len(ideal) == 2 * 2 * 8
    assert min(e["ts"] for e in ideal if e["pid"] in (2, 3)) == pytest.approx(0.5e6)
    measured = [e for e in events if e["ph"] == "X" and e["tid"] == 0]
    assert max(e["ts"] + e["dur"] for e in ideal) < max(e["ts"] + e["dur"] for e in measured)


def test_events_of_a_chrome_thread_do_not_overlap(tmp_path: Path) -> None:
    found = trace(tmp_path, made_trace("zb-h1", 3, 5, replicas=2, late_s=0.25, reduce_s=1.0))
    events = chrome_trace(found, gantts(found))["traceEvents"]
    assert isinstance(events, list)
    ends: dict[tuple[int, int], float] = {}
    for event in sorted((e for e in events if e["ph"] == "X"), key=lambda e: e["ts"]):
        thread = event["pid"], event["tid"]
        assert event["ts"] >= ends.get(thread, 0.0) - 1e-3
        ends[thread] = event["ts"] + event["dur"]


def test_slices_of_a_stage_are_processes_of_their_own(tmp_path: Path) -> None:
    fields = made_trace()
    twins = [event | {"tensor": 1, "rank": event["rank"] + 2} for event in fields["events"]]
    found = trace(tmp_path, fields | {"events": fields["events"] + twins})
    events = chrome_trace(found, gantts(found))["traceEvents"]
    assert isinstance(events, list)
    names = {e["args"]["name"] for e in events if e["name"] == "process_name"}
    assert "replica 0, stage 1, slice 1 (rank 3)" in names and len(names) == 4
    assert {e["pid"] for e in events if e["ph"] == "X" and e["tid"] == 1} == {0, 1}
