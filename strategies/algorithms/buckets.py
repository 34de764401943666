"""
Buckets of a gradient vector: where they are cut, and when each may be sent (Li et al., "PyTorch
Distributed", VLDB 2020).

Backward finishes the last layers first, so buckets are counted from the end of the vector:

    layers     0          1          2          3        backward: 3, 2, 1, 0
    vector  |----------|----------|----------|-----|
    bucket       2 ---------|   1 --------|   0 --|      0: small, so that sending starts early

No torch here, and no clock: gradients are reported by number, buckets to send come back.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile

FIRST_BYTES = 1 << 20
"""Size of the bucket that is ready first; torch DDP's own."""


@dataclass(frozen=True)
class Bucket:
    """A run of whole parameters."""

    start: int
    """First element in the flat vector."""
    stop: int
    parameters: range
    """Places in the list of slots."""


def cut_buckets(offsets: Sequence[int], size: int, limit: int, first: int) -> list[Bucket]:
    """
    Cut a vector between parameters, from its end; every element is in one bucket.

    A bucket is closed once it has reached its size: it is longer than `limit` by less than its
    first parameter.

    Args:
        offsets: first element of each parameter, rising from 0; padding belongs to the one before.
        size: elements of the vector.
        limit: elements of a bucket, about.
        first: elements of the bucket at the vector's end, about.
    """
    buckets: list[Bucket] = []
    stop, last = size, len(offsets)
    for number in range(len(offsets) - 1, -1, -1):
        start = offsets[number]
        if start == 0 or stop - start >= (limit if buckets else min(first, limit)):
            buckets.append(Bucket(start, stop, range(number, last)))
            stop, last = start, number
    return buckets


class Release:
    """
    Says which buckets may be sent, from news of gradients that are done.

    Buckets leave in one agreed `order`, whatever the order in which they become complete: a
    complete bucket waits for those before it.

        order       0   2   1            complete: 2    -> nothing, 0 is before it
                                         complete: 0    -> send 0, 2
                                         the end        -> send 1

    Until `agree` no bucket leaves before the end of backward, and what is seen of backward becomes
    the `proposal` for the order.

    Args:
        members: of each bucket the parameters, by any numbers.
    """

    def __init__(self, members: Sequence[Sequence[int]]) -> None:
        self._members = members
        self._home = {one: number for number, some in enumerate(members) for one in some}
        self.order = list(range(len(members)))
        self._held = set(self.order)  #: buckets that leave at the end of backward only
        self.begin()

    def begin(self, *, early: bool = True) -> None:
        """
        Expect the gradients of another backward.

        Args:
            early: whether buckets may leave before its end.
        """
        self._early = early
        self._open = [len(some) for some in self._members]
        self._seen: set[int] = set()
        self._again: set[int] = set()  #: buckets of which a gradient came more than once
        self._latest = [0] * len(self._members)  #: when each bucket's last gradient came
        self._ready = 0
        self._gone: set[int] = set()

    def was_sent(self, parameter: int) -> bool:
        """Whether the parameter's bucket was given out to be sent."""
        return self._home[parameter] in self._gone

    def gradient(self, parameter: int) -> list[int]:
        """
        Take note of a gradient that is done; give the buckets to send now, in order.

        A gradient comes more than once where backward is called within backward, as reentrant
        checkpointing does it, and a parameter is used in several of the inner ones.
        """
        number = self._home[parameter]
        self._ready += 1
        self._latest[number] = self._ready
        if parameter in self._seen:
            self._again.add(number)
            return []
        self._seen.add(parameter)
        self._open[number] -= 1
        if not self._early:
            return []
        return self._next(lambda one: self._open[one] == 0 and one not in self._held)

    def rest(self) -> list[int]:
        """Give the buckets that were not sent yet, in order; backward is over."""
        return self._next(lambda one: True)

    def _next(self, may_go: Callable[[int], bool]) -> list[int]:
        leaving = [*takewhile(may_go, self.order[len(self._gone) :])]
        self._gone.update(leaving)
        return leaving

    def proposal(self) -> tuple[list[int], list[bool]] | None:
        """
        Give the order in which buckets became complete, and of each whether it is to be held.

        Last come the buckets that are held: those that stayed incomplete are unlikely to complete
        next time, and of a gradient that comes more than once nobody knows which is the last.
        None if no gradient came at all.
        """
        if not self._ready:
            return None
        held = [bool(left) or one in self._again for one, left in enumerate(self._open)]
        early = [one for one, is_held in enumerate(held) if not is_held]
        late = [one for one, is_held in enumerate(held) if is_held]
        order = [*sorted(early, key=self._latest.__getitem__), *late]
        return order, [held[one] for one in order]

    def agree(self, order: Sequence[int], held: Sequence[bool]) -> None:
        """Let buckets leave early from now on: in this order, save those to be held."""
        self.order = list(order)
        self._held = {one for one, is_held in zip(order, held, strict=True) if is_held}
