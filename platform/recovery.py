"""
Whether a run goes on after a failure, and how long it waits before: the restart budget (I10).

    failure at step    7      7       7       9      12
    waits              0 s    1 s     gives   0 s    0 s     a run that makes progress goes on at
                                      up                     once; one that fails again where it
                                                             failed before waits, then gives up

A machine that its owner takes away (preemption) is nobody's failure, and has a budget of its own.
Progress fills both up again: for each hundred new steps one failure and one preemption are given
back, so that a run of weeks does not end of what happened in its first days. The steps of a train
function are its reports, of which a long run may have few: each checkpoint that it reports past the
furthest step before gives one back, too.
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
    """Say whether a restart could help; one that was late to start would be late again."""
    if isinstance(error, MismatchError):
        return False
    if isinstance(error, DeadlineExceeded) and error.setting == "failure.start_timeout_s":
        return False
    return isinstance(error, InfrastructureError)


def error_priority(error: DistplatError) -> int:
    """
    How well an error explains a failed run: what no other process has caused comes first.

    A rank that comes out leaves others in operations that break, and theirs may be heard before.
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


FIRST_WAIT_S = 1.0
LONGEST_WAIT_S = 60.0
_TOLD = 100
"""Failures that an error tells of at most."""
STEPS_FOR_ONE = 100
"""Steps, beyond the furthest one so far, for which a failure and a preemption are given back."""
SAME_STEP_LIMIT = 3
"""Failures at the same step that end the run: another attempt would fail there, too."""
COORDINATORS = frozenset({"server-manager", "task-scheduler"})
"""What they know, they can be told again by the servers and the workers: without them no state is
lost."""


@dataclass(frozen=True)
class Policy:
    """Which failures a job allows, and what they may cost."""

    max_failures: int = 0
    max_preemptions: int = 0
    survives_worker_loss: bool = False
    """Whether ranks that were not lost keep their state; else all go back to a checkpoint."""
    allows_restart_from_scratch: bool = True
    """Whether the loss of a server, and of what it kept, may cost the run so far."""
    holders: tuple[tuple[int, ...], ...] = ()
    """For each part of the model, the ranks that have it; of each one must be left to go on.
    Empty: every rank has all."""

    def has_all(self, ranks: Set[int]) -> bool:
        """Whether these ranks together have the whole model."""
        if not self.holders:
            return bool(ranks)
        return all(any(rank in ranks for rank in some) for some in self.holders)


def policy_of(
    failure: Failure,
    survives_worker_loss: bool,
    checkpoints: bool = False,
    holders: tuple[tuple[int, ...], ...] = (),
) -> Policy:
    """
    Fill in what a job leaves open.

    Where survivors keep their state a restart costs seconds, with checkpoints the steps since the
    last one; elsewhere it costs the whole run so far, and must be asked for.
    """
    by_default = (3, 100) if survives_worker_loss or checkpoints else (0, 0)
    failures, preemptions = failure.max_failures, failure.max_preemptions
    return Policy(
        by_default[0] if failures is None else failures,
        by_default[1] if preemptions is None else preemptions,
        survives_worker_loss,
        allows_restart_from_scratch=failures is not None or checkpoints,
        holders=holders,
    )


@dataclass(frozen=True)
class Restart:
    """How a run goes on."""

    attempt: int
    """Its number from now on."""
    replace: tuple[int, ...]
    """Ranks that are made anew; the others keep their processes."""
    restarts_all: bool
    """Servers are made anew too; all begin from the last checkpoint, or from the first step."""
    wait_s: float
    coordinators: tuple[str, ...] = ()
    """Roles that are made anew, too, though all else goes on: see `COORDINATORS`."""
    world: int | None = None
    """How many ranks there are from now on; None: as many as before."""


class Budget:
    """
    Counts failures against a policy.

    Args:
        policy: what the job allows.
    """

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self.failures: deque[str] = deque(maxlen=_TOLD)  #: the last failures, in words
        self._attempt = 0
        self._failures = 0
        self._preemptions = 0
        self._credited_to = 0  #: steps for which something was given back, or nothing was to be
        self._saved_to = 0  #: checkpoints up to this step give nothing back
        self._last_step = -1
        self._at_same_step = 0
        self._counted = False  #: whether the last one was
        self._dead_nodes = set[str]()

    def _is_paid(self, consequence: bool, node: str) -> bool:
        """Say whether a failure before has paid for this one."""
        if node in self._dead_nodes:  # Ray starts processes on a dead node until it knows
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
            step: steps that were done; how far the run has come.
            cause: what happened.
            preempted: the machine was taken away.
            consequence: nothing more was lost: survivors found out what was lost with the others.
                It is free once after a failure that was paid for.
            node: that died, and the process with it; it is paid for once.

        Returns:
            Seconds to wait before going on, or why the run must end.
        """
        self.failures.append(f"attempt {self._attempt}, after step {step}: {cause}")
        self._attempt += 1
        if self._is_paid(consequence, node):
            return 0.0
        self._give_back(step)
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
        return float(min(LONGEST_WAIT_S, FIRST_WAIT_S * 2 ** (self._at_same_step - 2)))

    def _give_back(self, step: int) -> None:
        """Fill up for the steps that were made since; those that are made again count once."""
        if not self._failures and not self._preemptions:
            self._credited_to = max(self._credited_to, step)
            return
        earned = max(0, step - self._credited_to) // STEPS_FOR_ONE
        self._credited_to += earned * STEPS_FOR_ONE
        self._fill_up(earned)

    def checkpoint_saved(self, step: int) -> None:
        """
        Give one back for a checkpoint that a train function has reported.

        Args:
            step: of the checkpoint. Where one of it or of a later step has come before, or a
                failure, its steps were made again, which is no progress.
        """
        if step > self._saved_to:
            self._saved_to = step
            self._fill_up(1)

    def _fill_up(self, count: int) -> None:
        self._failures = max(0, self._failures - count)
        self._preemptions = max(0, self._preemptions - count)
