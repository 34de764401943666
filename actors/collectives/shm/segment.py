"""
Shared memory of a group on one node: each rank has a line of control words, and slots.

    ┌ line of rank 0 ─┬─ ... ─┬ line N-1 ┬ channel 0->0 ┬─ ... ─┬ N-1->N-1 ┬ slots ──────────────┐
    │ posts   state   │       │          │   (p2p)      │       │          │ rank 0: 0 1 2 3     │
    │ pid     vector  │       │          │              │       │          │ rank 1: 0 1 2 3 ... │
    │ header header   │       │          │              │       │          │                     │
    └─────────────────┴───────┴──────────┴──────────────┴───────┴──────────┴─────────────────────┘

A rank writes only to its own line, to its own slots, and to the channels on which it sends or
receives. It counts its posts in `posts`; other ranks wait for that word. Before its first post it
writes the header of its operation, alternately to two places: a rank that starts operation k+2 has
seen every rank's first post of k+1, and ranks post that after they have compared the headers of k.

Shared vectors (`Collective.share`) are separate segments, one per rank, which all ranks map.
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
"""Number of slots of each rank; block_pipeline.py explains why four."""
_SLOT_BYTES = 512 * 1024
"""Chosen by measurement: larger blocks do not stay in the caches, smaller ones need more waits."""
_MIN_BYTES_PER_RANK = 16 * 1024
_LINE = 384
_STATE, _PID, _VECTOR, _INODE, _HEADERS = 4, 8, 12, 16, 128
CHANNEL = 384
_PAGE = 4096
_FIELD = struct.Struct("<I")
_LONG_FIELD = struct.Struct("<Q")
_ABSENT, _PRESENT, _LEFT = 0, 1, 2


def shared_memory_works() -> bool:
    """Return whether this machine is supported: Linux, on a known processor architecture."""
    return futex.supported() and hasattr(os, "memfd_create")


class SegmentLayout(NamedTuple):
    """Offsets and sizes of the segment's parts, in bytes."""

    world: int
    slot_bytes: int

    @classmethod
    def of(cls, world: int) -> "SegmentLayout":
        """Return the layout for `world` ranks; a slot holds a piece for every rank."""
        return cls(world, max(_SLOT_BYTES, world * _MIN_BYTES_PER_RANK))

    @property
    def channels(self) -> int:
        """First byte after the lines."""
        return self.world * _LINE

    @property
    def slots(self) -> int:
        """First byte of the slots; page-aligned, so that slots can be viewed as any dtype."""
        end = self.channels + self.world**2 * CHANNEL
        return -(-end // _PAGE) * _PAGE

    @property
    def size(self) -> int:
        """Bytes of the segment."""
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
        """Create the memory, on rank 0; pages are allocated on first use."""
        return cls(MemorySegment.create(node, layout.size, "uint8", populate=False), layout, 0)

    @classmethod
    def open(cls, address: MemoryAddress, layout: SegmentLayout, rank: int) -> "GroupSegment":
        """
        Map the memory of rank 0.

        Raises:
            OSError: this process cannot open it.
        """
        return cls(MemorySegment.open(address, populate=False), layout, rank)

    def enter(self) -> None:
        """Publish this rank's process, before its first post."""
        self._set(_PID, os.getpid())
        self._set(_STATE, _PRESENT)

    def absent(self) -> list[int]:
        """Return the ranks that have not made their first post."""
        return [rank for rank, word in enumerate(self.words) if not word.wait(1, 0.0)]

    def leave(self) -> None:
        """Announce that this rank makes no more posts, and wake the ranks that wait for it."""
        self._set(_STATE, _LEFT)
        self.wake()

    def wake(self) -> None:
        """Wake all waits for posts, so that they check for lost ranks."""
        for word in self.words:
            word.wake()

    def has_left(self, rank: int) -> bool:
        """Return whether a rank has called `leave`."""
        return self._get(rank, _STATE) == _LEFT

    def pid(self, rank: int) -> int:
        """Return the process ID of a rank that has entered."""
        return self._get(rank, _PID)

    def publish_vector(self, address: MemoryAddress) -> None:
        """Write the address of this rank's segment of a new shared vector."""
        self._set(_VECTOR, address.fd)
        _LONG_FIELD.pack_into(self.bytes, self.rank * _LINE + _INODE, address.inode)

    def read_vectors(self) -> list[tuple[int, int, int]]:
        """Return (process, descriptor, inode) of every rank's segment of a new shared vector."""
        inodes = [
            _LONG_FIELD.unpack_from(self.bytes, r * _LINE + _INODE)[0] for r in range(self.world)
        ]
        return [(self.pid(r), self._get(r, _VECTOR), inode) for r, inode in enumerate(inodes)]

    def write_header(self, number: int, data: bytes) -> None:
        """Write this rank's header of operation `number`."""
        start = self.rank * _LINE + _HEADERS + number % 2 * SIZE
        self.bytes[start : start + SIZE] = data

    def read_header(self, rank: int, number: int) -> bytes:
        """Return a rank's header of operation `number`, after its first post."""
        start = rank * _LINE + _HEADERS + number % 2 * SIZE
        return bytes(self.bytes[start : start + SIZE])

    def channel(self, source: int, to: int) -> int:
        """Return the first byte of the control words of messages from `source` to `to`."""
        return self.layout.channels + (source * self.world + to) * CHANNEL

    def slots(self, dtype: torch.dtype) -> list[list[Tensor]]:
        """Return `[slot][rank]`, each a vector that fills the slot."""
        if dtype not in self._typed:
            flat = self.segment.tensor[self.layout.slots :].view(dtype)
            slots = flat.view(self.world, SLOTS, -1).transpose(0, 1)
            self._typed[dtype] = [list(slot.unbind()) for slot in slots.unbind()]
        return self._typed[dtype]

    def _set(self, field: int, value: int) -> None:
        _FIELD.pack_into(self.bytes, self.rank * _LINE + field, value)

    def _get(self, rank: int, field: int) -> int:
        return int(_FIELD.unpack_from(self.bytes, rank * _LINE + field)[0])


class SharedVectors:
    """Shared vectors of a group, in the order of their creation."""

    def __init__(self) -> None:
        self._ranges: list[tuple[int, int]] = []
        self._bytes: list[list[Tensor]] = []

    def add(self, segment: MemorySegment, addresses: list[tuple[int, int, int]]) -> None:
        """
        Map the other ranks' segments of a new vector.

        Args:
            segment: of this rank, in bytes.
            addresses: (process, descriptor, inode) of every rank's segment.

        Raises:
            OSError: a segment cannot be opened any more.
        """
        own = segment.address
        full = [replace(own, pid=pid, fd=fd, inode=inode) for pid, fd, inode in addresses]
        self._bytes.append([self._map(segment, address) for address in full])
        start = segment.tensor.data_ptr()
        self._ranges.append((start, start + segment.tensor.numel()))

    def offset(self, tensor: Tensor) -> int:
        """Return the offset of a contiguous tensor; `STAGED` if it is in no shared vector."""
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
        Return the offsets of several tensors, without empty ones.

        The list is empty unless all tensors are in the same shared vector.
        """
        positions = [self.offset(part) for part in parts if part.numel()]
        if STAGED in positions or len({vector_of(offset) for offset in positions}) != 1:
            return []
        return positions

    def views(self, tensor: Tensor) -> list[Tensor]:
        """Return the views of all ranks' vectors, in rank order, at the position of `tensor`."""
        start = tensor.data_ptr()
        for (first, end), vectors in zip(self._ranges, self._bytes, strict=True):
            if first <= start < end:
                span = slice(start - first, start - first + tensor.numel() * tensor.itemsize)
                return [vector[span].view(tensor.dtype) for vector in vectors]
        raise ValueError("the tensor lies in no shared vector")

    @staticmethod
    def _map(own: MemorySegment, address: MemoryAddress) -> Tensor:
        if (address.pid, address.fd) == (own.address.pid, own.address.fd):
            return own.tensor
        return MemorySegment.open(address).tensor


def create_vector(like: Tensor) -> tuple[MemorySegment, Tensor]:
    """Create a segment, and return it with a zero tensor like `like` in it."""
    size = like.numel() * like.itemsize
    segment = MemorySegment.create("", max(1, size), "uint8")
    return segment, segment.tensor[:size].view(like.dtype).view(like.shape)
