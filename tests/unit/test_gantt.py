"""Gantt charts: a measured step of a pipeline and the ideal step."""

from pathlib import Path
from typing import Any

import pytest
from made_runs import make_trace, write_run

from distplat.platform.pipeline_trace import Trace
from distplat.platform.run_record import read_run
from distplat.strategies.algorithms.gantt import chrome_trace, gantts
from distplat.strategies.algorithms.pipeline_schedule import build
from distplat.strategies.algorithms.simulate import Costs, simulate


def trace(tmp_path: Path, fields: dict[str, Any]) -> Trace:
    pipeline_trace = read_run(write_run(tmp_path, trace=fields)).trace
    assert pipeline_trace is not None
    return pipeline_trace


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "interleaved", "zb-h1"])
def test_ideal_of_an_ideal_step(schedule: str, tmp_path: Path) -> None:
    (gantt,) = gantts(trace(tmp_path, make_trace(schedule, 2, 4)))
    expected = simulate(build(schedule, 2, 4), Costs(1, 1, 1))
    assert gantt.ideal is not None
    assert gantt.bubble == pytest.approx(expected.bubble) == pytest.approx(gantt.ideal.bubble)
    assert gantt.least_bubble == pytest.approx(gantt.bubble)  # stages are equal
    assert (
        gantt.pipeline_s == pytest.approx(expected.makespan) == pytest.approx(gantt.ideal.makespan)
    )


def test_difference_to_the_ideal_is_message_time(tmp_path: Path) -> None:
    (gantt,) = gantts(trace(tmp_path, make_trace("1f1b", 3, 4, late_s=0.5, reduce_s=2.0)))
    assert gantt.ideal is not None
    assert gantt.ideal.bubble == pytest.approx(2 / 6)
    assert gantt.bubble > gantt.ideal.bubble
    assert gantt.step_s == pytest.approx(gantt.pipeline_s + 2.0)
    assert [t.reduce_s for t in gantt.times] == pytest.approx([2.0] * 3)
    assert [t.forward_s for t in gantt.times] == pytest.approx([1.0] * 3)
    assert [t.backward_s for t in gantt.times] == pytest.approx([2.0] * 3)


def test_least_bubble_of_unequal_stages(tmp_path: Path) -> None:
    fields = make_trace(micro_batches=1)
    events = [e for e in fields["events"] if (e["stage"], e["kind"]) != (0, "B")]
    (gantt,) = gantts(trace(tmp_path, fields | {"events": events}))
    # Stage 0 computes for 1 s, then stage 1 for 3 s.
    assert gantt.pipeline_s == pytest.approx(4)
    assert gantt.bubble == pytest.approx(0.5)
    assert gantt.least_bubble == pytest.approx(0.25)


def test_times_of_chunks_are_added(tmp_path: Path) -> None:
    (gantt,) = gantts(trace(tmp_path, make_trace("interleaved", 2, 4)))
    assert [t.forward_s for t in gantt.times] == pytest.approx([1.0] * 2)


def test_each_replica_has_a_chart(tmp_path: Path) -> None:
    first, second = gantts(trace(tmp_path, make_trace(replicas=2)))
    assert (first.replica, second.replica) == (0, 1)
    assert second.measured[0][0].start == pytest.approx(0.5)
    assert second.pipeline_s == pytest.approx(first.pipeline_s)


def test_chart_shows_the_first_slice(tmp_path: Path) -> None:
    fields = make_trace()
    second_slice = [event | {"tensor": 1, "rank": 9} for event in fields["events"]]
    fields["events"] = second_slice + fields["events"]
    (gantt,) = gantts(trace(tmp_path, fields))
    assert len(gantt.measured[0]) == 8


@pytest.mark.parametrize(
    "change", [{"schedule": "zigzag"}, {"schedule": "interleaved", "micro_batches": 5}]
)
def test_unknown_schedule_has_no_ideal(change: dict[str, Any], tmp_path: Path) -> None:
    (gantt,) = gantts(trace(tmp_path, make_trace() | change))
    assert gantt.ideal is None
    assert gantt.why_not
    assert gantt.bubble > 0


def test_rejects_an_event_of_a_missing_stage(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="an event of stage 1, and there are 1"):
        gantts(trace(tmp_path, make_trace() | {"stages": 1}))


def test_trace_without_events(tmp_path: Path) -> None:
    assert gantts(trace(tmp_path, make_trace() | {"events": []})) == []


def test_chrome_trace_has_all_events(tmp_path: Path) -> None:
    pipeline = trace(tmp_path, make_trace("interleaved", 2, 4, replicas=2, reduce_s=1.0))
    events = chrome_trace(pipeline, gantts(pipeline))["traceEvents"]
    assert isinstance(events, list)
    complete = [event for event in events if event["ph"] == "X"]
    measured = [e for e in complete if e["tid"] != 1]
    assert len(measured) == len(pipeline.events)
    first = next(e for e in measured if e["pid"] == 1 and e["name"] == "F0")
    assert (first["ts"], first["dur"]) == (0.5e6, 0.5e6)  # stage 1 starts after half of stage 0
    assert {e["name"] for e in measured if e["cat"] == "F"} >= {"F0", "F0'", "F3'"}


def test_chrome_trace_has_a_thread_for_the_ideal_step(tmp_path: Path) -> None:
    pipeline = trace(tmp_path, make_trace("1f1b", 2, 4, replicas=2, late_s=0.5))
    events = chrome_trace(pipeline, gantts(pipeline))["traceEvents"]
    assert isinstance(events, list)
    ideal = [e for e in events if e["ph"] == "X" and e["tid"] == 1]
    assert len(ideal) == 2 * 2 * 8
    assert min(e["ts"] for e in ideal if e["pid"] in (2, 3)) == pytest.approx(0.5e6)
    measured = [e for e in events if e["ph"] == "X" and e["tid"] == 0]
    assert max(e["ts"] + e["dur"] for e in ideal) < max(e["ts"] + e["dur"] for e in measured)


def test_events_of_a_chrome_thread_do_not_overlap(tmp_path: Path) -> None:
    pipeline = trace(tmp_path, make_trace("zb-h1", 3, 5, replicas=2, late_s=0.25, reduce_s=1.0))
    events = chrome_trace(pipeline, gantts(pipeline))["traceEvents"]
    assert isinstance(events, list)
    ends: dict[tuple[int, int], float] = {}
    for event in sorted((e for e in events if e["ph"] == "X"), key=lambda e: e["ts"]):
        thread = event["pid"], event["tid"]
        assert event["ts"] >= ends.get(thread, 0.0) - 1e-3
        ends[thread] = event["ts"] + event["dur"]


def test_chrome_trace_has_a_process_per_slice(tmp_path: Path) -> None:
    fields = make_trace()
    second_slice = [event | {"tensor": 1, "rank": event["rank"] + 2} for event in fields["events"]]
    pipeline = trace(tmp_path, fields | {"events": fields["events"] + second_slice})
    events = chrome_trace(pipeline, gantts(pipeline))["traceEvents"]
    assert isinstance(events, list)
    names = {e["args"]["name"] for e in events if e["name"] == "process_name"}
    assert "replica 0, stage 1, slice 1 (rank 3)" in names and len(names) == 4
    assert {e["pid"] for e in events if e["ph"] == "X" and e["tid"] == 1} == {0, 1}
