"""
Why the ranks of a train function do not meet: one has returned, or is somewhere else in its loop.

What such a rank leaves others with looks like a lost rank: an operation without an answer, or one
that breaks as the other end is closed. But all processes live, and after a restart the loops would
part at the same place. So it is told as the user's error: who has left and when, who waits where.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Set
from dataclasses import dataclass

from distplat.platform.errors import (
    CollectiveError,
    DistplatError,
    MismatchError,
    PeerLost,
    UserCodeError,
    ranks_text,
)

_SAME_CALLS_HINT = (
    "every rank must call backward(), barrier(), gather_for_metrics(), should_stop() and what it "
    "calls of torch.distributed as often, in the same order, before its function ends: have all "
    "ranks end alike, by should_stop() or a gathered value"
)
_LONGER_WAIT_HINT = (
    "have all ranks end alike, by should_stop() or a gathered value; or, where a rank has more to "
    "do than others at the end, have them wait longer: `strategy.timeout_s` under `ring`, else "
    "`failure.step_timeout_s`"
)


@dataclass(frozen=True)
class LoopState:
    """Where the loop of a train function is on one rank, as its worker tells."""

    returned: str = ""
    """After what the function has returned, for people to read; empty: it has not."""
    waits: str = ""
    """The user's frames, while it stands in an operation of torch.distributed; empty: it does not.
    Such an operation may wait longer than any deadline of ours."""


class LoopTracker:
    """
    The loops of all ranks, as far as they are known to part.

    Of a task nobody tells anything: its loop is ours.
    """

    def __init__(self) -> None:
        self._returned: dict[int, str] = {}
        self._waits: dict[int, str] = {}
        self._ended: dict[int, tuple[DistplatError, str]] = {}

    @property
    def returned(self) -> Set[int]:
        """Ranks that wait for the others at the end; that has a deadline of its own."""
        return self._returned.keys()

    def observe(self, rank: int, state: LoopState) -> None:
        """A rank tells where it is."""
        for known, text in ((self._returned, state.returned), (self._waits, state.waits)):
            known.pop(rank, None)
            if text:
                known[rank] = text

    def end(self, rank: int, error: DistplatError, traceback: str) -> None:
        """A rank has stopped; `traceback`: the user's frames, empty: none called what failed."""
        self._ended[rank] = error, traceback

    def divergence_error(self, steps: Mapping[int, int]) -> UserCodeError | None:
        """
        Tell that loops have parted; None: they have not, as far as can be seen.

        Args:
            steps: done, by rank.
        """
        waits = {rank: text for rank, text in self._waits.items() if rank not in self._returned}
        for rank, (error, traceback) in self._ended.items():
            if traceback and rank not in self._returned and self._is_others_fault(error):
                waits[rank] = traceback
        of_others = any(rank in waits for rank in self._ended)
        for rank, (error, _) in sorted(self._ended.items()):
            if of_others or rank not in self._returned or not self._missed_at_end(error):
                continue
            if not waits:
                summary = f"others did not end beside {self._left()}: {error}"
                return UserCodeError(rank, steps[rank] + 1, summary, summary, _LONGER_WAIT_HINT)
            of_others = True
        return self._error(waits, steps) if of_others else None

    def stalled(self, ranks: Iterable[int], steps: Mapping[int, int]) -> UserCodeError | None:
        """
        Tell that ranks wait for one that has left; None: that is not why they stand still.

        Args:
            ranks: that stand still.
            steps: done, by rank.
        """
        waits = {r: self._waits[r] for r in ranks if r in self._waits and r not in self._returned}
        return self._error(waits, steps) if waits and self._returned else None

    def _error(self, waits: Mapping[int, str], steps: Mapping[int, int]) -> UserCodeError:
        shown = "\n".join(dict.fromkeys(waits[rank] for rank in sorted(waits)))
        first = min(waits)
        summary = f"waited for {self._left()}" if self._returned else "the ranks' loops have parted"
        who = ranks_text(sorted(waits))
        return UserCodeError(
            first, steps[first] + 1, summary, shown, _SAME_CALLS_HINT, on_ranks=who
        )

    def _is_others_fault(self, error: DistplatError) -> bool:
        """Say whether an operation failed by what another rank's loop did, or left out."""
        if isinstance(error, PeerLost):
            return bool(self._returned)
        return isinstance(error, MismatchError) or _any(error, self._returned)

    def _missed_at_end(self, error: DistplatError) -> bool:
        """Say whether a rank that has returned waited in vain for others to do so."""
        others = isinstance(error, CollectiveError) and {*error.missing} - self._returned.keys()
        return bool(others) or isinstance(error, MismatchError)

    def _left(self) -> str:
        """`rank 1, whose function returned after step 2`."""
        by_line: dict[str, list[int]] = {}
        for rank, line in sorted(self._returned.items()):
            by_line.setdefault(line, []).append(rank)
        return ", ".join(
            f"{ranks_text(ranks)}, whose function returned {line}"
            for line, ranks in by_line.items()
        )


def _any(error: DistplatError, ranks: Collection[int]) -> bool:
    """Say whether an operation missed one of these ranks."""
    return isinstance(error, CollectiveError) and not {*error.missing}.isdisjoint(ranks)
