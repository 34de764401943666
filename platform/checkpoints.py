"""
Checkpoints of a run on disk: atomic writes, verification, and deletion of old ones.

    checkpoints/
        step-000120/                renamed to this name only after all its files are synced
            model.safetensors       parameters and buffers, by the model's names
            optimizer.safetensors   the optimizer's state, `exp_avg/<parameter>`
            state.json              step, seed, batch, optimizer, versions
            manifest.json           size and SHA-256 of the other files
        step-000140.partial/        being written, or left by a crash: ignored
        step-000160.damaged/        found damaged by a run that rolled back to step 140

Order of operations (I7): write and sync each file; write and sync the manifest; sync the directory;
rename it; sync its parent. So after a crash a name is a complete checkpoint, or does not exist. A
disk may still corrupt data: all files are verified against the manifest before use, and nothing is
unpickled.
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
    """One rank's part of a checkpoint, or a notice that it has none."""

    rank: int
    attempt: int
    version: int
    """Steps done at the checkpoint."""
    refs: tuple[Any, ...] = ()
    """References; each refers to a list of arrays."""
    entries: tuple[tuple[TensorEntry, ...], ...] = ()
    """By reference, the contents of its arrays."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Entries for `state.json`, such as data positions and versions."""
    skipped: bool = False
    """Whether the rank has no part of this version: the checkpoint will not exist."""
    failure: str = ""
    """Error because of which the rank has no part; empty: none."""
    lost: bool = False
    """Whether that error was the loss of another process."""

    @property
    def nbytes(self) -> int:
        """Size of the part in bytes."""
        entries = [entry for ref in self.entries for entry in ref]
        return sum(entry.tensor_slice.size * ITEM_BYTES[entry.dtype] for entry in entries)


FetchArrays = Callable[[Any], list[Bytes]]
"""Fetches the arrays of a reference."""


class CheckpointAssembly:
    """
    Collects the deliveries of all ranks.

    Args:
        world: number of ranks.
    """

    def __init__(self, world: int) -> None:
        self._world = world
        self.attempt = 0  #: deliveries of other attempts are ignored
        self._parts: dict[int, dict[int, Delivery]] = {}  #: version -> rank -> delivery
        self._skipped: list[int] = []  #: see `skipped`

    def begin(self, attempt: int, world: int | None = None) -> None:
        """
        Start an attempt: incomplete checkpoints of earlier attempts are dropped.

        Args:
            attempt: its number.
            world: number of ranks; None: unchanged.
        """
        self.attempt = attempt
        self._world = world or self._world
        self._parts.clear()

    def add(self, delivery: Delivery) -> list[Delivery]:
        """Add a part; return all parts of its version, in rank order, if it completes them."""
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
        """Return versions without a checkpoint although no part failed; each version once."""
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
"""Size limit for a manifest, which may be foreign."""
_PIECE_BYTES = 8 * 2**20
"""Bytes per read; `on_progress` is called after each."""


def is_due(version: int, every: int, total_steps: int) -> bool:
    """Return whether a checkpoint is taken after step `version`; `every` 0: never."""
    return every > 0 and version > 0 and (version % every == 0 or version == total_steps)


def step_of(name: str) -> int | None:
    """Return the step in the name of a checkpoint's directory; None: it is another name."""
    match = _STEP.fullmatch(name)
    return int(match[1]) if match else None


def deletable_steps(
    steps: Iterable[int], keep: int, written: int, protected: Set[int] = frozenset()
) -> list[int]:
    """
    Return the steps whose checkpoints may be deleted, oldest first; the newest `keep` >= 1 stay.

    Args:
        steps: steps with a checkpoint.
        keep: number of checkpoints to keep.
        written: step of the checkpoint just written, which also stays. It may be older than others
            after a rollback.
        protected: steps whose checkpoints also stay.
    """
    return [step for step in sorted(steps)[:-keep] if step != written and step not in protected]


@dataclass(frozen=True)
class StoredCheckpoint:
    """A checkpoint that was read and verified."""

    path: Path
    state: dict[str, Any]
    files: dict[str, bytes]
    """Contents by file name, without the manifest and `state.json`."""

    @property
    def step(self) -> int:
        """Steps done at the checkpoint."""
        return int(self.state["step"])


class Catalogue:
    """
    The checkpoints of a run.

    Args:
        folder: directory of the checkpoints; created with the first checkpoint.
        disk: for tests.
        on_progress: called after each piece that is written or read; see `with_deadline`.
    """

    def __init__(
        self, folder: Path, disk: Disk | None = None, on_progress: OnProgress = lambda: None
    ) -> None:
        self.folder = folder
        self._disk, self._on_progress = disk or Disk(), on_progress

    def steps(self) -> list[int]:
        """Return the steps with a checkpoint, complete or damaged, oldest first."""
        if not self.folder.is_dir():
            return []
        numbers = [step_of(path.name) for path in self.folder.iterdir()]
        return sorted(step for step in numbers if step is not None)

    def path(self, step: int) -> Path:
        """Return the directory of a step's checkpoint."""
        return self.folder / f"step-{step:06d}"

    def write(self, step: int, files: Mapping[str, FileContent], state: Mapping[str, Any]) -> Path:
        """
        Write a checkpoint atomically; an intact checkpoint of the same step is kept.

        Args:
            step: steps done at the checkpoint.
            files: contents by name.
            state: contents of `state.json`; `step` is added.

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
                disk.remove(partial)  # free the space of a full disk
            raise
        disk.sync(self.folder)
        return target

    def prune(self, keep: int, written: int, protected: Set[int] = frozenset()) -> str:
        """
        Delete the oldest checkpoints, after a check that the files just written have their full
        size.

        Args:
            keep: number of checkpoints to keep.
            written: step of the checkpoint just written.
            protected: steps whose checkpoints also stay.

        Returns:
            Why a checkpoint could not be deleted; empty: all were.

        Raises:
            OSError: the checkpoint just written is damaged; nothing is deleted.
        """
        reason, deletable = "", deletable_steps(self.steps(), keep, written, protected)
        if not deletable:
            return reason
        if problem := find_truncated_file(self.path(written)):
            raise OSError(f"{problem}; nothing was deleted")
        for step in deletable:
            try:
                self._delete(self.path(step))
            except OSError as error:  # for example on NFS, while it is read
                reason = f"{self.path(step)}: {error.strerror or error}"
        return reason

    def set_aside(self, after: int) -> None:
        """
        Rename the checkpoints of later steps, which a rollback could not read.

        Otherwise they would count as the newest, and checkpoints written after the rollback would
        be deleted instead. They stay on disk, because the read may have failed for another reason.

        Args:
            after: step of the checkpoint that the run returned to.

        Raises:
            OSError: a checkpoint could not be renamed.
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
        foreign: bool = False,
    ) -> StoredCheckpoint | None:
        """
        Read the newest intact checkpoint; None: there are no checkpoints.

        Args:
            warn: called with a message about each damaged checkpoint.
            on_progress: see `with_deadline`.
            foreign: see `read`.

        Raises:
            StorageError: there are checkpoints, but all are damaged.
            DoesNotFit: see `read`; an older checkpoint would lose work.
        """
        try:
            steps = self.steps()
        except OSError as error:
            raise StorageError(f"cannot read {self.folder}: {error.strerror}") from error
        for step in reversed(steps):
            try:
                return read(self.path(step), on_progress, foreign=foreign)
            except DoesNotFit:
                raise
            except StorageError as error:
                warn(f"{error}; taking the one before")
        if steps:
            raise StorageError(f"{self.folder}: all {len(steps)} checkpoints are damaged")
        return None

    def _write_files(self, partial: Path, files: Mapping[str, FileContent]) -> None:
        """Write and sync all files, the manifest, and the directory."""
        self._disk.make(partial)
        entries = {}
        for name, content in files.items():
            size, digest = self._disk.write(partial / name, iter_pieces(content, self._on_progress))
            entries[name] = {"bytes": size, "sha256": digest}
        manifest = _to_json({"files": entries, "format": FORMAT})
        self._disk.write(partial / MANIFEST, [manifest])
        self._disk.sync(partial)

    def _delete(self, path: Path) -> None:
        """Rename the checkpoint first, so that a partly deleted one does not look damaged."""
        gone = path.with_name(path.name + _DELETED)
        self._disk.rename(path, gone)
        self._disk.remove(gone)

    def _remove_leftovers(self) -> None:
        """Remove leftovers of a crash."""
        if not self.folder.is_dir():
            self._disk.make(self.folder)
            self._disk.sync(self.folder.parent)
        for path in self.folder.iterdir():
            if path.suffix in (_PARTIAL, _DELETED):
                with contextlib.suppress(OSError):  # it is ignored, and retried next time
                    self._disk.remove(path)


def read(
    path: Path, on_progress: OnProgress = lambda: None, *, foreign: bool = False
) -> StoredCheckpoint:
    """
    Read one checkpoint and verify every byte against its manifest.

    Args:
        path: its directory.
        on_progress: see `with_deadline`.
        foreign: whether another user may have written it: its size is checked against memory.

    Raises:
        StorageError: it is damaged.
        DoesNotFit: it is foreign, and larger than memory and swap.
    """
    manifest = read_manifest(path)
    if foreign:
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
    """Return the problem of a checkpoint, after reading every byte; []: it is intact."""
    try:
        read(path, on_progress)
    except StorageError as error:
        return [str(error)]
    return []


def find_truncated_file(path: Path) -> str:
    """Return a message about a missing or truncated file of a checkpoint; empty: none."""
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
    Read the checkpoint that `--resume` names, or the newest intact one of a run directory.

    Args:
        path: the directory.
        warn: called with a message about each damaged checkpoint.
        on_progress: see `with_deadline`.

    Raises:
        SpecError: there is no checkpoint.
        StorageError: there are checkpoints, but all are damaged.
    """
    with naming_path(path, "--resume"):
        is_checkpoint, exists = (path / MANIFEST).is_file(), path.is_dir()
    if is_checkpoint or step_of(path.name) is not None:
        if not exists:
            raise SpecError(Problem(("--resume",), f"there is no {path}"))
        return read(path, on_progress, foreign=True)
    catalogue = Catalogue(path if path.name == FOLDER else path / FOLDER)
    stored = catalogue.newest(warn, on_progress, foreign=True)
    if stored is not None:
        return stored
    what = f"no checkpoint in {path}" if exists else f"there is no directory {path}"
    hint = "give a run directory, or a directory step-... of its checkpoints"
    raise SpecError(Problem(("--resume",), what, hint))


def read_manifest(path: Path) -> dict[str, dict[str, Any]]:
    """
    Return `bytes` and `sha256` of each file in a checkpoint's manifest.

    Raises:
        StorageError: it is damaged, or of another format.
    """
    text, _ = _read_file(path / MANIFEST)
    try:
        manifest = json.loads(text)
        version = manifest["format"]
        if isinstance(version, int) and version != FORMAT:
            raise StorageError(f"{path} has format {version}, this distplat reads {FORMAT}")
        files: dict[str, dict[str, Any]] = manifest["files"]
        is_valid = isinstance(version, int) and all(
            _FILE.fullmatch(name)
            and type(entry["bytes"]) is int  # not bool
            and entry["bytes"] >= 0  # a negative size would hide a too large file in the sum
            and _SHA256.fullmatch(entry["sha256"])
            for name, entry in files.items()
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        is_valid = False
    if not is_valid:
        raise StorageError(f"{path / MANIFEST} is damaged")
    return dict(files)


def _read_verified(path: Path, facts: Mapping[str, Any], on_progress: OnProgress) -> bytes:
    content, digest = _read_file(path, facts, on_progress)
    if digest != facts["sha256"]:
        raise StorageError(f"{path}: SHA-256 is {digest[:8]}.., expected {facts['sha256'][:8]}..")
    return content


def _read_file(
    path: Path, facts: Mapping[str, Any] | None = None, on_progress: OnProgress = lambda: None
) -> tuple[bytes, str]:
    """
    Read a file and return its content and SHA-256; its size is checked before it is read.

    Args:
        path: of the file.
        facts: its entry in the manifest; None: it is the manifest.
        on_progress: called after each piece.
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
