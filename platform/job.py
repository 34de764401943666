"""
The controller's brain: what the state of a run makes of each piece of news.

    STARTING --all ranks stepped--> RUNNING --all ranks finished--> SUCCEEDED
        |                              |
        +------- a failure ------------+--> SETTLING --better explanation, or time up--> FAILED

One failure brings others: a rank that raises leaves its peers in a collective that then breaks.
So a failure of the platform waits `SETTLE_S` for a better explanation, a user's error waits for
nothing. The class reads no clock and talks to nobody: `now` comes in, a `Decision` goes out.
"""

from dataclasses import dataclass
from enum import Enum

from distplat.platform.errors import ActorLost, DeadlineExceeded, DistplatError, UserCodeError
from distplat.platform.spec import Failure

SETTLE_S = 2.0
"""How long a broken peer may take to say why; a death is seen by polling, well within it."""
STALL_GRACE = 1.25
"""A stalled rank is given this much more than `step_timeout_s`: its peers' own time-outs inside
the exchange come first and know more."""


class Phase(Enum):
    """Where a run stands."""

    STARTING = "starting"
    RUNNING = "running"
    SETTLING = "settling"
    SUCCEEDED = "succeeded"
    FAILED = "failed"


@dataclass(frozen=True)
class Heard:
    """An answer of a rank. `progress` counts its beats: it grows while the rank is at work."""

    rank: int
    progress: int
    step: int
    """Steps done."""
    finished: bool


@dataclass(frozen=True)
class Failed:
    """A rank or a part of the server group reported an error, or was found dead."""

    role: str
    error: DistplatError


@dataclass(frozen=True)
class Unanswered:
    """A role has not answered for `seconds`."""

    role: str
    seconds: float


@dataclass(frozen=True)
class Tick:
    """Time passed."""


Event = Heard | Failed | Unanswered | Tick


class JobState:
    """
    State of one run.

    Args:
        world: number of ranks.
        limits: the deadlines of the job.
        now: seconds on any clock that never goes back.
    """

    def __init__(self, world: int, limits: Failure, now: float) -> None:
        self.phase = Phase.STARTING
        self.error: DistplatError | None = None  #: the best explanation so far
        self._limits = limits
        self._started_at = now
        self._failed_at = 0.0
        self._progress = dict.fromkeys(range(world), 0)
        self._moved_at = dict.fromkeys(range(world), now)  #: when `progress` last grew, by rank
        self._steps = dict.fromkeys(range(world), 0)
        self._finished: set[int] = set()

    @property
    def over(self) -> bool:
        """Whether nothing more can happen."""
        return self.phase in (Phase.SUCCEEDED, Phase.FAILED)

    @property
    def steps_done(self) -> int:
        """Steps that every rank has done."""
        return min(self._steps.values())

    def handle(self, event: Event, now: float) -> None:
        """Take one piece of news."""
        if self.over:
            return
        match event:
            case Heard():
                self._hear(event, now)
            case Failed(error=error):
                self._fail(error, now)
            case Unanswered(role=role, seconds=seconds):
                if seconds > self._limits.heartbeat_timeout_s:
                    self._fail(_frozen(role, seconds, self.steps_done or None), now)
            case Tick():
                self._watch(now)

    def _hear(self, heard: Heard, now: float) -> None:
        if heard.progress > self._progress[heard.rank]:
            self._progress[heard.rank] = heard.progress
            self._moved_at[heard.rank] = now
        self._steps[heard.rank] = heard.step
        if heard.finished:
            self._finished.add(heard.rank)
        if self.phase is Phase.STARTING and all(self._progress.values()):
            self.phase = Phase.RUNNING
        if self.phase is not Phase.SETTLING and len(self._finished) == len(self._steps):
            self.phase = Phase.SUCCEEDED

    def _fail(self, error: DistplatError, now: float) -> None:
        if self.error is None or _weight(error) > _weight(self.error):
            self.error = error
        if self.phase is not Phase.SETTLING:
            self.phase, self._failed_at = Phase.SETTLING, now
        if isinstance(self.error, UserCodeError):
            self.phase = Phase.FAILED

    def _watch(self, now: float) -> None:
        if self.phase is Phase.SETTLING and now - self._failed_at >= SETTLE_S:
            self.phase = Phase.FAILED
        elif self.phase is Phase.STARTING:
            self._watch_start(now)
        elif self.phase is Phase.RUNNING:
            self._watch_steps(now)

    def _watch_start(self, now: float) -> None:
        limit = self._limits.start_timeout_s
        if now - self._started_at > limit:
            late = tuple(f"worker-{r}" for r, done in self._progress.items() if not done)
            self._fail(DeadlineExceeded("start", late, limit, "failure.start_timeout_s"), now)

    def _watch_steps(self, now: float) -> None:
        limit = self._limits.step_timeout_s
        working = [r for r in self._steps if r not in self._finished]
        stalled = [r for r in working if now - self._moved_at[r] > limit * STALL_GRACE]
        if stalled:
            late = tuple(f"worker-{r}" for r in stalled)
            what = f"step {self.steps_done}"
            self._fail(DeadlineExceeded(what, late, limit, "failure.step_timeout_s"), now)


def _frozen(role: str, seconds: float, step: int | None) -> ActorLost:
    cause = f"it has not answered for {seconds:.0f} s (frozen or cut off)"
    return ActorLost(role, step, cause, "`failure.heartbeat_timeout_s` changes this deadline")


def _weight(error: DistplatError) -> int:
    """How well an error explains a failed run: the user's own first, a death before its effects."""
    match error:
        case UserCodeError():
            return 3
        case ActorLost():
            return 2
        case DeadlineExceeded():
            return 1
        case _:
            return 0
