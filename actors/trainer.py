"""
The Python front door: `Trainer(job, task).fit() -> Result`. The command line is a layer on it.

The driver imports neither torch nor the user's code: both are slow, and both belong to the workers.
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
"""Names of directories with checkpoints that were brought from a URL begin so."""


class Trainer:
    """
    Trains a task, or with a train function, as a job says.

    Args:
        job: a `Job`, or a mapping with the fields of a job file.
        task: the task's class, or a train function; None: what `job.task` names. The job of a
            function has no `optimizer`, `global_batch_size`, `epochs` and `steps`.
        working_dir: where `job.task` is looked for; None: the current directory.
        storage_dir: what `storage_path`, or `runs` where that is a URL, is relative to; None: the
            same as `working_dir`.
        strategy_file: a Python file that registers strategies of your own.
        callbacks: told what happens, in this process; one that raises is told no more.
        resume: a run directory, or one of its checkpoints, to go on from; a relative one is taken
            from `storage_dir`. Or the URL of one: its checkpoint is brought to the local disk, for
            as long as this object is there.
        progress: whether to show on stderr how far the run is; None: on a terminal and in a
            notebook.
        log_to_driver: whether what workers print appears here, too; it is always in the run
            directory's `logs`.

    Raises:
        SpecError: the job or the task's class is wrong, or the run cannot go on from the
            checkpoint; says everything that is.
        StorageError: all checkpoints there are damaged.
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
            raise SpecError(Problem(("task",), "name a task in the job, or hand Trainer a class"))
        self._task = task
        self._task_warnings = [] if task is None else check_task(task, self.job)
        self._dir = Path(working_dir or ".").resolve()
        self._storage_dir = Path(storage_dir or self._dir).resolve()
        self._callbacks = tuple(callbacks)
        check_callbacks(self._callbacks)
        self._progress = progress
        self._log_to_driver = log_to_driver
        check_libraries(self.job)
        self._evaluated: Mapping[str, Any] | None = None  #: of the checkpoint, see `Launch`
        self._resumed = self._find_checkpoint(resume) if resume is not None else None

    def _find_checkpoint(self, resume: str | Path) -> Path:
        """Find the checkpoint to go on from, and compare it with the job."""
        if not self._has_checkpoints:
            text = f"the strategy {self.job.strategy.name!r} cannot go on from a checkpoint"
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
            EarlyStopping(self.job.early_stop, self._evaluated)  # damaged: before there is a run
        return checkpoint.path

    def _temporary_folder(self) -> Path:
        """Make a directory that goes with this object."""
        parent = self._storage_dir / local_folder(self.job.storage_path)

        def make(on_progress: OnProgress) -> OwnedFolder:
            parent.mkdir(parents=True, exist_ok=True)
            return OwnedFolder(parent, _RESUMED)

        try:
            folder = with_deadline(make, parent, self.job.failure.storage_timeout_s)
        except OSError as error:
            raise StorageError(f"cannot make a directory in {parent}: {error.strerror}") from error
        weakref.finalize(self, folder.remove)
        run_in_thread("left checkpoints", lambda: remove_orphans(parent, _RESUMED))
        return folder.path

    def fit(self) -> Result:
        """
        Train to the end. Starts a local Ray where none is connected, and ends that one again.

        Raises:
            UserCodeError: the task raised; carries its traceback, rank and step.
            InfrastructureError: a worker or server was lost, or a deadline passed.
            SpecError: the cluster cannot hold the job.
            StorageError: the run directory cannot be written.
            Interrupted: SIGINT, SIGTERM or SIGHUP; the second one does not wait for an orderly end.
        """
        for line in self._task_warnings:
            logger.warning("%s", line)
        directory = RunDirectory(self.job, new_run_name(self.job.name), self._storage_dir)
        result = Result(directory.path, None, reported=self.job.own_loop)
        # Of the run that this one goes on from, which may be gone by now.
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
        """Train to the end; `result` takes what comes of it."""
        began, run = time.monotonic(), directory.path.name
        writers, upload = _writers(directory), None

        def tell(summary: Summary) -> None:
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

        handlers = RunHandlers(tell, save, files.keep, callbacks.ending)
        with Stopping() as stopping:
            try:
                upload = self._upload(directory.path, stopping.check)
                result.url = upload.url if upload is not None else None
                with stopping.immediate():  # a callback may wait for a network, or a password
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
                    logger.warning("--resume %s goes on after step %d", directory.path, step)
                if upload is not None and (missing := upload.close(lambda: stopping.is_requested)):
                    logger.warning("%s", missing)
                raise
            result.seconds = time.monotonic() - began
            # How many steps a train function would have made nobody knows.
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
        Write down that the run ended well, and complete its copy.

        Raises:
            StorageError: one of them cannot be done.
            Interrupted: a signal broke the upload off.
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
        finally:  # where the local disk is full the model is to come there all the more
            if upload is not None:
                missing = upload.close(lambda: stopping.is_requested)
        if missing:
            lost = incomplete_upload_error(missing, result.checkpoint)
            if stopping.is_requested:
                logger.warning("%s", lost)
            facts |= {"error": str(lost), NOT_UPLOADED: missing}
            with suppress(StorageError):
                directory.finish("STOPPED" if stopping.is_requested else "FAILED", facts)
            stopping.check()
            raise lost

    def _upload(self, folder: Path, check: Callable[[], None]) -> RunUpload | None:
        """
        Begin to keep a copy of the run directory where the job names a URL.

        Raises:
            StorageError: nothing can be written there, now or later.
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
    What a run has trained, on its way to the run directory; to its URL, if that does not take it.

    Args:
        directory: the run directory.
        result: knows the URL, if there is one, and is told where the model is.
        limit_s: `failure.storage_timeout_s`.
    """

    def __init__(self, directory: RunDirectory, result: Result, limit_s: float) -> None:
        self._directory, self._result, self._limit_s = directory, result, limit_s
        self._refused: list[str] = []  #: names of files that are at the URL alone
        self._error: StorageError | None = None  #: of the local disk, the first one
        self._naming = threading.Lock()  #: held while `model` is set, and while it is written down
        self._write: Callable[[str], object] | None = None  #: see `record`
        self.model = ""  #: where the model is; empty: nowhere

    def keep(self, name: str, data: bytes) -> None:
        """
        Write a file.

        Raises:
            StorageError: neither place takes it.
        """
        refused: StorageError | None = None
        try:
            where = str(path := self._directory.keep(name, data))
            if name == MODEL_FILE:
                self._result.checkpoint = path
        except StorageError as error:
            refused = error
            where = self._bring(name, data, error)
        if name == MODEL_FILE:
            with self._naming:
                self.model = where
                if self._write is not None:
                    self._write(where)
        if refused is not None:  # last: a terminal that takes no more holds a warning up
            logger.warning("%s; %s is written to %s", refused, name, self._result.url)

    def record(self, write: Callable[[str], object]) -> None:
        """
        Have the end of a run that failed written down, with where its model is.

        Args:
            write: takes that; called again where the model comes later, for nobody waits for it
                after a second signal.
        """
        with self._naming:
            self._write = write
            write(self.model)

    def _bring(self, name: str, data: bytes, error: StorageError) -> str:
        """Write a file to the URL, which needs no local disk."""
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
        Called when all is kept.

        Raises:
            StorageError: the local disk has not taken something; says where it is.
        """
        if self._error is not None:
            names, url = ", ".join(self._refused), self._result.url
            raise StorageError(f"{self._error}; what was trained is at {url}: {names}")


def _wants_model(job: Job) -> bool:
    """Say whether a run that is stopped takes a checkpoint: not of a loop that reports its own."""
    return not job.own_loop and (job.checkpoint.enabled or job.checkpoint.save_final)


def _writers(directory: RunDirectory) -> list[BackgroundWriter[Summary]]:
    """
    Make the writers of metrics and of TensorBoard's curves: each fails by itself.

    After a callback that held the driver up thousands of steps are told at once: a disk that takes
    them is given the time.
    """
    return [
        BackgroundWriter(directory.record, logger.warning, patience_s=CLOSE_S),
        BackgroundWriter(directory.draw, logger.warning, what=CURVES, patience_s=CLOSE_S),
    ]


def _close(writers: Sequence[BackgroundWriter[Summary]]) -> None:
    """Wait for what is to be written, within reason for all together."""
    until = time.monotonic() + CLOSE_S
    for writer in writers:
        writer.close(max(0.0, until - time.monotonic()))


def _warn_where_model_is(result: Result) -> None:
    """Say where the model is, of a run that fails once that is saved."""
    if result.checkpoint is not None:
        logger.warning("the trained model is in %s all the same", result.checkpoint)


def _record_failure(
    directory: RunDirectory, result: Result, error: BaseException, model: str
) -> None:
    """Write down how a run failed, and where its model is if it has one."""
    facts = {"error": "; ".join(filter(None, [str(error), *getattr(error, "__notes__", ())]))}
    if result.best_checkpoint is not None:
        facts["best_checkpoint"] = str(result.best_checkpoint)
    if model:  # it is the tables, a checkpoint or the local disk that failed
        facts["model"] = model
    with suppress(StorageError):  # the run's own error is the one to tell
        stopped = isinstance(error, Interrupted | KeyboardInterrupt)
        directory.finish("STOPPED" if stopped else "FAILED", facts)
    if model:  # last: a terminal that takes no more holds a warning up
        _warn_where_model_is(result)
