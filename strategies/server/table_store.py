"""
One server's part of all embedding tables, and the ledger of what was applied.

Plain: it waits for nobody, and how ids and rows travel is the server node's. A step's gradients are
applied together when the last rank has pushed; asynchronous tables apply each push when it comes,
as one update.

    push(seq=version)  ──▶  all ranks there  ──▶  rewind possible to `version`  ──▶  version + 1
                                                  until the first push for `version + 1`

A worker that was lost may leave the servers a step ahead of the others: all gradients were in, the
dense part was not. So an attempt begins in two calls. `open` ends the attempt before, from when on
no step is made, and tells how far this server is; `begin` takes one step back where others have not
come as far (I3). Between them the ranks learn how far everybody is.
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
from distplat.strategies.sparse.table import RowGradients, Table, make_rule

_CREATED_AT_ONCE = 1 << 16

TableRows = Sequence[Sequence[RowGradients]]
"""Gradients of an update, by table: several are added in order; none: the table was not used."""


class RowControl(NamedTuple):
    """What comes with a rank's gradients."""

    skip: bool
    """Leave the step out, whatever other ranks push: it is counted as made, and rows, their
    optimizer's states and its count of updates stay as they are."""
    settings: tuple[float, ...] = ()
    """What the learning rate goes by, see `PlateauState`; empty: the job and the step say it."""


class TableStore(ServerStore, ReplicatedStore):
    """
    The tables of one server. Empty until `open`, or until it becomes equal to another one.

    Args:
        name: of the server, for messages.
        index: its number.
    """

    commits_alone = True
    squared_norm = None
    inbox = None

    def __init__(self, name: str, index: int) -> None:
        self._name, self.index = name, index
        self.backup_link: BackupLink | None = None  #: the way to a backup
        self.plan: TablePlan | None = None  #: None: nobody has opened the tables
        self.tables: list[Table] = []
        self._ledger: Ledger | None = None
        self._staged: dict[int, Sequence[RowGradients]] = {}
        self._skipped = False  #: whether some rank has the step under way left out
        self._settings: tuple[float, ...] = ()  #: of the update that is staged
        self._pushed: PushId | None = None  #: the last one that was staged
        self._copies = CheckpointCopies[Bundle](0, 0)

    @property
    @override
    def opened(self) -> bool:
        return self._ledger is not None

    @property
    @override
    def ledger(self) -> Ledger:
        """Raises:
        FencedError: nobody has opened the tables.
        """
        if self._ledger is None:
            raise FencedError(f"{self._name} refuses what comes before its tables are opened")
        return self._ledger

    @property
    @override
    def present(self) -> list[Table]:
        return self.tables

    def open(
        self, plan: TablePlan, saved_at: int, saved: Sequence[Mapping[str, RawTensor]]
    ) -> None:
        """
        Make the tables.

        Args:
            plan: of the first attempt.
            saved_at: steps behind the checkpoint.
            saved: its files.
        """
        self.tables = self._make_tables(plan, saved)
        self._take_plan(plan)
        self._ledger = self._make_ledger(plan)
        self._ledger.restore(saved_at)

    @override
    def renew(self, attempt: int, world: int | None = None) -> None:
        """Raises:
        StateLost: ranks of another number are to make a step that is made in part.
        """
        ledger, steps = self.ledger, self.ledger.steps
        partial = isinstance(ledger, TaskLedger) and ledger.partial
        cut = partial and world not in (None, ledger.world)
        self._unstage()
        ledger.renew(attempt, None if cut else world)
        if cut:
            raise StateLost(f"the rest of step {steps} on {self._name}")

    def begin(self, version: int) -> None:
        """
        Go on from a version.

        Args:
            version: steps that the ranks have behind them.

        Raises:
            ProtocolError: the tables cannot be brought there.
        """
        ledger, plan = self.ledger, self.plan
        assert plan is not None, "nobody begins before `open`"
        here = ledger.steps
        if here == version or (ledger.asynchronous and here > version):
            return
        if here != version + 1 or not plan.rewinds:
            raise ProtocolError(f"{self._name} is at step {here}, the workers at {version}")
        self._step_back(version)
        if self.backup_link is not None:
            self.backup_link.send(StepBack(version))

    def push(self, push: PushId, gradient: Sequence[RowGradients], control: RowControl) -> Verdict:
        """
        Stage a rank's gradients.

        Args:
            push: its name.
            gradient: at most one of each table; they must not change until they are applied.
            control: what comes with them.

        Raises:
            ProtocolError: see `Ledger.offer`; nothing is changed.
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
        version, schedule_step, before = ledger.updates, ledger.schedule_step, ledger.steps
        if not ledger.commit(seq):
            return False
        staged = [] if self._skipped else sorted(self._staged.items())
        self._unstage()
        parts = [part for _, some in staged for part in some]
        by_table: TableRows = [
            [part for part in parts if part.table == number] for number in range(len(self.tables))
        ]
        if self.backup_link is not None:
            pairs = zip(self.tables, by_table, strict=True)
            by_table = [[table.summed(some)] if some else [] for table, some in pairs]
            push = self._pushed if ledger.asynchronous else None
            self.backup_link.send(Update(version, push, settings=self._settings), by_table)
        self._update(by_table, schedule_step, before)
        return True

    @override
    def pull(self, rank: int) -> int:
        return self.ledger.updates

    @override
    def head(self, control: RowControl) -> tuple[float, ...]:
        """The shards, or the ranks among themselves, decide on a step."""
        return ()

    @override
    def staleness_of(self, rank: int) -> int:
        """Of rows nobody counts it."""
        return 0

    @override
    def take_copies(self, version: int) -> Bundle | None:
        return self._copies.take(version, self.ledger.steps, self._copy)

    @override
    def worker(self, part_rank: int) -> str:
        return f"worker-{part_rank}"

    @override
    def log(self) -> None:
        """Of asynchronous tables no order is kept."""

    @override
    def snapshot(self) -> StoreSnapshot:
        tables = {table.spec.name: table.snapshot() for table in self.tables}
        attributes = {"plan": self.plan, "index": self.index, "_ledger": deepcopy(self._ledger)}
        return StoreSnapshot(tables, attributes)

    @override
    def load_snapshot(self, snapshot: StoreSnapshot) -> None:
        for name, value in snapshot.attributes.items():
            setattr(self, name, value)
        assert self.plan is not None, "only opened tables are copied"
        self._take_plan(self.plan)
        self.tables = [self._make_table(self.plan, spec) for spec in self.plan.tables]
        for table in self.tables:
            table.load(snapshot.vectors[table.spec.name])

    @override
    def follow(self, change: Change, gradient: TableRows) -> None:
        """`gradient` has the sum for each table that was used."""
        match change:
            case Renewal(plan=plan):
                self.plan = plan
                self.renew(plan.attempt, plan.world)
            case StepBack(version=version):
                self._step_back(version)
            case Update(version=version, push=push, settings=settings):
                ledger, self._settings = self.ledger, settings
                schedule_step, before = ledger.schedule_step, ledger.steps
                if push is None:
                    ledger.restore(version + 1)
                else:
                    ledger.offer(push)
                    ledger.commit(push.seq)
                self._update(gradient, schedule_step, before)

    def _update(self, by_table: TableRows, schedule_step: int, before: int) -> None:
        """
        Update the rows, and copy what a checkpoint of the step just made wants.

        Args:
            by_table: gradients.
            schedule_step: of the update in the learning rate's schedule.
            before: steps that were made before it.
        """
        assert self.plan is not None and self.plan.job.embeddings is not None, "it was opened"
        job, rule = self._job, self.plan.job.embeddings.optimizer
        if self._plateau is not None:
            self._plateau.known = PlateauState.of(self._settings)
        rate = job.lr_schedule.rate(rule.lr, schedule_step, self.plan.total_steps)
        for table, parts in zip(self.tables, by_table, strict=True):
            if parts:
                table.apply(parts, rate)
            else:
                table.forget()
        for version in range(before + 1, self.ledger.steps + 1):  # several, after a slow rank
            self._copies.copy_if_due(version, self._copy)

    def _copy(self) -> Bundle:
        return copies_of(self.tables, self.index)

    def _step_back(self, version: int) -> None:
        self.ledger.restore(version)
        for table in self.tables:
            table.rewind()

    def _check_shapes(self, gradients: Sequence[RowGradients]) -> None:
        """Refuse before anything is booked: in the middle of an update it would be too late."""
        for part in gradients:
            wanted = (len(part.ids), self.tables[part.table].spec.width)
            if part.values.shape != wanted:
                raise ValueError(f"gradients have shape {part.values.shape}, not {wanted}")

    def _take_plan(self, plan: TablePlan) -> None:
        self.plan, self._job = plan, plan.job.with_plateau()
        self._plateau = self._job.plateau
        self._copies = CheckpointCopies(plan.checkpoint_every, plan.total_steps)

    def _make_ledger(self, plan: TablePlan) -> Ledger:
        assert plan.job.embeddings is not None, "no servers without the field"
        kind = TaskLedger if plan.job.embeddings.asynchronous else StepLedger
        return kind(plan.run, plan.attempt, plan.world)

    def _make_table(self, plan: TablePlan, spec: TableSpec) -> Table:
        assert plan.job.embeddings is not None, "no servers without the field"
        rule = make_rule(plan.job.embeddings.optimizer)
        return Table(spec, plan.job.seed, rule, rewinds=plan.rewinds)

    def _make_tables(
        self, plan: TablePlan, files: Sequence[Mapping[str, RawTensor]]
    ) -> list[Table]:
        tables = []
        for spec in plan.tables:
            table = self._make_table(plan, spec)
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
    One server's part of all tables at work.

    Args:
        name: of the server, for messages.
        index: its number.
    """

    def __init__(self, name: str, index: int) -> None:
        super().__init__(name, TableStore(name, index), ServerLimits(0.0, 0.0))

    def open(
        self, plan: TablePlan, saved_at: int = 0, saved: Iterable[Mapping[str, RawTensor]] = ()
    ) -> int:
        """
        End the attempt before, and join this one; every rank calls this.

        Args:
            plan: the same from all ranks.
            saved_at: steps behind the checkpoint.
            saved: its files; not looked at where tables are there.

        Returns:
            Steps that the tables have behind them; without `begin` there will be no more.

        Raises:
            FencedError: a later attempt has begun.
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
                began = store.ledger.attempt
                raise FencedError(f"attempt {plan.attempt} refused: {began} began")
            elif plan.tables != store.plan.tables:
                raise ProtocolError(
                    f"the embedding tables are not those of the first rank to come: {plan.tables} "
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
        Have the tables at a version; every rank calls this, with the same one.

        Args:
            attempt: that it joined.
            version: steps that the ranks go on from.

        Raises:
            FencedError: a later attempt has begun.
            ProtocolError: the tables cannot be brought to this version.
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
        Write rows.

        Args:
            pull: its name; see `Server.pull`.
            table: number of the table.
            ids: shape [n].
            out: shape [n, width].
            again: `out` is not the worker's own memory, so it may be written a second time for
                one pull; else nothing is written, for the worker may be using it.

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
        Take a rank's gradients; return when they are applied. See `TableStore.push`.

        Raises:
            ProtocolError: the push must not be applied.
            DeadlineExceeded: ranks did not come; names them.
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

    def _patience(self, step: int) -> tuple[float, str]:
        """Give a step's deadline: tables have no values to bring before the first one."""
        return self._limits.step_s, "step_timeout_s"
