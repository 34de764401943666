"""
Notice that the head of the cluster is gone, before Ray ends this process because of it.

Ray ends every process that has not reached the head for a minute, with exit code 1 and without a
word to Python: a run would leave no result, and its exit code would blame the task. Until then
training goes on, and a head that comes back in time is welcome.
"""

import os
import socket
import threading
import time
from collections.abc import Callable
from typing import Self

from distplat.platform.errors import ActorLost

_SETTING = "RAY_gcs_rpc_server_reconnect_timeout_s"
_RAYS_OWN_S = 60.0
_SHARE = 2 / 3
"""Share of Ray's time-out after which the head counts as lost: the rest is for an orderly end."""
_KNOCK_S = 2.0
_HEAD = "the head of the Ray cluster"


class HeadWatch:
    """
    Knocks at the head of the cluster while it is entered.

    Args:
        address: HOST:PORT of the head.
        probe: says whether somebody listens there; None: a connection shows it.
        clock: seconds that never go back.
    """

    def __init__(
        self,
        address: str,
        probe: Callable[[str], bool] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._address, self._probe, self._clock = address, probe or listens, clock
        self._limit_s = float(os.environ.get(_SETTING, _RAYS_OWN_S)) * _SHARE
        self._heard_at = clock()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="head watch")

    def __enter__(self) -> Self:
        """Begin."""
        self._thread.start()
        return self

    def __exit__(self, *raised: object) -> None:
        """End."""
        self._over.set()

    @property
    def lost(self) -> bool:
        """Whether the head has been silent for too long."""
        return self._clock() - self._heard_at > self._limit_s

    def answers(self) -> bool:
        """Say whether it is there now: calls to actors would wait for one that is not."""
        return not self.lost and self._probe(self._address)

    def insist(self) -> None:
        """
        Return if it is there now.

        Raises:
            ActorLost: it is not, and nothing is to wait for it.
        """
        if not self.answers():
            raise ActorLost(_HEAD, None, f"nothing listens at {self._address}")

    def check(self) -> None:
        """
        Return if the head is there, or was not long ago.

        Raises:
            ActorLost: it is gone.
        """
        if self.lost:
            cause = (
                f"nothing has listened at {self._address} for {self._limit_s:.0f} s, two thirds of "
                f"what {_SETTING} gives it"
            )
            remedy = "start Ray there again, and go on from the last checkpoint, if there is one"
            raise ActorLost(_HEAD, None, cause, remedy)

    def look(self) -> None:
        """Knock once."""
        if self._probe(self._address):
            self._heard_at = self._clock()

    def _watch(self) -> None:
        while not self._over.wait(_KNOCK_S):
            self.look()


def listens(address: str) -> bool:
    """Say whether a connection to HOST:PORT can be made."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_KNOCK_S).close()
    except (OSError, ValueError):
        return False
    return True
