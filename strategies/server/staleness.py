"""
Staleness of gradients on an asynchronous shard, and its compensation.

    version      7           8           9           10
    worker-0     pull ------------------------ push
    worker-1            push        push                    staleness of worker-0's push: 9 - 7 = 2

Two corrections for stale gradients, both off by default. The learning rate is divided by
max(1, staleness) (Zhang et al., IJCAI 2016). And the gradient g, computed at w_pulled, is corrected
towards the current parameters w_now (DC-ASGD, Zheng et al., ICML 2017), with the diagonal of g g^T
as an approximation of the Hessian:

    g + lambda * g * g * (w_now - w_pulled)
"""

import torch
from torch import Tensor

from distplat.platform.apply_log import Applied, ApplyLog
from distplat.platform.ledger import PushId
from distplat.platform.shard_map import ShardPlan
from distplat.platform.vector_layout import Segment
from distplat.strategies.model.parameter_layout import typed_views
from distplat.strategies.server.store import Update


class Staleness:
    """
    Versions that the ranks compute on, and the log of updates.

    Args:
        plan: the shard's plan.
        params: of the shard, shape [m]; only its shape and dtype are used.
        segments: of `params`.
    """

    def __init__(self, plan: ShardPlan, params: Tensor, segments: tuple[Segment, ...]) -> None:
        consistency = plan.consistency
        self._lambda, self._scales_lr = consistency.delay_compensation, consistency.staleness_lr
        self._segments = segments
        self.log = ApplyLog()
        self.pulled = [0] * plan.world  #: by rank: version that it computes on
        self.of = [0] * plan.world  #: by rank: staleness of its last gradient
        self._pulls: list[int] = []  #: ranks that pulled the current version, for the backup
        copies = plan.world if self._lambda else 0
        self.values = [torch.zeros_like(params) for _ in range(copies)]  #: by rank: pulled values

    def restore(self, version: int) -> None:
        """Set the version that all ranks compute on."""
        self.pulled = [version] * len(self.pulled)

    def pull(self, rank: int, version: int, params: Tensor) -> None:
        """Record that a worker pulls the current parameters."""
        self.ensure_rank(rank, version, params)
        self.pulled[rank] = version
        self._pulls.append(rank)
        if self.values:
            self.values[rank].copy_(params)

    def record_pull(self, rank: int, version: int, values: Tensor) -> None:
        """
        Record a worker's pull from a lost primary, unless the primary had replicated it.

        The parameters may have been updated since, so the values come from the worker.

        Args:
            rank: the worker; `ensure_rank` was called for it.
            version: of its values.
            values: shape [m].
        """
        if version > self.pulled[rank]:
            self.pulled[rank] = version
            if self.values:
                self.values[rank].copy_(values)

    def ensure_rank(self, rank: int, version: int, params: Tensor) -> None:
        """Add entries up to a rank that joined during the run."""
        while rank >= len(self.pulled):
            self.pulled.append(version)
            self.of.append(0)
            if self._lambda:
                self.values.append(params.clone())

    def compensated(self, rank: int, version: int, gradient: Tensor, params: Tensor) -> Tensor:
        """Return a gradient corrected for its delay; `gradient` itself is unchanged."""
        if not self._lambda or version == self.pulled[rank]:
            return gradient
        corrected = torch.empty_like(gradient)
        vectors = (gradient, params, self.values[rank], corrected)
        views = (typed_views(vector, self._segments) for vector in vectors)
        for grad, now, then, out in zip(*views, strict=True):
            torch.addcmul(grad, grad * grad, now - then, value=self._lambda, out=out)
        return corrected

    def update(self, push: PushId, version: int, present: bytes, applied: bool) -> Update:
        """Return the update of a rank's push, with the pulls since the last update."""
        pulls, self._pulls = tuple(self._pulls), []
        return Update(version, push, pulls, self.pulled[push.rank], present, applied=applied)

    def follow(self, update: Update, rank: int, params: Tensor) -> None:
        """Record an update on the backup; `params` are those before the update."""
        for puller in update.pulls:
            self.pull(puller, update.version, params)
        self._pulls.clear()
        self.ensure_rank(rank, update.version, params)
        self.pulled[rank] = update.pulled

    def applied(self, update: Update) -> float:
        """Record an update that is being applied; return the factor for its learning rate."""
        push = update.push
        assert push is not None, "an asynchronous update comes from one push"
        staleness = self.of[push.rank] = update.version - update.pulled
        if push.task is not None:  # pushes of a train function have no task and are not replayed
            self.log.add(Applied(push.rank, push.task, update.pulled))
        return 1.0 / max(1, staleness) if self._scales_lr else 1.0
