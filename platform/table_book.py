"""
How far one server's embedding tables are, and which pushes they must not take.

                    a step is made                       counted are
    synchronous     when every rank has pushed           steps
    asynchronous    with its last task; each push is     tasks: part p of step s of N is
                    an update of its own                 task s * N + p

Where tasks are leased (`task_scheduler.py`) a push names its own; elsewhere it is of the rank's
part of the step. Of each task the first push counts: what is pushed again after a failure changes
nothing.
"""

from distplat.platform.errors import ProtocolError, StateLost
from distplat.platform.ledger import Ledger, PushId, TaskLedger, Verdict
from distplat.platform.table_plan import TablePlan


class TableBook:
    """
    The book of one server's tables.

    Args:
        server: its name, for messages.
        plan: of the first attempt.
        steps: that the tables have behind them.
    """

    def __init__(self, server: str, plan: TablePlan, steps: int = 0) -> None:
        self._server, self._world = server, plan.world
        self._rewinds = plan.rewinds
        assert plan.job.embeddings is not None, "no servers without the field"
        self._tasks = TaskLedger(plan.run, plan.attempt)
        self._ranks = Ledger(plan.run, plan.attempt, plan.world)
        self.asynchronous = plan.job.embeddings.asynchronous
        self._restore(steps)

    @property
    def attempt(self) -> int:
        """Whose pushes are taken."""
        return self._ranks.attempt

    @property
    def steps(self) -> int:
        """Steps of which every rank's gradients are applied."""
        if self.asynchronous:
            return self._tasks.made.low // self._world
        return self._ranks.version or 0

    @property
    def updates(self) -> int:
        """Updates that the tables have behind them."""
        return (self._tasks if self.asynchronous else self._ranks).version or 0

    @property
    def place(self) -> int:
        """Of the next update, in steps: for the learning rate's schedule."""
        return self.updates // self._world if self.asynchronous else self.updates

    def renew(self, attempt: int, world: int) -> None:
        """
        Begin a later attempt: pushes of earlier ones are refused.

        Args:
            attempt: its number.
            world: its ranks.

        Raises:
            StateLost: ranks of another number are to make a step that is made in part.
        """
        steps, more = divmod(self._tasks.made.low, self._world)
        cut = bool(more or self._tasks.made.above)
        self._tasks.renew(attempt)
        self._ranks.renew(attempt, world)
        before, self._world = self._world, world
        if self.asynchronous and world != before:
            if cut:
                raise StateLost(f"the rest of step {steps} on {self._server}")
            self._restore(steps)

    def begin(self, version: int) -> bool:
        """
        Go on from a version; say whether the last step is to be taken back.

        Raises:
            ProtocolError: the tables cannot be brought there.
        """
        here = self.steps
        if here == version or (self.asynchronous and here > version):
            return False
        if here == version + 1 and self._rewinds:
            self._restore(version)
            return True
        raise ProtocolError(f"{self._server} is at step {here}, the workers at {version}")

    def offer(self, push: PushId) -> Verdict:
        """See `Ledger` and `TaskLedger`."""
        if not self.asynchronous:
            return self._ranks.offer(push)
        task = push.seq * self._world + push.rank if push.task is None else push.task
        return self._tasks.offer(PushId(push.job, push.attempt, push.rank, push.seq, task))

    @property
    def complete(self) -> bool:
        """Whether what was offered last is to be applied now."""
        return self.asynchronous or self._ranks.complete

    def commit(self, push: PushId) -> None:
        """Book the update that this push has completed."""
        if not self.asynchronous:
            self._ranks.commit(push.seq)

    def missing(self) -> list[int]:
        """Ranks that the step being made waits for."""
        return self._ranks.missing()

    def passed(self, push: PushId) -> bool:
        """Whether the update is made that a push is part of."""
        return self.asynchronous or self.steps > push.seq

    def _restore(self, steps: int) -> None:
        self._ranks.restore(steps)
        self._tasks.restore(steps * self._world, steps * self._world)
