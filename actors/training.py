"""
A worker's session: from its orders to the trained model. The first module that imports torch.

Exceptions of the user's code become `UserCodeError`, all others another `DistplatError`, so the
controller always learns a cause. Model, data and strategy are built once and kept for all attempts.
"""

from __future__ import annotations

import logging
import os
import pickle
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import ray
import torch
from safetensors.torch import save
from torch import Tensor

from distplat.actors.checkpoint_uploader import CheckpointUploader
from distplat.actors.collectives.default_group import as_torchrun
from distplat.actors.connection import Connection
from distplat.actors.messages import WorkOrder
from distplat.actors.process_setup import log_to_stderr
from distplat.actors.ray_errors import of_platform
from distplat.actors.ray_transport import RayTransport, host_here, location_here
from distplat.actors.task_check import check_task
from distplat.actors.task_loading import (
    TrainFunction,
    call_train_function,
    load_task_class,
    load_train_function,
)
from distplat.actors.transport import AnswerPending, TransportError
from distplat.actors.user_errors import as_user_error, killed_loader, lost_peer, traceback_of_call
from distplat.actors.visible_gpus import own_device
from distplat.actors.weights import Reply
from distplat.platform.checkpoints import Delivery
from distplat.platform.errors import Abandoned, DeadlineExceeded, DistplatError, StateLost
from distplat.platform.fork_guard import ForkGuard
from distplat.platform.progress import AnyReport, StepReport
from distplat.platform.recovery import policy_of
from distplat.platform.spec import Job
from distplat.platform.stop_order import StopOrder
from distplat.platform.tensor_file import to_bytes
from distplat.platform.tensor_slices import ITEM_BYTES, Bundle, Bytes
from distplat.platform.torchrun import ProcessLocation, TorchrunLaunch, free_port, variables_of
from distplat.strategies.checkpoint.checkpoint_reader import SavedState
from distplat.strategies.checkpoint.parts import model_part, whole_of
from distplat.strategies.collective import Collective, gather_values
from distplat.strategies.function.api import running
from distplat.strategies.function.function_session import (
    FunctionSession,
    SessionPorts,
    TrainContext,
)
from distplat.strategies.loop.checks import check_device
from distplat.strategies.loop.loop import Progress
from distplat.strategies.loop.prepared import Prepared
from distplat.strategies.loop.seeding import seed_again, seed_all, seed_function
from distplat.strategies.loop.session import (
    CheckpointPorts,
    describe,
    join,
    make_task,
    prepare,
    resize,
    trained_model,
)
from distplat.strategies.loop.snapshot_publisher import SnapshotPublisher, part_copy, state_copy
from distplat.strategies.model.parameter_layout import dtype_name
from distplat.strategies.ports import LoopShards
from distplat.strategies.task import Task
from distplat.strategies.worker_strategy import WorkerStrategy, make_worker_strategy

logger = logging.getLogger(__name__)


def run_function(
    job: Job,
    load: Callable[[], TrainFunction],
    group: Collective,
    location: ProcessLocation,
    ports: SessionPorts,
    shards: LoopShards | None,
    rendezvous: Callable[[], Any] | None = None,
    attempt: int = 0,
) -> dict[str, Tensor]:
    """
    Call a train function; return the state of the modules that it prepared.

    Exceptions of the function pass unchanged.

    Args:
        job: job of the run.
        load: imports the function, after seeding, as for a task.
        group: group of all ranks.
        location: location of this rank.
        ports: callbacks of the worker.
        shards: client of the parameter servers; None: the strategy has none.
        rendezvous: see `as_torchrun`; None: no process group of torch.distributed, because ranks
            are threads.
        attempt: see `WorkOrder`.
    """
    check_device("cuda" if job.scaling.use_gpu else "cpu")
    device = own_device() if job.scaling.use_gpu else torch.device("cpu")
    context = _train_context(job, attempt, group, location, device)
    session = FunctionSession(job, context, group, ports, shards)
    try:
        with as_torchrun(context, rendezvous) if rendezvous is not None else nullcontext():
            seed_function(job.seed)
            function = load()
            seed_again(job.seed)  # what its import has seeded stays
            with running(session), ForkGuard():
                call_train_function(function, job.task_args)
                session.returned()
        session.leave()
        return {name: value.clone() for name, value in session.trained().items()}
    finally:
        session.close()


def load_checked_function(order: WorkOrder) -> TrainFunction:
    """
    Load and check the train function that an order names.

    Raises:
        SpecError: see `load_train_function`, `check_function`.
    """
    function: TrainFunction = _load_task(order, load_train_function)
    check_task(function, order.job)
    return function


def _train_context(
    job: Job, attempt: int, group: Collective, location: ProcessLocation, device: torch.device
) -> TrainContext:
    port = free_port() if group.rank == 0 else 0
    gathered = gather_values([location.node, location.host, port], group, device)
    locations = [ProcessLocation(node, host) for node, host, _ in gathered]  # Ray has set the GPUs
    restarts = policy_of(job.failure, survives_worker_loss=False, checkpoints=True).max_failures
    launch = TorchrunLaunch(job.name, gathered[0][2], attempt, restarts)
    environment = variables_of(group.rank, locations, launch)
    local = int(environment["LOCAL_RANK"]), int(environment["LOCAL_WORLD_SIZE"])
    nodes = int(environment["GROUP_RANK"]), int(environment["GROUP_WORLD_SIZE"])
    return TrainContext(group.rank, group.world, *local, device, *nodes, environment)


_INITIAL_DIR = Path.cwd()
"""Initial working directory: Ray starts this process in the shipped `working_dir`, if any."""


@dataclass(frozen=True)
class AttemptState:
    """State of an attempt; replaced as a whole, because other threads read it."""

    attempt: int
    progress: Progress = field(default_factory=Progress)
    model: bytes | None = None
    """The trained model in the safetensors format, once the attempt has succeeded."""
    error: DistplatError | None = None
    """Error that ended the attempt, if any."""
    traceback: str = ""
    """See `PollResult.traceback`."""


class Session:
    """
    A worker's state of one run, over all attempts.

    Args:
        report: called with each report of the worker.
        deliver: called with parts of checkpoints, from another thread.
    """

    def __init__(
        self, report: Callable[[AnyReport], None], deliver: Callable[[Delivery], None]
    ) -> None:
        self._report, self._deliver = report, deliver
        self.state = AttemptState(-1)
        self.node = self.host = ""  #: of this process, once it has joined the run
        self.own_loop = False  #: whether the job runs a train function
        self._task: type[Task] | None = None  #: set if imported before the first attempt
        self._prepared: Prepared | None = None
        self._strategy: WorkerStrategy[Any] | None = None
        self._connection = Connection(RayTransport(), -1)
        self._store_lock = threading.Lock()
        self._stored_model: tuple[int, list[Any]] = -1, []  #: last version, and its reference
        self._snapshots: SnapshotPublisher[dict[str, torch.Tensor]] = SnapshotPublisher()
        self._part_snapshots: SnapshotPublisher[Bundle] = SnapshotPublisher()

    @property
    def prepared(self) -> bool:
        """Whether model and data are built; in a train function, whether it has made a step."""
        return self._prepared is not None or self.state.progress.at is not None

    def show(self, version: int) -> Reply:
        """
        Return a copy of the parameters, once available. Thread-safe.

        Args:
            version: minimum version of the copy; exact version if the model is partitioned.
        """
        attempt, prepared, strategy = self.state, self._prepared, self._strategy
        if prepared is not None and strategy is not None and strategy.cuts_model:
            passed, part = self._part_snapshots.exactly(version)
            ranks, total = tuple(range(prepared.roles.group_size)), prepared.total_steps
            content = part.content if part is not None else None
            return Reply(passed, version, None, ranks, total, content)
        steps, model = attempt.progress.step, attempt.model
        if model is not None:
            return Reply(steps, steps, self._store_model(steps, lambda: model))
        copy = self._snapshots.ask(version)
        if copy is None:
            return Reply(steps)
        state = copy.content
        return Reply(steps, copy.version, self._store_model(copy.version, lambda: save(state)))

    def _store_model(self, version: int, pack: Callable[[], bytes]) -> list[Any]:
        """Put a model into Ray's object store, once per version."""
        with self._store_lock:
            if self._stored_model[0] != version:
                self._stored_model = version, [ray.put(pack())]
            return self._stored_model[1]

    def _offer(self, version: int, prepared: Prepared) -> None:
        """Publish this rank's parameters; called between two steps."""
        flat = prepared.flat
        if prepared.holding is None:
            self._snapshots.offer(version, lambda: state_copy(flat.model))
            return
        copy = lambda: part_copy(model_part(flat, prepared.holding))  # noqa: E731
        self._part_snapshots.offer(version, copy, last=version == prepared.total_steps)

    def work(self, order: WorkOrder, *, abandoned: bool = False) -> None:
        """
        Run one attempt; `state` then has its result or its error.

        Args:
            order: the work order, of a later attempt than the previous one.
            abandoned: whether the attempt was abandoned before it started.
        """
        self._connection = Connection(RayTransport(), order.attempt)
        self.state = AttemptState(order.attempt)
        if abandoned:
            self._connection.stop(StopOrder.ABANDON)
        try:
            model = self._attempt(order, self.state.progress)
            self.state = replace(self.state, model=model)
        except BaseException as error:  # also SystemExit of user code: it would only end the thread
            progress = self.state.progress
            user_frames = traceback_of_call(error) if self.own_loop else ""
            if isinstance(error, DistplatError):
                failure: DistplatError = error.with_traceback(None)
            else:
                own = order.job.own_loop
                failure = _of_platform(error, own) or as_user_error(
                    error, order.rank, progress.at, evaluating=progress.evaluating, own_loop=own
                )
            self.state = replace(self.state, error=failure, traceback=user_frames)

    def prepare(self, order: WorkOrder, ready: Future[None]) -> None:
        """Build model and data before the first attempt, and set the result of `ready`."""
        self._run_ahead(order, ready, self._prepare)

    def import_task(self, order: WorkOrder, ready: Future[None]) -> None:
        """Import torch and the task without building anything, and set the result of `ready`."""
        self._run_ahead(order, ready, self._import)

    def _run_ahead(
        self, order: WorkOrder, ready: Future[None], work: Callable[[WorkOrder], object]
    ) -> None:
        try:
            work(order)
            ready.set_result(None)
        except DistplatError as error:
            ready.set_exception(error)
        except BaseException as error:  # see `work`
            on_ranks = f"rank {order.rank} (node {self.host})"  # other ranks are not affected
            own = order.job.own_loop
            failure = _of_platform(error, own) or as_user_error(
                error, order.rank, None, on_ranks=on_ranks, own_loop=own
            )
            ready.set_exception(failure)

    def stop(self, attempt: int, how: StopOrder) -> None:
        """Stop this attempt. Thread-safe."""
        connection = self._connection  # read once: the next attempt replaces it
        if connection.attempt == attempt:
            connection.stop(how)

    def _attempt(self, order: WorkOrder, progress: Progress) -> bytes:
        if order.job.own_loop:
            return self._run_train_function(order, progress)
        prepared, strategy = self._prepare(order)
        limit_s = order.job.failure.step_timeout_s
        connection = self._connection
        uploader = CheckpointUploader(order.rank, order.attempt, _put, self._deliver, limit_s)

        def report(part: AnyReport) -> None:
            self._report(part)
            if isinstance(part, StepReport):  # between two steps, on the training thread
                connection.count(part)
                self._offer(part.step + 1, prepared)

        try:
            loop = join(
                prepared,
                strategy,
                order.rank,
                connection.ports(order, prepared),
                report=report,
                progress=progress,
                checkpoints=CheckpointPorts(_saved(order), order.checkpoint_step, uploader.take),
                stop=lambda step: connection.stop_order,
            )
            self._log_start(order, prepared, loop.start)
            stopped = loop.run()
            uploader.flush()
            if stopped is StopOrder.RESIZE:
                raise Abandoned("this worker was told to stop between two steps")
            return saved_model(trained_model(prepared, strategy, order.rank))
        finally:
            connection.close()

    def _run_train_function(self, order: WorkOrder, progress: Progress) -> bytes:
        """Run one attempt of a train function."""
        self._set_up_process(order)
        self.own_loop = True
        limit_s = order.job.failure.step_timeout_s
        uploader = CheckpointUploader(order.rank, order.attempt, _put, self._deliver, limit_s)
        connection = self._connection
        ending = lambda: connection.stop_order is StopOrder.END  # noqa: E731
        try:
            trained = run_function(
                order.job,
                lambda: load_checked_function(order),
                connection.group(order),
                location_here(),
                SessionPorts(self._report, uploader.take, progress, _saved(order), ending),
                connection.shards(order),
                connection.default_group(order).rendezvous,
                order.attempt,
            )
            uploader.flush()
            return saved_model(trained)
        finally:
            connection.close()

    def _log_start(self, order: WorkOrder, prepared: Prepared, start: int) -> None:
        if order.attempt > 0:
            logger.info("rank %d continues after step %d", order.rank, start)
            return
        world = order.job.scaling.world
        for warning in prepared.warnings if order.rank == 0 else ():
            logger.warning("%s", warning)
        logger.info(
            "rank %d %s: %s, %d parameters on %s, %d steps",
            order.rank,
            f"of {world}" if order.rank < world else "joins",
            order.job.strategy.name,
            sum(slot.size for slot in prepared.flat.trained_slots),
            prepared.flat.params.device,
            prepared.total_steps,
        )

    def _prepare(self, order: WorkOrder) -> tuple[Prepared, WorkerStrategy[Any]]:
        """Build model, data and strategy, unless an earlier attempt has built them."""
        if self._prepared is not None and self._strategy is not None:
            resize(self._prepared, order.job, self._strategy)
            return self._prepared, self._strategy
        job = order.job
        self._set_up_process(order)
        self._strategy = make_worker_strategy(job)
        device = "cuda" if job.scaling.use_gpu else "cpu"
        with ForkGuard():
            task = make_task(job, lambda: self._task or _task_class(order))
            self._prepared = prepare(job, task, device, self._strategy)
        describe(self._prepared)
        return self._prepared, self._strategy

    def _import(self, order: WorkOrder) -> None:
        self._set_up_process(order)
        seed_all(order.job.seed)  # as `make_task` does
        make_worker_strategy(order.job)  # imports the strategy's modules
        self._task = _task_class(order)

    def _set_up_process(self, order: WorkOrder) -> None:
        """Set up logging, directory and threads before the user's code is imported."""
        log_to_stderr()
        self.node, self.host = RayTransport().node, host_here()
        folder = search_path(order)
        if Path(folder).is_dir():
            os.chdir(folder)
        torch.set_num_threads(max(1, int(order.job.scaling.resources()["CPU"])))
        if order.strategy_file is not None:
            order.strategy_file.load()


def _of_platform(error: BaseException, own_loop: bool) -> DistplatError | None:
    """Return our error for an exception that is not the fault of the user's code; else None."""
    return of_platform(error) or killed_loader(error, own_loop=own_loop) or lost_peer(error)


def _put(arrays: list[Bytes]) -> list[Any]:
    """Put arrays into Ray's store; the list keeps Ray from resolving the reference in a call."""
    return [ray.put(arrays)]


def _saved(order: WorkOrder) -> SavedState | None:
    """Return the checkpoint of the order; its tensors are fetched on first use."""
    handle = order.saved
    if handle is None:
        return None
    limit_s, transport = order.job.failure.start_timeout_s, RayTransport()

    def fetch(file: str) -> Any:
        what = f"the checkpoint's {file}"
        try:
            return transport.get(handle.files[file][0], limit_s)
        except AnswerPending:
            setting = "failure.start_timeout_s"
            raise DeadlineExceeded(what, ("the object store",), limit_s, setting) from None
        except TransportError as error:
            raise StateLost(f"{what} ({error})") from None

    return SavedState(handle.state, fetch)


def search_path(order: WorkOrder) -> str:
    """
    Return the folder of the user's code: on the driver's node its own, elsewhere Ray's copy.

    Without a shipped copy, either all workers are on the driver's machine (`actors/spawn.py`), or
    the user has called `ray.init` and the nodes share the path.
    """
    context = ray.get_runtime_context()
    shipped = dict(context.runtime_env).get("working_dir")
    if not shipped or context.get_node_id() == order.node:
        return order.search_path
    return str(_INITIAL_DIR)


def _load_task(order: WorkOrder, load: Callable[[str, str], Any]) -> Any:
    if isinstance(order.task, bytes):
        return pickle.loads(order.task)  # noqa: S301  our own driver pickled it
    return load(order.task, search_path(order))


def _task_class(order: WorkOrder) -> type[Task]:
    """
    Load and check the task's class; rank 0 logs the warnings.

    Raises:
        SpecError: see `load_task_class`, `check_class`.
    """
    task_class: type[Task] = _load_task(order, load_task_class)
    warnings = check_task(task_class, order.job)
    for line in warnings if order.rank == 0 and not order.checked else ():
        logger.warning("%s", line)
    return task_class


def saved_model(tensors: Mapping[str, torch.Tensor]) -> bytes:
    """
    Return a model's state in the safetensors format; shared tensors are written once per name.

    `to_bytes` releases the GIL, so that polls are answered meanwhile. `safetensors` does not; it
    writes only models with rare dtypes or layouts.
    """
    state = {name: value.detach().cpu() for name, value in tensors.items()}
    if all(v.layout is torch.strided and dtype_name(v) in ITEM_BYTES for v in state.values()):
        return to_bytes({name: whole_of(value.contiguous()) for name, value in state.items()})
    return save({name: value.clone().contiguous() for name, value in state.items()})
