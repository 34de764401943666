"""
What is done to a disk, one operation at a time: a crash may come between two, or it is full.

`BackgroundWriter` writes in a thread what is told of a run: a disk that is full or hangs costs
lines there, not steps.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import queue
import shutil
import stat
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, wait
from pathlib import Path
from threading import Thread
from typing import IO, Generic, TypeVar

from distplat.platform.errors import StorageError

T = TypeVar("T")

FileContent = Iterable[bytes | memoryview]
"""A file, in parts."""
OnProgress = Callable[[], object]
"""Called by who works on a disk, whenever it has done something."""
SETTING = "failure.storage_timeout_s"
FOLDER_MODE, FILE_MODE = 0o770, 0o660
"""What a run makes, less the umask: others have no right to it, the group what the umask leaves."""
_PIECE_BYTES = 64 * 2**20
"""What is written at a time, where somebody waits for a large file."""


class DiskHangs(StorageError):
    """The disk gives no answer."""


class Disk:
    """The operations that a crash may come between, one method each: tests make them fail."""

    def make(self, path: Path) -> None:
        """Make a directory; see `FOLDER_MODE`."""
        path.mkdir(mode=FOLDER_MODE)

    def write(self, path: Path, content: FileContent) -> tuple[int, str]:
        """Write a file and sync it; give its size and SHA-256."""
        size, synced, digest = 0, 0, hashlib.sha256()
        with open(path, "xb", opener=opener) as file:
            for part in content:
                file.write(part)
                digest.update(part)
                size += len(part)
                if size - synced >= _PIECE_BYTES:  # else one sync is for all, and takes as long
                    file.flush()
                    os.fsync(file.fileno())
                    synced = size
            file.flush()
            os.fsync(file.fileno())
        return size, digest.hexdigest()

    def sync(self, path: Path) -> None:
        """Sync a directory: the names in it."""
        _sync(path)

    def rename(self, old: Path, new: Path) -> None:
        """Give a directory another name, at once or not at all."""
        old.rename(new)

    def remove(self, path: Path) -> None:
        """Remove a directory with all in it."""
        shutil.rmtree(path)


def opener(path: str, flags: int) -> int:
    """Open a file of a run, as `open` asks its `opener` to; see `FILE_MODE`."""
    return os.open(path, flags, FILE_MODE)


def iter_pieces(content: FileContent, on_progress: OnProgress) -> Iterator[memoryview]:
    """Cut a file's parts; `moved` is told when the next piece is asked for: one is written."""
    for part in content:
        view = memoryview(part).cast("B")
        for start in range(0, len(view), _PIECE_BYTES):
            yield view[start : start + _PIECE_BYTES]
            on_progress()


def _sync(folder: Path) -> None:
    directory = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def regular_file(path: Path) -> IO[bytes]:
    """
    Open a file that somebody else may have written; the caller closes it.

    Raises:
        FileNotFoundError: it is not there.
        StorageError: it may not be read, or is a link, a pipe or a device.
    """
    try:
        # No links: they could lead to a file of ours. Without waiting: a pipe has no end.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise _unreadable(path, error) from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise StorageError(f"cannot read {path}: it is no regular file")
    return open(descriptor, "rb")


@contextlib.contextmanager
def open_regular(path: Path) -> Iterator[IO[bytes] | None]:
    """
    Open a file that somebody else may have written; None: it is not there.

    Raises:
        StorageError: it may not be read, or is a link, a pipe or a device.
    """
    try:
        file = regular_file(path)
    except FileNotFoundError:
        yield None
        return
    with file:
        try:
            yield file
        except OSError as error:
            raise _unreadable(path, error) from error


def _unreadable(path: Path, error: OSError) -> StorageError:
    why = "it is a link" if error.errno == errno.ELOOP else error.strerror
    return StorageError(f"cannot read {path}: {why}")


def check_regular(path: Path) -> None:
    """
    Refuse what is there and no file: a pipe would block, a device never end.

    Raises:
        StorageError: it is one of them.
    """
    if path.exists() and not path.is_file():
        raise StorageError(f"cannot read {path}: it is no regular file")


class RecordFile:
    """
    A file that grows by whole records: what does not fit on the disk leaves no part of it behind.

    Args:
        path: of the file; made where there is none.

    Raises:
        OSError: it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, FILE_MODE)
        self.size = os.fstat(self._file).st_size

    def write(self, record: bytes) -> None:
        """
        Add a record; a reader sees it at once.

        Raises:
            OSError: the disk is full; the file ends with the record before.
        """
        remaining = memoryview(record)
        try:
            while remaining:
                remaining = remaining[os.write(self._file, remaining) :]
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, self.size)
            raise
        self.size += len(record)

    def flush(self) -> None:
        """Do nothing: nothing is buffered. For callers that write to any file."""

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


def with_deadline(
    work: Callable[[OnProgress], T], where: Path, limit_s: float, setting: str = SETTING
) -> T:
    """
    Have a thread work on a disk, and wait for it: nothing else ends a call to a disk that hangs.

    Args:
        work: may tell that the disk has done something, and the deadline begins anew.
        where: file or directory, for the error.
        limit_s: `failure.storage_timeout_s`, mostly.
        setting: what changes it; empty: nothing does.

    Raises:
        DiskHangs: the disk has done nothing for so long. The thread is left to it.
    """
    moved_at = time.monotonic()

    def on_progress() -> None:
        nonlocal moved_at
        moved_at = time.monotonic()

    future = run_in_thread("disk", lambda: work(on_progress))
    while not future.done():
        left_s = moved_at + limit_s - time.monotonic()
        if left_s <= 0:
            text = f"no answer within {limit_s:g} s: its disk does not answer"
            change = f"; `{setting}` changes this deadline" if setting else ""
            raise DiskHangs(f"{where}: {text}{change}")
        wait([future], left_s)
    return future.result()


def run_in_thread(name: str, work: Callable[[], T]) -> Future[T]:
    """Run something that may never end in a daemon thread of its own."""
    future = Future[T]()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    Thread(target=run, name=name, daemon=True).start()
    return future


def write_atomically(path: Path, data: bytes, on_progress: OnProgress = lambda: None) -> None:
    """
    Write a file, flush it to the disk, then give it its name: a reader sees all of it or none.

    Args:
        path: of the file.
        data: all of it.
        on_progress: see `with_deadline`.

    Raises:
        OSError: the disk is full, or the directory is gone; what was there before stays.
    """
    partial = path.with_suffix(path.suffix + ".partial")
    try:
        with open(partial, "wb", opener=opener) as file:
            for start in range(0, len(data) or 1, _PIECE_BYTES):
                file.write(memoryview(data)[start : start + _PIECE_BYTES])
                file.flush()
                os.fsync(file.fileno())
                on_progress()
        partial.rename(path)
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink()  # a disk that is full must not stay so
        raise
    _sync(path.parent)


MOST = 10_000
"""Records that may wait for the disk."""
CLOSE_S = 10.0
"""How long the end of a run waits for them."""

Record = TypeVar("Record")


class BackgroundWriter(Generic[Record]):
    """
    Hands records on to a thread, in order.

    The first failure is warned of. Later records are tried all the same, for a disk may have room
    again; at the end it is said how many were lost.

    Args:
        write: writes one record; what it raises costs that record.
        warn: is told of what is lost.
        most: records that may wait; those that come then are lost.
        what: they are, in the plural.
        where: they go, for who is told that it does not answer.
        patience_s: how long `put` may wait for room, all in all until the thread has caught up; 0:
            it never waits.
    """

    def __init__(
        self,
        write: Callable[[Record], object],
        warn: Callable[[str], object],
        most: int = MOST,
        what: str = "metrics",
        where: str = "the disk",
        patience_s: float = 0.0,
    ) -> None:
        self._write, self._warn, self._what, self._where = write, warn, what, where
        self._waiting: queue.Queue[Record] = queue.Queue(most)
        self._patience_s, self._waited_s = patience_s, 0.0
        self._lost = 0
        self._closed = False
        self._thread = threading.Thread(target=self._work, name=what, daemon=True)
        self._thread.start()

    def put(self, record: Record) -> None:
        """Have a record written."""
        if self._waiting.empty():
            self._waited_s = 0.0
        try:
            self._waiting.put_nowait(record)
        except queue.Full:
            self._put_late(record)

    def _put_late(self, record: Record) -> None:
        """Wait for room as long as patience lasts."""
        began = time.monotonic()
        try:
            self._waiting.put(record, timeout=max(0.0, self._patience_s - self._waited_s))
        except queue.Full:
            self._drop(f"{self._where} does not answer")
        self._waited_s += time.monotonic() - began

    def wait(self, limit_s: float) -> bool:
        """Wait for what is to be written; say whether all of it is."""
        until = time.monotonic() + limit_s
        while self._waiting.unfinished_tasks and time.monotonic() < until:
            time.sleep(0.01)
        return not self._waiting.unfinished_tasks

    def close(self, limit_s: float = CLOSE_S) -> bool:
        """
        Wait for what is to be written, within reason; warn of what was lost, once.

        Returns:
            Whether the disk answers: nothing waits for it any more.
        """
        idle = self.wait(limit_s)
        lost = self._lost + self._waiting.unfinished_tasks
        if lost and not self._closed:
            self._warn(f"{lost} records of {self._what} were not written")
        self._closed = True
        return idle

    def _drop(self, why: str) -> None:
        if not self._lost:
            self._warn(f"{self._what} are lost, and the run goes on without them: {why}")
        self._lost += 1

    def _work(self) -> None:
        while True:  # a daemon: nobody waits for it longer than `close` does
            record = self._waiting.get()
            try:
                if not self._closed:
                    self._write(record)
            except BaseException as error:  # sys.exit() of a library would end the thread
                self._drop(str(error) or repr(error))
            finally:
                self._waiting.task_done()
