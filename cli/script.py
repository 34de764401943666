"""`distplat submit -- COMMAND`: run an unchanged script in several processes, like torchrun."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
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
from distplat.cli.drive import printing_result
from distplat.cli.package import Package, refuse_home
from distplat.cli.render import print_pairs
from distplat.platform.errors import Problem, SpecError, naming_path, printable
from distplat.platform.progress import to_json
from distplat.platform.remote_storage import is_url
from distplat.platform.spec import NAME_PATTERN, Scaling

if TYPE_CHECKING:
    from distplat.actors.script_run import ScriptJob, ScriptResult

COMMAND = "submit-script"
"""Name of the hidden command that runs `submit ... -- COMMAND`."""


def routed(args: list[str]) -> list[str]:
    """Redirect `submit ... -- COMMAND` to the hidden command; return other arguments unchanged."""
    index = next((n for n, arg in enumerate(args) if not arg.startswith("-")), len(args))
    if args[index : index + 1] != ["submit"] or "--" not in args:
        return [*args]
    return [*args[:index], COMMAND, *args[index + 1 :]]


class RankOutput:
    """
    Prints the output of ranks.

    Args:
        out: stream to print to.
        world: number of ranks; with more than one, each line is prefixed with its rank.
        quiet: print nothing.
    """

    def __init__(self, out: TextIO, world: int, *, quiet: bool) -> None:
        self._out, self._world, self._quiet = out, world, quiet

    def line(self, rank: int, text: str) -> None:
        """Print a line of a rank."""
        self._print(f"[{rank}] {text}" if self._world > 1 else text)

    def notice(self, text: str) -> None:
        """Print a message of the run itself."""
        self._print(f"distplat: {text}")

    def _print(self, text: str) -> None:
        if self._quiet:
            return
        try:
            print(printable(text), file=self._out, flush=True)
        except OSError:  # closed pipe: the script continues, its output is in log files
            self._quiet = True


Processes = Annotated[
    int, typer.Option("--num-workers", min=1, max=1024, help="Number of processes.")
]
Cpus = Annotated[float, typer.Option(min=0, help="CPUs of each process.")]
Gpus = Annotated[float, typer.Option(min=0, help="GPUs of each process.")]
Restarts = Annotated[
    int, typer.Option(min=0, help="Maximum number of restarts of all processes after a failure.")
]
StartTimeout = Annotated[
    float,
    typer.Option(
        "--start-timeout",
        metavar="SECONDS",
        min=1,
        max=86_400,
        help="Deadline for the start of processes: for Ray to schedule them and install packages.",
    ),
]
StoragePath = Annotated[str, typer.Option(help="Folder of run directories; no URL.")]
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
    Run an unchanged script, like torchrun: each process gets torchrun's environment variables.

    The script runs on a Ray cluster or on a local Ray. `python` is the Python of the workers. The
    output of ranks is printed, and saved in `rank-<n>.log` of the run directory.
    """
    from distplat.actors.script_run import ScriptJob, train_script

    as_json, folder = is_json(output), _folder(working_dir, command)
    resources = {"CPU": cpus_per_worker, "GPU": gpus_per_worker}
    scaling = Scaling(num_workers=num_workers, resources_per_worker=resources)
    job_fields = tuple(command), folder, _storage(storage_path), scaling
    job = ScriptJob(_name(name, command), *job_fields, max_restarts, start_timeout)
    output_lines = RankOutput(sys.stderr if as_json else sys.stdout, num_workers, quiet=quiet)
    user_env, is_named = (runtime_env, runtime_env_json), working_dir is not None
    with _ray(address, folder, user_env, is_folder_named=is_named, quiet=quiet):
        result = train_script(job, output_lines)
    with printing_result():
        _print(job, result, as_json=as_json)


def _print(job: ScriptJob, result: ScriptResult, *, as_json: bool) -> None:
    if as_json:
        facts = {
            "status": "SUCCEEDED",
            "name": job.name,
            "num_workers": job.scaling.num_workers,
            "restarts": result.restarts,
            "seconds": result.seconds,
            "run_directory": str(result.path),
        }
        print(to_json(facts))
        return
    rows = [("processes", str(job.scaling.num_workers)), ("time", f"{result.seconds:.1f} s")]
    if result.restarts:
        rows.append(("restarts", str(result.restarts)))
    print_pairs([*rows, ("logs", str(result.path))])


def _folder(working_dir: Path | None, command: list[str]) -> Path:
    """
    Return the folder of the script.

    Raises:
        SpecError: the folder does not exist, or the command is a job file.
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
    Return the folder of run directories.

    Raises:
        SpecError: the path is a URL, which only runs of job files support.
    """
    if is_url(storage_path):
        hint = "give a directory, and have the script upload what it saves"
        raise SpecError(Problem(("--storage-path",), "cannot be a URL for a script", hint))
    return Path(storage_path)


def _name(name: str | None, command: list[str]) -> str:
    """
    Return the run's name; default: derived from the name of the script.

    Raises:
        SpecError: the name has other characters than lower-case letters, digits and '-'.
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
    is_folder_named: bool,
    quiet: bool,
) -> AbstractContextManager[None]:
    """
    Connect to the cluster; a local Ray is started later, by the run itself.

    Args:
        address: `--address`.
        folder: folder of the script.
        user: `--runtime-env` and `--runtime-env-json`.
        is_folder_named: `--working-dir` is given; otherwise a home directory is refused.
        quiet: print no messages.

    Raises:
        SpecError: the address is a job API, which is not supported; or an option has no effect.
    """
    from distplat.cli.submit import connection

    say: Callable[[str], None] = (lambda line: None) if quiet else remote.say
    target = _target(address, say, own_environment=any(user))

    def shipping(package: Package) -> None:
        if not is_folder_named:
            refuse_home(package, "the command is run from there")
        say(str(package))

    return connection(target, folder, *user, shipping)


def _target(address: str | None, say: Callable[[str], None], *, own_environment: bool) -> Target:
    """Choose the target of the run, and print it; Raises: see `_ray`."""
    from distplat.cli.submit import choose_target, describe_target

    target = choose_target(address, say, with_ray=True)
    if target.kind == "jobs":
        text = f"is a job API ({target.address}); a script is run by a driver in the cluster"
        hint = "give --address HOST:6379, or use `ray job submit -- distplat submit ... -- COMMAND`"
        raise SpecError(Problem(("--address",), text, hint))
    if target.kind == "local" and own_environment:
        hint = "give --address"
        raise SpecError(Problem(("--runtime-env",), "has effect on a cluster only", hint))
    say(f"running on {describe_target(target)}")
    return target
