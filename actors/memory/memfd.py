"""
Shared memory without names: anonymous files, identified by process and descriptor.

A segment is a `memfd`. It has no name in /dev/shm, so it needs no unlink and cannot leak. Another
process of the same user on the same node opens `/proc/<pid>/fd/<fd>`. The kernel frees the memory
after the last mapping and descriptor are closed, even if the owners were killed.
(docs/decisions/memfd.md)
"""

import errno
import mmap
import os
import weakref

import torch
from torch import Tensor

from distplat.actors.messages import MemoryAddress


class MemorySegment:
    """
    A flat tensor in memory that other processes on the node can map.

    Args:
        fd: descriptor of the memory; the segment takes ownership.
        address: description of the memory's contents.
        populate: whether the kernel maps all pages now, instead of each page on its first access.
    """

    def __init__(self, fd: int, address: MemoryAddress, *, populate: bool = True) -> None:
        dtype = getattr(torch, address.dtype)
        size = max(1, address.elements) * dtype.itemsize
        self._close = weakref.finalize(self, os.close, fd)
        self.address = address
        # The tensor keeps the mapping alive, which has its own reference to the memory.
        flags = mmap.MAP_SHARED | (mmap.MAP_POPULATE if populate else 0)
        mapping = mmap.mmap(fd, size, flags=flags)
        self.tensor: Tensor = torch.frombuffer(mapping, dtype=dtype)[: address.elements]

    @classmethod
    def create(
        cls, node: str, elements: int, dtype: str, *, populate: bool = True
    ) -> "MemorySegment":
        """Create a segment of zeros, shape [elements], owned by this process."""
        fd = os.memfd_create("distplat", os.MFD_CLOEXEC)
        os.ftruncate(fd, max(1, elements) * getattr(torch, dtype).itemsize)
        inode = os.fstat(fd).st_ino
        return cls(
            fd, MemoryAddress(node, os.getpid(), fd, elements, dtype, inode), populate=populate
        )

    @classmethod
    def open(cls, address: MemoryAddress, *, populate: bool = True) -> "MemorySegment":
        """
        Map another process's segment.

        Raises:
            OSError: The owner has ended, belongs to another user, or lives in another PID
                namespace.
        """
        where = f"/proc/{address.pid}/fd/{address.fd}"
        # The address may be outdated: its pid and descriptor may now belong to another file.
        if not os.readlink(where).startswith("/memfd:distplat"):
            raise FileNotFoundError(errno.ENOENT, "not a segment of distplat", where)
        fd = os.open(where, os.O_RDWR | os.O_CLOEXEC)
        if address.inode not in (0, os.fstat(fd).st_ino):
            os.close(fd)
            raise FileNotFoundError(
                errno.ENOENT,
                "the segment no longer exists, and another file has its descriptor",
                where,
            )
        segment = cls(fd, address, populate=populate)
        segment.seal()
        return segment

    def seal(self) -> None:
        """Close the descriptor: no more processes can map the segment; mappings stay valid."""
        self._close()
