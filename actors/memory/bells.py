"""A worker's bells, one for each server node that shares memory with it; see `bell.py`."""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from distplat.actors.memory import futex
from distplat.actors.memory.bell import SLOT, Bell, Request, control_of
from distplat.actors.memory.memfd import Segment
from distplat.actors.messages import Address
from distplat.actors.transport import ActorDied, Transport, Unanswered
from distplat.platform.errors import ActorLost, DeadlineExceeded
from distplat.platform.ledger import Answer

logger = logging.getLogger(__name__)

_SLICE_S = 0.1
"""How often who waits for an answer looks whether the server lives."""
_REASON_S = 5.0
"""How long a standing call may take to say why a request failed."""

Look = Callable[[], object]
"""Called ten times a second while an answer is missing; what it raises ends the wait."""
Listen = Callable[[int, Address, int], Any]
"""Makes the standing call to the server of a shard: shard, segment of bells, slot."""


class Bells:
    """
    Rings servers, and waits for their answers.

    Args:
        transport: by which standing calls are made.
        near: shards whose servers share memory with this worker.
        names: of all servers, by shard.
        control: values of this worker's control record, which lies behind the bells.
        listen: makes a standing call.
        look: see `Look`.
    """

    def __init__(
        self,
        transport: Transport,
        near: set[int],
        names: Sequence[str],
        control: int,
        listen: Listen,
        look: Look,
    ) -> None:
        self._transport = transport
        self.shards = sorted(near) if futex.supported() else []
        self._names, self._listen, self._look = names, listen, look
        # Not sealed: a standing call that got lost is made again, and opens it again.
        size = SLOT * max(1, len(self.shards)) + 8 * control
        self._segment = Segment.create(transport.node, size, "uint8")
        self.control = control_of(self._segment, control)  #: written before a bell is rung
        self._bells = {s: Bell(self._segment, slot) for slot, s in enumerate(self.shards)}
        self._standing = {shard: self._call(shard) for shard in self.shards}

    def close(self) -> None:
        """Ring no more, and give the memory back."""
        for bell in self._bells.values():
            bell.close()
        self._segment.seal()

    def ring(self, shard: int, request: Request) -> None:
        """Ask one of them; its answer to the request before has been read."""
        self._bells[shard].ring(request)

    def answers(
        self, rung: Sequence[int], what: str, limit_s: float, setting: str
    ) -> Iterator[tuple[int, Answer]]:
        """
        Wait for answers, and give one after the other.

        Args:
            rung: shards that were asked.
            what: was asked, for messages.
            limit_s: deadline of all of them.
            setting: the field of `failure` that changes it.

        Raises:
            ActorLost, DeadlineExceeded: a server is gone, or frozen.
            DistplatError: what a server raised.
        """
        until = time.monotonic() + limit_s
        for shard in rung:
            bell = self._bells[shard]
            while not bell.answered(_SLICE_S):
                self._look_after(shard)
                self._look()
                if time.monotonic() > until:
                    late = [one for one in rung if not self._bells[one].answered(0.0)]
                    missing = tuple(self._names[s] for s in late)
                    raise DeadlineExceeded(what, missing, limit_s, f"failure.{setting}")
            answer = bell.read()
            if answer is None:
                self._look_after(shard, _REASON_S)
                raise ActorLost(self._names[shard], None, f"it could not say why {what} failed")
            yield shard, answer

    def _call(self, shard: int) -> Any:
        return self._listen(shard, self._segment.address, self.shards.index(shard))

    def _look_after(self, shard: int, wait_s: float = 0.0) -> None:
        """Raise what the standing call says, if it has ended; make it again if it got lost."""
        if not self._transport.wait([self._standing[shard]], wait_s):
            return
        try:
            self._transport.get(self._standing[shard], _REASON_S)
        except Unanswered:
            logger.warning("no word from %s, asking it again to listen", self._names[shard])
        except ActorDied as error:
            raise ActorLost(self._names[shard], None, str(error)) from None
        self._standing[shard] = self._call(shard)
