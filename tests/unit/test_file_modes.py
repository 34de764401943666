"""Permissions of run directories: owner and group according to the umask, others none."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from stat import S_IMODE

import pytest
from jobs import job_of

from distplat.actors.role_output import _RoleFile
from distplat.cli.report import write_new
from distplat.platform.checkpoints import FOLDER, Catalogue
from distplat.platform.progress import StepSummary
from distplat.platform.remote_storage import RemoteStorage
from distplat.platform.run_directory import RunDirectory
from distplat.platform.run_upload import RunUpload

UMASKS = [0o022, 0o002, 0o077, 0]


@contextmanager
def umask(mask: int) -> Iterator[None]:
    previous = os.umask(mask)
    try:
        yield
    finally:
        os.umask(previous)


def modes(folder: Path, *, of_folders: bool) -> set[str]:
    paths = [folder, *folder.rglob("*")]
    return {oct(S_IMODE(path.stat().st_mode)) for path in paths if path.is_dir() is of_folders}


def write_run(base: Path) -> Path:
    """Write the files of a run into its directory, and return the directory."""
    directory = RunDirectory(job_of({"name": "ring"}, storage_path="some/runs"), "kept-1", base)
    step = StepSummary(0, 0, 1.0, 64, {"data": 0.25})
    directory.record(step)
    directory.draw(step)
    directory.save_model(b"model")
    catalogue = Catalogue(directory.path / FOLDER)
    catalogue.write(1, {"model.safetensors": [b"model"]}, {})
    log = _RoleFile(directory.path / "logs" / "worker-0.log", None)
    log.write("a line\n")
    log.close()
    directory.finish("SUCCEEDED", {})
    write_new(directory.path / "report.html", "page")
    return directory.path


@pytest.mark.parametrize("mask", UMASKS)
def test_others_cannot_read_a_run_or_its_copy(mask: int, tmp_path: Path) -> None:
    with umask(mask):
        run = write_run(tmp_path)
        storage = RemoteStorage(f"file://{tmp_path}/there/{run.name}", 240.0)
        assert RunUpload(run, storage, list[str]().append).close() == ""
    copy = tmp_path / "there" / run.name
    assert {path.name for path in copy.rglob("*")} == {path.name for path in run.rglob("*")}
    for folder in (run, copy):
        assert modes(folder, of_folders=True) == {oct(0o770 & ~mask)}
        assert modes(folder, of_folders=False) == {oct(0o660 & ~mask)}
    for parent in (run.parent, copy.parent):
        assert S_IMODE(parent.stat().st_mode) == 0o777 & ~mask
