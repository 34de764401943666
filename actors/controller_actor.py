"""
What Ray sees of the controller: a run goes on in one of its threads, others answer meanwhile.

    driver            ── begin ──▶  thread: `Controller.run`
                      ── poll n ─▶  what happened since question n - 1: steps, failures, log records
                      ── result ─▶  the trained model, or why there is none
    distplat scale    ── scale ──▶  accepted, or the reason why not, at once
    distplat status   ── scale_status
    distplat stop     ── stop ──▶   how the run ended, once it has
    server manager    ── make_server ──▶  a new server node

Each of these may be asked again: a question or its answer may be lost on the way.
Files of the run directory are the driver's, but for checkpoints: those are large, and a thread here
writes them while training goes on. The actor is on the driver's node, so both see the same disk.
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

_MOST = 100_000
"""Events that wait for a driver that does not ask, some 50 MB; beyond them steps and log lines are
left out, for memory ends before a long run does."""
_BEGIN_S = 5.0
"""How long a question waits for the run to begin."""


@dataclass(frozen=True)
class FileToKeep:
    """A file for the run directory."""

    name: str
    content: bytes


@dataclass(frozen=True)
class ModelReady:
    """The model is there, to be asked for by `result`."""


RunEvent = Summary | FileToKeep | ModelReady | logging.LogRecord
"""What the driver is told."""


@dataclass(frozen=True)
class RunPollResult:
    """The answer to one question of the driver."""

    events: list[RunEvent]
    """What happened since the question before, each once."""
    over: bool
    """Nothing more will happen."""
    error: DistplatError | None
    """Why the run failed, once it is over."""


class ControllerActor:
    """
    The controller's actor: its methods answer while `Controller.run` goes on in a thread.

    Args:
        name: of the actor.
        submission: id under which the job API started the driver; None: it did not.
    """

    def __init__(self, name: str, submission: str | None = None) -> None:
        self._name, self._submission = name, submission
        self._outbox: Outbox[RunEvent] = Outbox(
            _MOST, lambda event: isinstance(event, StepSummary | logging.LogRecord)
        )
        self._controller: Controller | None = None
        self._beginning = threading.Lock()
        self._thread: threading.Thread | None = None
        self._model: bytes | None = None
        self._error: DistplatError | None = None  #: why the run failed
        self._stop_order = StopOrder.NONE  #: what the whole run is told
        self._begun, self._over = threading.Event(), threading.Event()

    def __repr__(self) -> str:
        """Name in Ray's logs."""
        return self._name

    def begin(self, actor_group: ActorGroup, checkpoint_step: int) -> None:
        """
        Watch a run from its start to its end, in a thread; a second call does nothing.

        Args:
            actor_group: the actors, which the driver has made and given their orders.
            checkpoint_step: steps of the checkpoint that they begin from.
        """
        with self._beginning:
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._work, args=(actor_group, checkpoint_step), name="run", daemon=True
                )
                self._thread.start()

    def _work(self, actor_group: ActorGroup, checkpoint_step: int) -> None:
        """Run to the end, and keep its error, which would be lost with the thread."""
        _send_records(self._outbox)
        try:
            self._run(actor_group, checkpoint_step)
        except ray.exceptions.RayError as error:  # first: what a method raised may be one of ours
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
        # Where tasks are leased rank 0 alone gives parts: the others may come and go. So it does
        # where a train function says what is kept.
        alone = actor_group.dynamic_tasks or launch.job.own_loop
        parts = 1 if alone else launch.job.scaling.world
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
            self._begun.set()
            self._model = self._controller.run(self._outbox.put)
            self._outbox.put(ModelReady())
            self._controller.settle()
            self._keep_files(actor_group)
        finally:
            # What is complete is worth keeping, however the run ends.
            call_all([checkpoints.drain, actor_group.end])

    def poll(self, number: int, hold_s: float) -> RunPollResult:
        """
        Tell what happened since the last question.

        Args:
            number: of the question, from 1; the same number is told the same events.
            hold_s: how long to wait for something to tell.
        """
        events = self._outbox.take(number, hold_s)
        left_out = self._outbox.pop_dropped()
        if left_out:
            logger.warning("%d steps and log lines are not told: the driver was away", left_out)
        over = self._outbox.drained  # after them: what is told again is not all there is
        return RunPollResult(events, over, self._error if over else None)

    def result(self, first: int) -> ModelPiece:
        """Give the trained model from byte `first` on; only once it is there."""
        assert self._model is not None, "the driver asks once it is told so"
        return piece_of(self._model, first)

    def stop(self, timeout_s: float, saves: bool = False) -> str:
        """
        End the run and its actors; returns when they are ended, or after so long.

        Args:
            timeout_s: that long.
            saves: whether it first takes a checkpoint, where `Launch.saves_at_stop`.

        Returns:
            `STOPPED`, `SUCCEEDED` or `FAILED`; `RUNNING`: not yet.
        """
        if not self._stop_order and not self._over.is_set():
            logger.warning("the run is asked to stop")
        order = StopOrder.SAVE if saves else StopOrder.ABANDON
        with self._beginning:
            self._stop_order = max(self._stop_order, order)
        if not self._over.wait(timeout_s):
            return "RUNNING"
        if self._error is None:
            return "SUCCEEDED"
        return "STOPPED" if isinstance(self._error, Interrupted) else "FAILED"

    def submission(self) -> str | None:
        """Tell under which id the job API started the driver; None: it did not."""
        return self._submission

    def scale(self, workers: int) -> ScaleRequest:
        """
        Ask for another number of workers; returns before they are there.

        Raises:
            SpecError: it cannot be had; says why.
            NotReadyError: the run has not begun yet.
        """
        return self._running().scale(workers)

    def end_early(self) -> None:
        """
        Have the run end soon as after its last step; a second call does nothing.

        Raises:
            NotReadyError: the run has not begun yet.
        """
        self._running().end_early()

    def worker(self, rank: int) -> Any:
        """
        Give the handle of a rank's present worker; None: there is none.

        Raises:
            NotReadyError: the run has not begun yet.
        """
        return self._running().worker(rank)

    def make_server(self, attempt: int, server: str, beside: str) -> Any:
        """
        Make a server node for the server manager; see `ActorGroup.make_server`.

        Raises:
            FencedError: there is a later manager.
            NotReadyError: the run has not begun yet; it is not waited for.
        """
        return self._running(0.0).make_server(attempt, server, beside)

    def scale_status(self) -> ScaleStatus:
        """Tell what became of the last request for another number of workers."""
        return NO_SCALE_REQUEST if self._controller is None else self._controller.scale_status()

    def _running(self, wait_s: float = _BEGIN_S) -> Controller:
        if not self._begun.wait(wait_s) or self._controller is None:
            raise NotReadyError(f"{self._name}: the run has not begun yet")
        return self._controller

    def _keep_files(self, actor_group: ActorGroup) -> None:
        """Send the driver the embedding tables and the log of updates, of runs that have them."""
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

    def enqueue(self, record: logging.LogRecord) -> None:
        self._outbox.put(record)


def _send_records(outbox: Outbox[Any]) -> None:
    """Have this package's log records appear in the driver, which alone knows what is shown."""
    ours = logging.getLogger("distplat")
    ours.handlers = [_OutboxHandler(outbox)]
    ours.setLevel(logging.INFO)
    ours.propagate = False


def _fetch_arrays(ref: list[Any], limit_s: float) -> list[Bytes]:
    """Bring a part of a checkpoint from its node: a large one, over a slow net, takes minutes."""
    try:
        arrays: list[Bytes] = RayTransport().get(ref[0], limit_s)
    except AnswerPending:
        what, setting = "a part of a checkpoint", "failure.step_timeout_s"
        raise DeadlineExceeded(what, ("its node",), limit_s, setting) from None
    return arrays


def _keep_log(actor_group: ActorGroup, keep: Callable[[str, bytes], None]) -> None:
    """Fetch the shards' logs; a run that has its model does not fail for want of them."""
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
    """Give the embedding servers of a run that has ended well, in order."""
    assert job.embeddings is not None, "only such jobs have servers of tables"
    limit_s = job.failure.step_timeout_s
    if job.embeddings.replication == 1:
        names = [f"embedding-server-{index}" for index in range(job.embeddings.servers)]
        return [_TableSource(actor_group.roles[name], name, limit_s) for name in names]
    manager = _TableSource(actor_group.roles["server-manager"], "server-manager", limit_s)
    table_map: TableMap = manager.ask("table_servers", 0, 0.0)
    pairs = zip(table_map.servers, table_map.names, strict=True)
    return [_TableSource(handle, name, limit_s) for handle, name in pairs]


class _TableSource(PartSource):
    """An embedding server as a source of a file: asked for one part at a time, none held longer."""

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
        """Call a method, and wait for its answer."""
        call = partial(RayTransport().call, self._handle, method, *args)
        what, setting = "saving tables", "step_timeout_s"
        return ask(RayTransport(), what, {self._name: call}, self._limit_s, setting)[0]
