"""
A checkpoint's parts, as they come from the ranks: complete when all of one version are there.

    version     120   130
    worker-0     x     x
    worker-1     x           130 waits for worker-1; should 140 be complete first, 130 is let go

Parts of different versions, or of different attempts, never meet in one checkpoint (I3, I6).
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from distplat.platform.tensor_slices import ITEM_BYTES, Bytes, Entry


@dataclass(frozen=True)
class Delivery:
    """What one rank gives to a checkpoint; a rank that is responsible for nothing says so."""

    rank: int
    attempt: int
    version: int
    """Steps that it has behind it."""
    boxes: tuple[Any, ...] = ()
    """Where the arrays are: each opens to a list of them."""
    entries: tuple[tuple[Entry, ...], ...] = ()
    """By box, what is in its arrays."""
    facts: dict[str, Any] = field(default_factory=dict)
    """What the rank knows of data and versions, for `state.json`."""
    skipped: bool = False
    """The rank has no part of this version: there will be no such checkpoint."""
    failure: str = ""
    """Why it has none, if that was an error."""

    @property
    def nbytes(self) -> int:
        """Bytes of the part."""
        entries = [entry for box in self.entries for entry in box]
        return sum(entry.place.size * ITEM_BYTES[entry.dtype] for entry in entries)


Open = Callable[[Any], list[Bytes]]
"""Opens a box."""


class CheckpointAssembly:
    """
    Joins the deliveries of all ranks.

    Args:
        world: number of ranks.
    """

    def __init__(self, world: int) -> None:
        self._world = world
        self.attempt = 0  #: parts of other attempts are not taken
        self._parts: dict[int, dict[int, Delivery]] = {}  #: version -> rank -> its part
        self.skipped: list[int] = []  #: versions of which there is no checkpoint

    def begin(self, attempt: int, world: int | None = None) -> None:
        """
        Be told that another attempt begins: what the one before left unfinished goes.

        Args:
            attempt: its number.
            world: its ranks; None: as many as before.
        """
        self.attempt = attempt
        self._world = world or self._world
        self._parts.clear()

    def add(self, delivery: Delivery) -> list[Delivery]:
        """Take a part; give all of its version, in rank order, when it is the last of them."""
        if delivery.attempt != self.attempt:
            return []
        parts = self._parts.setdefault(delivery.version, {})
        parts[delivery.rank] = delivery
        if len(parts) < self._world:
            return []
        older = [version for version in self._parts if version <= delivery.version]
        skipped = any(part.skipped for part in parts.values())
        self.skipped += sorted(v for v in older if v != delivery.version or skipped)
        for version in older:
            del self._parts[version]
        return [] if skipped else [parts[rank] for rank in range(self._world)]
