"""`distplat submit -- COMMAND`: a script as it is, in as many processes as there are workers."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated, TextIO

import typer

from distplat.cli import remote
from distplat.cli.options import Address, Name, Output, is_json
from distplat.cli.render import to_json
from distplat.cli.tables import print_pairs
from distplat.platform.errors import Problem, SpecError, printable
from distplat.platform.spec import Scaling

COMMAND = "submit-script"
"""Name of the command to which `submit ... -- COMMAND` goes."""
_NAME = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")


def routed(args: list[str]) -> list[str]:
    """Send `submit ... -- COMMAND` to its own command; other command lines are left alone."""
    place = next((n for n, arg in enumerate(args) if not arg.startswith("-")), len(args))
    if args[place : place + 1] != ["submit"] or "--" not in args:
        return [*args]
    return [*args[:place], COMMAND, *args[place + 1 :]]


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

    def news(self, text: str) -> None:
        """Show what the run itself has to say."""
        self._show(f"distplat: {text}")

    def _show(self, text: str) -> None:
        if self._quiet:
            return
        try:
            print(printable(text), file=self._out, flush=True)
        except OSError:  # nobody reads any more; the script goes on, its logs are in files
            self._quiet = True


def submit_script(
    command: Annotated[list[str], typer.Argument(metavar="COMMAND...")],
    num_workers: Annotated[
        int, typer.Option("--num-workers", min=1, max=1024, help="Number of processes.")
    ] = 1,
    cpus_per_worker: Annotated[float, typer.Option(min=0, help="CPUs of each process.")] = 1.0,
    gpus_per_worker: Annotated[float, typer.Option(min=0, help="GPUs of each process.")] = 0.0,
    max_restarts: Annotated[
        int, typer.Option(min=0, help="How often all begin anew after one has failed.")
    ] = 0,
    name: Name = None,
    storage_path: Annotated[Path, typer.Option(help="Where run directories are made.")] = Path(
        "runs"
    ),
    address: Address = None,
    working_dir: Annotated[
        Path | None, typer.Option(help="Folder of the script; default: the current one.")
    ] = None,
    runtime_env: Annotated[
        Path | None, typer.Option(help="YAML file with a Ray runtime environment.")
    ] = None,
    runtime_env_json: Annotated[str | None, typer.Option(help="The same as JSON.")] = None,
    output: Output = "text",
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Print the result only.")] = False,
) -> None:
    """
    Run a script as it is, as torchrun does: each process gets torchrun's variables.

    It goes to a Ray cluster or to a local Ray. `python` is the Python of the workers. What ranks
    print is shown, and kept in `rank-<n>.log` of the run directory.
    """
    from distplat.actors.script_launch import ScriptJob, train_script

    as_json = is_json(output)
    if Path(command[0]).suffix in (".yaml", ".yml"):
        hint = f"leave the -- out: distplat submit {command[0]}"
        raise SpecError(Problem(("--",), f"{command[0]} is a job file and no command", hint))
    folder = (working_dir or Path.cwd()).resolve()
    if not folder.is_dir():
        raise SpecError(Problem(("--working-dir",), f"{folder} is no directory"))
    resources = {"CPU": cpus_per_worker, "GPU": gpus_per_worker}
    job = ScriptJob(
        _name(name, command),
        tuple(command),
        folder,
        storage_path,
        Scaling(num_workers=num_workers, resources_per_worker=resources),
        max_restarts,
    )
    lines = Lines(sys.stderr if as_json else sys.stdout, num_workers, quiet=quiet)
    with _ray(address, folder, (runtime_env, runtime_env_json), quiet=quiet):
        result = train_script(job, lines)
    facts = {
        "status": "SUCCEEDED",
        "name": job.name,
        "num_workers": num_workers,
        "restarts": result.restarts,
        "seconds": result.seconds,
        "run_directory": str(result.path),
    }
    if as_json:
        print(to_json(facts))
        return
    rows = [("processes", str(num_workers)), ("time", f"{result.seconds:.1f} s")]
    if result.restarts:
        rows.append(("restarts", str(result.restarts)))
    print_pairs([*rows, ("logs", str(result.path))])


def _name(name: str | None, command: list[str]) -> str:
    """
    Check the run's name, or take it from the script's.

    Raises:
        SpecError: it is none.
    """
    if name is None:
        script = next((arg for arg in command if arg.endswith(".py")), command[0])
        name = re.sub(r"[^a-z0-9]+", "-", Path(script).stem.lower()).strip("-")[:63] or "script"
    if not _NAME.fullmatch(name):
        text = f"must be lower-case letters, digits and '-' (got {name!r})"
        raise SpecError(Problem(("--name",), text))
    return name


def _ray(
    address: str | None, folder: Path, user: tuple[Path | None, str | None], *, quiet: bool
) -> AbstractContextManager[None]:
    """
    Connect to the cluster; a local Ray is started by the run itself.

    Raises:
        SpecError: a job API, which this command does not speak; options without effect.
    """
    from distplat.cli.submit import choose_target, connection, named

    say: Callable[[str], None] = (lambda line: None) if quiet else remote.say
    target = choose_target(address, say, with_ray=True)
    if target.kind == "jobs":
        text = f"is a job API ({target.address}); a script is run by a driver in the cluster"
        hint = "give --address HOST:6379, or use `ray job submit -- distplat submit ... -- COMMAND`"
        raise SpecError(Problem(("--address",), text, hint))
    if target.kind == "local" and any(user):
        hint = "give --address"
        raise SpecError(Problem(("--runtime-env",), "has effect on a cluster only", hint))
    say(f"running on {named(target)}")
    return connection(target, folder, *user, lambda package: say(str(package)))
