"""
The Python entry point: `Trainer(job, task).fit() -> Result`. The command line uses it, too.

The driver imports neither torch nor the user's code: both are slow to import and only workers need
them.
"""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from distplat.actors.actor_group import Launch
from distplat.actors.callbacks import Callback, Callbacks, Tracking, check_callbacks
from distplat.actors.controller_client import RunHandlers
from distplat.actors.launch import train_on_ray
from distplat.actors.result import Result
from distplat.actors.stopping import Stopping
from distplat.actors.task_check import check_task
from distplat.actors.task_loading import TrainFunction
from distplat.actors.view import View, view_here
from distplat.platform.disk import (
    CLOSE_S,
    BackgroundWriter,
    OnProgress,
    run_in_thread,
    with_deadline,
)
from distplat.platform.errors import Interrupted, Problem, SpecError, StorageError
from distplat.platform.evaluations import EARLY_STOP, EarlyStopping, check_metrics
from distplat.platform.memory_upload import upload_bytes
from distplat.platform.owned_folder import OwnedFolder, remove_orphans
from distplat.platform.progress import EvalSummary, Summary
from distplat.platform.recovery import policy_of
from distplat.platform.remote_storage import is_url, local_folder, url_of
from distplat.platform.resume import check_libraries, start_from, start_from_url
from distplat.platform.run_directory import CURVES, MODEL_FILE, RunDirectory, new_run_name
from distplat.platform.run_upload import (
    NOT_UPLOADED,
    RunUpload,
    check_access,
    incomplete_upload_error,
    upload_of,
)
from distplat.platform.spec import Job
from distplat.strategies.catalog import complete, load_strategy_file, make_job, make_strategy
from distplat.strategies.task import Task

logger = logging.getLogger(__name__)

_RESUMED = ".resumed-"
"""Prefix of directories with checkpoints that were downloaded from a URL."""


class Trainer:
    """
    Trains a task or runs a train function.

    Args:
        job: a `Job`, or a mapping with the fields of a job file.
        task: the task's class, or a train function; None: imported from `job.task`. The job of a
            function has no `optimizer`, `global_batch_size`, `epochs` and `steps`.
        working_dir: folder from which `job.task` is imported; None: the current directory.
        storage_dir: base of a relative `storage_path`, or of `runs` if that is a URL; None:
            `working_dir`.
        strategy_file: a Python file that registers your own strategies.
        callbacks: objects called in this process on events of the run; a callback that raises is
            removed.
        resume: a run directory or one of its checkpoints to resume from, relative to
            `storage_dir`, or a URL. A checkpoint at a URL is downloaded, and deleted together with
            this object.
        progress: whether to show progress on stderr; None: on a terminal and in a notebook.
        log_to_driver: whether to print the output of workers here; it is always in the run
            directory's `logs`.

    Raises:
        SpecError: the job or the task's class is invalid, or does not match the checkpoint; lists
            all problems.
        StorageError: all checkpoints to resume from are damaged.
    """

    def __init__(
        self,
        job: Job | Mapping[str, object],
        task: type[Task] | TrainFunction | None = None,
        *,
        working_dir: str | Path | None = None,
        storage_dir: str | Path | None = None,
        strategy_file: str | Path | None = None,
        callbacks: Sequence[Callback] = (),
        resume: str | Path | None = None,
        progress: bool | None = None,
        log_to_driver: bool = True,
    ) -> None:
        self._strategy_file = load_strategy_file(Path(strategy_file)) if strategy_file else None
        function = task is not None and not isinstance(task, type | Task) and callable(task)
        if function and isinstance(job, Mapping):
            job = {"own_loop": True, **job}
        self.job = complete(job) if isinstance(job, Job) else make_job(job)
        if function and not self.job.own_loop:
            text = "the job is one of a task, and Trainer got a function"
            hint = "leave optimizer, global_batch_size, epochs and steps out, or set own_loop: true"
            raise SpecError(Problem(("task",), text, hint))
        strategy = make_strategy(self.job)
        self._roles = strategy.roles(self.job)
        self._survives_worker_loss = strategy.survives_worker_loss()
        self._has_checkpoints = strategy.has_checkpoints
        if task is None and self.job.task is None:
            raise SpecError(
                Problem(("task",), "name a task in the job, or pass a class to Trainer")
            )
        self._task = task
        self._task_warnings = [] if task is None else check_task(task, self.job)
        self._dir = Path(working_dir or ".").resolve()
        self._storage_dir = Path(storage_dir or self._dir).resolve()
        self._callbacks = tuple(callbacks)
        check_callbacks(self._callbacks)
        self._progress = progress
        self._log_to_driver = log_to_driver
        check_libraries(self.job)
        self._evaluated: Mapping[str, Any] | None = None  #: see `Launch`
        self._resumed = self._find_checkpoint(resume) if resume is not None else None

    def _find_checkpoint(self, resume: str | Path) -> Path:
        """Find the checkpoint to resume from, and check that it matches the job."""
        if not self._has_checkpoints:
            text = f"the strategy {self.job.strategy.name!r} cannot resume from a checkpoint"
            raise SpecError(Problem(("strategy",), text))
        if isinstance(resume, str) and is_url(resume):
            checkpoint = start_from_url(self.job, resume, self._temporary_folder(), logger.warning)
            self._resumed_from = url_of(resume, checkpoint)
        else:
            path = self._storage_dir / Path(resume).expanduser()
            checkpoint = start_from(self.job, path, logger.warning)
            self._resumed_from = str(checkpoint.path)
        self._evaluated = checkpoint.state.get(EARLY_STOP)
        if self.job.early_stop is not None:
            EarlyStopping(self.job.early_stop, self._evaluated)  # raises if the state is damaged
        return checkpoint.path

    def _temporary_folder(self) -> Path:
        """Create a directory that is deleted together with this object."""
        parent = self._storage_dir / local_folder(self.job.storage_path)

        def create(on_progress: OnProgress) -> OwnedFolder:
            parent.mkdir(parents=True, exist_ok=True)
            return OwnedFolder(parent, _RESUMED)

        try:
            folder = with_deadline(create, parent, self.job.failure.storage_timeout_s)
        except OSError as error:
            raise StorageError(f"cannot make a directory in {parent}: {error.strerror}") from error
        weakref.finalize(self, folder.remove)
        run_in_thread("left checkpoints", lambda: remove_orphans(parent, _RESUMED))
        return folder.path

    def fit(self) -> Result:
        """
        Train to the end. If Ray is not connected, start a local one and shut it down afterwards.

        Raises:
            UserCodeError: the task raised an exception; has its traceback, rank and step.
            InfrastructureError: a worker or server was lost, or a deadline expired.
            SpecError: the cluster is too small for the job.
            StorageError: the run directory cannot be written.
            Interrupted: SIGINT, SIGTERM or SIGHUP. A second signal skips the orderly shutdown.
        """
        for line in self._task_warnings:
            logger.warning("%s", line)
        directory = RunDirectory(self.job, new_run_name(self.job.name), self._storage_dir)
        result = Result(directory.path, None, reported=self.job.own_loop)
        # The directory of the resumed run may no longer exist.
        resumed_run = None if self._resumed is None else self._resumed.parent.parent
        trackers = [Tracking(self.job.trackers, resumed_run)] if self.job.trackers else []
        view = View() if self._progress else view_here() if self._progress is None else None
        views = [] if view is None else [view]
        callbacks = Callbacks((*views, *trackers, *self._callbacks), self.job.max_time_s)
        try:
            self._fit(directory, result, callbacks)
        except BaseException as error:
            callbacks.end(result, error)
            raise
        callbacks.end(result, None)
        return result

    def _fit(self, directory: RunDirectory, result: Result, callbacks: Callbacks) -> None:
        """Train to the end, and fill `result`."""
        start, run = time.monotonic(), directory.path.name
        writers, upload = _writers(directory), None

        def on_summary(summary: Summary) -> None:
            if isinstance(summary, EvalSummary):
                check_metrics(self.job, summary.metrics)
            result.add(summary)
            for writer in writers:
                writer.put(summary)
            callbacks.tell(summary)

        files = _TrainedFiles(directory, result, self.job.failure.storage_timeout_s)

        def save(model: bytes) -> None:
            if self.job.checkpoint.save_final:
                directory.save_model(model, files.keep)

        handlers = RunHandlers(on_summary, save, files.keep, callbacks.ending)
        with Stopping() as stopping:
            try:
                upload = self._upload(directory.path, stopping.check)
                result.url = upload.url if upload is not None else None
                with stopping.immediate():  # a callback may block, for example on a password
                    callbacks.start(self.job, run, directory.path)
                self._train(run, directory.path, handlers, stopping)
                _close(writers)
                files.check()
            except BaseException as error:
                stopping.reset()
                _close(writers)
                files.record(partial(_record_failure, directory, result, error))
                if isinstance(error, Interrupted) and result.checkpoints:
                    step = result.checkpoints[-1].step
                    logger.warning("--resume %s continues after step %d", directory.path, step)
                if upload is not None and (missing := upload.close(lambda: stopping.is_requested)):
                    logger.warning("%s", missing)
                raise
            result.seconds = time.monotonic() - start
            # The number of steps of a train function is unknown.
            result.stopped = callbacks.stop if result.cut_short or self.job.own_loop else None
            self._conclude(directory, upload, result, stopping)

    def _conclude(
        self,
        directory: RunDirectory,
        upload: RunUpload | None,
        result: Result,
        stopping: Stopping,
    ) -> None:
        """
        Record the success of the run, and complete its upload.

        Raises:
            StorageError: the record or the upload failed.
            Interrupted: a signal interrupted the upload.
        """
        facts: dict[str, Any] = {"metrics": result.metrics, "seconds": result.seconds}
        if result.stopped is not None:
            facts["stopped"] = result.stopped
        if result.best_checkpoint is not None:
            facts["best_checkpoint"] = str(result.best_checkpoint)
        if self._resumed is not None:
            facts["resumed_from"] = self._resumed_from
        missing = ""
        try:
            directory.finish("SUCCEEDED", facts)
        except StorageError:
            _warn_where_model_is(result)
            raise
        finally:  # upload the model even if the local disk is full
            if upload is not None:
                missing = upload.close(lambda: stopping.is_requested)
        if missing:
            error = incomplete_upload_error(missing, result.checkpoint)
            if stopping.is_requested:
                logger.warning("%s", error)
            facts |= {"error": str(error), NOT_UPLOADED: missing}
            with suppress(StorageError):
                directory.finish("STOPPED" if stopping.is_requested else "FAILED", facts)
            stopping.check()
            raise error

    def _upload(self, folder: Path, check: Callable[[], None]) -> RunUpload | None:
        """
        Start to upload the run directory if the job's `storage_path` is a URL.

        Raises:
            StorageError: the URL is not writable.
        """
        url, limit_s = self.job.storage_path, self.job.failure.storage_timeout_s
        if not is_url(url):
            return None
        check_access(folder, url, limit_s, check)
        return upload_of(folder, url, limit_s, logger.warning)

    def _train(self, run: str, folder: Path, handlers: RunHandlers, stopping: Stopping) -> None:
        launch = Launch(
            self.job,
            run,
            self._roles,
            policy_of(
                self.job.failure,
                self._survives_worker_loss and not self.job.own_loop,
                self.job.checkpoint.enabled or self.job.own_loop,
                self._roles.holders(self.job.scaling.world),
            ),
            self._task,
            str(self._dir),
            self._strategy_file,
            folder,
            self._resumed,
            self._evaluated,
            log_to_driver=self._log_to_driver,
            checked=self._task is not None,
            saves_at_stop=self._has_checkpoints and _wants_model(self.job),
        )
        if self.job.scaling.num_workers == 0:
            from distplat.actors.in_process import train_in_process  # torch

            train_in_process(launch, handlers, stopping)
        else:
            train_on_ray(launch, handlers, stopping)


class _TrainedFiles:
    """
    Writes the model and other files of a run to its directory, or if that fails, to its URL.

    Args:
        directory: the run directory.
        result: has the URL, if any, and receives the path of the model.
        limit_s: `failure.storage_timeout_s`.
    """

    def __init__(self, directory: RunDirectory, result: Result, limit_s: float) -> None:
        self._directory, self._result, self._limit_s = directory, result, limit_s
        self._refused: list[str] = []  #: names of files that exist only at the URL
        self._error: StorageError | None = None  #: first error of the local disk
        self._model_lock = threading.Lock()  #: guards `model` and `_write`
        self._write: Callable[[str], object] | None = None  #: see `record`
        self.model = ""  #: path or URL of the model; empty: not saved

    def keep(self, name: str, data: bytes) -> None:
        """
        Write a file.

        Raises:
            StorageError: neither the directory nor the URL is writable.
        """
        refused: StorageError | None = None
        try:
            location = str(path := self._directory.keep(name, data))
            if name == MODEL_FILE:
                self._result.checkpoint = path
        except StorageError as error:
            refused = error
            location = self._upload(name, data, error)
        if name == MODEL_FILE:
            with self._model_lock:
                self.model = location
                if self._write is not None:
                    self._write(location)
        if refused is not None:  # last, because a blocked terminal blocks the warning
            logger.warning("%s; %s is written to %s", refused, name, self._result.url)

    def record(self, write: Callable[[str], object]) -> None:
        """
        Record the end of a failed run, with the location of its model.

        Args:
            write: called with the location, and again if the model is saved later: after a second
                signal the driver does not wait for it.
        """
        with self._model_lock:
            self._write = write
            write(self.model)

    def _upload(self, name: str, data: bytes, error: StorageError) -> str:
        """Upload a file from memory; return its URL."""
        if (url := self._result.url) is None:
            raise error
        try:
            upload_bytes(url, name, data, self._limit_s)
        except StorageError as other:
            raise StorageError(f"{error}; nor to the URL: {other}") from error
        self._error = self._error or error
        self._refused.append(name)
        return f"{url}/{name}"

    def check(self) -> None:
        """
        Check that all files are in the run directory; called after the last one.

        Raises:
            StorageError: some files exist only at the URL, which the error names.
        """
        if self._error is not None:
            names, url = ", ".join(self._refused), self._result.url
            raise StorageError(f"{self._error}; trained files are at {url}: {names}")


def _wants_model(job: Job) -> bool:
    """Return whether a stopped run writes a checkpoint; train functions write their own."""
    return not job.own_loop and (job.checkpoint.enabled or job.checkpoint.save_final)


def _writers(directory: RunDirectory) -> list[BackgroundWriter[Summary]]:
    """
    Create the writers of metrics and of TensorBoard's curves, which fail independently.

    Their patience is long, because thousands of steps may arrive at once after a slow callback.
    """
    return [
        BackgroundWriter(directory.record, logger.warning, patience_s=CLOSE_S),
        BackgroundWriter(directory.draw, logger.warning, what=CURVES, patience_s=CLOSE_S),
    ]


def _close(writers: Sequence[BackgroundWriter[Summary]]) -> None:
    """Wait for pending writes, with one timeout for all writers."""
    deadline = time.monotonic() + CLOSE_S
    for writer in writers:
        writer.close(max(0.0, deadline - time.monotonic()))


def _warn_where_model_is(result: Result) -> None:
    """Log where the model is if the run fails after saving it."""
    if result.checkpoint is not None:
        logger.warning("the trained model was saved to %s", result.checkpoint)


def _record_failure(
    directory: RunDirectory, result: Result, error: BaseException, model: str
) -> None:
    """Record the error of a run and the location of its model, if any."""
    facts = {"error": "; ".join(filter(None, [str(error), *getattr(error, "__notes__", ())]))}
    if result.best_checkpoint is not None:
        facts["best_checkpoint"] = str(result.best_checkpoint)
    if model:  # the run failed after training
        facts["model"] = model
    with suppress(StorageError):  # raise the run's own error instead
        stopped = isinstance(error, Interrupted | KeyboardInterrupt)
        directory.finish("STOPPED" if stopped else "FAILED", facts)
    if model:  # last, because a blocked terminal blocks the warning
        _warn_where_model_is(result)
