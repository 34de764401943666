"""
Worker actor of one rank: a training thread, and methods that serve the controller meanwhile.

The actor's own threads answer `poll`, so a worker in a long forward pass still proves that it is
alive. Only the training thread imports torch and the user's code. After an attempt ends, with or
without an error, the thread waits for the next order: after a failure of another process this
worker continues with its model.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import TYPE_CHECKING

from typing_extensions import override

from distplat.actors import ray_compat
from distplat.actors.messages import PollResult, WorkOrder
from distplat.actors.model_pieces import ModelPiece, piece_of
from distplat.actors.process_setup import keep_freed_memory, quick_imports
from distplat.actors.ray_transport import host_here
from distplat.actors.retrying_calls import Outbox
from distplat.actors.weights import Reply
from distplat.platform.checkpoints import Delivery
from distplat.platform.diverged_loops import LoopState
from distplat.platform.errors import DistplatError, InfrastructureError
from distplat.platform.progress import AnyReport
from distplat.platform.stop_order import StopOrder

if TYPE_CHECKING:
    from distplat.actors.training import Session


class Worker:
    """One rank of a run."""

    def __init__(self, name: str) -> None:
        self._name = name
        #: work of the training thread; called with the session
        self._orders: queue.SimpleQueue[Callable[[Session], None]] = queue.SimpleQueue()
        self._outbox: Outbox[AnyReport | Delivery] = Outbox()
        self._session: Session | None = None
        self._abandoned = -1  #: the last attempt that was abandoned
        self._last_attempt = -1  #: the last attempt ordered
        self._ready: Future[None] | None = None  #: done when `prepare` or `import_task` is
        self._spare = False  #: this worker has no rank yet
        self._beats = 0  #: at the last poll
        self._ended = threading.Event()  #: set between the end of an attempt and the next start
        self._order_lock = threading.Lock()
        self._urgent = threading.Event()  #: set if the next poll should be answered at once
        self._thread: threading.Thread | None = None
        self._failure: DistplatError | None = None  #: set if the session could not be created

    @override
    def __repr__(self) -> str:
        """Name in Ray's logs."""
        return self._name

    def start(self, order: WorkOrder) -> None:
        """Start an attempt and return at once; repeated calls have no effect."""
        with self._order_lock:
            if order.attempt > self._last_attempt:
                self._last_attempt = order.attempt
                if self._spare:
                    self._spare, self._name = False, order.actor_name
                    ray_compat.log_as(self._name)
                self._enqueue(partial(self._work, order))

    def prepare(self, order: WorkOrder) -> None:
        """
        Build model and data before the first attempt, and wait until they are built.

        Repeated calls wait for the same work.

        Raises:
            DistplatError: model or data could not be built.
        """
        self._run_first(order, lambda session, ready: session.prepare(order, ready))

    def import_task(self, order: WorkOrder) -> None:
        """
        Import torch and the task on a spare worker, and wait until they are imported.

        Repeated calls wait for the same work.

        Raises:
            DistplatError: the import failed.
        """
        self._spare = self._last_attempt < 0
        self._run_first(order, lambda session, ready: session.import_task(order, ready))

    def ping(self) -> None:
        """Answer."""

    def _run_first(self, order: WorkOrder, work: Callable[..., None]) -> None:
        """Run `work` once on the training thread, before the first attempt, and wait for it."""
        with self._order_lock:
            ready = self._ready
            if ready is None:
                ready = self._ready = Future()
                self._enqueue(partial(work, ready=ready))
        if self._failure is not None:
            raise self._failure
        ready.result(order.job.failure.start_timeout_s)

    def _enqueue(self, work: Callable[[Session], None]) -> None:
        self._orders.put(work)
        if self._thread is None:
            self._thread = threading.Thread(target=self._train, name="train", daemon=True)
            self._thread.start()

    def stop(self, attempt: int, how: StopOrder) -> None:
        """Stop this attempt: at once (`ABANDON`), else after the step that all ranks agree on."""
        if how is StopOrder.ABANDON:
            self._abandoned = attempt
        if self._session is not None:
            self._session.stop(attempt, how)

    def poll(self, number: int, hold_s: float) -> PollResult:
        """
        Return the state of the attempt, and the reports since the last poll.

        The end of an attempt is returned only with its last reports, because the controller may
        not poll again after it.

        Args:
            number: sequence number of the poll; the same number returns the same reports.
            hold_s: seconds to wait before answering while the attempt runs: polls take processor
                time from training.
        """
        self._urgent.wait(hold_s)
        if not self._ended.is_set():
            self._urgent.clear()
        if self._session is None:
            attempt = self._last_attempt if self._failure is not None else -1
            return PollResult([], attempt, 0, 0, finished=False, error=self._failure)
        state = self._session.state  # read before the reports, so that none follows the end
        items = self._outbox.take(number)
        # Reports remain after a repeated poll; the next answer has them.
        drained = not self._outbox.waiting
        return PollResult(
            [item for item in items if not isinstance(item, Delivery)],
            state.attempt,
            state.progress.beats,
            state.progress.step,
            finished=drained and state.model is not None,
            error=state.error if drained else None,
            deliveries=[item for item in items if isinstance(item, Delivery)],
            left=drained and state.progress.left,
            node=self._session.node,
            host=self._session.host,
            prepared=self._session.prepared,
            loop=LoopState(state.progress.returned, self._wait_frames(state.progress.beats)),
            traceback=state.traceback,
        )

    def _wait_frames(self, beats: int) -> str:
        """Return the frames in which a stalled train function waits; see `LoopState`."""
        moved, self._beats = beats != self._beats, beats
        if moved or self._thread is None or self._session is None or not self._session.own_loop:
            return ""
        from distplat.actors.user_errors import frames_of_wait

        return frames_of_wait(self._thread)

    def result(self, first: int) -> ModelPiece:
        """Return a piece of the trained model (safetensors) from byte `first`, once `finished`."""
        model = self._session.state.model if self._session is not None else None
        assert model is not None, "the controller calls this only after a worker has finished"
        return piece_of(model, first)

    def weights(self, version: int) -> Reply:
        """Return the parameters of this version or a later one; see `actors/weights.py`."""
        return self._session.show(version) if self._session is not None else Reply(0)

    def _train(self) -> None:
        keep_freed_memory()
        try:
            with quick_imports():
                from distplat.actors.training import Session  # imports torch
        except Exception as error:  # reported by the next poll
            self._fail(error)
            return
        self._session = Session(self._outbox.put, self._deliver)
        while True:  # until the actor is killed; no one joins this thread
            self._orders.get()(self._session)

    def _fail(self, error: Exception) -> None:
        """Answer all later polls with an error: this process cannot be a worker."""
        role, why = self._name.partition("/")[2] or self._name, f"{type(error).__name__}: {error}"
        remedy = "every node needs the packages that distplat does: pip install distplat"
        text = f"{role} cannot start on {host_here()}: {why}; {remedy}"
        with self._order_lock:
            self._failure = InfrastructureError(text)
            if self._ready is not None:
                self._ready.set_exception(self._failure)
        self._ended.set()
        self._urgent.set()

    def _work(self, order: WorkOrder, session: Session) -> None:
        self._ended.clear()
        session.work(order, abandoned=order.attempt <= self._abandoned)
        self._ended.set()
        self._urgent.set()

    def _deliver(self, delivery: Delivery) -> None:
        """Report a checkpoint part at once: it would be lost with this process."""
        self._outbox.put(delivery)
        self._urgent.set()
