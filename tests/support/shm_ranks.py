"""The shared-memory backend without Ray: ranks are threads of the test."""

import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

from rank_threads import on_ranks

from distplat.actors.collectives.rendezvous import GroupMember, GroupSettings
from distplat.actors.collectives.shm.segment import GroupSegment, SegmentLayout
from distplat.actors.collectives.shm.shm_group import ShmGroup

T = TypeVar("T")
DEADLINE_S = 60.0


class Board:
    """Publishes the memory of a group's rank 0 to the other ranks; replaces Ray's store."""

    def __init__(self, slot_bytes: int | None = None, operation_s: float = DEADLINE_S) -> None:
        self.slot_bytes, self.operation_s = slot_bytes, operation_s
        self._segments: dict[str, GroupSegment] = {}
        self._changed = threading.Condition()

    def group(self, name: str, rank: int, world: int) -> ShmGroup:
        settings = GroupSettings(self.operation_s, DEADLINE_S)
        segment = self._segment(name, rank, world)
        group = ShmGroup(GroupMember(name, rank, world, settings), segment=segment)

        def subgroup(part: str, ranks: Sequence[int]) -> ShmGroup:
            return self.group(f"{name}/{part}", list(ranks).index(rank), len(ranks))

        group.make_subgroup = subgroup
        return group

    def _segment(self, name: str, rank: int, world: int) -> GroupSegment:
        layout = (
            SegmentLayout(world, self.slot_bytes) if self.slot_bytes else SegmentLayout.of(world)
        )
        with self._changed:
            if rank == 0:
                self._segments[name] = GroupSegment.create("node", layout)
                self._changed.notify_all()
                return self._segments[name]
            assert self._changed.wait_for(lambda: name in self._segments, DEADLINE_S)
        return GroupSegment.open(self._segments[name].segment.address, layout, rank)


def on_shm_ranks(
    world: int,
    body: Callable[[ShmGroup], T],
    *,
    slot_bytes: int | None = None,
    operation_s: float = DEADLINE_S,
    timeout_s: float = 100.0,
) -> list[T]:
    """Call `body(group)` on every rank of a new group; return the results in rank order."""
    board = Board(slot_bytes, operation_s)
    groups: dict[int, ShmGroup] = {}  # keep the groups alive until all ranks have ended

    def run(rank: int) -> T:
        groups[rank] = board.group("world", rank, world)
        return body(groups[rank])

    return on_ranks(world, run, timeout_s=timeout_s)
