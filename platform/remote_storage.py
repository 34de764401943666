"""
Files at a URL, through fsspec, with a deadline for each operation.

An operation runs in its own thread. If it hangs, the thread is abandoned and the next operation
opens a new connection: libraries have deadlines of minutes, or none.

`storage_path` and `--resume` accept such a URL in place of a directory. The run directory stays
local, below `runs`; a copy of it is uploaded to the URL during the run (`run_upload.py`).

A checkpoint at a URL is downloaded to a local disk and read there. A checkpoint without a manifest
is incomplete or being deleted, and is skipped. A checkpoint that does not match its manifest is
damaged, and the previous one is used. A storage that does not respond is an error, because an older
checkpoint would lose work.
"""

from __future__ import annotations

import logging
import re
import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from contextlib import suppress
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any, TypeVar

from distplat.platform.checkpoints import (
    FOLDER,
    MANIFEST,
    StoredCheckpoint,
    read,
    read_manifest,
    step_of,
)
from distplat.platform.disk import (
    FOLDER_MODE,
    SETTING,
    DiskHangs,
    opener,
    run_in_thread,
    with_deadline,
)
from distplat.platform.errors import DeadlineExceeded, Problem, SpecError, StorageError
from distplat.platform.total_memory import check_fits

T = TypeVar("T")

PART_BYTES = 8 * 2**20
"""Most bytes per operation."""
_MAX_PARTS = 9_000
"""Most parts of one object; S3's limit is 10 000."""
_MAX_HANGING = 8
"""Most operations that may hang at a time; further ones fail at once."""
_ATTEMPTS = 4
"""Attempts of an operation with retries."""
_MAX_LOGGED = 1000
"""Most log messages that are remembered, to print each once."""
_USER = re.compile(r"//[^/@\s]+@")


_logged: set[str] = set()  #: messages that were logged


def _log_once(record: logging.LogRecord) -> bool:
    """Log each message once: gcsfs repeats its permission warnings in every operation."""
    text = record.getMessage()
    new = text not in _logged
    if new and len(_logged) < _MAX_LOGGED:
        _logged.add(text)
    return new


class NoAnswer(StorageError):
    """The storage did not respond in time."""


class ObjectNotFound(StorageError):
    """A file, directory or bucket does not exist."""


class AccessRefused(StorageError):
    """The storage denied access; a retry does not help."""


_CREDENTIAL_ERRORS = ("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound")
"""Names of botocore's errors for missing credentials."""


class RemoteStorage:
    """
    Files below one URL; names are relative to it, with `/`.

    Args:
        url: for example `s3://bucket/prefix`.
        limit_s: `failure.storage_timeout_s`; the deadline of one operation is a quarter of it.
    """

    def __init__(self, url: str, limit_s: float) -> None:
        self.url = url.rstrip("/")
        self.limit_s = limit_s
        self.answered_at = time.monotonic()  #: time of the last completed operation
        self._hanging: list[Future[Any]] = []
        self._opened: tuple[Any, str] | None = None  #: fsspec's file system, path of the URL

    @property
    def _local(self) -> bool:
        return self.url.startswith(("file://", "local://"))

    def put(self, name: str, file: IO[bytes], size: int) -> None:
        """
        Write a file atomically.

        Args:
            name: of the file at the URL.
            file: read from its current position.
            size: number of bytes to write.

        Raises:
            StorageError: it could not be written.
            OSError: `file` could not be read.
        """
        part = max(PART_BYTES, -(-size // _MAX_PARTS))
        out = self._run(name, partial(self._begin, part, name), is_request=False)
        try:
            remaining = size
            while remaining:
                data = file.read(min(part, remaining))
                if not data:
                    raise OSError(f"{name} has become shorter")
                self._run(name, partial(_write, out, data), is_request=len(data) == part)
                remaining -= len(data)
            self._run(name, partial(self._commit, out))
        except NoAnswer:
            raise
        except BaseException:
            with suppress(StorageError):  # the upload may not have started at the storage
                self._run(name, partial(self._discard, out), is_request=False)
            raise
        if (stored := self.size(name)) != size:
            raise StorageError(f"{self.url}/{name} has {stored} bytes, {size} were written")

    def read(self, name: str, start: int, stop: int) -> bytes:
        """
        Read a part of a file, at most `PART_BYTES`; fewer bytes at its end.

        Raises:
            ObjectNotFound: the file does not exist.
            StorageError: it could not be read.
        """
        return bytes(self._run(name, lambda fs, path: fs.cat_file(path, start=start, end=stop)))

    def size(self, name: str) -> int:
        """
        Return a file's size in bytes.

        Raises:
            ObjectNotFound: the file does not exist.
            StorageError: the request failed.
        """
        return self._run(name, lambda fs, path: int(fs.info(path)["size"]))

    def names(self, folder: str) -> list[str]:
        """
        Return the names of a directory's entries; [] if it does not exist.

        Raises:
            StorageError: the request failed.
        """
        with suppress(ObjectNotFound):
            paths = self._run(folder, lambda fs, path: fs.ls(path, detail=False))
            return [str(path).rstrip("/").rpartition("/")[2] for path in paths]
        return []

    def remove(self, name: str) -> None:
        """
        Remove a file or a directory tree, if it exists.

        Raises:
            StorageError: the request failed; it may still exist.
        """
        with suppress(ObjectNotFound):
            self._run(name, lambda fs, path: fs.rm(path, recursive=True))

    def with_retries(self, work: Callable[[], T]) -> T:
        """
        Retry an operation a few times, with pauses.

        Raises:
            ObjectNotFound: from `work`; not retried.
            StorageError: every attempt failed.
        """
        for n in range(_ATTEMPTS - 1):
            try:
                return work()
            except ObjectNotFound:
                raise
            except StorageError:
                time.sleep(min(0.5 * 4**n, self.limit_s / 8))
        return work()

    def _run(self, name: str, work: Callable[[Any, str], T], *, is_request: bool = True) -> T:
        """
        Run an operation in a thread, and wait for it up to the deadline.

        Args:
            name: of the file.
            work: called with fsspec's file system, and the file's path in it.
            is_request: whether the operation sends a request to the storage, not only to a buffer.
        """
        limit_s = self.limit_s / 4
        self._hanging = [operation for operation in self._hanging if not operation.done()]
        if len(self._hanging) >= _MAX_HANGING:
            text = f"{_MAX_HANGING} earlier operations still hang"
            raise NoAnswer(f"{self.url}/{name}: {text}; `{SETTING}` changes their deadline")
        self._import_library(name)
        operation = run_in_thread("remote storage", lambda: work(*self._connected(name)))
        if not wait([operation], limit_s).done:
            self._hanging.append(operation)
            self._opened = None
            late = DeadlineExceeded(f"{self.url}/{name}", ("its storage",), limit_s, SETTING)
            raise NoAnswer(str(late))
        if (error := operation.exception()) is not None:
            raise self._storage_error(name, error) from error
        if is_request:
            self.answered_at = time.monotonic()
        return operation.result()

    def _import_library(self, name: str) -> None:
        """Import the scheme's library outside of the deadline; this takes a second."""
        from fsspec import get_filesystem_class

        try:
            filesystem = get_filesystem_class(self.url.partition("://")[0])
        except Exception as error:  # for example incompatible versions of dependencies
            raise self._storage_error(name, error) from error
        logging.getLogger(filesystem.__module__.partition(".")[0]).addFilter(_log_once)

    def _connected(self, name: str) -> tuple[Any, str]:
        """Return the file system, and a file's path in it."""
        if self._opened is None:
            from fsspec.core import url_to_fs

            fs, root = url_to_fs(self.url, skip_instance_cache=True, use_listings_cache=False)
            self._opened = fs, str(root).rstrip("/")
        fs, root = self._opened
        return fs, f"{root}/{name}" if name else root

    def _storage_error(self, name: str, error: BaseException) -> StorageError:
        text = (
            f"{self.url}/{name}: {_USER.sub('//***@', str(error) or repr(error)).splitlines()[0]}"
        )
        if isinstance(error, FileNotFoundError):
            return ObjectNotFound(text)
        refused = isinstance(error, PermissionError | NotADirectoryError)
        if refused or type(error).__name__ in _CREDENTIAL_ERRORS:
            return AccessRefused(text)
        return StorageError(text)

    # Object stores show only complete objects; local directories need a rename.

    def _begin(self, part: int, name: str, fs: Any, path: str) -> Any:
        if self._local:
            for folder in reversed(Path(path).parents[: name.count("/") + 1]):
                folder.mkdir(FOLDER_MODE, parents=True, exist_ok=True)
            return open(path + ".partial", "wb", opener=opener)
        return fs.open(path, "wb", block_size=part, autocommit=False)

    def _commit(self, out: Any, fs: Any, path: str) -> None:
        out.close()
        if self._local:
            fs.mv(path + ".partial", path)
        else:
            out.commit()

    def _discard(self, out: Any, fs: Any, path: str) -> None:
        if self._local:
            out.close()
            fs.rm_file(path + ".partial")
        else:
            out.discard()


def _write(out: Any, data: bytes, fs: Any, path: str) -> None:
    out.write(data)


LOCAL = "runs"
"""Directory of local run directories, if `storage_path` is a URL."""

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}
"""distplat's extra with the library of a scheme."""


def is_url(text: str) -> bool:
    """Return whether a path is a URL."""
    return _URL.match(text) is not None


def local_folder(storage_path: str) -> str:
    """Return the directory of local run directories."""
    return LOCAL if is_url(storage_path) else storage_path


def url_problem(url: str) -> tuple[str, str]:
    """
    Return why a URL is refused, and a hint; empty if it is accepted. Neither contains the URL.

    Secrets in a URL would be copied to `job.yaml`, logs and messages.
    """
    match = _URL.match(url)
    assert match is not None, "only for URLs"
    scheme, location = match[1].lower(), url[match.end() :]
    if "@" in location.partition("/")[0]:
        hint = "leave it out: the library of the scheme reads its environment and files"
        return "a URL must hold no user or password", hint
    if any(sign in location for sign in ("?", "#", "::", "://")):
        return "a URL must hold no query, fragment or second URL", "write scheme://bucket/prefix"
    if scheme in ("http", "https"):
        hint = "for a server that speaks S3 write s3://bucket/prefix and set AWS_ENDPOINT_URL"
        return f"{scheme}:// cannot be written to", hint
    if scheme == "memory":
        return "memory:// is gone with the process", "for example s3://, gs:// or file://"
    if ".." in location.split("/") or not location.strip("/"):
        return "a URL must name a bucket or directory, without `..`", "write scheme://bucket/prefix"
    if scheme in ("file", "local") and not location.startswith("/"):
        return f"{scheme}:// needs an absolute path", f"write {scheme}:///home/me/runs"
    return "", ""


def missing_library(url: str) -> tuple[str, str]:
    """Return which library a URL's scheme lacks, and a hint; empty if none."""
    from fsspec.registry import known_implementations, registry

    scheme = url.partition("://")[0]
    if scheme in registry:
        return "", ""
    if scheme not in known_implementations:
        return f"fsspec knows no {scheme}://", "for example s3://, gs:// or file://"
    implementation = known_implementations[scheme]
    module = str(implementation["class"]).partition(".")[0]
    if module == "fsspec":
        return _missing_dependency(scheme)
    if find_spec(module) is not None:
        return "", ""
    extra = _EXTRAS.get(scheme)
    hint = f"pip install 'distplat[{extra}]'" if extra else str(implementation.get("err", ""))
    return f"{scheme}:// needs the package {module}, which is not installed", hint


def _missing_dependency(scheme: str) -> tuple[str, str]:
    """Return the same for a scheme that fsspec implements itself, perhaps with another package."""
    from fsspec import get_filesystem_class

    try:
        get_filesystem_class(scheme)
    except ImportError as error:
        return f"{scheme}:// needs a package that is not installed", str(error)
    return "", ""


def check_url(url: str, *where: str) -> None:
    """
    Check that a URL can be used on this machine.

    Args:
        url: the URL.
        where: field or option with the URL.

    Raises:
        SpecError: it is refused, or the library of its scheme is missing.
    """
    for text, hint in (url_problem(url), missing_library(url)):
        if text:
            raise SpecError(Problem(where, text, hint))


_MANIFEST_BYTES = PART_BYTES


def _checkpoint_names(url: str, limit_s: float) -> tuple[RemoteStorage, list[str]]:
    """Return the storage of a URL's checkpoints, and their names, newest first."""
    base, _, last = url.rpartition("/")
    if step_of(last) is not None:
        return RemoteStorage(base, limit_s), [last]
    storage = RemoteStorage(url if last == FOLDER else f"{url}/{FOLDER}", limit_s)
    names = storage.with_retries(lambda: storage.names(""))
    steps = {step: name for name in names if (step := step_of(name)) is not None}
    return storage, [steps[step] for step in sorted(steps, reverse=True)]


def fetch(
    url: str, folder: Path, limit_s: float, warn: Callable[[str], object]
) -> StoredCheckpoint:
    """
    Download the checkpoint that `--resume URL` names, or the newest intact one of a run.

    Args:
        url: of a run's copy, of its `checkpoints`, or of one of them.
        folder: an empty directory for the checkpoint.
        limit_s: `failure.storage_timeout_s`.
        warn: called with a message about each damaged checkpoint.

    Raises:
        SpecError: the URL is refused, its library is missing, or there is no checkpoint.
        StorageError: all checkpoints are damaged, the storage or the local disk does not respond,
            or the disk is full.
    """
    check_url(url, "--resume")
    storage, names = _checkpoint_names(url.rstrip("/"), limit_s)
    damaged = 0
    for name in names:
        try:
            if (stored := _download(storage, name, folder / name)) is not None:
                return stored
        except _Damaged as error:
            damaged += 1
            warn(f"{storage.url}/{name} is damaged: {error}; taking the one before")
            shutil.rmtree(folder / name, ignore_errors=True)
    if damaged:
        raise StorageError(f"{url}: all {damaged} checkpoints are damaged")
    hint = "give the URL of a run, `storage_path` and its name, or of one of its checkpoints"
    raise SpecError(Problem(("--resume",), f"no whole checkpoint at {url}", hint))


def url_of(url: str, stored: StoredCheckpoint) -> str:
    """
    Return the URL of a fetched checkpoint.

    Args:
        url: argument of `fetch`.
        stored: result of `fetch`.
    """
    base, _, last = url.rstrip("/").rpartition("/")
    if step_of(last) is not None:
        return url.rstrip("/")
    return "/".join([base, last, *([] if last == FOLDER else [FOLDER]), stored.path.name])


class _Damaged(Exception):
    """A checkpoint that does not match its manifest."""


def _download(storage: RemoteStorage, name: str, target: Path) -> StoredCheckpoint | None:
    """Download and read one checkpoint; None: it has no manifest."""
    try:
        size = storage.with_retries(lambda: storage.size(f"{name}/{MANIFEST}"))
    except ObjectNotFound:
        return None
    if size > _MANIFEST_BYTES:
        raise _Damaged(f"its manifest has {size} bytes")
    try:
        _on_disk(storage, target, lambda: target.mkdir(mode=0o700))
        _download_file(storage, f"{name}/{MANIFEST}", target / MANIFEST, size)
        try:
            files = _on_disk(storage, target, lambda: read_manifest(target))
        except DiskHangs:
            raise
        except StorageError as error:
            raise _Damaged(error) from None
        check_fits(target, sum(facts["bytes"] for facts in files.values()))
        for file, facts in files.items():
            _download_file(storage, f"{name}/{file}", target / file, facts["bytes"])
    except OSError as error:
        raise StorageError(f"cannot write {target}: {error.strerror or error}") from error
    try:
        return with_deadline(lambda on_progress: read(target, on_progress), target, storage.limit_s)
    except DiskHangs:
        raise
    except StorageError as error:
        raise _Damaged(error) from None


def _on_disk(storage: RemoteStorage, where: Path, work: Callable[[], T]) -> T:
    """Run work on the local disk, with the deadline of the storage."""
    return with_deadline(lambda on_progress: work(), where, storage.limit_s)


def _download_file(storage: RemoteStorage, name: str, target: Path, size: object) -> None:
    """Download a file that must have `size` bytes."""
    try:
        actual_size = storage.with_retries(lambda: storage.size(name))
    except ObjectNotFound:
        raise _Damaged(f"there is no {name}") from None
    if actual_size != size:
        raise _Damaged(f"{name} has {actual_size} bytes, expected {size}")
    file = _on_disk(storage, target, lambda: target.open("xb"))
    try:
        for start in range(0, actual_size, PART_BYTES):
            stop = min(start + PART_BYTES, actual_size)
            chunk = storage.with_retries(partial(storage.read, name, start, stop))
            _on_disk(storage, target, partial(file.write, chunk))
    finally:
        _on_disk(storage, target, file.close)
