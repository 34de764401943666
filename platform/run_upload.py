"""
Keeps a copy of a run directory at a URL while the run goes on, in a thread.

    <storage_path>/<run>/
        job.yaml  metrics.jsonl  model.safetensors ...   whenever they have changed
        checkpoints/step-000120/    its files, then manifest.json
        result.json                 last: with it all of the run is there

Nobody waits for it before the run's end. What fails is warned of once and tried again; the end
waits as long as the storage answers now and then, and takes something.
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
"""Field of `result.json`: what is not there, of a run that has ended well otherwise."""
_POLL_S = 1.0
_GROWING_S = 10.0
"""How often a file that grows is written anew, at most."""
_SHARE = 20
"""Nor more often than takes one part in so many of the time."""
_LONGEST_PAUSE_S = 30.0
_MOST_FAILED = 4
"""Failed attempts in a row after which the end of a run gives up, where the storage answers."""
_FIRST_S = 10.0
"""How long the start of a run waits to hear whether the storage takes anything."""
_RETRY_S = 0.5
"""Seconds after which a storage that refuses is asked once more."""
_SAID_S = 5.0
"""Seconds after which a warning says what the end of the run waits for."""
_LIST_S = 5.0
"""How long the local disk may take to say what is there."""

Signature = tuple[int, int, int]
"""What tells a file from the one that had its name before: inode, size, time of the last change."""


@dataclass(frozen=True)
class _Sent:
    """A file that is there."""

    signature: Signature
    at: float
    took_s: float


class RunUpload:
    """
    The copy of one run directory.

    Args:
        folder: the run directory.
        storage: what is below the run's URL.
        warn: is told of failures, and that they are over.
        poll_s: how often the directory is looked at.
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
        self._error = ""  #: of the last failure; empty: the last attempt brought all that was due
        self._failed_attempts = 0  #: at the end of the run, since there was progress
        self._progress_at = time.monotonic()
        self._closing, self._ended = threading.Event(), threading.Event()
        self._given_up = threading.Event()
        self._thread = threading.Thread(target=self._work, name="upload", daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        """URL of the copy."""
        return self._storage.url

    def close(self, asked: Callable[[], bool] = lambda: False) -> str:
        """
        Bring what is not there yet.

        Gives up once the storage has not answered for `limit_s`, or has taken nothing in that time.

        Args:
            asked: whether somebody asked not to wait for it.

        Returns:
            What is not there, and why; empty: all is.
        """
        self._closing.set()
        try:
            self._wait_for_it(asked)
        except KeyboardInterrupt:
            text = "the copy at %s is not complete: its upload was broken off; all is in %s, and %s"
            self._warn(text % (self._storage.url, self._folder, upload_hint(self._folder)))
            raise
        finally:
            self._given_up.set()
        if self._ended.is_set():
            return ""
        cause = self._error or f"the storage does not answer (`{SETTING}`)"
        if asked():
            cause = "its upload was broken off"
        try:
            missing = with_deadline(lambda on_progress: self._missing(), self._folder, _LIST_S)
        except (OSError, StorageError) as error:
            missing, cause = "the run directory", str(error)
        return (
            f"{missing} not uploaded to {self._storage.url}: {cause}; {upload_hint(self._folder)}"
        )

    def _wait_for_it(self, asked: Callable[[], bool]) -> None:
        """Return when all is there, or nothing more can be hoped for."""
        began, limit_s, warned = time.monotonic(), self._storage.limit_s, False
        while not self._ended.wait(0.05) and not asked():
            now = time.monotonic()
            if not warned and now - began > _SAID_S:
                warned = True
                text = "the end of the run waits for its copy at %s; `%s` says for how long in vain"
                self._warn(text % (self._storage.url, SETTING))
            hopeless = (
                self._failed_attempts >= _MOST_FAILED
                and now - max(began, self._progress_at) > limit_s
            )
            if hopeless or now - max(began, self._storage.answered_at) > limit_s:
                return

    def _missing(self) -> str:
        names = [name for name, path in self._files() if self._changed(name, path)]
        return ", ".join([*names, *(f"{FOLDER}/{one}" for one in self._checkpoints.missing())])

    def _work(self) -> None:
        failures = 0
        while not self._given_up.is_set():
            closing = self._closing.is_set()
            try:
                reason = self._attempt(closing)
            except OSError as error:  # of the local disk, which may be there again
                reason = f"{self._folder}: {error}"
            if reason and not failures:
                text = "cannot upload: %s; the run goes on, and it is tried again"
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
        """Bring all that is due; say why something is not there yet."""
        reason = ""
        for upload in self._due(closing):
            if self._given_up.is_set() or (reason and upload == self._send_result):
                return reason
            try:
                upload()
                if upload != self._checkpoints.retire:
                    self._failed_attempts, self._progress_at = 0, time.monotonic()
            except NoAnswer as error:
                return str(error)  # the others would hang as well
            except Exception as error:
                reason = str(error) or repr(error)
        return reason

    def _due(self, closing: bool) -> Iterator[Callable[[], object]]:
        """Give what is to be done, in its order."""
        for name, path in self._files():
            if name != RESULT and self._changed(name, path) and (closing or self._may_resend(name)):
                yield partial(self._send, name, path)
        for _ in self._checkpoints.missing():
            yield self._checkpoints.bring_newest
        yield self._checkpoints.retire
        if closing:
            yield self._send_result

    def _send_result(self) -> None:
        if self._changed(RESULT, self._folder / RESULT):
            self._send(RESULT, self._folder / RESULT)

    def _files(self) -> list[tuple[str, Path]]:
        """Give all files but checkpoints, by the names that they have there; the model first."""
        files = []
        for folder, folders, names in os.walk(self._folder):
            top = Path(folder) == self._folder
            folders[:] = [one for one in folders if not (top and one == FOLDER)]
            paths = [Path(folder, name) for name in names if not name.endswith(".partial")]
            files += [(str(path.relative_to(self._folder)), path) for path in paths]
        return sorted(files, key=lambda one: (not one[0].startswith("model."), one[0]))

    def _changed(self, name: str, path: Path) -> bool:
        signature, sent = signature_of(path), self._sent.get(name)
        return signature is not None and (sent is None or sent.signature != signature)

    def _may_resend(self, name: str) -> bool:
        sent = self._sent.get(name)
        if sent is None:
            return True
        return time.monotonic() - sent.at >= max(_GROWING_S, _SHARE * sent.took_s)

    def _send(self, name: str, path: Path) -> None:
        began = time.monotonic()
        try:
            file = regular_file(path)
        except FileNotFoundError:
            return
        with file:
            stat_result = os.fstat(file.fileno())
            self._storage.put(name, file, stat_result.st_size)
        now = time.monotonic()
        self._sent[name] = _Sent(_signature(stat_result), now, now - began)


class _CheckpointUploads:
    """
    The checkpoints of a run directory: the newest is brought first, and what is deleted here is
    deleted there once a newer one is there.

    A checkpoint that is being brought is held open: it may be deleted here meanwhile.
    """

    def __init__(self, folder: Path, storage: RemoteStorage) -> None:
        self._catalogue, self._storage = Catalogue(folder), storage
        self._uploaded: dict[int, Signature] = {}  #: step -> manifest of a whole one
        self._started_steps: set[int] = set()  #: steps of which there may be files
        self._held: _OpenCheckpoint | None = None

    def missing(self) -> list[str]:
        """Give the names of those that are here and not there."""
        local = self._local_checkpoints()
        return [self._catalogue.path(step).name for step in self._missing(local)]

    def bring_newest(self) -> None:
        """
        Bring the newest that is not there and can be read.

        Raises:
            StorageError: all that are not there cannot be read.
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
        """Hold a checkpoint open; None: it was deleted a moment ago."""
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

    def retire(self) -> None:
        """Remove what is not here any more, and what was begun and left."""
        local = self._local_checkpoints()
        kept = [step for step, signature in self._uploaded.items() if local.get(step) == signature]
        for step in sorted(self._started_steps - local.keys()):
            if kept and step < max(kept):
                self._uploaded.pop(step, None)
                self._remove(step)

    def _upload(self, held: _OpenCheckpoint) -> None:
        folder = f"{FOLDER}/{self._catalogue.path(held.step).name}"
        if self._uploaded.pop(held.step, None) is not None:  # made again, after a rollback
            self._remove(held.step)
        self._started_steps.add(held.step)
        for name, file in held.files.items():
            if name not in held.sent:
                file.seek(0)
                self._storage.put(f"{folder}/{name}", file, os.fstat(file.fileno()).st_size)
                held.sent.add(name)

    def _remove(self, step: int) -> None:
        """Remove the manifest first: what is half removed counts for nothing."""
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
    A checkpoint whose files are open, the manifest as the last.

    Only what the manifest lists, and nothing behind a link: whoever gave the run to the user names
    the URL in its `job.yaml`, too.

    Raises:
        FileNotFoundError: it is not there any more.
        StorageError: its manifest is damaged, or it holds a link, a pipe or a device.
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
    """Give what tells a file from others of its name; None: there is no regular file."""
    try:
        stat_result = path.lstat()
    except OSError:
        return None
    return _signature(stat_result) if stat.S_ISREG(stat_result.st_mode) else None


def _signature(stat_result: os.stat_result) -> Signature:
    return stat_result.st_ino, stat_result.st_size, stat_result.st_mtime_ns


def upload_hint(folder: Path) -> str:
    """Say how to complete a copy later."""
    return f"`{shlex.join(['distplat', 'upload', str(folder)])}` uploads it"


def upload_of(
    folder: Path, storage_url: str, limit_s: float, warn: Callable[[str], object]
) -> RunUpload:
    """
    Begin to keep a copy of a run directory.

    Args:
        folder: the run directory; its name is the run's.
        storage_url: the `storage_path`; the copy is below it.
        limit_s: `failure.storage_timeout_s`.
        warn: is told of failures.
    """
    return RunUpload(folder, _storage_of(folder, storage_url, limit_s), warn)


def _storage_of(folder: Path, storage_url: str, limit_s: float) -> RemoteStorage:
    return RemoteStorage(f"{storage_url.rstrip('/')}/{folder.name}", limit_s)


def check_access(
    folder: Path, storage_url: str, limit_s: float, check: Callable[[], object]
) -> None:
    """
    See that a storage takes a run's first file; one that hangs, or is not there, may come back.

    Args:
        folder: the run directory.
        storage_url: the `storage_path`.
        limit_s: `failure.storage_timeout_s`.
        check: called while it is waited for; what it raises ends the wait.

    Raises:
        StorageError: there is no such bucket or directory, or we may not write to it.
    """
    storage = _storage_of(folder, storage_url, limit_s)

    def put() -> None:
        with regular_file(folder / JOB) as file:
            storage.put(JOB, file, os.fstat(file.fileno()).st_size)

    def put_again() -> None:
        try:
            put()
        except (ObjectNotFound, AccessRefused):  # keys may be late
            time.sleep(_RETRY_S)
            put()

    upload = run_in_thread("first upload", put_again)
    until = time.monotonic() + _FIRST_S
    while not wait([upload], 0.05).done and time.monotonic() < until:
        check()
    if upload.done() and isinstance(error := upload.exception(), ObjectNotFound | AccessRefused):
        hint = "make what `storage_path` names, or see that it may be written to"
        raise StorageError(f"{error}; nothing was trained: {hint}") from error


def incomplete_upload_error(missing: str, model: Path | None) -> StorageError:
    """
    Say that a run has ended well and is not whole at its URL.

    Args:
        missing: what `RunUpload.close` gave.
        model: where the trained model is.
    """
    where = f"; the trained model is in {model}" if model is not None else ""
    return StorageError(f"the run has ended, but {missing}{where}")


def completed(result: Mapping[str, Any]) -> dict[str, Any]:
    """Give what `result.json` is to say once a copy is complete: for some runs only that failed."""
    if NOT_UPLOADED not in result:
        return dict(result)
    facts = {
        key: result[key] for key in result if key not in ("status", "error", "model", NOT_UPLOADED)
    }
    return {"status": "SUCCEEDED", **facts}
