"""Checkpoints from directories: files round-trip; paths outside are rejected."""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from function_ranks import call_on_ranks
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import distplat
from distplat import Checkpoint
from distplat.platform.errors import SpecError
from distplat.strategies.state_tree import pack, unpack

FILES = {"model.pt": b"\x00\xff" * 700, "tokenizer/vocab.txt": b"a b c", "tokenizer/empty": b""}


def folder_of(path: Path, files: Mapping[str, bytes] = FILES) -> Path:
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


def contents(folder: str | Path) -> dict[str, bytes]:
    paths = [path for path in Path(folder).rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def test_files_round_trip(tmp_path: Path) -> None:
    checkpoint = Checkpoint.from_directory(folder_of(tmp_path / "source"))
    restored = unpack(*pack({"epoch": 3, "files": checkpoint}))
    assert restored["epoch"] == 3
    with restored["files"].as_directory() as folder:
        assert contents(folder) == FILES
        extracted = Path(folder)
    assert not extracted.exists()
    assert contents(restored["files"].to_directory(tmp_path / "other")) == FILES


@given(st.dictionaries(st.from_regex(r"[a-z]{1,3}", fullmatch=True), st.binary(max_size=9)))
def test_any_bytes_round_trip(files: dict[str, bytes]) -> None:
    tensors = {name: torch.tensor([*content], dtype=torch.uint8) for name, content in files.items()}
    with unpack(*pack(Checkpoint(tensors))).as_directory() as folder:
        assert contents(folder) == files


@pytest.mark.parametrize("name", ["../up", "/etc/passwd", "a/../../up", "", "a\0b"])
def test_names_outside_of_the_directory_are_rejected(name: str) -> None:
    with pytest.raises(SpecError, match="outside of the directory"):
        Checkpoint({name: torch.zeros(1, dtype=torch.uint8)})


def test_from_directory_rejects_paths_without_regular_files(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="no directory"):
        Checkpoint.from_directory(tmp_path / "nowhere")
    with pytest.raises(SpecError, match="has no files"):
        Checkpoint.from_directory(tmp_path)
    (tmp_path / "link").symlink_to("/etc/hostname")
    with pytest.raises(SpecError, match="neither a file nor a directory"):
        Checkpoint.from_directory(tmp_path)


class RayTrainCheckpoint:
    """The interface of `ray.train.Checkpoint`: `as_directory` returns the directory itself."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @contextmanager
    def as_directory(self) -> Iterator[str]:
        yield str(self._folder)


@pytest.mark.parametrize("create", [Checkpoint.from_directory, RayTrainCheckpoint])
def test_train_function_resumes_from_checkpoint_files(
    create: Callable[[Path], Any], tmp_path: Path
) -> None:
    first_epochs: list[int] = []

    def train(config: Mapping[str, Any]) -> None:
        model = nn.Linear(2, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        model, optimizer = distplat.prepare(model, optimizer)
        rank, first = distplat.get_context().get_world_rank(), 0
        if (checkpoint := distplat.get_checkpoint()) is not None:
            with checkpoint.as_directory() as folder:
                state = torch.load(Path(folder) / "state.pt")
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            first = state["epoch"]
        first_epochs.append(first)
        for epoch in range(first, 4):
            model(torch.full((1, 2), epoch + 1.0)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            folder = folder_of(tmp_path / str(rank), {"note": b"of an epoch"})
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save({**state, "epoch": epoch + 1}, folder / "state.pt")
            saved = create(folder)
            distplat.report({"loss": 0.0}, checkpoint=saved if rank == 0 else None)

    whole = call_on_ranks(train, 2)
    resumed = call_on_ranks(train, 2, saved=whole.checkpoints[2])
    assert first_epochs == [0, 0, 2, 2]
    for name, value in whole.trained[0].items():
        assert torch.equal(resumed.trained[0][name], value)


def test_warns_about_files_of_other_ranks(caplog: pytest.LogCaptureFixture) -> None:
    def train(config: Mapping[str, Any]) -> None:
        distplat.prepare(nn.Linear(2, 1))
        rank = distplat.get_context().get_world_rank()
        files = Checkpoint({f"of-{rank}": torch.zeros(3, dtype=torch.uint8)})
        for _ in range(2):
            distplat.report({"loss": 0.0}, checkpoint=files)

    with caplog.at_level(logging.WARNING):
        call_on_ranks(train, 2)
    texts = [r.getMessage() for r in caplog.records if "files" in r.getMessage()]
    assert texts == ["rank 1 reported files (of-1, ...), which are not saved: only rank 0's are"]
