"""
A server for concurrent calls of many workers: locks, waits with deadlines, replies.

    push ─▶ ledger ─ new ─▶ stage ─ complete? ─▶ update ─▶ backup confirms ─▶ deliver, reply
               │                       │
               │                       └ no ─▶ wait for the other ranks
               ├─── late ─────────────────────────────────────────────────▶ deliver, reply
               └─── repeat ────────────────────────────────────────────────▶ the same reply

A step of a synchronous store is complete when every rank has pushed: the thread of the last push
applies the sum. An asynchronous store applies each push at once. The store defines what a gradient
is and how it is applied; the server node defines how values reach a worker (`deliver`). Each worker
calls on a thread of its own, and waiting threads sleep on a condition. Values are delivered under
the lock, while the worker blocks in its call, so a worker never computes on a vector that mixes two
versions.
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
"""Delivers a store's values of a version to a worker; the result becomes the reply's payload."""


@dataclass(frozen=True)
class ServerLimits:
    """Deadlines of a server, in seconds."""

    start_s: float
    step_s: float


S = TypeVar("S", bound=ServerStore)


class Server(Generic[S]):
    """
    Serves a store to many workers.

    Args:
        name: of the server node, for messages.
        store: accessed with the lock held only, see `exclusively`.
        limits: deadlines.
    """

    def __init__(self, name: str, store: S, limits: ServerLimits) -> None:
        self._name, self.store, self._limits = name, store, limits
        self._changed = threading.Condition()
        #: by rank: number and reply of its last pull and of its last push
        self._pulls: dict[int, tuple[int, ServerReply | None]] = {}
        self._pushes: dict[int, tuple[int, ServerReply]] = {}
        self._pulled: set[int] = set()  #: ranks that have pulled in this attempt
        self._opened_at: int | None = None  #: first step of the attempt
        self._queue = PushQueue()
        self._queued: dict[int, QueuedPush] = {}  #: rank -> queue entry of its staged push
        self._loads: dict[int, tuple[float, float, int]] = {}  #: by rank: see `ServerReply.apply_s`
        self._fenced_by: DistplatError | None = None  #: why this server must not reply any more

    def take_copies(self, version: int, limit_s: float) -> tuple[int, Any]:
        """
        Return and drop the checkpoint copies of a version.

        Args:
            version: steps.
            limit_s: how long to wait for ranks that are behind.

        Returns:
            Completed steps of the slowest rank, and the copies; None: there are none.
        """
        with self._changed:
            ledger = self.store.ledger
            self._changed.wait_for(lambda: ledger.steps >= version, limit_s)
            return ledger.steps, self.store.take_copies(version)

    def pull(self, pull: PullId, deliver: Deliver, *, again: bool = False) -> ServerReply:
        """
        Return the newest values, after waiting until the store is restored.

        Args:
            pull: identity of the pull; a late or repeated pull must not touch the worker's values.
            deliver: delivers the values.
            again: the values may be delivered twice, since not into the worker's memory.

        Raises:
            StaleError: the worker is past this pull.
            FencedError: the pull is of another attempt.
            DeadlineExceeded: the store was not restored in time.
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
            last, reply = self._pulls.get(rank, (-1, None))
            if pull.number < last or (pull.number == last and reply is None):
                late = f"pull {pull.number} of rank {rank} refused: the rank is past it"
                raise StaleError(late)
            if pull.number > last or reply is None or again:
                reply = self._deliver(rank, deliver, 0.0, ())
                self._pulls[rank] = pull.number, reply
            return reply

    def _wait_for_ranks(self, rank: int, what: str) -> None:
        """
        Wait until all ranks have pulled, where steps do not wait for late ranks.

        A rank that started later would join at the others' step and miss earlier evaluations.
        """
        ledger = self.store.ledger
        if not ledger.drops_late:
            return

        def missing() -> list[int]:
            return [rank for rank in range(ledger.world) if rank not in self._pulled]

        self._pulled.add(rank)
        self._changed.notify_all()
        limit = self._limits.start_s, "start_timeout_s"
        self._wait(lambda: not missing(), what, missing, *limit)

    def push(self, push: PushId, gradient: Any, control: Any, deliver: Deliver) -> ServerReply:
        """
        Stage a worker's gradient; return when its step is applied or waits for `commit`.

        Args:
            push: identity of the push.
            gradient: see the store.
            control: of the push, see the store.
            deliver: see `pull`.

        Raises:
            ProtocolError: the push must not be applied.
            DeadlineExceeded: ranks did not push in time; names them.
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
                return self._reply_once(push, lambda: self._deliver(rank, deliver, waited, head))
            # Even if another rank has committed by now, this rank needs the norm of this server.
            norm = store.squared_norm
            return ServerReply(ledger.updates, False, norm, waiting_s=waited, total=head)

    def commit(self, rank: int, seq: int, norm: float | None, deliver: Deliver) -> ServerReply:
        """
        Apply a staged step once; repeated calls return the same result.

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
            return self._deliver(rank, deliver, 0.0, self.store.head(None))

    def exclusively(self, action: Callable[[], Result]) -> Result:
        """Run an action with the lock held, then wake all waiting threads."""
        with self._changed:
            try:
                return action()
            finally:
                self._changed.notify_all()

    def renew(self, attempt: int, world: int | None = None) -> bool:
        """
        Start a later attempt; return False if it has already started. The lock is held.

        Calls of the earlier attempt that wait for a lost rank fail.

        Args:
            attempt: number of the attempt.
            world: number of ranks; None: unchanged.
        """
        later = attempt > self.store.ledger.attempt
        if later:
            self._pulls.clear()
            self._pulled.clear()
            self._changed.notify_all()
            self.store.renew(attempt, world)
            self._opened_at = self.store.ledger.steps
        return later

    def check_attempt(self, attempt: int, what: str) -> None:
        """
        Check that a call is of the current attempt; the lock is held.

        Raises:
            FencedError: it is of another attempt.
        """
        if attempt != self.store.ledger.attempt:
            raise FencedError(f"{what} of attempt {attempt} refused by {self._name}")

    def forget_push_reply(self, rank: int) -> None:
        """Drop the reply to a rank's last push: the worker has new vectors, so deliver again."""
        self._pushes.pop(rank, None)

    def _apply(self, seq: int, norm: float | None, began: float) -> None:
        """Apply the staged gradient, here and on the backup."""
        if self.store.commit(seq, norm):
            apply_s = time.perf_counter() - began
            for rank, queued in self._queued.items():
                self._loads[rank] = apply_s, max(0.0, began - queued.arrived_at), queued.depth
            self._queued.clear()
        self._confirm()

    def _deliver(
        self, rank: int, deliver: Deliver, waited: float, head: tuple[float, ...]
    ) -> ServerReply:
        """Deliver the current values and build the reply; the condition is held."""
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
        """Wait until the backup, if there is one, has applied the last change."""
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
        is_settled = lambda: backup_link is None or backup_link.settled  # noqa: E731
        if not wait_awake(self._changed, is_settled, limit):
            late = (f"the backup of {self._name}",)
            raise DeadlineExceeded("the first copy", late, limit, "failure.start_timeout_s")

    def _check_not_fenced(self) -> None:
        if self._fenced_by is not None:
            raise FencedError(f"{self._name} no longer serves: {self._fenced_by}")

    def _reply_once(self, push: PushId, build_reply: Callable[[], ServerReply]) -> ServerReply:
        """Return the reply to a push, built once: a repeated push must not deliver again."""
        if push.rank not in self._pushes or self._pushes[push.rank][0] < push.seq:
            self._pushes[push.rank] = push.seq, build_reply()
        return self._pushes[push.rank][1]

    def _drop_pull_reply(self, rank: int) -> None:
        """Release the reply to a rank's last pull: a push proves that the worker received it."""
        if rank in self._pulls:
            self._pulls[rank] = self._pulls[rank][0], None

    def _patience(self, step: int) -> tuple[float, str]:
        """Return a step's deadline and its setting; the first may take as long as the start."""
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
        """Wait on the condition, which is held; return the seconds waited."""
        began = time.monotonic()
        ledger = self.store.ledger
        attempt = ledger.attempt

        def is_over() -> bool:
            finished = ledger.finished_ranks
            gone = bool(finished) and bool(finished.intersection(missing()))
            return gone or self._fenced_by is not None or ledger.attempt != attempt

        in_time = wait_awake(self._changed, lambda: is_over() or arrived(), limit_s)
        self._check_not_fenced()
        if ledger.attempt != attempt:
            raise FencedError(f"{what}: attempt {attempt} is over")
        gone = sorted(ledger.finished_ranks.intersection(missing()))
        if gone and not arrived():
            names = ", ".join(self.store.worker(rank) for rank in gone)
            cause = f"the train function of {names} is over, after fewer backwards than others'"
            raise MismatchError(self._name, "push", ledger.updates, tuple(gone), cause)
        if not in_time:
            late = tuple(self.store.worker(rank) for rank in missing())
            raise DeadlineExceeded(what, late, limit_s, f"failure.{setting}")
        return time.monotonic() - began


class ShardServer(Server[DenseStore]):
    """
    Serves a parameter shard.

    Args:
        name: of the server node, for messages.
        plan: the shard's plan.
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
        Restore the store and start serving; a second call does nothing.

        Args:
            version: number of completed steps.
            fill: writes the parameters into a tensor.
            state: optimizer state; None: a fresh optimizer.
        """
        with self._changed:
            if not self.store.opened:
                fill(self.params)
                self.store.restore(version, state)
                self._opened_at = version
            self._changed.notify_all()
