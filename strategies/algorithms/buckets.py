"""
Gradient buckets: their bounds, and when each may be sent (Li et al., "PyTorch Distributed", VLDB
2020).

Backward computes the last layers' gradients first, so buckets are numbered from the vector's end:

    layers     0          1          2          3        backward: 3, 2, 1, 0
    vector  |----------|----------|----------|-----|
    bucket       2 ---------|   1 --------|   0 --|      0: small, so that sending starts early

This module uses no torch: the caller reports gradients by number and gets the buckets to send.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile

FIRST_BYTES = 1 << 20
"""Size of the bucket that is complete first; as in torch DDP."""


@dataclass(frozen=True)
class Bucket:
    """A contiguous range of whole parameters."""

    start: int
    """First element in the flat vector."""
    stop: int
    parameters: range
    """Indices in the list of slots."""


def cut_buckets(offsets: Sequence[int], size: int, limit: int, first: int) -> list[Bucket]:
    """
    Split a vector into buckets between parameters, starting at its end.

    A bucket is closed once it reaches its size, so it exceeds `limit` by less than its first
    parameter.

    Args:
        offsets: first element of each parameter, ascending from 0; padding belongs to the parameter
            before it.
        size: elements of the vector.
        limit: approximate elements of a bucket.
        first: approximate elements of the bucket at the vector's end.
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
    Decides which buckets to send as gradients are computed.

    Buckets are sent in one agreed `order`, whatever the order in which they become complete: a
    complete bucket waits for the buckets before it.

        order       0   2   1            complete: 2    -> nothing, 0 is before it
                                         complete: 0    -> send 0, 2
                                         the end        -> send 1

    Until `agree` no bucket is sent before the end of backward; the observed order becomes the
    `proposal`.

    Args:
        members: parameters of each bucket, by number.
    """

    def __init__(self, members: Sequence[Sequence[int]]) -> None:
        self._members = members
        self._bucket_of = {
            parameter: bucket
            for bucket, parameters in enumerate(members)
            for parameter in parameters
        }
        self.order = list(range(len(members)))
        self._held = set(self.order)  #: buckets that are sent only at the end of backward
        self.begin()

    def begin(self, *, early: bool = True) -> None:
        """
        Start a backward.

        Args:
            early: whether buckets may be sent during backward.
        """
        self._early = early
        self._missing = [len(parameters) for parameters in self._members]
        self._seen: set[int] = set()
        self._repeated: set[int] = set()  #: buckets with a gradient that was reported repeatedly
        self._latest = [0] * len(self._members)  #: number of each bucket's last gradient
        self._reported = 0
        self._sent: set[int] = set()

    def was_sent(self, parameter: int) -> bool:
        """Return whether the parameter's bucket was returned for sending."""
        return self._bucket_of[parameter] in self._sent

    def gradient(self, parameter: int) -> list[int]:
        """
        Report a gradient as computed; return the buckets to send now, in order.

        A gradient is reported repeatedly if backward is nested, as in reentrant checkpointing, and
        several inner backwards use the parameter.
        """
        bucket = self._bucket_of[parameter]
        self._reported += 1
        self._latest[bucket] = self._reported
        if parameter in self._seen:
            self._repeated.add(bucket)
            return []
        self._seen.add(parameter)
        self._missing[bucket] -= 1
        if not self._early:
            return []
        return self._next(lambda bucket: self._missing[bucket] == 0 and bucket not in self._held)

    def rest(self) -> list[int]:
        """Return the buckets that are not sent yet, in order; called after backward."""
        return self._next(lambda bucket: True)

    def _next(self, may_send: Callable[[int], bool]) -> list[int]:
        buckets = [*takewhile(may_send, self.order[len(self._sent) :])]
        self._sent.update(buckets)
        return buckets

    def proposal(self) -> tuple[list[int], list[bool]] | None:
        """
        Return the order in which buckets became complete, and whether each must be held.

        Held buckets come last: an incomplete bucket is unlikely to be complete next time, and the
        last report of a repeated gradient cannot be recognised. None: no gradient was reported.
        """
        if not self._reported:
            return None
        held = [
            bool(missing) or bucket in self._repeated
            for bucket, missing in enumerate(self._missing)
        ]
        early = [bucket for bucket, is_held in enumerate(held) if not is_held]
        late = [bucket for bucket, is_held in enumerate(held) if is_held]
        order = [*sorted(early, key=self._latest.__getitem__), *late]
        return order, [held[bucket] for bucket in order]

    def agree(self, order: Sequence[int], held: Sequence[bool]) -> None:
        """Set the order, and allow buckets that are not held to be sent during backward."""
        self.order = list(order)
        self._held = {bucket for bucket, is_held in zip(order, held, strict=True) if is_held}
