"""
An asynchronous shard at work: apply, give the newest. Nobody is waited for.

    push ─▶ ledger ─ new ─▶ apply ─┬─▶ pull ─▶ answer, kept until the next
               ├──── late ─────────┘
               └──── repeat ─────────────────▶ the same answer

The values are copied under the lock and while their worker stands in the call, so that it never
computes on a vector that is half of one version and half of another.
"""

import time
from collections import defaultdict

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from distplat.platform.ledger import Answer, PushId, Verdict
from distplat.platform.shard_map import ShardPlan
from distplat.strategies.loop.control import StepControl
from distplat.strategies.training.async_shard import AsyncShard
from distplat.strategies.training.service import Deliver, Limits, Service


class AsyncService(Service):
    """See `Service`."""

    def __init__(self, name: str, plan: ShardPlan, limits: Limits, params: Tensor) -> None:
        self.shard = AsyncShard(plan, params)
        super().__init__(name, plan, limits, self.shard)
        self._totals: dict[int, tuple[float, ...]] = {}  #: rank -> head of its push's record
        self._loads = defaultdict[int, tuple[tuple[float, int], float]](lambda: ((0.0, 0), 0.0))

    def push(
        self, push: PushId, gradient: Tensor, control: StepControl, deliver: Deliver
    ) -> Answer:
        """See `Service`; returns when it is applied, or dropped."""
        rank = push.rank
        with self._door.visit() as visit, self._changed:
            self._check_in_office()
            began = time.perf_counter()
            self._totals[rank] = control.head  # decided by itself
            if self.shard.push(push, gradient, control) is Verdict.NEW:
                self._applied_since(began)
                self._visits[rank] = visit
                self._loads[rank] = self._queue(rank), self._apply_s
            visit.leave()
            self._confirm()
            self._went_on(rank)
            self._changed.notify_all()
            return self._once(push, lambda: self._take(rank, deliver, 0.0))

    def log(self) -> NDArray[np.int64] | None:
        """See `Service`."""
        with self._changed:
            return self.shard.log.numbers()

    def _take(self, rank: int, deliver: Deliver, waited: float) -> Answer:
        version = self.shard.pull(rank)
        staleness = self.shard.staleness[rank]
        payload = deliver(self.params, version)
        (queue_s, queue_depth), apply_s = self._loads[rank]
        return Answer(
            version,
            staleness=staleness,
            waiting_s=waited,
            apply_s=apply_s,
            queue_s=queue_s,
            queue_depth=queue_depth,
            dropped=self.shard.ledger.dropped.get(rank, 0),
            done=self.shard.steps,
            total=self._totals.pop(rank, ()),
            payload=payload,
        )
