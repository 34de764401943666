"""
An asynchronous shard at work: apply, wait for the slowest where there is a bound, give the newest.

    push ─▶ ledger ─ new ─▶ apply ─▶ too far ahead? ─ wait ─▶ pull ─▶ answer, kept until the next
               └──── repeat ───────────────┴──────────────────────────▶ the same answer

The values are copied under the lock and while their worker stands in the call, so that it never
computes on a vector that is half of one version and half of another.
"""

import time
from collections import defaultdict

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from distplat.platform.ledger import Answer, PushId, TaskLedger, Verdict
from distplat.platform.shard_map import ShardPlan
from distplat.strategies.training.async_shard import AsyncShard
from distplat.strategies.training.service import Deliver, Limits, Service


class AsyncService(Service):
    """See `Service`."""

    def __init__(self, name: str, plan: ShardPlan, limits: Limits, params: Tensor) -> None:
        self.shard = AsyncShard(plan, params)
        super().__init__(name, plan, limits, self.shard)
        self._loads = defaultdict[int, tuple[tuple[float, int], float]](lambda: ((0.0, 0), 0.0))

    def push(self, push: PushId, gradient: Tensor, deliver: Deliver) -> Answer:
        """See `Service`; returns when the worker is not too far ahead of the others."""
        rank = push.rank
        with self._door.visit() as visit, self._changed:
            self._check_in_office()
            began = time.perf_counter()
            if self.shard.push(push, gradient) is Verdict.NEW:
                self._applied_since(began)
                self._visits[rank] = visit
                self._loads[rank] = self._queue(rank), self._apply_s
            visit.leave()  # what it waits for now are the others' steps
            self._confirm()
            self._went_on(rank)
            self._changed.notify_all()
            waited = self._wait(
                lambda: self._answered(push) or not self._waits_for(rank),
                f"push {push.seq} to {self._name}",
                lambda: self._waits_for(rank),
                self._limits.step_s,
                "step_timeout_s",
            )
            return self._once(push, lambda: self._take(rank, deliver, waited))

    def wait_for_all(self, limit_s: float) -> list[int]:
        """See `Service`."""
        steps, clocks = self._plan.total_steps, self.shard.clocks
        with self._changed:
            self._changed.wait_for(lambda: not clocks.unfinished(steps), limit_s)
            return list(clocks.done)

    def log(self) -> NDArray[np.int64] | None:
        """See `Service`."""
        with self._changed:
            return self.shard.log.numbers()

    def _waits_for(self, rank: int) -> list[int]:
        """Give the ranks that hold this one up; where tasks are leased, leases keep the bound."""
        return [] if self._plan.consistency.dealt else self.shard.clocks.waits_for(rank)

    def _take(self, rank: int, deliver: Deliver, waited: float) -> Answer:
        version = self.shard.pull(rank)
        staleness = self.shard.staleness[rank]
        payload = deliver(self.params, version)
        ledger, dropped = self.shard.ledger, 0
        if isinstance(ledger, TaskLedger):
            done, dropped = self.shard.steps, ledger.dropped.get(rank, 0)
        else:
            done = self.shard.clocks.done[rank]
        (queue_s, queue_depth), apply_s = self._loads[rank]
        return Answer(
            version,
            staleness=staleness,
            waiting_s=waited,
            apply_s=apply_s,
            queue_s=queue_s,
            queue_depth=queue_depth,
            dropped=dropped,
            done=done,
            payload=payload,
        )
