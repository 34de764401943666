"""
Reads a run directory, complete or not.

The run may still be running, or may have been interrupted in the middle of a line. Missing or
damaged files are noted and skipped; only a directory without any file of a run is an error.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import IO, Any, Generic, TypeVar

from pydantic import TypeAdapter

from distplat.platform.disk import open_regular
from distplat.platform.errors import Problem, SpecError, StorageError, naming_path, nearest
from distplat.platform.pipeline_trace import TRACE_FILE, Trace
from distplat.platform.progress import (
    KINDS,
    EvalSummary,
    FailureEvent,
    Recovery,
    Resized,
    Saved,
    StepSummary,
)
from distplat.platform.yaml_source import parse_yaml

T = TypeVar("T")
S = TypeVar("S", StepSummary, EvalSummary)

_DAMAGE = (ValueError, TypeError, KeyError, ArithmeticError, RecursionError)
"""Exceptions from damaged lines; the last two from huge numbers and deeply nested JSON."""
_MAX_NUMBER = 2**53
"""Limit for steps, counts and sizes, which a float holds exactly."""
_OLD_FAILURE_KIND = "setback"
"""`kind` of a failure before version 0.1.0."""
_STEP_LINE = re.compile(r'\{"kind": "(step|evaluation)", "step": (\d{1,16}),')
"""Start of a line of a step or an evaluation."""
MAX_STEPS = 20_000
"""Most steps, and most evaluations, in memory; more would take minutes and gigabytes."""
MAX_LINE_BYTES = 2**22
"""Most bytes of a line in memory."""
_MAX_FILE_BYTES = 2**26
"""Size limit of files that are read at once; `metrics.jsonl` is read by lines."""


@dataclass
class RunRecord:
    """Contents of a run directory."""

    path: Path
    job: Mapping[str, Any] = field(default_factory=dict)
    """Contents of `job.yaml`, with all defaults; empty: not readable."""
    steps: list[StepSummary] = field(default_factory=list)
    """Steps in order; of a repeated step, the second. Of a very long run, every `every`-th step and
    the last."""
    every: int = 1
    evaluations: list[EvalSummary] = field(default_factory=list)
    failures: list[FailureEvent] = field(default_factory=list)
    recoveries: list[Recovery] = field(default_factory=list)
    resizes: list[Resized] = field(default_factory=list)
    saved: list[Saved] = field(default_factory=list)
    """Checkpoints, in order; older ones may have been deleted."""
    result: Mapping[str, Any] | None = None
    """Contents of `result.json`; None: the run has not ended, or could not write it."""
    trace: Trace | None = None
    last_sign_s: float | None = None
    """Time of the last write to the metrics, in seconds since 1970."""
    notes: list[str] = field(default_factory=list)
    """Missing or damaged files."""


def find_run(name: Path) -> Path:
    """
    Find a run directory by its name below `runs/`, or by its path.

    Raises:
        SpecError: it does not exist; suggests the nearest name.
    """
    with naming_path(name):
        for path in (Path("runs") / name, name):
            if path.is_dir():
                return path.resolve()
        base = name.parent if name.parent.is_dir() and name.parent != Path() else Path("runs")
        names = [path.name for path in base.iterdir() if path.is_dir()] if base.is_dir() else []
    near = nearest(name.name, names)
    hint = f"did you mean '{base / near}'?" if near else "give the directory that `submit` printed"
    raise SpecError(Problem((), f"{name}: there is no such run directory", hint))


def read_run(path: Path, *, steps: bool = True) -> RunRecord:
    """
    Read a run directory.

    Args:
        path: of the directory.
        steps: whether to read the metrics and the trace; ten million steps take minutes.

    Raises:
        SpecError: it is not a run directory.
        StorageError: a file is not readable.
    """
    with naming_path(path):
        names = {file.name for file in path.iterdir()}
    if names.isdisjoint(("job.yaml", "metrics.jsonl", "result.json")):
        text = f"{path} holds no run: there is no job.yaml, metrics.jsonl or result.json in it"
        raise SpecError(Problem((), text, "give the directory that `submit` printed"))
    record = RunRecord(path)
    record.job = _read_file(record, "job.yaml", _job) or {}
    _read_metrics(record, steps=steps)
    record.result = _read_file(record, "result.json", lambda text: _mapping(json.loads(text)))
    record.trace = _read_file(record, TRACE_FILE, _trace) if steps else None
    if "metrics.jsonl" not in names:
        record.notes.append("metrics.jsonl is missing: no losses and no times")
    if not record.job and "job.yaml" not in names:
        record.notes.append("job.yaml is missing")
    return record


def _text(record: RunRecord, name: str) -> str | None:
    """
    Read a file; None: it does not exist.

    Raises:
        StorageError: it is not readable, is a pipe or a device, or is too large.
    """
    path = record.path / name
    with open_regular(path) as file:
        if file is None:
            return None
        size = os.fstat(file.fileno()).st_size
        if size > _MAX_FILE_BYTES:
            raise StorageError(f"cannot read {path}: it has {size} bytes")
        return file.read().decode("utf-8", errors="replace")


def _lines(file: IO[bytes]) -> Iterator[str]:
    """Yield complete lines; an empty one for each piece of a line that is too long."""
    while line := file.readline(MAX_LINE_BYTES):
        if line.endswith(b"\n"):
            yield line.decode("utf-8", errors="replace")
        elif len(line) == MAX_LINE_BYTES:
            yield ""
        # else the line is being written


def _read_file(record: RunRecord, name: str, parse: Callable[[str], T]) -> T | None:
    """Read and parse one file; None, with a note, if it is damaged."""
    text = _text(record, name)
    if text is None:
        return None
    try:
        return parse(text)
    except (*_DAMAGE, SpecError) as error:
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        record.notes.append(f"{name} is damaged and skipped: {why}")
        return None


def _read_metrics(record: RunRecord, *, steps: bool) -> None:
    with open_regular(record.path / "metrics.jsonl") as file:
        if file is None:
            return
        record.last_sign_s = os.fstat(file.fileno()).st_mtime
        if steps:
            _read_lines(record, file)


def _read_lines(record: RunRecord, file: IO[bytes]) -> None:
    steps, evaluations = _Downsampled[StepSummary](), _Downsampled[EvalSummary]()
    damaged = 0
    events: dict[type, list[Any]] = {
        FailureEvent: record.failures,
        Recovery: record.recoveries,
        Resized: record.resizes,
        Saved: record.saved,
    }
    downsampled: dict[str, _Downsampled[Any]] = {"step": steps, "evaluation": evaluations}
    for line in _skip_dropped(_lines(file), downsampled):
        try:
            summary = _parse_line(json.loads(line))
        except _DAMAGE:
            damaged += 1
            continue
        if isinstance(summary, StepSummary):
            steps.put(summary.step, summary)
        elif isinstance(summary, EvalSummary):
            evaluations.put(summary.step, summary)
        elif type(summary) in events:
            events[type(summary)].append(summary)
    record.steps, record.every = steps.values(), steps.every
    record.evaluations = evaluations.values()
    if steps.every > 1:
        record.notes.append(f"long run: only one in {steps.every} steps is counted")
    if damaged:
        record.notes.append(f"metrics.jsonl: {damaged} damaged lines are skipped")


def _skip_dropped(
    lines: Iterable[str], downsampled: Mapping[str, _Downsampled[Any]]
) -> Iterator[str]:
    """Skip lines that `_Downsampled` would drop, without parsing them, for speed."""
    dropped: dict[str, str] = {}
    for line in lines:
        if (at := _STEP_LINE.match(line)) and int(at[2]) % downsampled[at[1]].every:
            dropped[at[1]] = line
        else:
            yield line
    yield from dropped.values()  # each may be the last line of its kind


class _Downsampled(Generic[S]):
    """Values by step: all, or every second, fourth, ... of too many, and the last."""

    def __init__(self) -> None:
        self.every = 1
        self._by_step: dict[int, S] = {}
        self._last: tuple[int, S] | None = None

    def put(self, step: int, value: S) -> None:
        """Add a value; it replaces an earlier one of the same step."""
        if self._last is None or step >= self._last[0]:
            self._last = step, value
        if step % self.every:
            return
        self._by_step[step] = value
        if len(self._by_step) > MAX_STEPS:
            self.every *= 2
            self._by_step = {s: o for s, o in self._by_step.items() if s % self.every == 0}

    def values(self) -> list[S]:
        """Return the remaining values, in the order of steps."""
        kept = self._by_step | (dict([self._last]) if self._last is not None else {})
        return [kept[step] for step in sorted(kept)]


def _parse_line(line: Any) -> object:
    """Parse one line; None: of an unknown kind."""
    fields = _mapping(line)
    name = fields["kind"]
    kind = KINDS.get("failure" if name == _OLD_FAILURE_KIND else name)
    return None if kind is None else _adapter(kind).validate_python(_checked_numbers(fields))


@cache
def _adapter(kind: type) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def _job(text: str) -> Mapping[str, Any]:
    value, _ = parse_yaml(text, "job.yaml")
    return _mapping(value)


def _trace(text: str) -> Trace:
    fields = _checked_numbers(_mapping(json.loads(text)), least=-1)  # -1: no chunk or micro-batch
    trace: Trace = _adapter(Trace).validate_python(fields)
    for event in trace.events:
        if not -math.inf < event.start_s <= event.end_s < math.inf:
            raise ValueError(f"an event from {event.start_s} to {event.end_s}")
    return trace


def _mapping(value: Any) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"a {type(value).__name__} where names and values belong")
    return value


def _checked_numbers(value: Any, least: int = 0) -> Any:
    """Refuse implausible counts, and convert null to NaN."""
    if isinstance(value, dict):
        return {name: _checked_numbers(item, least) for name, item in value.items()}
    if isinstance(value, list):
        return [_checked_numbers(item, least) for item in value]
    if isinstance(value, int) and not least <= value < _MAX_NUMBER:
        raise ValueError(f"{value:.3g} where a count belongs")
    return math.nan if value is None else value
