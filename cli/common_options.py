"""Options and arguments that more than one command takes, and how their values are read."""

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
        "Else RAY_API_SERVER_ADDRESS, RAY_ADDRESS, a cluster of this machine, a local Ray."
    ),
]
RunAddress = Annotated[
    str | None,
    typer.Option(
        help="http://HOST:8265 (job API), HOST:6379 or auto (join as driver). "
        "Else RAY_API_SERVER_ADDRESS, RAY_ADDRESS, the clusters of this machine."
    ),
]
JobApi = Annotated[
    str | None,
    typer.Option(
        metavar="URL",
        help="http://HOST:8265, of a job API. "
        "Else RAY_API_SERVER_ADDRESS, RAY_ADDRESS, the job API of this machine.",
    ),
]
Output = Annotated[str, typer.Option("-o", "--output", metavar="text|json", help="Form of stdout.")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="A.B=C", help="Set a field of the job; may be repeated."),
]
StrategyName = Annotated[
    str | None, typer.Option("--strategy", help="Strategy, as `distplat strategies` lists them.")
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
        help="Go on from a run directory's newest checkpoint, or from one of its checkpoints; "
        "a relative path is taken from where run directories are made. Or the URL of one.",
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
    typer.Option("--entrypoint-num-cpus", min=0, help="CPUs that a remote job's driver takes."),
]
DriverGpus = Annotated[
    float | None,
    typer.Option("--entrypoint-num-gpus", min=0, help="GPUs that a remote job's driver takes."),
]
DriverMemory = Annotated[
    int | None, typer.Option("--entrypoint-memory", min=0, help="Bytes of memory that it takes.")
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Print the job with all defaults; start nothing.")
]
Wait = Annotated[bool, typer.Option(help="Follow a remote job to its end.")]
StrategyFile = Annotated[
    Path | None, typer.Option(help="A Python file that registers strategies of your own.")
]


def is_json(output: str) -> bool:
    """
    Read `--output`.

    Raises:
        SpecError: it is neither `text` nor `json`.
    """
    if output not in ("text", "json"):
        raise SpecError(f"--output is {output!r}, allowed: text, json")
    return output == "json"


_REPORT = ("jinja2", "matplotlib")


@contextmanager
def report_extra() -> Iterator[None]:
    """
    Import what draws in this context.

    Raises:
        SpecError: a package of the extra `report` is missing; the hint installs it.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] not in _REPORT:
            raise
        text = f"{error.name} is not installed, and draws pages and charts"
        raise SpecError(Problem((), text, "pip install 'distplat[report]'")) from error
