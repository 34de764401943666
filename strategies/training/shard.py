"""
One parameter-server shard: parameters, optimizer state and the ledger of what was applied.

Plain and synchronous: a server-node actor and the in-memory fake wrap the same class. A shard
waits for nobody; it says what it has, and its owner decides how to wait.
"""

import torch
from torch import Tensor

from distplat.platform.ledger import Ledger, PushId, Verdict
from distplat.platform.shard_map import ShardPlan
from distplat.strategies.algorithms.reduce import clip_factor, squared_norm, sum_in_order
from distplat.strategies.training.optim import make_optimizer, step_optimizer


class ParameterShard:
    """
    A run of the flat parameter vector and all that belongs to it.

    Args:
        plan: the run's facts.
        params: shape [m]; updated in place. Holds nothing of worth until `restore`.
    """

    def __init__(self, plan: ShardPlan, params: Tensor) -> None:
        self._plan, self.params = plan, params
        self._sum = torch.zeros_like(params)
        self._optimizer = make_optimizer(plan.job.optimizer, params, self._sum)
        self._gradients: list[Tensor | None] = [None] * plan.world
        self.ledger = Ledger(plan.run, plan.attempt, plan.world)
        self.squared_norm: float | None = None  #: of the staged sum, once complete and wanted

    @property
    def version(self) -> int:
        """Updates applied."""
        return self.ledger.version or 0

    @property
    def commits_alone(self) -> bool:
        """Whether a complete step may be applied at once: no other shard could lag behind (I3)."""
        return self._plan.shards == 1

    def restore(self, version: int) -> None:
        """Declare `params` to be of this version; from now on the shard takes pushes."""
        self.ledger.restore(version)

    def push(self, push: PushId, gradient: Tensor) -> Verdict:
        """
        Stage a gradient, and the sum of all once they are complete.

        Args:
            push: its identity.
            gradient: shape [m]; must not change until the step is committed.

        Raises:
            ProtocolError: see `Ledger.offer`; nothing is changed.
        """
        if gradient.shape != self.params.shape:
            raise ValueError(f"gradient has shape {gradient.shape}, shard {self.params.shape}")
        verdict = self.ledger.offer(push)
        if verdict is Verdict.NEW:
            self._gradients[push.rank] = gradient
            if self.ledger.complete:
                self._add_up()
        return verdict

    def commit(self, seq: int, norm: float | None) -> None:
        """
        Apply the staged step; a second time does nothing.

        Args:
            seq: the step.
            norm: 2-norm of the gradient over all shards; only looked at where the job clips.

        Raises:
            ProtocolError: see `Ledger.commit`; nothing is changed.
        """
        if not self.ledger.commit(seq):
            return
        limit = self._plan.job.clip_norm
        if limit is not None and norm is not None:
            self._sum.mul_(clip_factor(norm, limit))
        step_optimizer(self._optimizer, self._plan.job, seq, self._plan.total_steps)

    def _add_up(self) -> None:
        """Sum in rank order (I2), and let go of the workers' vectors."""
        sum_in_order([g for g in self._gradients if g is not None], self._sum)
        self._gradients = [None] * self._plan.world
        if self._plan.job.clip_norm is not None:
            self.squared_norm = squared_norm(self._sum)
