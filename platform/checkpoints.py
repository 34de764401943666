"""
The catalogue of a run's checkpoints: how one comes to the disk, which are whole, which may go.

    checkpoints/
        step-000120/                a name that is taken only when all below it is on the disk
            model.safetensors       parameters and buffers, by the model's names
            optimizer.safetensors   the optimizer's state, `exp_avg/<parameter>`
            state.json              step, seed, batch, optimizer, versions
            manifest.json           size and SHA-256 of the others
        step-000140.partial/        being written, or what a crash left of it: counts for nothing
        step-000160.damaged/        was found damaged by a run that went back to step 140

Written in this order (I7): files, each synced; manifest, synced; the directory; its name; the
directory around it. So after a crash a name stands for a whole checkpoint, or is not there. A disk
may still lose bits: everything is compared with the manifest before it is used; nothing unpickled.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distplat.platform.disk import Disk, FileContent, OnProgress, iter_pieces, open_regular
from distplat.platform.errors import Problem, SpecError, StorageError, naming_path
from distplat.platform.tensor_slices import ITEM_BYTES, Bytes, TensorEntry
from distplat.platform.total_memory import DoesNotFit, check_fits


@dataclass(frozen=True)
class Delivery:
    """What one rank gives to a checkpoint; a rank that is responsible for nothing says so."""

    rank: int
    attempt: int
    version: int
    """Steps that it has behind it."""
    refs: tuple[Any, ...] = ()
    """References to arrays: each to a list of them."""
    entries: tuple[tuple[TensorEntry, ...], ...] = ()
    """By reference, what is in its arrays."""
    facts: dict[str, Any] = field(default_factory=dict)
    """What the rank knows of data and versions, for `state.json`."""
    skipped: bool = False
    """The rank has no part of this version: there will be no such checkpoint."""
    failure: str = ""
    """Why it has none, if that was an error."""
    lost: bool = False
    """Whether that error was the loss of another process."""

    @property
    def nbytes(self) -> int:
        """Bytes of the part."""
        entries = [entry for ref in self.entries for entry in ref]
        return sum(entry.tensor_slice.size * ITEM_BYTES[entry.dtype] for entry in entries)


FetchArrays = Callable[[Any], list[Bytes]]
"""Gives the arrays that a delivery refers to."""


class CheckpointAssembly:
    """
    Joins the deliveries of all ranks.

    Args:
        world: number of ranks.
    """

    def __init__(self, world: int) -> None:
        self._world = world
        self.attempt = 0  #: parts of other attempts are not taken
        self._parts: dict[int, dict[int, Delivery]] = {}  #: version -> rank -> its part
        self._skipped: list[int] = []  #: see `skipped`

    def begin(self, attempt: int, world: int | None = None) -> None:
        """
        Called when another attempt begins: what the one before left unfinished goes.

        Args:
            attempt: its number.
            world: its ranks; None: as many as before.
        """
        self.attempt = attempt
        self._world = world or self._world
        self._parts.clear()

    def add(self, delivery: Delivery) -> list[Delivery]:
        """Take a part; give all of its version, in rank order, when it is the last of them."""
        if delivery.attempt != self.attempt:
            return []
        parts = self._parts.setdefault(delivery.version, {})
        parts[delivery.rank] = delivery
        if len(parts) < self._world:
            return []
        skipped = any(part.skipped for part in parts.values())
        for version in sorted(v for v in self._parts if v <= delivery.version):
            failed = any(part.failure for part in self._parts.pop(version).values())
            if not failed and (skipped or version != delivery.version):
                self._skipped.append(version)
        return [] if skipped else [parts[rank] for rank in range(self._world)]

    def skipped(self) -> list[int]:
        """Give the versions that came to no checkpoint though no part of them failed, each once."""
        versions, self._skipped = self._skipped, []
        return versions


FOLDER = "checkpoints"
MANIFEST, STATE = "manifest.json", "state.json"
FORMAT = 1
_PARTIAL, _DELETED, _DAMAGED = ".partial", ".deleted", ".damaged"
_STEP = re.compile(r"step-(\d{6,18})")
_FILE = re.compile(r"[A-Za-z0-9_-]+\.(safetensors|json)")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_MANIFEST_BYTES = 16 * 2**20
"""The largest manifest that is read: a foreign one may be of any size."""
_PIECE_BYTES = 8 * 2**20
"""What is read at a time, where somebody waits for a large file."""


def is_due(version: int, every: int, total_steps: int) -> bool:
    """Say whether a checkpoint is taken after step `version`; `every` 0: there are none."""
    return every > 0 and version > 0 and (version % every == 0 or version == total_steps)


def step_of(name: str) -> int | None:
    """Give the step that a checkpoint's directory is named after; None: it is no such name."""
    match = _STEP.fullmatch(name)
    return int(match[1]) if match else None


def deletable_steps(
    steps: Iterable[int], keep: int, written: int, protected: Set[int] = frozenset()
) -> list[int]:
    """
    Give the steps whose checkpoints may go, oldest first; the newest `keep` >= 1 stay.

    Args:
        steps: those that have one.
        keep: how many stay.
        written: the step of the one just written. It stays, too, even where older work had come
            further.
        protected: steps whose checkpoints stay, too.
    """
    return [step for step in sorted(steps)[:-keep] if step != written and step not in protected]


@dataclass(frozen=True)
class StoredCheckpoint:
    """A checkpoint that was read and found whole."""

    path: Path
    state: dict[str, Any]
    files: dict[str, bytes]
    """By name, without the manifest and `state.json`."""

    @property
    def step(self) -> int:
        """Steps that it has behind it."""
        return int(self.state["step"])


class Catalogue:
    """
    A run's checkpoints.

    Args:
        folder: of the checkpoints; made when the first is written.
        disk: for tests.
        on_progress: called after each piece that is written or read; see `with_deadline`.
    """

    def __init__(
        self, folder: Path, disk: Disk | None = None, on_progress: OnProgress = lambda: None
    ) -> None:
        self.folder = folder
        self._disk, self._on_progress = disk or Disk(), on_progress

    def steps(self) -> list[int]:
        """Give the steps that have a checkpoint, whole or damaged, oldest first."""
        if not self.folder.is_dir():
            return []
        numbers = [step_of(path.name) for path in self.folder.iterdir()]
        return sorted(step for step in numbers if step is not None)

    def path(self, step: int) -> Path:
        """Give the directory of a step's checkpoint."""
        return self.folder / f"step-{step:06d}"

    def write(self, step: int, files: Mapping[str, FileContent], state: Mapping[str, Any]) -> Path:
        """
        Write a checkpoint, whole or not at all; one that is there already stays.

        Args:
            step: steps that it has behind it.
            files: content by name.
            state: what `state.json` holds; `step` is added.

        Raises:
            OSError: the disk is full, or the directory is gone.
        """
        target, disk = self.path(step), self._disk
        self._remove_leftovers()
        if target.is_dir():
            if not flaws(target, self._on_progress):
                return target
            self._delete(target)
        partial = target.with_name(target.name + _PARTIAL)
        content = {**files, STATE: [_to_json({**state, "step": step})]}
        try:
            self._write_files(partial, content)
            disk.rename(partial, target)
        except OSError:
            with contextlib.suppress(OSError):
                disk.remove(partial)  # a disk that is full must not stay so
            raise
        disk.sync(self.folder)
        return target

    def prune(self, keep: int, written: int, protected: Set[int] = frozenset()) -> str:
        """
        Let the oldest go, once the one just written was looked at: its files have their lengths.

        Args:
            keep: how many stay.
            written: the step of the one just written.
            protected: steps whose checkpoints stay, too.

        Returns:
            Why one could not be deleted; empty: all are.

        Raises:
            OSError: it is damaged, so nothing is deleted.
        """
        reason, deletable = "", deletable_steps(self.steps(), keep, written, protected)
        if not deletable:
            return reason
        if problem := find_truncated_file(self.path(written)):
            raise OSError(f"{problem}; nothing was deleted")
        for step in deletable:
            try:
                self._delete(self.path(step))
            except OSError as error:  # on NFS, for example, while somebody reads it
                reason = f"{self.path(step)}: {error.strerror or error}"
        return reason

    def set_aside(self, after: int) -> None:
        """
        Rename the checkpoints of later steps, which a rollback could not read.

        They would count as the newest otherwise, and what is written after the rollback would be
        deleted for them. They stay on the disk: a read may have failed for another reason.

        Args:
            after: the step that the run went back to.

        Raises:
            OSError: the disk refuses.
        """
        for step in self.steps():
            if step > after:
                path = self.path(step)
                aside = path.with_name(path.name + _DAMAGED)
                if aside.is_dir():
                    self._disk.remove(aside)
                self._disk.rename(path, aside)

    def newest(
        self,
        warn: Callable[[str], object],
        on_progress: OnProgress = lambda: None,
        *,
        given: bool = False,
    ) -> StoredCheckpoint | None:
        """
        Read the newest one that is whole; None: there is none, whole or damaged.

        Args:
            warn: is told of each that is damaged.
            on_progress: see `with_deadline`.
            given: see `read`.

        Raises:
            StorageError: there are some, and none can be read.
            DoesNotFit: see `read`; an older one would cost work.
        """
        try:
            steps = self.steps()
        except OSError as error:
            raise StorageError(f"cannot read {self.folder}: {error.strerror}") from error
        for step in reversed(steps):
            try:
                return read(self.path(step), on_progress, given=given)
            except DoesNotFit:
                raise
            except StorageError as error:
                warn(f"{error}; taking the one before")
        if steps:
            raise StorageError(f"{self.folder}: all {len(steps)} checkpoints are damaged")
        return None

    def _write_files(self, partial: Path, files: Mapping[str, FileContent]) -> None:
        """Write all files, then what they should be, then their names."""
        self._disk.make(partial)
        entries = {}
        for name, content in files.items():
            size, digest = self._disk.write(partial / name, iter_pieces(content, self._on_progress))
            entries[name] = {"bytes": size, "sha256": digest}
        manifest = _to_json({"files": entries, "format": FORMAT})
        self._disk.write(partial / MANIFEST, [manifest])
        self._disk.sync(partial)

    def _delete(self, path: Path) -> None:
        """Take the name away first: what is half deleted must not look like a damaged one."""
        gone = path.with_name(path.name + _DELETED)
        self._disk.rename(path, gone)
        self._disk.remove(gone)

    def _remove_leftovers(self) -> None:
        """Remove what a crash has left."""
        if not self.folder.is_dir():
            self._disk.make(self.folder)
            self._disk.sync(self.folder.parent)
        for path in self.folder.iterdir():
            if path.suffix in (_PARTIAL, _DELETED):
                with contextlib.suppress(OSError):  # it counts for nothing, and may go next time
                    self._disk.remove(path)


def read(
    path: Path, on_progress: OnProgress = lambda: None, *, given: bool = False
) -> StoredCheckpoint:
    """
    Read one checkpoint, every byte against its manifest.

    Args:
        path: its directory.
        on_progress: see `with_deadline`.
        given: it may be another's, and only as large as it says: it has to fit into all memory.

    Raises:
        StorageError: it is damaged; names what is wrong.
        DoesNotFit: it was given, and is larger than memory and swap.
    """
    manifest = read_manifest(path)
    if given:
        check_fits(path, sum(facts["bytes"] for facts in manifest.values()))
    files = {
        name: _read_verified(path / name, facts, on_progress) for name, facts in manifest.items()
    }
    try:
        state = json.loads(files.pop(STATE))
        assert isinstance(state["step"], int)
    except (KeyError, ValueError, TypeError, AssertionError, RecursionError):
        raise StorageError(f"{path} has no {STATE} with its step") from None
    return StoredCheckpoint(path, state, files)


def flaws(path: Path, on_progress: OnProgress = lambda: None) -> list[str]:
    """Say what is wrong with a checkpoint, every byte read; empty: it is whole."""
    try:
        read(path, on_progress)
    except StorageError as error:
        return [str(error)]
    return []


def find_truncated_file(path: Path) -> str:
    """Say which file of a checkpoint is missing or too short; empty: none is."""
    try:
        for name, facts in read_manifest(path).items():
            if (path / name).lstat().st_size != facts["bytes"]:
                return f"{path / name} has not {facts['bytes']} bytes"
    except (StorageError, OSError) as error:
        return str(error)
    return ""


def find(
    path: Path, warn: Callable[[str], object], on_progress: OnProgress = lambda: None
) -> StoredCheckpoint:
    """
    Read what `--resume` names: a checkpoint, or the newest whole one of a run directory.

    Args:
        path: the directory.
        warn: is told of each that is damaged.
        on_progress: see `with_deadline`.

    Raises:
        SpecError: there is no checkpoint.
        StorageError: there are some, and all are damaged.
    """
    with naming_path(path, "--resume"):
        is_checkpoint, exists = (path / MANIFEST).is_file(), path.is_dir()
    if is_checkpoint or step_of(path.name) is not None:
        if not exists:
            raise SpecError(Problem(("--resume",), f"there is no {path}"))
        return read(path, on_progress, given=True)
    catalogue = Catalogue(path if path.name == FOLDER else path / FOLDER)
    stored = catalogue.newest(warn, on_progress, given=True)
    if stored is not None:
        return stored
    what = f"no checkpoint in {path}" if exists else f"there is no directory {path}"
    hint = "give a run directory, or a directory step-... of its checkpoints"
    raise SpecError(Problem(("--resume",), what, hint))


def read_manifest(path: Path) -> dict[str, dict[str, Any]]:
    """
    Read which files a checkpoint's manifest lists, and what it says of each: `bytes`, `sha256`.

    Raises:
        StorageError: it is damaged, or of another format.
    """
    text, _ = _bytes_of(path / MANIFEST)
    try:
        manifest = json.loads(text)
        version = manifest["format"]
        if isinstance(version, int) and version != FORMAT:
            raise StorageError(f"{path} has format {version}, this distplat reads {FORMAT}")
        files: dict[str, dict[str, Any]] = manifest["files"]
        good = isinstance(version, int) and all(
            _FILE.fullmatch(name)
            and type(entry["bytes"]) is int  # True is an int, too
            and entry["bytes"] >= 0  # or a sum of sizes would hide a file that is too large
            and _SHA256.fullmatch(entry["sha256"])
            for name, entry in files.items()
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        good = False
    if not good:
        raise StorageError(f"{path / MANIFEST} is damaged")
    return dict(files)


def _read_verified(path: Path, facts: Mapping[str, Any], on_progress: OnProgress) -> bytes:
    content, digest = _bytes_of(path, facts, on_progress)
    if digest != facts["sha256"]:
        raise StorageError(f"{path}: SHA-256 is {digest[:8]}.., expected {facts['sha256'][:8]}..")
    return content


def _bytes_of(
    path: Path, facts: Mapping[str, Any] | None = None, on_progress: OnProgress = lambda: None
) -> tuple[bytes, str]:
    """
    Read a file whose size is known before a byte of it is read; give its SHA-256, too.

    Args:
        path: of the file.
        facts: what the manifest says of it; None: it is the manifest.
        on_progress: told of each piece.
    """
    content, digest = io.BytesIO(), hashlib.sha256()
    try:
        with open_regular(path) as file:
            if file is None:
                raise StorageError(f"cannot read {path}: {os.strerror(errno.ENOENT)}")
            size = os.fstat(file.fileno()).st_size
            if facts is None and size > _MANIFEST_BYTES:
                raise StorageError(f"{path} is damaged: it has {size} bytes")
            if facts is not None and size != facts["bytes"]:
                raise StorageError(f"{path} has {size} bytes, expected {facts['bytes']}")
            while piece := file.read(min(_PIECE_BYTES, size - content.tell())):
                content.write(piece)
                digest.update(piece)
                on_progress()
            return content.getvalue(), digest.hexdigest()
    except MemoryError:
        raise StorageError(f"cannot read {path}: it does not fit into memory") from None


def _to_json(facts: Mapping[str, Any]) -> bytes:
    return (json.dumps(facts, indent=2, sort_keys=True) + "\n").encode()
