"""`distplat report` and `logs` on damaged and malicious run directories."""

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
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

from distplat.actors.verifying import _compare
from distplat.cli.main import run
from distplat.platform import total_memory
from distplat.platform.apply_log import read_logs
from distplat.platform.errors import SpecError, StorageError
from distplat.platform.pipeline_trace import TRACE_FILE
from distplat.strategies.checkpoint.initial_weights import _read_file
from distplat.strategies.sparse import files
from distplat.strategies.sparse.files import LIST_NAME, read_list, read_part

STEP_FIGURES = {"sent_bytes": 4e6, "waiting_s": 0.01, "working_s": 0.02, "exposed_s": 0.01}
UNEXPECTED: list[Any] = [
    *(None, True, "", " \n ", "\x1b[2J", "1", -1, 0, 1e-300, 1e300, 1e9, 2**62, 10**400),
    *(float("inf"), float("-inf"), float("nan"), [], {}, [[]], {"": None}, ["x", None, 1]),
]


def lines() -> list[dict[str, Any]]:
    steps = [
        step_line(n, figures={**STEP_FIGURES, "staleness": n % 3, "queue_s": 0.1}) for n in range(6)
    ]
    return [*steps, FAILURE, RECOVERY, RESIZED, SAVED, evaluation_line(4, loss=1.8, accuracy=0.5)]


def damage(value: Any, rng: random.Random) -> Any:
    """Return a copy in which some values and keys are replaced or removed."""
    if isinstance(value, dict):
        remaining = {key: damage(item, rng) for key, item in value.items() if rng.random() > 0.02}
        return remaining | ({rng.choice(["", "x", "\x1b"]): 1.0} if rng.random() < 0.05 else {})
    if isinstance(value, list):
        return [damage(item, rng) for item in value if rng.random() > 0.02]
    return rng.choice(UNEXPECTED) if rng.random() < 0.08 else value


@pytest.mark.sweep(4)
@pytest.mark.parametrize("seed", range(12))
def test_report_survives_any_damage(
    seed: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = random.Random(seed)
    path = write_run(
        tmp_path,
        [damage(line, rng) for line in lines()],
        job=json.dumps(damage({"name": "d", "strategy": {"name": "ring"}, "scaling": {}}, rng)),
        result=damage({"status": "FAILED", "error": "boom", "seconds": 3.0}, rng),
        trace=damage(make_trace(), rng),
    )
    assert run(["report", str(path)]) == 0, capsys.readouterr().err
    assert (path / "report.html").stat().st_size < 2_000_000
    assert run(["report", str(path), "-o", "json"]) == 0, capsys.readouterr().err


@pytest.mark.parametrize(
    "line",
    [
        '{"kind": "step", "step": Infinity, "epoch": 0, "loss": 1, "samples": 1, "seconds": {}}',
        "[" * 100_000,
        '{"a":' * 100_000,
        json.dumps(step_line(0, samples=10**400)),
        json.dumps(step_line(10**20)),
        json.dumps(step_line(-1)),
    ],
)
def test_invalid_lines_are_skipped(
    line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_run(tmp_path, [step_line(0)])
    with (path / "metrics.jsonl").open("a") as file:
        file.write(line + "\n")
    (path / "result.json").write_text("[" * 100_000)
    assert run(["report", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "metrics.jsonl: 1 damaged lines are skipped" in printed
    assert "result.json is damaged" in printed


def test_report_of_large_staleness(tmp_path: Path) -> None:
    path = write_run(tmp_path, [step_line(n, figures={"staleness": n * 1e9}) for n in range(3)])
    assert run(["report", str(path)]) == 0
    text = (path / "report.html").read_text()
    assert "largest 2000000000, over 3 steps" in text
    assert "staleness 0 to 12500000" in text and len(text) < 1_000_000


def test_report_with_blank_causes_and_errors(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = {"status": "FAILED", "error": " \n "}
    path = write_run(tmp_path, [step_line(0), FAILURE | {"cause": ""}], result=result)
    assert run(["report", str(path)]) == 0
    assert "no cause is known" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["metrics.jsonl", "job.yaml", "result.json"])
def test_report_rejects_pipes_and_devices(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_run(tmp_path, [step_line(0)], result={})
    (path / name).unlink()
    os.mkfifo(path / name)
    assert run(["report", str(path)]) == 5
    (path / name).unlink()
    (path / name).symlink_to("/dev/zero")
    assert run(["report", str(path)]) == 5
    errors = capsys.readouterr().err
    assert f"{name}: it is not a regular file" in errors and f"{name}: it is a link" in errors


@pytest.mark.parametrize("name", ["metrics.jsonl", "job.yaml", "result.json", TRACE_FILE])
def test_report_does_not_show_the_target_of_a_link(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The owner of the directory could read the target's content in the written page."""
    path = write_run(tmp_path, [step_line(0)], result={}, trace=make_trace())
    private = tmp_path / "private"
    private.write_text("name: precious\n")
    (path / name).unlink()
    (path / name).symlink_to(private)
    assert run(["report", str(path)]) == 5
    assert f"{name}: it is a link" in capsys.readouterr().err
    assert not (path / "report.html").exists()


def test_logs_rejects_pipes_and_devices(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distplat.cli.jobs.DASHBOARD", "http://127.0.0.1:9")
    path = write_run(tmp_path, [step_line(0)], result={})
    (path / "logs").mkdir()
    log = path / "logs" / "worker-0.log"
    os.mkfifo(log)
    assert run(["logs", str(path)]) == 5
    log.unlink()
    log.symlink_to("/dev/zero")
    assert run(["logs", str(path)]) == 5
    errors = capsys.readouterr().err
    assert (
        "worker-0.log: it is not a regular file" in errors
        and "worker-0.log: it is a link" in errors
    )


@pytest.mark.parametrize(
    "read",
    [
        lambda path: read_logs(str(path)),
        lambda path: read_part(path, mock.Mock()),
        lambda path: read_list(path.parent),
        lambda path: _read_file(path),
        lambda path: _compare({}, path),
    ],
)
def test_other_readers_reject_pipes(read: Callable[[Path], Any], tmp_path: Path) -> None:
    path = tmp_path / LIST_NAME
    os.mkfifo(path)
    with pytest.raises((StorageError, SpecError), match="is not a regular file"):
        read(path)


@pytest.mark.parametrize(
    "read",
    [
        lambda path: read_logs(str(path)),
        lambda path: read_part(path, mock.Mock()),
        lambda path: read_list(path.parent),
        lambda path: _compare({}, path),
    ],
)
def test_other_readers_reject_links_and_files_larger_than_memory(
    read: Callable[[Path], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / LIST_NAME
    path.write_bytes(bytes(100))
    monkeypatch.setattr(total_memory, "memory_and_swap", lambda: 99)
    monkeypatch.setattr(files, "_LIST_BYTES", 99)
    with pytest.raises(StorageError, match=r"memory and swap 99|more than 99 bytes"):
        read(path)
    path.unlink()
    path.symlink_to(tmp_path / "private")
    with pytest.raises(StorageError, match="it is a link"):
        read(path)


def test_report_rejects_large_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_run(tmp_path, [step_line(0)])
    os.truncate(path / "job.yaml", 2**40)
    assert run(["report", str(path)]) == 5
    assert "job.yaml: it has 1099511627776 bytes" in capsys.readouterr().err


def test_report_does_not_write_through_links(tmp_path: Path) -> None:
    path = write_run(tmp_path, [step_line(0)], trace=make_trace())
    private = tmp_path / "private"
    private.write_text("precious")
    for name in ("report.partial", "pipeline_perfetto.partial", "report.html"):
        (path / name).symlink_to(private)
    assert run(["report", str(path)]) == 0
    assert private.read_text() == "precious"
    assert not (path / "report.html").is_symlink()


def test_failed_report_leaves_no_files(tmp_path: Path) -> None:
    path = write_run(tmp_path, [step_line(0)])
    (path / "report.html").mkdir()
    before = {*path.iterdir()}
    assert run(["report", str(path)]) == 5
    assert {*path.iterdir()} == before


def test_report_hides_values_of_secret_keys(tmp_path: Path) -> None:
    names = ("token", "hub_token", "api-key", "API_KEY", "db_password", "secret", "access_key")
    arguments = {**dict.fromkeys(names, "pa55word"), "max_tokens": 4711, "tokenizer": "bpe-4712"}
    job = {"name": "d", "task_args": {"deep": [arguments], "password": {"of": "pa55word"}}}
    path = write_run(tmp_path, [step_line(0)], job=json.dumps(job))
    assert run(["report", str(path)]) == 0
    text = (path / "report.html").read_text()
    assert "pa55word" not in text
    assert "4711" in text and "bpe-4712" in text


def test_report_skips_a_job_file_with_expanding_aliases(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = ["a: &a0 [x, x, x, x, x, x, x, x, x]"]
    rows += [f"b{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 9)]
    path = write_run(tmp_path, [step_line(0)], job="\n".join([*rows, "name: *a8"]))
    assert run(["report", str(path)]) == 0
    assert "job.yaml is damaged and skipped" in capsys.readouterr().out
