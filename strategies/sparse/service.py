"""
A server's tables that many workers call at once: locks, waits with deadlines, answers.

How ids and rows travel is the server node's. A step's gradients are applied together when the last
rank has pushed (`platform/table_book.py`); the thread that brings them makes the update, the others
wait.

    push(seq=version)  ──▶  all ranks there  ──▶  rewind possible to `version`  ──▶  version + 1
                                                  until the first push for `version + 1`

Asynchronous tables apply each push when it comes, as one update, and nobody waits.

A worker that was lost may leave the servers a step ahead of the others: all gradients were in, the
dense part was not. So an attempt begins in two calls. `open` ends the attempt before, from when on
no step is made, and tells how far this server is; `begin` takes one step back where others have not
come as far (I3). Between them the ranks learn how far everybody is.
"""

import threading
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from distplat.platform.errors import DeadlineExceeded, FencedError, ProtocolError, StaleError
from distplat.platform.ledger import PushId, Verdict
from distplat.platform.optimizers import factor
from distplat.platform.table_book import TableBook
from distplat.platform.table_plan import PullId, TablePlan, TableSpec
from distplat.platform.tensor_slices import Bundle, RawTensor
from distplat.strategies.sparse.files import packed_part
from distplat.strategies.sparse.routing import server_of
from distplat.strategies.sparse.rules import make_rule
from distplat.strategies.sparse.saved import copies_of, fill
from distplat.strategies.sparse.table import RowGradients, Table
from distplat.strategies.training.checkpoint_copies import CheckpointCopies

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
        self._book: TableBook | None = None  #: None: nobody has opened the tables
        self._tables: list[Table] = []
        self._staged: dict[int, Sequence[RowGradients]] = {}
        self._skipped = False  #: whether some rank has the step under way left out
        self._pulls: dict[int, int] = {}  #: rank -> number of its last pull
        self._keeping = CheckpointCopies[Bundle](0, 0)

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
            StateLost: see `TableBook.renew`.
        """
        with self._changed:
            if self._plan is None or self._book is None:
                self._tables = self._make_tables(plan, list(saved))
                self._plan, self._book = plan, TableBook(self._name, plan, saved_at)
                self._keeping = CheckpointCopies(plan.checkpoint_every, plan.total_steps)
            elif plan.attempt < self._book.attempt:
                raise FencedError(f"attempt {plan.attempt} refused: {self._book.attempt} began")
            elif plan.tables != self._plan.tables:
                raise ProtocolError(
                    f"the embedding tables are not those of the first rank to come: {plan.tables} "
                    f"against {self._plan.tables}; model() must not depend on the process"
                )
            if plan.attempt > self._book.attempt:
                self._plan = plan
                self._unstage()
                self._pulls.clear()
                self._changed.notify_all()  # who waits for the attempt before
                self._book.renew(plan.attempt, plan.world)
            return self._book.steps

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
            if self._opened(attempt, "a begin").begin(version):
                for table in self._tables:
                    table.rewind()

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
            self._opened(pull.attempt, "a pull")
            last = self._pulls.get(pull.rank, -1)
            if pull.number < last:
                raise StaleError(f"pull {pull.number} of rank {pull.rank} refused: it has gone on")
            if again or pull.number > last:
                self._tables[table].read(ids, out)
                self._pulls[pull.rank] = pull.number

    def push(self, push: PushId, gradients: Sequence[RowGradients], skip: bool = False) -> int:
        """
        Take a rank's gradients; return when they are applied: asynchronous tables do that at once,
        others when the last rank has pushed.

        Args:
            push: its name.
            gradients: at most one of each table; they must not change until this returns.
            skip: leave the step out, whatever other ranks push: it is counted as made, and rows,
                their optimizer's states and its count of updates stay as they are.

        Returns:
            Updates that the tables have behind them.

        Raises:
            ProtocolError: the push must not be applied.
            DeadlineExceeded: ranks did not come; names them.
        """
        with self._changed:
            book = self._opened(push.attempt, "a push")
            self._check_shapes(gradients)
            place, before = book.place, book.steps
            if book.offer(push) is Verdict.NEW:
                self._staged[push.rank] = gradients
                self._skipped |= skip
                if book.complete:
                    self._apply(place)
                    book.commit(push)
                    self._keep(before, book.steps)
            self._wait_for_step(book, push)
            return book.updates

    def kept(self, version: int, limit_s: float) -> tuple[int, Bundle | None]:
        """
        Give what was kept of a version, and forget it; wait at most so long for slower ranks.

        Returns:
            Steps that the slowest rank has made, and the copies; None: they are not here.
        """
        with self._changed:
            self._changed.wait_for(lambda: self.steps >= version, limit_s)
            return self.steps, self._keeping.give(version)

    def sizes(self) -> list[tuple[TableSpec, int]]:
        """See `PartSource`."""
        with self._changed:
            return [(table.spec, len(table)) for table in self._tables]

    def part(self, table: int, first: int, count: int) -> bytes:
        """See `PartSource`."""
        with self._changed:
            return packed_part(self._tables[table], first, count)

    @property
    def steps(self) -> int:
        """Steps of which every rank's gradients are applied."""
        return self._book.steps if self._book is not None else 0

    def _opened(self, attempt: int, what: str) -> TableBook:
        """Give the book, to a rank of the present attempt."""
        if self._book is None or attempt != self._book.attempt:
            raise FencedError(f"{what} of attempt {attempt} refused by {self._name}")
        return self._book

    def _keep(self, before: int, now: int) -> None:
        """Copy the tables, if a checkpoint is due of a step that was just made."""
        for version in range(before + 1, now + 1):  # several, where the slowest rank was late
            self._keeping.reached(version, lambda: copies_of(self._tables, self._index))
        self._changed.notify_all()

    def _check_shapes(self, gradients: Sequence[RowGradients]) -> None:
        """Refuse before anything is booked: in the middle of an update it would be too late."""
        for part in gradients:
            wanted = (len(part.ids), self._tables[part.table].spec.width)
            if part.values.shape != wanted:
                raise ValueError(f"gradients have shape {part.values.shape}, not {wanted}")

    def _wait_for_step(self, book: TableBook, push: PushId) -> None:
        assert self._plan is not None, "nobody pushes before `open`"
        limit = self._plan.job.failure.step_timeout_s

        def over() -> bool:
            return book.attempt != push.attempt or book.passed(push)

        if not self._changed.wait_for(over, limit):
            late = tuple(f"worker-{rank}" for rank in book.missing())
            what = f"push {push.seq} to {self._name}"
            raise DeadlineExceeded(what, late, limit, "failure.step_timeout_s")
        if book.attempt != push.attempt:
            raise FencedError(f"push {push.seq} given up: attempt {book.attempt} began")

    def _make_tables(
        self, plan: TablePlan, files: Sequence[Mapping[str, RawTensor]]
    ) -> list[Table]:
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

    def _apply(self, place: int) -> None:
        """Make an update of what is staged, at this place of the learning rate's schedule."""
        assert self._plan is not None, "nobody pushes before `open`"
        job = self._plan.job
        assert job.embeddings is not None, "no servers without the field"
        rate = job.embeddings.optimizer.lr * factor(job.lr_schedule, place, self._plan.total_steps)
        for number, table in enumerate(self._tables):
            staged = [] if self._skipped else sorted(self._staged.items())
            parts = [given for _, some in staged for given in some if given.table == number]
            if parts:
                table.apply(parts, rate)
            else:
                table.forget()
        self._unstage()

    def _unstage(self) -> None:
        self._staged.clear()
        self._skipped = False
