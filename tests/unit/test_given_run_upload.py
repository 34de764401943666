"""`distplat upload` of a run that somebody gave the user: it sends files of that run, no others."""

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
def given(tmp_path: Path) -> Path:
    """Give a run with two checkpoints; what it is to lead to is in `mine` beside it."""
    folder = tmp_path / "given"
    folder.mkdir()
    for step in (1, 2):
        Catalogue(folder / FOLDER).write(step, {"model.safetensors": [b"model" * step]}, {})
    (tmp_path / "mine").write_bytes(KEY)
    return folder


def bring(folder: Path) -> set[str]:
    """Bring all checkpoints of a run; give the names of what is there then."""
    there = folder.parent / "there"
    uploads = _CheckpointUploads(folder / FOLDER, RemoteStorage(f"file://{there}", 240.0))
    try:
        for _ in uploads.missing():
            uploads.upload_newest()
    finally:
        files = [path for path in there.rglob("*") if path.is_file()]
        assert not any(KEY in path.read_bytes() for path in files)
    return {str(path.relative_to(there / FOLDER)) for path in files}


def brought(*steps: int) -> set[str]:
    names = ("model.safetensors", STATE, MANIFEST)
    return {f"step-00000{step}/{name}" for step in steps for name in names}


def test_what_the_manifest_does_not_list_stays(given: Path) -> None:
    (given / FOLDER / "step-000001" / "notes.json").write_bytes(KEY)
    assert bring(given) == brought(1, 2)


@pytest.mark.parametrize("kind", ["a link", "a pipe", "nothing"])
def test_what_is_no_file_of_the_run_is_not_read(kind: str, given: Path) -> None:
    """Nor does it keep the other checkpoint from its URL."""
    state = given / FOLDER / "step-000002" / STATE
    state.unlink()
    if kind == "a link":
        state.symlink_to(given.parent / "mine")
    elif kind == "a pipe":
        os.mkfifo(state)
    why = {"a link": "it is a link", "a pipe": "not a regular file", "nothing": "No such file"}
    with pytest.raises(StorageError, match=f"step-000002/{STATE}.*{why[kind]}"):
        bring(given)
    there = given.parent / "there" / FOLDER
    assert sorted(path.name for path in there.iterdir()) == ["step-000001"]


@pytest.mark.parametrize("name", [FOLDER, f"{FOLDER}/step-000001"])
def test_a_folder_behind_a_link_is_not_read(name: str, given: Path) -> None:
    """Another run of the user's may lie there."""
    mine = given.parent / "elsewhere"
    (given / name).rename(mine)
    (given / name).symlink_to(mine)
    with pytest.raises(StorageError, match=f"{name}: it is a link"):
        bring(given)


def test_a_damaged_manifest_keeps_no_other_checkpoint_away(given: Path) -> None:
    (given / FOLDER / "step-000002" / MANIFEST).write_text("{}")
    with pytest.raises(StorageError, match="is damaged"):
        bring(given)
    assert (given.parent / "there" / FOLDER / "step-000001" / MANIFEST).is_file()


READ_GIVEN_RUNS = (
    *("platform/run_upload.py", "platform/run_record.py", "platform/checkpoints.py"),
    *("platform/trackers.py", "platform/apply_log.py", "cli/run_folders.py"),
    "strategies/sparse/files.py",
)


@pytest.mark.parametrize("module", READ_GIVEN_RUNS)
def test_files_of_given_runs_are_opened_by_what_refuses_links(module: str) -> None:
    """They follow no link and wait for no pipe; safetensors' readers are preceded by such a one."""
    tree = ast.parse((ROOT / module).read_text())
    called = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    names = {name.rpartition(".")[2] for name in called}
    assert not names & {"open", "read_text", "read_bytes"}
    guards = {"check_whole_file"} if names & {"load_file", "safe_open"} else set[str]()
    assert names & {"open_regular", "regular_file", *guards} and guards <= names
