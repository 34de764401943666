"""
A server's tables that many workers call at once: locks, waits with deadlines, answers.

A server node and the fake in memory wrap the same service; how ids and rows travel is theirs.
A step's gradients are applied together when the last rank has pushed (`platform/ledger.py`); the
thread that brings them makes the update, the others wait.

    push(seq=version)  ──▶  all ranks there  ──▶  rewind possible to `version`  ──▶  version + 1
                                                  until the first push for `version + 1`

Asynchronous tables apply each push when it comes, as one update, and nobody waits.

A worker that was lost may leave the servers a step ahead of the survivors: all gradients were in,
the dense part was not. `open` for the next attempt then takes that one step back (I3).
"""

import threading
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from distplat.platform.checkpoints import is_due
from distplat.platform.errors import DeadlineExceeded, FencedError, ProtocolError, StaleError
from distplat.platform.learning_rate import factor
from distplat.platform.ledger import AsyncLedger, Ledger, PushId, Verdict
from distplat.platform.pieces import Bundle, Whole
from distplat.platform.table_plan import PullId, TablePlan, TableSpec
from distplat.strategies.sparse.files import packed_part
from distplat.strategies.sparse.routing import server_of
from distplat.strategies.sparse.rules import make_rule
from distplat.strategies.sparse.saved import copies_of, fill
from distplat.strategies.sparse.table import RowGradients, Table

_CREATED_AT_ONCE = 1 << 16


class TableService:
    """
    One server's part of all tables.

    Args:
        name: of the server, for messages.
        index: its number.
    """

    def __init__(self, name: str, index: int) -> None:
        self._name, self._index = name, index
        self._changed = threading.Condition()
        self._plan: TablePlan | None = None
        self._ledger: Ledger | AsyncLedger = Ledger("", -1, 0)
        self._tables: list[Table] = []
        self._staged: dict[int, Sequence[RowGradients]] = {}
        self._pulls: dict[int, int] = {}  #: rank -> number of its last pull
        self._kept: tuple[int, Bundle] | None = None  #: steps of the newest copies

    def open(
        self, plan: TablePlan, version: int, saved: Iterable[Mapping[str, Whole]] = ()
    ) -> None:
        """
        Begin an attempt, or join it; every rank calls this.

        Args:
            plan: the same from all ranks.
            version: steps that the ranks have behind them.
            saved: files of a checkpoint of that version; not looked at where tables are there.

        Raises:
            FencedError: a later attempt has begun.
            ProtocolError: another rank's model has other tables; or the tables cannot be brought
                to this version.
        """
        with self._changed:
            if plan.attempt < self._ledger.attempt:
                raise FencedError(f"attempt {plan.attempt} refused: {self._ledger.attempt} began")
            if self._plan is None:
                files = list(saved)
                self._tables = self._make_tables(plan, files)
                self._ledger.version = version if files else 0
            elif plan.tables != self._plan.tables:
                raise ProtocolError(
                    f"the embedding tables are not those of the first rank to come: {plan.tables} "
                    f"against {self._plan.tables}; model() must not depend on the process"
                )
            if plan.attempt > self._ledger.attempt:
                self._begin(plan, version)

    def pull(
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
            pull: its name.
            table: number of the table.
            ids: shape [n].
            out: shape [n, width].
            again: `out` is not the worker's own memory, so it may be written a second time for
                one pull; else nothing is written, for the worker may be using it.

        Raises:
            StaleError: the worker is past this pull.
            FencedError: it is one of another attempt.
        """
        with self._changed:
            if pull.attempt != self._ledger.attempt:
                raise FencedError(f"pull of attempt {pull.attempt} refused by {self._name}")
            last = self._pulls.get(pull.rank, -1)
            if pull.number < last:
                raise StaleError(f"pull {pull.number} of rank {pull.rank} refused: it has gone on")
            if again or pull.number > last:
                self._tables[table].read(ids, out)
                self._pulls[pull.rank] = pull.number

    def push(self, push: PushId, gradients: Sequence[RowGradients]) -> int:
        """
        Take a rank's gradients; return when they are applied: asynchronous tables do that at once,
        others when the last rank has pushed.

        Args:
            push: its name.
            gradients: at most one of each table; they must not change until this returns.

        Returns:
            Updates that the tables have behind them.

        Raises:
            ProtocolError: the push must not be applied.
            DeadlineExceeded: ranks did not come; names them.
        """
        with self._changed:
            self._check_shapes(gradients)
            ledger = self._ledger
            verdict = ledger.offer(push)
            if verdict is Verdict.NEW:
                self._staged[push.rank] = gradients
            if isinstance(ledger, AsyncLedger):
                self._apply(push.seq)  # of a repeat: nothing is staged
                self._keep()
                return ledger.version or 0
            if verdict is Verdict.NEW and ledger.complete:
                self._apply(push.seq)
                ledger.commit(push.seq)
                self._keep()
            self._wait_for_step(ledger, push)
            return ledger.version or 0

    def kept(self, version: int, limit_s: float) -> tuple[int, Bundle | None]:
        """
        Give what was kept of a version, and forget it; wait at most so long for slower ranks.

        Returns:
            Steps that the slowest rank has made, and the copies; None: they are not here.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._steps >= version, limit_s)
            if self._kept is None or self._kept[0] != version:
                return self._steps, None
            (_, bundle), self._kept = self._kept, None
            return self._steps, bundle

    def sizes(self) -> list[tuple[TableSpec, int]]:
        """See `PartSource`."""
        with self._changed:
            return [(table.spec, len(table)) for table in self._tables]

    def part(self, table: int, first: int, count: int) -> bytes:
        """See `PartSource`."""
        with self._changed:
            return packed_part(self._tables[table], first, count)

    @property
    def _steps(self) -> int:
        """Steps of the slowest rank that are applied."""
        ledger = self._ledger
        return ledger.done if isinstance(ledger, AsyncLedger) else ledger.version or 0

    def _keep(self) -> None:
        """Copy the tables, if a checkpoint is due of the step that was just made."""
        assert self._plan is not None, "the ledger refuses pushes before `open`"
        newer = self._kept is None or self._steps > self._kept[0]
        if newer and is_due(self._steps, self._plan.checkpoint_every, self._plan.total_steps):
            self._kept = self._steps, copies_of(self._tables, self._index)
        self._changed.notify_all()

    def _check_shapes(self, gradients: Sequence[RowGradients]) -> None:
        """Refuse before anything is booked: in the middle of an update it would be too late."""
        for part in gradients:
            wanted = (len(part.ids), self._tables[part.table].spec.width)
            if part.values.shape != wanted:
                raise ValueError(f"gradients have shape {part.values.shape}, not {wanted}")

    def _wait_for_step(self, ledger: Ledger, push: PushId) -> None:
        assert self._plan is not None, "the ledger refuses pushes before `open`"
        limit = self._plan.job.failure.step_timeout_s

        def over() -> bool:
            return self._ledger is not ledger or (ledger.version or 0) > push.seq

        if not self._changed.wait_for(over, limit):
            late = tuple(f"worker-{rank}" for rank in ledger.missing())
            what = f"push {push.seq} to {self._name}"
            raise DeadlineExceeded(what, late, limit, "failure.step_timeout_s")
        if self._ledger is not ledger:
            raise FencedError(f"push {push.seq} given up: attempt {self._ledger.attempt} began")

    def _make_tables(self, plan: TablePlan, files: Sequence[Mapping[str, Whole]]) -> list[Table]:
        job, tables = plan.job, []
        assert job.embeddings is not None, "no servers without the field"
        rule = make_rule(job.embeddings.optimizer)
        for spec in plan.tables:
            table = Table(spec, job.seed, rule, rewinds=plan.rewinds)
            for first in range(0, (spec.rows or 0) if spec.whole else 0, _CREATED_AT_ONCE):
                ids = np.arange(first, min(first + _CREATED_AT_ONCE, spec.rows or 0))
                table.create(ids[server_of(plan, spec, ids) == self._index])
            fill(table, plan, self._index, files)
            tables.append(table)
        return tables

    def _begin(self, plan: TablePlan, version: int) -> None:
        """Bring the tables to `version`, and take pushes of this attempt from now on."""
        here = self._ledger.version or 0
        if here == version + 1 and plan.rewinds:
            for table in self._tables:
                table.rewind()
        elif here != version:
            raise ProtocolError(f"{self._name} is at step {here}, the workers at {version}")
        self._plan = plan
        assert plan.job.embeddings is not None, "no servers without the field"
        kind = AsyncLedger if plan.job.embeddings.asynchronous else Ledger
        self._ledger = kind(plan.run, plan.attempt, plan.world)
        if isinstance(self._ledger, AsyncLedger):
            self._ledger.restore(version, version)
        else:
            self._ledger.restore(version)
        self._staged.clear()
        self._pulls.clear()
        self._changed.notify_all()  # who waits for the attempt before

    def _apply(self, step: int) -> None:
        assert self._plan is not None, "the ledger refuses pushes before `open`"
        job = self._plan.job
        assert job.embeddings is not None, "no servers without the field"
        rate = job.embeddings.optimizer.lr * factor(job.lr_schedule, step, self._plan.total_steps)
        for number, table in enumerate(self._tables):
            parts = [
                g for _, some in sorted(self._staged.items()) for g in some if g.table == number
            ]
            parts = [part for part in parts if len(part.ids)]
            table.forget()
            if parts:
                table.apply(parts, rate, step)
        self._staged.clear()
