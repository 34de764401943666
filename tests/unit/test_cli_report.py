"""`distplat report`: the page and the table of successful, failed and damaged runs."""

import json
import os
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

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

from distplat.cli.charts import THEMED
from distplat.cli.main import run

EVIL = '<script>alert(1)</script>"&'
FIGURES = {"sent_bytes": 4e6, "waiting_s": 0.01, "working_s": 0.02, "exposed_s": 0.01}


class Tags(HTMLParser):
    """Collects tags, and the attributes that make a browser fetch or run something."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.fetches: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in ("meta", "br"):
            self.open.append(tag)
        self.fetches += [f"{tag} {name}" for name, _ in attrs if name in ("src", "href")]
        self.fetches += [f"{tag} {v}" for k, v in attrs if k == "xlink:href" and v and v[0] != "#"]
        self.fetches += [f"{tag} {name}" for name, _ in attrs if name.startswith("on")]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def page_of(path: Path) -> str:
    text = (path / "report.html").read_text()
    tags = Tags(text)
    assert tags.open == []
    assert tags.fetches == []
    assert "script" not in tags.tags
    assert "url(" not in text.replace("url(#", "") and "@import" not in text
    assert not re.search(r"\bnan\b|\binf\b", text)
    return text


def eventful_run(**changes: Any) -> list[dict[str, Any]]:
    lines = [step_line(n, step=n + 1, figures=FIGURES, **changes) for n in range(8)]
    events = [SAVED, FAILURE, RECOVERY, RESIZED]
    return [*lines[:4], *events, *lines[4:], evaluation_line(4, loss=1.8, accuracy=0.5)]


def test_successful_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_run(tmp_path, eventful_run(), result={"status": "SUCCEEDED", "seconds": 200.0})
    assert run(["report", str(path)]) == 0
    output = capsys.readouterr().out
    for line in (
        "after step 4, 2.5 MB",
        "3 workers from step 4 on, stood still 0.2 s",
        "SUCCEEDED",
        "8 of 10",
        "80 samples/s",
        "3 min 20 s",
        "compute 60%",
    ):
        assert line in output
    assert "after step 3: worker-1 was lost: the process died; worker-1, after 2.5 s" in output
    assert str(path / "report.html") in output
    text = page_of(path)
    parts = ("Loss", "Evaluations", "Where the time went", "Exchange", "Failures", "Checkpoints")
    for heading in parts:
        assert heading in text
    assert "4 MB sent per worker and step" in text


def test_json_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_run(tmp_path, eventful_run(), trace=make_trace())
    assert run(["report", str(path), "-o", "json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["steps"] == 8
    assert facts["evaluations"] == {"loss": 1.8, "accuracy": 0.5}
    assert facts["restarts"][0]["seconds"] == 2.5
    assert facts["figures"]["sent_bytes"] == 4e6
    assert facts["pipeline"][0]["bubble"] == pytest.approx(0.2)


def test_job_name_selects_its_newest_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, started in (("b-1", 100), ("a-2", 200)):
        path = write_run(tmp_path / "runs", [step_line(0)], job='{"name": "lin"}', name=name)
        os.utime(path / "job.yaml", (started, started))
    (tmp_path / "lin").mkdir()  # a folder of the job, not a run
    (tmp_path / "lin" / "job.yaml").write_text("name: lin")
    assert run(["report", "lin", "-o", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["run"] == "a-2"
    assert [path.name for path in (tmp_path / "lin").iterdir()] == ["job.yaml"]
    assert run(["report", "line"]) == 2, "neither a run nor a job"


def test_escapes_text_of_users(tmp_path: Path) -> None:
    bad = FAILURE | {"cause": EVIL, "replaced": [EVIL]}
    lines = [step_line(0, figures={EVIL: 1.0}), step_line(1, figures={EVIL: 2.0}), bad]
    lines[0]["seconds"] = lines[1]["seconds"] = {EVIL: 0.5, "compute": 0.5}
    lines += [evaluation_line(1, **{EVIL: 1.0}), evaluation_line(2, **{EVIL: 1.0})]
    job = json.dumps({"name": EVIL, "strategy": {"name": EVIL}})  # JSON is YAML
    trace = make_trace() | {"schedule": EVIL}
    result = {"status": EVIL, "error": EVIL}
    path = write_run(tmp_path, lines, job=job, result=result, trace=trace, name="run<b>")
    assert run(["report", str(path)]) == 0
    text = page_of(path)
    assert "<script" not in text and "<b>" not in text
    assert text.count("&lt;script&gt;alert(1)") >= 10


@pytest.mark.sweep(2)
@pytest.mark.parametrize(
    "name", ["$x$ $", "_hidden", "训练 🚀", "#1a1a1a", "{{ 1 }}", "\\frac", "\x00"]
)
def test_shows_special_names_unchanged(name: str, tmp_path: Path) -> None:
    lines = [step_line(n, seconds={name: 0.5, "compute": 0.5}) for n in range(3)]
    lines += [evaluation_line(1, **{name: 1.0}), evaluation_line(2, **{name: 2.0})]
    path = write_run(tmp_path, [*lines, FAILURE | {"cause": name}])
    assert run(["report", str(path)]) == 0
    text = page_of(path)
    assert f"<title>{name} 1 at 1</title>" in text  # tooltip of a dot
    assert f"({name} 500, compute 500)</title>" in text  # tooltip of a bar
    assert f"<title>after step 3: {name}</title>" in text
    assert f"<h3>{name}</h3>" in text


def test_page_has_light_and_dark_colors(tmp_path: Path) -> None:
    path = write_run(tmp_path, eventful_run(), trace=make_trace())
    assert run(["report", str(path)]) == 0
    text = page_of(path)
    assert "prefers-color-scheme: dark" in text
    style, body = text.split("</style>", 1)
    used = {*re.findall(r"var\(--(\w+)\)", body)}
    assert used == {*THEMED.values()}
    assert all(style.count(f"--{name}:") == 2 for name in used)
    assert not [color for color in THEMED if color in body]


def test_prints_the_table_without_jinja2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(sys.modules, "distplat.cli.report_page", raising=False)
    monkeypatch.setitem(sys.modules, "jinja2", None)
    path = write_run(tmp_path, eventful_run())
    assert run(["report", str(path)]) == 2
    printed = capsys.readouterr()
    assert "compute 60%" in printed.out
    assert "jinja2 is not installed" in printed.err
    assert "pip install 'distplat[report]'" in printed.err
    assert run(["report", str(path), "-o", "json"]) == 2
    assert json.loads(capsys.readouterr().out)["page"] is None
    assert not (path / "report.html").exists()


def test_run_without_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_run(tmp_path)
    assert run(["report", str(path)]) == 0
    assert "RUNNING: last line" in capsys.readouterr().out
    assert "No step has been made yet" in page_of(path)


@pytest.mark.parametrize("count", [1, 2, 700])
def test_draws_any_number_of_steps(count: int, tmp_path: Path) -> None:
    path = write_run(tmp_path, [step_line(n, figures={"staleness": n % 3}) for n in range(count)])
    assert run(["report", str(path)]) == 0
    assert "Staleness" in page_of(path)


def test_diverged_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [step_line(n, loss=1.0 if n < 3 else None) for n in range(6)]
    lines.append(evaluation_line(6) | {"metrics": {"loss": None, "accuracy": None}})
    path = write_run(tmp_path, lines)
    assert run(["report", str(path)]) == 0
    assert "not a number" in capsys.readouterr().out
    page_of(path)


def test_values_too_large_for_an_axis(tmp_path: Path) -> None:
    """Diverging sums of doubles reach such values, and matplotlib raises for them."""
    huge = {"compute": 1e300, "data": 1e300}
    lines = [step_line(n, loss=10.0 ** (308 * n), seconds=huge) for n in range(2)]
    lines += [
        evaluation_line(n + 1) | {"metrics": {"loss": -1e308 if n else 1e308}} for n in range(2)
    ]
    path = write_run(tmp_path, lines)
    assert run(["report", str(path)]) == 0
    page_of(path)


def test_page_redacts_secrets(tmp_path: Path) -> None:
    args: dict[str, Any] = {
        "hf_token": "canary-1",
        "nested": [{"API-KEY": "canary-2"}],
        "pad_token": "shown-1",
    }
    args |= {"where": "postgres://me:canary-3@db/x", "max_tokens": 512}
    path = write_run(tmp_path, [step_line(0)], job=json.dumps({"name": "lin", "task_args": args}))
    assert run(["report", str(path)]) == 0
    text = page_of(path)
    assert "canary" not in text
    assert "shown-1" in text and "max_tokens: 512" in text


def test_failed_run_has_the_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    error = "Traceback\n  boom\n\nyour task failed on rank 1"
    path = write_run(tmp_path, [step_line(0)], result={"status": "FAILED", "error": error})
    assert run(["report", str(path)]) == 0
    assert "your task failed on rank 1" in capsys.readouterr().out
    assert "Traceback\n  boom" in page_of(path)


def test_pipeline_shows_measured_and_ideal_step(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = make_trace(stages=2, micro_batches=4, replicas=2, late_s=0.5, reduce_s=1.0)
    path = write_run(tmp_path, [step_line(0)], trace=trace)
    assert run(["report", str(path)]) == 0
    assert "replica 1, step 5" in capsys.readouterr().out
    text = page_of(path)
    assert text.count(">measured: ") == text.count(">ideal: ") == 2
    assert "F0: 0 to 1000 ms</title>" in text  # a tooltip
    assert "Textbook bubble" in text and "20.0%" in text
    assert "reduce (below)" in text


def test_invalid_trace_is_reported_on_the_page(tmp_path: Path) -> None:
    path = write_run(tmp_path, [step_line(0)], trace=make_trace() | {"stages": 1})
    assert run(["report", str(path)]) == 0
    assert "makes no sense: an event of stage 1" in page_of(path)
    assert not (path / "pipeline_perfetto.json").exists()


def test_writes_perfetto_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_run(tmp_path, [step_line(0)], trace=make_trace(late_s=0.5, reduce_s=1.0))
    assert run(["report", str(path)]) == 0
    assert str(path / "pipeline_perfetto.json") in capsys.readouterr().out
    events = json.loads((path / "pipeline_perfetto.json").read_text())["traceEvents"]
    names = {e["args"]["name"] for e in events if e["name"] == "process_name"}
    assert names == {"replica 0, stage 0 (rank 0)", "replica 0, stage 1 (rank 1)"}
    assert {e["cat"] for e in events if e["ph"] == "X"} == {"F", "B", "reduce"}


def test_empty_trace(tmp_path: Path) -> None:
    path = write_run(tmp_path, [step_line(0)], trace=make_trace() | {"events": []})
    assert run(["report", str(path)]) == 0
    page_of(path)


def test_pipeline_without_trace(tmp_path: Path) -> None:
    path = write_run(tmp_path, [step_line(0)], job="strategy: {name: hybrid, pipeline: 2}")
    assert run(["report", str(path)]) == 0
    assert "there is no pipeline_trace.json" in page_of(path)


def test_damaged_result_is_reported_on_the_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_run(tmp_path, [step_line(0)])
    (path / "result.json").write_text("{")
    assert run(["report", str(path)]) == 0
    assert "result.json is damaged" in capsys.readouterr().out
    assert "result.json is damaged" in page_of(path)


def test_rejects_folders_without_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["report", str(tmp_path / "nothing")]) == 2
    assert run(["report", str(tmp_path)]) == 2
    assert "holds no run" in capsys.readouterr().err


def test_failed_write_exits_with_5(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_run(tmp_path, [step_line(0)])
    (path / "report.html").mkdir()
    assert run(["report", str(path)]) == 5
    assert "cannot write" in capsys.readouterr().err
