"""`distplat submit -- COMMAND`: a script as it is, in as many processes as there are workers."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TextIO

import typer

from distplat.cli import remote
from distplat.cli.address import Target
from distplat.cli.common_options import (
    Address,
    Name,
    Output,
    Quiet,
    RuntimeEnv,
    RuntimeEnvJson,
    is_json,
)
from distplat.cli.drive import flush_or_discard
from distplat.cli.package import Package, refuse_home
from distplat.cli.render import print_pairs
from distplat.platform.errors import Problem, SpecError, naming_path, printable
from distplat.platform.progress import to_json
from distplat.platform.remote_storage import is_url
from distplat.platform.spec import NAME_PATTERN, Scaling

if TYPE_CHECKING:
    from distplat.actors.script_run import ScriptJob, ScriptResult

COMMAND = "submit-script"
"""Name of the command to which `submit ... -- COMMAND` goes."""


def routed(args: list[str]) -> list[str]:
    """Send `submit ... -- COMMAND` to its own command; other command lines are left alone."""
    index = next((n for n, arg in enumerate(args) if not arg.startswith("-")), len(args))
    if args[index : index + 1] != ["submit"] or "--" not in args:
        return [*args]
    return [*args[:index], COMMAND, *args[index + 1 :]]


class Lines:
    """
    Shows what ranks print: on stderr where stdout is for the result alone.

    Args:
        out: where to.
        world: with several ranks each line says whose it is.
        quiet: shows nothing.
    """

    def __init__(self, out: TextIO, world: int, *, quiet: bool) -> None:
        self._out, self._world, self._quiet = out, world, quiet

    def line(self, rank: int, text: str) -> None:
        """Show a line of a rank."""
        self._show(f"[{rank}] {text}" if self._world > 1 else text)

    def notice(self, text: str) -> None:
        """Show what the run itself has to say."""
        self._show(f"distplat: {text}")

    def _show(self, text: str) -> None:
        if self._quiet:
            return
        try:
            print(printable(text), file=self._out, flush=True)
        except OSError:  # nobody reads any more; the script goes on, its logs are in files
            self._quiet = True


Processes = Annotated[
    int, typer.Option("--num-workers", min=1, max=1024, help="Number of processes.")
]
Cpus = Annotated[float, typer.Option(min=0, help="CPUs of each process.")]
Gpus = Annotated[float, typer.Option(min=0, help="GPUs of each process.")]
Restarts = Annotated[
    int, typer.Option(min=0, help="How often all begin anew after one has failed.")
]
StartTimeout = Annotated[
    float,
    typer.Option(
        "--start-timeout",
        metavar="SECONDS",
        min=1,
        max=86_400,
        help="How long processes may take to start: for Ray to find room, and to install packages.",
    ),
]
StoragePath = Annotated[str, typer.Option(help="Where run directories are made; no URL.")]
ScriptFolder = Annotated[
    Path | None, typer.Option(help="Folder of the script; default: the current one.")
]


def submit_script(
    command: Annotated[list[str], typer.Argument(metavar="COMMAND...")],
    num_workers: Processes = 1,
    cpus_per_worker: Cpus = 1.0,
    gpus_per_worker: Gpus = 0.0,
    max_restarts: Restarts = 0,
    start_timeout: StartTimeout = 120.0,
    name: Name = None,
    storage_path: StoragePath = "runs",
    address: Address = None,
    working_dir: ScriptFolder = None,
    runtime_env: RuntimeEnv = None,
    runtime_env_json: RuntimeEnvJson = None,
    output: Output = "text",
    quiet: Quiet = False,
) -> None:
    """
    Run a script as it is, as torchrun does: each process gets torchrun's variables.

    It goes to a Ray cluster or to a local Ray. `python` is the Python of the workers. What ranks
    print is shown, and kept in `rank-<n>.log` of the run directory.
    """
    from distplat.actors.script_run import ScriptJob, train_script

    as_json, folder = is_json(output), _folder(working_dir, command)
    resources = {"CPU": cpus_per_worker, "GPU": gpus_per_worker}
    scaling = Scaling(num_workers=num_workers, resources_per_worker=resources)
    job_fields = tuple(command), folder, _storage(storage_path), scaling
    job = ScriptJob(_name(name, command), *job_fields, max_restarts, start_timeout)
    lines = Lines(sys.stderr if as_json else sys.stdout, num_workers, quiet=quiet)
    user_env, asked = (runtime_env, runtime_env_json), working_dir is not None
    with _ray(address, folder, user_env, folder_named=asked, quiet=quiet):
        result = train_script(job, lines)
    with suppress(OSError):  # it has ended well, whether somebody reads it or not
        _print(job, result, as_json=as_json)
    flush_or_discard(sys.stdout)


def _print(job: ScriptJob, result: ScriptResult, *, as_json: bool) -> None:
    if as_json:
        facts = {"status": "SUCCEEDED", "name": job.name, "num_workers": job.scaling.num_workers}
        more = {"restarts": result.restarts, "seconds": result.seconds}
        print(to_json({**facts, **more, "run_directory": str(result.path)}))
        return
    rows = [("processes", str(job.scaling.num_workers)), ("time", f"{result.seconds:.1f} s")]
    if result.restarts:
        rows.append(("restarts", str(result.restarts)))
    print_pairs([*rows, ("logs", str(result.path))])


def _folder(working_dir: Path | None, command: list[str]) -> Path:
    """
    Say where the script is.

    Raises:
        SpecError: nowhere, or it is none.
    """
    if Path(command[0]).suffix in (".yaml", ".yml"):
        hint = f"leave the -- out: distplat submit {command[0]}"
        raise SpecError(Problem(("--",), f"{command[0]} is a job file and no command", hint))
    with naming_path(working_dir or "the current directory", "--working-dir"):
        folder = (working_dir or Path.cwd()).resolve()
        exists = folder.is_dir()
    if not exists:
        raise SpecError(Problem(("--working-dir",), f"{folder} is no directory"))
    return folder


def _storage(storage_path: str) -> Path:
    """
    Say where the run directory is to be made.

    Raises:
        SpecError: at a URL, which only runs of job files take.
    """
    if is_url(storage_path):
        hint = "give a directory, and have the script upload what it saves"
        raise SpecError(Problem(("--storage-path",), "a script's run takes no URL", hint))
    return Path(storage_path)


def _name(name: str | None, command: list[str]) -> str:
    """
    Check the run's name, or take it from the script's.

    Raises:
        SpecError: it is none.
    """
    if name is None:
        script = next((arg for arg in command if arg.endswith(".py")), command[0])
        name = re.sub(r"[^a-z0-9]+", "-", Path(script).stem.lower()).strip("-")[:63] or "script"
    if not re.fullmatch(NAME_PATTERN, name):
        text = f"must be lower-case letters, digits and '-' (got {name!r})"
        raise SpecError(Problem(("--name",), text))
    return name


def _ray(
    address: str | None,
    folder: Path,
    user: tuple[Path | None, str | None],
    *,
    folder_named: bool,
    quiet: bool,
) -> AbstractContextManager[None]:
    """
    Connect to the cluster; a local Ray is started by the run itself.

    Args:
        address: `--address`.
        folder: of the script.
        user: `--runtime-env` and `--runtime-env-json`.
        folder_named: `--working-dir` names it; a home directory is refused otherwise.
        quiet: says nothing.

    Raises:
        SpecError: a job API, which this command does not speak; options without effect.
    """
    from distplat.cli.submit import connection

    say: Callable[[str], None] = (lambda line: None) if quiet else remote.say
    target = _target(address, say, own_environment=any(user))

    def shipping(package: Package) -> None:
        if not folder_named:
            refuse_home(package, "the command is run from there")
        say(str(package))

    return connection(target, folder, *user, shipping)


def _target(address: str | None, say: Callable[[str], None], *, own_environment: bool) -> Target:
    """Choose where the script runs, and say it; Raises: see `_ray`."""
    from distplat.cli.submit import choose_target, named

    target = choose_target(address, say, with_ray=True)
    if target.kind == "jobs":
        text = f"is a job API ({target.address}); a script is run by a driver in the cluster"
        hint = "give --address HOST:6379, or use `ray job submit -- distplat submit ... -- COMMAND`"
        raise SpecError(Problem(("--address",), text, hint))
    if target.kind == "local" and own_environment:
        hint = "give --address"
        raise SpecError(Problem(("--runtime-env",), "has effect on a cluster only", hint))
    say(f"running on {named(target)}")
    return target
