"""Text of foreign jobs and runs is printed without terminal escapes."""

import ast
import io
import json
import logging
import random
from pathlib import Path
from typing import Any

import pytest
from made_runs import FACTS, FAILURE, evaluation_line, step_line, write_run

from distplat.actors.view import View
from distplat.cli import jobs, remote, render
from distplat.cli.main import run
from distplat.cli.remote import LogReader
from distplat.platform.checkpoints import read
from distplat.platform.errors import ClusterUnreachable, Problem, StorageError, printable
from distplat.platform.progress import Recovery

CLI = Path(render.__file__).parent
ESCAPES = "\x1b]0;title\x07\x1b[2J\x9b2J\x08\u202egpj.exe\ud800"


def is_harmless(text: str) -> bool:
    text.encode()  # a lone surrogate raises UnicodeEncodeError
    return all(c.isprintable() or c in "\n\t" for c in text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain\n\tüß训练 🚀", "plain\n\tüß训练 🚀"),
        ("\x1b[31mred\x1b[0m", "red"),
        ("\x1b]0;title\x07a\x9b2J", "]0;titlea2J"),
        ("\x1b[\x1b[31m31m", "[31m"),
        ("over\rwritten\x7f", "overwritten"),
        ("\u202egpj.exe\u2066", "gpj.exe"),
        ("a\ud800b", "a\ufffdb"),
    ],
)
def test_printable(text: str, expected: str) -> None:
    assert printable(text) == expected


def test_problem_is_printed_without_escapes() -> None:
    problem = Problem((ESCAPES,), ESCAPES, hint=ESCAPES, file=ESCAPES, line=1, column=1)
    assert is_harmless(str(problem))


def test_tables_and_lines_are_printed_without_escapes(capsys: pytest.CaptureFixture[str]) -> None:
    render.print_pairs([(ESCAPES, ESCAPES)])
    render.print_table([ESCAPES], [[ESCAPES]])
    remote.say(ESCAPES)
    out = io.StringIO()
    View(out).on_recovery(Recovery(1, 2.0))
    View(out)._print(ESCAPES)
    printed = capsys.readouterr()
    assert is_harmless(printed.out + printed.err + out.getvalue())
    assert is_harmless("\n".join(render.table_lines([ESCAPES], [[ESCAPES]])))


def test_result_of_a_job_is_printed_without_escapes(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = FACTS | {"strategy": ESCAPES, "metrics": {ESCAPES: 1.0}, "restarts": [ESCAPES]}

    class FakeJobs:
        address = "http://h:8265"

        def info(self, job_id: str) -> dict[str, Any]:
            return {"status": "SUCCEEDED"}

        def logs(self, job_id: str) -> str:
            return f"{remote.RESULT_MARK}{json.dumps(facts)}\n"

    monkeypatch.setattr(jobs, "open_jobs", lambda address: FakeJobs())
    jobs.logs("lin-1")
    printed = capsys.readouterr().out
    assert "gpj.exe" in printed and is_harmless(printed)


def test_log_reader_parses_a_result() -> None:
    lines: list[str] = []
    reader = LogReader(lines.append)
    reader(remote.RESULT_MARK + json.dumps(FACTS))
    assert reader.facts == FACTS and lines == []


@pytest.mark.parametrize(
    "value",
    [
        "1",
        "[]",
        "null",
        "{}",
        '{"steps": 3}',
        "[" * 100_000,
        json.dumps(FACTS | {"metrics": None}),
        json.dumps(FACTS | {"metrics": {"loss": "low"}}),
        json.dumps(FACTS | {"checkpoints": [None]}),
        json.dumps(FACTS | {"samples_per_s": "many"}),
        json.dumps(FACTS | {"more": 1}),
        json.dumps({name: FACTS[name] for name in FACTS if name != "model"}),
    ],
)
def test_invalid_result_is_a_line_of_the_log(value: str) -> None:
    lines: list[str] = []
    reader = LogReader(lines.append)
    reader(remote.RESULT_MARK + value)
    assert reader.facts is None
    assert lines == [remote.RESULT_MARK + value]


def damaged(value: Any, rng: random.Random) -> Any:
    """Replace one part of a JSON value."""
    if isinstance(value, dict) and value and rng.random() < 0.8:
        key = rng.choice(sorted(value))
        return {**value, key: damaged(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.8:
        index = rng.randrange(len(value))
        return [*value[:index], damaged(value[index], rng), *value[index + 1 :]]
    return rng.choice([None, -1, 2**70, 1e308, 0.5, "", ESCAPES, [], {}, [None], True, "step"])


def test_damaged_result_is_printed_or_a_line_of_the_log(
    capsys: pytest.CaptureFixture[str],
) -> None:
    rng, outcomes = random.Random(0), {"shown": 0, "line": 0}
    for _ in range(300):
        lines: list[str] = []
        reader = LogReader(lines.append)
        reader(remote.RESULT_MARK + json.dumps(damaged(FACTS, rng)))
        if reader.facts is None:
            assert len(lines) == 1
            outcomes["line"] += 1
        else:
            render.print_result(reader.facts)
            outcomes["shown"] += 1
    assert is_harmless(capsys.readouterr().out)
    assert min(outcomes.values()) > 20


@pytest.mark.parametrize(
    "figures",
    [
        {"sent_bytes": 1.0, "exposed_s": 1.0},
        {"queue_s": 1.0},
        {"queue_s": 1.0, "shard_7_apply_s": 1.0},
        {"pipeline_s": 1.0},
        {"saved_bytes": 1.0, "sent_bytes": -1.0},
        {"optimizer_state_bytes": None, "pipeline_s": None},
    ],
)
def test_incomplete_figures_are_printed(
    figures: dict[str, float | None], capsys: pytest.CaptureFixture[str]
) -> None:
    reader = LogReader(lambda line: None)
    reader(remote.RESULT_MARK + json.dumps(FACTS | {"figures": figures}))
    assert reader.facts is not None
    render.print_result(reader.facts)
    assert "/runs/lin-1" in capsys.readouterr().out


def test_report_is_printed_without_escapes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [
        step_line(0, seconds={ESCAPES: 0.5}),
        FAILURE | {"cause": ESCAPES, "replaced": [ESCAPES]},
    ]
    result = {"status": ESCAPES, "error": ESCAPES}
    path = write_run(tmp_path, [*lines, evaluation_line(1, **{ESCAPES: 1.0})], result=result)
    assert run(["report", str(path)]) == 0
    assert is_harmless(capsys.readouterr().out)


def test_errors_are_printed_without_escapes(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)  # a directory without runs for `list`
    for error in (ValueError(ESCAPES), ClusterUnreachable(f"one\n{ESCAPES}")):

        def fail(*args: object, error: Exception = error, **options: object) -> None:
            raise error

        monkeypatch.setattr(jobs, "open_jobs", fail)
        assert run(["list"]) in (3, 70)
    assert is_harmless(capsys.readouterr().err)


@pytest.mark.parametrize("field", ["bytes", "sha256"])
def test_checkpoint_error_has_no_escapes(field: str, tmp_path: Path) -> None:
    entry = {"bytes": 1, "sha256": "0" * 64, field: ESCAPES}
    manifest = {"format": 1, "files": {"model.safetensors": entry}}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(StorageError) as caught:
        read(tmp_path)
    assert is_harmless(str(caught.value))


def test_warnings_are_printed_without_escapes(capsys: pytest.CaptureFixture[str]) -> None:
    """Without a handler, Python's last-resort handler prints warnings to stderr."""
    assert run(["strategies"]) == 0
    assert logging.lastResort is not None
    assert is_harmless(logging.lastResort.format(logging.makeLogRecord({"msg": ESCAPES})))


def test_every_print_of_the_cli_is_escaped() -> None:
    unescaped = []
    for file in sorted(CLI.glob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name)):
                continue
            if node.func.id == "print" and not all(map(_is_escaped, node.args)):
                unescaped.append(f"{file.name}:{node.lineno}")
    assert unescaped == []


def _is_escaped(value: ast.expr) -> bool:
    """Return whether an expression is a constant, JSON or a result of `printable`."""
    if isinstance(value, ast.Constant):
        return True
    if isinstance(value, ast.BinOp):
        return _is_escaped(value.left) and _is_escaped(value.right)
    if isinstance(value, ast.Call) and isinstance(value.func, ast.Name):
        return value.func.id in ("printable", "to_json")
    return isinstance(value, ast.Name) and value.id == "RESULT_MARK"
