"""
A shard that many workers call at once: locks, waits with deadlines, answers.

How values reach a worker is the server node's (`Deliver`). Calls come in on one thread per worker;
whoever has to wait sleeps on a condition.
"""

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from distplat.platform.errors import (
    DeadlineExceeded,
    DistplatError,
    FencedError,
    ProtocolError,
    StaleError,
)
from distplat.platform.ledger import Answer, PushId
from distplat.platform.load import PushQueue, QueuedPush
from distplat.platform.shard_map import ShardPlan
from distplat.strategies.loop.control import StepControl
from distplat.strategies.training.async_shard import AsyncShard
from distplat.strategies.training.checkpoint_copies import VectorCopies
from distplat.strategies.training.shard import ParameterShard

Result = TypeVar("Result")
PullId = tuple[int, int]
"""Attempt, and number of the worker's pull in it, from 0: the later is the greater."""
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
        self.served = shard  #: to be touched with the lock held, see `exclusively`
        self._changed = threading.Condition()
        self._pulls: dict[int, tuple[PullId, Answer | None]] = {}  #: rank -> its last pull's number
        self._pushes: dict[int, tuple[int, Answer]] = {}  #: rank -> its last push's number
        self._opened_at = 0  #: the version with which service began
        self._apply_s = 0.0  #: what the last update took
        self._began = 0.0  #: when it began
        self._door = PushQueue()
        self._visits: dict[int, QueuedPush] = {}  #: rank -> its last push, as it came
        self._deposed: DistplatError | None = None  #: why this server may acknowledge nothing more

    @property
    def params(self) -> Tensor:
        """The shard's vector, shape [m]."""
        return self.served.params

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
            if self.served.ledger.version is None:
                fill(self.params)
                self.served.restore(version, state)
                self._opened_at = version
            self._changed.notify_all()

    def kept(self, version: int, limit_s: float) -> tuple[int, VectorCopies | None]:
        """
        Give the copies that were made of a version, once.

        Args:
            version: steps.
            limit_s: how long to wait for ranks that are behind it.

        Returns:
            Steps of the slowest rank, and the copies; None: they are not here.
        """
        with self._changed:
            self._changed.wait_for(lambda: self.served.steps >= version, limit_s)
            return self.served.steps, self.served.kept(version)

    def pull(self, rank: int, number: PullId, deliver: Deliver) -> Answer:
        """
        Give the newest values, once there are any.

        Args:
            rank: of the worker.
            number: of its pull; one that comes late, or again, must not touch its values.
            deliver: brings them.

        Raises:
            StaleError: the worker is past this pull.
            DeadlineExceeded: nobody restored the shard.
        """
        with self._changed:
            ready = self.served.ledger
            what = f"parameters of {self._name}"
            opened = lambda: ready.version is not None  # noqa: E731
            self._wait(opened, what, lambda: [0], self._limits.start_s, "start_timeout_s")
            self._wait_for_backup()
            last, answer = self._pulls.get(rank, ((-1, -1), None))
            if number < last or (number == last and answer is None):
                raise StaleError(f"pull {number} of rank {rank} refused: it has gone on since")
            if number > last or answer is None:
                answer = self._take(rank, deliver, 0.0)
                self._pulls[rank] = number, answer
            return answer

    @abstractmethod
    def push(
        self, push: PushId, gradient: Tensor, control: StepControl, deliver: Deliver
    ) -> Answer:
        """
        Take a worker's gradient and control record; return when the worker may go on.

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

    def log(self) -> NDArray[np.int64] | None:
        """Give the order of updates, shape [updates, 3]; None: it follows from the job."""
        return None

    @abstractmethod
    def _take(self, rank: int, deliver: Deliver, waited: float) -> Answer:
        """Have the present values delivered; the condition is held."""

    def exclusively(self, action: Callable[[], Result]) -> Result:
        """Do something with the shard while nobody else does; who waits looks again after it."""
        with self._changed:
            try:
                return action()
            finally:
                self._changed.notify_all()

    def renew(self, attempt: int, world: int | None = None) -> bool:
        """
        Begin a later attempt; False: it has begun. The lock is held.

        Who waits here for a rank that was lost is told so; it has its orders by now.

        Args:
            attempt: its number.
            world: its ranks; None: as many as before.
        """
        later = attempt > self.served.ledger.attempt
        if later:
            self.served.renew(attempt, world)
            self._opened_at = self.served.steps
            self._changed.notify_all()
        return later

    def forget(self, rank: int) -> None:
        """A worker has new vectors: deliver the answer to its last push once more when it asks."""
        self._pushes.pop(rank, None)

    def _confirm(self) -> None:
        """Return when the backup, if there is one, has made the update just made here."""
        mirror = self.served.mirror
        if mirror is None:
            return
        try:
            mirror.confirm()
        except DistplatError as error:
            self._deposed = error
            self._changed.notify_all()
            raise

    def _wait_for_backup(self) -> None:
        mirror, limit = self.served.mirror, self._limits.start_s
        if not self._changed.wait_for(lambda: mirror is None or mirror.settled, limit):
            late = (f"the backup of {self._name}",)
            raise DeadlineExceeded("the first copy", late, limit, "failure.start_timeout_s")

    def _check_in_office(self) -> None:
        if self._deposed is not None:
            raise FencedError(f"{self._name} serves no more: {self._deposed}")

    def _answered(self, push: PushId) -> bool:
        """Say whether this push was answered before."""
        return push.rank in self._pushes and self._pushes[push.rank][0] >= push.seq

    def _once(self, push: PushId, make: Callable[[], Answer]) -> Answer:
        """Give the answer that the push got, or make it: a repeat must not deliver again."""
        if not self._answered(push):
            self._pushes[push.rank] = push.seq, make()
        return self._pushes[push.rank][1]

    def _applied_since(self, began: float) -> None:
        """Note the time of an update that is just over."""
        self._began, self._apply_s = began, time.perf_counter() - began

    def _queue(self, rank: int) -> tuple[float, int]:
        """Give how long a rank's push stood before the last update, and among how many."""
        visit = self._visits.get(rank)
        return (0.0, 0) if visit is None else (max(0.0, self._began - visit.at), visit.depth)

    def _went_on(self, rank: int) -> None:
        """A push says that the worker has its last pull's answer: let go of that one's payload."""
        if rank in self._pulls:
            self._pulls[rank] = self._pulls[rank][0], None

    def _patience(self, step: int) -> tuple[float, str]:
        """Give a step's deadline and its setting; the first step still belongs to the start."""
        if step == self._opened_at:
            return max(self._limits.start_s, self._limits.step_s), "start_timeout_s"
        return self._limits.step_s, "step_timeout_s"

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
        ledger = self.served.ledger
        attempt = ledger.attempt

        def over() -> bool:
            return self._deposed is not None or ledger.attempt != attempt

        there = self._changed.wait_for(lambda: over() or arrived(), limit_s)
        self._check_in_office()
        if ledger.attempt != attempt:
            raise FencedError(f"{what}: attempt {attempt} is over")
        if not there:
            late = tuple(self._plan.worker(rank) for rank in missing())
            raise DeadlineExceeded(what, late, limit_s, f"failure.{setting}")
        return time.monotonic() - began
