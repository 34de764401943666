"""A measured step of a pipeline beside the ideal one."""

from pathlib import Path
from typing import Any

import pytest
from made_runs import made_run, made_trace

from distplat.platform.pipeline_trace import Trace
from distplat.platform.run_record import read_run
from distplat.strategies.algorithms.gantt import gantts
from distplat.strategies.algorithms.schedule import build
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
