"""A script on the connected Ray, or on one of its own: where it runs, what it prints, its end."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from typing_extensions import override

from distplat.actors.head_watch import HeadWatch
from distplat.actors.launch import failures_of_ray, local_ray
from distplat.actors.ray_transport import RayTransport
from distplat.actors.role_output import RoleFiles
from distplat.actors.script_run import Script, Terminal, run_script
from distplat.actors.spawn import spawn_script
from distplat.actors.stopping import Stopping
from distplat.platform.disk import with_deadline, write_whole
from distplat.platform.errors import Interrupted, StorageError
from distplat.platform.run_directory import new_run_name
from distplat.platform.spec import Scaling

_STORAGE_S = 120.0
"""How long the disk of the run directory may give no answer."""
_MOST_LINES = 100_000
"""That may wait for it."""


@dataclass(frozen=True)
class ScriptJob:
    """What `distplat submit -- COMMAND` was asked for."""

    name: str
    command: tuple[str, ...]
    working_dir: Path
    storage_path: Path
    """Where run directories are made."""
    scaling: Scaling = field(default_factory=Scaling)
    max_restarts: int = 0


@dataclass(frozen=True)
class ScriptResult:
    """How it ended."""

    path: Path
    """The run directory, with `rank-<n>.log` for each process."""
    restarts: int
    seconds: float


class _Logs(Terminal):
    """
    Writes what ranks print to a file each, and hands it on.

    Args:
        path: the run directory.
        terminal: sees everything, too.
    """

    def __init__(self, path: Path, terminal: Terminal) -> None:
        self._terminal = terminal
        self._files = RoleFiles(path, terminal.news, most=_MOST_LINES)

    @override
    def line(self, rank: int, text: str) -> None:
        self._terminal.line(rank, text)
        self._files.write(f"rank-{rank}", [text])

    @override
    def news(self, text: str) -> None:
        self._terminal.news(text)

    def close(self) -> None:
        """Close the files."""
        self._files.close()


def train_script(job: ScriptJob, terminal: Terminal) -> ScriptResult:
    """
    Run a script's processes to their end.

    Raises:
        ScriptFailed: one of them ended with an error.
        SpecError: the cluster cannot hold them.
        InfrastructureError: one was lost, or the cluster fails.
        StorageError: the run directory cannot be made.
        Interrupted: SIGINT or SIGTERM.
    """
    run, began = new_run_name(job.name), time.monotonic()
    path = job.storage_path.absolute() / run
    try:
        with_deadline(lambda moved: path.mkdir(parents=True, mode=0o700), path, _STORAGE_S)
    except OSError as error:
        raise StorageError(f"cannot make the run directory {path}: {error}") from error
    logs = _Logs(path, terminal)
    try:
        restarts = _run(job, run, logs)
    except BaseException as error:
        status = "STOPPED" if isinstance(error, Interrupted) else "FAILED"
        _finish(path, job, status, {"error": str(error)})
        raise
    finally:
        logs.close()
    seconds = time.monotonic() - began
    _finish(path, job, "SUCCEEDED", {"restarts": restarts, "seconds": seconds})
    return ScriptResult(path, restarts, seconds)


def _run(job: ScriptJob, run: str, logs: _Logs) -> int:
    with (
        Stopping() as stopping,
        local_ray(job.scaling, logs=False),
        failures_of_ray(),
        HeadWatch(ray.get_runtime_context().gcs_address) as head,
    ):
        stopping.arm()
        stopping.check()
        shipped = ray.get_runtime_context().runtime_env.get("working_dir")
        folder = None if shipped else str(job.working_dir)
        script = Script(job.command, run, folder, job.max_restarts)

        @contextmanager
        def spawn(attempt: int) -> Iterator[Sequence[Any]]:
            actors = spawn_script(job.scaling, run, attempt)
            try:
                yield actors.processes
            finally:
                if not head.gone:
                    actors.end()

        def check() -> None:
            stopping.check()
            head.check()

        try:
            return run_script(script, RayTransport(), spawn, logs, check)
        except KeyboardInterrupt:  # the second signal: an end like after the first, but at once
            stopping.check()
            raise


def _finish(path: Path, job: ScriptJob, status: str, facts: dict[str, object]) -> None:
    """Write down how it ended; where the disk is full, the exit code says it."""
    known = {"status": status, "name": job.name, "command": list(job.command)}
    content = json.dumps({**known, **facts}, indent=2).encode()
    with suppress(OSError, StorageError):
        with_deadline(lambda moved: write_whole(path / "result.json", content), path, _STORAGE_S)
