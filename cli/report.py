"""`distplat report`: a report of a run, as an HTML page in its directory and as a table."""

import json
import os
import secrets
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from distplat.cli.common_options import Output, is_json, report_extra
from distplat.cli.figures import facts, figure_rows, mean_figures, restart_lines, strategy
from distplat.cli.render import print_pairs
from distplat.cli.run_folders import last_run
from distplat.platform import run_report
from distplat.platform.disk import FILE_MODE
from distplat.platform.errors import SpecError, StorageError
from distplat.platform.progress import first_line, to_json
from distplat.platform.run_record import RunRecord, find_run, read_run

if TYPE_CHECKING:
    from distplat.strategies.algorithms.gantt import Gantt

PAGE = "report.html"
PERFETTO = "pipeline_perfetto.json"


def report(
    run_directory: Annotated[
        Path,
        typer.Argument(
            metavar="RUN",
            help="Directory of a run, its name below runs/, or the name of a job (its newest run).",
        ),
    ],
    output: Output = "text",
) -> None:
    """
    Print the metrics of a run, and write report.html to its directory.

    Failed and running runs are supported, with the data recorded so far. The page needs the extra
    `report`; without it only the metrics are printed. For a pipeline, pipeline_perfetto.json is
    written for ui.perfetto.dev as well.
    """
    as_json = is_json(output)
    record, now = read_run(_run_of(run_directory)), time.time()
    pipeline, problem = _pipeline(record)
    written: dict[str, Path] = {}
    missing: SpecError | None = None
    if record.trace is not None and not problem:
        from distplat.strategies.algorithms.gantt import chrome_trace

        text = json.dumps(chrome_trace(record.trace, pipeline))
        written["perfetto"] = write_new(record.path / PERFETTO, text)
    try:
        with report_extra():
            from distplat.cli.report_page import page
        written["page"] = write_new(record.path / PAGE, page(record, now, pipeline, problem))
    except SpecError as error:
        missing = error
    if as_json:
        paths = {name: str(path) for name, path in written.items()}
        print(to_json(_facts(record, now, pipeline) | {"page": None} | paths))
    else:
        rows = _rows(record, now) + _pipeline_rows(record, pipeline, problem)
        rows += [("note", note) for note in record.notes]
        print_pairs([*rows, *((name, str(path)) for name, path in written.items())])
    if missing:
        raise missing


def _run_of(given: Path) -> Path:
    """
    Return the directory of a run, by its path, its name below `runs/`, or its job (newest run).

    Raises:
        SpecError: there is no such run.
    """
    newest = last_run(str(given))
    return find_run(given) if newest is None else newest.resolve()


def write_new(path: Path, text: str) -> Path:
    """
    Write a file atomically, under a random temporary name: a foreign run may contain links.

    Raises:
        StorageError: the file cannot be written.
    """
    partial = path.with_name(f"{path.name}.{secrets.token_hex(8)}.partial")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
    try:
        try:
            with os.fdopen(os.open(partial, flags, FILE_MODE), "wb") as file:
                file.write(text.encode("utf-8", errors="replace"))
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror}") from error
    return path


def _pipeline(record: RunRecord) -> "tuple[list[Gantt], str]":
    """Return the traced step of each replica, and the problem of an unusable trace."""
    from distplat.strategies.algorithms.gantt import gantts

    if record.trace is None:
        hybrid = strategy(record).startswith("hybrid")
        return [], "No step is traced: there is no pipeline_trace.json." if hybrid else ""
    try:
        return gantts(record.trace), ""
    except ValueError as error:
        return [], f"pipeline_trace.json makes no sense: {error}"


def _rows(record: RunRecord, now: float) -> list[tuple[str, str]]:
    status = run_report.status_of(record, now)
    rows = [("run", record.path.name)]
    rows.append(("status", f"{status.word}: {status.detail}" if status.detail else status.word))
    if status.error.strip():
        rows.append(("error", status.error.strip().splitlines()[-1]))
    rows += facts(record)
    parts = run_report.phase_times(record.steps, record.every)
    if parts:
        rows.append(("time", ", ".join(f"{part.name} {part.share:.0%}" for part in parts)))
    rows += figure_rows(mean_figures(record.steps))
    for attempt, step, cause, replaced, back in restart_lines(run_report.restarts(record)):
        rows.append(
            (f"attempt {attempt}", f"after step {step}: {first_line(cause)}; {replaced}, {back}")
        )
    return rows


def _pipeline_rows(
    record: RunRecord, pipeline: "list[Gantt]", problem: str
) -> list[tuple[str, str]]:
    if problem:
        return [("pipeline", problem)]
    step = record.trace.step if record.trace else 0
    rows = []
    for gantt in pipeline:
        ideal = f", ideal {gantt.ideal.bubble:.1%}" if gantt.ideal else ""
        text = f"replica {gantt.replica}, step {step}: {gantt.pipeline_s * 1e3:.1f} ms"
        rows.append(("pipeline", f"{text}, bubble {gantt.bubble:.1%}{ideal}"))
    return rows


def _facts(record: RunRecord, now: float, pipeline: "list[Gantt]") -> dict[str, object]:
    status = run_report.status_of(record, now)
    last = record.steps[-1] if record.steps else None
    return {
        "run": record.path.name,
        "status": status.word,
        "error": status.error or None,
        "steps": last.step if last else 0,
        "of": last.of if last else 0,
        "loss": last.loss if last else None,
        "evaluations": {m.name: m.points[-1][1] for m in run_report.metrics(record.evaluations)},
        "time_s": {
            part.name: part.total_s for part in run_report.phase_times(record.steps, record.every)
        },
        "figures": {row.name: row.mean for row in run_report.figure_rows(record.steps)},
        "restarts": [
            {
                "attempt": restart.failure.attempt,
                "step": restart.failure.step,
                "cause": restart.failure.cause,
                "replaced": list(restart.failure.replaced),
                "seconds": restart.recovery.seconds if restart.recovery else None,
            }
            for restart in run_report.restarts(record)
        ],
        "resizes": [asdict(resize) for resize in record.resizes],
        "pipeline": _pipeline_facts(pipeline),
        "notes": record.notes,
    }


def _pipeline_facts(pipeline: "list[Gantt]") -> list[dict[str, object]]:
    return [
        {
            "replica": gantt.replica,
            "step_s": gantt.step_s,
            "pipeline_s": gantt.pipeline_s,
            "bubble": gantt.bubble,
            "ideal_pipeline_s": gantt.ideal.makespan if gantt.ideal else None,
            "ideal_bubble": gantt.ideal.bubble if gantt.ideal else None,
        }
        for gantt in pipeline
    ]
