"""
Run an unchanged script in several processes, like torchrun, on the nodes of a Ray cluster.

    driver                          ScriptProcess, one for each rank
    ------                          -----------------------------------------
    location, port      ->          node, address, GPUs; a free port of rank 0
    start(env)          ->          python train.py, with torchrun's variables
    output(received)    <->         lines and exit code, polled

The first failed or lost process ends the attempt: all others get SIGTERM, and SIGKILL
`GRACE_S` later. Then all processes are restarted with a new port, up to `max_restarts` times.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import ray
from typing_extensions import override

from distplat.actors.launch import ray_for_run
from distplat.actors.ray_transport import RayTransport
from distplat.actors.retrying_calls import ask
from distplat.actors.role_output import RoleFiles
from distplat.actors.script_process import ProcessOutput
from distplat.actors.spawn import spawn_script
from distplat.actors.stopping import Stopping
from distplat.actors.transport import ActorDied, Transport, TransportError, Unanswered
from distplat.platform.awake_clock import AwakeClock
from distplat.platform.disk import FOLDER_MODE, with_deadline, write_atomically
from distplat.platform.errors import (
    ActorLost,
    InfrastructureError,
    Interrupted,
    ScriptFailed,
    StorageError,
    ranks_text,
)
from distplat.platform.run_directory import new_run_name
from distplat.platform.spec import Scaling
from distplat.platform.torchrun import ProcessLocation, TorchrunLaunch, environments, ranks_of

START_S = 120.0
"""Default of `--start-timeout`."""
_OUTPUT_S = 1.0
_TICK_S = 0.1
_ANSWER_TIMEOUT_S = 60.0
"""Seconds without an answer after which a process counts as lost; a poll takes `_OUTPUT_S`."""
GRACE_S = 10.0
"""Seconds between SIGTERM and SIGKILL."""
_NOTICE_S = 60.0
"""Seconds from the end of the first process to a notice that names the running ones."""
_SETTING = "--start-timeout"


@dataclass(frozen=True)
class Script:
    """A command, and how to run it on all ranks."""

    command: tuple[str, ...]
    run: str
    """Name of the run."""
    folder: str | None
    """Working directory; None: that of the actors."""
    max_restarts: int = 0
    start_timeout_s: float = START_S


class Terminal(Protocol):
    """Receiver of the script's output and the launcher's notices."""

    def line(self, rank: int, text: str) -> None:
        """Print a line of a rank's output."""

    def notice(self, text: str) -> None:
        """Print a message of the launcher."""


class _Rank:
    """State of one process in the driver."""

    def __init__(self, actor: Any, rank: int) -> None:
        self.actor, self.rank = actor, rank
        self.received = 0  #: number of lines
        self.exit_code: int | None = None
        self.lost = ""  #: cause of the loss; empty: not lost
        self.reply: Any = None
        self.answered_at = 0.0  #: time of the last answer, or of the first call

    @property
    def has_ended(self) -> bool:
        return bool(self.lost) or self.exit_code is not None


class Attempt:
    """
    One attempt: starts all processes, and collects their output until they end.

    Args:
        script: the script.
        transport: transport of the driver.
        actors: a `ScriptProcess` for each rank.
        terminal: receives the output.
        check: called ten times a second; its exceptions end the attempt.
    """

    def __init__(
        self,
        script: Script,
        transport: Transport,
        actors: Sequence[Any],
        terminal: Terminal,
        check: Callable[[], object],
    ) -> None:
        self._script, self._transport, self._terminal = script, transport, terminal
        self._actors, self._check = actors, check
        self._ranks: list[_Rank] = []
        self._warned = False  #: see `_warn_of_running_ranks`
        self._last_all_running = time.monotonic()
        self._clock = AwakeClock()

    def run(self, restarts: int) -> None:
        """
        Start all processes, and wait until they have ended.

        Raises:
            ScriptFailed: a process ended with a non-zero exit code, or cannot be started.
            InfrastructureError: a process was lost, or its actor does not answer.
        """
        script = self._script
        locations: list[ProcessLocation] = self._call_actors("starting processes", "location")
        ranks = ranks_of(locations)
        first = ranks.index(0)
        [port] = self._call_actors("finding a port", "port", only=first)
        variables = environments(
            locations, TorchrunLaunch(script.run, port, restarts, script.max_restarts)
        )
        for error in self._call_actors("starting the script", "start", variables):
            if error:
                raise ScriptFailed(f"{script.command[0]} cannot be started: {error}")
        self._ranks = [_Rank(a, rank) for a, rank in zip(self._actors, ranks, strict=True)]
        while not all(process.has_ended for process in self._ranks):
            self._check()
            self._poll()
            self._raise_failure()

    def end(self) -> None:
        """Terminate running processes, and read their remaining output; raises nothing."""
        for method, limit_s in (("terminate", GRACE_S), ("kill", _OUTPUT_S)):
            running = [process for process in self._ranks if not process.has_ended]
            for process in running:
                self._transport.call(process.actor, method)
            deadline = time.monotonic() + limit_s
            while running and time.monotonic() < deadline:
                self._poll()
                running = [process for process in running if not process.has_ended]

    def _call_actors(
        self,
        what: str,
        method: str,
        environments: Sequence[dict[str, str]] | None = None,
        only: int | None = None,
    ) -> list[Any]:
        """Call a method of all actors, or only one; with `environments` also pass the command."""
        script, call = self._script, self._transport.call
        calls = {}
        for index in range(len(self._actors)) if only is None else [only]:
            arguments: tuple[Any, ...] = ()
            if environments is not None:
                variables, limit_s = environments[index], script.start_timeout_s
                arguments = script.command, variables, script.folder, limit_s
            calls[f"process {index}"] = partial(call, self._actors[index], method, *arguments)
        return ask(self._transport, what, calls, script.start_timeout_s, _SETTING, self._check)

    def _poll(self) -> None:
        """Receive new output and exit codes of all processes."""
        running = [process for process in self._ranks if not process.has_ended]
        now = self._clock.now()  # read once, so that time in a slow terminal is no rank's delay
        for process in running:
            if process.reply is None:
                call = process.actor, "output", process.received, _OUTPUT_S
                process.reply = self._transport.call(*call)
                process.answered_at = process.answered_at or now
        replies = [process.reply for process in running]
        answered = self._transport.wait(replies, _TICK_S) if replies else []
        if answered:  # collect all answers, so that a rank with much output does not delay others
            answered = self._transport.wait(replies, 0.0, everything=True)
        for process in running:
            if process.reply in answered:
                self._handle_answer(process, now)
            elif now - process.answered_at > _ANSWER_TIMEOUT_S:
                process.lost = f"it has not answered for {_ANSWER_TIMEOUT_S:.0f} s"

    def _handle_answer(self, process: _Rank, now: float) -> None:
        reply, process.reply = process.reply, None
        try:
            output: ProcessOutput = self._transport.get(reply, _OUTPUT_S)
        except ActorDied as error:
            process.lost = str(error) or "its node or actor died"
            return
        except (Unanswered, TransportError):
            return  # the next poll returns the same lines
        process.answered_at = now
        process.received += len(output.lines)
        for text in output.lines:
            self._terminal.line(process.rank, text)
        if not output.lines:
            process.exit_code = output.exit_code

    def _raise_failure(self) -> None:
        for process in self._ranks:
            if process.lost:
                raise ActorLost(f"the process of rank {process.rank}", None, process.lost)
        ended = sorted(process.rank for process in self._ranks if process.exit_code == 0)
        for process in self._ranks:
            if process.exit_code:
                raise ScriptFailed.of(process.rank, process.exit_code, ended)
        self._warn_of_running_ranks(ended)

    def _warn_of_running_ranks(self, ended: Sequence[int]) -> None:
        """Print a notice, once, if some processes ended long ago: others may wait for them."""
        if not ended:
            self._last_all_running = time.monotonic()
        elif not self._warned and time.monotonic() - self._last_all_running > _NOTICE_S:
            self._warned = True
            running = [process.rank for process in self._ranks if not process.has_ended]
            if running:
                self._terminal.notice(
                    f"{ranks_text(ended)} ended with exit code 0, {_NOTICE_S:.0f} s ago; still "
                    f"running, maybe waiting for them: {ranks_text(running)}"
                )


def run_script(
    script: Script,
    transport: Transport,
    spawn: Callable[[int], AbstractContextManager[Sequence[Any]]],
    terminal: Terminal,
    check: Callable[[], object],
) -> int:
    """
    Run a script, and restart it after failures.

    Args:
        script: the script.
        transport: transport of the driver.
        spawn: called with the attempt's number; creates a `ScriptProcess` for each rank, and ends
            all of them on exit.
        terminal: receives the output.
        check: called ten times a second; its exceptions end the run.

    Returns:
        Number of restarts.

    Raises:
        ScriptFailed: a process ended with a non-zero exit code after the last restart.
        InfrastructureError: a process was lost after the last restart.
    """
    restarts = 0
    while True:
        try:
            with spawn(restarts) as actors:
                attempt = Attempt(script, transport, actors, terminal, check)
                try:
                    attempt.run(restarts)
                finally:
                    attempt.end()
            return restarts
        except (ScriptFailed, InfrastructureError) as error:
            if restarts == script.max_restarts:
                raise
            restarts += 1
            terminal.notice(f"{error}; restart {restarts} of {script.max_restarts}")


_STORAGE = 120.0, ""
"""Timeout of the run directory's disk, and the setting that changes it: none."""
_MAX_PENDING_LINES = 100_000
"""Maximum number of lines that wait for the disk."""


@dataclass(frozen=True)
class ScriptJob:
    """Arguments of `distplat submit -- COMMAND`."""

    name: str
    command: tuple[str, ...]
    working_dir: Path
    storage_path: Path
    """Parent of run directories."""
    scaling: Scaling = field(default_factory=Scaling)
    max_restarts: int = 0
    start_timeout_s: float = START_S


@dataclass(frozen=True)
class ScriptResult:
    """Result of a successful run of a script."""

    path: Path
    """The run directory, with `rank-<n>.log` for each process."""
    restarts: int
    seconds: float


class _Logs(Terminal):
    """
    Writes the output of each rank to a file, and passes it to the terminal.

    Args:
        path: the run directory.
        terminal: receives the output, too.
    """

    def __init__(self, path: Path, terminal: Terminal) -> None:
        self._terminal = terminal
        self._files = RoleFiles(path, terminal.notice, max_pending=_MAX_PENDING_LINES)

    @override
    def line(self, rank: int, text: str) -> None:
        self._terminal.line(rank, text)
        self._files.write(f"rank-{rank}", [text])

    @override
    def notice(self, text: str) -> None:
        self._terminal.notice(text)

    def close(self) -> None:
        """Write pending lines, and close all files."""
        self._files.close()


def train_script(job: ScriptJob, terminal: Terminal) -> ScriptResult:
    """
    Run a script's processes until they end.

    Raises:
        ScriptFailed: a process ended with a non-zero exit code.
        SpecError: the cluster is too small.
        InfrastructureError: a process was lost, or the cluster failed.
        StorageError: the run directory cannot be created.
        Interrupted: SIGINT, SIGTERM or SIGHUP.
    """
    run, start = new_run_name(job.name), time.monotonic()
    path = job.storage_path.absolute() / run
    try:
        with_deadline(lambda moved: path.mkdir(FOLDER_MODE, parents=True), path, *_STORAGE)
    except OSError as error:
        raise StorageError(f"cannot create the run directory {path}: {error}") from error
    logs = _Logs(path, terminal)
    try:
        restarts = _run(job, path, logs)
    except BaseException as error:
        stopped = isinstance(error, Interrupted | KeyboardInterrupt)
        status = "STOPPED" if stopped else "FAILED"
        _finish(path, job, status, {"error": str(error)})
        raise
    finally:
        logs.close()
    seconds = time.monotonic() - start
    _finish(path, job, "SUCCEEDED", {"restarts": restarts, "seconds": seconds})
    return ScriptResult(path, restarts, seconds)


def _run(job: ScriptJob, path: Path, logs: _Logs) -> int:
    run = path.name
    with (
        Stopping() as stopping,
        ray_for_run(stopping, job.scaling, logs=False, keep_in=path) as head,
    ):
        shipped = ray.get_runtime_context().runtime_env.get("working_dir")
        folder = None if shipped else str(job.working_dir)
        script = Script(job.command, run, folder, job.max_restarts, job.start_timeout_s)

        @contextmanager
        def spawn(attempt: int) -> Iterator[Sequence[Any]]:
            actors = spawn_script(job.scaling, run, attempt)
            try:
                yield actors.processes
            finally:
                if head.answers():
                    actors.end()

        def check() -> None:
            stopping.check()
            head.check()

        return run_script(script, RayTransport(), spawn, logs, check)


def _finish(path: Path, job: ScriptJob, status: str, facts: dict[str, object]) -> None:
    """Write `result.json`; errors are ignored, because the exit code shows the status as well."""
    fields = {"status": status, "name": job.name, "command": list(job.command)}
    content = json.dumps({**fields, **facts}, indent=2).encode()
    with suppress(OSError, StorageError):
        with_deadline(
            lambda moved: write_atomically(path / "result.json", content), path, *_STORAGE
        )
