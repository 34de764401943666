"""`distplat verify`: compare short runs of a task with plain torch loops; `distplat replay`."""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from distplat.cli.common_options import JobFile, Output, Settings, StrategyFile, WorkingDir, is_json
from distplat.cli.remote import say
from distplat.cli.render import print_pairs, print_table
from distplat.platform.errors import printable
from distplat.platform.progress import to_json

if TYPE_CHECKING:
    from distplat.strategies.verification.verdicts import Row


_STRATEGIES = "Strategies; default: that of the job, ring, ps-sync and hybrid."
StrategyNames = Annotated[str | None, typer.Option(metavar="A,B", help=_STRATEGIES)]
Steps = Annotated[int, typer.Option(min=2, help="Steps of each run.")]
Workers = Annotated[int, typer.Option(min=1, help="Workers of each run.")]
TableOnly = Annotated[bool, typer.Option("-q", "--quiet", help="Print the table only.")]


def verify(
    job_file: JobFile,
    strategies: StrategyNames = None,
    steps: Steps = 20,
    workers: Workers = 2,
    settings: Settings = None,
    strategy_file: StrategyFile = None,
    working_dir: WorkingDir = None,
    output: Output = "text",
    quiet: TableOnly = False,
) -> None:
    """
    Compare short runs of a task with plain torch loops, before a long run.

    Each strategy is compared with a loop over the same parts of each batch (the threshold is the
    rounding noise), with the whole batch in float64 without dropout, and with a second run of
    itself. All runs use a local Ray, without GPUs; no files are left on the disk.

    Exit code 0: no differences. 1: differences. Otherwise that of a strategy's error.
    """
    from distplat.cli.submit import JobSource

    as_json = is_json(output)
    source = JobSource(job_file, settings, strategy_file=strategy_file, working_dir=working_dir)
    job = source.read_with_task()
    from distplat.actors.verifying import VerifyRequest, verify  # torch and Ray

    names = tuple(name.strip() for name in strategies.split(",")) if strategies else ()
    request = VerifyRequest(job, source.folder, names, steps, workers, strategy_file)
    rows = list(verify(request, say if not quiet else lambda line: None))
    if as_json:
        print(to_json([facts(row) for row in rows]))
    else:
        print_rows(rows)
    if code := exit_code(rows):
        raise typer.Exit(code)


def exit_code(rows: Sequence[Row]) -> int:
    """Return 1 if a comparison failed, else the code of the first error, else 0."""
    failed = [row for row in rows if row.failed]
    if any(row.error is None for row in failed):
        return 1
    return next((row.error.exit_code for row in failed if row.error is not None), 0)


def facts(row: Row) -> dict[str, object]:
    """Return a row as JSON values."""
    fields = (
        "strategy",
        "check",
        "verdict",
        "failed",
        "difference",
        "floor",
        "name",
        "step",
        "reason",
    )
    return {field: getattr(row, field) for field in fields}


def print_rows(rows: Sequence[Row]) -> None:
    """Print the table, followed by the reasons of failed comparisons."""
    heads = ("strategy", "check", "verdict", "difference", "noise", "first difference")
    cells = [_cells(row) for row in rows]
    print_table(heads, cells, ["red" if row.failed else "" for row in rows])
    for row in rows:
        if row.reason:
            print(printable(f"\n{row.strategy}, {row.check}: {row.reason}"))
    for row in rows:
        if row.error is not None and row.failed:
            print(printable(f"error: {row.strategy}: {row.error}"), file=sys.stderr)


def _cells(row: Row) -> tuple[str, ...]:
    where = f"{row.name or 'everywhere'}, step {row.step}" if row.step else row.name
    numbers = (_number(row.difference), _number(row.floor))
    return (row.strategy, row.check, row.verdict, *numbers, where)


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return "not finite" if not math.isfinite(value) else f"{value:.1e}"


_SHOWN = 12


def replay(
    run_directory: Annotated[
        Path, typer.Argument(metavar="RUN_DIRECTORY", help="Run directory, as `submit` printed it.")
    ],
    working_dir: Annotated[
        Path, typer.Option(help="Folder of the task's module; default: the current one.")
    ] = Path("."),
    output: Output = "text",
) -> None:
    """
    Repeat a `ps-async` run from its log of updates, in this process.

    Exit code 0: the model is bit-identical. 1: the model differs.
    """
    as_json = is_json(output)
    from distplat.actors.verifying import replay_run  # torch

    result = replay_run(run_directory, working_dir)
    if as_json:
        staleness = [dict(sorted(counts.items())) for counts in result.staleness]
        facts = {**vars(result), "same_bits": result.differing is None, "staleness": staleness}
        print(to_json(facts))
    else:
        verdict = "the same bits"
        if result.differing is not None:
            verdict = f"DIFFERS, first in {result.differing}, by up to {result.difference:.3g}"
        rows = [
            ("run", result.run),
            ("updates", f"{result.updates} on each of {result.shards} shards"),
        ]
        rows += [
            (f"staleness of worker-{rank}", _histogram(counts))
            for rank, counts in enumerate(result.staleness)
        ]
        print_pairs([*rows, ("model", verdict)])
    if result.differing is not None:
        raise typer.Exit(1)


def _histogram(counts: Counter[int]) -> str:
    """`0: 12%  1: 80%  2: 8%`."""
    total = max(1, counts.total())
    parts = [f"{value}: {count / total:.0%}" for value, count in sorted(counts.items())]
    more = ["..."] if len(parts) > _SHOWN else []
    return "  ".join([*parts[:_SHOWN], *more])
