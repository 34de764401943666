"""A synchronous shard at work: the thread that brings a step's last gradient applies them all."""

import time

from torch import Tensor

from distplat.platform.ledger import Answer, PushId, Verdict
from distplat.platform.shard_map import ShardPlan
from distplat.strategies.loop.control import StepControl
from distplat.strategies.training.service import Deliver, Limits, Service
from distplat.strategies.training.shard import ParameterShard


class SyncService(Service):
    """See `Service`."""

    def __init__(self, name: str, plan: ShardPlan, limits: Limits, params: Tensor) -> None:
        self.shard = ParameterShard(plan, params)
        super().__init__(name, plan, limits, self.shard)

    def push(
        self, push: PushId, gradient: Tensor, control: StepControl, deliver: Deliver
    ) -> Answer:
        """See `Service`; returns when the step is made, with this gradient or without it."""
        shard = self.shard
        with self._door.visit() as visit, self._changed:
            self._check_in_office()
            began = time.perf_counter()
            if shard.push(push, gradient, control) is Verdict.NEW:
                self._visits[push.rank] = visit
            self._went_on(push.rank)
            if shard.ledger.complete:
                if shard.commits_alone:
                    norm = shard.squared_norm
                    if shard.commit(push.seq, None if norm is None else norm**0.5):
                        self._applied_since(began)
                    self._confirm()
                self._changed.notify_all()
            waited = self._wait(
                lambda: shard.version > push.seq or shard.ledger.complete,
                f"push {push.seq} to {self._name}",
                shard.ledger.missing,
                *self._patience(push.seq),
            )
            if shard.commits_alone:
                return self._once(push, lambda: self._take(push.rank, deliver, waited))
            # Another rank may have committed by now: this one still wants the norm of all shards.
            norm = shard.squared_norm
            return Answer(shard.version, False, norm, waiting_s=waited, total=shard.total.head)

    def commit(self, rank: int, seq: int, norm: float | None, deliver: Deliver) -> Answer:
        """See `Service`."""
        with self._changed:
            self._check_in_office()
            began = time.perf_counter()
            if self.shard.commit(seq, norm):
                self._applied_since(began)
            self._confirm()
            self._changed.notify_all()
            return self._take(rank, deliver, 0.0)

    def _take(self, rank: int, deliver: Deliver, waited: float) -> Answer:
        version, dropped = self.shard.version, self.shard.ledger.dropped[rank]
        queue_s, queue_depth = self._queue(rank)
        payload = deliver(self.params, version)
        return Answer(
            version,
            waiting_s=waited,
            apply_s=self._apply_s,
            queue_s=queue_s,
            queue_depth=queue_depth,
            dropped=dropped,
            done=version,
            total=self.shard.total.head,
            payload=payload,
        )
