"""
One shard of an asynchronous parameter server: each gradient is an update of its own.

    version      7           8           9           10
    worker-0     pull ------------------------ push
    worker-1            push        push                    staleness of worker-0's push: 9 - 7 = 2

Two corrections for old gradients, both off by default. With staleness t the learning rate is
divided by max(1, t) (Zhang et al., IJCAI 2016). And the gradient g, which was computed at w_pulled,
is moved towards where the parameters are now (DC-ASGD, Zheng et al., ICML 2017), with the diagonal
of g g^T in the place of the Hessian:

    g + lambda * g * g * (w_now - w_pulled)

Plain and synchronous, as `ParameterShard`: it waits for nobody.
"""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from distplat.platform.apply_log import Applied, ApplyLog
from distplat.platform.ledger import PushId, TaskLedger, Verdict
from distplat.platform.shard_map import ShardPlan
from distplat.strategies.loop.control import StepControl
from distplat.strategies.model.optim import FlatOptimizer, rate_of
from distplat.strategies.model.segments import typed_views
from distplat.strategies.training.checkpoint_copies import CheckpointCopies, VectorCopies
from distplat.strategies.training.mirror import Mirror, Update
from distplat.strategies.training.shard import everything, flags_of, from_flags, layout_of


class AsyncShard:
    """
    A run of the flat parameter vector and all that belongs to it.

    Args:
        plan: the run's facts.
        params: shape [m]; updated in place. Holds nothing of worth until `restore`.
    """

    vectors: ClassVar[Sequence[str]] = ("params", "_values")
    books: ClassVar[Sequence[str]] = (
        "ledger",
        "log",
        "pulled",
        "staleness",
        "_kept_up_to",
    )

    def __init__(self, plan: ShardPlan, params: Tensor) -> None:
        self._plan, self.params = plan, params
        self.mirror: Mirror | None = None  #: the way to a backup
        self._pulls: list[int] = []  #: ranks that took the present version: the backup is to know
        self._layout = layout_of(plan, params)
        self.optimizer = FlatOptimizer(plan.job.optimizer, params, params, self._layout)
        how = plan.consistency
        self._lambda, self._scale_rate = how.delay_compensation, how.staleness_lr
        self.ledger = TaskLedger(plan.run, plan.attempt)
        self.log = ApplyLog()
        self.pulled = [0] * plan.world  #: by rank: version that it computes on
        self.staleness = [0] * plan.world  #: by rank: of its last gradient
        self._keeping = CheckpointCopies[VectorCopies](plan.checkpoint_every, plan.total_steps)
        self._kept_up_to = 0  #: steps that `_keeping` was told of
        kept = plan.world if self._lambda else 0
        self._values = [torch.zeros_like(params) for _ in range(kept)]  #: by rank: what it pulled

    @property
    def version(self) -> int:
        """Updates applied."""
        return self.ledger.version or 0

    @property
    def steps(self) -> int:
        """Steps of which every task is made here."""
        return self.ledger.made.low // self._plan.world

    def restore(self, version: int, state: Mapping[str, Tensor] | None = None) -> None:
        """
        Declare `params` to have so many steps behind them; pushes are taken now.

        Args:
            version: steps.
            state: what the optimizer remembers of them; None: nothing.
        """
        updates = version * self._plan.world
        self.optimizer.load(state or {})
        self.ledger.restore(updates, updates)
        self._kept_up_to = version
        self.pulled = [updates] * self._plan.world

    def kept(self, version: int) -> VectorCopies | None:
        """
        Hand over the copies for a checkpoint; None: they are not there.

        They were made when the last task of step `version - 1` was applied; later tasks may be in
        them, too.
        """
        return self._keeping.give(version)

    def renew(self, attempt: int, world: int | None = None) -> None:
        """See `TaskLedger.renew`."""
        self.ledger.renew(attempt, world)

    def pull(self, rank: int) -> int:
        """Note that a worker takes the present `params`; give their version."""
        self._make_room(rank)
        self.pulled[rank] = self.version
        self._pulls.append(rank)
        if self._values:
            self._values[rank].copy_(self.params)
        return self.version

    def push(
        self,
        push: PushId,
        gradient: Tensor,
        control: StepControl | None = None,
    ) -> Verdict:
        """
        Apply a worker's gradient; a second time, or a second one of a task, does nothing.

        Args:
            push: its identity.
            gradient: shape [m], of the mean loss over the worker's own samples.
            control: the push's control record; None: it has a gradient of every parameter.

        Raises:
            ProtocolError: see `TaskLedger.offer`; nothing is changed.
        """
        if gradient.shape != self.params.shape:
            raise ValueError(f"gradient has shape {gradient.shape}, shard {self.params.shape}")
        before = self.version
        verdict = self.ledger.offer(push)
        self._make_room(push.rank)
        if verdict is Verdict.NEW:
            pulled = self.pulled[push.rank]
            gradient = self._compensated(push.rank, before - pulled, gradient)
            record = control or everything(self._layout)
            flags = flags_of(record, self._plan.job.failure.non_finite)
            if self.mirror is not None:
                told = Update(before, push, tuple(self._pulls), pulled, flags)
                self.mirror.send(told, gradient)
            self._pulls.clear()
            self._apply(push, before, gradient, flags)
        return verdict

    def follow(self, update: Update, gradient: Tensor) -> None:
        """See `Mirrored`; `gradient` is corrected already. What was pulled corrects later ones."""
        push = update.push
        assert push is not None, "an asynchronous update is one rank's"
        for rank in update.pulls:
            self.pull(rank)
        self._pulls.clear()
        if push.attempt > self.ledger.attempt:
            self.renew(push.attempt)
        self.ledger.offer(push)
        self._make_room(push.rank)
        self.pulled[push.rank] = update.pulled
        self._apply(push, update.version, gradient, update.present)

    def pulled_elsewhere(self, rank: int, version: int, values: Tensor) -> None:
        """
        Note what a worker computes on, if a lost primary has told nobody of that pull any more.

        Others may have made updates here since, so it is the worker who has the values.

        Args:
            rank: the worker.
            version: of its values.
            values: shape [m].
        """
        self._make_room(rank)
        if version > self.pulled[rank]:
            self.pulled[rank] = version
            if self._values:
                self._values[rank].copy_(values)

    def _make_room(self, rank: int) -> None:
        """Have a place for a rank that joined while the run goes on."""
        while rank >= len(self.pulled):
            self.pulled.append(self.version)
            self.staleness.append(0)
            if self._lambda:
                self._values.append(self.params.clone())

    def _compensated(self, rank: int, staleness: int, gradient: Tensor) -> Tensor:
        if not self._lambda or not staleness:
            return gradient
        corrected = torch.empty_like(gradient)
        vectors = (gradient, self.params, self._values[rank], corrected)
        for own, now, then, out in zip(*(self._typed(one) for one in vectors), strict=True):
            torch.addcmul(own, own * own, now - then, value=self._lambda, out=out)
        return corrected

    def _typed(self, vector: Tensor) -> list[Tensor]:
        return typed_views(vector, self._layout.segments)

    def _apply(self, push: PushId, version: int, gradient: Tensor, flags: bytes | None) -> None:
        rank, pulled = push.rank, self.pulled[push.rank]
        self.staleness[rank] = version - pulled
        assert push.task is not None, "the ledger refuses a push of no task"
        self.log.add(Applied(rank, push.task, pulled))
        scale = 1.0 / max(1, self.staleness[rank]) if self._scale_rate else 1.0
        self.optimizer.use(gradient)  # the worker's own vector: optimizers only read it
        place = version // self._plan.world  # one step of the schedule: an update of each worker
        rate = rate_of(self._plan.job, place, self._plan.total_steps)
        self.optimizer.step(rate * scale, from_flags(flags))
        for steps in range(self._kept_up_to + 1, self.steps + 1):  # more than one, after a wait
            self._keeping.reached(steps, self._copy)
        self._kept_up_to = self.steps

    def _copy(self) -> VectorCopies:
        return VectorCopies.of(self.params, self.optimizer.state())
