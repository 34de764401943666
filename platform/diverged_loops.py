"""
Detects that the loops of a train function diverged: a rank returned, or is at another operation.

To its peers such a rank looks lost: an operation gets no answer, or breaks when the other end
closes. But all processes live, and after a restart the loops would diverge at the same place. So it
is reported as the user's error: which ranks returned and when, and where the other ranks wait.
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
    "every rank must make the same calls of backward(), barrier(), gather_for_metrics(), "
    "should_stop() and torch.distributed, in the same order, before its function returns: let "
    "all ranks return together, by should_stop() or a gathered value"
)
_LONGER_WAIT_HINT = (
    "let all ranks return together, by should_stop() or a gathered value; or, where a rank has "
    "more work than others at the end, raise the deadline: `strategy.timeout_s` under `ring`, else "
    "`failure.step_timeout_s`"
)


@dataclass(frozen=True)
class LoopState:
    """State of a train function's loop on one rank."""

    returned: str = ""
    """Where the function returned, for messages, for example `after step 2`; empty: it has not."""
    waits: str = ""
    """The user's frames, while the rank is inside an operation of torch.distributed, which may wait
    longer than any deadline of distplat; empty: it is not."""


class LoopTracker:
    """States of all ranks' loops. Tasks report no state: their loop is distplat's own."""

    def __init__(self) -> None:
        self._returned: dict[int, str] = {}
        self._waits: dict[int, str] = {}
        self._ended: dict[int, tuple[DistplatError, str]] = {}

    @property
    def returned(self) -> Set[int]:
        """Ranks that have returned and wait for the others, with a deadline of their own."""
        return self._returned.keys()

    def observe(self, rank: int, state: LoopState) -> None:
        """Record a rank's state."""
        for known, text in ((self._returned, state.returned), (self._waits, state.waits)):
            known.pop(rank, None)
            if text:
                known[rank] = text

    def end(self, rank: int, error: DistplatError, traceback: str) -> None:
        """Record that a rank stopped; `traceback`: the user's frames of the failed call, if any."""
        self._ended[rank] = error, traceback

    def divergence_error(self, steps: Mapping[int, int]) -> UserCodeError | None:
        """
        Return the error if the loops diverged; None: no sign of it.

        Args:
            steps: finished steps by rank.
        """
        waits = {rank: text for rank, text in self._waits.items() if rank not in self._returned}
        for rank, (error, traceback) in self._ended.items():
            if traceback and rank not in self._returned and self._is_caused_by_peer(error):
                waits[rank] = traceback
        caused_by_peer = any(rank in waits for rank in self._ended)
        for rank, (error, _) in sorted(self._ended.items()):
            if caused_by_peer or rank not in self._returned or not self._missed_peers_at_end(error):
                continue
            if not waits:
                summary = f"others did not end beside {self._returned_text()}: {error}"
                return UserCodeError(rank, steps[rank] + 1, summary, summary, _LONGER_WAIT_HINT)
            caused_by_peer = True
        return self._error(waits, steps) if caused_by_peer else None

    def stalled(self, ranks: Iterable[int], steps: Mapping[int, int]) -> UserCodeError | None:
        """
        Return the error if ranks wait for a rank that has returned; None: another reason.

        Args:
            ranks: ranks without progress.
            steps: finished steps by rank.
        """
        waits = {r: self._waits[r] for r in ranks if r in self._waits and r not in self._returned}
        return self._error(waits, steps) if waits and self._returned else None

    def _error(self, waits: Mapping[int, str], steps: Mapping[int, int]) -> UserCodeError:
        shown = "\n".join(dict.fromkeys(waits[rank] for rank in sorted(waits)))
        first = min(waits)
        summary = (
            f"waited for {self._returned_text()}"
            if self._returned
            else "the ranks' loops have diverged"
        )
        affected = ranks_text(sorted(waits))
        return UserCodeError(
            first, steps[first] + 1, summary, shown, _SAME_CALLS_HINT, on_ranks=affected
        )

    def _is_caused_by_peer(self, error: DistplatError) -> bool:
        """Return whether an operation failed because of another rank's loop."""
        if isinstance(error, PeerLost):
            return bool(self._returned)
        return isinstance(error, MismatchError) or _misses_any(error, self._returned)

    def _missed_peers_at_end(self, error: DistplatError) -> bool:
        """Return whether a returned rank waited in vain for other ranks to return."""
        others = isinstance(error, CollectiveError) and {*error.missing} - self._returned.keys()
        return bool(others) or isinstance(error, MismatchError)

    def _returned_text(self) -> str:
        """Describe the returned ranks: `rank 1, whose function returned after step 2`."""
        by_line: dict[str, list[int]] = {}
        for rank, line in sorted(self._returned.items()):
            by_line.setdefault(line, []).append(rank)
        return ", ".join(
            f"{ranks_text(ranks)}, whose function returned {line}"
            for line, ranks in by_line.items()
        )


def _misses_any(error: DistplatError, ranks: Collection[int]) -> bool:
    """Return whether an operation missed one of these ranks."""
    return isinstance(error, CollectiveError) and not {*error.missing}.isdisjoint(ranks)
