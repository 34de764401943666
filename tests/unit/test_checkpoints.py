"""A checkpoint is whole or not there, whatever comes between; a damaged one is never taken."""

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
    """The process is no more."""


class BadDisk(Disk):
    """Crashes, or fails with an error, at operation number `at`, before, in the middle or after."""

    def __init__(self, at: int, how: str) -> None:
        self.at, self.how, self.done = at, how, 0
        self.log: list[tuple[str, str]] = []

    def _before(self, what: str, path: Path) -> bool:
        """Say whether this is the operation."""
        self.log.append((what, path.name))
        self.done += 1
        if self.done - 1 == self.at and self.how == "before":
            raise Crash
        if self.done - 1 == self.at and self.how == "full":
            raise OSError(errno.ENOSPC, "No space left on device")
        return self.done - 1 == self.at

    def make(self, path: Path) -> None:
        hit = self._before("make", path)
        super().make(path)
        self._after(hit)

    def write(self, path: Path, content: FileContent) -> tuple[int, str]:
        hit = self._before("write", path)
        if hit and self.how == "middle":
            path.write_bytes(b"".join(content)[:7])
            raise Crash
        result = super().write(path, content)
        self._after(hit)
        return result

    def sync(self, path: Path) -> None:
        hit = self._before("sync", path)
        super().sync(path)
        self._after(hit)

    def rename(self, old: Path, new: Path) -> None:
        hit = self._before("rename", new)
        super().rename(old, new)
        self._after(hit)

    def remove(self, path: Path) -> None:
        hit = self._before("remove", path)
        if hit and self.how == "middle":
            next(path.iterdir()).unlink()
            raise Crash
        super().remove(path)
        self._after(hit)

    def _after(self, hit: bool) -> None:
        if hit and self.how in ("middle", "after"):
            raise Crash


def save(catalogue: Catalogue, step: int, keep: int = 2) -> None:
    files = {"model.safetensors": [b"model " * 20, str(step).encode()], "optimizer.safetensors": []}
    catalogue.write(step, files, {"seed": 7})
    catalogue.prune(keep, step)


def holds(checkpoint: StoredCheckpoint, step: int) -> None:
    assert checkpoint.step == step
    assert checkpoint.state == {"seed": 7, "step": step}
    assert checkpoint.files["model.safetensors"] == b"model " * 20 + str(step).encode()
    assert checkpoint.files["optimizer.safetensors"] == b""


def must_not_warn(text: str) -> None:
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
def test_when_one_is_due(version: int, every: int, total: int, due: bool) -> None:
    assert is_due(version, every, total) is due


@given(st.sets(st.integers(0, 99)), st.integers(1, 5))
def test_the_newest_stay(steps: set[int], keep: int) -> None:
    gone = deletable_steps(steps, keep, max(steps, default=0))
    left = steps - set(gone)
    assert len(left) == min(keep, len(steps))
    assert not gone or max(gone) < min(left)
    for written in steps:
        assert set(deletable_steps(steps, keep, written)) == set(gone) - {written}


def test_what_is_written_is_read(tmp_path: Path) -> None:
    catalogue = Catalogue(tmp_path / "checkpoints")
    assert catalogue.newest(must_not_warn) is None
    for step in (10, 20, 30):
        save(catalogue, step)
    assert catalogue.steps() == [20, 30]
    found = catalogue.newest(must_not_warn)
    assert found is not None
    holds(found, 30)
    holds(find(tmp_path, must_not_warn), 30)
    holds(find(tmp_path / "checkpoints", must_not_warn), 30)
    holds(find(tmp_path / "checkpoints" / "step-000020", must_not_warn), 20)
    assert {p.name for p in found.path.iterdir()} == {
        "model.safetensors",
        "optimizer.safetensors",
        "state.json",
        "manifest.json",
    }


def test_the_order_on_the_disk(tmp_path: Path) -> None:
    """Files before the manifest, all of it before the name, the name before older ones go."""
    disk = BadDisk(-1, "never")
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
def test_a_crash_at_any_operation_leaves_a_whole_one(how: str, tmp_path: Path) -> None:
    at = 0
    while True:
        folder = tmp_path / str(at) / "checkpoints"
        folder.parent.mkdir()
        save(Catalogue(folder), 10, keep=1)
        save(Catalogue(folder), 20, keep=1)
        disk = BadDisk(at, how)
        try:
            save(Catalogue(folder, disk), 30, keep=1)
        except Crash:
            named = [Catalogue(folder).path(step) for step in Catalogue(folder).steps()]
            assert named
            assert all(flaws(path) == [] for path in named), "a name means that it is whole"
            newest = Catalogue(folder).newest(must_not_warn)
            assert newest is not None
            holds(newest, newest.step)
            assert newest.step >= 20
            save(Catalogue(folder), 40, keep=1)
            assert [path.name for path in folder.iterdir()] == ["step-000040"], "all is tidy again"
        else:
            assert at > 8, "no operation was hit"
            return
        at += 1


@pytest.mark.parametrize("at", range(8))
def test_a_full_disk_costs_nothing_that_is_there(at: int, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    save(Catalogue(folder), 10)
    with pytest.raises(OSError, match="No space left"):
        save(Catalogue(folder, BadDisk(at, "full")), 20)
    assert [p.name for p in folder.iterdir() if p.suffix == ".partial"] == []
    found = Catalogue(folder).newest(must_not_warn)
    assert found is not None
    assert found.step in (10, 20)


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


def test_kills_at_random_moments(tmp_path: Path) -> None:
    folder, reached = tmp_path / "checkpoints", 0
    for round_ in range(12):
        child = subprocess.Popen(
            [sys.executable, "-c", CHILD, str(folder)], stdout=subprocess.PIPE, text=True
        )
        assert child.stdout is not None
        told = [child.stdout.readline()]
        time.sleep(0.002 * round_)
        os.kill(child.pid, signal.SIGKILL)
        told += child.communicate(timeout=30)[0].splitlines()
        newest = Catalogue(folder).newest(must_not_warn)
        assert newest is not None
        sure = max(int(line) for line in told if line.strip())
        assert newest.step >= max(sure, reached), "what was reported is there"
        reached = newest.step
        assert newest.files["model.safetensors"] == bytes([reached % 256]) * 300_000


def damaged(path: Path) -> list[bytes]:
    """The file cut at every tenth of its length, and with single bits flipped all over it."""
    content = path.read_bytes()
    cut = [content[: len(content) * tenth // 10] for tenth in range(10)]
    flipped = []
    for place in range(0, len(content), max(1, len(content) // 400)):
        for bit in (0, 5):
            one = bytearray(content)
            one[place] ^= 1 << bit
            flipped.append(bytes(one))
    return [*cut, *flipped]


@pytest.mark.parametrize("name", ["model.safetensors", "state.json", "manifest.json"])
def test_every_damage_is_found_and_the_one_before_is_taken(name: str, tmp_path: Path) -> None:
    catalogue = Catalogue(tmp_path / "checkpoints")
    save(catalogue, 10)
    save(catalogue, 20)
    path = catalogue.path(20) / name
    whole = path.read_bytes()
    for content in damaged(path):
        path.write_bytes(content)
        told: list[str] = []
        found = catalogue.newest(told.append)
        assert found is not None
        holds(found, 10)
        assert len(told) == 1
        assert str(catalogue.path(20)) in told[0]
        with pytest.raises(StorageError):
            find(catalogue.path(20), must_not_warn)
    path.write_bytes(whole)
    holds(read(catalogue.path(20)), 20)


def test_a_file_is_missing_or_a_link(tmp_path: Path) -> None:
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


def test_a_damaged_newest_lets_no_older_one_go(tmp_path: Path) -> None:
    catalogue = Catalogue(tmp_path / "checkpoints")
    save(catalogue, 10, keep=9)
    save(catalogue, 20, keep=9)
    (catalogue.path(20) / "model.safetensors").write_bytes(b"lost")
    with pytest.raises(OSError, match="nothing was deleted"):
        catalogue.prune(1, 20)
    assert catalogue.steps() == [10, 20]


class Held(Disk):
    """A disk on which nothing can be removed for a while, as on NFS while somebody reads it."""

    held = True

    def remove(self, path: Path) -> None:
        if self.held:
            raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY))
        super().remove(path)


def test_what_cannot_be_deleted_costs_no_checkpoint(tmp_path: Path) -> None:
    disk = Held()
    catalogue = Catalogue(tmp_path / "checkpoints", disk)
    for step in (10, 20, 30):
        catalogue.write(step, {"model.safetensors": [b"model"]}, {})
        told = catalogue.prune(1, step)
        assert catalogue.steps() == [step], "what is half deleted counts for nothing"
        assert told == ("" if step == 10 else f"{catalogue.path(step - 10)}: Directory not empty")
    disk.held = False
    catalogue.write(40, {"model.safetensors": [b"model"]}, {})
    assert catalogue.prune(1, 40) == ""
    assert [path.name for path in catalogue.folder.iterdir()] == ["step-000040"]


def test_what_was_just_written_stays_where_older_work_had_come_further(tmp_path: Path) -> None:
    catalogue = Catalogue(tmp_path / "checkpoints")
    save(catalogue, 10, keep=9)
    save(catalogue, 40, keep=9)
    save(catalogue, 20, keep=1)
    assert catalogue.steps() == [20, 40]
    save(catalogue, 50, keep=1)
    assert catalogue.steps() == [50]


def test_damaged_ones_are_set_aside_and_their_steps_are_free_again(tmp_path: Path) -> None:
    catalogue = Catalogue(tmp_path / "checkpoints")
    for step in (10, 20, 30):
        save(catalogue, step, keep=9)
    for _ in range(2):
        (catalogue.path(30) / "model.safetensors").write_bytes(b"lost")
        catalogue.set_aside(20)
        assert catalogue.steps() == [10, 20]
        save(catalogue, 30, keep=9)
        holds(read(catalogue.path(30)), 30)
    aside = catalogue.path(30).with_name("step-000030.damaged")
    assert (aside / "model.safetensors").read_bytes() == b"lost", "a person may look at it"


def test_one_that_is_there_stays_and_a_damaged_one_is_replaced(tmp_path: Path) -> None:
    catalogue = Catalogue(tmp_path / "checkpoints")
    save(catalogue, 10)
    inode = catalogue.path(10).stat().st_ino
    save(catalogue, 10)
    assert catalogue.path(10).stat().st_ino == inode
    (catalogue.path(10) / "state.json").write_bytes(b"{}")
    save(catalogue, 10)
    holds(read(catalogue.path(10)), 10)


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    catalogue = Catalogue(tmp_path / "checkpoints")
    save(catalogue, 10)
    path = catalogue.path(10) / "manifest.json"
    facts = {**json.loads(path.read_text()), "format": 2}
    path.write_text(json.dumps(facts, indent=2, sort_keys=True) + "\n")
    with pytest.raises(StorageError, match="has format 2, this distplat reads 1"):
        read(catalogue.path(10))


def test_nothing_to_resume_from(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="--resume: no checkpoint in"):
        find(tmp_path, must_not_warn)
    with pytest.raises(SpecError, match="there is no directory"):
        find(tmp_path / "nowhere", must_not_warn)
    with pytest.raises(SpecError, match="there is no "):
        find(tmp_path / "step-000010", must_not_warn)


@pytest.mark.parametrize("name", ["manifest.json", "model.safetensors"])
@pytest.mark.parametrize("kind", ["fifo", "device", "directory", "longer"])
def test_a_foreign_file_neither_hangs_nor_fills_memory(
    kind: str, name: str, tmp_path: Path
) -> None:
    catalogue = Catalogue(tmp_path / "checkpoints")
    save(catalogue, 10)
    path = catalogue.path(10) / name
    if kind == "longer":
        os.truncate(path, 2**40)  # of nothing: it takes no room
    else:
        path.unlink()
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    elif kind == "device":
        try:
            os.mknod(path, 0o600 | stat.S_IFCHR, os.makedev(1, 5))  # /dev/zero
        except PermissionError:
            pytest.skip("only root makes devices")
    with pytest.raises(StorageError, match=r"not a regular file|Is a dir|1099511627776 b"):
        read(catalogue.path(10))


def put_in(checkpoint: Path, name: str, content: bytes) -> None:
    """Replace a file, and what the manifest says of it."""
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
def test_json_of_any_shape_is_damage(name: str, content: bytes, tmp_path: Path) -> None:
    catalogue = Catalogue(tmp_path / "checkpoints")
    save(catalogue, 10)
    put_in(catalogue.path(10), name, content)
    with pytest.raises(StorageError):
        read(catalogue.path(10))
    with pytest.raises(StorageError, match="all 1 checkpoints are damaged"):
        find(tmp_path, lambda text: None)
