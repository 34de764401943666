"""
One parameter-server shard: parameters, optimizer state and the ledger of what was applied.

Plain and synchronous: a shard waits for nobody. It says what it has; its owner decides how to wait.

Of several shards each commits by itself, so for a moment one may be a version ahead of another, or
of the embedding tables beside it. It keeps the version before until the first push of the next step
proves that all are past it:

    shard 0   version 4   | commit: 5, keeps 4      | a push for 5: lets 4 go, keeps 5 ...
    shard 1   version 4              | commit: 5, keeps 4    |
                                     ^ both have 4 until here, both have 5 from here on

So there is always a version that every shard can give, whoever dies at whatever moment (I3).
"""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from distplat.platform.errors import GapError, StaleError
from distplat.platform.ledger import Ledger, PushId, Verdict
from distplat.platform.shard_map import ShardPlan
from distplat.strategies.algorithms.reduce import clip_factor, squared_norm_but, sum_in_order
from distplat.strategies.training.keeping import Keeping, Kept
from distplat.strategies.training.mirror import Mirror, Update
from distplat.strategies.training.optim import (
    load_state,
    make_optimizer,
    state_of,
    step_optimizer,
)


class ParameterShard:
    """
    A run of the flat parameter vector and all that belongs to it.

    Args:
        plan: the run's facts.
        params: shape [m]; updated in place. Holds nothing of worth until `restore`.
    """

    vectors: ClassVar[Sequence[str]] = ("params", "_before")
    books: ClassVar[Sequence[str]] = ("ledger", "_before_version")

    def __init__(self, plan: ShardPlan, params: Tensor) -> None:
        self._plan, self.params = plan, params
        self.mirror: Mirror | None = None  #: the way to a backup
        self._sum = torch.zeros_like(params)
        self.optimizer = make_optimizer(plan.job.optimizer, params, self._sum)
        self._gradients: dict[int, Tensor] = {}  #: rank -> what it has pushed of this step
        backup = plan.consistency.backup_workers
        self.ledger = Ledger(plan.run, plan.attempt, plan.world, backup)
        self.squared_norm: float | None = None  #: of the staged sum, once complete and wanted
        apart = plan.shards > 1 or plan.job.embeddings is not None
        self._before: Tensor | None = params.clone() if apart else None
        self._before_version: int | None = None  #: version of `_before`
        self._keeping = Keeping(plan.checkpoint_every, plan.total_steps)

    @property
    def version(self) -> int:
        """Updates applied."""
        return self.ledger.version or 0

    @property
    def steps(self) -> int:
        """Steps that every rank has made here."""
        return self.version

    @property
    def commits_alone(self) -> bool:
        """Whether a complete step may be applied at once: nothing of other shards is needed."""
        return self._plan.shards == 1 or self._plan.job.clip_norm is None

    def restore(self, version: int, state: Mapping[str, Tensor] | None = None) -> None:
        """
        Declare `params` to be of this version; from now on the shard takes pushes.

        Args:
            version: steps that they have behind them.
            state: what the optimizer remembers of them; None: nothing.
        """
        load_state(self.optimizer, state or {})
        self.ledger.restore(version)
        self._before_version = None

    def renew(self, attempt: int, world: int | None = None) -> None:
        """See `Ledger.renew`."""
        self.ledger.renew(attempt, world)
        self._gradients.clear()

    def values(self, version: int) -> Tensor:
        """
        Give the parameters of a version, shape [m]: the present one, or the one before.

        Raises:
            StaleError, GapError: it is not here any more, or not yet.
        """
        if version == self.version:
            return self.params
        if version == self._before_version and self._before is not None:
            return self._before
        kind = GapError if version > self.version else StaleError
        raise kind(f"version {version} is not here: the shard is at {self.version}")

    def kept(self, version: int) -> Kept | None:
        """Hand over the copies for a checkpoint; None: they are not there, or not any more."""
        return self._keeping.give(version)

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
            self._keep_present()
            self._gradients[push.rank] = gradient
            if self.ledger.complete:
                self._add_up()
        return verdict

    def commit(self, seq: int, norm: float | None) -> bool:
        """
        Apply the staged step; False: it was applied before, nothing is done.

        Args:
            seq: the step.
            norm: 2-norm of the gradient over all shards; only looked at where the job clips.

        Raises:
            ProtocolError: see `Ledger.commit`; nothing is changed.
        """
        if not self.ledger.commit(seq):
            return False
        limit = self._plan.job.clip_norm
        if limit is not None and norm is not None:
            self._sum.mul_(clip_factor(norm, limit))
        if self.mirror is not None:
            self.mirror.send(Update(seq), self._sum)
        step_optimizer(self.optimizer, self._plan.job, seq, self._plan.total_steps)
        self._keep(seq + 1)
        return True

    def follow(self, update: Update, gradient: Tensor) -> None:
        """See `Mirrored`; `gradient` is summed and clipped, shape [m]."""
        self._keep_present()
        self._sum.copy_(gradient)
        self.ledger.restore(update.version + 1)
        step_optimizer(self.optimizer, self._plan.job, update.version, self._plan.total_steps)
        self._keep(update.version + 1)

    def _keep(self, version: int) -> None:
        """Copy what a checkpoint of this version will want; a backup does, for it may be asked."""
        self._keeping.reached(version, lambda: {"": self.params, **state_of(self.optimizer)})

    def _keep_present(self) -> None:
        """Every shard has the present version, or nobody could push a gradient made with it."""
        if self._before is not None and self._before_version != self.version:
            self._before.copy_(self.params)
            self._before_version = self.version

    def _add_up(self) -> None:
        """Sum in rank order (I2), and let go of the workers' vectors."""
        world, backup = self.ledger.world, self._plan.consistency.backup_workers
        sum_in_order([self._gradients[rank] for rank in sorted(self._gradients)], self._sum)
        if backup:  # still a mean, over the samples that are there
            self._sum.mul_(world / (world - backup))
        self._gradients.clear()
        if self._plan.job.clip_norm is not None:
            self.squared_norm = squared_norm_but(self._sum, self._plan.uncounted)
