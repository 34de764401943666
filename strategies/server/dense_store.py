"""
One parameter-server shard: parameters, optimizer state, and the ledger of applied pushes.

A shard never blocks: its server does the waiting. A synchronous shard sums the gradients of all
ranks and applies one update per step; an asynchronous shard applies one update per push
(`staleness.py`).

Synchronous shards commit independently, so one shard may briefly be a version ahead of another
shard or of the embedding tables. Each shard keeps its previous version until the first push of the
next step proves that all shards have committed:

    shard 0   version 4   | commit: 5, keeps 4      | push for 5: drops 4, keeps 5 ...
    shard 1   version 4              | commit: 5, keeps 4    |
                                     ^ both have 4 until here, both have 5 from here on

So at any moment there is a version that every shard can return, whichever process dies (I3).
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
from distplat.platform.stop_order import StopOrder
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
    "_previous_version",
    "_segments",
    "_unfreezing",
    "settings",
    "skipped",
    "total",
    "squared_norm",
)


def _build_ledger(plan: ShardPlan) -> Ledger:
    identity, consistency = (plan.run, plan.attempt, plan.world), plan.consistency
    if not consistency.asynchronous:
        return StepLedger(*identity, consistency.backup_workers)
    if plan.own_loop is None:
        return TaskLedger(*identity)
    return LoopLedger(*identity, consistency.bound)


class DenseStore(ServerStore, ReplicatedStore):
    """
    A contiguous range of the flat parameter vector, with its optimizer state and ledger.

    Args:
        plan: range, layout and job of the shard.
        params: shape [m]; updated in place. Its values are undefined until `restore`.
    """

    def __init__(self, plan: ShardPlan, params: Tensor) -> None:
        self._plan, self.params = plan, params
        self._job = plan.job.with_plateau()  #: its learning rates also depend on evaluations
        self._plateau = self._job.plateau
        self.backup_link: BackupLink | None = None
        self._layout = layout_of(plan, params)
        segments, tail = self._layout.segments, self._layout.tail
        self._segments = tuple(segment for segment in segments if segment.start < tail)
        self._unfreezing = [piece for piece in self._layout.pieces if piece.start >= tail]
        self._ledger, own_loop = _build_ledger(plan), plan.own_loop
        asynchronous = plan.consistency.asynchronous
        self.staleness = Staleness(plan, params, segments) if asynchronous else None
        #: the parameters are sums of gradients, and no optimizer updates them
        self._sums_only = own_loop is not None and own_loop.optimizer is None
        self.settings: tuple[float, ...] = ()
        """Settings sent with the pushes of the staged update, or else of the last one applied."""
        self.skipped = False
        """Whether the last update changed nothing because its step was skipped."""
        self._gradients: dict[int, Tensor] = {}  #: rank -> its gradient of this step
        self._controls: dict[int, StepControl] = {}  #: rank -> its control record of this step
        self._pushed: PushId | None = None  #: asynchronous: push whose gradient is staged
        # An asynchronous update reads the worker's own vector: no vector is needed for the sum.
        borrows = self._sums_only or self.staleness is not None
        self._sum = params if borrows else torch.zeros_like(params)
        vectors, ema = (params, self._sum, self._layout), plan.job.ema
        loop_optimizer = own_loop.optimizer if own_loop is not None else None
        self.optimizer = optimizer_of(loop_optimizer or plan.job.optimizer, *vectors, ema)
        self.total = StepControl()  #: of the staged sum, or of the last step applied
        self.seen: NDArray[np.bool_] = np.zeros(self._layout.parameters, np.bool_)
        """By parameter of the model, whether any rank has computed a gradient for it yet."""
        self._present: bytes | None = None  #: of the staged sum: flags of updated parameters
        self._scale = 1.0  #: factor that the staged sum is still to be multiplied by
        self.squared_norm: float | None = None  #: of the staged sum, if complete and needed
        commits_apart = plan.shards > 1 or plan.job.embeddings is not None
        self._previous = params.clone() if commits_apart and not borrows else None
        self._previous_version: int | None = None  #: version of `_previous`
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
        """Steps completed by every rank, or whose tasks are all applied."""
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
        Set the version of `params` and start accepting pushes.

        Args:
            version: number of completed steps.
            state: optimizer state; None: a fresh optimizer.
        """
        self.optimizer.load(state or {})
        self._ledger.restore(version)
        self._previous_version = None
        if self.staleness is not None:
            self.staleness.restore(self.version)

    @override
    def renew(self, attempt: int, world: int | None = None) -> None:
        self._ledger.renew(attempt, world)
        self.total = replace(self.total, stop=StopOrder.NONE)  # of the attempt before
        self._forget_pushes()

    def values(self, version: int) -> Tensor:
        """
        Return the parameters of the current or the previous version, shape [m].

        Raises:
            StaleError, GapError: the shard has dropped this version, or not reached it.
        """
        if version == self.version:
            return self.params
        if version == self._previous_version and self._previous is not None:
            return self._previous
        error_cls = GapError if version > self.version else StaleError
        raise error_cls(f"version {version} is not here: the shard is at {self.version}")

    @override
    def take_copies(self, version: int) -> dict[str, Tensor] | None:
        """An asynchronous shard copies when the last task of step `version - 1` is applied, so
        the copies may include later tasks.
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
        """An asynchronous update consists of a single push."""
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
        """See `Staleness.record_pull`; does nothing on a synchronous shard."""
        if self.staleness is not None:
            self.staleness.ensure_rank(rank, self.version, self.params)
            self.staleness.record_pull(rank, version, values)

    @override
    def push(self, push: PushId, gradient: Tensor, control: StepControl | None = None) -> Verdict:
        """
        Stage a gradient, and compute the sum once all ranks have pushed.

        Args:
            push: identity of the push.
            gradient: shape [m]; must not change until the step is committed. For an asynchronous
                shard it is the gradient of the mean loss over the worker's own samples.
            control: the rank's control record; None: it has a gradient of every parameter.

        Raises:
            ProtocolError: see `Ledger.offer`; the store is unchanged.
        """
        if gradient.shape != self.params.shape:
            raise ValueError(f"gradient has shape {gradient.shape}, shard {self.params.shape}")
        verdict = self._ledger.offer(push)
        if self.staleness is not None:
            self.staleness.ensure_rank(push.rank, self.version, self.params)
        if verdict is Verdict.NEW:
            self._save_previous()
            self._gradients[push.rank] = gradient
            record = control or full_control(self._layout)
            if record.settings is not None:
                self.settings = tuple(record.settings.tolist())
                record = replace(record, settings=None)
            self._controls[push.rank] = record
            self._pushed = push
            if self._ledger.complete:
                self._sum_gradients()
        return verdict

    @override
    def commit(self, seq: int, norm: float | None) -> bool:
        version, steps = self.version, self.steps
        if not self._ledger.commit(seq):
            return False
        update = self._next_update(version, norm)
        if self.backup_link is not None:
            self.backup_link.send(update, self._sum)
        self._update(update, steps)
        return True

    def _next_update(self, version: int, norm: float | None) -> Update:
        """Return the update of the staged gradients; the sum of a synchronous step is scaled."""
        applied = applies(self.total, self._plan.job.failure.non_finite)
        if self.staleness is not None:
            assert self._pushed is not None and self._present is not None, "a push was staged"
            facts = self._present, applied
            return self.staleness.update(self._pushed, version, *facts)
        limit, scale = self._plan.job.clip_norm, self._scale
        if limit is not None and norm is not None:
            scale *= clip_factor(norm, limit)
        scale_in_place(self._typed(self._sum), scale)
        return Update(
            version,
            present=self._present,
            settings=self.settings,
            applied=applied,
            total=self.total.head,
            squared_norm=self.squared_norm,
        )

    @override
    def follow(self, change: Change, gradient: Tensor) -> None:
        """`gradient`, shape [m], is the clipped sum, or one rank's gradient after compensation."""
        assert isinstance(change, Update), "shards replicate updates only"
        push, steps = change.push, self.steps
        if self.staleness is None:
            self._save_previous()
            self.settings, self.squared_norm = change.settings, change.squared_norm
            self.total = StepControl.unpack(np.array(change.total))
            self._note_present(change.present)
            self._sum.copy_(gradient)
            self._ledger.restore(change.version + 1)
        else:
            assert push is not None, "an asynchronous update comes from one push"
            self.staleness.follow(change, push.rank, self.params)
            if push.attempt > self._ledger.attempt:
                self.renew(push.attempt)
            self._ledger.offer(push)
            self._ledger.commit(push.seq)
            self._sum = gradient
        self._update(change, steps)

    @override
    def snapshot(self) -> StoreSnapshot:
        previous = {} if self._previous is None else {"_": self._previous}
        vectors = {"params": self.params, **previous}
        vectors |= {f"optimizer/{name}": state for name, state in self.optimizer.state().items()}
        attributes = {name: deepcopy(getattr(self, name)) for name in _COPIED}
        attributes["_ledger"].unstage()
        return StoreSnapshot({name: vector.clone() for name, vector in vectors.items()}, attributes)

    @override
    def load_snapshot(self, snapshot: StoreSnapshot) -> None:
        vectors: dict[str, Tensor] = dict(snapshot.vectors)
        self.params.copy_(vectors.pop("params"))
        if self._previous is not None:
            self._previous.copy_(vectors.pop("_"))
        for name, value in snapshot.attributes.items():
            setattr(self, name, value)
        self.optimizer.load({k.removeprefix("optimizer/"): state for k, state in vectors.items()})

    def _update(self, update: Update, steps_before: int) -> None:
        """Apply `_sum`, and copy the shard if a checkpoint of a completed step is due."""
        if self._sums_only:
            return
        self.skipped = not update.applied
        schedule_step, scale = update.version, 1.0
        if self.staleness is not None:
            scale = self.staleness.applied(update)
            # One update of each worker makes one step of the schedule.
            schedule_step = update.version // self._ledger.world
            self.optimizer.use(self._sum)  # may be the worker's own vector, which is only read
        rates = [rate * scale for rate in self._learning_rates(schedule_step)]
        self.optimizer.step(rates, from_flags(update.present), applied=update.applied)
        for steps in range(steps_before + 1, self.steps + 1):  # several steps after a slow rank
            self._copies.copy_if_due(steps, self._copy)

    def _learning_rates(self, schedule_step: int) -> Sequence[float]:
        """Return the learning rates of an update, before scaling by staleness."""
        plan = self._plan
        if plan.own_loop is not None and self.settings:
            assert isinstance(self.optimizer, FlatOptimizer), "other optimizers are refused"
            return self.optimizer.adjust(plan.own_loop.settings, np.array(self.settings))
        if self._plateau is not None:
            self._plateau.known = PlateauState.of(self.settings)
        return rate_of(self._job, schedule_step, plan.total_steps)

    def _copy(self) -> dict[str, Tensor]:
        """Copy the shard: torch's names -> shape [m] or scalar; parameters have the empty name."""
        vectors = {"": self.params, **self.optimizer.state()}
        return {name: value.detach().clone() for name, value in vectors.items()}

    def _typed(self, vector: Tensor) -> list[Tensor]:
        return typed_views(vector, self._segments)

    def _note_present(self, flags: bytes | None) -> None:
        """Record which parameters have a gradient; include the tail once one of its has."""
        if flags is None:
            return
        self.seen = self.seen | np.frombuffer(flags, np.bool_)
        if any(flags[piece.slot] for piece in self._unfreezing):
            self._segments, self._unfreezing = self._layout.segments, []

    def _forget_pushes(self) -> None:
        self._gradients.clear()
        self._controls.clear()

    def _save_previous(self) -> None:
        """Copy the current version over the previous one.

        A push was computed on the current version, so every shard has reached it.
        """
        if self._previous is not None and self._previous_version != self.version:
            self._previous.copy_(self.params)
            self._previous_version = self.version

    def _sum_gradients(self) -> None:
        """Compute the gradient of the update from the staged ones, and release the latter."""
        ranks = sorted(self._gradients)
        self.total = StepControl.total([self._controls[rank].pack() for rank in ranks])
        self._present = flags_of(self.total, self._plan.job.failure.non_finite)
        if self.staleness is not None:
            (rank,) = ranks
            staged = self._gradients[rank], self.params
            self._sum = self.staleness.compensated(rank, self.version, *staged)
        else:
            self._note_present(self.total.present.tobytes())
            self._sum_in_order([self._typed(self._gradients[rank]) for rank in ranks])
        self._forget_pushes()

    def _sum_in_order(self, parts: list[list[Tensor]]) -> None:
        """Sum in rank order (I2)."""
        plan = self._plan
        self._scale = self.total.scale
        if plan.consistency.backup_workers:
            # The gradient is the mean over the samples of the ranks in the step, each of which
            # has sent the size of the whole batch, unless it had no samples.
            self._scale /= max(1, sum(record.samples > 0 for record in self._controls.values()))
        for terms, out in zip(zip(*parts, strict=True), self._typed(self._sum), strict=True):
            sum_in_order(terms, out)
        if plan.job.clip_norm is not None:
            square = squared_norm_of(self._sum, self._segments, plan.duplicate_ranges)
            self.squared_norm = square * self._scale**2


def layout_of(plan: ShardPlan, params: Tensor) -> Layout:
    """Return the shard's layout; a plan without one has a single parameter."""
    return plan.layout or plain_layout(params.numel(), dtype_name(params))


def full_control(layout: Layout) -> StepControl:
    """Return the control record of a rank that has a gradient of every parameter."""
    return StepControl(1.0, 1.0, present=np.ones(layout.parameters, np.bool_))


def flags_of(total: StepControl, policy: NonFinitePolicy) -> bytes:
    """
    Return a byte per parameter: whether the update changes it; all 0 for a skipped step.

    Args:
        total: the control record of the step.
        policy: `failure.non_finite` of the job.
    """
    present = total.present
    return (present if applies(total, policy) else np.zeros_like(present)).tobytes()


def applies(total: StepControl, policy: NonFinitePolicy) -> bool:
    """Return whether a step is applied rather than skipped."""
    return total.finite or policy == "ignore"


def from_flags(flags: bytes | None) -> NDArray[np.bool_] | None:
    """Unpack the result of `flags_of`."""
    return None if flags is None else np.frombuffer(flags, np.bool_)
