"""Checkpoints on disk are written atomically, and damaged ones are never loaded."""

import errno
import hashlib
import json
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distplat.platform.checkpoints import (
    Catalogue,
    StoredCheckpoint,
    deletable_steps,
    find,
    flaws,
    is_due,
    read,
)
from distplat.platform.disk import Disk, FileContent
from distplat.platform.errors import SpecError, StorageError


class Crash(BaseException):
    """The process dies."""


class FaultyDisk(Disk):
    """Crashes before, during or after operation number `at`, or raises an error at it."""

    def __init__(self, at: int, how: str) -> None:
        self.at, self.how, self.count = at, how, 0
        self.log: list[tuple[str, str]] = []

    def _before(self, operation: str, path: Path) -> bool:
        """Return whether this operation is the faulty one."""
        self.log.append((operation, path.name))
        self.count += 1
        if self.count - 1 == self.at and self.how == "before":
            raise Crash
        if self.count - 1 == self.at and self.how == "full":
            raise OSError(errno.ENOSPC, "No space left on device")
        return self.count - 1 == self.at

    def make(self, path: Path) -> None:
        is_faulty = self._before("make", path)
        super().make(path)
        self._after(is_faulty)

    def write(self, path: Path, content: FileContent) -> tuple[int, str]:
        is_faulty = self._before("write", path)
        if is_faulty and self.how == "middle":
            path.write_bytes(b"".join(content)[:7])
            raise Crash
        result = super().write(path, content)
        self._after(is_faulty)
        return result

    def sync(self, path: Path) -> None:
        is_faulty = self._before("sync", path)
        super().sync(path)
        self._after(is_faulty)

    def rename(self, old: Path, new: Path) -> None:
        is_faulty = self._before("rename", new)
        super().rename(old, new)
        self._after(is_faulty)

    def remove(self, path: Path) -> None:
        is_faulty = self._before("remove", path)
        if is_faulty and self.how == "middle":
            next(path.iterdir()).unlink()
            raise Crash
        super().remove(path)
        self._after(is_faulty)

    def _after(self, is_faulty: bool) -> None:
        if is_faulty and self.how in ("middle", "after"):
            raise Crash


def save(catalogue: Catalogue, step: int, keep: int = 2) -> None:
    files = {"model.safetensors": [b"model " * 20, str(step).encode()], "optimizer.safetensors": []}
    catalogue.write(step, files, {"seed": 7})
    catalogue.prune(keep, step)


def assert_content(checkpoint: StoredCheckpoint, step: int) -> None:
    assert checkpoint.step == step
    assert checkpoint.state == {"seed": 7, "step": step}
    assert checkpoint.files["model.safetensors"] == b"model " * 20 + str(step).encode()
    assert checkpoint.files["optimizer.safetensors"] == b""


def fail_on_warning(text: str) -> None:
    raise AssertionError(text)


@pytest.mark.parametrize(
    ("version", "every", "total", "due"),
    [
        (0, 5, 20, False),
        (5, 5, 20, True),
        (6, 5, 20, False),
        (20, 5, 20, True),
        (18, 5, 18, True),
        (5, 0, 20, False),
        (20, 0, 20, False),
        (3, 100, 3, True),
    ],
)
def test_is_due(version: int, every: int, total: int, due: bool) -> None:
    assert is_due(version, every, total) is due


@given(st.sets(st.integers(0, 99)), st.integers(1, 5))
def test_keeps_the_newest(steps: set[int], keep: int) -> None:
    deletable = deletable_steps(steps, keep, max(steps, default=0))
    kept = steps - set(deletable)
    assert len(kept) == min(keep, len(steps))
    assert not deletable or max(deletable) < min(kept)
    for written in steps:
        assert set(deletable_steps(steps, keep, written)) == set(deletable) - {written}


def test_write_and_read(tmp_path: Path) -> None:
    catalogue = Catalogue(tmp_path / "checkpoints")
    assert catalogue.newest(fail_on_warning) is None
    for step in (10, 20, 30):
        save(catalogue, step)
    assert catalogue.steps() == [20, 30]
    checkpoint = catalogue.newest(fail_on_warning)
    assert checkpoint is not None
    assert_content(checkpoint, 30)
    assert_content(find(tmp_path, fail_on_warning), 30)
    assert_content(find(tmp_path / "checkpoints", fail_on_warning), 30)
    assert_content(find(tmp_path / "checkpoints" / "step-000020", fail_on_warning), 20)
    assert {p.name for p in checkpoint.path.iterdir()} == {
        "model.safetensors",
        "optimizer.safetensors",
        "state.json",
        "manifest.json",
    }


def test_order_of_disk_operations(tmp_path: Path) -> None:
    """Files precede the manifest, then the rename, then the deletion of older checkpoints."""
    disk = FaultyDisk(-1, "never")
    catalogue = Catalogue(tmp_path / "checkpoints", disk)
    save(catalogue, 10, keep=1)
    disk.log.clear()
    save(catalogue, 20, keep=1)
    partial = "step-000020.partial"
    assert disk.log == [
        ("make", partial),
        ("write", "model.safetensors"),
        ("write", "optimizer.safetensors"),
        ("write", "state.json"),
        ("write", "manifest.json"),
        ("sync", partial),
        ("rename", "step-000020"),
        ("sync", "checkpoints"),
        ("rename", "step-000010.deleted"),
        ("remove", "step-000010.deleted"),
    ]


@pytest.mark.parametrize("how", ["before", "middle", "after"])
def test_crash_at_any_operation_leaves_a_complete_checkpoint(how: str, tmp_path: Path) -> None:
    at = 0
    while True:
        folder = tmp_path / str(at) / "checkpoints"
        folder.parent.mkdir()
        save(Catalogue(folder), 10, keep=1)
        save(Catalogue(folder), 20, keep=1)
        disk = FaultyDisk(at, how)
        try:
            save(Catalogue(folder, disk), 30, keep=1)
        except Crash:
            paths = [Catalogue(folder).path(step) for step in Catalogue(folder).steps()]
            assert paths
            assert all(flaws(path) == [] for path in paths), "renamed checkpoints are complete"
            newest = Catalogue(folder).newest(fail_on_warning)
            assert newest is not None
            assert_content(newest, newest.step)
            assert newest.step >= 20
            save(Catalogue(folder), 40, keep=1)
            assert [path.name for path in folder.iterdir()] == ["step-000040"], (
                "leftovers were deleted"
            )
        else:
            assert at > 8, "no operation was faulty"
            return
        at += 1


@pytest.mark.parametrize("at", range(8))
def test_full_disk_keeps_existing_checkpoints(at: int, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    save(Catalogue(folder), 10)
    with pytest.raises(OSError, match="No space left"):
        save(Catalogue(folder, FaultyDisk(at, "full")), 20)
    assert [p.name for p in folder.iterdir() if p.suffix == ".partial"] == []
    checkpoint = Catalogue(folder).newest(fail_on_warning)
    assert checkpoint is not None
    assert checkpoint.step in (10, 20)


CHILD = """
import sys, itertools
from pathlib import Path
from distplat.platform.checkpoints import Catalogue
folder = Path(sys.argv[1])
steps = Catalogue(folder).steps()
for step in itertools.count((steps[-1] if steps else 0) + 1):
    catalogue = Catalogue(folder)
    catalogue.write(step, {"model.safetensors": [bytes([step % 256]) * 300_000]}, {})
    catalogue.prune(1, step)
    print(step, flush=True)
"""


def test_kill_at_random_moments(tmp_path: Path) -> None:
    folder, reached = tmp_path / "checkpoints", 0
    for round_ in range(12):
        child = subprocess.Popen(
            [sys.executable, "-c", CHILD, str(folder)], stdout=subprocess.PIPE, text=True
        )
        assert child.stdout is not None
        lines = [child.stdout.readline()]
        time.sleep(0.002 * round_)
        os.kill(child.pid, signal.SIGKILL)
        lines += child.communicate(timeout=30)[0].splitlines()
        newest = Catalogue(folder).newest(fail_on_warning)
        assert newest is not None
        reported = max(int(line) for line in lines if line.strip())
        assert newest.step >= max(reported, reached), "a reported checkpoint is missing"
        reached = newest.step
        assert newest.files["model.safetensors"] == bytes([reached % 256]) * 300_000


def damaged_contents(path: Path) -> list[bytes]:
    """Return the content truncated at every tenth, and with single bits flipped everywhere."""
    content = path.read_bytes()
    truncated = [content[: len(content) * tenth // 10] for tenth in range(10)]
    flipped = []
    for place in range(0, len(content), max(1, len(content) // 400)):
        for bit in (0, 5):
            copy = bytearray(content)
            copy[place] ^= 1 << bit
            flipped.append(bytes(copy))
    return [*truncated, *flipped]


@pytest.mark.parametrize("name", ["model.safetensors", "state.json", "manifest.json"])
def test_detects_damage_and_loads_the_previous_checkpoint(name: str, tmp_path: Path) -> None:
    catalogue = Catalogue(tmp_path / "checkpoints")
    save(catalogue, 10)
    save(catalogue, 20)
    path = catalogue.path(20) / name
    intact = path.read_bytes()
    for content in damaged_contents(path):
        path.write_bytes(content)
        warnings: list[str] = []
        checkpoint = catalogue.newest(warnings.append)
        assert checkpoint is not None
        assert_content(checkpoint, 10)
        assert len(warnings) == 1
        assert str(catalogue.path(20)) in warnings[0]
        with pytest.raises(StorageError):
            find(catalogue.path(20), fail_on_warning)
    path.write_bytes(intact)
    assert_content(read(catalogue.path(20)), 20)


def test_rejects_missing_files_and_links(tmp_path: Path) -> None:
    catalogue = Catalogue(tmp_path / "checkpoints")
    save(catalogue, 10)
    path = catalogue.path(10) / "model.safetensors"
    path.rename(tmp_path / "elsewhere")
    with pytest.raises(StorageError, match=r"cannot read .*model.safetensors: No such file"):
        read(catalogue.path(10))
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StorageError, match="cannot read"):
        read(catalogue.path(10))
    with pytest.raises(StorageError, match="all 1 checkpoints are damaged"):
        find(tmp_path, lambda text: None)


def test_keeps_older_checkpoints_if_the_newest_is_damaged(tmp_path: Path) -> None:
    catalogue = Catalogue(tmp_path / "checkpoints")
    save(catalogue, 10, keep=9)
    save(catalogue, 20, keep=9)
    (catalogue.path(20) / "model.safetensors").write_bytes(b"lost")
    with pytest.raises(OSError, match="nothing was deleted"):
        catalogue.prune(1, 20)
    assert catalogue.steps() == [10, 20]


class BusyDisk(Disk):
    """A disk whose deletions fail for a while, as on NFS while another process reads."""

    busy = True

    def remove(self, path: Path) -> None:
        if self.busy:
            raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY))
        super().remove(path)


def test_failed_deletion_is_retried(tmp_path: Path) -> None:
    disk = BusyDisk()
    catalogue = Catalogue(tmp_path / "checkpoints", disk)
    for step in (10, 20, 30):
        catalogue.write(step, {"model.safetensors": [b"model"]}, {})
        error = catalogue.prune(1, step)
        assert catalogue.steps() == [step], "a partly deleted checkpoint does not count"
        assert error == ("" if step == 10 else f"{catalogue.path(step - 10)}: Directory not empty")
    disk.busy = False
    catalogue.write(40, {"model.safetensors": [b"model"]}, {})
    assert catalogue.prune(1, 40) == ""
    assert [path.name for path in catalogue.folder.iterdir()] == ["step-000040"]


def test_keeps_a_new_checkpoint_older_than_existing_ones(tmp_path: Path) -> None:
    catalogue = Catalogue(tmp_path / "checkpoints")
    save(catalogue, 10, keep=9)
    save(catalogue, 40, keep=9)
    save(catalogue, 20, keep=1)
    assert catalogue.steps() == [20, 40]
    save(catalogue, 50, keep=1)
    assert catalogue.steps() == [50]


def test_set_aside_frees_the_step(tmp_path: Path) -> None:
    catalogue = Catalogue(tmp_path / "checkpoints")
    for step in (10, 20, 30):
        save(catalogue, step, keep=9)
    for _ in range(2):
        (catalogue.path(30) / "model.safetensors").write_bytes(b"lost")
        catalogue.set_aside(20)
        assert catalogue.steps() == [10, 20]
        save(catalogue, 30, keep=9)
        assert_content(read(catalogue.path(30)), 30)
    aside = catalogue.path(30).with_name("step-000030.damaged")
    assert (aside / "model.safetensors").read_bytes() == b"lost", "kept for inspection"


def test_write_replaces_only_damaged_checkpoints(tmp_path: Path) -> None:
    catalogue = Catalogue(tmp_path / "checkpoints")
    save(catalogue, 10)
    inode = catalogue.path(10).stat().st_ino
    save(catalogue, 10)
    assert catalogue.path(10).stat().st_ino == inode
    (catalogue.path(10) / "state.json").write_bytes(b"{}")
    save(catalogue, 10)
    assert_content(read(catalogue.path(10)), 10)


def test_rejects_newer_format(tmp_path: Path) -> None:
    catalogue = Catalogue(tmp_path / "checkpoints")
    save(catalogue, 10)
    path = catalogue.path(10) / "manifest.json"
    facts = {**json.loads(path.read_text()), "format": 2}
    path.write_text(json.dumps(facts, indent=2, sort_keys=True) + "\n")
    with pytest.raises(StorageError, match="has format 2, this distplat reads 1"):
        read(catalogue.path(10))


def test_rejects_resume_without_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="--resume: no checkpoint in"):
        find(tmp_path, fail_on_warning)
    with pytest.raises(SpecError, match="there is no directory"):
        find(tmp_path / "nowhere", fail_on_warning)
    with pytest.raises(SpecError, match="there is no "):
        find(tmp_path / "step-000010", fail_on_warning)


@pytest.mark.parametrize("name", ["manifest.json", "model.safetensors"])
@pytest.mark.parametrize("file_type", ["fifo", "device", "directory", "longer"])
def test_special_file_neither_hangs_nor_fills_memory(
    file_type: str, name: str, tmp_path: Path
) -> None:
    catalogue = Catalogue(tmp_path / "checkpoints")
    save(catalogue, 10)
    path = catalogue.path(10) / name
    if file_type == "longer":
        os.truncate(path, 2**40)  # sparse: uses no blocks
    else:
        path.unlink()
    if file_type == "fifo":
        os.mkfifo(path)
    elif file_type == "directory":
        path.mkdir()
    elif file_type == "device":
        try:
            os.mknod(path, 0o600 | stat.S_IFCHR, os.makedev(1, 5))  # /dev/zero
        except PermissionError:
            pytest.skip("only root makes devices")
    with pytest.raises(StorageError, match=r"not a regular file|Is a dir|1099511627776 b"):
        read(catalogue.path(10))


def replace_file(checkpoint: Path, name: str, content: bytes) -> None:
    """Replace a file, and update its entry in the manifest."""
    (checkpoint / name).write_bytes(content)
    if name != "manifest.json":
        manifest = json.loads((checkpoint / "manifest.json").read_text())
        digest = hashlib.sha256(content).hexdigest()
        manifest["files"][name] = {"bytes": len(content), "sha256": digest}
        (checkpoint / "manifest.json").write_text(json.dumps(manifest))


DEEP = b"[" * 200_000


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("manifest.json", DEEP),
        ("manifest.json", b'{"files": ' + DEEP),
        ("manifest.json", b'{"files": ["state.json"], "format": 1}'),
        ("manifest.json", b'{"files": {"state.json": 1}, "format": 1}'),
        ("manifest.json", b'{"files": {"../x.json": {}}, "format": 1}'),
        ("manifest.json", b'{"files": {}, "format": 1}'),
        ("manifest.json", b'{"files": {"state.json": {"bytes": 3}}, "format": 1}'),
        ("manifest.json", b'{"files": {"state.json": {"bytes": "3", "sha256": ""}}, "format": 1}'),
        ("manifest.json", b'{"files": {}, "format": ' + b"9" * 5000 + b"}"),
        ("manifest.json", b"\xff"),
        ("state.json", DEEP),
        ("state.json", b"[]"),
        ("state.json", b'{"step": "1"}'),
        ("state.json", b'{"step": ' + b"9" * 5000 + b"}"),
    ],
)
def test_malformed_json_is_damage(name: str, content: bytes, tmp_path: Path) -> None:
    catalogue = Catalogue(tmp_path / "checkpoints")
    save(catalogue, 10)
    replace_file(catalogue.path(10), name, content)
    with pytest.raises(StorageError):
        read(catalogue.path(10))
    with pytest.raises(StorageError, match="all 1 checkpoints are damaged"):
        find(tmp_path, lambda text: None)
