"""
The driver's side of a run on Ray: follows the controller, and ends it.

A thread keeps one question open to the controller, and writes the files that the run leaves. The
thread that called `fit()` looks for signals and tells callbacks of the rest: one that hangs, or a
terminal that takes no more, does not keep a model from the disk. Questions are numbered, so that
one that is lost is asked again and each event is told once. A controller that dies takes along the
actors that it has made; those that the driver made, the driver ends.
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
"""Seconds for which the controller holds a poll open while nothing happens."""
_END_S = 35.0
"""How long the controller may take to write what is complete and to end the actors."""
_NAME = "controller"
_MOST = 100_000
"""Events that wait while a callback holds the driver up, from which on steps and log lines are left
out; the others, which are few, all wait."""
_LEAVE_S = 2.0
"""How long the thread may take to see that nobody follows the run any more."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunHandlers:
    """Callbacks for the events and results of a run; `on_model` and `on_file` of any thread."""

    on_summary: Callable[[Summary], None]
    """Takes each step, evaluation, checkpoint and failure."""
    on_model: Callable[[bytes], object]
    """Takes the trained model, once and before anything else that a trained run leaves; does not
    wait for `on_summary`."""
    on_file: Callable[[str, bytes], object]
    """Takes the embedding tables and the log of updates by name, of runs that have them."""
    ending: Callable[[], bool] = lambda: False
    """Asked after news: whether the run is to end before its last step."""


class _NotFollowed(DistplatError):
    """`follow` was left: the thread that listens ends."""


class ControllerClient:
    """
    One run's controller, seen from the driver.

    Args:
        transport: the driver's.
        controller: the actor's handle.
        actor_group: the actors that it is to watch.
        checkpoint_step: steps of the checkpoint that they begin from.
    """

    def __init__(
        self, transport: Transport, controller: Any, actor_group: ActorGroup, checkpoint_step: int
    ) -> None:
        self._transport, self._controller = transport, controller
        self._begin = actor_group, checkpoint_step
        self._limits = actor_group.launch.job.failure
        self._saves = actor_group.launch.saves_at_stop
        self._number = 0  #: of the last question for news
        self._hurried = False  #: a second signal came: nothing is waited for
        self._step: int | None = None  #: the last one that is known to be made
        self._saved = checkpoint_step > 0  #: there is a checkpoint to go on from
        self._warned: DistplatError | None = None  #: why it did not stop in order
        self._up = False  #: it has answered, and was not lost since
        self._left = threading.Event()  #: nobody follows the run any more
        self._keeping = threading.Lock()  #: held while something is written
        self._news: Outbox[Summary | logging.LogRecord] = Outbox(
            _MOST, lambda event: isinstance(event, StepSummary | logging.LogRecord)
        )
        self._untold: deque[Summary | logging.LogRecord] = deque()  #: taken from the news

    def follow(
        self,
        check: Callable[[], None],
        handlers: RunHandlers,
        look: Callable[[], None] = lambda: None,
    ) -> None:
        """
        Hand on what happens until the run is over.

        Args:
            check: called ten times a second and before each event; raises to end the run. Where
                that is `Interrupted`, for a first signal, a run that can takes a checkpoint before.
            handlers: called with what comes.
            look: called instead of `check` meanwhile.

        Raises:
            DistplatError: why the run failed; `ActorLost` where the controller itself is gone,
                `ClusterUnreachable` where the cluster could not have it.
        """
        self._ask(check, "begin", *self._begin)
        listening = Future[DistplatError | None]()
        try:
            listening = run_in_thread("follow", lambda: self._listen(handlers))
            self._tell(check, handlers, listening)
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt) and _is_asked(check):
                self._hurried = True  # a second signal, before the first one was seen
            if isinstance(error, Interrupted) and self._saves:
                self._stop(look, handlers, listening)
            self._left.set()
            if not isinstance(error, KeyboardInterrupt):  # that is of who cannot wait
                with self._keeping:
                    pass
            wait([listening], _LEAVE_S)
            self._add_cause(error, listening)
            raise

    def _add_cause(self, error: BaseException, listening: Future[DistplatError | None]) -> None:
        """Say what the thread ran into meanwhile, which `error` would hide."""
        if not listening.done():
            return
        other = listening.exception() or listening.result()
        if other in (None, error, self._warned) or isinstance(other, Interrupted | _NotFollowed):
            return
        error.add_note(f"before that: {other}")
        logger.warning("before that: %s", other)

    def _tell(
        self,
        check: Callable[[], None],
        handlers: RunHandlers,
        listening: Future[DistplatError | None],
    ) -> None:
        """Tell callbacks what happens until the run is over; raises why it failed."""
        ending = False
        while self._untold or not self._news.drained:
            check()  # before each event: a callback may take its time for each of thousands
            if not self._untold:
                self._number += 1
                self._untold.extend(self._news.take(self._number, POLL_S))
                self._warn_of_left_out()
            if self._untold:
                _hand_on(self._untold.popleft(), handlers)
            if not ending and not listening.done() and handlers.ending():
                ending = True
                self._ask(check, "end_early")
        if (error := listening.result()) is not None:
            raise error

    def _stop(
        self,
        look: Callable[[], None],
        handlers: RunHandlers,
        listening: Future[DistplatError | None],
    ) -> None:
        """Have the run stop with a checkpoint, and tell what happens until its end."""
        until = time.monotonic() + SAVE_S + _END_S

        def check() -> None:
            look()
            if time.monotonic() > until:
                raise DeadlineExceeded("an orderly end", (_NAME,), SAVE_S + _END_S, "")

        try:
            self._ask(check, "stop", 0.0, True)
            self._tell(check, handlers, listening)
        except Interrupted:
            return
        except DistplatError as error:
            self._warned = error
            logger.warning("while the run was stopped: %s", error)
        except KeyboardInterrupt:
            self._hurried = True
            self._left.set()
            raise

    def _listen(self, handlers: RunHandlers) -> DistplatError | None:
        """Hear what happens until the run is over; give why it failed."""
        number = 0
        try:
            while True:
                self._look()
                number += 1
                polled: RunPollResult = self._ask_listening("poll", number, _HOLD_S)
                for event in polled.events:
                    self._take(event, handlers)
                if polled.over:
                    return polled.error
        finally:
            self._news.close()

    def _take(self, event: RunEvent, handlers: RunHandlers) -> None:
        """Keep what is to be kept; the rest is news."""
        if isinstance(event, ModelReady):
            model = fetch_pieces(self._piece)
            self._keep(lambda: handlers.on_model(model))
        elif isinstance(event, FileToKeep):
            self._keep(lambda: handlers.on_file(event.name, event.content))
        else:
            if isinstance(event, StepSummary):
                self._step = event.step
            self._saved |= isinstance(event, Saved)
            self._news.put(event)

    def _piece(self, first: int) -> ModelPiece:
        self._look()  # `ask` does so while it waits alone: pieces may come at once
        piece: ModelPiece = self._ask_listening("result", first)
        return piece

    def _keep(self, write: Callable[[], object]) -> None:
        with self._keeping:
            self._look()
            write()

    def _look(self) -> None:
        if self._left.is_set():
            raise _NotFollowed("nobody follows the run any more")

    def _ask_listening(self, method: str, *args: Any) -> Any:
        """Call a method in the thread that listens: a log may wait for a terminal."""
        return self._ask(self._look, method, *args, warn=self._log_later)

    def _log_later(self, text: str) -> None:
        record = (logger.name, logging.WARNING, __file__, 0, text, (), None)
        self._news.put(logger.makeRecord(*record))

    def _ask(
        self,
        check: Callable[[], None],
        method: str,
        *args: Any,
        warn: Callable[[str], object] = logger.warning,
    ) -> Any:
        """
        Call a method, again where an answer is lost; every one of them may be called twice.

        A poll is answered at once by a thread that does nothing else: a controller that leaves it
        open is frozen. What a run begins with and its result take their time.
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
            never, self._up = not self._up, False
            if error.role != _NAME:  # that is what `check` has found
                raise
            if never and UNREACHABLE in error.cause:
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
        """What to do about a controller that is lost."""
        if self._saved:
            return "go on from the last checkpoint: submit --resume"
        return "" if self._step is None else "there is no checkpoint to go on from"

    def _warn_of_left_out(self) -> None:
        if left_out := self._news.pop_dropped():
            text = "%d steps and log lines are not told: a callback held the driver up"
            logger.warning(text, left_out)

    def end(self, look: Callable[[], object] = lambda: None) -> None:
        """
        End the run and the actors that the controller made; one that is gone is passed over.

        Args:
            look: called while it is waited for; raises where that is in vain.
        """
        if self._up and not self._hurried:
            stop = partial(self._transport.call, self._controller, "stop", _END_S)
            with suppress(DistplatError):
                ask(self._transport, "the end", {_NAME: stop}, _END_S, "", look)


def _is_asked(check: Callable[[], None]) -> bool:
    """Say whether a signal came: a callback's own `KeyboardInterrupt` is none."""
    try:
        check()
    except Exception as error:  # whatever else ends the run, nobody hurries
        return isinstance(error, Interrupted)
    return False


def _hand_on(event: Summary | logging.LogRecord, handlers: RunHandlers) -> None:
    """Tell callbacks of an event; have a line of the controller's log written here."""
    if not isinstance(event, logging.LogRecord):
        handlers.on_summary(event)
        return
    log = logging.getLogger(event.name)
    if log.isEnabledFor(event.levelno):
        log.handle(event)
