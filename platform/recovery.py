"""
Decides whether a job restarts after a failure, and after which delay: the restart budget (I10).

    failure at step    7      7       7       9      12
    delay              0 s    1 s     job     0 s    0 s     after progress a job restarts at once;
                                      fails                  repeated failures at the same step
                                                             are delayed, and then end the job

Preemptions are counted separately from failures. Progress refills both budgets: each 100 new steps
return one failure and one preemption, so that a run of weeks does not end because of failures in
its first days. The steps of a train function are its reports, and a long run may have few of them;
so each checkpoint that a train function reports beyond the previous highest step also returns one.
"""

from collections import deque
from collections.abc import Set
from dataclasses import dataclass

from distplat.platform.errors import (
    ActorLost,
    DeadlineExceeded,
    DistplatError,
    InfrastructureError,
    MismatchError,
    NonFiniteError,
    SpecError,
    StorageError,
    UserCodeError,
)
from distplat.platform.spec import Failure


def is_recoverable(error: DistplatError) -> bool:
    """Return whether a restart may help; a worker that started too late would be too late again."""
    if isinstance(error, MismatchError):
        return False
    if isinstance(error, DeadlineExceeded) and error.setting == "failure.start_timeout_s":
        return False
    return isinstance(error, InfrastructureError)


def error_priority(error: DistplatError) -> int:
    """
    Return how well an error explains a failed job; root causes rank above their consequences.

    A rank that fails leaves its peers in operations that break, and the errors of these peers may
    arrive first.
    """
    match error:
        case UserCodeError() | SpecError() | NonFiniteError() | StorageError():
            return 3
        case ActorLost():
            return 2
        case DeadlineExceeded() | MismatchError():
            return 1
        case _:
            return 0


MIN_DELAY_S = 1.0
MAX_DELAY_S = 60.0
_MAX_LISTED = 100
"""Most failures that an error lists."""
STEPS_PER_REFILL = 100
"""New steps, beyond the highest step so far, that return one failure and one preemption."""
SAME_STEP_LIMIT = 3
"""Failures at the same step that end the job."""
COORDINATORS = frozenset({"server-manager", "task-scheduler"})
"""Roles without state of their own: servers and workers can restore what they know."""


@dataclass(frozen=True)
class Policy:
    """Which failures a job recovers from."""

    max_failures: int = 0
    max_preemptions: int = 0
    survives_worker_loss: bool = False
    """Whether surviving ranks keep their state; else all ranks return to a checkpoint."""
    allows_restart_from_scratch: bool = True
    """Whether the job may restart without the state of a lost server."""
    holders: tuple[tuple[int, ...], ...] = ()
    """For each part of the model, the ranks that hold it, of which one must survive. Empty: every
    rank holds the whole model."""

    def has_all(self, ranks: Set[int]) -> bool:
        """Return whether these ranks together hold the whole model."""
        if not self.holders:
            return bool(ranks)
        return all(any(rank in ranks for rank in peers) for peers in self.holders)


def policy_of(
    failure: Failure,
    survives_worker_loss: bool,
    checkpoints: bool = False,
    holders: tuple[tuple[int, ...], ...] = (),
) -> Policy:
    """
    Return the policy of a job, with defaults for fields that the job leaves out.

    Where survivors keep their state, a restart costs seconds, and with checkpoints the steps since
    the last one. Otherwise a restart loses all progress, so it must be requested explicitly.
    """
    defaults = (3, 100) if survives_worker_loss or checkpoints else (0, 0)
    failures, preemptions = failure.max_failures, failure.max_preemptions
    return Policy(
        defaults[0] if failures is None else failures,
        defaults[1] if preemptions is None else preemptions,
        survives_worker_loss,
        allows_restart_from_scratch=failures is not None or checkpoints,
        holders=holders,
    )


@dataclass(frozen=True)
class Restart:
    """How a job continues after a failure or a resize."""

    attempt: int
    """Number of the next attempt."""
    replace: tuple[int, ...]
    """Ranks whose processes are replaced; all other ranks keep theirs."""
    restarts_all: bool
    """Whether servers are replaced too, and all ranks start from the last checkpoint or from
    scratch."""
    wait_s: float
    coordinators: tuple[str, ...] = ()
    """Coordinators that are replaced although the rest continues: see `COORDINATORS`."""
    world: int | None = None
    """Number of ranks in the next attempt; None: unchanged."""


class Budget:
    """Counts failures against a policy."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self.failures: deque[str] = deque(maxlen=_MAX_LISTED)  #: descriptions of the last failures
        self._attempt = 0
        self._failures = 0
        self._preemptions = 0
        self._credited_to = 0  #: highest step that was already credited
        self._saved_to = 0  #: highest step whose checkpoint was already credited
        self._last_step = -1
        self._at_same_step = 0
        self._counted = False  #: whether the last failure was counted
        self._dead_nodes = set[str]()

    def _already_counted(self, consequence: bool, node: str) -> bool:
        """Return whether an earlier failure already accounts for this one."""
        if node in self._dead_nodes:  # Ray starts processes on a dead node until it notices
            return True
        self._dead_nodes |= {node} - {""}
        paid = consequence and self._counted
        self._counted = not paid
        return paid

    def spend(
        self, step: int, cause: str, preempted: bool, *, consequence: bool = False, node: str = ""
    ) -> float | str:
        """
        Count one more failure.

        Args:
            step: highest step that was done.
            cause: description of the failure.
            preempted: whether the machine was preempted.
            consequence: whether survivors only found out that state was lost with an earlier
                failure. It is not counted if that failure was.
            node: the node whose death caused the failure; each dead node counts once.

        Returns:
            Seconds to wait before the restart, or the reason why the job must end.
        """
        self.failures.append(f"attempt {self._attempt}, after step {step}: {cause}")
        self._attempt += 1
        if self._already_counted(consequence, node):
            return 0.0
        self._refill_for_steps(step)
        self._saved_to = max(self._saved_to, step)
        if preempted:
            self._preemptions += 1
            if self._preemptions > self._policy.max_preemptions:
                return f"preempted more than {self._policy.max_preemptions} times"
            return 0.0
        self._failures += 1
        self._at_same_step = self._at_same_step + 1 if step == self._last_step else 1
        self._last_step = step
        if self._failures > self._policy.max_failures:
            return f"`failure.max_failures` is {self._policy.max_failures}"
        if self._at_same_step >= SAME_STEP_LIMIT:
            return f"failed {SAME_STEP_LIMIT} times after step {step}, without a step between"
        if self._at_same_step == 1:
            return 0.0
        return float(min(MAX_DELAY_S, MIN_DELAY_S * 2 ** (self._at_same_step - 2)))

    def _refill_for_steps(self, step: int) -> None:
        """Refill the budget for new steps; repeated steps do not count again."""
        if not self._failures and not self._preemptions:
            self._credited_to = max(self._credited_to, step)
            return
        refills = max(0, step - self._credited_to) // STEPS_PER_REFILL
        self._credited_to += refills * STEPS_PER_REFILL
        self._refill(refills)

    def checkpoint_saved(self, step: int) -> None:
        """
        Refill by one for a checkpoint that a train function reported.

        Args:
            step: of the checkpoint. Checkpoints up to the highest earlier checkpoint or failure
                count as repeated work, not as progress.
        """
        if step > self._saved_to:
            self._saved_to = step
            self._refill(1)

    def _refill(self, count: int) -> None:
        self._failures = max(0, self._failures - count)
        self._preemptions = max(0, self._preemptions - count)
