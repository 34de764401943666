"""What is larger than free memory is refused before it is read: it may be a file of nothing."""

import json
from pathlib import Path

import pytest

from distplat.platform import free_memory
from distplat.platform.checkpoints import FOLDER, MANIFEST, Catalogue, find, listed, read
from distplat.platform.errors import StorageError
from distplat.platform.free_memory import DoesNotFit, available_memory, check_fits

MEMINFO = "MemTotal: 9000 kB\nMemAvailable:   2000 kB\nSwapFree:   100 kB\nHugePages_Total: 0\n"


def kernel(folder: Path, meminfo: str, **cgroup: str) -> tuple[Path, Path]:
    """Write files as the kernel has them."""
    (folder / "meminfo").write_text(meminfo)
    for name, text in cgroup.items():
        (folder / f"memory.{name}").write_text(text)
    return folder / "meminfo", folder


@pytest.mark.parametrize(
    ("meminfo", "cgroup", "expected"),
    [
        (MEMINFO, {}, 2100 * 1024),
        (MEMINFO, {"max": "max\n", "current": "5\n", "stat": "file 0\nshmem 0\n"}, 2100 * 1024),
        (MEMINFO, {"max": "900\n", "current": "500\n", "stat": "file 300\nshmem 100\n"}, 600),
        (MEMINFO, {"max": "900\n", "current": "990\n", "stat": "file 0\nshmem 0\n"}, 0),
        (MEMINFO, {"max": "9" * 15, "current": "5\n", "stat": "file 0\nshmem 0\n"}, 2100 * 1024),
        (MEMINFO, {"max": "900\n"}, 2100 * 1024),
        ("MemTotal: 9000 kB\n", {}, None),
        ("no figures", {}, None),
    ],
)
def test_free_is_what_machine_and_container_leave(
    meminfo: str, cgroup: dict[str, str], expected: int | None, tmp_path: Path
) -> None:
    assert available_memory(*kernel(tmp_path, meminfo, **cgroup)) == expected


def test_this_machine_says_what_is_free() -> None:
    free = available_memory()
    assert free is None or free > 0


def test_where_nobody_says_everything_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(free_memory, "available_memory", lambda: None)
    check_fits(Path("a"), 2**60)


def test_a_checkpoint_that_does_not_fit_ends_a_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No older one is taken, which would cost work; a run reads its own in any case."""
    catalogue, warnings = Catalogue(tmp_path / FOLDER), list[str]()
    for step, size in ((1, 10), (2, 5000)):
        catalogue.write(step, {"model.safetensors": [bytes(size)]}, {})
    monkeypatch.setattr(free_memory, "available_memory", lambda: 4000)
    for path in (tmp_path, catalogue.path(2)):
        with pytest.raises(DoesNotFit, match=r"step-000002: it has 50\d\d bytes, and memory has"):
            find(path, warnings.append)
    assert find(catalogue.path(1), warnings.append).step == 1
    own = catalogue.newest(warnings.append)
    assert own is not None and own.step == read(catalogue.path(2)).step == 2
    assert not warnings


@pytest.mark.parametrize("size", [-5000, True, 1.0])
def test_sizes_that_are_none_hide_no_file(size: object, tmp_path: Path) -> None:
    """A sum with a negative size would be small, and all of the large file be read."""
    catalogue = Catalogue(tmp_path / FOLDER)
    catalogue.write(1, {"model.safetensors": [bytes(5000)], "b.safetensors": [b""]}, {})
    path = catalogue.path(1) / MANIFEST
    manifest = json.loads(path.read_text())
    manifest["files"]["b.safetensors"]["bytes"] = size
    path.write_text(json.dumps(manifest))
    with pytest.raises(StorageError, match=f"{MANIFEST} is damaged"):
        listed(catalogue.path(1))
