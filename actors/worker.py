"""
The actor of one rank: a training thread, and methods that answer the controller meanwhile.

The actor's own threads stay free to answer `poll`, so a worker in a long forward still says that
it lives. Torch and the user's code are imported by the training thread, in this process only. An
attempt that ends, well or not, leaves the thread waiting for the next order: after a failure
elsewhere this worker goes on with the model that it has.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import TYPE_CHECKING

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
        #: what the training thread is to do, given the session
        self._orders: queue.SimpleQueue[Callable[[Session], None]] = queue.SimpleQueue()
        self._outbox: Outbox[AnyReport | Delivery] = Outbox()
        self._session: Session | None = None
        self._given_up = -1  #: the last attempt that was called off
        self._last_attempt = -1  #: the last attempt that it was told to begin
        self._ready: Future[None] | None = None  #: of what was asked for before the first attempt
        self._spare = False  #: it is nobody yet
        self._beats = 0  #: at the last question
        self._ended = threading.Event()  #: an attempt is over, and none was begun since
        self._beginning = threading.Lock()
        self._urgent = threading.Event()  #: there is something that is not to be kept back
        self._thread: threading.Thread | None = None
        self._failure: DistplatError | None = None  #: why there is no session, and will be none

    def __repr__(self) -> str:
        """Name in Ray's logs."""
        return self._name

    def start(self, order: WorkOrder) -> None:
        """Begin an attempt, the first or the next one, and return at once; twice does nothing."""
        with self._beginning:
            if order.attempt > self._last_attempt:
                self._last_attempt = order.attempt
                if self._spare:
                    self._spare, self._name = False, order.actor_name
                    ray_compat.log_as(self._name)
                self._enqueue(partial(self._work, order))

    def prepare(self, order: WorkOrder) -> None:
        """
        Make model and data ready for an attempt that is to come; returns when they are.

        Called again, it waits for the same.

        Raises:
            DistplatError: why there is none.
        """
        self._run_first(order, lambda session, ready: session.prepare(order, ready))

    def import_task(self, order: WorkOrder) -> None:
        """
        Import torch and the task, for whichever rank may be lost; returns when that is done.

        Called again, it waits for the same.

        Raises:
            DistplatError: why that is not possible.
        """
        self._spare = self._last_attempt < 0
        self._run_first(order, lambda session, ready: session.import_task(order, ready))

    def ping(self) -> None:
        """Answer."""

    def _run_first(self, order: WorkOrder, work: Callable[..., None]) -> None:
        """Have the training thread do something before the first attempt, once; wait for it."""
        with self._beginning:
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
        """Stop in this attempt: after the step that all ranks agree on, or at once."""
        if how is StopOrder.ABANDON:
            self._given_up = attempt
        if self._session is not None:
            self._session.stop(attempt, how)

    def poll(self, number: int, hold_s: float) -> PollResult:
        """
        Tell how things stand, and what was reported since the last question.

        The end of an attempt is told with its last report: who is told of it may ask nothing more.

        Args:
            number: of the question; the same number is told the same reports again.
            hold_s: seconds to keep the answer back for, while the attempt goes on: questions cost
                processor time that training wants.
        """
        self._urgent.wait(hold_s)
        if not self._ended.is_set():
            self._urgent.clear()
        if self._session is None:
            attempt = self._last_attempt if self._failure is not None else -1
            return PollResult([], attempt, 0, 0, finished=False, error=self._failure)
        state = self._session.state  # before the reports: what came first is told first
        items = self._outbox.take(number)
        # Else the question was asked before: the next answer has the rest.
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
            loop=LoopState(state.progress.returned, self._waits(state.progress.beats)),
            traceback=state.traceback,
        )

    def _waits(self, beats: int) -> str:
        """Say where a train function that makes no step waits for others; see `LoopState`."""
        moved, self._beats = beats != self._beats, beats
        if moved or self._thread is None or self._session is None or not self._session.own_loop:
            return ""
        from distplat.actors.user_errors import frames_of_wait

        return frames_of_wait(self._thread)

    def result(self, first: int) -> ModelPiece:
        """Give the trained model, as safetensors, from byte `first` on; only once `finished`."""
        model = self._session.state.model if self._session is not None else None
        assert model is not None, "the controller asks only a worker that has finished"
        return piece_of(model, first)

    def weights(self, version: int) -> Reply:
        """Show the parameters, of this version or a later one (see `actors/weights.py`)."""
        return self._session.show(version) if self._session is not None else Reply(0)

    def _train(self) -> None:
        keep_freed_memory()
        try:
            with quick_imports():
                from distplat.actors.training import Session  # torch comes with it
        except Exception as error:  # nobody else would hear of it
            self._fail(error)
            return
        self._session = Session(self._outbox.put, self._deliver)
        while True:  # the actor is ended from outside; nobody waits for this thread
            self._orders.get()(self._session)

    def _fail(self, error: Exception) -> None:
        """Report, to every poll from now on, that this process cannot be a worker."""
        who, why = self._name.partition("/")[2] or self._name, f"{type(error).__name__}: {error}"
        remedy = "every node needs the packages that distplat does: pip install distplat"
        text = f"{who} cannot begin on {host_here()}: {why}; {remedy}"
        with self._beginning:
            self._failure = InfrastructureError(text)
            if self._ready is not None:
                self._ready.set_exception(self._failure)
        self._ended.set()
        self._urgent.set()

    def _work(self, order: WorkOrder, session: Session) -> None:
        self._ended.clear()
        session.work(order, called_off=order.attempt <= self._given_up)
        self._ended.set()
        self._urgent.set()

    def _deliver(self, delivery: Delivery) -> None:
        """Report a part of a checkpoint at once: with this process it would be lost."""
        self._outbox.put(delivery)
        self._urgent.set()
