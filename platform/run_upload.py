"""
Uploads a run directory to a URL during the run, in a thread.

    <storage_path>/<run>/
        job.yaml  metrics.jsonl  model.safetensors ...   after each change
        checkpoints/step-000120/    its files, then manifest.json
        result.json                 last: the copy is complete

The run does not wait for uploads before its end. Failures are reported once and retried; the end of
the run waits while the storage responds and accepts data.
"""

from __future__ import annotations

import os
import shlex
import stat
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import wait
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

from distplat.platform.checkpoints import FOLDER, MANIFEST, Catalogue, read_manifest
from distplat.platform.disk import SETTING, regular_file, run_in_thread, with_deadline
from distplat.platform.errors import StorageError
from distplat.platform.remote_storage import (
    AccessRefused,
    NoAnswer,
    ObjectNotFound,
    RemoteStorage,
)

JOB, RESULT = "job.yaml", "result.json"
NOT_UPLOADED = "not_uploaded"
"""Field of `result.json`: files missing at the URL after an otherwise successful run."""
_POLL_S = 1.0
_GROWING_S = 10.0
"""Shortest interval between uploads of a growing file."""
_SHARE = 20
"""Uploads of a growing file take at most 1/20 of the time."""
_LONGEST_PAUSE_S = 30.0
_MAX_FAILED_ATTEMPTS = 4
"""Consecutive failed attempts at the end of a run before giving up, if the storage responds."""
_FIRST_UPLOAD_S = 10.0
"""How long the start of a run waits for the first upload."""
_RETRY_S = 0.5
"""Delay before a refused first upload is retried."""
_WARN_AFTER_S = 5.0
"""Delay before a warning that the end of the run waits for uploads."""
_LIST_S = 5.0
"""Deadline for listing the local directory."""

Signature = tuple[int, int, int]
"""Identity of a file's content: inode, size, time of the last change."""


@dataclass(frozen=True)
class _Sent:
    """An uploaded file."""

    signature: Signature
    at: float
    took_s: float


class RunUpload:
    """
    Upload of one run directory.

    Args:
        folder: the run directory.
        storage: storage below the run's URL.
        warn: called with messages about failures and recoveries.
        poll_s: interval between checks of the directory.
    """

    def __init__(
        self,
        folder: Path,
        storage: RemoteStorage,
        warn: Callable[[str], object],
        poll_s: float = _POLL_S,
    ) -> None:
        self._folder, self._storage, self._warn = folder, storage, warn
        self._poll_s = poll_s
        self._sent: dict[str, _Sent] = {}
        self._checkpoints = _CheckpointUploads(folder / FOLDER, storage)
        self._error = ""  #: of the last attempt; empty: it uploaded all due files
        self._failed_attempts = 0  #: at the end of the run, since the last progress
        self._progress_at = time.monotonic()
        self._closing, self._ended = threading.Event(), threading.Event()
        self._given_up = threading.Event()
        self._thread = threading.Thread(target=self._work, name="upload", daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        """URL of the copy."""
        return self._storage.url

    def close(self, is_canceled: Callable[[], bool] = lambda: False) -> str:
        """
        Upload all remaining files.

        Gives up after `limit_s` without a response of the storage, or without progress.

        Args:
            is_canceled: returns whether the user asked not to wait.

        Returns:
            The missing files, and why; empty: the copy is complete.
        """
        self._closing.set()
        try:
            self._wait_until_complete(is_canceled)
        except KeyboardInterrupt:
            text = "the copy at %s is incomplete: its upload was interrupted; all is in %s, and %s"
            self._warn(text % (self._storage.url, self._folder, upload_hint(self._folder)))
            raise
        finally:
            self._given_up.set()
        if self._ended.is_set():
            return ""
        cause = self._error or f"the storage does not answer (`{SETTING}`)"
        if is_canceled():
            cause = "its upload was interrupted"
        try:
            missing = with_deadline(lambda on_progress: self._missing(), self._folder, _LIST_S)
        except (OSError, StorageError) as error:
            missing, cause = "the run directory", str(error)
        return (
            f"{missing} not uploaded to {self._storage.url}: {cause}; {upload_hint(self._folder)}"
        )

    def _wait_until_complete(self, is_canceled: Callable[[], bool]) -> None:
        """Wait until the copy is complete, or no progress is to be expected."""
        start, limit_s, warned = time.monotonic(), self._storage.limit_s, False
        while not self._ended.wait(0.05) and not is_canceled():
            now = time.monotonic()
            if not warned and now - start > _WARN_AFTER_S:
                warned = True
                text = "the end of the run waits for its copy at %s; `%s` limits idle waits"
                self._warn(text % (self._storage.url, SETTING))
            is_exhausted = (
                self._failed_attempts >= _MAX_FAILED_ATTEMPTS
                and now - max(start, self._progress_at) > limit_s
            )
            if is_exhausted or now - max(start, self._storage.answered_at) > limit_s:
                return

    def _missing(self) -> str:
        names = [name for name, path in self._files() if self._changed(name, path)]
        return ", ".join([*names, *(f"{FOLDER}/{name}" for name in self._checkpoints.missing())])

    def _work(self) -> None:
        failures = 0
        while not self._given_up.is_set():
            closing = self._closing.is_set()
            try:
                reason = self._attempt(closing)
            except OSError as error:  # of the local disk, which may recover
                reason = f"{self._folder}: {error}"
            if reason and not failures:
                text = "cannot upload: %s; the run continues, and the upload is retried"
                self._warn(text % reason)
            elif failures and not reason:
                self._warn(f"{self._storage.url} answers again")
            self._error, failures = reason, failures + 1 if reason else 0
            if closing and not reason:
                self._ended.set()
                return
            self._failed_attempts += closing
            pause_s = self._poll_s
            if reason:
                longest_s = min(_LONGEST_PAUSE_S, self._storage.limit_s / 8)
                pause_s = min(0.5 * 2 ** min(failures, 10), longest_s)
            (self._given_up if closing else self._closing).wait(pause_s)

    def _attempt(self, closing: bool) -> str:
        """Upload all due files; return why some are missing, or an empty text."""
        reason = ""
        for upload in self._due(closing):
            if self._given_up.is_set() or (reason and upload == self._send_result):
                return reason
            try:
                upload()
                if upload != self._checkpoints.delete_obsolete:
                    self._failed_attempts, self._progress_at = 0, time.monotonic()
            except NoAnswer as error:
                return str(error)  # other uploads would hang as well
            except Exception as error:
                reason = str(error) or repr(error)
        return reason

    def _due(self, closing: bool) -> Iterator[Callable[[], object]]:
        """Yield the due uploads, in order."""
        for name, path in self._files():
            if name != RESULT and self._changed(name, path) and (closing or self._may_resend(name)):
                yield partial(self._send, name, path)
        for _ in self._checkpoints.missing():
            yield self._checkpoints.upload_newest
        yield self._checkpoints.delete_obsolete
        if closing:
            yield self._send_result

    def _send_result(self) -> None:
        if self._changed(RESULT, self._folder / RESULT):
            self._send(RESULT, self._folder / RESULT)

    def _files(self) -> list[tuple[str, Path]]:
        """Return all files except checkpoints, by their names at the URL, the model first."""
        files = []
        for folder, folders, names in os.walk(self._folder):
            top = Path(folder) == self._folder
            folders[:] = [name for name in folders if not (top and name == FOLDER)]
            paths = [Path(folder, name) for name in names if not name.endswith(".partial")]
            files += [(str(path.relative_to(self._folder)), path) for path in paths]
        return sorted(files, key=lambda file: (not file[0].startswith("model."), file[0]))

    def _changed(self, name: str, path: Path) -> bool:
        signature, sent = signature_of(path), self._sent.get(name)
        return signature is not None and (sent is None or sent.signature != signature)

    def _may_resend(self, name: str) -> bool:
        sent = self._sent.get(name)
        if sent is None:
            return True
        return time.monotonic() - sent.at >= max(_GROWING_S, _SHARE * sent.took_s)

    def _send(self, name: str, path: Path) -> None:
        start = time.monotonic()
        try:
            file = regular_file(path)
        except FileNotFoundError:
            return
        with file:
            stat_result = os.fstat(file.fileno())
            self._storage.put(name, file, stat_result.st_size)
        now = time.monotonic()
        self._sent[name] = _Sent(_signature(stat_result), now, now - start)


class _CheckpointUploads:
    """
    Uploads of checkpoints, the newest first. A checkpoint that was deleted locally is deleted at
    the URL once a newer one is uploaded.

    The files of a checkpoint are kept open during its upload, because it may be deleted locally.
    """

    def __init__(self, folder: Path, storage: RemoteStorage) -> None:
        self._catalogue, self._storage = Catalogue(folder), storage
        self._uploaded: dict[int, Signature] = {}  #: step -> signature of the manifest
        self._started_steps: set[int] = set()  #: steps that may have files at the URL
        self._held: _OpenCheckpoint | None = None

    def missing(self) -> list[str]:
        """Return the names of local checkpoints that are not uploaded."""
        local = self._local_checkpoints()
        return [self._catalogue.path(step).name for step in self._missing(local)]

    def upload_newest(self) -> None:
        """
        Upload the newest checkpoint that is missing and readable.

        Raises:
            StorageError: none of the missing checkpoints is readable.
        """
        local, unreadable = self._local_checkpoints(), None
        for step in sorted(self._missing(local), reverse=True):
            try:
                held = self._open(step, local[step])
            except StorageError as error:
                unreadable = unreadable or error
                continue
            if held is not None:
                self._upload(held)
                self._uploaded[step] = local[step]
                self._release()
                return
        if unreadable is not None:
            raise unreadable

    def _open(self, step: int, signature: Signature) -> _OpenCheckpoint | None:
        """Open a checkpoint's files; None: it was just deleted."""
        if self._held is not None and (self._held.step, self._held.signature) == (step, signature):
            return self._held
        self._release()
        path = self._catalogue.path(step)
        try:
            self._held = _OpenCheckpoint(path, step, signature)
        except (FileNotFoundError, StorageError) as error:
            if signature_of(path / MANIFEST) != signature:
                return None
            if isinstance(error, FileNotFoundError):
                raise StorageError(f"cannot read {error.filename}: {error.strerror}") from error
            raise
        return self._held

    def _release(self) -> None:
        if self._held is not None:
            self._held.close()
            self._held = None

    def delete_obsolete(self) -> None:
        """Delete checkpoints at the URL that were deleted locally, and partial uploads."""
        local = self._local_checkpoints()
        kept = [step for step, signature in self._uploaded.items() if local.get(step) == signature]
        for step in sorted(self._started_steps - local.keys()):
            if kept and step < max(kept):
                self._uploaded.pop(step, None)
                self._remove(step)

    def _upload(self, held: _OpenCheckpoint) -> None:
        folder = f"{FOLDER}/{self._catalogue.path(held.step).name}"
        if self._uploaded.pop(held.step, None) is not None:  # written again after a rollback
            self._remove(held.step)
        self._started_steps.add(held.step)
        for name, file in held.files.items():
            if name not in held.sent:
                file.seek(0)
                self._storage.put(f"{folder}/{name}", file, os.fstat(file.fileno()).st_size)
                held.sent.add(name)

    def _remove(self, step: int) -> None:
        """Remove a checkpoint, the manifest first: without it the checkpoint is ignored."""
        folder = f"{FOLDER}/{self._catalogue.path(step).name}"
        self._storage.remove(f"{folder}/{MANIFEST}")
        self._storage.remove(folder)
        self._started_steps.discard(step)

    def _local_checkpoints(self) -> dict[int, Signature]:
        signatures = {}
        with suppress(FileNotFoundError):
            for step in self._catalogue.steps():
                if (signature := signature_of(self._catalogue.path(step) / MANIFEST)) is not None:
                    signatures[step] = signature
        return signatures

    def _missing(self, local: dict[int, Signature]) -> list[int]:
        return [step for step, manifest in local.items() if self._uploaded.get(step) != manifest]


class _OpenCheckpoint:
    """
    A checkpoint with open files, the manifest last.

    It opens only files in the manifest, and no links: a foreign run directory could name any file,
    and its `job.yaml` names the URL.

    Raises:
        FileNotFoundError: it was deleted.
        StorageError: its manifest is damaged, or it contains a link, a pipe or a device.
    """

    def __init__(self, path: Path, step: int, signature: Signature) -> None:
        self.step, self.signature = step, signature
        self.sent: set[str] = set()
        for folder in (path.parent, path):
            if folder.is_symlink():
                raise StorageError(f"cannot read {folder}: it is a link")
        with ExitStack() as stack:
            self.files: dict[str, IO[bytes]] = {
                name: stack.enter_context(regular_file(path / name))
                for name in [*sorted(read_manifest(path)), MANIFEST]
            }
            self.close = stack.pop_all().close


def signature_of(path: Path) -> Signature | None:
    """Return a file's signature; None: there is no regular file."""
    try:
        stat_result = path.lstat()
    except OSError:
        return None
    return _signature(stat_result) if stat.S_ISREG(stat_result.st_mode) else None


def _signature(stat_result: os.stat_result) -> Signature:
    return stat_result.st_ino, stat_result.st_size, stat_result.st_mtime_ns


def upload_hint(folder: Path) -> str:
    """Return the command that completes a copy later."""
    return f"`{shlex.join(['distplat', 'upload', str(folder)])}` uploads it"


def upload_of(
    folder: Path, storage_url: str, limit_s: float, warn: Callable[[str], object]
) -> RunUpload:
    """
    Start to upload a run directory.

    Args:
        folder: the run directory; its name is the run's.
        storage_url: the `storage_path`; the copy is below it.
        limit_s: `failure.storage_timeout_s`.
        warn: called with messages about failures.
    """
    return RunUpload(folder, _storage_of(folder, storage_url, limit_s), warn)


def _storage_of(folder: Path, storage_url: str, limit_s: float) -> RemoteStorage:
    return RemoteStorage(f"{storage_url.rstrip('/')}/{folder.name}", limit_s)


def check_access(
    folder: Path, storage_url: str, limit_s: float, check: Callable[[], object]
) -> None:
    """
    Check that a storage accepts a run's first file; a hanging storage is not an error yet.

    Args:
        folder: the run directory.
        storage_url: the `storage_path`.
        limit_s: `failure.storage_timeout_s`.
        check: called during the wait; an exception ends the wait.

    Raises:
        StorageError: the bucket or directory does not exist, or is not writable.
    """
    storage = _storage_of(folder, storage_url, limit_s)

    def put() -> None:
        with regular_file(folder / JOB) as file:
            storage.put(JOB, file, os.fstat(file.fileno()).st_size)

    def put_again() -> None:
        try:
            put()
        except (ObjectNotFound, AccessRefused):  # new credentials may take effect late
            time.sleep(_RETRY_S)
            put()

    upload = run_in_thread("first upload", put_again)
    until = time.monotonic() + _FIRST_UPLOAD_S
    while not wait([upload], 0.05).done and time.monotonic() < until:
        check()
    if upload.done() and isinstance(error := upload.exception(), ObjectNotFound | AccessRefused):
        hint = "create the bucket or directory of `storage_path`, or make it writable"
        raise StorageError(f"{error}; nothing was trained: {hint}") from error


def incomplete_upload_error(missing: str, model: Path | None) -> StorageError:
    """
    Build the error for a run that succeeded, but whose copy is incomplete.

    Args:
        missing: result of `RunUpload.close`.
        model: path of the trained model.
    """
    where = f"; the trained model is in {model}" if model is not None else ""
    return StorageError(f"the run has ended, but {missing}{where}")


def completed(result: Mapping[str, Any]) -> dict[str, Any]:
    """Return `result.json` for a complete copy: SUCCEEDED if only the upload had failed."""
    if NOT_UPLOADED not in result:
        return dict(result)
    facts = {
        key: result[key] for key in result if key not in ("status", "error", "model", NOT_UPLOADED)
    }
    return {"status": "SUCCEEDED", **facts}
