"""
A server that many workers call at once: locks, waits with deadlines, answers. One for all stores.

    push ─▶ ledger ─ new ─▶ stage ─ complete? ─▶ update ─▶ backup has it ─▶ deliver, answer
               │                       │
               │                       └ no ─▶ wait for the other ranks
               ├─── late ─────────────────────────────────────────────────▶ deliver, answer
               └─── repeat ────────────────────────────────────────────────▶ the same answer

A synchronous store is complete when every rank has pushed, so the thread that brings the last
gradient applies them all; an asynchronous one with each push, so nobody waits. What a gradient is,
and how it is applied, is the store's; how values reach a worker the server node's (`deliver`).
Calls come in on one thread per worker; whoever has to wait sleeps on a condition. Values are
delivered with the lock held and while their worker stands in the call, so that it never computes on
a vector that is half of one version and half of another.
"""

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from torch import Tensor

from distplat.platform.awake_clock import wait_awake
from distplat.platform.errors import (
    DeadlineExceeded,
    DistplatError,
    FencedError,
    MismatchError,
    ProtocolError,
    StaleError,
)
from distplat.platform.ledger import PullId, PushId, ServerReply, Verdict
from distplat.platform.load import PushQueue, QueuedPush
from distplat.platform.shard_map import ShardPlan
from distplat.strategies.server.dense_store import DenseStore
from distplat.strategies.server.store import ServerStore

Result = TypeVar("Result")
Deliver = Callable[[Any, int], Any]
"""Bring a store's values, of the given version, to a worker; what it gives goes into the answer."""


@dataclass(frozen=True)
class ServerLimits:
    """How long a server waits, in seconds."""

    start_s: float
    step_s: float


S = TypeVar("S", bound=ServerStore)


class Server(Generic[S]):
    """
    A store at work.

    Args:
        name: of the server node, for messages.
        store: what it serves; to be touched with the lock held, see `exclusively`.
        limits: deadlines.
    """

    def __init__(self, name: str, store: S, limits: ServerLimits) -> None:
        self._name, self.store, self._limits = name, store, limits
        self._changed = threading.Condition()
        #: by rank: number and answer of its last pull, of its last push
        self._pulls: dict[int, tuple[int, ServerReply | None]] = {}
        self._pushes: dict[int, tuple[int, ServerReply]] = {}
        self._came: set[int] = set()  #: ranks that have pulled in this attempt
        self._opened_at: int | None = None  #: the step with which an attempt began
        self._queue = PushQueue()
        self._queued: dict[int, QueuedPush] = {}  #: rank -> its push that is staged, as it came
        self._loads: dict[int, tuple[float, float, int]] = {}  #: by rank: see `ServerReply.apply_s`
        self._fenced_by: DistplatError | None = None  #: why this server may answer nothing more

    def take_copies(self, version: int, limit_s: float) -> tuple[int, Any]:
        """
        Give the copies that were made of a version, once.

        Args:
            version: steps.
            limit_s: how long to wait for ranks that are behind it.

        Returns:
            Steps of the slowest rank, and the copies; None: they are not here.
        """
        with self._changed:
            ledger = self.store.ledger
            self._changed.wait_for(lambda: ledger.steps >= version, limit_s)
            return ledger.steps, self.store.take_copies(version)

    def pull(self, pull: PullId, deliver: Deliver, *, again: bool = False) -> ServerReply:
        """
        Give the newest values, once there are any.

        Args:
            pull: its name; one that comes late, or again, must not touch the worker's values.
            deliver: brings them.
            again: they may be brought a second time for one pull: not into the worker's memory.

        Raises:
            StaleError: the worker is past this pull.
            FencedError: it is one of another attempt.
            DeadlineExceeded: nobody restored the store.
        """
        with self._changed:
            what, rank = f"parameters of {self._name}", pull.rank
            if not self.store.opened:
                opened = lambda: self.store.opened  # noqa: E731
                self._wait(opened, what, lambda: [0], self._limits.start_s, "start_timeout_s")
            self._wait_for_backup()
            self._check_not_fenced()
            self.check_attempt(pull.attempt, "a pull")
            self._wait_for_ranks(rank, what)
            last, answer = self._pulls.get(rank, (-1, None))
            if pull.number < last or (pull.number == last and answer is None):
                late = f"pull {pull.number} of rank {rank} refused: it has gone on since"
                raise StaleError(late)
            if pull.number > last or answer is None or again:
                answer = self._take(rank, deliver, 0.0, ())
                self._pulls[rank] = pull.number, answer
            return answer

    def _wait_for_ranks(self, rank: int, what: str) -> None:
        """
        Have an attempt begin with all ranks, where steps are made without those that are late.

        One that came later would begin with the others' step, and have no part in the evaluations
        before.
        """
        ledger = self.store.ledger
        if not ledger.drops_late:
            return

        def missing() -> list[int]:
            return [one for one in range(ledger.world) if one not in self._came]

        self._came.add(rank)
        self._changed.notify_all()
        limit = self._limits.start_s, "start_timeout_s"
        self._wait(lambda: not missing(), what, missing, *limit)

    def push(self, push: PushId, gradient: Any, control: Any, deliver: Deliver) -> ServerReply:
        """
        Take a worker's gradient; return when the worker may go on.

        Args:
            push: its name.
            gradient: see the store.
            control: of the push, see the store.
            deliver: see `pull`.

        Raises:
            ProtocolError: the push must not be applied.
            DeadlineExceeded: somebody was waited for too long; names who.
        """
        store, rank = self.store, push.rank
        with self._queue.enter() as queued, self._changed:
            self._check_not_fenced()
            began, ledger = time.perf_counter(), store.ledger
            if store.push(push, gradient, control) is Verdict.NEW:
                self._queued[rank] = queued
            self._drop_pull_reply(rank)
            if ledger.complete:
                if store.commits_alone:
                    square = store.squared_norm
                    self._apply(push.seq, None if square is None else square**0.5, began)
                    queued.leave()
                self._changed.notify_all()
            waited = self._wait(
                lambda: ledger.passed(push) or ledger.complete,
                f"push {push.seq} to {self._name}",
                ledger.missing,
                *self._patience(push.seq),
            )
            head = store.head(control)
            if store.commits_alone:
                return self._once(push, lambda: self._take(rank, deliver, waited, head))
            # Another rank may have committed by now: this one still wants the norm of all servers.
            norm = store.squared_norm
            return ServerReply(ledger.updates, False, norm, waiting_s=waited, total=head)

    def commit(self, rank: int, seq: int, norm: float | None, deliver: Deliver) -> ServerReply:
        """
        Apply a staged step, once; later calls get the same answer.

        Raises:
            ProtocolError: nothing is staged, or another step.
        """
        with self._changed:
            self._check_not_fenced()
            if self.store.ledger.asynchronous:
                text = f"commit {seq} refused: {self._name} applies gradients by itself"
                raise ProtocolError(text)
            self._apply(seq, norm, time.perf_counter())
            self._changed.notify_all()
            return self._take(rank, deliver, 0.0, self.store.head(None))

    def exclusively(self, action: Callable[[], Result]) -> Result:
        """Do something with the store while nobody else does; who waits looks again after it."""
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
        later = attempt > self.store.ledger.attempt
        if later:
            self._pulls.clear()
            self._came.clear()
            self._changed.notify_all()
            self.store.renew(attempt, world)
            self._opened_at = self.store.ledger.steps
        return later

    def check_attempt(self, attempt: int, what: str) -> None:
        """
        Refuse what is not of the present attempt; the lock is held.

        Raises:
            FencedError: it is of another one.
        """
        if attempt != self.store.ledger.attempt:
            raise FencedError(f"{what} of attempt {attempt} refused by {self._name}")

    def forget_push_reply(self, rank: int) -> None:
        """A worker has new vectors: deliver the answer to its last push once more when it asks."""
        self._pushes.pop(rank, None)

    def _apply(self, seq: int, norm: float | None, began: float) -> None:
        """Apply what is staged, here and at the backup."""
        if self.store.commit(seq, norm):
            apply_s = time.perf_counter() - began
            for rank, queued in self._queued.items():
                self._loads[rank] = apply_s, max(0.0, began - queued.arrived_at), queued.depth
            self._queued.clear()
        self._confirm()

    def _take(
        self, rank: int, deliver: Deliver, waited: float, head: tuple[float, ...]
    ) -> ServerReply:
        """Have the present values delivered; the condition is held."""
        store, ledger = self.store, self.store.ledger
        version = store.pull(rank)
        apply_s, queue_s, queue_depth = self._loads.get(rank, (0.0, 0.0, 0))
        return ServerReply(
            version,
            squared_norm=store.squared_norm,
            staleness=store.staleness_of(rank),
            waiting_s=waited,
            apply_s=apply_s,
            queue_s=queue_s,
            queue_depth=queue_depth,
            dropped=ledger.dropped.get(rank, 0),
            done=ledger.steps,
            total=head,
            payload=deliver(store.present, version),
        )

    def _confirm(self) -> None:
        """Return when the backup, if there is one, has done what was just done here."""
        backup_link = self.store.backup_link
        if backup_link is None:
            return
        try:
            backup_link.confirm()
        except DistplatError as error:
            self._fenced_by = error
            self._changed.notify_all()
            raise

    def _wait_for_backup(self) -> None:
        backup_link, limit = self.store.backup_link, self._limits.start_s
        settled = lambda: backup_link is None or backup_link.settled  # noqa: E731
        if not wait_awake(self._changed, settled, limit):
            late = (f"the backup of {self._name}",)
            raise DeadlineExceeded("the first copy", late, limit, "failure.start_timeout_s")

    def _check_not_fenced(self) -> None:
        if self._fenced_by is not None:
            raise FencedError(f"{self._name} serves no more: {self._fenced_by}")

    def _once(self, push: PushId, make: Callable[[], ServerReply]) -> ServerReply:
        """Give the answer that the push got, or make it: a repeat must not deliver again."""
        if push.rank not in self._pushes or self._pushes[push.rank][0] < push.seq:
            self._pushes[push.rank] = push.seq, make()
        return self._pushes[push.rank][1]

    def _drop_pull_reply(self, rank: int) -> None:
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
        ledger = self.store.ledger
        attempt = ledger.attempt

        def over() -> bool:
            gone = bool(ledger.finished_ranks) and bool(
                ledger.finished_ranks.intersection(missing())
            )
            return gone or self._fenced_by is not None or ledger.attempt != attempt

        there = wait_awake(self._changed, lambda: over() or arrived(), limit_s)
        self._check_not_fenced()
        if ledger.attempt != attempt:
            raise FencedError(f"{what}: attempt {attempt} is over")
        gone = sorted(ledger.finished_ranks.intersection(missing()))
        if gone and not arrived():
            who = ", ".join(self.store.worker(rank) for rank in gone)
            cause = f"the train function of {who} is over, after fewer backwards than others'"
            raise MismatchError(self._name, "push", ledger.updates, tuple(gone), cause)
        if not there:
            late = tuple(self.store.worker(rank) for rank in missing())
            raise DeadlineExceeded(what, late, limit_s, f"failure.{setting}")
        return time.monotonic() - began


class ShardServer(Server[DenseStore]):
    """
    A shard at work.

    Args:
        name: of the server node, for messages.
        plan: the run's facts.
        limits: deadlines.
        params: shape [m]; updated in place.
    """

    def __init__(self, name: str, plan: ShardPlan, limits: ServerLimits, params: Tensor) -> None:
        super().__init__(name, DenseStore(plan, params), limits)

    @property
    def params(self) -> Tensor:
        """The shard's vector, shape [m]."""
        return self.store.params

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
            if not self.store.opened:
                fill(self.params)
                self.store.restore(version, state)
                self._opened_at = version
            self._changed.notify_all()
