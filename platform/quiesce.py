"""
How the workers of a run are stopped: at once if something failed, else all before the same step.

    controller   rest ─▶ all: begin no step beyond the one under way, and say which you do not begin
    worker-0     step 118 │ "119": waits ............ │ step 119 │ stops
    worker-1     step 118 │ step 119, "120": waits for worker-0  │ stops
    controller   all have answered ─▶ rest_at the largest, 120: nobody has begun it

A run that is to end early takes the same way: `end_at` in place of `rest_at`, and each worker ends
as after a last step.

So every step is begun by all or by none. Nobody need be halted for it: who has answered a smaller
number is let go on, and the others wait for nobody else. The classes read no clock and talk to
nobody; `Resting` is a worker's side, `Agreement` the controller's.
"""

from collections.abc import Iterable
from enum import Enum, IntEnum


class Stop(IntEnum):
    """How an attempt is called off; a later one goes further."""

    REST = 0
    """Each worker begins no further step, and says which it would have been."""
    REST_AT = 1
    """All have said so: each goes on until it is before the same step, and stops."""
    ABANDON = 2
    """Everybody stops, wherever they wait."""


def how_to_stop(failed: bool, agreed: int | None) -> Stop:
    """
    Say how those that are still at work are to be stopped.

    Args:
        failed: whether something did.
        agreed: the step before which all can stop; None: not all have answered.
    """
    if failed:
        return Stop.ABANDON
    return Stop.REST if agreed is None else Stop.REST_AT


class Agreement:
    """Before which step all can stop: the first that nobody has begun."""

    def __init__(self) -> None:
        self._answers: dict[int, int] = {}

    def answered(self, rank: int, step: int | None) -> None:
        """Take the first step that a rank does not begin, and nothing later; None: no answer."""
        if step is not None:
            self._answers.setdefault(rank, step)

    def missing(self, ranks: Iterable[int]) -> set[int]:
        """Give those of the ranks that have not answered."""
        return set(ranks) - set(self._answers)

    def step(self, ranks: Iterable[int]) -> int | None:
        """Give the step once all these ranks have answered, the same from then on."""
        return None if self.missing(ranks) else max(self._answers.values())


class Next(Enum):
    """What a worker that is before a step is to do."""

    BEGIN = "begin it"
    WAIT = "wait to be told"
    STOP = "stop here"
    END = "the run ends here"


class Resting:
    """A worker's side: it is asked, answers, is told, and asks before each step what to do."""

    def __init__(self) -> None:
        self._ahead: int | None = None  #: the first step that is not begun; None: not known
        self._asked = False
        self._last: int | None = None  #: where to stop; None: not told
        self._ends = False  #: the run ends there

    def start(self, step: int) -> None:
        """The attempt's first step is known; it is not begun."""
        self._ahead = step

    def rest(self) -> None:
        """Begin no further step from now on."""
        self._asked = True

    def rest_at(self, step: int) -> None:
        """Go on until this step is the next, and stop."""
        self._last = step

    def end_at(self, step: int) -> None:
        """Go on until this step is the next, and end the run there."""
        self._last, self._ends = step, True

    @property
    def asked(self) -> bool:
        """Whether somebody wants the worker to stop."""
        return self._asked

    @property
    def answer(self) -> int | None:
        """The first step that is not begun; None: nobody has asked, or it is not known."""
        return self._ahead if self._asked else None

    def before(self, step: int) -> Next:
        """Say what to do about a step that is the next one."""
        self._ahead = step
        if self._last is not None and step >= self._last:
            return Next.END if self._ends else Next.STOP
        if self._asked and self._last is None:
            return Next.WAIT
        self._ahead = step + 1
        return Next.BEGIN
