"""
When each shard's part of a gradient may leave, from news of the parameters whose gradient is done.

Shards are cut at any element, so a parameter may lie in two of them, and belongs to both:

    parameters  |---- 0 ----|-- 1 --|-------- 2 --------|-- 3 --|      backward: 3, 2, 1, 0
    shards      |-------- A --------|----- B -----|----- C -----|      3, 2 -> C and B; the end -> A

No torch here, and no clock: gradients are reported by number, shards that may leave come back.
"""

from collections.abc import Sequence


class ShardRelease:
    """
    Says which shards are complete. They leave in any order: servers know nothing of each other.

    - In the first backward nothing leaves: it is watched for gradients that come more than once,
      as backward within backward gives them. Shards with such a one leave at the end ever after.
    - One shard always leaves at the end: who has the answers of all shards to a step knows that
      every rank's backward is over.
    - What a backward does not use gives no news: its shards leave at the end.

    Args:
        parameters: of each its first element in the flat vector, and the one after its last.
        shards: the same of each shard.
    """

    def __init__(
        self, parameters: Sequence[tuple[int, int]], shards: Sequence[tuple[int, int]]
    ) -> None:
        self._homes = [
            [number for number, (first, end) in enumerate(shards) if start < end and first < stop]
            for start, stop in parameters
        ]
        self._count = len(shards)
        self._knows = False  #: whether a backward was watched to its end
        self._held: set[int] = set()  #: shards with a gradient that came more than once
        self.begin()

    def begin(self) -> None:
        """Expect the gradients of another backward."""
        self._open = [0] * self._count
        for homes in self._homes:
            for number in homes:
                self._open[number] += 1
        self._seen: set[int] = set()
        self._gone: set[int] = set()

    def has_left(self, parameter: int) -> bool:
        """Say whether some of the parameter's gradient is gone."""
        return not self._gone.isdisjoint(self._homes[parameter])

    def gradient(self, parameter: int) -> list[int]:
        """Take note of a gradient that is done; give the shards that may leave now."""
        homes = self._homes[parameter]
        if parameter in self._seen:
            self._held.update(homes)
            return []
        self._seen.add(parameter)
        for number in homes:
            self._open[number] -= 1
        complete = [one for one in homes if not self._open[one] and one not in self._held]
        return complete[: self._count - len(self._gone) - 1] if self._knows else []

    def leave(self, number: int) -> None:
        """Note that a shard's part is on its way."""
        self._gone.add(number)

    def rest(self) -> list[int]:
        """Give the shards that have not left; backward is over."""
        self._knows = self._knows or bool(self._seen)
        return [number for number in range(self._count) if number not in self._gone]


def covered(spans: Sequence[tuple[float, float]], end: float) -> float:
    """
    Give how much of the time before `end` lies in at least one of some spans.

    Args:
        spans: when something began and ended, in seconds.
        end: what comes after it does not count.
    """
    total, until = 0.0, float("-inf")
    for began, ended in sorted(spans):
        ended = min(ended, end)
        total += max(0.0, ended - max(began, until))
        until = max(until, ended)
    return total
