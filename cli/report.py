"""`distplat report`: what a run came to, as a page beside it and as a table."""

import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from distplat.cli.options import Output, is_json
from distplat.platform.errors import StorageError
from distplat.platform.run_record import RunRecord, find_run, read_run

PAGE = "report.html"


def report(
    run_directory: Annotated[
        Path, typer.Argument(metavar="RUN", help="Its directory, or its name below runs/.")
    ],
    output: Output = "text",
) -> None:
    """
    Say what a run came to, and write report.html beside its results.

    Works on runs that failed or still go on: with what there is so far.
    """
    from distplat.cli.render import print_pairs, to_json
    from distplat.cli.report_page import page

    as_json = is_json(output)
    record, now = read_run(find_run(run_directory)), time.time()
    path = record.path / PAGE
    _write(path, page(record, now))
    found = _rows(record, now)
    if as_json:
        print(to_json(_facts(record, now) | {"page": str(path)}))
        return
    print_pairs([*found, ("page", str(path))])


def _write(path: Path, text: str) -> None:
    partial = path.with_suffix(".partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror}") from error


def _rows(record: RunRecord, now: float) -> list[tuple[str, str]]:
    from distplat.cli.figures import figure_rows, mean_figures
    from distplat.cli.report_words import facts, restart_lines
    from distplat.platform.report import restarts, status_of, time_parts

    status = status_of(record, now)
    rows = [("run", record.path.name)]
    rows.append(("status", f"{status.word}: {status.detail}" if status.detail else status.word))
    if status.error:
        rows.append(("error", status.error.strip().splitlines()[-1]))
    rows += facts(record)
    parts = time_parts(record.steps)
    if parts:
        rows.append(("time", ", ".join(f"{part.name} {part.share:.0%}" for part in parts)))
    rows += figure_rows(mean_figures(record.steps))
    for attempt, step, cause, replaced, back in restart_lines(restarts(record)):
        first = cause.splitlines()[0]
        rows.append((f"attempt {attempt}", f"after step {step}: {first}; {replaced}, {back}"))
    rows += _pipeline(record)
    return rows + [("note", note) for note in record.notes]


def _pipeline(record: RunRecord) -> list[tuple[str, str]]:
    from distplat.strategies.algorithms.gantt import gantts

    if record.trace is None:
        return []
    try:
        found = gantts(record.trace)
    except ValueError as error:
        return [("pipeline", f"pipeline_trace.json makes no sense: {error}")]
    rows = []
    for one in found:
        ideal = f", ideal {one.ideal.bubble:.1%}" if one.ideal else ""
        text = f"replica {one.replica}, step {record.trace.step}: {one.pipeline_s * 1e3:.1f} ms"
        rows.append(("pipeline", f"{text}, bubble {one.bubble:.1%}{ideal}"))
    return rows


def _facts(record: RunRecord, now: float) -> dict[str, object]:
    from distplat.platform.report import figure_rows, metrics, restarts, status_of, time_parts

    status = status_of(record, now)
    last = record.steps[-1] if record.steps else None
    return {
        "run": record.path.name,
        "status": status.word,
        "error": status.error or None,
        "steps": last.step if last else 0,
        "of": last.of if last else 0,
        "loss": last.loss if last else None,
        "evaluations": {m.name: m.points[-1][1] for m in metrics(record.evaluations)},
        "time_s": {part.name: part.total_s for part in time_parts(record.steps)},
        "figures": {row.name: row.mean for row in figure_rows(record.steps)},
        "restarts": [
            {
                "attempt": one.setback.attempt,
                "step": one.setback.step,
                "cause": one.setback.cause,
                "replaced": list(one.setback.replaced),
                "seconds": one.recovery.seconds if one.recovery else None,
            }
            for one in restarts(record)
        ],
        "resizes": [asdict(one) for one in record.resizes],
        "pipeline": _pipeline_facts(record),
        "notes": record.notes,
    }


def _pipeline_facts(record: RunRecord) -> list[dict[str, object]]:
    from distplat.strategies.algorithms.gantt import gantts

    try:
        found = gantts(record.trace) if record.trace else []
    except ValueError:
        return []
    return [
        {
            "replica": one.replica,
            "step_s": one.step_s,
            "pipeline_s": one.pipeline_s,
            "bubble": one.bubble,
            "ideal_pipeline_s": one.ideal.makespan if one.ideal else None,
            "ideal_bubble": one.ideal.bubble if one.ideal else None,
        }
        for one in found
    ]
