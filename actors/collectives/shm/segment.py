"""
The memory that the ranks of a group on one node share: a line of control words each, and slots.

    ┌ line of rank 0 ─┬─ ... ─┬ line N-1 ┬ channel 0->0 ┬─ ... ─┬ N-1->N-1 ┬ slots ──────────────┐
    │ posts   state   │       │          │   (p2p)      │       │          │ rank 0: 0 1 2 3     │
    │ pid     vector  │       │          │              │       │          │ rank 1: 0 1 2 3 ... │
    │ header header   │       │          │              │       │          │                     │
    └─────────────────┴───────┴──────────┴──────────────┴───────┴──────────┴─────────────────────┘

A rank writes into its own line, the channels it sends or receives on, and its own slots. It counts
its posts in `posts`, which the others wait for. It writes the header of its operation before it
posts, by turns into one of two slots: who begins operation k+2 has seen every rank's first post
of k+1, and a rank posts that after it has compared the headers of k.

Shared vectors (`Collective.share`) are segments of their own, one per rank, which all ranks map.
"""

import os
import struct
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from distplat.actors.collectives.header import SIZE, STAGED, offset_of, vector_of
from distplat.actors.memory import futex
from distplat.actors.memory.futex import Word
from distplat.actors.memory.memfd import MemorySegment
from distplat.actors.messages import MemoryAddress

SLOTS = 4
"""Number of slots of each rank; block_pipeline.py says why four."""
_SLOT = 512 * 1024
"""Measured: quickest are blocks that stay in the caches; smaller ones have too many waits."""
_ROOM_PER_RANK = 16 * 1024
_LINE = 384
_STATE, _PID, _VECTOR, _INODE, _HEADERS = 4, 8, 12, 16, 128
CHANNEL = 384
_PAGE = 4096
_FIELD = struct.Struct("<I")
_LONG_FIELD = struct.Struct("<Q")
_ABSENT, PRESENT, LEFT = 0, 1, 2


def shared_memory_works() -> bool:
    """Whether this machine has what it takes: Linux, and a processor whose calls we know."""
    return futex.supported() and hasattr(os, "memfd_create")


class SegmentLayout(NamedTuple):
    """Where things lie, in bytes."""

    world: int
    slot_bytes: int

    @classmethod
    def of(cls, world: int) -> "SegmentLayout":
        """Give the layout for `world` ranks; a slot has room for a piece of every rank's part."""
        return cls(world, max(_SLOT, world * _ROOM_PER_RANK))

    @property
    def channels(self) -> int:
        """First byte after the lines."""
        return self.world * _LINE

    @property
    def slots(self) -> int:
        """First byte of the slots; whole pages, so that any dtype can be viewed there."""
        end = self.channels + self.world**2 * CHANNEL
        return -(-end // _PAGE) * _PAGE

    @property
    def size(self) -> int:
        """Bytes of all."""
        return self.slots + self.world * SLOTS * self.slot_bytes


class GroupSegment:
    """
    One rank's view of the shared memory.

    Args:
        segment: the memory, of `layout.size` bytes.
        layout: the same on all ranks.
        rank: in the group.
    """

    def __init__(self, segment: MemorySegment, layout: SegmentLayout, rank: int) -> None:
        self.segment, self.layout, self.rank = segment, layout, rank
        self.world = layout.world
        self.bytes = memoryview(segment.tensor[: layout.slots].numpy().data)
        self.cells = self.bytes[: layout.channels].cast("I")
        self.cell_of = [r * _LINE // 4 for r in range(layout.world)]
        self.words = [Word(self.bytes, r * _LINE) for r in range(layout.world)]
        self._typed: dict[torch.dtype, list[list[Tensor]]] = {}

    @classmethod
    def create(cls, node: str, layout: SegmentLayout) -> "GroupSegment":
        """Make the memory, as rank 0; pages come into being when they are first used."""
        return cls(MemorySegment.create(node, layout.size, "uint8", populate=False), layout, 0)

    @classmethod
    def open(cls, address: MemoryAddress, layout: SegmentLayout, rank: int) -> "GroupSegment":
        """
        Map what rank 0 has made.

        Raises:
            OSError: it cannot be reached from this process.
        """
        return cls(MemorySegment.open(address, populate=False), layout, rank)

    def enter(self) -> None:
        """Say that this rank is here, and in which process; its first post follows."""
        self._set(_PID, os.getpid())
        self._set(_STATE, PRESENT)

    def absent(self) -> list[int]:
        """Give the ranks that have not made their first post."""
        return [rank for rank, word in enumerate(self.words) if not word.wait(1, 0.0)]

    def leave(self) -> None:
        """Announce that this rank posts no more, and wake the ranks that wait for it."""
        self._set(_STATE, LEFT)
        self.wake()

    def wake(self) -> None:
        """Wake all waits for posts, so that they check for lost ranks."""
        for word in self.words:
            word.wake()

    def has_left(self, rank: int) -> bool:
        """Whether a rank said that it will post no more."""
        return self._get(rank, _STATE) == LEFT

    def pid(self, rank: int) -> int:
        """Process of a rank that has entered."""
        return self._get(rank, _PID)

    def offer(self, address: MemoryAddress) -> None:
        """Lay down where this process's part of a new shared vector is."""
        self._set(_VECTOR, address.fd)
        _LONG_FIELD.pack_into(self.bytes, self.rank * _LINE + _INODE, address.inode)

    def offers(self) -> list[tuple[int, int, int]]:
        """Give (process, descriptor, inode) of every rank's part of a new shared vector."""
        inodes = [
            _LONG_FIELD.unpack_from(self.bytes, r * _LINE + _INODE)[0] for r in range(self.world)
        ]
        return [(self.pid(r), self._get(r, _VECTOR), inode) for r, inode in enumerate(inodes)]

    def write_header(self, number: int, data: bytes) -> None:
        """Lay down this rank's header of operation `number`."""
        start = self.rank * _LINE + _HEADERS + number % 2 * SIZE
        self.bytes[start : start + SIZE] = data

    def read_header(self, rank: int, number: int) -> bytes:
        """Give a rank's header of operation `number`, after its first post."""
        start = rank * _LINE + _HEADERS + number % 2 * SIZE
        return bytes(self.bytes[start : start + SIZE])

    def channel(self, source: int, to: int) -> int:
        """First byte of the control words of messages from one rank to another."""
        return self.layout.channels + (source * self.world + to) * CHANNEL

    def slots(self, dtype: torch.dtype) -> list[list[Tensor]]:
        """Give `[slot][rank]`, each a vector that fills the slot."""
        if dtype not in self._typed:
            every = self.segment.tensor[self.layout.slots :].view(dtype)
            parts = every.view(self.world, SLOTS, -1).transpose(0, 1)
            self._typed[dtype] = [list(slot.unbind()) for slot in parts.unbind()]
        return self._typed[dtype]

    def _set(self, field: int, value: int) -> None:
        _FIELD.pack_into(self.bytes, self.rank * _LINE + field, value)

    def _get(self, rank: int, field: int) -> int:
        return int(_FIELD.unpack_from(self.bytes, rank * _LINE + field)[0])


class SharedVectors:
    """The shared vectors of a group, in the order in which they were made."""

    def __init__(self) -> None:
        self._ranges: list[tuple[int, int]] = []
        self._bytes: list[list[Tensor]] = []

    def add(self, mine: MemorySegment, offers: list[tuple[int, int, int]]) -> None:
        """
        Map the other ranks' parts of a new vector.

        Args:
            mine: this rank's, of bytes.
            offers: (process, descriptor, inode) of every rank's.

        Raises:
            OSError: a part cannot be reached any more.
        """
        own = mine.address
        addresses = [replace(own, pid=pid, fd=fd, inode=inode) for pid, fd, inode in offers]
        self._bytes.append([self._map(mine, address) for address in addresses])
        start = mine.tensor.data_ptr()
        self._ranges.append((start, start + mine.tensor.numel()))

    def offset(self, tensor: Tensor) -> int:
        """Give the place of a contiguous tensor, or `STAGED` if it lies in no shared vector."""
        if not self._ranges:
            return STAGED
        start = tensor.data_ptr()
        stop = start + tensor.numel() * tensor.itemsize
        for vector, (first, end) in enumerate(self._ranges):
            if first <= start and stop <= end:
                return offset_of(vector, start - first)
        return STAGED

    def offsets(self, parts: Sequence[Tensor]) -> list[int]:
        """
        Give the offsets of several tensors, but for empty ones, which lie nowhere.

        [] if one of them lies elsewhere than the others.
        """
        positions = [self.offset(part) for part in parts if part.numel()]
        if STAGED in positions or len({vector_of(offset) for offset in positions}) != 1:
            return []
        return positions

    def views(self, mine: Tensor) -> list[Tensor]:
        """Give, in rank order, what lies in all ranks' vectors where `mine` lies in this rank's."""
        start = mine.data_ptr()
        for (first, end), parts in zip(self._ranges, self._bytes, strict=True):
            if first <= start < end:
                span = slice(start - first, start - first + mine.numel() * mine.itemsize)
                return [part[span].view(mine.dtype) for part in parts]
        raise ValueError("the tensor lies in no shared vector")

    @staticmethod
    def _map(mine: MemorySegment, address: MemoryAddress) -> Tensor:
        if (address.pid, address.fd) == (mine.address.pid, mine.address.fd):
            return mine.tensor
        return MemorySegment.open(address).tensor


def create_vector(like: Tensor) -> tuple[MemorySegment, Tensor]:
    """Give memory of this rank's own, and a tensor like `like` in it; all zeros."""
    size = like.numel() * like.itemsize
    segment = MemorySegment.create("", max(1, size), "uint8")
    return segment, segment.tensor[:size].view(like.dtype).view(like.shape)
