"""The server manager's eye on servers that have no backup: the first loss ends the attempt."""

from __future__ import annotations

import threading
import time
from typing import Any

import ray

from distplat.platform.errors import ActorLost, DistplatError

WATCH_S = 0.5
"""Period of the look at the server nodes."""


class Watch:
    """
    Notes the first server that dies, or does not answer.

    Args:
        servers: handles, in order.
        limit_s: how long one may not answer.
    """

    def __init__(self, servers: list[Any], limit_s: float) -> None:
        self._servers, self._limit_s = servers, limit_s
        self.lost: DistplatError | None = None
        self.losing = threading.Event()  #: something is in `lost`
        threading.Thread(target=self._watch, name="watch", daemon=True).start()

    def _watch(self) -> None:
        heard = dict.fromkeys(range(len(self._servers)), time.monotonic())
        while self.lost is None:
            for index in heard:
                self.lost = self.lost or self._look(index, heard)
            if self.lost is not None:
                self.losing.set()
            self.losing.wait(WATCH_S)

    def _look(self, index: int, heard: dict[int, float]) -> DistplatError | None:
        """Ask one server whether it lives; `heard`: when each last said so."""
        name = f"server-{index}"
        try:
            ray.get(self._servers[index].where.remote(), timeout=self._limit_s)
        except ray.exceptions.ActorUnavailableError as error:
            if time.monotonic() - heard[index] > self._limit_s:  # one lost answer: no lost server
                return ActorLost(name, None, _first_line(error))
            return None
        except ray.exceptions.RayActorError as error:
            return ActorLost(name, None, _first_line(error))
        except ray.exceptions.GetTimeoutError:
            cause = f"it has not answered for {self._limit_s:g} s (frozen or cut off)"
            return ActorLost(name, None, cause)
        heard[index] = time.monotonic()
        return None


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
