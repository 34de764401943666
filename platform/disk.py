"""
Disk operations, one method each: a crash may happen between two, or the disk may be full.

`BackgroundWriter` writes a run's records in a thread, so that a full or hanging disk costs records,
not steps.
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
"""Content of a file, in pieces."""
OnProgress = Callable[[], object]
"""Called after each piece of disk work."""
SETTING = "failure.storage_timeout_s"
FOLDER_MODE, FILE_MODE = 0o770, 0o660
"""Modes of a run's directories and files, before the umask: no access for others."""
_PIECE_BYTES = 64 * 2**20
"""Bytes per write and sync; `on_progress` is called after each."""


class DiskHangs(StorageError):
    """The disk does not respond."""


class Disk:
    """Disk operations of a checkpoint; tests make single operations fail."""

    def make(self, path: Path) -> None:
        """Create a directory; see `FOLDER_MODE`."""
        path.mkdir(mode=FOLDER_MODE)

    def write(self, path: Path, content: FileContent) -> tuple[int, str]:
        """Write and sync a file; return its size and SHA-256."""
        size, synced, digest = 0, 0, hashlib.sha256()
        with open(path, "xb", opener=opener) as file:
            for part in content:
                file.write(part)
                digest.update(part)
                size += len(part)
                if size - synced >= _PIECE_BYTES:  # one sync at the end would show no progress
                    file.flush()
                    os.fsync(file.fileno())
                    synced = size
            file.flush()
            os.fsync(file.fileno())
        return size, digest.hexdigest()

    def sync(self, path: Path) -> None:
        """Sync a directory, for the names in it."""
        _sync(path)

    def rename(self, old: Path, new: Path) -> None:
        """Rename a directory atomically."""
        old.rename(new)

    def remove(self, path: Path) -> None:
        """Remove a directory tree."""
        shutil.rmtree(path)


def opener(path: str, flags: int) -> int:
    """Open a file of a run with `FILE_MODE`; the `opener` argument of `open`."""
    return os.open(path, flags, FILE_MODE)


def iter_pieces(content: FileContent, on_progress: OnProgress) -> Iterator[memoryview]:
    """Split a file's content into pieces; `on_progress` is called after each was written."""
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
    Open a file that another user may have written; the caller closes it.

    Raises:
        FileNotFoundError: the file does not exist.
        StorageError: it is not readable, or is a link, a pipe or a device.
    """
    try:
        # O_NOFOLLOW: a link could lead to a private file. O_NONBLOCK: opening a pipe would block.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise _unreadable(path, error) from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise StorageError(f"cannot read {path}: it is not a regular file")
    return open(descriptor, "rb")


@contextlib.contextmanager
def open_regular(path: Path) -> Iterator[IO[bytes] | None]:
    """
    Open a file that another user may have written; None: it does not exist.

    Raises:
        StorageError: it is not readable, or is a link, a pipe or a device.
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
    Refuse an existing path that is not a file: reading a pipe or a device may never end.

    Raises:
        StorageError: the path exists and is not a regular file.
    """
    if path.exists() and not path.is_file():
        raise StorageError(f"cannot read {path}: it is not a regular file")


class RecordFile:
    """
    An append-only file of complete records; a record that does not fit on the disk is not written.

    Args:
        path: of the file; created if missing.

    Raises:
        OSError: it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, FILE_MODE)
        self.size = os.fstat(self._file).st_size

    def write(self, record: bytes) -> None:
        """
        Append a record; readers see it at once.

        Raises:
            OSError: the disk is full; the file keeps its previous records.
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
        """Do nothing, as nothing is buffered; part of the file interface."""

    def close(self) -> None:
        """Close the file; idempotent."""
        file, self._file = self._file, -1
        if file >= 0:
            os.close(file)


def reserve(folder: Path, size: int) -> IO[bytes]:
    """
    Reserve disk space with an unnamed file; closing the file frees the space.

    Raises:
        OSError: there is not enough space.
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
    Run disk work in a thread, with a deadline: a call to a hanging disk cannot be interrupted.

    Args:
        work: receives a callback that restarts the deadline after each piece of work.
        where: file or directory, for the error.
        limit_s: usually `failure.storage_timeout_s`.
        setting: field that changes the deadline; empty: none.

    Raises:
        DiskHangs: there was no progress for `limit_s`. The thread is left running.
    """
    moved_at = time.monotonic()

    def on_progress() -> None:
        nonlocal moved_at
        moved_at = time.monotonic()

    future = run_in_thread("disk", lambda: work(on_progress))
    while not future.done():
        remaining_s = moved_at + limit_s - time.monotonic()
        if remaining_s <= 0:
            text = f"no answer within {limit_s:g} s: its disk does not answer"
            change = f"; `{setting}` changes this deadline" if setting else ""
            raise DiskHangs(f"{where}: {text}{change}")
        wait([future], remaining_s)
    return future.result()


def run_in_thread(name: str, work: Callable[[], T]) -> Future[T]:
    """Run work that may never end in a new daemon thread."""
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
    Write and sync a file under a temporary name, then rename it.

    Args:
        path: of the file.
        data: its content.
        on_progress: see `with_deadline`.

    Raises:
        OSError: the disk is full, or the directory is gone; an existing file stays.
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
            partial.unlink()  # free the space of a full disk
        raise
    _sync(path.parent)


MAX_WAITING = 10_000
"""Most records that may wait for the disk."""
CLOSE_S = 10.0
"""How long to wait for waiting records at the end of a run."""

Record = TypeVar("Record")


class _End:
    """Marks the end of a writer's queue."""


class BackgroundWriter(Generic[Record]):
    """
    Write records in a thread, in order.

    The first failure is reported with a warning. Later records are still tried, because a disk may
    have space again; `close` reports how many were lost.

    Args:
        write: writes one record; an exception loses that record.
        warn: called with each warning.
        most: most records that may wait; more are lost.
        what: the records' name in messages, plural.
        where: their destination in messages.
        patience_s: how long `put` may block in total until the thread catches up; 0: never.
    """

    def __init__(
        self,
        write: Callable[[Record], object],
        warn: Callable[[str], object],
        most: int = MAX_WAITING,
        what: str = "metrics",
        where: str = "the disk",
        patience_s: float = 0.0,
    ) -> None:
        self._write, self._warn, self._what, self._where = write, warn, what, where
        self._queue: queue.Queue[Record | _End] = queue.Queue(most)
        self._patience_s, self._waited_s = patience_s, 0.0
        self._lost = 0
        self._closed = False
        self._thread = threading.Thread(target=self._work, name=what, daemon=True)
        self._thread.start()

    def put(self, record: Record) -> None:
        """Queue a record; after `close` it is dropped."""
        if self._closed:
            return
        if self._queue.empty():
            self._waited_s = 0.0
        try:
            self._queue.put_nowait(record)
        except queue.Full:
            self._put_blocking(record)

    def _put_blocking(self, record: Record) -> None:
        """Wait for space in the queue, within `patience_s`."""
        start = time.monotonic()
        try:
            self._queue.put(record, timeout=max(0.0, self._patience_s - self._waited_s))
        except queue.Full:
            self._drop(f"{self._where} does not answer")
        self._waited_s += time.monotonic() - start

    def wait(self, limit_s: float) -> bool:
        """Wait for queued records; return whether all are written."""
        until = time.monotonic() + limit_s
        while self._queue.unfinished_tasks and time.monotonic() < until:
            time.sleep(0.01)
        return not self._queue.unfinished_tasks

    def close(self, limit_s: float = CLOSE_S) -> bool:
        """
        Wait for queued records up to `limit_s`, end the thread, and warn once about lost records.

        A thread that still writes a record ends after it.

        Returns:
            Whether all records are written or dropped: the disk responds.
        """
        idle = self.wait(limit_s)
        lost = self._lost + self._queue.unfinished_tasks
        if not self._closed:
            if lost:
                self._warn(f"{lost} records of {self._what} were not written")
            with contextlib.suppress(queue.Full):  # then the thread ends with the last record
                self._queue.put_nowait(_End())
            self._closed = True
        return idle

    def _drop(self, why: str) -> None:
        if not self._lost:
            self._warn(f"{self._what} are lost, and the run continues without them: {why}")
        self._lost += 1

    def _work(self) -> None:
        ended = False
        while not ended:  # a daemon thread: only `close` waits for it
            record = self._queue.get()
            try:
                if not (self._closed or isinstance(record, _End)):
                    self._write(record)
            except BaseException as error:  # sys.exit() in a library would end the thread
                self._drop(str(error) or repr(error))
            finally:
                self._queue.task_done()
            ended = isinstance(record, _End) or (self._closed and self._queue.empty())
