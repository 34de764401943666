"""
The driver's side of a run on Ray: follows the controller, and ends it.

The driver keeps one question open to the controller and looks for signals meanwhile. A controller
that dies takes along the actors that it has made; those that the driver made, the driver ends.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import ray

from distplat.actors.actor_group import ActorGroup
from distplat.actors.controller_actor import FileToKeep, RunEvent
from distplat.platform.errors import ActorLost, DeadlineExceeded, DistplatError
from distplat.platform.progress import StepSummary, Summary

_TICK_S = 0.1
_HOLD_S = 0.5
"""For so long the controller keeps its answer back while nothing happens."""
_END_S = 35.0
"""How long the controller may take to write what is complete and to end the actors."""

Keep = Callable[[str, bytes], object]
"""Puts a file of the given name into the run directory."""


class ControllerClient:
    """
    One run's controller, seen from the driver.

    Args:
        controller: the actor's handle.
        actor_group: the actors that it is to watch.
        base: steps of the checkpoint that they begin from.
    """

    def __init__(self, controller: Any, actor_group: ActorGroup, base: int) -> None:
        self._controller = controller
        self._failure = actor_group.launch.job.failure
        self._step: int | None = None  #: the last one that is known to be made
        self._up = False  #: it has answered, and was not lost since
        self._run = controller.run.remote(actor_group, base)

    def follow(
        self, check: Callable[[], None], tell: Callable[[Summary], None], keep: Keep
    ) -> bytes:
        """
        Hand on what happens until the run ends; give the trained model.

        Args:
            check: called ten times a second; raises to end the run, for example on Ctrl-C.
            tell: takes each step, evaluation, checkpoint and failure.
            keep: takes the embedding tables and the log of updates, of runs that have them.

        Raises:
            DistplatError: why the run failed; `ActorLost` where the controller itself is gone.
        """
        try:
            over = False
            while not over:
                over = bool(ray.wait([self._run], timeout=0)[0])  # before the last question
                for event in self._poll(check):
                    self._hand_on(event, tell, keep)
            model: bytes = self._get(self._run)
            return model
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, DistplatError):
                raise error.cause from None
            raise
        except ray.exceptions.RayActorError as error:
            self._up = False
            cause = str(error).strip().splitlines()[0]
            remedy = "go on from the last checkpoint: submit --resume"
            raise ActorLost("controller", self._step, cause, remedy) from None

    def _poll(self, check: Callable[[], None]) -> list[RunEvent]:
        call, asked = self._controller.poll.remote(_HOLD_S), time.monotonic()
        check()
        while not ray.wait([call], timeout=_TICK_S)[0]:
            check()
            if time.monotonic() - asked > self._failure.start_timeout_s:
                raise self._late()
        self._up = True
        events: list[RunEvent] = self._get(call)
        return events

    def _get(self, reply: Any) -> Any:
        """Fetch what is there already."""
        try:
            return ray.get(reply, timeout=self._failure.start_timeout_s)
        except ray.exceptions.GetTimeoutError:
            raise self._late() from None

    def _late(self) -> DeadlineExceeded:
        """Give up; not by the limit of others: they are replaced, and this ends the run."""
        self._up = False
        limit = self._failure.start_timeout_s
        return DeadlineExceeded("an answer", ("controller",), limit, "failure.start_timeout_s")

    def _hand_on(self, event: RunEvent, tell: Callable[[Summary], None], keep: Keep) -> None:
        if isinstance(event, logging.LogRecord):
            logger = logging.getLogger(event.name)
            if logger.isEnabledFor(event.levelno):
                logger.handle(event)
        elif isinstance(event, FileToKeep):
            keep(event.name, event.content)
        else:
            if isinstance(event, StepSummary):
                self._step = event.step
            tell(event)

    def end(self) -> None:
        """End the run and the actors that the controller made; one that is gone is passed over."""
        if self._up:
            with suppress(ray.exceptions.RayError):
                ray.get(self._controller.stop.remote(_END_S), timeout=_END_S)
