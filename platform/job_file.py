"""
Reads a job from YAML, the environment and `--set`, validates it, and writes it back as YAML.

Later layers override earlier ones: file, environment, `--set`. All problems are reported at once,
each with the position of its field: a line of the file, a variable, or an override. Like `git
config --show-origin`, the layers remember the origin of each value.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from distplat.platform.errors import Problem, SpecError
from distplat.platform.own_loop import OF_TASKS
from distplat.platform.spec import Job, StrategyField, StrategySpec
from distplat.platform.spec_messages import format_value, problems_of
from distplat.platform.yaml_source import (
    MAX_BYTES,
    MAX_DEPTH,
    FieldPath,
    dump_yaml,
    parse_yaml,
    too_large,
)

ENV_PREFIX = "DISTPLAT_"

SourcePosition = tuple[str, int, int]
"""File, line and column; for values outside a file: name of the variable or override, 0 and 0."""

_STRATEGY_NAME = {("strategy",), ("strategy", "name")}
_STRATEGY: TypeAdapter[StrategySpec] = TypeAdapter(StrategyField)
Check = Callable[[Job], list[Problem]]
StrategyCheck = Callable[[StrategySpec], list[Problem]]


def _no_problems(job: Job | StrategySpec) -> list[Problem]:
    return []


def read_job(
    path: Path,
    *,
    overrides: Sequence[str] = (),
    environ: Mapping[str, str] = {},
    check: Check = _no_problems,
    check_strategy: StrategyCheck = _no_problems,
) -> Job:
    """
    Read and validate a job file.

    Args:
        path: the YAML file.
        overrides: `a.b=c` with YAML values, of the highest priority. A new name for `strategy`
            drops the options of the file's strategy.
        environ: variables; `DISTPLAT_SCALING__NUM_WORKERS=4` overrides the file. Names are read in
            lower case: a key with capitals, as in `resources_per_worker`, must be part of the value
            of its parent field.
        check: further checks of the whole job.
        check_strategy: those of `check` that need only the strategy; called when the rest of the
            job is invalid, so that all problems are reported at once.

    Raises:
        SpecError: the job is invalid; holds all problems.
    """
    file = str(path)
    data, marks = parse_yaml(read_text(path), file)
    if data is None:
        raise _unreadable(path, "is empty; a job needs at least name, strategy and optimizer")
    if not isinstance(data, dict):
        raise _unreadable(path, f"must be a mapping of fields (got {format_value(data)})")
    draft = _Draft(file, data, {where: (file, *mark) for where, mark in marks.items()})
    problems = draft.apply(_from_environment(environ))
    settings, unreadable = _from_overrides(overrides)
    return _validated(
        draft, [*problems, *unreadable, *draft.apply(settings)], check, check_strategy
    )


def job_of(
    data: Mapping[str, object],
    *,
    check: Check = _no_problems,
    check_strategy: StrategyCheck = _no_problems,
) -> Job:
    """
    Build a job from plain values; problems have no file positions.

    Args:
        data: the values.
        check: see `read_job`.
        check_strategy: see `read_job`.

    Raises:
        SpecError: the job is invalid; holds all problems.
    """
    if not isinstance(data, Mapping):
        raise SpecError(f"a job must be a mapping of fields (got {format_value(data)})")
    return _validated(_Draft("", dict(data)), [], check, check_strategy)


def render_job(job: Job) -> str:
    """
    Serialize a job as YAML, in the order of its fields, with all defaults that have an effect.

    Raises:
        SpecError: a value from Python has no form in YAML.
    """
    unused: dict[str, Any] = {
        "lr_schedule": job.lr_schedule.unused_fields(),
        "evaluation": job.evaluation.unused_fields(),
        "data": job.data.unused_fields(),
        **dict.fromkeys(OF_TASKS if job.own_loop else ["own_loop"], True),
    }
    data = job.model_dump(exclude=unused)
    data["strategy"] = {"name": job.strategy.name, **job.strategy.options}
    return dump_yaml(_plain(data, ()))


@dataclass(frozen=True)
class _Setting:
    """A value from outside the file."""

    path: FieldPath
    source: str
    """Its name in messages: `DISTPLAT_SEED`, `--set seed`."""
    text: str
    """The value as YAML."""


@dataclass
class _Draft:
    """Unvalidated values of a job, with their positions. Owns and modifies `data`."""

    file: str
    """Name of the lowest layer; empty: not a file."""
    data: dict[str, object]
    positions: dict[FieldPath, SourcePosition] = field(default_factory=dict)

    def apply(self, settings: Sequence[_Setting]) -> list[Problem]:
        """
        Apply one layer on top; return the problems of settings that could not be applied.

        A strategy's new name is applied before its options, in whatever order they are given,
        because it drops the options of the lower layers, which were for another strategy.
        """
        problems: list[Problem] = []
        for setting in sorted(settings, key=lambda setting: setting.path not in _STRATEGY_NAME):
            try:
                value, _ = parse_yaml(setting.text, setting.source)
                self._set(setting.path, value, setting.source)
            except SpecError as error:
                problems.extend(error.problems)
        return problems

    def locate(self, problem: Problem) -> Problem:
        """Add the position of the problem's field, or of its nearest parent, to a problem."""
        if problem.file:
            return problem
        for length in range(len(problem.where), 0, -1):
            position = self.positions.get(problem.where[:length])
            if position is not None:
                return replace(problem, file=position[0], line=position[1], column=position[2])
        return replace(problem, file=self.file)

    def _set(self, path: FieldPath, value: object, source: str) -> None:
        """
        Set one field, and create its parent mappings.

        Raises:
            SpecError: a parent is not a mapping, or the field is nested too deeply.
        """
        if len(path) > MAX_DEPTH:
            raise SpecError(Problem((), f"nested deeper than {MAX_DEPTH}", file=source))
        if path[0] == "strategy":
            path = self._open_strategy(path, value, source)
        mapping = self.data
        for length, part in enumerate(path[:-1], 1):
            inner = mapping.get(str(part))
            if inner is None:
                inner = {}
                self.positions[path[:length]] = (source, 0, 0)
            if not isinstance(inner, dict):
                parent = ".".join(map(str, path[:length]))
                message = f"cannot be set: {parent} is {format_value(inner)}, not a mapping"
                raise SpecError(Problem(path, message, file=source))
            mapping[str(part)] = inner
            mapping = inner
        mapping[str(path[-1])] = value
        self._set_origin(path, source)

    def _open_strategy(self, path: FieldPath, value: object, source: str) -> FieldPath:
        """Convert `strategy` to a mapping, and drop the options of a replaced strategy."""
        present = self.data.get("strategy")
        if isinstance(present, str):
            present = self.data["strategy"] = {"name": present}
        if path == ("strategy",) and isinstance(value, str):
            path = ("strategy", "name")
        same = isinstance(present, dict) and present.get("name") == value
        if path == ("strategy", "name") and not same:
            self.data["strategy"] = {}
            self._set_origin(("strategy",), source)
        return path

    def _set_origin(self, path: FieldPath, source: str) -> None:
        """Set `source` as the origin of a field and all fields below."""
        below = [position for position in self.positions if position[: len(path)] == path]
        for position in below:
            del self.positions[position]
        self.positions[path] = (source, 0, 0)


def _from_environment(environ: Mapping[str, str]) -> list[_Setting]:
    """Parse variables: `DISTPLAT_SCALING__NUM_WORKERS=4` sets `scaling.num_workers`."""
    return [
        _Setting(tuple(name.removeprefix(ENV_PREFIX).lower().split("__")), name, text)
        for name, text in sorted(environ.items())
        if name.startswith(ENV_PREFIX)
    ]


def _from_overrides(overrides: Sequence[str]) -> tuple[list[_Setting], list[Problem]]:
    """Parse `a.b=c` overrides; also return the problems of invalid ones."""
    settings, problems = [], []
    for override in overrides:
        name, equals, text = override.partition("=")
        path = tuple(part.strip() for part in name.split("."))
        if equals and all(path):
            settings.append(_Setting(path, f"--set {'.'.join(path)}", text))
        else:
            message = f"must be field=value or field.subfield=value (got {format_value(override)})"
            problems.append(Problem((), message, file="--set"))
    return settings, problems


def _validated(
    draft: _Draft, problems: list[Problem], check: Check, check_strategy: StrategyCheck
) -> Job:
    """
    Validate the merged layers.

    Args:
        draft: the layers.
        problems: problems found so far.
        check: see `read_job`.
        check_strategy: see `read_job`.

    Raises:
        SpecError: there is a problem.
    """
    job = None
    try:
        job = Job.model_validate(draft.data)
    except ValidationError as error:
        problems = problems + problems_of(error, Job)
        with suppress(ValidationError):  # reported among these problems already
            problems += check_strategy(_STRATEGY.validate_python(draft.data.get("strategy")))
    if job is not None:
        problems = problems + job.problems() + check(job)
    if job is None or problems:
        located = [draft.locate(problem) for problem in problems]
        raise SpecError(*sorted(located, key=lambda problem: (problem.line, problem.column)))
    return job


def read_text(path: Path) -> str:
    """
    Read a text file of limited size.

    Raises:
        SpecError: it cannot be read, or is not text.
    """
    try:
        if path.is_dir():
            raise _unreadable(path, "is a directory, not a file")
        if path.exists() and not path.is_file():  # reading a pipe or a device may never end
            raise _unreadable(path, "is not a regular file")
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise _unreadable(path, "there is no such file") from None
    except OSError as error:
        raise _unreadable(path, f"cannot be read: {error.strerror}") from error
    if len(raw) > MAX_BYTES:
        raise too_large(str(path))
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        message = f"is not UTF-8 text (byte 0x{raw[error.start]:02x} at {error.start})"
        raise _unreadable(path, message) from error
    if "\0" in text:
        raise _unreadable(path, f"is not a text file (byte 0x00 at {text.index(chr(0))})")
    return text


def _unreadable(path: Path, message: str) -> SpecError:
    return SpecError(Problem((), message, file=str(path)))


def _plain(value: object, where: FieldPath) -> object:
    """
    Convert tuples to lists.

    Raises:
        SpecError: a value has no form in YAML.
    """
    if len(where) > MAX_DEPTH:
        raise SpecError(Problem(where[:2], f"nested deeper than {MAX_DEPTH}"))
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: _plain(inner, (*where, key)) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner, (*where, i)) for i, inner in enumerate(value)]
    if value is None or type(value) in (bool, int, float, str):
        return value
    raise SpecError(Problem(where, f"cannot be written as YAML (got {format_value(value)})"))
