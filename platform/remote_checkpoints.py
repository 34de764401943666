"""
A checkpoint at a URL, brought to a local disk and read there like any other.

One without a manifest was never whole, or is being deleted, and is passed over. One that does not
go with its manifest is damaged, and the one before is taken. A storage that does not answer is an
error: an older checkpoint would cost work.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

from distplat.platform.checkpoints import FOLDER, MANIFEST, StoredCheckpoint, listed, read, step_of
from distplat.platform.errors import Problem, SpecError, StorageError
from distplat.platform.remote_storage import (
    PART_BYTES,
    NotThere,
    RemoteStorage,
    missing_library,
    url_problem,
)

_MANIFEST_BYTES = PART_BYTES


def fetch(
    url: str, folder: Path, limit_s: float, warn: Callable[[str], object]
) -> StoredCheckpoint:
    """
    Bring what `--resume URL` names: a checkpoint, or the newest whole one of a run.

    Args:
        url: of a run's copy, of its `checkpoints`, or of one of them.
        folder: an empty one; the checkpoint is put into it.
        limit_s: `failure.storage_timeout_s`.
        warn: is told of each that is damaged.

    Raises:
        SpecError: the URL is refused, its library is missing, or there is no checkpoint.
        StorageError: all are damaged, the storage does not answer, or the local disk is full.
    """
    for text, hint in (url_problem(url), missing_library(url)):
        if text:
            raise SpecError(Problem(("--resume",), text, hint))
    base, _, last = url.rstrip("/").rpartition("/")
    if step_of(last) is not None:
        storage, names = RemoteStorage(base, limit_s), [last]
    else:
        base = url.rstrip("/") if last == FOLDER else f"{url.rstrip('/')}/{FOLDER}"
        storage = RemoteStorage(base, limit_s)
        found = storage.patiently(lambda: storage.names(""))
        steps = {step: name for name in found if (step := step_of(name)) is not None}
        names = [steps[step] for step in sorted(steps, reverse=True)]
    damaged = 0
    for name in names:
        try:
            if (stored := _brought(storage, name, folder / name)) is not None:
                return stored
        except _Damaged as error:
            damaged += 1
            warn(f"{storage.url}/{name} is damaged: {error}; taking the one before")
            shutil.rmtree(folder / name, ignore_errors=True)
    if damaged:
        raise StorageError(f"{url}: all {damaged} checkpoints are damaged")
    hint = "give the URL of a run, `storage_path` and its name, or of one of its checkpoints"
    raise SpecError(Problem(("--resume",), f"no whole checkpoint at {url}", hint))


def url_of(url: str, found: StoredCheckpoint) -> str:
    """
    Give the URL of a checkpoint.

    Args:
        url: what `fetch` was given.
        found: what it gave.
    """
    base, _, last = url.rstrip("/").rpartition("/")
    if step_of(last) is not None:
        return url.rstrip("/")
    return "/".join([base, last, *([] if last == FOLDER else [FOLDER]), found.path.name])


class _Damaged(Exception):
    """A checkpoint does not go with its manifest."""


def _brought(storage: RemoteStorage, name: str, target: Path) -> StoredCheckpoint | None:
    """Bring one and read it; None: it has no manifest."""
    try:
        size = storage.patiently(lambda: storage.size(f"{name}/{MANIFEST}"))
    except NotThere:
        return None
    if size > _MANIFEST_BYTES:
        raise _Damaged(f"its manifest has {size} bytes")
    try:
        target.mkdir(mode=0o700)
        _copy(storage, f"{name}/{MANIFEST}", target / MANIFEST, size)
        try:
            files = listed(target)
        except StorageError as error:
            raise _Damaged(error) from None
        for file, facts in files.items():
            _copy(storage, f"{name}/{file}", target / file, facts.get("bytes"))
    except OSError as error:
        raise StorageError(f"cannot write {target}: {error.strerror or error}") from error
    try:
        return read(target)
    except StorageError as error:
        raise _Damaged(error) from None


def _copy(storage: RemoteStorage, name: str, target: Path, size: object) -> None:
    """Copy a file that is to have so many bytes."""
    try:
        found = storage.patiently(lambda: storage.size(name))
    except NotThere:
        raise _Damaged(f"there is no {name}") from None
    if found != size:
        raise _Damaged(f"{name} has {found} bytes, expected {size}")
    with target.open("xb") as file:
        for start in range(0, found, PART_BYTES):
            stop = min(start + PART_BYTES, found)
            file.write(storage.patiently(partial(storage.read, name, start, stop)))
