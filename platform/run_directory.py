"""
The run directory: what a run leaves on disk.

    <storage_path>/<job>-<UTC time>-<4 hex digits>/
        job.yaml            the resolved job, every default visible
        metrics.jsonl       one line per step and per evaluation
        tensorboard/        the same for TensorBoard
        model.safetensors   the trained model
        pipeline_trace.json     of pipelines: when each rank did what in one step
        apply_log.safetensors   of asynchronous runs: in which order each shard applied gradients
        checkpoints/        step-000120/ and others: to resume from (platform/checkpoints.py)
        result.json         how it ended: status, last figures, or the error

Metrics are flushed with every line: they are there when the run is not any more.
"""

import json
import math
import os
import secrets
import time
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from distplat.platform.errors import StorageError
from distplat.platform.job_file import render_job
from distplat.platform.pipeline_trace import TRACE_FILE, Trace
from distplat.platform.progress import (
    EvalSummary,
    Recovery,
    Resized,
    Saved,
    Setback,
    StepSummary,
    Summary,
)
from distplat.platform.spec import Job

_KINDS = {
    StepSummary: "step",
    EvalSummary: "evaluation",
    Setback: "setback",
    Recovery: "recovery",
    Resized: "resized",
    Saved: "checkpoint",
}
"""Value of `kind` in a line of metrics.jsonl."""


def new_run_name(job: Job) -> str:
    """Give a name that no other run has: `<job>-<UTC time>-<4 hex digits>`."""
    stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    return f"{job.name}-{stamp}-{secrets.token_hex(2)}"


class RunDirectory:
    """
    One run's directory.

    Args:
        job: the resolved job.
        run: the run's name.
        base: what `storage_path` is relative to.

    Raises:
        StorageError: it cannot be made.
    """

    def __init__(self, job: Job, run: str, base: Path) -> None:
        self.path = (base / job.storage_path / run).resolve()
        try:
            self.path.mkdir(parents=True, mode=0o700)
            (self.path / "job.yaml").write_text(render_job(job))
            self._metrics = (self.path / "metrics.jsonl").open("a", buffering=1)
        except OSError as error:
            raise StorageError(f"cannot make the run directory {self.path}: {error}") from error
        self._board: _TensorBoard | None = None

    def record(self, summary: Summary) -> None:
        """
        Write one step, evaluation, trace or setback down.

        Raises:
            StorageError: the disk is full, or the directory is gone.
        """
        if isinstance(summary, Trace):
            self.keep(TRACE_FILE, summary.to_json())
            return
        kind = _KINDS[type(summary)]
        try:
            self._metrics.write(_to_json({"kind": kind, **asdict(summary)}) + "\n")
            if self._board is None:
                self._board = _TensorBoard(self.path / "tensorboard")
            if isinstance(summary, StepSummary | EvalSummary):
                self._board.add(summary)
        except OSError as error:
            raise StorageError(f"cannot write to {self.path}: {error}") from error

    def save_model(self, model: bytes) -> Path:
        """
        Write the trained model, whole or not at all.

        Args:
            model: in the safetensors format.

        Raises:
            StorageError: the disk is full, or the directory is gone.
        """
        return self.keep("model.safetensors", model)

    def keep(self, name: str, data: bytes) -> Path:
        """
        Write a file of the run, whole or not at all.

        Raises:
            StorageError: the disk is full, or the directory is gone.
        """
        path = self.path / name
        try:
            _write_durably(path, data)
        except OSError as error:
            raise StorageError(f"cannot write {path}: {error}") from error
        return path

    def finish(self, status: str, facts: Mapping[str, Any]) -> None:
        """Write down how the run ended, and close the files."""
        if self._board is not None:
            self._board.close()
        self._metrics.close()
        text = _to_json({"status": status, **facts}, indent=2) + "\n"
        try:
            _write_durably(self.path / "result.json", text.encode())
        except OSError as error:
            raise StorageError(f"cannot write to {self.path}: {error}") from error


def _to_json(facts: Mapping[str, Any], indent: int | None = None) -> str:
    """Give strict JSON: a diverged loss becomes null, for NaN is no JSON."""

    def strict(value: Any) -> Any:
        if isinstance(value, float) and not math.isfinite(value):
            return None
        if isinstance(value, Mapping):
            return {key: strict(item) for key, item in value.items()}
        return value

    return json.dumps(strict(facts), indent=indent, allow_nan=False)


def _write_durably(path: Path, data: bytes) -> None:
    """Write, flush to the disk, then take the name: a reader sees the old file or the whole new."""
    partial = path.with_suffix(path.suffix + ".partial")
    with partial.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


class _TensorBoard:
    """TensorBoard's own event writer, without torch's wrapper: the driver does not import torch."""

    def __init__(self, path: Path) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._event, self._summary = Event, Summary
        self._writer = EventFileWriter(str(path), flush_secs=10)

    def add(self, summary: StepSummary | EvalSummary) -> None:
        """Add one point to each curve."""
        if isinstance(summary, StepSummary):
            values = {"train/loss": summary.loss, "train/samples": float(summary.samples)}
            values |= {f"seconds/{part}": s for part, s in summary.seconds.items()}
            values |= {f"figures/{name}": value for name, value in summary.figures.items()}
        else:
            values = {f"eval/{name}": value for name, value in summary.metrics.items()}
        points = [self._summary.Value(tag=tag, simple_value=v) for tag, v in values.items()]
        event = self._event(
            wall_time=time.time(), step=summary.step, summary=self._summary(value=points)
        )
        self._writer.add_event(event)

    def close(self) -> None:
        """Flush and close."""
        self._writer.close()
