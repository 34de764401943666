"""
The run directory: the files that a run writes.

    <storage_path>/<job>-<UTC time>-<4 hex digits>/
        job.yaml            the resolved job, with all defaults
        metrics.jsonl       one line per step and per evaluation
        tensorboard/        the same for TensorBoard
        model.safetensors   the trained model
        model_ema.safetensors   the average of its weights, if the job has `ema`
        task.safetensors    the task's own parameters, if any
        task_ema.safetensors    their average
        pipeline_trace.json     pipelines: what each rank did when in one step
        apply_log.safetensors   asynchronous runs: the order in which each shard applied gradients
        checkpoints/        step-000120/ and others: to resume from (platform/checkpoints.py)
        ray.log             the ends of the logs of its own Ray, if that failed
        result.json         the outcome: status, last metrics, or the error

Metrics are flushed with every line, so they survive a crash. A hanging disk costs a run
`failure.storage_timeout_s`, once. The umask decides who may read the directory; others on the
machine never may (`disk.FOLDER_MODE`).
"""

import contextlib
import errno
import os
import secrets
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from distplat.platform.disk import (
    FOLDER_MODE,
    OnProgress,
    RecordFile,
    reserve,
    with_deadline,
    write_atomically,
)
from distplat.platform.errors import StorageError
from distplat.platform.job_file import render_job
from distplat.platform.pipeline_trace import TRACE_FILE, Trace
from distplat.platform.progress import KINDS, EvalSummary, StepSummary, Summary, to_json
from distplat.platform.remote_storage import local_folder
from distplat.platform.spec import Job
from distplat.platform.tensor_file import EMA_PREFIX, split_task_tensors
from distplat.platform.trackers import points_of

_RESULT_BYTES = 64 * 2**10
"""Disk space reserved for `result.json` from the start."""
_RETRY_S = 2.0
"""Deadline after the disk has already missed one."""

MODEL_FILE = "model.safetensors"
"""The trained model."""

TASK_FILE = "task.safetensors"
"""The task's own parameters."""

EMA_FILE = "model_ema.safetensors"
"""The average of the trained weights."""

CURVES = "TensorBoard's curves"

_KIND_OF = {kind: name for name, kind in KINDS.items()}


def new_run_name(name: str) -> str:
    """Return a unique run name: `<name>-<UTC time>-<4 hex digits>`."""
    stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    return f"{name}-{stamp}-{secrets.token_hex(2)}"


class RunDirectory:
    """
    Directory of one run.

    Args:
        job: the resolved job.
        run: the run's name.
        base: directory to which `storage_path`, or `runs` if that is a URL, is relative.

    Raises:
        StorageError: it cannot be created; from each method also: the disk does not respond.
    """

    def __init__(self, job: Job, run: str, base: Path) -> None:
        self.path = base / local_folder(job.storage_path) / run
        self._limit_s, self._disk_hangs = job.failure.storage_timeout_s, False
        self._board: _TensorBoard | None = None
        self._with_deadline(
            "make the run directory", self.path, lambda on_progress: self._create(job)
        )

    def _create(self, job: Job) -> None:
        self.path = self.path.resolve()
        self.path.mkdir(parents=True, mode=FOLDER_MODE)
        write_atomically(self.path / "job.yaml", render_job(job).encode())
        self._metrics = RecordFile(self.path / "metrics.jsonl")
        self._reserve = reserve(self.path, _RESULT_BYTES)

    def _with_deadline(self, what: str, path: Path, work: Callable[[OnProgress], object]) -> None:
        """Run disk work with a deadline; errors name the path."""
        limit_s = min(self._limit_s, _RETRY_S) if self._disk_hangs else self._limit_s
        self._disk_hangs = True
        try:
            with_deadline(work, path, limit_s)
        except OSError as error:
            self._disk_hangs = False
            raise _storage_error(f"{what} {path}", error) from error
        self._disk_hangs = False

    def record(self, summary: Summary) -> None:
        """
        Write a step, evaluation, trace or failure.

        Raises:
            StorageError: the disk is full, or the directory is gone.
        """
        if isinstance(summary, Trace):
            self.keep(TRACE_FILE, summary.to_json())
            return
        line = to_json({"kind": _KIND_OF[type(summary)], **asdict(summary)}, indent=None) + "\n"
        try:
            self._metrics.write(line.encode())
        except OSError as error:
            raise _storage_error(f"write {self._metrics.path}", error) from error

    def draw(self, summary: Summary) -> None:
        """
        Add a step or an evaluation to TensorBoard's curves; ignore other events.

        Raises:
            StorageError: the disk is full, or the directory is gone.
        """
        if not isinstance(summary, StepSummary | EvalSummary):
            return
        target = self.path / "tensorboard"
        try:
            if self._board is None:
                self._board = _TensorBoard(target)
            self._board.add(summary)
        except OSError as error:
            raise _storage_error(f"write {target}", error) from error

    def save_model(self, model: bytes, keep: Callable[[str, bytes], object] | None = None) -> Path:
        """
        Write the trained model atomically, then the task's own parameters and the averages.

        Args:
            model: all of these, in the safetensors format.
            keep: writes a file; None: this class's `keep`.

        Returns:
            Path of the model's file.

        Raises:
            StorageError: the disk is full, or the directory is gone.
        """
        keep = keep or self.keep
        model, ema = split_task_tensors(model, EMA_PREFIX)
        model, task = split_task_tensors(model)
        keep(MODEL_FILE, model)
        if task is not None:
            keep(TASK_FILE, task)
        if ema is not None:
            ema, task = split_task_tensors(ema)
            keep(EMA_FILE, ema)
            if task is not None:
                keep("task_ema.safetensors", task)
        return self.path / MODEL_FILE

    def keep(self, name: str, data: bytes) -> Path:
        """
        Write a file of the run atomically.

        Raises:
            StorageError: the disk is full, or the directory is gone.
        """
        path = self.path / name
        self._with_deadline(
            "write", path, lambda on_progress: write_atomically(path, data, on_progress)
        )
        return path

    def finish(self, status: str, facts: Mapping[str, Any]) -> None:
        """
        Write the outcome of the run, and close the files.

        Raises:
            StorageError: the disk is full, or the directory is gone.
        """
        text = to_json({"status": status, **facts}) + "\n"
        path = self.path / "result.json"

        def work(on_progress: OnProgress) -> None:
            self._reserve.close()  # frees space on a full disk
            try:
                write_atomically(path, text.encode())
            finally:
                self._close()

        self._with_deadline("write", path, work)

    def _close(self) -> None:
        """Close metrics and curves; every record is already written."""
        for file in (self._board, self._metrics):
            if file is not None:
                with contextlib.suppress(OSError):
                    file.close()


def _storage_error(what: str, error: OSError) -> StorageError:
    """Build the error for a failed operation, with a hint if the disk is full."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    remedy = "; free some space, or set `storage_path` to another disk" if full else ""
    return StorageError(f"cannot {what}: {error.strerror or error}{remedy}")


class _TensorBoard:
    """
    Writer of TensorBoard's format without torch's wrapper: the driver does not import torch.

    TensorBoard's `EventFileWriter` writes in a thread, and does not report a full disk.

    Raises:
        OSError: the file cannot be created.
    """

    def __init__(self, path: Path) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary = Event, Summary
        # An earlier attempt may have failed on a full disk.
        path.mkdir(FOLDER_MODE, exist_ok=True)
        now = time.time()
        name = f"events.out.tfevents.{int(now):010d}.{socket.gethostname()}.{os.getpid()}.0"
        self._writer = RecordWriter(RecordFile(path / name))
        self._write(Event(wall_time=now, file_version="brain.Event:2"))

    def add(self, summary: StepSummary | EvalSummary) -> None:
        """Add one point to each curve."""
        values = points_of(summary).items()
        points = [self._summary.Value(tag=tag, simple_value=value) for tag, value in values]
        shown = self._summary(value=points)
        self._write(self._event(wall_time=time.time(), step=summary.step, summary=shown))

    def _write(self, event: Any) -> None:
        self._writer.write(event.SerializeToString())

    def close(self) -> None:
        """Close the file."""
        self._writer.close()
