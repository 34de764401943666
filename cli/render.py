"""
Output of commands: tables or JSON for the result of a run and for the list of strategies.

Tables are printed with rich: bold and coloured on a terminal, aligned text elsewhere. rich honours
NO_COLOR, FORCE_COLOR and TERM. Piped output has ANSI codes only with FORCE_COLOR, and its lines are
not wrapped, so that programs can parse it.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError, with_config
from pydantic.fields import FieldInfo
from pydantic_core import to_jsonable_python
from rich.console import Console
from rich.table import Table
from rich.text import Text
from typing_extensions import TypedDict

from distplat.actors.view import has_colors, is_terminal, terminal_console
from distplat.cli.figures import figure_rows, restart_text
from distplat.platform.checkpoints import FOLDER
from distplat.platform.errors import printable
from distplat.platform.progress import number_text, resize_text, steps_text, to_json
from distplat.platform.spec import Job
from distplat.strategies.catalog import strategies

if TYPE_CHECKING:
    from distplat.actors.result import Result


_UNWRAPPED = 1_000_000
"""Line width of output that is not printed to a terminal."""


def terminal() -> Console | None:
    """Return the console for coloured stdout; None: stdout is a file or pipe for plain text."""
    if is_terminal(sys.stdout):
        return terminal_console(sys.stdout)
    return Console(width=_UNWRAPPED) if has_colors(sys.stdout) else None


def print_pairs(rows: Sequence[tuple[str, str]]) -> None:
    """Print names and values."""
    table = _table((), rows)
    table.columns[0].style = "bold"
    _print(table)


def print_table(
    heads: Sequence[str], rows: Sequence[Sequence[str]], styles: Sequence[str] = ()
) -> None:
    """
    Print a table.

    Args:
        heads: headers of the columns.
        rows: cells of each row.
        styles: rich style of each row; empty: no styles.
    """
    _print(_table(heads, rows, styles))


def table_lines(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return a table as plain lines, without trailing spaces."""
    return _lines(_table(heads, rows))


def _table(
    heads: Sequence[str], rows: Sequence[Sequence[str]], styles: Sequence[str] = ()
) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=bool(heads), header_style="bold")
    for head in heads or ("",) * len(rows[0]):
        table.add_column(Text(printable(head)), overflow="fold")
    for number, row in enumerate(rows):
        table.add_row(
            *(Text(printable(cell)) for cell in row), style=styles[number] if styles else None
        )
    return table


def _print(table: Table) -> None:
    console = terminal()
    if console is not None:
        console.print(table)
    else:
        print(printable("\n".join(_lines(table))))


def _lines(table: Table) -> list[str]:
    console = Console(width=_UNWRAPPED, color_system=None, force_terminal=False)
    with console.capture() as shown:
        console.print(table)
    return [line.rstrip() for line in shown.get().rstrip("\n").split("\n")]


@with_config(ConfigDict(extra="forbid"))
class Facts(TypedDict):
    """Result of a run, as printed by `-o json`."""

    status: str
    name: str
    strategy: str
    num_workers: int
    steps: int
    seconds: float
    metrics: Mapping[str, float | None]
    samples_per_s: float | None
    time_split: dict[str, float]
    figures: Mapping[str, float | None]
    checkpoints: list[int]
    restarts: list[str]
    resizes: list[str]
    run_directory: str
    stopped: str | None
    best_checkpoint: str | None
    url: str | None
    model: str | None


def facts_of(job: Job, result: Result) -> Facts:
    """Return the result of a run as JSON values."""
    totals = result.totals
    split, busy = totals.seconds, sum(totals.seconds.values())
    return {
        "status": "SUCCEEDED",
        "name": job.name,
        "strategy": job.strategy.name,
        "num_workers": job.scaling.num_workers,
        "steps": totals.steps,
        "seconds": round(result.seconds, 3),
        "metrics": result.metrics,
        "samples_per_s": round(totals.samples / busy, 1) if busy else None,
        "time_split": {part: round(s / busy, 4) for part, s in split.items()} if busy else {},
        "figures": totals.figures,
        "checkpoints": [saved.step for saved in result.checkpoints],
        "restarts": [restart_text(failure) for failure in result.failures],
        "resizes": [resize_text(resize) for resize in result.resizes],
        "run_directory": str(result.path),
        "stopped": result.stopped,
        "best_checkpoint": str(result.best_checkpoint) if result.best_checkpoint else None,
        "url": result.url,
        "model": str(result.checkpoint) if result.checkpoint else None,
    }


def print_result(facts: Facts) -> None:
    """Print the result of a run to stdout: a table on a terminal, aligned text elsewhere."""
    print_pairs(_rows(facts))


def read_facts(text: str) -> Facts | None:
    """Parse the JSON of `Facts`; None: other text, since user code may print the same prefix."""
    try:
        return TypeAdapter(Facts).validate_json(text, strict=True)
    except ValidationError:
        return None


def _rows(facts: Facts) -> list[tuple[str, str]]:
    workers = facts["num_workers"]
    metrics = {name: number_text(value) for name, value in facts["metrics"].items()}
    rows = [
        ("strategy", facts["strategy"]),
        ("workers", str(workers) if workers else "0 (in this process)"),
        ("steps", steps_text(facts["steps"])),
        *([("stopped early", facts["stopped"])] if facts["stopped"] else []),
        *([("final loss", metrics.pop("loss"))] if "loss" in metrics else []),
    ]
    if metrics:
        figures = [f"{name.removeprefix('eval_')} {shown}" for name, shown in metrics.items()]
        rows.append(("evaluation", "  ".join(figures)))
    if facts["samples_per_s"]:
        shares = [f"{part} {share:.0%}" for part, share in facts["time_split"].items()]
        rows += [("speed", f"{facts['samples_per_s']:.0f} samples/s"), ("time", ", ".join(shares))]
    finite = {name: value for name, value in facts["figures"].items() if value is not None}
    rows += figure_rows(finite)
    for name, texts in (("restarts", facts["restarts"]), ("resizes", facts["resizes"])):
        rows += [("" if n else name, text) for n, text in enumerate(texts)]
    if steps := facts["checkpoints"]:
        folder = f"{facts['run_directory']}/{FOLDER}"
        text = f"{len(steps)} written, the last of step {steps[-1]}, in {folder}"
        rows.append(("checkpoints", text))
    if facts["best_checkpoint"]:
        rows.append(("best checkpoint", facts["best_checkpoint"]))
    rows += [("took", f"{facts['seconds']:.1f} s"), ("run directory", facts["run_directory"])]
    if facts["url"]:
        rows.append(("copy", facts["url"]))
    if facts["model"]:
        rows.append(("model", facts["model"]))
    return rows


_NO_LIMIT = 2**40  # an upper bound from here on means that the field has no practical limit
_SIGNS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}


def print_strategies(*, as_json: bool) -> None:
    """Print the strategies, and their options with type, default and description."""
    described = [_described(name) for name in strategies.names()]
    if as_json:
        print(to_json(described))
        return
    for number, strategy in enumerate(described):
        print(printable(f"{chr(10) if number else ''}{strategy['name']}  {strategy['summary']}"))
        for option in strategy["options"]:
            print(printable(f"    {option['name']}: {option['type']}, default {option['default']}"))
            print(printable(f"        {option['description']}"))


def _described(name: str) -> dict[str, Any]:
    cls = strategies.get(name)
    return {"name": name, "summary": cls.summary, "options": field_rows(cls.options_type)}


def field_rows(model: type[BaseModel]) -> list[dict[str, Any]]:
    """Return name, type, default and description of a model's fields, for the user."""
    schema = model.model_json_schema()
    return [
        {
            "name": name,
            "type": " ".join([_type(schema["properties"][name]), *_bounds(field)]),
            "default": "required"
            if field.is_required()
            else to_jsonable_python(field.get_default(call_default_factory=True)),
            "description": " ".join((field.description or "").split()),
        }
        for name, field in model.model_fields.items()
    ]


def _bounds(field: FieldInfo) -> list[str]:
    """Return `1 to 256` or `> 0`; the JSON schema lacks the bounds of fields with validators."""
    bounds = {sign: getattr(m, sign) for m in field.metadata for sign in _SIGNS if hasattr(m, sign)}
    if upper_bounds := [m.le for m in field.metadata if hasattr(m, "le")]:
        bounds["le"] = min(upper_bounds)
    if bounds.get("le", 0) >= _NO_LIMIT:
        del bounds["le"]
    if {"ge", "le"} <= bounds.keys():
        return [f"{_shown(bounds['ge'])} to {_shown(bounds['le'])}"]
    texts = [f"{_SIGNS[sign]} {_shown(bound)}" for sign, bound in bounds.items()]
    return [", ".join(texts)] if texts else []


def _shown(bound: float) -> str:
    return str(bound) if isinstance(bound, int) else f"{bound:g}"


def _type(schema: dict[str, Any]) -> str:
    """Return the type of a JSON schema as text: `integer`, `'gloo' or 'nccl'`."""
    if "anyOf" in schema:
        return " or ".join(_type(part) for part in schema["anyOf"])
    if "const" in schema:
        return repr(schema["const"])
    if "enum" in schema:
        return " or ".join(map(repr, schema["enum"]))
    if isinstance(inner := schema.get("additionalProperties"), dict):
        return f"mapping of text to {_type(inner)}"
    if "items" in schema:
        return f"list of {_type(schema['items'])}"
    return str(schema.get("type", "any"))
