"""`distplat upload` of a foreign run directory sends only files of that run."""

import ast
import os
from pathlib import Path

import pytest

from distplat.platform.checkpoints import FOLDER, MANIFEST, STATE, Catalogue
from distplat.platform.errors import StorageError
from distplat.platform.remote_storage import RemoteStorage
from distplat.platform.run_upload import _CheckpointUploads

ROOT = Path(__file__).parents[2]
KEY = b"precious"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with two checkpoints, beside a private file `mine`."""
    folder = tmp_path / "run"
    folder.mkdir()
    for step in (1, 2):
        Catalogue(folder / FOLDER).write(step, {"model.safetensors": [b"model" * step]}, {})
    (tmp_path / "mine").write_bytes(KEY)
    return folder


def upload(folder: Path) -> set[str]:
    """Upload all checkpoints of a run; return the names of the uploaded files."""
    target = folder.parent / "target"
    uploads = _CheckpointUploads(folder / FOLDER, RemoteStorage(f"file://{target}", 240.0))
    try:
        for _ in uploads.missing():
            uploads.upload_newest()
    finally:
        files = [path for path in target.rglob("*") if path.is_file()]
        assert not any(KEY in path.read_bytes() for path in files)
    return {str(path.relative_to(target / FOLDER)) for path in files}


def uploaded_names(*steps: int) -> set[str]:
    names = ("model.safetensors", STATE, MANIFEST)
    return {f"step-00000{step}/{name}" for step in steps for name in names}


def test_files_outside_of_the_manifest_are_not_uploaded(run: Path) -> None:
    (run / FOLDER / "step-000001" / "notes.json").write_bytes(KEY)
    assert upload(run) == uploaded_names(1, 2)


@pytest.mark.parametrize("replacement", ["a link", "a pipe", "nothing"])
def test_links_and_pipes_are_not_read(replacement: str, run: Path) -> None:
    """The other checkpoint is still uploaded."""
    state = run / FOLDER / "step-000002" / STATE
    state.unlink()
    if replacement == "a link":
        state.symlink_to(run.parent / "mine")
    elif replacement == "a pipe":
        os.mkfifo(state)
    reasons = {"a link": "it is a link", "a pipe": "not a regular file", "nothing": "No such file"}
    with pytest.raises(StorageError, match=f"step-000002/{STATE}.*{reasons[replacement]}"):
        upload(run)
    target = run.parent / "target" / FOLDER
    assert sorted(path.name for path in target.iterdir()) == ["step-000001"]


@pytest.mark.parametrize("name", [FOLDER, f"{FOLDER}/step-000001"])
def test_linked_folder_is_not_read(name: str, run: Path) -> None:
    """The link may lead to another run of the user."""
    elsewhere = run.parent / "elsewhere"
    (run / name).rename(elsewhere)
    (run / name).symlink_to(elsewhere)
    with pytest.raises(StorageError, match=f"{name}: it is a link"):
        upload(run)


def test_damaged_manifest_does_not_affect_other_checkpoints(run: Path) -> None:
    (run / FOLDER / "step-000002" / MANIFEST).write_text("{}")
    with pytest.raises(StorageError, match="is damaged"):
        upload(run)
    assert (run.parent / "target" / FOLDER / "step-000001" / MANIFEST).is_file()


READERS_OF_FOREIGN_RUNS = (
    *("platform/run_upload.py", "platform/run_record.py", "platform/checkpoints.py"),
    *("platform/trackers.py", "platform/apply_log.py", "cli/run_folders.py"),
    "strategies/sparse/files.py",
)


@pytest.mark.parametrize("module", READERS_OF_FOREIGN_RUNS)
def test_readers_of_foreign_runs_reject_links(module: str) -> None:
    """`open_regular` rejects links and pipes; `check_whole_file` does so for safetensors."""
    tree = ast.parse((ROOT / module).read_text())
    calls = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    names = {name.rpartition(".")[2] for name in calls}
    assert not names & {"open", "read_text", "read_bytes"}
    guards = {"check_whole_file"} if names & {"load_file", "safe_open"} else set[str]()
    assert names & {"open_regular", "regular_file", *guards} and guards <= names
