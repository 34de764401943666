"""
The controller's Ray actor: one thread runs the controller, the others serve calls.

    driver            ── begin ──▶  thread: `Controller.run`
                      ── poll n ─▶  events since poll n - 1: steps, failures, log records
                      ── result ─▶  the trained model, in pieces
    distplat scale    ── scale ──▶  accepted, or the reason why not, at once
    distplat status   ── scale_status
    distplat stop     ── stop ──▶   status of the run, once it has ended
    server manager    ── make_server ──▶  a new server node

All calls are idempotent, because a call or its answer may be lost.
The driver writes the files of the run directory, except checkpoints: those are large, and a thread
of this actor writes them during training. The actor is on the driver's node and uses the same disk.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from logging.handlers import QueueHandler
from typing import Any

import ray
from typing_extensions import override

from distplat.actors.actor_group import ActorGroup
from distplat.actors.checkpointing import Checkpoints
from distplat.actors.controller import Controller
from distplat.actors.messages import TableMap
from distplat.actors.model_pieces import ModelPiece, piece_of
from distplat.actors.ray_errors import as_ours
from distplat.actors.ray_transport import RayTransport
from distplat.actors.retrying_calls import Outbox, ask
from distplat.actors.stopping import call_all
from distplat.actors.transport import AnswerPending
from distplat.platform.apply_log import FILE_NAME, pack_log
from distplat.platform.errors import (
    DeadlineExceeded,
    DistplatError,
    InfrastructureError,
    Interrupted,
    NotReadyError,
)
from distplat.platform.progress import StepSummary, Summary
from distplat.platform.scaling import NO_SCALE_REQUEST, ScaleRequest, ScaleStatus
from distplat.platform.shard_map import TableSpec
from distplat.platform.spec import Job
from distplat.platform.stop_order import StopOrder
from distplat.platform.tensor_slices import Bytes
from distplat.strategies.sparse.files import PartSource, keep_tables

logger = logging.getLogger(__name__)

_MAX_EVENTS = 100_000
"""Events kept for a driver that does not poll, about 50 MB; beyond this, steps and log lines are
dropped to bound the memory."""
_BEGIN_S = 5.0
"""Seconds that a call waits for the run to start."""


@dataclass(frozen=True)
class FileToKeep:
    """A file for the run directory."""

    name: str
    content: bytes


@dataclass(frozen=True)
class ModelReady:
    """The trained model can be fetched with `result`."""


RunEvent = Summary | FileToKeep | ModelReady | logging.LogRecord
"""An event for the driver."""


@dataclass(frozen=True)
class RunPollResult:
    """The answer to a poll of the driver."""

    events: list[RunEvent]
    """Events since the previous poll."""
    over: bool
    """Whether the run has ended and no event follows."""
    error: DistplatError | None
    """Error of a failed run, once it is over."""


class ControllerActor:
    """
    The controller's actor: its methods answer while `Controller.run` goes on in a thread.

    Args:
        name: name of the actor.
        submission: id of the driver in Ray's job API; None: not started through it.
    """

    def __init__(self, name: str, submission: str | None = None) -> None:
        self._name, self._submission = name, submission
        self._outbox: Outbox[RunEvent] = Outbox(
            _MAX_EVENTS, lambda event: isinstance(event, StepSummary | logging.LogRecord)
        )
        self._controller: Controller | None = None
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._model: bytes | None = None
        self._error: DistplatError | None = None  #: error of a failed run
        self._stop_order = StopOrder.NONE  #: stop order of the run
        self._started, self._over = threading.Event(), threading.Event()

    @override
    def __repr__(self) -> str:
        """Name in Ray's logs."""
        return self._name

    def begin(self, actor_group: ActorGroup, checkpoint_step: int) -> None:
        """
        Start the thread that runs the controller; repeated calls have no effect.

        Args:
            actor_group: the actors, created and ordered by the driver.
            checkpoint_step: step of the checkpoint that they start from.
        """
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._work, args=(actor_group, checkpoint_step), name="run", daemon=True
                )
                self._thread.start()

    def _work(self, actor_group: ActorGroup, checkpoint_step: int) -> None:
        """Run the controller and store its error for the driver."""
        _send_records(self._outbox)
        try:
            self._run(actor_group, checkpoint_step)
        except ray.exceptions.RayError as error:  # first: a RayTaskError may derive from both
            self._error = as_ours(error)
        except DistplatError as error:
            self._error = error.with_traceback(None)
        except BaseException as error:
            logger.exception("the controller failed")
            text = f"error inside distplat, in the controller: {type(error).__name__}: {error}"
            self._error = DistplatError(text)
        finally:
            self._over.set()
            self._outbox.close()

    def _run(self, actor_group: ActorGroup, checkpoint_step: int) -> None:
        launch = actor_group.launch
        if launch.strategy_file is not None:
            launch.strategy_file.load()
        # Only rank 0 delivers parts if tasks are leased, because other workers may join and leave,
        # and in a train function.
        rank_0_only = actor_group.dynamic_tasks or launch.job.own_loop
        parts = 1 if rank_0_only else launch.job.scaling.world
        fetch = partial(_fetch_arrays, limit_s=launch.job.failure.step_timeout_s)
        checkpoints = Checkpoints(launch, parts, fetch)
        checkpoints.step = checkpoint_step
        try:
            self._controller = Controller(
                actor_group,
                launch.job.failure,
                launch.policy,
                lambda: self._stop_order,
                checkpoints,
            )
            self._started.set()
            self._model = self._controller.run(self._outbox.put)
            self._outbox.put(ModelReady())
            self._controller.finish_checkpoints()
            self._keep_files(actor_group)
        finally:
            # Write complete checkpoints even if the run failed.
            call_all([checkpoints.drain, actor_group.end])

    def poll(self, number: int, hold_s: float) -> RunPollResult:
        """
        Return the events since the last poll.

        Args:
            number: sequence number of the poll, from 1; the same number returns the same events.
            hold_s: seconds to wait for an event.
        """
        events = self._outbox.take(number, hold_s)
        dropped = self._outbox.pop_dropped()
        if dropped:
            logger.warning("%d steps and log lines were dropped: the driver did not poll", dropped)
        over = self._outbox.drained  # read after `take`: a repeated poll may leave events
        return RunPollResult(events, over, self._error if over else None)

    def result(self, first: int) -> ModelPiece:
        """Return a piece of the trained model from byte `first`, after `ModelReady`."""
        assert self._model is not None, "the driver calls this only after `ModelReady`"
        return piece_of(self._model, first)

    def stop(self, timeout_s: float, saves: bool = False) -> str:
        """
        Stop the run, and wait until it and its actors have ended.

        Args:
            timeout_s: seconds to wait.
            saves: whether to write a checkpoint first, if `Launch.saves_at_stop`.

        Returns:
            `STOPPED`, `SUCCEEDED` or `FAILED`; `RUNNING`: not ended within the timeout.
        """
        if not self._stop_order and not self._over.is_set():
            logger.warning("the run is asked to stop")
        order = StopOrder.SAVE if saves else StopOrder.ABANDON
        with self._lock:
            self._stop_order = max(self._stop_order, order)
        if not self._over.wait(timeout_s):
            return "RUNNING"
        if self._error is None:
            return "SUCCEEDED"
        return "STOPPED" if isinstance(self._error, Interrupted) else "FAILED"

    def submission(self) -> str | None:
        """Return the driver's id in Ray's job API; None: not started through it."""
        return self._submission

    def scale(self, workers: int) -> ScaleRequest:
        """
        Request another number of workers and return without waiting for them.

        Raises:
            SpecError: the run cannot have that number of workers.
            NotReadyError: the run has not started yet.
        """
        return self._running().scale(workers)

    def end_early(self) -> None:
        """
        End the run after the next step as after its last one; repeated calls have no effect.

        Raises:
            NotReadyError: the run has not started yet.
        """
        self._running().end_early()

    def worker(self, rank: int) -> Any:
        """
        Return the handle of a rank's current worker, or None.

        Raises:
            NotReadyError: the run has not started yet.
        """
        return self._running().worker(rank)

    def make_server(self, attempt: int, server: str, beside: str) -> Any:
        """
        Create a server node for the server manager; see `ActorGroup.make_server`.

        Raises:
            FencedError: the manager has been replaced.
            NotReadyError: the run has not started yet; this call does not wait for it.
        """
        return self._running(0.0).make_server(attempt, server, beside)

    def scale_status(self) -> ScaleStatus:
        """Return the status of the last scale request."""
        return NO_SCALE_REQUEST if self._controller is None else self._controller.scale_status()

    def _running(self, wait_s: float = _BEGIN_S) -> Controller:
        if not self._started.wait(wait_s) or self._controller is None:
            raise NotReadyError(f"{self._name}: the run has not started yet")
        return self._controller

    def _keep_files(self, actor_group: ActorGroup) -> None:
        """Send the embedding tables and the log of updates, if any, to the driver."""
        assert self._controller is not None
        launch = actor_group.launch

        def keep(name: str, content: bytes) -> None:
            self._outbox.put(FileToKeep(name, content))

        if launch.roles.consistency.dynamic_tasks and self._controller.checkpoint_step == 0:
            _keep_log(actor_group, keep)
        if launch.job.embeddings is not None and launch.job.checkpoint.save_final:
            keep_tables(_table_servers(actor_group, launch.job), launch.job.seed, keep)


class _OutboxHandler(QueueHandler):
    """Puts log records into an outbox."""

    def __init__(self, outbox: Outbox[Any]) -> None:
        super().__init__(queue.SimpleQueue())
        self._outbox = outbox

    @override
    def enqueue(self, record: logging.LogRecord) -> None:
        self._outbox.put(record)


def _send_records(outbox: Outbox[Any]) -> None:
    """Forward log records of distplat to the driver, whose settings decide what is printed."""
    package_logger = logging.getLogger("distplat")
    package_logger.handlers = [_OutboxHandler(outbox)]
    package_logger.setLevel(logging.INFO)
    package_logger.propagate = False


def _fetch_arrays(ref: list[Any], limit_s: float) -> list[Bytes]:
    """Fetch a checkpoint part from its node; a large one may take minutes on a slow network."""
    try:
        arrays: list[Bytes] = RayTransport().get(ref[0], limit_s)
    except AnswerPending:
        what, setting = "a part of a checkpoint", "failure.step_timeout_s"
        raise DeadlineExceeded(what, ("its node",), limit_s, setting) from None
    return arrays


def _keep_log(actor_group: ActorGroup, keep: Callable[[str, bytes], None]) -> None:
    """Fetch the shards' logs; if that fails only log a warning, because the model is complete."""
    manager, launch = actor_group.roles["server-manager"], actor_group.launch
    limit, setting = launch.job.failure.step_timeout_s, "step_timeout_s"
    try:
        calls = {"server-manager": manager.logs.remote}
        logs = ask(RayTransport(), "log", calls, limit, setting)[0]
    except InfrastructureError as error:
        logger.warning("no %s: %s", FILE_NAME, error)
    else:
        keep(FILE_NAME, pack_log(logs, {"run": launch.run}))


def _table_servers(actor_group: ActorGroup, job: Job) -> list[PartSource]:
    """Return the embedding servers of a succeeded run, in order."""
    assert job.embeddings is not None, "only jobs with embeddings have embedding servers"
    limit_s = job.failure.step_timeout_s
    if job.embeddings.replication == 1:
        names = [f"embedding-server-{index}" for index in range(job.embeddings.servers)]
        return [_TableSource(actor_group.roles[name], name, limit_s) for name in names]
    manager = _TableSource(actor_group.roles["server-manager"], "server-manager", limit_s)
    table_map: TableMap = manager.ask("table_servers", 0, 0.0)
    pairs = zip(table_map.servers, table_map.names, strict=True)
    return [_TableSource(handle, name, limit_s) for handle, name in pairs]


class _TableSource(PartSource):
    """Reads the tables of an embedding server, one part at a time to bound the memory."""

    def __init__(self, handle: Any, name: str, limit_s: float) -> None:
        self._handle, self._name, self._limit_s = handle, name, limit_s

    @override
    def sizes(self) -> list[tuple[TableSpec, int]]:
        sizes: list[tuple[TableSpec, int]] = self.ask("sizes")
        return sizes

    @override
    def part(self, table: int, first: int, count: int) -> bytes:
        content: bytes = self.ask("part", table, first, count)
        return content

    def ask(self, method: str, *args: Any) -> Any:
        """Call a method and wait for its answer."""
        call = partial(RayTransport().call, self._handle, method, *args)
        what, setting = "saving tables", "step_timeout_s"
        return ask(RayTransport(), what, {self._name: call}, self._limit_s, setting)[0]
