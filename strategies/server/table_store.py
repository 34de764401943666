"""
One server's part of all embedding tables, and the ledger of applied pushes.

A store never blocks, and the server node defines how ids and rows are sent. The gradients of a step
are applied together when the last rank has pushed; asynchronous tables apply each push on arrival,
as one update.

    push(seq=version)  ──▶  all ranks pushed  ──▶  rollback possible to `version`  ──▶  version + 1
                                                   until the first push for `version + 1`

When a worker is lost, embedding servers may be a step ahead of the dense parameters: they had all
gradients, the dense part had not. So an attempt starts with two calls. `open` ends the previous
attempt, after which no step is applied, and returns this server's version. The ranks then agree on
a common version, and `begin` rolls one step back where this server is ahead (I3).
"""

from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from distplat.platform.errors import FencedError, ProtocolError, StateLost
from distplat.platform.ledger import (
    Ledger,
    PullId,
    PushId,
    ServerReply,
    StepLedger,
    TaskLedger,
    Verdict,
)
from distplat.platform.plateau import PlateauState
from distplat.platform.shard_map import TablePlan, TableSpec
from distplat.platform.tensor_slices import Bundle, RawTensor
from distplat.strategies.server.server import Server, ServerLimits
from distplat.strategies.server.store import (
    BackupLink,
    Change,
    CheckpointCopies,
    Renewal,
    ReplicatedStore,
    ServerStore,
    StepBack,
    StoreSnapshot,
    Update,
)
from distplat.strategies.sparse.files import PartSource, packed_part
from distplat.strategies.sparse.routing import server_of
from distplat.strategies.sparse.saved import copies_of, fill
from distplat.strategies.sparse.table import RowGradients, Table, build_rule

_CREATED_AT_ONCE = 1 << 16

TableRows = Sequence[Sequence[RowGradients]]
"""Gradients of an update, by table: summed in order; empty: the table was not used."""


class RowControl(NamedTuple):
    """Control data sent with a rank's gradients."""

    skip: bool
    """Skip the step, whatever other ranks push: the step counts as completed, and rows, optimizer
    states and the optimizer's count of updates stay unchanged."""
    settings: tuple[float, ...] = ()
    """State of the learning rate, see `PlateauState`; empty: it follows from job and step."""


class TableStore(ServerStore, ReplicatedStore):
    """
    The tables of one server. Empty until `open` or `load_snapshot`.

    Args:
        name: of the server, for messages.
        index: number of the server.
    """

    commits_alone = True
    squared_norm = None
    inbox = None

    def __init__(self, name: str, index: int) -> None:
        self._name, self.index = name, index
        self.backup_link: BackupLink | None = None
        self.plan: TablePlan | None = None  #: None: the tables are not opened
        self.tables: list[Table] = []
        self._ledger: Ledger | None = None
        self._staged: dict[int, Sequence[RowGradients]] = {}
        self._skipped = False  #: whether a rank asks to skip the staged step
        self._settings: tuple[float, ...] = ()  #: of the staged update
        self._pushed: PushId | None = None  #: last staged push
        self._copies = CheckpointCopies[Bundle](0, 0)

    @property
    @override
    def opened(self) -> bool:
        return self._ledger is not None

    @property
    @override
    def ledger(self) -> Ledger:
        """Raises:
        FencedError: the tables are not opened.
        """
        if self._ledger is None:
            raise FencedError(f"{self._name} refuses calls before its tables are opened")
        return self._ledger

    @property
    @override
    def present(self) -> list[Table]:
        return self.tables

    def open(
        self, plan: TablePlan, saved_at: int, saved: Sequence[Mapping[str, RawTensor]]
    ) -> None:
        """
        Create the tables.

        Args:
            plan: of the first attempt.
            saved_at: version of the checkpoint, in steps.
            saved: files of the checkpoint.
        """
        self.tables = self._build_tables(plan, saved)
        self._set_plan(plan)
        self._ledger = self._build_ledger(plan)
        self._ledger.restore(saved_at)

    @override
    def renew(self, attempt: int, world: int | None = None) -> None:
        """Raises:
        StateLost: the number of ranks changes within a step that is partly applied.
        """
        ledger, steps = self.ledger, self.ledger.steps
        partial = isinstance(ledger, TaskLedger) and ledger.partial
        is_lost = partial and world not in (None, ledger.world)
        self._unstage()
        ledger.renew(attempt, None if is_lost else world)
        if is_lost:
            raise StateLost(f"the rest of step {steps} on {self._name}")

    def begin(self, version: int) -> None:
        """
        Continue from a version.

        Args:
            version: completed steps of the ranks.

        Raises:
            ProtocolError: the tables cannot be rolled back to this version.
        """
        ledger, plan = self.ledger, self.plan
        assert plan is not None, "`open` comes first"
        steps = ledger.steps
        if steps == version or (ledger.asynchronous and steps > version):
            return
        if steps != version + 1 or not plan.rewinds:
            raise ProtocolError(f"{self._name} is at step {steps}, the workers at {version}")
        self._step_back(version)
        if self.backup_link is not None:
            self.backup_link.send(StepBack(version))

    @override
    def push(self, push: PushId, gradient: Sequence[RowGradients], control: RowControl) -> Verdict:
        """
        Stage a rank's gradients.

        Args:
            push: identity of the push.
            gradient: at most one for each table; must not change until applied.
            control: sent with the gradients.

        Raises:
            ProtocolError: see `Ledger.offer`; the store is unchanged.
        """
        ledger = self.ledger
        self._check_shapes(gradient)
        if ledger.asynchronous and push.task is None:  # a rank's own part of a step
            push = replace(push, task=push.seq * ledger.world + push.rank)
        verdict = ledger.offer(push)
        if verdict is Verdict.NEW:
            self._staged[push.rank] = gradient
            self._skipped |= control.skip
            self._settings = control.settings
            self._pushed = push
        return verdict

    @override
    def commit(self, seq: int, norm: float | None) -> bool:
        ledger = self.ledger
        version, schedule_step, steps_before = ledger.updates, ledger.schedule_step, ledger.steps
        if not ledger.commit(seq):
            return False
        staged = [] if self._skipped else sorted(self._staged.items())
        self._unstage()
        parts = [part for _, gradients in staged for part in gradients]
        by_table: TableRows = [
            [part for part in parts if part.table == number] for number in range(len(self.tables))
        ]
        if self.backup_link is not None:
            pairs = zip(self.tables, by_table, strict=True)
            by_table = [[table.summed(grads)] if grads else [] for table, grads in pairs]
            push = self._pushed if ledger.asynchronous else None
            self.backup_link.send(Update(version, push, settings=self._settings), by_table)
        self._update(by_table, schedule_step, steps_before)
        return True

    @override
    def pull(self, rank: int) -> int:
        return self.ledger.updates

    @override
    def head(self, control: RowControl) -> tuple[float, ...]:
        """Empty: the shards, or the ranks among themselves, decide whether a step is applied."""
        return ()

    @override
    def staleness_of(self, rank: int) -> int:
        """0: staleness is not tracked for rows."""
        return 0

    @override
    def take_copies(self, version: int) -> Bundle | None:
        return self._copies.take(version, self.ledger.steps, self._copy)

    @override
    def worker(self, part_rank: int) -> str:
        return f"worker-{part_rank}"

    @override
    def log(self) -> None:
        """None: the order of asynchronous updates is not recorded."""

    @override
    def snapshot(self) -> StoreSnapshot:
        tables = {table.spec.name: table.snapshot() for table in self.tables}
        ledger = deepcopy(self.ledger)
        ledger.unstage()
        return StoreSnapshot(tables, {"plan": self.plan, "index": self.index, "_ledger": ledger})

    @override
    def load_snapshot(self, snapshot: StoreSnapshot) -> None:
        for name, value in snapshot.attributes.items():
            setattr(self, name, value)
        assert self.plan is not None, "snapshots are of opened tables"
        self._set_plan(self.plan)
        self.tables = [self._build_table(self.plan, spec) for spec in self.plan.tables]
        for table in self.tables:
            table.load(snapshot.vectors[table.spec.name])

    @override
    def follow(self, change: Change, gradient: TableRows) -> None:
        """`gradient` holds the sum for each table that was used."""
        match change:
            case Renewal(plan=plan):
                self.plan = plan
                self.renew(plan.attempt, plan.world)
            case StepBack(version=version):
                self._step_back(version)
            case Update(version=version, push=push, settings=settings):
                ledger, self._settings = self.ledger, settings
                schedule_step, steps_before = ledger.schedule_step, ledger.steps
                if push is None:
                    ledger.restore(version + 1)
                else:
                    ledger.offer(push)
                    ledger.commit(push.seq)
                self._update(gradient, schedule_step, steps_before)

    def _update(self, by_table: TableRows, schedule_step: int, steps_before: int) -> None:
        """
        Update the rows, and copy the tables if a checkpoint of a completed step is due.

        Args:
            by_table: gradients.
            schedule_step: step of the learning rate's schedule.
            steps_before: steps completed before the update.
        """
        assert self.plan is not None and self.plan.job.embeddings is not None, "open() comes first"
        job, rule = self._job, self.plan.job.embeddings.optimizer
        if self._plateau is not None:
            self._plateau.known = PlateauState.of(self._settings)
        rate = job.lr_schedule.rate(rule.lr, schedule_step, self.plan.total_steps)
        for table, parts in zip(self.tables, by_table, strict=True):
            if parts:
                table.apply(parts, rate)
            else:
                table.forget()
        for version in range(steps_before + 1, self.ledger.steps + 1):  # several after a slow rank
            self._copies.copy_if_due(version, self._copy)

    def _copy(self) -> Bundle:
        return copies_of(self.tables, self.index)

    def _step_back(self, version: int) -> None:
        self.ledger.restore(version)
        for table in self.tables:
            table.rewind()

    def _check_shapes(self, gradients: Sequence[RowGradients]) -> None:
        """Check shapes before the ledger records the push: an update cannot be half applied."""
        for part in gradients:
            expected = (len(part.ids), self.tables[part.table].spec.width)
            if part.values.shape != expected:
                raise ValueError(f"gradients have shape {part.values.shape}, not {expected}")

    def _set_plan(self, plan: TablePlan) -> None:
        self.plan, self._job = plan, plan.job.with_plateau()
        self._plateau = self._job.plateau
        self._copies = CheckpointCopies(plan.checkpoint_every, plan.total_steps)

    def _build_ledger(self, plan: TablePlan) -> Ledger:
        assert plan.job.embeddings is not None, "embedding servers need the field"
        ledger_cls = TaskLedger if plan.job.embeddings.asynchronous else StepLedger
        return ledger_cls(plan.run, plan.attempt, plan.world)

    def _build_table(self, plan: TablePlan, spec: TableSpec) -> Table:
        assert plan.job.embeddings is not None, "embedding servers need the field"
        rule = build_rule(plan.job.embeddings.optimizer)
        return Table(spec, plan.job.seed, rule, rewinds=plan.rewinds)

    def _build_tables(
        self, plan: TablePlan, files: Sequence[Mapping[str, RawTensor]]
    ) -> list[Table]:
        tables = []
        for spec in plan.tables:
            table = self._build_table(plan, spec)
            for first in range(0, (spec.rows or 0) if spec.whole else 0, _CREATED_AT_ONCE):
                ids = np.arange(first, min(first + _CREATED_AT_ONCE, spec.rows or 0))
                table.create(ids[server_of(plan, spec, ids) == self.index])
            fill(table, plan, self.index, files)
            tables.append(table)
        return tables

    def _unstage(self) -> None:
        self._staged.clear()
        self._skipped = False


class TableServer(Server[TableStore], PartSource):
    """
    Serves one server's part of all embedding tables.

    Args:
        name: of the server, for messages.
        index: number of the server.
    """

    def __init__(self, name: str, index: int) -> None:
        super().__init__(name, TableStore(name, index), ServerLimits(0.0, 0.0))

    def open(
        self, plan: TablePlan, saved_at: int = 0, saved: Iterable[Mapping[str, RawTensor]] = ()
    ) -> int:
        """
        End the previous attempt and join this one; called by every rank.

        Args:
            plan: the same from all ranks.
            saved_at: version of the checkpoint, in steps.
            saved: files of the checkpoint; ignored if the tables exist.

        Returns:
            Completed steps of the tables; no step is applied before `begin`.

        Raises:
            FencedError: a later attempt has started.
            ProtocolError: another rank's model has other tables.
            StateLost: see `TableStore.renew`.
        """
        with self._changed:
            self._check_not_fenced()
            store, failure = self.store, plan.job.failure
            self._limits = ServerLimits(failure.start_timeout_s, failure.step_timeout_s)
            if store.plan is None:
                store.open(plan, saved_at, list(saved))
            elif plan.attempt < store.ledger.attempt:
                newer = store.ledger.attempt
                raise FencedError(f"attempt {plan.attempt} refused: {newer} began")
            elif plan.tables != store.plan.tables:
                raise ProtocolError(
                    f"the embedding tables differ from those of the first rank: {plan.tables} "
                    f"against {store.plan.tables}; model() must not depend on the process"
                )
            if plan.attempt > store.ledger.attempt:
                store.plan = plan
                self.renew(plan.attempt, plan.world)
                if store.backup_link is not None:
                    store.backup_link.send(Renewal(plan))
                self._confirm()
            return store.ledger.steps

    def begin(self, attempt: int, version: int) -> None:
        """
        Set the version that the attempt continues from; called by every rank with the same one.

        Args:
            attempt: the rank's attempt.
            version: completed steps of the ranks.

        Raises:
            FencedError: a later attempt has started.
            ProtocolError: the tables cannot be rolled back to this version.
        """
        with self._changed:
            self._check_not_fenced()
            self.check_attempt(attempt, "a begin")
            self.store.begin(version)
            self._confirm()

    def read(
        self,
        pull: PullId,
        table: int,
        ids: NDArray[np.int64],
        out: NDArray[np.float32],
        *,
        again: bool = False,
    ) -> None:
        """
        Read rows of a table into `out`.

        Args:
            pull: identity of the pull; see `Server.pull`.
            table: number of the table.
            ids: shape [n].
            out: shape [n, width].
            again: `out` is not the worker's own memory, so a repeated pull may write it again;
                otherwise a repeat writes nothing, since the worker may be using `out`.

        Raises:
            StaleError, FencedError: see `Server.pull`.
        """
        self.pull(pull, lambda tables, version: tables[table].read(ids, out), again=again)

    def add(
        self,
        push: PushId,
        gradients: Sequence[RowGradients],
        skip: bool = False,
        settings: tuple[float, ...] = (),
    ) -> ServerReply:
        """
        Push a rank's gradients; return when they are applied. See `TableStore.push`.

        Raises:
            ProtocolError: the push must not be applied.
            DeadlineExceeded: ranks did not push in time; names them.
        """
        control = RowControl(skip, settings)
        return self.push(push, gradients, control, lambda tables, version: None)

    @override
    def sizes(self) -> list[tuple[TableSpec, int]]:
        with self._changed:
            return [(table.spec, len(table)) for table in self.store.tables]

    @override
    def part(self, table: int, first: int, count: int) -> bytes:
        with self._changed:
            return packed_part(self.store.tables[table], first, count)

    @override
    def _patience(self, step: int) -> tuple[float, str]:
        """Return a step's deadline; unlike a shard's, the first step has no longer one."""
        return self._limits.step_s, "step_timeout_s"
