"""
A shard that many workers call at once: locks, waits with deadlines, answers.

A server node and the fake in memory wrap the same service; how values reach a worker is theirs
(`Deliver`). Calls come in on one thread per worker; whoever has to wait sleeps on a condition.
"""

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from distplat.platform.errors import DeadlineExceeded, ProtocolError, StaleError
from distplat.platform.ledger import Answer, PushId
from distplat.platform.shard_map import ShardPlan
from distplat.strategies.training.async_shard import AsyncShard
from distplat.strategies.training.keeping import Kept
from distplat.strategies.training.shard import ParameterShard

Deliver = Callable[[Tensor, int], Any]
"""Bring a shard's values, of the given version, to a worker; what it gives goes into the answer."""


@dataclass(frozen=True)
class Limits:
    """How long a service waits, in seconds."""

    start_s: float
    step_s: float


class Service(ABC):
    """
    A shard at work.

    Args:
        name: of the server node, for messages.
        plan: the run's facts.
        limits: deadlines.
        shard: what it serves.
    """

    def __init__(
        self, name: str, plan: ShardPlan, limits: Limits, shard: ParameterShard | AsyncShard
    ) -> None:
        self._name, self._plan, self._limits = name, plan, limits
        self._served = shard
        self._changed = threading.Condition()
        self._pulls: dict[int, tuple[int, Answer | None]] = {}  #: rank -> its last pull's number
        self._pushes: dict[int, tuple[int, Answer]] = {}  #: rank -> its last push's number

    @property
    def params(self) -> Tensor:
        """The shard's vector, shape [m]."""
        return self._served.params

    def restore(
        self,
        version: int,
        fill: Callable[[Tensor], object],
        state: Mapping[str, Tensor] | None = None,
    ) -> None:
        """
        Open for service; twice does nothing.

        Args:
            version: steps that the parameters have behind them.
            fill: puts them in place.
            state: what the optimizer remembers; None: nothing.
        """
        with self._changed:
            if self._served.ledger.version is None:
                fill(self.params)
                self._served.restore(version, state)
            self._changed.notify_all()

    def kept(self, version: int, limit_s: float) -> tuple[int, Kept | None]:
        """
        Give the copies that were made of a version, once.

        Args:
            version: steps.
            limit_s: how long to wait for ranks that are behind it.

        Returns:
            Steps of the slowest rank, and the copies; None: they are not here.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._served.steps >= version, limit_s)
            return self._served.steps, self._served.kept(version)

    def pull(self, rank: int, number: int, deliver: Deliver) -> Answer:
        """
        Give the newest values, once there are any.

        Args:
            rank: of the worker.
            number: of its pull, from 0: one that comes late, or again, must not touch its values.
            deliver: brings them.

        Raises:
            StaleError: the worker is past this pull.
            DeadlineExceeded: nobody restored the shard.
        """
        with self._changed:
            ready = self._served.ledger
            what = f"parameters of {self._name}"
            opened = lambda: ready.version is not None  # noqa: E731
            self._wait(opened, what, lambda: [0], self._limits.start_s, "start_timeout_s")
            last, answer = self._pulls.get(rank, (-1, None))
            if number < last or (number == last and answer is None):
                raise StaleError(f"pull {number} of rank {rank} refused: it has gone on since")
            if number > last or answer is None:
                answer = self._take(rank, deliver, 0.0)
                self._pulls[rank] = number, answer
            return answer

    @abstractmethod
    def push(self, push: PushId, gradient: Tensor, deliver: Deliver) -> Answer:
        """
        Take a worker's gradient; return when the worker may go on.

        Raises:
            ProtocolError: the push must not be applied.
            DeadlineExceeded: somebody was waited for too long; names who.
        """

    def commit(self, rank: int, seq: int, norm: float | None, deliver: Deliver) -> Answer:
        """
        Apply a staged step, once; later calls get the same answer.

        Raises:
            ProtocolError: nothing is staged, or another step.
        """
        raise ProtocolError(f"commit {seq} refused: {self._name} applies gradients by itself")

    @abstractmethod
    def wait_for_all(self, limit_s: float) -> list[int]:
        """Wait until all ranks have made all steps, or so long; give the ranks' steps."""

    def log(self) -> NDArray[np.int64] | None:
        """Give the order of updates, shape [updates, 3]; None: it follows from the job."""
        return None

    @abstractmethod
    def _take(self, rank: int, deliver: Deliver, waited: float) -> Answer:
        """Have the present values delivered; the condition is held."""

    def _answered(self, push: PushId) -> bool:
        """Say whether this push was answered before."""
        return push.rank in self._pushes and self._pushes[push.rank][0] >= push.seq

    def _once(self, push: PushId, make: Callable[[], Answer]) -> Answer:
        """Give the answer that the push got, or make it: a repeat must not deliver again."""
        if not self._answered(push):
            self._pushes[push.rank] = push.seq, make()
        return self._pushes[push.rank][1]

    def _went_on(self, rank: int) -> None:
        """A push says that the worker has its last pull's answer: let go of that one's payload."""
        if rank in self._pulls:
            self._pulls[rank] = self._pulls[rank][0], None

    def _wait(
        self,
        arrived: Callable[[], bool],
        what: str,
        missing: Callable[[], list[int]],
        limit_s: float,
        setting: str,
    ) -> float:
        """Wait on the condition, which is held; give the seconds."""
        began = time.monotonic()
        if not self._changed.wait_for(arrived, limit_s):
            late = tuple(f"worker-{rank}" for rank in missing())
            raise DeadlineExceeded(what, late, limit_s, f"failure.{setting}")
        return time.monotonic() - began
