"""Reading of run directories: complete, incomplete, damaged and missing."""

import json
import math
from pathlib import Path
from unittest import mock

import pytest
from jobs import job_of
from made_runs import (
    FAILURE,
    RECOVERY,
    RESIZED,
    SAVED,
    evaluation_line,
    make_trace,
    step_line,
    write_run,
)

from distplat.platform import run_record
from distplat.platform.errors import SpecError, StorageError
from distplat.platform.progress import EvalSummary, FailureEvent, Resized, StepSummary
from distplat.platform.run_directory import RunDirectory
from distplat.platform.run_record import find_run, read_run
from distplat.platform.run_report import phase_times


def test_reads_all_record_kinds(tmp_path: Path) -> None:
    lines = [
        step_line(0),
        step_line(1),
        evaluation_line(2, loss=1.5),
        FAILURE,
        RECOVERY,
        RESIZED,
        SAVED,
    ]
    path = write_run(tmp_path, lines, result={"status": "SUCCEEDED"}, trace=make_trace())
    record = read_run(path)
    assert record.job["name"] == "digits"
    assert [entry.step for entry in record.steps] == [0, 1]
    assert record.steps[0].seconds["compute"] == 0.06
    assert record.evaluations[0].metrics == {"loss": 1.5}
    assert record.failures[0].replaced == ("worker-1",)
    assert record.recoveries[0].seconds == 2.5
    assert record.resizes == [Resized(2, 4, 2, 3, 0.25)]
    assert record.saved[0].size == 2_500_000
    assert record.result == {"status": "SUCCEEDED"}
    assert record.trace is not None and record.trace.stages == 2
    assert record.notes == []


def test_partial_last_line_is_not_reported(tmp_path: Path) -> None:
    path = write_run(tmp_path, [step_line(0)])
    with (path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "step", "st')
    record = read_run(path)
    assert len(record.steps) == 1
    assert record.notes == []


def test_damaged_files_and_lines_are_noted_and_skipped(tmp_path: Path) -> None:
    path = write_run(tmp_path, [step_line(0), {"kind": "step"}, {"no": "kind"}, step_line(1)])
    (path / "result.json").write_text("{")
    (path / "job.yaml").write_text("- no\n- job\n")
    (path / "pipeline_trace.json").write_text('{"events": []}')
    record = read_run(path)
    assert [entry.step for entry in record.steps] == [0, 1]
    assert [note.split(":")[0] for note in record.notes] == [
        "job.yaml is damaged and skipped",
        "metrics.jsonl",
        "result.json is damaged and skipped",
        "pipeline_trace.json is damaged and skipped",
    ]
    assert "2 damaged lines" in record.notes[1]


def test_job_is_read_as_yaml_1_2(tmp_path: Path) -> None:
    path = write_run(tmp_path, job="optimizer: {lr: 1e-05}\n")
    assert read_run(path).job == {"optimizer": {"lr": 1e-05}}  # a string in YAML 1.1


def test_note_of_damaged_job_has_line_and_column(tmp_path: Path) -> None:
    path = write_run(tmp_path, job="name: a\nname: b\n")
    (note,) = read_run(path).notes
    assert note == "job.yaml is damaged and skipped: job.yaml:2:1: name: set twice: " + (
        "in line 1 and in line 2"
    )


@pytest.mark.parametrize(
    "line",
    ["[]", "7", "null", '{"kind": "step", "step": "x"}', '{"kind": "evaluation", "metrics": 3}'],
)
def test_malformed_line_is_noted_and_skipped(line: str, tmp_path: Path) -> None:
    path = write_run(tmp_path, [step_line(0)])
    with (path / "metrics.jsonl").open("a") as file:
        file.write(f"{line}\n{json.dumps(step_line(1))}\n")
    record = read_run(path)
    assert len(record.steps) == 2
    assert len(record.notes) == 1


def test_ignores_unknown_kinds(tmp_path: Path) -> None:
    record = read_run(write_run(tmp_path, [{"kind": "weather", "rain": True}, step_line(0)]))
    assert len(record.steps) == 1
    assert record.notes == []


def test_reads_failure_kind_of_older_versions(tmp_path: Path) -> None:
    older = FAILURE | {"kind": "setback"}
    record = read_run(write_run(tmp_path, [step_line(0), older, FAILURE]))
    assert record.failures == [record.failures[0]] * 2


def test_repeated_step_counts_once(tmp_path: Path) -> None:
    lines = [
        step_line(0),
        step_line(1),
        step_line(2),
        FAILURE,
        step_line(1, loss=7.0),
        step_line(2),
    ]
    record = read_run(write_run(tmp_path, lines))
    assert [entry.step for entry in record.steps] == [0, 1, 2]
    assert record.steps[1].loss == 7.0


def test_null_loss_is_nan(tmp_path: Path) -> None:
    record = read_run(write_run(tmp_path, [step_line(0, loss=None)]))
    assert math.isnan(record.steps[0].loss)


def test_missing_files_are_noted(tmp_path: Path) -> None:
    path = write_run(tmp_path, job=None)
    (path / "metrics.jsonl").unlink()
    (path / "result.json").write_text('{"status": "FAILED", "error": "early"}')
    record = read_run(path)
    assert record.notes == [
        "metrics.jsonl is missing: no losses and no times",
        "job.yaml is missing",
    ]


def test_trace_event_that_ends_before_its_start_is_damaged(tmp_path: Path) -> None:
    trace = make_trace()
    trace["events"][0] |= {"start_s": 3.0, "end_s": 1.0}
    record = read_run(write_run(tmp_path, trace=trace))
    assert record.trace is None
    assert "an event from 3.0 to 1.0" in record.notes[0]


def test_rejects_directory_without_run(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="holds no run"):
        read_run(tmp_path)


def test_find_run_by_path_and_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_run(tmp_path / "runs", name="digits-1")
    monkeypatch.chdir(tmp_path)
    assert find_run(Path("digits-1")) == find_run(Path("runs/digits-1")) == path
    with pytest.raises(SpecError, match="did you mean 'runs/digits-1'"):
        find_run(Path("digit-1"))
    with pytest.raises(SpecError, match="did you mean 'runs/digits-1'"):
        find_run(Path("runs/digits-2"))
    with pytest.raises(SpecError, match="the directory that `submit` printed"):
        find_run(Path("elsewhere/x"))


def test_reads_what_run_directory_writes(tmp_path: Path) -> None:
    job = job_of(name="real", task="a:B", epochs=1)
    directory = RunDirectory(job, "one", tmp_path)
    step_summary = StepSummary(0, 0, 1.5, 4, {"compute": 0.5}, 2, {"sent_bytes": 8.0})
    eval_summary = EvalSummary(1, 3, {"accuracy": 0.5})
    failure = FailureEvent(1, 1, "lost", ("worker-0",), 0.5)
    resized = Resized(2, 1, 2, 3, 0.25)
    for summary in (step_summary, eval_summary, failure, resized):
        directory.record(summary)
    directory.finish("SUCCEEDED", {"seconds": 1.0})
    record = read_run(directory.path)
    assert (record.steps, record.evaluations, record.failures) == (
        [step_summary],
        [eval_summary],
        [failure],
    )
    assert record.resizes == [resized]
    assert record.job["name"] == "real"
    assert record.notes == []


def test_unreadable_file_raises_storage_error(tmp_path: Path) -> None:
    path = write_run(tmp_path)
    (path / "result.json").mkdir()
    with pytest.raises(StorageError, match=r"cannot read .*result\.json"):
        read_run(path)


def test_long_run_is_downsampled_and_keeps_last_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_record, "MAX_STEPS", 100)
    steps = 1003
    with (tmp_path / "metrics.jsonl").open("w") as file:
        for number in range(1, steps + 1):
            file.write(json.dumps(step_line(number, steps, seconds={"compute": 0.5})) + "\n")
        file.write("{" * (2**22 + 5) + "\n")
        file.write('{"kind": "step", "st')
    with mock.patch.object(json, "loads", wraps=json.loads) as loads:
        record = read_run(tmp_path)
    assert loads.call_count < 400, "skipped lines must not be parsed: millions take minutes"
    assert len(record.steps) <= 102
    assert record.every == 16
    assert [entry.step for entry in record.steps] == [*range(16, steps, 16), steps]
    assert "long run: only one in 16 steps is counted" in record.notes
    assert "metrics.jsonl: 2 damaged lines are skipped" in record.notes
    (part,) = phase_times(record.steps, record.every)
    assert part.total_s == pytest.approx(0.5 * steps, rel=0.05)
