"""Options and arguments shared by several commands."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from distplat.platform.errors import Problem, SpecError

JobFile = Annotated[Path, typer.Argument(metavar="JOB.yaml", help="The job file.")]
JobId = Annotated[str, typer.Argument(metavar="ID", help="The job's id, as `submit` printed it.")]
Address = Annotated[
    str | None,
    typer.Option(
        help="http://HOST:8265 (job API), HOST:6379 or auto (join as driver), or local. "
        "Default: RAY_API_SERVER_ADDRESS, RAY_ADDRESS, a cluster on this machine, a local Ray."
    ),
]
RunAddress = Annotated[
    str | None,
    typer.Option(
        help="http://HOST:8265 (job API), HOST:6379 or auto (join as driver). "
        "Default: RAY_API_SERVER_ADDRESS, RAY_ADDRESS, the clusters on this machine."
    ),
]
JobApi = Annotated[
    str | None,
    typer.Option(
        metavar="URL",
        help="Job API, http://HOST:8265. "
        "Default: RAY_API_SERVER_ADDRESS, RAY_ADDRESS, the job API on this machine.",
    ),
]
Output = Annotated[str, typer.Option("-o", "--output", metavar="text|json", help="Output format.")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="A.B=C", help="Set a field of the job; may be repeated."),
]
StrategyName = Annotated[
    str | None, typer.Option("--strategy", help="Strategy; `distplat strategies` lists them.")
]
NumWorkers = Annotated[
    str | None,
    typer.Option("--num-workers", "--num_workers", metavar="N", help="Number of workers."),
]
Name = Annotated[str | None, typer.Option("--name", "-n", help="Name of the job.")]
Resume = Annotated[
    str | None,
    typer.Option(
        metavar="RUN",
        help="Resume from a run directory (its newest checkpoint), a single checkpoint, or the URL "
        "of either; relative paths start at the folder in which run directories are created.",
    ),
]
WorkingDir = Annotated[
    Path | None, typer.Option(help="Folder of the task's module; default: the job file's.")
]
RuntimeEnv = Annotated[Path | None, typer.Option(help="YAML file with a Ray runtime environment.")]
RuntimeEnvJson = Annotated[str | None, typer.Option(help="The same as JSON.")]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="Print the result only.")]
SubmissionId = Annotated[str | None, typer.Option(help="Id of a remote job.")]
Metadata = Annotated[str | None, typer.Option("--metadata-json", help="Metadata of a remote job.")]
DriverCpus = Annotated[
    float | None,
    typer.Option("--entrypoint-num-cpus", min=0, help="CPUs of a remote job's driver."),
]
DriverGpus = Annotated[
    float | None,
    typer.Option("--entrypoint-num-gpus", min=0, help="GPUs of a remote job's driver."),
]
DriverMemory = Annotated[
    int | None,
    typer.Option("--entrypoint-memory", min=0, help="Bytes of memory of a remote job's driver."),
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Print the job with all defaults; start nothing.")
]
Wait = Annotated[bool, typer.Option(help="Follow a remote job until it ends.")]
StrategyFile = Annotated[
    Path | None, typer.Option(help="Python file that registers custom strategies.")
]


def is_json(output: str) -> bool:
    """
    Return whether `--output` is `json`.

    Raises:
        SpecError: the value is neither `text` nor `json`.
    """
    if output not in ("text", "json"):
        raise SpecError(f"--output is {output!r}, allowed: text, json")
    return output == "json"


_REPORT = ("jinja2", "matplotlib")


@contextmanager
def report_extra() -> Iterator[None]:
    """
    Context for imports of the drawing modules.

    Raises:
        SpecError: a package of the extra `report` is missing; the hint shows how to install it.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] not in _REPORT:
            raise
        text = f"{error.name} is not installed; it draws pages and charts"
        raise SpecError(Problem((), text, "pip install 'distplat[report]'")) from error
