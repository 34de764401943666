"""Who may read what a run leaves: the group as the umask says, others of the machine never."""

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
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def modes(folder: Path, *, of_folders: bool) -> set[str]:
    paths = [folder, *folder.rglob("*")]
    return {oct(S_IMODE(path.stat().st_mode)) for path in paths if path.is_dir() is of_folders}


def leave_run(base: Path) -> Path:
    """Write what a run writes into its directory, and give that."""
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
def test_others_may_read_nothing_of_a_run_or_its_copy(mask: int, tmp_path: Path) -> None:
    with umask(mask):
        run = leave_run(tmp_path)
        storage = RemoteStorage(f"file://{tmp_path}/there/{run.name}", 240.0)
        assert RunUpload(run, storage, list[str]().append).close() == ""
    copy = tmp_path / "there" / run.name
    assert {path.name for path in copy.rglob("*")} == {path.name for path in run.rglob("*")}
    for folder in (run, copy):
        assert modes(folder, of_folders=True) == {oct(0o770 & ~mask)}
        assert modes(folder, of_folders=False) == {oct(0o660 & ~mask)}
    for above in (run.parent, copy.parent):
        assert S_IMODE(above.stat().st_mode) == 0o777 & ~mask
