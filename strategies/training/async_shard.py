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
from distplat.platform.clocks import Clocks
from distplat.platform.ledger import AsyncLedger, PushId, TaskLedger, Verdict
from distplat.platform.shard_map import ShardPlan
from distplat.strategies.training.keeping import Keeping, Kept
from distplat.strategies.training.mirror import Mirror, Update
from distplat.strategies.training.optim import (
    load_state,
    make_optimizer,
    state_of,
    step_optimizer,
)


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
        "clocks",
        "log",
        "pulled",
        "staleness",
        "_kept_up_to",
    )

    def __init__(self, plan: ShardPlan, params: Tensor) -> None:
        self._plan, self.params = plan, params
        self.mirror: Mirror | None = None  #: the way to a backup
        self._pulls: list[int] = []  #: ranks that took the present version: the backup is to know
        self.optimizer = make_optimizer(plan.job.optimizer, params, torch.zeros_like(params))
        self._parameter = self.optimizer.param_groups[0]["params"][0]
        how = plan.consistency
        self._lambda, self._scale_rate = how.delay_compensation, how.staleness_lr
        self.ledger: AsyncLedger | TaskLedger = AsyncLedger(plan.run, plan.attempt, plan.world)
        if how.dealt:
            self.ledger = TaskLedger(plan.run, plan.attempt)
        self.clocks = Clocks(plan.world, how.bound)
        self.log = ApplyLog()
        self.pulled = [0] * plan.world  #: by rank: version that it computes on
        self.staleness = [0] * plan.world  #: by rank: of its last gradient
        self._keeping = Keeping(plan.checkpoint_every, plan.total_steps)
        self._kept_up_to = 0  #: steps that `_keeping` was told of
        kept = plan.world if self._lambda else 0
        self._values = [torch.zeros_like(params) for _ in range(kept)]  #: by rank: what it pulled

    @property
    def version(self) -> int:
        """Updates applied."""
        return self.ledger.version or 0

    @property
    def steps(self) -> int:
        """Steps that every rank has made here, or whose every task is."""
        if isinstance(self.ledger, TaskLedger):
            return self.ledger.made.low // self._plan.world
        return min(self.clocks.done)

    def restore(self, version: int, state: Mapping[str, Tensor] | None = None) -> None:
        """
        Declare `params` to have so many steps of every rank behind them; pushes are taken now.

        Args:
            version: steps; each rank's next push has this number.
            state: what the optimizer remembers of them; None: nothing.
        """
        world = self._plan.world
        load_state(self.optimizer, state or {})
        dealt = isinstance(self.ledger, TaskLedger)
        self.ledger.restore(version * world, version * world if dealt else version)
        self.clocks.done = [version] * world
        self._kept_up_to = version
        self.pulled = [version * world] * world

    def kept(self, version: int) -> Kept | None:
        """
        Hand over the copies for a checkpoint; None: they are not there.

        They were made when the slowest rank's gradient of step `version - 1` was applied; of
        faster ranks there are later gradients in them, too.
        """
        return self._keeping.give(version)

    def renew(self, attempt: int, world: int | None = None) -> None:
        """See `AsyncLedger.renew`."""
        self.ledger.renew(attempt, world)

    def pull(self, rank: int) -> int:
        """Note that a worker takes the present `params`; give their version."""
        self._make_room(rank)
        self.pulled[rank] = self.version
        self._pulls.append(rank)
        if self._values:
            self._values[rank].copy_(self.params)
        return self.version

    def push(self, push: PushId, gradient: Tensor) -> Verdict:
        """
        Apply a worker's gradient; a second time does nothing.

        Args:
            push: its identity.
            gradient: shape [m], of the mean loss over the worker's own samples.

        Raises:
            ProtocolError: see `AsyncLedger.offer`; nothing is changed.
        """
        if gradient.shape != self.params.shape:
            raise ValueError(f"gradient has shape {gradient.shape}, shard {self.params.shape}")
        before = self.version
        verdict = self.ledger.offer(push)
        self._make_room(push.rank)
        if verdict is Verdict.NEW:
            pulled = self.pulled[push.rank]
            gradient = self._compensated(push.rank, before - pulled, gradient)
            if self.mirror is not None:
                told = Update(before, push, tuple(self._pulls), pulled)
                self.mirror.send(told, gradient)
            self._pulls.clear()
            self._apply(push, before, gradient)
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
        self._apply(push, update.version, gradient)

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
        drift = self.params - self._values[rank]
        return torch.addcmul(gradient, gradient * gradient, drift, value=self._lambda)

    def _apply(self, push: PushId, version: int, gradient: Tensor) -> None:
        rank, pulled = push.rank, self.pulled[push.rank]
        self.staleness[rank] = version - pulled
        task = push.seq * self._plan.world + rank if push.task is None else push.task
        self.log.add(Applied(rank, task, pulled))
        scale = 1.0 / max(1, self.staleness[rank]) if self._scale_rate else 1.0
        self._parameter.grad = gradient  # the worker's own vector: optimizers only read it
        place = version // self._plan.world  # one step of the schedule: an update of each worker
        step_optimizer(self.optimizer, self._plan.job, place, self._plan.total_steps, scale=scale)
        if push.task is None:
            self.clocks.tick(rank)
        for steps in range(self._kept_up_to + 1, self.steps + 1):  # more than one, after a wait
            self._keeping.reached(steps, lambda: {"": self.params, **state_of(self.optimizer)})
        self._kept_up_to = self.steps
