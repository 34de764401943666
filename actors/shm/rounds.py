"""
How ranks take turns with the slots: a vector goes through them in blocks.

One round per block; a round's *post* says "my block lies in my slot", and who has waited for all
ranks' posts may read theirs. Ranks work ahead by one block, so a wait seldom sleeps:

    exchange       put 0  post 0 │ put 1  post 1 │ wait 0  take 0 │ put 2  post 2 │ wait 1  take 1

An all-reduce of more than two ranks needs a second exchange, of the results. Each rank reduces one
chunk of every block, and leaves it in its own slot, in the chunk that nobody reads there:

    exchange_twice   put 0                             post 0
                     put 1   wait 0  reduce 0          post 1
                     put 2   wait 1  reduce 1  take 0  post 2   (wait 1: all have reduced 0)
                             wait 2  reduce 2  take 1  post 3
                             wait 3            take 2

Why four slots: let post p be the one that publishes a block.
  - All reads of that block, of its results too, come before the reader's post p + 2: in the first
    pattern they come before post p + 2 of the same operation, or before the first post of the next;
    in the second, reduce comes before post p + 1, take before post p + 2 (or the operation's end).
  - A rank that puts the block of post q has waited for all posts q - 2.
The slot is used again by the block of post q >= p + 4 (other operations post, too), so its writer
has seen post q - 2 >= p + 2 of every rank: all have read.
"""

from collections.abc import Callable
from typing import Protocol

from distplat.actors.shm.arena import SLOTS

Step = Callable[[int, int], None]
"""Is given the number of the block and its slot."""


class Signals(Protocol):
    """A rank's posts, and its waits for the others'."""

    def post(self) -> int:
        """Say that this rank is through with its part; give the number of the post."""

    def wait(self, number: int) -> None:
        """Return when all ranks have made post `number`."""


class Rounds:
    """
    Runs operations block by block; counts slots on from one operation to the next.

    Args:
        signals: of this rank.
    """

    def __init__(self, signals: Signals) -> None:
        self._signals, self._slot = signals, 0

    def exchange(self, blocks: int, put: Step, take: Step) -> None:
        """Put each block into this rank's slot, and take what is needed from all slots."""
        signals, first = self._signals, self._slot
        self._slot = (first + blocks) % SLOTS
        posted = 0
        for block in range(blocks + 1):
            before = posted
            if block < blocks:
                put(block, (first + block) % SLOTS)
                posted = signals.post()
            if block:
                signals.wait(before)
                take(block - 1, (first + block - 1) % SLOTS)

    def exchange_twice(self, blocks: int, put: Step, reduce: Step, take: Step) -> None:
        """Put each block, reduce a part of what all have put, and take what all have reduced."""
        signals, first = self._signals, self._slot
        self._slot = (first + blocks) % SLOTS
        posted = 0
        for turn in range(blocks + 2):
            if turn < blocks:
                put(turn, (first + turn) % SLOTS)
            if turn:
                signals.wait(posted)
            if 1 <= turn <= blocks:
                reduce(turn - 1, (first + turn - 1) % SLOTS)
            if turn >= 2:
                take(turn - 2, (first + turn - 2) % SLOTS)
            if turn <= blocks:
                posted = signals.post()

    def in_place(self, work: Callable[[], None]) -> None:
        """Work on the ranks' vectors themselves, between two meetings of all ranks."""
        self._signals.wait(self._signals.post())
        work()
        self._signals.wait(self._signals.post())
