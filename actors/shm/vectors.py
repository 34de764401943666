"""Vectors that every rank has mapped of every rank: what is theirs is read where it lies."""

from collections.abc import Sequence
from dataclasses import replace
from zlib import crc32

from torch import Tensor

from distplat.actors.memory.memfd import Segment
from distplat.actors.messages import Address
from distplat.actors.shm.header import STAGED, place_of, place_vector


class SharedVectors:
    """The shared vectors of a group, in the order in which they were made."""

    def __init__(self) -> None:
        self._ranges: list[tuple[int, int]] = []
        self._bytes: list[list[Tensor]] = []

    def add(self, mine: Segment, offers: list[tuple[int, int]]) -> None:
        """
        Map the other ranks' parts of a new vector.

        Args:
            mine: this rank's, of bytes.
            offers: the (process, descriptor) of every rank's.

        Raises:
            OSError: a part cannot be reached any more.
        """
        here = mine.address
        addresses = [replace(here, pid=pid, fd=fd, inode=0) for pid, fd in offers]
        self._bytes.append([self._map(mine, address) for address in addresses])
        start = mine.tensor.data_ptr()
        self._ranges.append((start, start + mine.tensor.numel()))

    def locate(self, tensor: Tensor) -> int:
        """Give the place of a contiguous tensor, or `STAGED` if it lies in no shared vector."""
        if not self._ranges:
            return STAGED
        start = tensor.data_ptr()
        stop = start + tensor.numel() * tensor.itemsize
        for vector, (first, end) in enumerate(self._ranges):
            if first <= start and stop <= end:
                return place_of(vector, start - first)
        return STAGED

    def locate_all(self, parts: Sequence[Tensor]) -> tuple[int, int]:
        """
        Give the place of several tensors, and a digest of their sizes and places, never 0.

        The place is `STAGED` if one of them lies elsewhere than the others; empty ones lie nowhere.
        """
        places = [self.locate(part) for part in parts if part.numel()]
        sizes = [part.numel() for part in parts]
        if STAGED in places or len({place_vector(place) for place in places}) != 1:
            return STAGED, crc32(repr(sizes).encode()) + 1
        return places[0], crc32(repr((sizes, places)).encode()) + 1

    def views(self, mine: Tensor) -> list[Tensor]:
        """Give, in rank order, what lies in all ranks' vectors where `mine` lies in this rank's."""
        start = mine.data_ptr()
        for (first, end), parts in zip(self._ranges, self._bytes, strict=True):
            if first <= start < end:
                span = slice(start - first, start - first + mine.numel() * mine.itemsize)
                return [part[span].view(mine.dtype) for part in parts]
        raise ValueError("the tensor lies in no shared vector")

    @staticmethod
    def _map(mine: Segment, address: Address) -> Tensor:
        if (address.pid, address.fd) == (mine.address.pid, mine.address.fd):
            return mine.tensor
        return Segment.open(address).tensor


def create_vector(like: Tensor) -> tuple[Segment, Tensor]:
    """Give memory of this rank's own, and a tensor like `like` in it; all zeros."""
    size = like.numel() * like.itemsize
    segment = Segment.create("", max(1, size), "uint8")
    return segment, segment.tensor[:size].view(like.dtype).view(like.shape)
