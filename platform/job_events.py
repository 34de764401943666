"""News of a run, as `JobState` takes them."""

from dataclasses import dataclass

from distplat.platform.errors import DistplatError


@dataclass(frozen=True)
class Heard:
    """An answer of a rank. `progress` counts its beats: it grows while the rank is at work."""

    rank: int
    progress: int
    step: int
    """Steps done."""
    finished: bool
    rests_at: int | None = None
    """The first step that it does not begin, where it was told to rest and this is known."""


@dataclass(frozen=True)
class Failed:
    """A rank or a part of the server group reported an error, or was found dead."""

    role: str
    error: DistplatError
    gone: bool = False
    """Its process is no more; else it waits for orders."""
    preempted: bool = False
    """Its machine was taken away."""


@dataclass(frozen=True)
class Unanswered:
    """A role has not answered for `seconds`."""

    role: str
    seconds: float


@dataclass(frozen=True)
class Joined:
    """A worker was asked for while the run goes on; it is starting."""

    rank: int


@dataclass(frozen=True)
class Left:
    """A worker has finished what it had, and was ended as it was told."""

    rank: int


@dataclass(frozen=True)
class Resize:
    """So many workers there are to be; those that come are ready to begin."""

    world: int


@dataclass(frozen=True)
class Tick:
    """Time passed."""


Event = Heard | Failed | Unanswered | Joined | Left | Resize | Tick
