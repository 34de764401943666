"""
Detect that the cluster's head is lost, before Ray kills this process because of it.

Ray kills every process that has not reached the head for a minute, with exit code 1 and without a
Python exception: a run would leave no result, and its exit code would blame the task. Training
continues until the deadline, in case the head comes back.
"""

import os
import socket
import threading
import time
from collections.abc import Callable
from typing import Self

from distplat.platform.errors import ActorLost

_SETTING = "RAY_gcs_rpc_server_reconnect_timeout_s"
_DEFAULT_S = 60.0
"""Ray's default of `_SETTING`."""
_SHARE = 2 / 3
"""Share of Ray's timeout after which the head counts as lost; the rest is for a clean shutdown."""
_PROBE_S = 2.0
"""Interval of probes, and timeout of each."""
_HEAD = "the head of the Ray cluster"


class HeadWatch:
    """
    Probes the cluster's head from a thread, as a context manager.

    Args:
        address: HOST:PORT of the head.
        probe: returns whether a process listens at an address; None: tries to connect.
        clock: monotonic clock in seconds.
    """

    def __init__(
        self,
        address: str,
        probe: Callable[[str], bool] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._address, self._probe, self._clock = address, probe or listens, clock
        self._limit_s = float(os.environ.get(_SETTING, _DEFAULT_S)) * _SHARE
        self._last_answer = clock()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="head watch")

    def __enter__(self) -> Self:
        """Start probing."""
        self._thread.start()
        return self

    def __exit__(self, *raised: object) -> None:
        """Stop probing."""
        self._over.set()

    @property
    def lost(self) -> bool:
        """Whether the head has not answered for longer than the limit."""
        return self._clock() - self._last_answer > self._limit_s

    def answers(self) -> bool:
        """Return whether the head answers now; without a head, calls to actors would block."""
        return not self.lost and self._probe(self._address)

    def require(self) -> None:
        """
        Check that the head answers now.

        Raises:
            ActorLost: the head does not answer.
        """
        if not self.answers():
            raise ActorLost(_HEAD, None, f"nothing listens at {self._address}")

    def check(self) -> None:
        """
        Check that the head has answered within the limit.

        Raises:
            ActorLost: the head is lost.
        """
        if self.lost:
            cause = (
                f"nothing has listened at {self._address} for {self._limit_s:.0f} s, two thirds of "
                f"what {_SETTING} gives it"
            )
            remedy = "start Ray there again, and resume from the last checkpoint, if there is one"
            raise ActorLost(_HEAD, None, cause, remedy)

    def probe(self) -> None:
        """Probe the head once."""
        if self._probe(self._address):
            self._last_answer = self._clock()

    def _watch(self) -> None:
        while not self._over.wait(_PROBE_S):
            self.probe()


def listens(address: str) -> bool:
    """Return whether HOST:PORT accepts a connection."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_PROBE_S).close()
    except (OSError, ValueError):
        return False
    return True
