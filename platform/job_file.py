"""
A job from a YAML file, the environment and `--set`, checked as a whole; and back to YAML.

All that is wrong is reported at once, each problem with the place of its field: a line of the
file, a variable, or an override.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from pydantic import ValidationError

from distplat.platform.errors import Problem, SpecError
from distplat.platform.job_layers import Draft, from_environment, from_overrides
from distplat.platform.spec import Job
from distplat.platform.spec_messages import problems_of, show
from distplat.platform.yaml_source import (
    MAX_BYTES,
    MAX_DEPTH,
    FieldPath,
    dump_yaml,
    parse_yaml,
    too_large,
)

Check = Callable[[Job], list[Problem]]


def _nothing_more(job: Job) -> list[Problem]:
    return []


def read_job(
    path: Path,
    *,
    overrides: Sequence[str] = (),
    environ: Mapping[str, str] = {},
    check: Check = _nothing_more,
) -> Job:
    """
    Read a job.

    Args:
        path: the YAML file.
        overrides: `a.b=c`, the values in YAML; they win over all else. A new name for `strategy`
            drops the options that the file gave to the old one.
        environ: variables; `DISTPLAT_SCALING__NUM_WORKERS=4` wins over the file. Names are read
            in lower case: a key with capitals, as in `resources_per_worker`, has to come inside
            the value of the field around it.
        check: finds what the job's own model cannot see.

    Raises:
        SpecError: all that is wrong.
    """
    file = str(path)
    data, marks = parse_yaml(_read_text(path), file)
    if data is None:
        raise _unreadable(path, "is empty; a job needs at least name, strategy and optimizer")
    if not isinstance(data, dict):
        raise _unreadable(path, f"must be a mapping of fields (got {show(data)})")
    draft = Draft(file, data, {where: (file, *mark) for where, mark in marks.items()})
    found = draft.apply(from_environment(environ))
    settings, unread = from_overrides(overrides)
    return _finish(draft, [*found, *unread, *draft.apply(settings)], check)


def job_of(data: Mapping[str, object], *, check: Check = _nothing_more) -> Job:
    """
    Make a job of plain values, with the messages of a job file but without its lines.

    Raises:
        SpecError: all that is wrong.
    """
    if not isinstance(data, Mapping):
        raise SpecError(f"a job must be a mapping of fields (got {show(data)})")
    return _finish(Draft("", dict(data)), [], check)


def render_job(job: Job) -> str:
    """
    Write a job as YAML, in the order of its fields, with all defaults that have an effect.

    Raises:
        SpecError: a value from Python has no form in YAML.
    """
    data = job.model_dump(exclude={"lr_schedule": job.lr_schedule.idle_fields()})
    data["strategy"] = {"name": job.strategy.name, **job.strategy.options}
    return dump_yaml(_plain(data, ()))


def _finish(draft: Draft, found: list[Problem], check: Check) -> Job:
    """
    Validate what all layers gave together.

    Args:
        draft: the layers.
        found: what is known to be wrong already.
        check: see `read_job`.

    Raises:
        SpecError: anything is wrong.
    """
    job = None
    try:
        job = Job.model_validate(draft.data)
    except ValidationError as error:
        found = found + problems_of(error, Job)
    if job is not None:
        found = found + job.problems() + check(job)
    if job is None or found:
        located = [draft.locate(problem) for problem in found]
        raise SpecError(*sorted(located, key=lambda one: (one.line, one.column)))
    return job


def _read_text(path: Path) -> str:
    """
    Read a file that should be a text of sane size.

    Raises:
        SpecError: it cannot be read, or is none.
    """
    try:
        if path.is_dir():
            raise _unreadable(path, "is a directory, not a job file")
        if path.exists() and not path.is_file():  # a pipe would block, a device never end
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
    Turn tuples into lists.

    Raises:
        SpecError: there is something that YAML cannot give back.
    """
    if len(where) > MAX_DEPTH:
        raise SpecError(Problem(where[:2], f"nested deeper than {MAX_DEPTH}"))
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: _plain(inner, (*where, key)) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner, (*where, i)) for i, inner in enumerate(value)]
    if value is None or type(value) in (bool, int, float, str):
        return value
    raise SpecError(Problem(where, f"cannot be written as YAML (got {show(value)})"))
