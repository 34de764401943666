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

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distplat.platform.errors import GapError, StaleError
from distplat.platform.ledger import Ledger, PushId, Verdict
from distplat.platform.shard_map import ShardPlan
from distplat.platform.vector_layout import Layout, plain_layout
from distplat.strategies.algorithms.reduce import clip_factor, sum_in_order
from distplat.strategies.loop.control import Policy, StepControl
from distplat.strategies.model.optim import FlatOptimizer, rate_of
from distplat.strategies.model.segments import (
    dtype_name,
    scale_in_place,
    squared_norm_of,
    typed_views,
)
from distplat.strategies.training.checkpoint_copies import CheckpointCopies, VectorCopies
from distplat.strategies.training.mirror import Mirror, Update


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
        self._layout = layout_of(plan, params)
        self.optimizer = FlatOptimizer(plan.job.optimizer, params, self._sum, self._layout)
        every, tail = self._layout.segments, self._layout.tail
        self._segments = tuple(one for one in every if one.start < tail)
        self._thawing = [one for one in self._layout.pieces if one.start >= self._layout.tail]
        self._gradients: dict[int, Tensor] = {}  #: rank -> what it has pushed of this step
        self._controls: dict[int, StepControl] = {}  #: rank -> its control record of this step
        self.total = StepControl()  #: of the staged sum, or of the step applied last
        self.seen: NDArray[np.bool_] = np.zeros(self._layout.parameters, np.bool_)
        """By parameter of the model, whether it has had a gradient yet, on any rank."""
        self._present: bytes | None = None  #: of the staged sum: parameters that are updated
        self._scale = 1.0  #: of the staged sum: what it is still to be multiplied by
        backup = plan.consistency.backup_workers
        self.ledger = Ledger(plan.run, plan.attempt, plan.world, backup)
        self.squared_norm: float | None = None  #: of the staged sum, once complete and wanted
        apart = plan.shards > 1 or plan.job.embeddings is not None
        self._before: Tensor | None = params.clone() if apart else None
        self._before_version: int | None = None  #: version of `_before`
        self._keeping = CheckpointCopies[VectorCopies](plan.checkpoint_every, plan.total_steps)

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
        self.optimizer.load(state or {})
        self.ledger.restore(version)
        self._before_version = None

    def renew(self, attempt: int, world: int | None = None) -> None:
        """See `Ledger.renew`."""
        self.ledger.renew(attempt, world)
        self._forget_pushes()

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

    def kept(self, version: int) -> VectorCopies | None:
        """Hand over the copies for a checkpoint; None: they are not there, or not any more."""
        return self._keeping.give(version)

    def push(
        self,
        push: PushId,
        gradient: Tensor,
        control: StepControl | None = None,
    ) -> Verdict:
        """
        Stage a gradient, and the sum of all once they are complete.

        Args:
            push: its identity.
            gradient: shape [m]; must not change until the step is committed.
            control: the rank's control record; None: it has a gradient of every parameter.

        Raises:
            ProtocolError: see `Ledger.offer`; nothing is changed.
        """
        if gradient.shape != self.params.shape:
            raise ValueError(f"gradient has shape {gradient.shape}, shard {self.params.shape}")
        verdict = self.ledger.offer(push)
        if verdict is Verdict.NEW:
            self._keep_present()
            self._gradients[push.rank] = gradient
            self._controls[push.rank] = control or everything(self._layout)
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
        limit, scale = self._plan.job.clip_norm, self._scale
        if limit is not None and norm is not None:
            scale *= clip_factor(norm, limit)
        scale_in_place(self._typed(self._sum), scale)
        if self.mirror is not None:
            self.mirror.send(Update(seq, present=self._present), self._sum)
        self._update(seq, self._present)
        return True

    def follow(self, update: Update, gradient: Tensor) -> None:
        """See `Mirrored`; `gradient` is summed and clipped, shape [m]."""
        self._keep_present()
        self._look_for_thawed(update.present)
        self._sum.copy_(gradient)
        self.ledger.restore(update.version + 1)
        self._update(update.version, update.present)

    def _update(self, step: int, present: bytes | None) -> None:
        """Make the update, and copy what a checkpoint of the version after it will want."""
        plan = self._plan
        self.optimizer.step(rate_of(plan.job, step, plan.total_steps), from_flags(present))
        self._keeping.reached(step + 1, self._copy)

    def _copy(self) -> VectorCopies:
        return VectorCopies.of(self.params, self.optimizer.state())

    def _typed(self, vector: Tensor) -> list[Tensor]:
        return typed_views(vector, self._segments)

    def _look_for_thawed(self, flags: bytes | None) -> None:
        """Have the tail take part once one of its parameters does."""
        if flags is None:
            return
        self.seen = self.seen | np.frombuffer(flags, np.bool_)
        if any(flags[piece.slot] for piece in self._thawing):
            self._segments, self._thawing = self._layout.segments, []

    def _forget_pushes(self) -> None:
        self._gradients.clear()
        self._controls.clear()

    def _keep_present(self) -> None:
        """Every shard has the present version, or nobody could push a gradient made with it."""
        if self._before is not None and self._before_version != self.version:
            self._before.copy_(self.params)
            self._before_version = self.version

    def _add_up(self) -> None:
        """Sum in rank order (I2), and let go of the workers' vectors."""
        ranks = sorted(self._gradients)
        self.total = StepControl.total([self._controls[rank].pack() for rank in ranks])
        self._present = flags_of(self.total, self._plan.job.failure.non_finite)
        self._look_for_thawed(self.total.present.tobytes())
        world, backup = self.ledger.world, self._plan.consistency.backup_workers
        # With backup workers still a mean, over the samples that are there.
        self._scale = self.total.scale * (world / (world - backup) if backup else 1.0)
        parts = [self._typed(self._gradients[rank]) for rank in ranks]
        for terms, out in zip(zip(*parts, strict=True), self._typed(self._sum), strict=True):
            sum_in_order(terms, out)
        self._forget_pushes()
        if self._plan.job.clip_norm is not None:
            square = squared_norm_of(self._sum, self._segments, self._plan.uncounted)
            self.squared_norm = square * self._scale**2


def layout_of(plan: ShardPlan, params: Tensor) -> Layout:
    """Give what lies where in a shard; a plan without it has a single parameter."""
    return plan.layout or plain_layout(params.numel(), dtype_name(params))


def everything(layout: Layout) -> StepControl:
    """Give the record of a rank that has a gradient of every parameter."""
    return StepControl(1.0, 1.0, present=np.ones(layout.parameters, np.bool_))


def flags_of(total: StepControl, policy: Policy) -> bytes:
    """
    Say which parameters an update moves: of a step that is left out, none.

    Args:
        total: the control record of the step.
        policy: `failure.non_finite` of the job.

    Returns:
        A byte for each parameter.
    """
    applied = total.finite or policy == "ignore"
    return (total.present if applied else np.zeros_like(total.present)).tobytes()


def from_flags(flags: bytes | None) -> NDArray[np.bool_] | None:
    """Unpack what `as_flags` gave."""
    return None if flags is None else np.frombuffer(flags, np.bool_)
