"""What is larger than all memory is refused before it is read: it may be a file of nothing."""

import json
import sys
from pathlib import Path

import pytest

from distplat.platform import total_memory
from distplat.platform.checkpoints import FOLDER, MANIFEST, Catalogue, find, read, read_manifest
from distplat.platform.errors import StorageError
from distplat.platform.total_memory import DoesNotFit, check_fits, memory_and_swap

MEMINFO = "MemTotal:    2000 kB\nMemAvailable:   5 kB\nSwapTotal:   100 kB\nHugePages_Total: 0\n"


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
        (MEMINFO, {"max": "max\n", "swap.max": "max\n"}, 2100 * 1024),
        (MEMINFO, {"max": "900\n", "swap.max": "0\n"}, 900),
        (MEMINFO, {"max": "900\n", "swap.max": "50\n", "current": "890\n"}, 950),
        (MEMINFO, {"max": "900\n"}, 900 + 100 * 1024),  # a kernel without accounting of swap
        (MEMINFO, {"max": "9" * 15, "swap.max": "9" * 15}, 2100 * 1024),
        ("MemTotal: 9000 kB\n", {}, None),
        ("no figures", {}, None),
    ],
)
def test_total_is_what_machine_and_container_have(
    meminfo: str, cgroup: dict[str, str], expected: int | None, tmp_path: Path
) -> None:
    """What others have taken at the moment does not count: they may give it back."""
    assert memory_and_swap(*kernel(tmp_path, meminfo, **cgroup)) == expected


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nobody says")
def test_this_machine_says_what_it_has() -> None:
    total = memory_and_swap()
    assert total is not None and total > 2**20
    check_fits(Path("a"), 2**20)
    with pytest.raises(
        DoesNotFit, match="a: it has 1152921504606846976 bytes, and memory and swap"
    ):
        check_fits(Path("a"), 2**60)


def test_where_nobody_says_everything_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(total_memory, "memory_and_swap", lambda: None)
    check_fits(Path("a"), 2**60)


def test_a_checkpoint_that_does_not_fit_ends_a_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No older one is taken, which would cost work; a run reads its own in any case."""
    catalogue, warnings = Catalogue(tmp_path / FOLDER), list[str]()
    for step, size in ((1, 10), (2, 5000)):
        catalogue.write(step, {"model.safetensors": [bytes(size)]}, {})
    monkeypatch.setattr(total_memory, "memory_and_swap", lambda: 4000)
    for path in (tmp_path, catalogue.path(2)):
        with pytest.raises(DoesNotFit, match=r"step-000002: it has 50\d\d bytes, and memory"):
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
        read_manifest(catalogue.path(1))
