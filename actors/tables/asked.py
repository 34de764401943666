"""Calls under way that may be given up: `actors/asking.py` for those that go on meanwhile."""

import logging
import threading
import time
from collections.abc import Sequence
from typing import Any

import ray

from distplat.actors.asking import AGAIN_S, Call
from distplat.platform.errors import ActorLost, DeadlineExceeded, InfrastructureError

logger = logging.getLogger(__name__)

_LOOK_S = 0.2
"""How soon a wait that was given up comes to its end."""


class Asked:
    """
    Calls that were made side by side, each of which may be made more than once.

    Args:
        what: is asked, for messages.
        calls: to servers.
        names: of who is asked, one for each call.
        limit_s: deadline of all of them, from now.
        setting: the field of `failure` that changes it.
        abandoned: once set, nobody wants the answers any more.
    """

    def __init__(
        self,
        what: str,
        calls: Sequence[Call],
        names: Sequence[str],
        limit_s: float,
        setting: str,
        abandoned: threading.Event,
    ) -> None:
        self._what, self._calls, self._names = what, calls, names
        self._limit_s, self._setting, self._abandoned = limit_s, setting, abandoned
        self._until = time.monotonic() + limit_s
        self._open = [call() for call in calls]

    def wait(self) -> None:
        """Return when all have answered; see `answers`."""
        self.answers()

    def answers(self) -> list[Any]:
        """
        Wait for the answers, and give them in the order of the calls.

        Raises:
            ActorLost, DeadlineExceeded: somebody is gone, or frozen.
            InfrastructureError: the calls were given up.
            DistplatError: what the other side raised.
        """
        return [self._answer(index) for index in range(len(self._calls))]

    def _answer(self, index: int) -> Any:
        while True:
            try:
                return ray.get(self._open[index], timeout=_LOOK_S)
            except ray.exceptions.GetTimeoutError:
                self._check(index)
            except ray.exceptions.ActorUnavailableError:
                self._check(index)
                logger.warning(
                    "%s: no answer from %s, asking again", self._what, self._names[index]
                )
                time.sleep(AGAIN_S)
                self._open[index] = self._calls[index]()
            except ray.exceptions.RayTaskError as error:
                raise error.cause from None
            except ray.exceptions.RayActorError as error:
                cause = str(error).strip().splitlines()[0]
                raise ActorLost(self._names[index], None, cause) from None

    def _check(self, index: int) -> None:
        if self._abandoned.is_set():
            raise InfrastructureError(f"{self._what}: this rank was told to give up")
        if time.monotonic() > self._until:
            late = ray.wait(self._open, num_returns=len(self._open), timeout=0)[1]
            missing = tuple(self._names[self._open.index(call)] for call in late)
            missing = missing or (self._names[index],)
            setting = f"failure.{self._setting}"
            raise DeadlineExceeded(self._what, missing, self._limit_s, setting)
