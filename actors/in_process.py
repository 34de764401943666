"""
`num_workers: 0`: one rank in the calling process, without Ray, for debugging and profiling.

Servers are the same classes as on Ray, as objects of this process (`local_actors.py`).
"""

import logging
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import replace

from distplat.actors.actor_group import Launch
from distplat.actors.checkpoint_uploader import CheckpointUploader
from distplat.actors.checkpointing import Checkpoints
from distplat.actors.controller_client import RunHandlers
from distplat.actors.local_actors import LocalTaskScheduler, Servers, TableServers
from distplat.actors.local_transport import fetch_arrays
from distplat.actors.servers.leases import RemoteLeases
from distplat.actors.stopping import Stopping
from distplat.actors.task_check import check_task
from distplat.actors.task_loading import TrainFunction, load_task_class, load_train_function
from distplat.actors.training import run_function, saved_model
from distplat.actors.user_errors import as_user_error, killed_loader
from distplat.platform.apply_log import FILE_NAME, pack_log
from distplat.platform.checkpoints import StoredCheckpoint
from distplat.platform.errors import DistplatError
from distplat.platform.fork_guard import ForkGuard
from distplat.platform.progress import AnyReport, ReportAggregator, StepReport
from distplat.platform.spec import Job
from distplat.platform.stop_order import StopOrder
from distplat.platform.tensor_file import decode
from distplat.platform.torchrun import ProcessLocation
from distplat.strategies.checkpoint.checkpoint_reader import SavedState
from distplat.strategies.fakes import Fabric
from distplat.strategies.function.function_session import SessionPorts
from distplat.strategies.loop.loop import Progress
from distplat.strategies.loop.session import (
    CheckpointPorts,
    Ports,
    join,
    make_task,
    prepare,
    trained_model,
)
from distplat.strategies.sparse.files import keep_tables
from distplat.strategies.task import Task
from distplat.strategies.torch_compat import single_rank_store
from distplat.strategies.worker_strategy import make_worker_strategy

logger = logging.getLogger(__name__)


def train_in_process(launch: Launch, handlers: RunHandlers, stopping: Stopping) -> None:
    """
    Train in this process, with the strategy's ports in memory.

    Args:
        launch: parameters of the run.
        handlers: callbacks for events and results.
        stopping: already entered; a signal interrupts the task's code.

    Raises:
        DistplatError: see `Trainer.fit`. A user's exception is the cause of `UserCodeError`.
    """
    aggregator, progress = ReportAggregator(world=1), Progress()
    checkpoints = Checkpoints(launch, 1, fetch_arrays)

    def report(part: AnyReport) -> None:
        for summary in aggregator.add(part):
            checkpoints.observe(summary)
            handlers.on_summary(summary)
            _report_finished(checkpoints, handlers)

    def save(model: bytes) -> None:
        with stopping.not_immediate():
            handlers.on_model(model)

    try:
        with stopping.immediate():
            _train(launch, report, progress, replace(handlers, on_model=save), checkpoints)
    except (DistplatError, KeyboardInterrupt):
        raise
    except (Exception, SystemExit) as error:  # sys.exit(0) in a task counts as failure
        at, evaluating = progress.at, progress.evaluating
        own = launch.job.own_loop
        user_error = killed_loader(error, own_loop=own) or as_user_error(
            error, 0, at, evaluating=evaluating, own_loop=own
        )
        raise user_error from error


def _train(
    launch: Launch,
    report: Callable[[AnyReport], None],
    progress: Progress,
    handlers: RunHandlers,
    checkpoints: Checkpoints,
) -> None:
    job = launch.job
    if job.own_loop:
        _train_function(launch, report, progress, handlers, checkpoints)
        return
    device = "cuda" if job.scaling.use_gpu else "cpu"
    with ForkGuard():
        task = make_task(job, lambda: _task_class(launch))
        strategy = make_worker_strategy(job)
        prepared = prepare(job, task, device, strategy)
    job = prepared.job
    for warning in prepared.warnings:
        logger.warning("%s", warning)
    checkpoint_every = job.checkpoint.period(prepared.sampler.steps_per_epoch)
    uploader = _uploader(checkpoints, job)
    saved = _saved(checkpoints.newest())
    with ExitStack() as stack:
        others = _OtherRoles(job, launch, checkpoint_every, stack)
        join(
            prepared,
            strategy,
            0,
            others.ports(prepared.total_steps, saved),
            report=others.wrap_report(report, handlers),
            progress=progress,
            checkpoints=CheckpointPorts(saved, take=uploader.take),
            stop=lambda step: StopOrder.END if handlers.ending() else StopOrder.NONE,
        ).run()
        uploader.flush()
        handlers.on_model(saved_model(trained_model(prepared, strategy, 0)))
    _finish_checkpoints(checkpoints, handlers)
    others.keep_files(handlers, resumed=saved is not None)


class _OtherRoles:
    """
    Servers, embedding servers and task scheduler of a run in this process.

    Args:
        job: job of the prepared worker.
        launch: parameters of the run.
        every: steps between checkpoints.
        stack: closes them.
    """

    def __init__(self, job: Job, launch: Launch, every: int, stack: ExitStack) -> None:
        self._job, self._launch, self._every = job, launch, every
        roles = launch.roles
        self._tables = stack.enter_context(
            closing(TableServers(_without_table_backups(job), launch.run, every=every))
        )
        self._servers: Servers | None = None
        self._scheduler: LocalTaskScheduler | None = None
        self._leases: RemoteLeases | None = None
        if roles.servers:
            self._servers = stack.enter_context(closing(_servers(job, launch)))
        if roles.consistency.dynamic_tasks:
            self._scheduler = stack.enter_context(
                closing(LocalTaskScheduler(job, roles, launch.run))
            )
            self._leases = self._scheduler.leases(0)

    def ports(self, steps: int, saved: SavedState | None) -> Ports:
        """Return the worker's ports; `steps`: steps of the run."""
        servers, with_tables = self._servers, self._job.embeddings is not None
        return Ports(
            collective=Fabric(1).collective(0),
            shards=servers.shards(0, steps, every=self._every) if servers is not None else None,
            tables=self._tables.tables(0, saved=saved) if with_tables else None,
            leases=self._leases,
        )

    def wrap_report(
        self, report: Callable[[AnyReport], None], handlers: RunHandlers
    ) -> Callable[[AnyReport], None]:
        """Return a function that also passes reports to the task scheduler, if there is one."""
        scheduler, leases = self._scheduler, self._leases
        if scheduler is None or leases is None:
            return report

        def report_and_count(part: AnyReport) -> None:
            if isinstance(part, StepReport):
                leases.count(part)
            report(part)
            if handlers.ending():
                scheduler.call("end_early")

        return report_and_count

    def keep_files(self, handlers: RunHandlers, *, resumed: bool) -> None:
        """Pass the log of updates and the embedding tables, if any, to the handlers."""
        job, run = self._job, self._launch.run
        asynchronous = self._launch.roles.consistency.asynchronous
        if self._servers is not None and asynchronous and not resumed:
            handlers.on_file(FILE_NAME, pack_log(self._servers.logs(), {"run": run}))
        if job.embeddings is not None and job.checkpoint.save_final:
            keep_tables(self._tables.table_servers, job.seed, handlers.on_file)


def _train_function(
    launch: Launch,
    report: Callable[[AnyReport], None],
    progress: Progress,
    handlers: RunHandlers,
    checkpoints: Checkpoints,
) -> None:
    """Run a train function in this process."""
    uploader = _uploader(checkpoints, launch.job)

    def load() -> TrainFunction:
        if launch.task is not None and not isinstance(launch.task, type):
            return launch.task
        function = load_train_function(launch.job.task or "", launch.working_dir)
        check_task(function, launch.job)
        return function

    saved = _saved(checkpoints.newest())
    ports = SessionPorts(report, uploader.take, progress, saved, handlers.ending)
    with ExitStack() as stack:
        shards = None
        if launch.roles.servers:
            shards = stack.enter_context(closing(_servers(launch.job, launch))).shards(0, 1)
        group = Fabric(1).collective(0)
        location = ProcessLocation("here", "127.0.0.1")
        trained = run_function(launch.job, load, group, location, ports, shards, single_rank_store)
    uploader.flush()
    handlers.on_model(saved_model(trained))
    _finish_checkpoints(checkpoints, handlers)


def _uploader(checkpoints: Checkpoints, job: Job) -> CheckpointUploader:
    copy = lambda arrays: [array.copy() for array in arrays]  # noqa: E731
    return CheckpointUploader(0, 0, copy, checkpoints.take, job.failure.step_timeout_s)


def _servers(job: Job, launch: Launch) -> Servers:
    """Create parameter servers of equal shards, without backups: they share this process."""
    return Servers(job, replace(launch.roles, split_by_load=False, replication=1), launch.run)


def _without_table_backups(job: Job) -> Job:
    """Return the job without backups of its tables; see `_servers`."""
    if job.embeddings is None:
        return job
    tables = job.embeddings.model_copy(update={"replication": 1})
    return job.model_copy(update={"embeddings": tables})


def _finish_checkpoints(checkpoints: Checkpoints, handlers: RunHandlers) -> None:
    """Wait for checkpoints after a succeeded run, and report them."""
    checkpoints.drain()
    checkpoints.finish()
    _report_finished(checkpoints, handlers)


def _report_finished(checkpoints: Checkpoints, handlers: RunHandlers) -> None:
    for summary in checkpoints.take_finished():
        handlers.on_summary(summary)


def _task_class(launch: Launch) -> type[Task]:
    """Load and check the task's class; log its warnings unless the driver has."""
    given_class = launch.task if isinstance(launch.task, type) else None
    task_class = given_class or load_task_class(launch.job.task or "", launch.working_dir)
    warnings = check_task(task_class, launch.job)
    for line in () if launch.checked else warnings:
        logger.warning("%s", line)
    return task_class


def _saved(stored: StoredCheckpoint | None) -> SavedState | None:
    if stored is None:
        return None
    return SavedState(stored.state, lambda name: decode(stored.files[f"{name}.safetensors"]))
