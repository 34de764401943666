"""
What travels to a remote cluster: the user's folder, this very distplat, and the job.

Ray packs folders itself, following .gitignore and .rayignore; here is counted first what it will
pack, for its server refuses more than 100 MiB only after the upload, with a bare HTTP error.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import distplat
from distplat.platform.errors import Problem, SpecError
from distplat.platform.job_file import render_job
from distplat.platform.spec import Job
from distplat.platform.yaml_source import parse_yaml
from distplat.strategies.catalog import load_strategy_file, make_job

JOB_VARIABLE = "_DISTPLAT_JOB"
"""Environment variable in which the job reaches its driver; not `DISTPLAT_`: it is no setting."""
EXCLUDES = (".git", ".venv", "venv", "__pycache__", "runs", ".env", "*.pem", "*.key", ".ray")
MAX_PACKAGE = 100 * 2**20
MAX_JOB = 48 * 2**10  # Ray hands it on inside one environment string, quoted; Linux takes 128 kB

Ignores = Callable[[Path], list[Callable[[Path], bool]]]
"""Gives, for a folder, the tests that its ignore files ask for."""


def runtime_env(
    job: Job,
    working_dir: Path,
    strategy_file: Path | None,
    user: Mapping[str, Any],
    resume: Path | None = None,
) -> dict[str, Any]:
    """
    Build the runtime environment of a remote job.

    Args:
        job: goes along in a variable, so no value of it ever meets a shell.
        working_dir: the user's folder.
        strategy_file: must lie in that folder.
        user: the user's own runtime environment.
        resume: what the run goes on from, on the machine of its driver.

    Raises:
        SpecError: the job is too large, or the strategy file lies elsewhere.
    """
    payload: dict[str, str | None] = {"job": render_job(job), "strategy_file": None}
    if resume is not None:
        payload["resume"] = str(resume)
    if strategy_file is not None:
        try:
            payload["strategy_file"] = str(strategy_file.resolve().relative_to(working_dir))
        except ValueError:
            message = f"{strategy_file} is not in {working_dir}, which is what the cluster gets"
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
class Received:
    """What `runtime_env` packed."""

    job: Job
    strategy_file: Path | None
    """It is loaded."""
    resume: Path | None


def received_job(environ: Mapping[str, str]) -> Received:
    """
    Unpack what `runtime_env` packed.

    Raises:
        SpecError: there is nothing, or this cluster's plug-ins make it wrong.
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
    resume = payload.get("resume")
    return Received(make_job(fields), strategy_file, Path(resume) if resume else None)


def read_runtime_env(file: Path | None, text: str | None) -> dict[str, Any]:
    """
    Read the user's runtime environment.

    Raises:
        SpecError: two are given, it cannot be read, or it holds what we set ourselves.
    """
    option = "--runtime-env" if file else "--runtime-env-json"
    if file and text:
        raise SpecError("give --runtime-env or --runtime-env-json, not both")
    try:
        found = parse_yaml(file.read_text(), str(file))[0] if file else json.loads(text or "{}")
    except (OSError, ValueError, SpecError) as error:
        raise SpecError(Problem((option,), f"cannot be read: {error}")) from None
    if not isinstance(found, dict):
        raise SpecError(Problem((option,), "must be a mapping"))
    if "working_dir" in found:
        raise SpecError(Problem((option, "working_dir"), "is set by --working-dir"))
    return found


def check_size(working_dir: Path, excludes: list[str], ignores: Ignores) -> None:
    """
    Refuse a folder that the cluster would refuse.

    Raises:
        SpecError: more than 100 MiB; names the five largest things in it.
    """
    sizes: dict[Path, int] = {}
    for path in _shipped(working_dir, excludes, ignores, []):
        top = working_dir / path.relative_to(working_dir).parts[0]
        sizes[top] = sizes.get(top, 0) + path.stat().st_size
    total = sum(sizes.values())
    if total <= MAX_PACKAGE:
        return
    largest = sorted(sizes.items(), key=lambda item: -item[1])[:5]
    shown = ", ".join(f"{path.name} {size / 2**20:.0f} MiB" for path, size in largest)
    message = f"{working_dir} has {total / 2**20:.0f} MiB; a cluster takes {MAX_PACKAGE >> 20} MiB"
    hint = f"list what the job does not need in .rayignore there; the largest: {shown}"
    raise SpecError(Problem(("--working-dir",), message, hint))


def _shipped(
    folder: Path, excludes: list[str], ignores: Ignores, above: list[Callable[[Path], bool]]
) -> Iterator[Path]:
    """Walk as Ray does: links are followed, ignore files count for all below them."""
    tests = [*above, *ignores(folder)]
    for path in folder.iterdir():
        if any(fnmatch(path.name, pattern.rstrip("/")) for pattern in excludes):
            continue
        if any(test(path) for test in tests):
            continue
        if path.is_dir():
            yield from _shipped(path, excludes, ignores, tests)
        elif path.is_file():
            yield path
