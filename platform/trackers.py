"""
Experiment trackers, which show a run in addition to its own files.

Each library is an optional extra, imported when a run starts. Addresses and keys are in the
library's own environment variables, never in a job file.
"""

import json
import math
import re
import sys
import time
from collections.abc import Mapping
from contextlib import redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Protocol

from pydantic import Field, model_validator
from typing_extensions import override

from distplat.platform.disk import open_regular, write_atomically
from distplat.platform.errors import Problem, StorageError
from distplat.platform.fields import Spec
from distplat.platform.progress import EvalSummary, StepSummary
from distplat.platform.redaction import redact

Points = dict[str, float]

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,255}")
"""Ids of MLflow and Weights & Biases, and run names: safe in paths and URLs."""
_ID_BYTES = 4096


class TrackerSpec(Spec):
    """An experiment tracker; a job file may contain only its name."""

    name: Literal["mlflow", "trackio", "wandb"]
    """Library; `pip install 'distplat[mlflow]'`, and so on."""
    project: str | None = Field(None, min_length=1)
    """Project of Trackio and Weights & Biases, experiment of MLflow; None: the job's name."""

    @model_validator(mode="before")
    @classmethod
    def _named(cls, given: Any) -> Any:
        """Accept `mlflow` for `{name: mlflow}`."""
        return {"name": given} if isinstance(given, str) else given


def tracker_problems(job: Any) -> list[Problem]:
    """Check for duplicate trackers."""
    names = [tracker.name for tracker in job.trackers]
    return [
        Problem(("trackers", number), f"{name!r} is listed twice", "remove one")
        for number, name in enumerate(names)
        if name in names[:number]
    ]


def missing_trackers(job: Any) -> list[Problem]:
    """Check that the trackers' libraries are installed."""
    return [
        Problem(
            ("trackers", number),
            f"needs the package {tracker.name}, which is not installed",
            f"pip install 'distplat[{tracker.name}]'",
        )
        for number, tracker in enumerate(job.trackers)
        if find_spec(tracker.name) is None
    ]


def points_of(summary: StepSummary | EvalSummary) -> Points:
    """Return the values of a step or an evaluation by curve."""
    if isinstance(summary, EvalSummary):
        return {f"eval/{name}": value for name, value in summary.metrics.items()}
    values = {"train/loss": summary.loss, "train/samples": float(summary.samples)}
    values |= {f"seconds/{part}": seconds for part, seconds in summary.seconds.items()}
    return values | {f"figures/{name}": value for name, value in summary.figures.items()}


class Tracker(Protocol):
    """A run in one tracker."""

    id: str
    """The tracker's id of the run."""

    def write(self, step: int, points: Points) -> None:
        """Log the values of a step."""

    def close(self, failed: bool) -> None:
        """Mark the run as ended."""


def id_file(folder: Path, name: str) -> Path:
    """Return the path of the file with a tracker's run id."""
    return folder / f"tracker_{name}.json"


def open_tracker(spec: TrackerSpec, job: Any, folder: Path, resumed_folder: Path | None) -> Tracker:
    """
    Start or resume a run in a tracker; its id is written to the run directory.

    Args:
        spec: the tracker.
        job: of the run.
        folder: the run directory.
        resumed_folder: directory of the resumed run.

    Raises:
        StorageError: the resumed run's id is malformed.
    """
    known_id = None if resumed_folder is None else _read_id(id_file(resumed_folder, spec.name))
    classes: dict[str, type[MLflow | Trackio | WandB]]
    classes = {"mlflow": MLflow, "trackio": Trackio, "wandb": WandB}
    tracker = classes[spec.name](spec.project or job.name, job, folder, known_id)
    write_atomically(id_file(folder, spec.name), json.dumps({"id": tracker.id}).encode())
    return tracker


def _read_id(path: Path) -> str | None:
    """Read the id that `open_tracker` wrote, perhaps in a foreign run; None: there is none."""
    with open_regular(path) as file:
        text = None if file is None else file.read(_ID_BYTES)
    if text is None:
        return None
    try:
        known = json.loads(text)["id"]
    except (ValueError, LookupError, TypeError, RecursionError):
        known = None
    if not isinstance(known, str) or not _ID.fullmatch(known):
        raise StorageError(f"{path} has no id of a tracker's run")
    return known


def _public_fields(job: Any) -> dict[str, Any]:
    """Return a job's fields with secrets redacted."""
    fields: dict[str, Any] = redact(job.model_dump(mode="json"))
    return fields


def _flatten(fields: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested fields with dotted names, such as `optimizer.lr`."""
    flat: dict[str, Any] = {}
    for name, value in fields.items():
        inner = isinstance(value, Mapping) and bool(value)
        flat |= _flatten(value, f"{prefix}{name}.") if inner else {prefix + name: value}
    return flat


class MLflow(Tracker):
    """
    See `Tracker`. `MLFLOW_TRACKING_URI` has the address of its server.

    Args:
        project: name of the experiment.
        job: of the run.
        folder: the run directory.
        run_id: id of the run to resume; None: a new run.
    """

    def __init__(self, project: str, job: Any, folder: Path, run_id: str | None) -> None:
        from mlflow.entities import Metric, Param
        from mlflow.tracking import MlflowClient

        self._client, self._metric = MlflowClient(), Metric
        if run_id is not None:
            self.id = run_id
            self._client.update_run(run_id, status="RUNNING")
            return
        experiment = self._client.get_experiment_by_name(project)
        experiment_id = (
            experiment.experiment_id if experiment else self._client.create_experiment(project)
        )
        self.id = str(self._client.create_run(experiment_id, run_name=folder.name).info.run_id)
        fields = _flatten(_public_fields(job))
        params = [Param(name, str(value)[:6000]) for name, value in fields.items()]
        for start in range(0, len(params), 100):  # MLflow's limit per call
            self._client.log_batch(self.id, params=params[start : start + 100])

    @override
    def write(self, step: int, points: Points) -> None:
        now = int(time.time() * 1000)
        finite = {name: value for name, value in points.items() if math.isfinite(value)}
        metrics = [self._metric(name, value, now, step) for name, value in finite.items()]
        self._client.log_batch(self.id, metrics=metrics)

    @override
    def close(self, failed: bool) -> None:
        self._client.set_terminated(self.id, "FAILED" if failed else "FINISHED")


class Trackio(Tracker):
    """
    See `Tracker`. Writes locally, or to `TRACKIO_SPACE_ID` or `TRACKIO_SERVER_URL`. Identifies a
    run by its name, and does not record failures.

    Args:
        project: its name.
        job: of the run.
        folder: the run directory.
        run_name: name of the run to resume; None: a new run.
    """

    def __init__(self, project: str, job: Any, folder: Path, run_name: str | None) -> None:
        import trackio

        self.id = run_name or folder.name
        with redirect_stdout(sys.stderr):  # stdout is for the result
            self._run = trackio.init(
                project,
                name=self.id,
                resume="allow",
                config=_public_fields(job),
                embed=False,
                auto_log_cpu=False,
                auto_log_gpu=False,
            )

    @override
    def write(self, step: int, points: Points) -> None:
        self._run.log(dict(points), step=step)

    @override
    def close(self, failed: bool) -> None:
        with redirect_stdout(sys.stderr):
            self._run.finish()


class WandB(Tracker):
    """
    See `Tracker`. Its key is in `WANDB_API_KEY`; `WANDB_MODE=offline` writes to the run directory.

    Args:
        project: its name.
        job: of the run.
        folder: the run directory.
        run_id: id of the run to resume; None: a new run.
    """

    def __init__(self, project: str, job: Any, folder: Path, run_id: str | None) -> None:
        import wandb

        quiet = wandb.Settings(silent=True, console="off")  # stdout is for the result
        self._run = wandb.init(
            project=project,
            name=folder.name,
            id=run_id,
            resume="allow",
            dir=str(folder),
            config=_public_fields(job),
            settings=quiet,
        )
        self.id = str(self._run.id)
        # W&B drops repeated steps after a resume, unless `step` is a metric of its own.
        self._run.define_metric("*", step_metric="step")

    @override
    def write(self, step: int, points: Points) -> None:
        self._run.log({**points, "step": step})

    @override
    def close(self, failed: bool) -> None:
        import wandb

        self._run.finish(exit_code=int(failed))
        wandb.teardown()
