"""
Shared memory that leaves nothing behind: anonymous files, passed on by process and descriptor.

A segment is a `memfd`: it has no name in /dev/shm, so there is nothing to unlink and nothing to
forget. Another process of the same user on the same node opens `/proc/<pid>/fd/<fd>`; the kernel
frees the memory when the last mapping and descriptor are gone, whatever killed their owners.
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
    A flat tensor in memory that other processes of the node can map.

    Args:
        fd: descriptor of the memory; from now on the segment's.
        address: what the memory holds.
        populate: have the kernel map all pages now, instead of each when it is first touched.
    """

    def __init__(self, fd: int, address: MemoryAddress, *, populate: bool = True) -> None:
        dtype = getattr(torch, address.dtype)
        size = max(1, address.elements) * dtype.itemsize
        self._close = weakref.finalize(self, os.close, fd)
        self.address = address
        # The tensor keeps the mapping alive; the mapping keeps its own reference to the memory.
        flags = mmap.MAP_SHARED | (mmap.MAP_POPULATE if populate else 0)
        mapping = mmap.mmap(fd, size, flags=flags)
        self.tensor: Tensor = torch.frombuffer(mapping, dtype=dtype)[: address.elements]

    @classmethod
    def create(
        cls, node: str, elements: int, dtype: str, *, populate: bool = True
    ) -> "MemorySegment":
        """Make a segment of zeros, shape [elements], owned by this process."""
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
            OSError: its owner is gone, is another user's, or lives in another PID namespace.
        """
        where = f"/proc/{address.pid}/fd/{address.fd}"
        # The address may be old, and its numbers another process's and another file's by now.
        if not os.readlink(where).startswith("/memfd:distplat"):
            raise FileNotFoundError(errno.ENOENT, "no memory of ours", where)
        fd = os.open(where, os.O_RDWR | os.O_CLOEXEC)
        if address.inode not in (0, os.fstat(fd).st_ino):
            os.close(fd)
            raise FileNotFoundError(errno.ENOENT, "this memory is gone, and another is here", where)
        segment = cls(fd, address, populate=populate)
        segment.seal()
        return segment

    def seal(self) -> None:
        """Close the descriptor: the segment cannot be mapped any more; existing maps stay."""
        self._close()
