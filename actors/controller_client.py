"""
The driver's side of a run on Ray: follows the controller, and stops it.

A thread keeps one poll open to the controller and writes the files of the run. The thread that
called `fit()` handles signals and calls callbacks, so that a blocked callback or terminal does not
keep the model from the disk. Polls are numbered: a lost one is repeated, and each event arrives
once. When the controller dies, Ray also kills the actors that it has created; the driver kills its
own.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, wait
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from distplat.actors.actor_group import ActorGroup
from distplat.actors.controller import SAVE_S
from distplat.actors.controller_actor import FileToKeep, ModelReady, RunEvent, RunPollResult
from distplat.actors.model_pieces import ModelPiece, fetch_pieces
from distplat.actors.ray_errors import UNREACHABLE
from distplat.actors.retrying_calls import POLL_S, Outbox, ask
from distplat.actors.transport import Transport
from distplat.platform.disk import run_in_thread
from distplat.platform.errors import (
    ActorLost,
    ClusterUnreachable,
    DeadlineExceeded,
    DistplatError,
    Interrupted,
)
from distplat.platform.progress import Saved, StepSummary, Summary

_HOLD_S = 0.5
"""Seconds for which the controller holds a poll open while there are no events."""
_END_S = 35.0
"""Timeout for the controller to write complete checkpoints and to kill the actors."""
_NAME = "controller"
_MAX_EVENTS = 100_000
"""Events kept while a callback blocks the driver; beyond this, steps and log lines are dropped. All
other events are kept, as they are few."""
_LEAVE_S = 2.0
"""Timeout for the polling thread to end once `follow` has returned."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunHandlers:
    """Callbacks for events and results of a run. `on_model` and `on_file` run on any thread."""

    on_summary: Callable[[Summary], None]
    """Called with each step, evaluation, checkpoint and failure."""
    on_model: Callable[[bytes], object]
    """Called once with the trained model, before `on_file`; does not wait for `on_summary`."""
    on_file: Callable[[str, bytes], object]
    """Called with name and content of embedding tables and the log of updates, if any."""
    ending: Callable[[], bool] = lambda: False
    """Returns whether to end the run early; called after events."""


class _NotFollowed(DistplatError):
    """Ends the polling thread after `follow` has returned."""


class ControllerClient:
    """
    The driver's client of a run's controller.

    Args:
        transport: transport of the driver.
        controller: handle of the controller's actor.
        actor_group: actors of the run.
        checkpoint_step: step of the checkpoint that the run starts from.
    """

    def __init__(
        self, transport: Transport, controller: Any, actor_group: ActorGroup, checkpoint_step: int
    ) -> None:
        self._transport, self._controller = transport, controller
        self._begin_args = actor_group, checkpoint_step
        self._limits = actor_group.launch.job.failure
        self._saves = actor_group.launch.saves_at_stop
        self._number = 0  #: of the last take from `_events`
        self._hurried = False  #: a second signal arrived: do not wait for anything
        self._step: int | None = None  #: last reported step
        self._saved = checkpoint_step > 0  #: a checkpoint exists
        self._warned: DistplatError | None = None  #: error of the orderly stop, already logged
        self._up = False  #: the controller has answered its last call
        self._left = threading.Event()  #: `follow` has returned
        self._write_lock = threading.Lock()  #: held while a file is written
        self._events: Outbox[Summary | logging.LogRecord] = Outbox(
            _MAX_EVENTS, lambda event: isinstance(event, StepSummary | logging.LogRecord)
        )
        self._pending: deque[Summary | logging.LogRecord] = deque()  #: taken from `_events`

    def follow(
        self,
        check: Callable[[], None],
        handlers: RunHandlers,
        check_health: Callable[[], None] = lambda: None,
    ) -> None:
        """
        Pass events to the handlers until the run is over.

        Args:
            check: called ten times a second and before each event; raises to stop the run. After
                `Interrupted` (first signal) the run writes a checkpoint first, if it can.
            handlers: callbacks for events and results.
            check_health: called instead of `check` during that stop.

        Raises:
            DistplatError: the run failed. `ActorLost` if the controller was lost,
                `ClusterUnreachable` if the cluster cannot reach this driver's processes.
        """
        self._call(check, "begin", *self._begin_args)
        polling = Future[DistplatError | None]()
        try:
            polling = run_in_thread("follow", lambda: self._poll_loop(handlers))
            self._dispatch(check, handlers, polling)
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt) and _is_interrupted(check):
                self._hurried = True  # a second signal, before `check` has seen the first
            if isinstance(error, Interrupted) and self._saves:
                self._stop(check_health, handlers, polling)
            self._left.set()
            if not isinstance(error, KeyboardInterrupt):  # on Ctrl-C do not wait for the disk
                with self._write_lock:
                    pass
            wait([polling], _LEAVE_S)
            self._add_cause(error, polling)
            raise

    def _add_cause(self, error: BaseException, polling: Future[DistplatError | None]) -> None:
        """Attach an earlier error of the polling thread to `error`, which would hide it."""
        if not polling.done():
            return
        other = polling.exception() or polling.result()
        if other in (None, error, self._warned) or isinstance(other, Interrupted | _NotFollowed):
            return
        error.add_note(f"before that: {other}")
        logger.warning("before that: %s", other)

    def _dispatch(
        self,
        check: Callable[[], None],
        handlers: RunHandlers,
        polling: Future[DistplatError | None],
    ) -> None:
        """Call handlers with events until the run is over; raise the error of a failed run."""
        ending = False
        while self._pending or not self._events.drained:
            check()  # before each event: a slow callback may have thousands to handle
            if not self._pending:
                self._number += 1
                self._pending.extend(self._events.take(self._number, POLL_S))
                self._warn_of_dropped()
            if self._pending:
                _handle(self._pending.popleft(), handlers)
            if not ending and not polling.done() and handlers.ending():
                ending = True
                self._call(check, "end_early")
        if (error := polling.result()) is not None:
            raise error

    def _stop(
        self,
        check_health: Callable[[], None],
        handlers: RunHandlers,
        polling: Future[DistplatError | None],
    ) -> None:
        """Stop the run with a checkpoint, and pass on events until it ends."""
        deadline = time.monotonic() + SAVE_S + _END_S

        def check() -> None:
            check_health()
            if time.monotonic() > deadline:
                raise DeadlineExceeded("an orderly end", (_NAME,), SAVE_S + _END_S, "")

        try:
            self._call(check, "stop", 0.0, True)
            self._dispatch(check, handlers, polling)
        except Interrupted:
            return
        except DistplatError as error:
            self._warned = error
            logger.warning("while the run was stopped: %s", error)
        except KeyboardInterrupt:
            self._hurried = True
            self._left.set()
            raise

    def _poll_loop(self, handlers: RunHandlers) -> DistplatError | None:
        """Poll the controller until the run is over; return the error of a failed run."""
        number = 0
        try:
            while True:
                self._check_followed()
                number += 1
                polled: RunPollResult = self._call_from_thread("poll", number, _HOLD_S)
                for event in polled.events:
                    self._take(event, handlers)
                if polled.over:
                    return polled.error
        finally:
            self._events.close()

    def _take(self, event: RunEvent, handlers: RunHandlers) -> None:
        """Write the model and files; queue all other events."""
        if isinstance(event, ModelReady):
            model = fetch_pieces(self._piece)
            self._write(lambda: handlers.on_model(model))
        elif isinstance(event, FileToKeep):
            self._write(lambda: handlers.on_file(event.name, event.content))
        else:
            if isinstance(event, StepSummary):
                self._step = event.step
            self._saved |= isinstance(event, Saved)
            self._events.put(event)

    def _piece(self, first: int) -> ModelPiece:
        self._check_followed()  # `ask` checks only while it waits, and a piece may arrive at once
        piece: ModelPiece = self._call_from_thread("result", first)
        return piece

    def _write(self, write: Callable[[], object]) -> None:
        with self._write_lock:
            self._check_followed()
            write()

    def _check_followed(self) -> None:
        if self._left.is_set():
            raise _NotFollowed("`follow` has returned")

    def _call_from_thread(self, method: str, *args: Any) -> Any:
        """Call a method from the polling thread; warnings are queued, as a terminal may block."""
        return self._call(self._check_followed, method, *args, warn=self._log_later)

    def _log_later(self, text: str) -> None:
        record = (logger.name, logging.WARNING, __file__, 0, text, (), None)
        self._events.put(logger.makeRecord(*record))

    def _call(
        self,
        check: Callable[[], None],
        method: str,
        *args: Any,
        warn: Callable[[str], object] = logger.warning,
    ) -> Any:
        """
        Call a method of the controller; repeat lost calls, as all methods are idempotent.

        Polls and stops have the heartbeat timeout, because a healthy controller answers them at
        once. Other calls may take as long as a start.
        """
        call = partial(self._transport.call, self._controller, method, *args)
        limit, setting = self._limits.start_timeout_s, "start_timeout_s"
        if method in ("poll", "stop"):
            limit, setting = self._limits.heartbeat_timeout_s, "heartbeat_timeout_s"
        try:
            calls = {_NAME: call}
            what = "start" if method == "begin" else "an answer"
            answer = ask(self._transport, what, calls, limit, setting, check, warn)[0]
        except ActorLost as error:
            was_up, self._up = self._up, False
            if error.role != _NAME:  # raised by `check`
                raise
            if not was_up and UNREACHABLE in error.cause:
                raise ClusterUnreachable(
                    f"no process of this run can be used: {error.cause}"
                ) from None
            raise ActorLost(_NAME, self._step, error.cause, self._remedy) from None
        except DeadlineExceeded:
            self._up = False
            raise
        self._up = True
        return answer

    @property
    def _remedy(self) -> str:
        """Advice for the error of a lost controller."""
        if self._saved:
            return "resume from the last checkpoint: submit --resume"
        return "" if self._step is None else "there is no checkpoint to resume from"

    def _warn_of_dropped(self) -> None:
        if dropped := self._events.pop_dropped():
            text = "%d steps and log lines were dropped: a callback blocked the driver"
            logger.warning(text, dropped)

    def end(self, check_health: Callable[[], object] = lambda: None) -> None:
        """
        Stop the run and the actors that the controller created; a lost controller is ignored.

        Args:
            check_health: called while waiting; raises to give up.
        """
        if self._up and not self._hurried:
            stop = partial(self._transport.call, self._controller, "stop", _END_S)
            with suppress(DistplatError):
                ask(self._transport, "the end", {_NAME: stop}, _END_S, "", check_health)


def _is_interrupted(check: Callable[[], None]) -> bool:
    """Return whether a signal arrived; a callback may raise `KeyboardInterrupt` itself."""
    try:
        check()
    except Exception as error:  # other errors are no reason to hurry
        return isinstance(error, Interrupted)
    return False


def _handle(event: Summary | logging.LogRecord, handlers: RunHandlers) -> None:
    """Pass an event to the handlers, or log a record of the controller in this process."""
    if not isinstance(event, logging.LogRecord):
        handlers.on_summary(event)
        return
    log = logging.getLogger(event.name)
    if log.isEnabledFor(event.levelno):
        log.handle(event)
