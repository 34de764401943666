"""
One parameter-server shard: parameters, optimizer state and the ledger of what was applied.

Plain: a shard waits for nobody. It says what it has; its server decides how to wait. A synchronous
shard is one whose ledger wants every rank's gradient for an update, which is that of their sum; an
asynchronous one makes an update of each (`staleness.py`).

Of several synchronous shards each commits by itself, so for a moment one may be a version ahead of
another, or of the embedding tables beside it. It keeps the version before until the first push of
the next step proves that all are past it:

    shard 0   version 4   | commit: 5, keeps 4      | a push for 5: lets 4 go, keeps 5 ...
    shard 1   version 4              | commit: 5, keeps 4    |
                                     ^ both have 4 until here, both have 5 from here on

So there is always a version that every shard can give, whoever dies at whatever moment (I3).
"""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from typing_extensions import override

from distplat.platform.errors import GapError, StaleError
from distplat.platform.ledger import Ledger, LoopLedger, PushId, StepLedger, TaskLedger, Verdict
from distplat.platform.plateau import PlateauState
from distplat.platform.shard_map import ShardPlan
from distplat.platform.vector_layout import Layout, plain_layout
from distplat.strategies.algorithms.reduce import clip_factor, sum_in_order
from distplat.strategies.loop.control import NonFinitePolicy, StepControl
from distplat.strategies.model.optim import FlatOptimizer, optimizer_of, rate_of
from distplat.strategies.model.parameter_layout import (
    dtype_name,
    scale_in_place,
    squared_norm_of,
    typed_views,
)
from distplat.strategies.server.staleness import Staleness
from distplat.strategies.server.store import (
    BackupLink,
    Change,
    CheckpointCopies,
    ReplicatedStore,
    ServerStore,
    StoreSnapshot,
    Update,
)

_COPIED = (
    "_ledger",
    "staleness",
    "seen",
    "_before_version",
    "_segments",
    "_unfreezing",
    "settings",
    "skipped",
)


def _ledger_of(plan: ShardPlan) -> Ledger:
    who, consistency = (plan.run, plan.attempt, plan.world), plan.consistency
    if not consistency.asynchronous:
        return StepLedger(*who, consistency.backup_workers)
    return TaskLedger(*who) if plan.own_loop is None else LoopLedger(*who, consistency.bound)


class DenseStore(ServerStore, ReplicatedStore):
    """
    A run of the flat parameter vector and all that belongs to it.

    Args:
        plan: the run's facts.
        params: shape [m]; updated in place. Holds nothing of worth until `restore`.
    """

    def __init__(self, plan: ShardPlan, params: Tensor) -> None:
        self._plan, self.params = plan, params
        self._job = plan.job.with_plateau()  #: with what evaluations make of its rates
        self._plateau = self._job.plateau
        self.backup_link: BackupLink | None = None  #: the way to a backup
        self._layout = layout_of(plan, params)
        every, tail = self._layout.segments, self._layout.tail
        self._segments = tuple(one for one in every if one.start < tail)
        self._unfreezing = [one for one in self._layout.pieces if one.start >= tail]
        self._ledger, own = _ledger_of(plan), plan.own_loop
        asynchronous = plan.consistency.asynchronous
        self.staleness = Staleness(plan, params, every) if asynchronous else None
        #: the parameters are sums of gradients, and nothing is updated
        self._sums = own is not None and own.optimizer is None
        self.settings: tuple[float, ...] = ()
        """What came with the pushes of the staged update, or of the one that was applied last."""
        self.skipped = False
        """Whether the last update moved nothing, because its step was left out."""
        self._gradients: dict[int, Tensor] = {}  #: rank -> what it has pushed of this step
        self._controls: dict[int, StepControl] = {}  #: rank -> its control record of this step
        self._pushed: PushId | None = None  #: asynchronous: whose gradient is staged
        #: of all ranks, or as an asynchronous update takes it, where it is a worker's own vector
        borrows = self._sums or self.staleness is not None
        self._sum = params if borrows else torch.zeros_like(params)
        vectors, ema = (params, self._sum, self._layout), plan.job.ema
        chosen = own.optimizer if own is not None else None
        self.optimizer = optimizer_of(chosen or plan.job.optimizer, *vectors, ema)
        self.total = StepControl()  #: of the staged sum, or of the step applied last
        self.seen: NDArray[np.bool_] = np.zeros(self._layout.parameters, np.bool_)
        """By parameter of the model, whether it has had a gradient yet, on any rank."""
        self._present: bytes | None = None  #: of the staged sum: parameters that are updated
        self._scale = 1.0  #: of the staged sum: what it is still to be multiplied by
        self.squared_norm: float | None = None  #: of the staged sum, once complete and wanted
        apart = plan.shards > 1 or plan.job.embeddings is not None
        self._before = params.clone() if apart and not borrows else None
        self._before_version: int | None = None  #: version of `_before`
        self._copies = CheckpointCopies[dict[str, Tensor]](plan.checkpoint_every, plan.total_steps)

    @property
    @override
    def ledger(self) -> Ledger:
        return self._ledger

    @property
    def version(self) -> int:
        """Updates applied."""
        return self._ledger.updates

    @property
    def steps(self) -> int:
        """Steps that every rank has made here, or of which every task is made."""
        return self._ledger.steps

    @property
    @override
    def opened(self) -> bool:
        return self._ledger.version is not None

    @property
    @override
    def present(self) -> Tensor:
        return self.params

    @property
    @override
    def commits_alone(self) -> bool:
        clips = self._plan.job.clip_norm is not None and self.staleness is None
        return self._plan.shards == 1 or not clips

    @property
    @override
    def inbox(self) -> Tensor:
        return self.params

    def restore(self, version: int, state: Mapping[str, Tensor] | None = None) -> None:
        """
        Declare `params` to be of this version; from now on the shard takes pushes.

        Args:
            version: steps that they have behind them.
            state: what the optimizer remembers of them; None: nothing.
        """
        self.optimizer.load(state or {})
        self._ledger.restore(version)
        self._before_version = None
        if self.staleness is not None:
            self.staleness.restore(self.version)

    @override
    def renew(self, attempt: int, world: int | None = None) -> None:
        self._ledger.renew(attempt, world)
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

    @override
    def take_copies(self, version: int) -> dict[str, Tensor] | None:
        """Those of an asynchronous shard were made when the last task of step
        `version - 1` was applied, and later tasks may be in them, too.
        """
        return self._copies.take(version, self.steps, self._copy)

    @override
    def worker(self, part_rank: int) -> str:
        return self._plan.worker(part_rank)

    @override
    def log(self) -> NDArray[np.int64] | None:
        return None if self.staleness is None else self.staleness.log.numbers()

    @override
    def head(self, control: StepControl | None) -> tuple[float, ...]:
        """An asynchronous push is decided by itself."""
        alone = control is not None and self.staleness is not None
        return control.head if alone and control is not None else self.total.head

    @override
    def staleness_of(self, rank: int) -> int:
        return 0 if self.staleness is None else self.staleness.of[rank]

    @override
    def pull(self, rank: int) -> int:
        if self.staleness is not None:
            self.staleness.pull(rank, self.version, self.params)
        return self.version

    def record_pull(self, rank: int, version: int, values: Tensor) -> None:
        """Note what a worker computes on; a synchronous shard has nothing to note."""
        if self.staleness is not None:
            self.staleness.make_room(rank, self.version, self.params)
            self.staleness.record_pull(rank, version, values)

    def push(self, push: PushId, gradient: Tensor, control: StepControl | None = None) -> Verdict:
        """
        Stage a gradient, and the sum of all once they are complete.

        Args:
            push: its identity.
            gradient: shape [m]; must not change until the step is committed. An asynchronous
                shard's is of the mean loss over the worker's own samples.
            control: the rank's control record; None: it has a gradient of every parameter.

        Raises:
            ProtocolError: see `Ledger.offer`; nothing is changed.
        """
        if gradient.shape != self.params.shape:
            raise ValueError(f"gradient has shape {gradient.shape}, shard {self.params.shape}")
        verdict = self._ledger.offer(push)
        if self.staleness is not None:
            self.staleness.make_room(push.rank, self.version, self.params)
        if verdict is Verdict.NEW:
            self._keep_present()
            self._gradients[push.rank] = gradient
            record = control or everything(self._layout)
            if record.settings is not None:
                self.settings = tuple(record.settings.tolist())
                record = replace(record, settings=None)
            self._controls[push.rank] = record
            self._pushed = push
            if self._ledger.complete:
                self._add_up()
        return verdict

    @override
    def commit(self, seq: int, norm: float | None) -> bool:
        version, steps = self.version, self.steps
        if not self._ledger.commit(seq):
            return False
        if self.staleness is None:
            limit, scale = self._plan.job.clip_norm, self._scale
            if limit is not None and norm is not None:
                scale *= clip_factor(norm, limit)
            scale_in_place(self._typed(self._sum), scale)
            applied = applies(self.total, self._plan.job.failure.non_finite)
            update = Update(version, present=self._present, settings=self.settings, applied=applied)
        else:
            assert self._pushed is not None and self._present is not None, "a push was staged"
            update = self.staleness.update(self._pushed, version, self._present)
        if self.backup_link is not None:
            self.backup_link.send(update, self._sum)
        self._update(update, steps)
        return True

    @override
    def follow(self, change: Change, gradient: Tensor) -> None:
        """`gradient` is summed and clipped, or corrected, shape [m]."""
        assert isinstance(change, Update), "a shard is told of updates alone"
        push, steps = change.push, self.steps
        if self.staleness is None:
            self._keep_present()
            self.settings = change.settings
            self._look_for_unfrozen(change.present)
            self._sum.copy_(gradient)
            self._ledger.restore(change.version + 1)
        else:
            assert push is not None, "an asynchronous update is one rank's"
            self.staleness.follow(change, push.rank, self.params)
            if push.attempt > self._ledger.attempt:
                self.renew(push.attempt)
            self._ledger.offer(push)
            self._ledger.commit(push.seq)
            self._sum = gradient
        self._update(change, steps)

    @override
    def snapshot(self) -> StoreSnapshot:
        vectors = {"params": self.params, **({} if self._before is None else {"_": self._before})}
        vectors |= {f"optimizer/{name}": one for name, one in self.optimizer.state().items()}
        attributes = {name: deepcopy(getattr(self, name)) for name in _COPIED}
        return StoreSnapshot({name: one.clone() for name, one in vectors.items()}, attributes)

    @override
    def load_snapshot(self, snapshot: StoreSnapshot) -> None:
        vectors: dict[str, Tensor] = dict(snapshot.vectors)
        self.params.copy_(vectors.pop("params"))
        if self._before is not None:
            self._before.copy_(vectors.pop("_"))
        for name, value in snapshot.attributes.items():
            setattr(self, name, value)
        self.optimizer.load({k.removeprefix("optimizer/"): one for k, one in vectors.items()})

    def _update(self, update: Update, before: int) -> None:
        """Make the update of `_sum`, and copy what a checkpoint of a step just made wants."""
        if self._sums:
            return
        self.skipped = not update.applied
        schedule_step, scale = update.version, 1.0
        if self.staleness is not None:
            scale = self.staleness.applied(update)
            # An update of each worker is one step.
            schedule_step = update.version // self._ledger.world
            self.optimizer.use(self._sum)  # may be the worker's own vector: it is only read
        rates = [rate * scale for rate in self._rates(schedule_step)]
        self.optimizer.step(rates, from_flags(update.present), applied=update.applied)
        for steps in range(before + 1, self.steps + 1):  # several, after a slow rank
            self._copies.copy_if_due(steps, self._copy)

    def _rates(self, schedule_step: int) -> Sequence[float]:
        """Give the learning rates of an update, before they are scaled."""
        plan = self._plan
        if plan.own_loop is not None and self.settings:
            assert isinstance(self.optimizer, FlatOptimizer), "others are refused"
            return self.optimizer.adjust(plan.own_loop.settings, np.array(self.settings))
        if self._plateau is not None:
            self._plateau.known = PlateauState.of(self.settings)
        return rate_of(self._job, schedule_step, plan.total_steps)

    def _copy(self) -> dict[str, Tensor]:
        """Copy the shard: by torch's names, shape [m] or none; parameters under the empty name."""
        vectors = {"": self.params, **self.optimizer.state()}
        return {name: value.detach().clone() for name, value in vectors.items()}

    def _typed(self, vector: Tensor) -> list[Tensor]:
        return typed_views(vector, self._segments)

    def _look_for_unfrozen(self, flags: bytes | None) -> None:
        """Have the tail take part once one of its parameters does."""
        if flags is None:
            return
        self.seen = self.seen | np.frombuffer(flags, np.bool_)
        if any(flags[piece.slot] for piece in self._unfreezing):
            self._segments, self._unfreezing = self._layout.segments, []

    def _forget_pushes(self) -> None:
        self._gradients.clear()
        self._controls.clear()

    def _keep_present(self) -> None:
        """Every shard has the present version, or nobody could push a gradient made with it."""
        if self._before is not None and self._before_version != self.version:
            self._before.copy_(self.params)
            self._before_version = self.version

    def _add_up(self) -> None:
        """Make of what is staged the gradient of an update, and let go of the ranks' vectors."""
        ranks = sorted(self._gradients)
        self.total = StepControl.total([self._controls[rank].pack() for rank in ranks])
        self._present = flags_of(self.total, self._plan.job.failure.non_finite)
        if self.staleness is not None:
            (rank,) = ranks
            staged = self._gradients[rank], self.params
            self._sum = self.staleness.compensated(rank, self.version, *staged)
        else:
            self._look_for_unfrozen(self.total.present.tobytes())
            self._add_in_order([self._typed(self._gradients[rank]) for rank in ranks])
        self._forget_pushes()

    def _add_in_order(self, parts: list[list[Tensor]]) -> None:
        """Sum in rank order (I2)."""
        plan, world = self._plan, self._ledger.world
        backup = plan.consistency.backup_workers
        # With backup workers still a mean, over the samples that are there.
        self._scale = self.total.scale * (world / (world - backup) if backup else 1.0)
        for terms, out in zip(zip(*parts, strict=True), self._typed(self._sum), strict=True):
            sum_in_order(terms, out)
        if plan.job.clip_norm is not None:
            square = squared_norm_of(self._sum, self._segments, plan.duplicate_ranges)
            self.squared_norm = square * self._scale**2


def layout_of(plan: ShardPlan, params: Tensor) -> Layout:
    """Give what lies where in a shard; a plan without it has a single parameter."""
    return plan.layout or plain_layout(params.numel(), dtype_name(params))


def everything(layout: Layout) -> StepControl:
    """Give the record of a rank that has a gradient of every parameter."""
    return StepControl(1.0, 1.0, present=np.ones(layout.parameters, np.bool_))


def flags_of(total: StepControl, policy: NonFinitePolicy) -> bytes:
    """
    Say which parameters an update moves: of a step that is left out, none.

    Args:
        total: the control record of the step.
        policy: `failure.non_finite` of the job.

    Returns:
        A byte for each parameter.
    """
    present = total.present
    return (present if applies(total, policy) else np.zeros_like(present)).tobytes()


def applies(total: StepControl, policy: NonFinitePolicy) -> bool:
    """Say whether a step is applied, and not left out; see `flags_of`."""
    return total.finite or policy == "ignore"


def from_flags(flags: bytes | None) -> NDArray[np.bool_] | None:
    """Unpack what `flags_of` gave."""
    return None if flags is None else np.frombuffer(flags, np.bool_)
