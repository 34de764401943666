"""
What is done to a disk, one operation at a time: a crash may come between two, or it is full.

`BackgroundWriter` writes in a thread what is told of a run: a disk that is full or hangs costs
lines there, not steps.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import queue
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, Generic, Protocol, TypeVar

from typing_extensions import override

Content = Iterable[bytes | memoryview]
"""A file, in parts."""


class Disk(Protocol):
    """The operations that a crash may come between; tests put one of their own in its place."""

    def make(self, path: Path) -> None:
        """Make a directory, for its owner alone."""

    def write(self, path: Path, content: Content) -> tuple[int, str]:
        """Write a file and sync it; give its size and SHA-256."""

    def sync(self, path: Path) -> None:
        """Sync a directory: the names in it."""

    def rename(self, old: Path, new: Path) -> None:
        """Give a directory another name, at once or not at all."""

    def remove(self, path: Path) -> None:
        """Remove a directory with all in it."""


class RealDisk(Disk):
    """The machine's own disk."""

    @override
    def make(self, path: Path) -> None:
        path.mkdir(mode=0o700)

    @override
    def write(self, path: Path, content: Content) -> tuple[int, str]:
        size, digest = 0, hashlib.sha256()
        with path.open("xb") as file:
            for part in content:
                file.write(part)
                digest.update(part)
                size += len(part)
            file.flush()
            os.fsync(file.fileno())
        return size, digest.hexdigest()

    @override
    def sync(self, path: Path) -> None:
        directory = os.open(path, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)

    @override
    def rename(self, old: Path, new: Path) -> None:
        old.rename(new)

    @override
    def remove(self, path: Path) -> None:
        shutil.rmtree(path)


class Records:
    """
    A file that grows by whole records: what does not fit on the disk leaves no part of it behind.

    Args:
        path: of the file; made where there is none.

    Raises:
        OSError: it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        self._size = os.fstat(self._file).st_size

    def write(self, record: bytes) -> None:
        """
        Add a record; a reader sees it at once.

        Raises:
            OSError: the disk is full; the file ends with the record before.
        """
        left = memoryview(record)
        try:
            while left:
                left = left[os.write(self._file, left) :]
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, self._size)
            raise
        self._size += len(record)

    def flush(self) -> None:
        """Nothing is held back; here for those who write to any file."""

    def close(self) -> None:
        """Close it; a second time does nothing."""
        file, self._file = self._file, -1
        if file >= 0:
            os.close(file)


def reserve(folder: Path, size: int) -> IO[bytes]:
    """
    Take room on a folder's disk, by a file without a name; closing it gives the room back.

    Raises:
        OSError: there is not so much.
    """
    file = tempfile.TemporaryFile(dir=folder)
    try:
        os.posix_fallocate(file.fileno(), 0, size)
    except OSError:
        file.close()
        raise
    return file


def write_whole(path: Path, data: bytes) -> None:
    """
    Write a file, flush it to the disk, then give it its name: a reader sees all of it or none.

    Raises:
        OSError: the disk is full, or the directory is gone; what was there before stays.
    """
    partial = path.with_suffix(path.suffix + ".partial")
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.rename(path)
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink()  # a disk that is full must not stay so
        raise
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


MOST = 10_000
"""Records that may wait for the disk."""
CLOSE_S = 10.0
"""How long the end of a run waits for them."""

Record = TypeVar("Record")


class BackgroundWriter(Generic[Record]):
    """
    Hands records on to a thread, in order, and never waits for it.

    The first failure is warned of. Later records are tried all the same, for a disk may have room
    again; at the end it is said how many were lost.

    Args:
        write: writes one record; what it raises costs that record.
        warn: is told of what is lost.
        most: records that may wait; those that come then are lost.
    """

    def __init__(
        self, write: Callable[[Record], object], warn: Callable[[str], object], most: int = MOST
    ) -> None:
        self._write, self._warn = write, warn
        self._waiting: queue.Queue[Record] = queue.Queue(most)
        self._lost = 0
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="metrics", daemon=True)
        self._thread.start()

    def put(self, record: Record) -> None:
        """Have a record written."""
        try:
            self._waiting.put_nowait(record)
        except queue.Full:
            self._lose("the disk does not answer")

    def wait(self, limit_s: float) -> bool:
        """Wait for what is to be written; say whether all of it is."""
        until = time.monotonic() + limit_s
        while self._waiting.unfinished_tasks and time.monotonic() < until:
            time.sleep(0.01)
        return not self._waiting.unfinished_tasks

    def close(self, limit_s: float = CLOSE_S) -> None:
        """Wait for what is to be written, within reason; say what was lost. Twice does nothing."""
        if self._closed:
            return
        self.wait(limit_s)
        self._closed = True
        lost = self._lost + self._waiting.unfinished_tasks
        if lost:
            self._warn(f"{lost} records of metrics were not written")

    def _lose(self, why: str) -> None:
        if not self._lost:
            self._warn(f"metrics are lost, and the run goes on without them: {why}")
        self._lost += 1

    def _work(self) -> None:
        while True:  # a daemon: nobody waits for it longer than `close` does
            record = self._waiting.get()
            try:
                if not self._closed:
                    self._write(record)
            except Exception as error:
                self._lose(str(error) or repr(error))
            finally:
                self._waiting.task_done()
