"""The runtime environment of a remote job, which also contains the job itself."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import distplat
from distplat.cli.package import EXCLUDES
from distplat.platform.errors import Problem, SpecError
from distplat.platform.job_file import read_text, render_job
from distplat.platform.spec import Job
from distplat.platform.spec_messages import format_value
from distplat.platform.yaml_source import Positions, parse_yaml
from distplat.strategies.catalog import load_strategy_file, make_job

JOB_VARIABLE = "_DISTPLAT_JOB"
"""Environment variable with the job for its driver; not `DISTPLAT_`, the prefix of settings."""
MAX_JOB = 48 * 2**10  # Ray passes it quoted in one environment string, which Linux limits to 128 kB

_VARIABLE = re.compile(r"[^=\0]+")
"""Valid names of environment variables."""


def runtime_env(
    job: Job,
    working_dir: Path,
    strategy_file: Path | None,
    user: Mapping[str, Any],
    resume: str | None = None,
) -> dict[str, Any]:
    """
    Build the runtime environment of a remote job.

    Args:
        job: passed in an environment variable, so that no shell interprets its values.
        working_dir: the user's folder.
        strategy_file: must be in `working_dir`.
        user: the user's runtime environment.
        resume: run or checkpoint to resume from: a path on the driver's machine, or a URL.

    Raises:
        SpecError: the job is too large, or the strategy file is outside `working_dir`.
    """
    payload: dict[str, str | None] = {"job": render_job(job), "strategy_file": None}
    if resume is not None:
        payload["resume"] = resume
    if strategy_file is not None:
        try:
            payload["strategy_file"] = str(strategy_file.resolve().relative_to(working_dir))
        except ValueError:
            message = f"{strategy_file} is not in {working_dir}, the folder that is uploaded"
            raise SpecError(Problem(("--strategy-file",), message)) from None
    text = json.dumps(payload)
    if len(text) > MAX_JOB:
        hint = "keep long task_args in a file of the working directory"
        message = f"is {len(text) >> 10} KiB; a job sent to a cluster may have {MAX_JOB >> 10}"
        raise SpecError(Problem(("the job",), message, hint))
    environment = with_folders(working_dir, user)
    environment["env_vars"] = {**user.get("env_vars", {}), JOB_VARIABLE: text}
    return environment


def with_folders(working_dir: Path, user: Mapping[str, Any]) -> dict[str, Any]:
    """Add the user's folder and this distplat to a runtime environment."""
    return {
        **user,
        "working_dir": str(working_dir),
        "py_modules": [str(Path(distplat.__file__).parent), *user.get("py_modules", [])],
        "excludes": [*EXCLUDES, *user.get("excludes", [])],
    }


@dataclass(frozen=True)
class ReceivedJob:
    """The job that `runtime_env` packed."""

    job: Job
    strategy_file: Path | None
    """Already loaded."""
    resume: str | None


def read_received_job(environ: Mapping[str, str]) -> ReceivedJob:
    """
    Unpack the job that `runtime_env` packed.

    Raises:
        SpecError: the variable is not set, or the job is invalid with this cluster's plug-ins.
    """
    if JOB_VARIABLE not in environ:
        raise SpecError("`drive` runs inside a cluster only; use `distplat submit`")
    payload = json.loads(environ[JOB_VARIABLE])
    name = payload["strategy_file"]
    strategy_file = Path(name).resolve() if name else None
    if strategy_file is not None:
        load_strategy_file(strategy_file)
    fields, _ = parse_yaml(payload["job"], "job")
    assert isinstance(fields, dict), "render_job writes a mapping"
    return ReceivedJob(make_job(fields), strategy_file, payload.get("resume"))


def read_runtime_env(file: Path | None, text: str | None) -> dict[str, Any]:
    """
    Read the user's runtime environment.

    Raises:
        SpecError: both options are given, the value is invalid, or it has keys set by distplat.
    """
    option = "--runtime-env" if file else "--runtime-env-json"
    if file and text:
        raise SpecError("give --runtime-env or --runtime-env-json, not both")
    marks: Positions = {}
    try:
        if file:
            environment, marks = parse_yaml(read_text(file), str(file))
        else:
            environment = json.loads(text or "{}")
    except (ValueError, RecursionError, SpecError) as error:
        raise SpecError(Problem((option,), f"cannot be read: {error}")) from None
    if not isinstance(environment, dict):
        raise SpecError(Problem((option,), "must be a mapping"))
    if "working_dir" in environment:
        raise SpecError(Problem((option, "working_dir"), "is set by --working-dir"))
    problems = [problem for key in environment for problem in _type_problems(key, environment[key])]
    if problems:
        raise SpecError(*(_with_position(problem, option, file, marks) for problem in problems))
    return environment


def _type_problems(key: str, value: object) -> list[Problem]:
    """Check the types of the values that `with_folders` extends; unpacking splits a string."""
    if key in ("excludes", "py_modules"):
        if not isinstance(value, list):
            return [Problem((key,), f"must be a list of texts (got {format_value(value)})")]
        items: Mapping[str | int, object] = dict(enumerate(value))
    elif key == "env_vars":
        if not isinstance(value, dict):
            return [
                Problem((key,), f"must be a mapping of text to text (got {format_value(value)})")
            ]
        items = value
    elif key == "py_executable" and not isinstance(value, str):  # Ray would retry forever
        return [Problem((key,), f"must be a text (got {format_value(value)})")]
    else:
        return []
    problems = [
        Problem((key, name), f"must be a text (got {format_value(item)})", "quote it")
        for name, item in items.items()
        if not isinstance(item, str)
    ]
    names = [name for name in items if isinstance(name, str) and not _VARIABLE.fullmatch(name)]
    problems += [
        Problem((key,), f"{format_value(name)} is no name of a variable") for name in names
    ]
    texts = [name for name, item in items.items() if isinstance(item, str) and "\0" in item]
    return problems + [Problem((key, name), "may hold no NUL character") for name in texts]


def _with_position(problem: Problem, option: str, file: Path | None, marks: Positions) -> Problem:
    line, column = marks.get(problem.where, (0, 0))
    where = problem.where if file else (option, *problem.where)
    return replace(problem, where=where, file=str(file or ""), line=line, column=column)
