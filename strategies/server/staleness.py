"""
How old the gradients of an asynchronous shard are, and what is made of that.

    version      7           8           9           10
    worker-0     pull ------------------------ push
    worker-1            push        push                    staleness of worker-0's push: 9 - 7 = 2

Two corrections for old gradients, both off by default. With staleness t the learning rate is
divided by max(1, t) (Zhang et al., IJCAI 2016). And the gradient g, which was computed at w_pulled,
is moved towards where the parameters are now (DC-ASGD, Zheng et al., ICML 2017), with the diagonal
of g g^T in the place of the Hessian:

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
    Who computes on which version, and the order of updates.

    Args:
        plan: the run's facts.
        params: of the shard, shape [m]; nothing of them is kept.
        segments: of them.
    """

    def __init__(self, plan: ShardPlan, params: Tensor, segments: tuple[Segment, ...]) -> None:
        how = plan.consistency
        self._lambda, self._scales_rate = how.delay_compensation, how.staleness_lr
        self._segments = segments
        self.log = ApplyLog()
        self.pulled = [0] * plan.world  #: by rank: version that it computes on
        self.of = [0] * plan.world  #: by rank: staleness of its last gradient
        self._pulls: list[int] = []  #: ranks that took the present version: the backup is to know
        kept = plan.world if self._lambda else 0
        self.values = [torch.zeros_like(params) for _ in range(kept)]  #: by rank: what it pulled

    def restore(self, version: int) -> None:
        """All ranks compute on this version."""
        self.pulled = [version] * len(self.pulled)

    def pull(self, rank: int, version: int, params: Tensor) -> None:
        """Note that a worker takes the present parameters."""
        self.make_room(rank, version, params)
        self.pulled[rank] = version
        self._pulls.append(rank)
        if self.values:
            self.values[rank].copy_(params)

    def record_pull(self, rank: int, version: int, values: Tensor) -> None:
        """
        Note what a worker computes on, if a lost primary has told nobody of that pull any more.

        Others may have made updates here since, so it is the worker who has the values.

        Args:
            rank: the worker; there is room for it.
            version: of its values.
            values: shape [m].
        """
        if version > self.pulled[rank]:
            self.pulled[rank] = version
            if self.values:
                self.values[rank].copy_(values)

    def make_room(self, rank: int, version: int, params: Tensor) -> None:
        """Have a place for a rank that joined while the run goes on."""
        while rank >= len(self.pulled):
            self.pulled.append(version)
            self.of.append(0)
            if self._lambda:
                self.values.append(params.clone())

    def compensated(self, rank: int, version: int, gradient: Tensor, params: Tensor) -> Tensor:
        """Move a gradient to where the parameters are; it stays as it is, another one is given."""
        if not self._lambda or version == self.pulled[rank]:
            return gradient
        corrected = torch.empty_like(gradient)
        vectors = (gradient, params, self.values[rank], corrected)
        views = (typed_views(one, self._segments) for one in vectors)
        for own, now, then, out in zip(*views, strict=True):
            torch.addcmul(own, own * own, now - then, value=self._lambda, out=out)
        return corrected

    def update(self, push: PushId, version: int, present: bytes) -> Update:
        """Describe a rank's update, with the pulls since the last one."""
        pulls, self._pulls = tuple(self._pulls), []
        applied = b"\1" in present
        return Update(version, push, pulls, self.pulled[push.rank], present, applied=applied)

    def follow(self, update: Update, rank: int, params: Tensor) -> None:
        """As a backup, note what an update says; the parameters are those before it."""
        for puller in update.pulls:
            self.pull(puller, update.version, params)
        self._pulls.clear()
        self.make_room(rank, update.version, params)
        self.pulled[rank] = update.pulled

    def applied(self, update: Update) -> float:
        """Note an update that is being made; give the factor of its learning rate."""
        push = update.push
        assert push is not None, "an update is of one rank's push"
        staleness = self.of[push.rank] = update.version - update.pulled
        if push.task is not None:  # a train function's pushes are of none, and not replayed
            self.log.add(Applied(push.rank, push.task, update.pulled))
        return 1.0 / max(1, staleness) if self._scales_rate else 1.0
