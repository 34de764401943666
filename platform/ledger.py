"""
The ledger of one shard: which pushes it has, and which it must not take (invariants I1, I3, I6).

A synchronous shard lives through the same three moments for every step. `version` counts the
updates it has applied, so it is also the sequence number of the pushes it waits for:

            push(seq=version)           all ranks staged            commit(seq=version)
    WAITING -----------------> STAGING ------------------> STAGED ---------------------> WAITING
                                                                                version += 1

Ray delivers a call at least once. What may arrive twice is answered as the first time; what would
lose a push or count one twice is refused. The memory is O(ranks), however long the run is.
"""

from dataclasses import dataclass
from enum import Enum

from distplat.platform.errors import FencedError, GapError, NotReadyError, StaleError


@dataclass(frozen=True)
class PushId:
    """Names one push, once and for all; the shard adds its own index."""

    job: str
    attempt: int
    """Generation of the job: grows at each recovery."""
    rank: int
    seq: int
    """Number of this worker's push, from 0; in synchronous strategies the step."""


class Verdict(Enum):
    """What a shard does with a push that it does not refuse."""

    NEW = "stage it"
    REPEAT_STAGED = "it is staged already"
    REPEAT_COMMITTED = "its step is committed already"


class Ledger:
    """Book of one synchronous shard. Starts unready: without parameters it takes nothing."""

    def __init__(self, job: str, attempt: int, world: int) -> None:
        self.job, self.attempt, self.world = job, attempt, world
        self.version: int | None = None  #: updates applied; None: no parameters yet
        self._staged: set[int] = set()  #: ranks whose push for `version` is here

    def restore(self, version: int) -> None:
        """Parameters of this version are in place; from now on pushes are taken."""
        self.version = version
        self._staged.clear()

    def offer(self, push: PushId) -> Verdict:
        """
        Decide on a push and book it.

        Raises:
            NotReadyError: no parameters yet.
            FencedError: another job or attempt, or no rank of this world.
            StaleError: older than the last committed push.
            GapError: newer than the one expected.
        """
        version = self._ready()
        if (push.job, push.attempt) != (self.job, self.attempt):
            raise FencedError(
                f"push of job {push.job!r} attempt {push.attempt} refused: "
                f"this shard serves {self.job!r} attempt {self.attempt}"
            )
        if not 0 <= push.rank < self.world:
            raise FencedError(f"push of rank {push.rank} refused: the world has {self.world}")
        if push.seq == version:
            if push.rank in self._staged:
                return Verdict.REPEAT_STAGED
            self._staged.add(push.rank)
            return Verdict.NEW
        if push.seq == version - 1:
            return Verdict.REPEAT_COMMITTED
        kind = GapError if push.seq > version else StaleError
        raise kind(f"push {push.seq} of rank {push.rank} refused: expected {version}")

    @property
    def complete(self) -> bool:
        """Whether every rank's push for the present version is staged."""
        return len(self._staged) == self.world

    def missing(self) -> list[int]:
        """Ranks whose push for the present version has not come."""
        return [rank for rank in range(self.world) if rank not in self._staged]

    def commit(self, seq: int) -> bool:
        """
        Book the update of step `seq`. False: it is booked already and must not be applied again.

        Raises:
            NotReadyError: no parameters yet.
            StaleError, GapError: not the step that is staged.
        """
        version = self._ready()
        if seq == version - 1:
            return False
        if seq < version:
            raise StaleError(f"commit {seq} refused: version is {version}")
        if seq > version or not self.complete:
            raise GapError(f"commit {seq} refused: version is {version}, missing {self.missing()}")
        self.version = version + 1
        self._staged.clear()
        return True

    def _ready(self) -> int:
        if self.version is None:
            raise NotReadyError("this shard has no parameters yet; it must be restored first")
        return self.version
