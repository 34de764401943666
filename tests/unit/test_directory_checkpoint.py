"""A directory as a checkpoint: the same files come back, and none outside of it."""

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
    found = [path for path in Path(folder).rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


def test_the_same_files_come_back(tmp_path: Path) -> None:
    checkpoint = Checkpoint.from_directory(folder_of(tmp_path / "given"))
    again = unpack(*pack({"epoch": 3, "files": checkpoint}))
    assert again["epoch"] == 3
    with again["files"].as_directory() as folder:
        assert contents(folder) == FILES
        where = Path(folder)
    assert not where.exists()
    assert contents(again["files"].to_directory(tmp_path / "other")) == FILES


@given(st.dictionaries(st.from_regex(r"[a-z]{1,3}", fullmatch=True), st.binary(max_size=9)))
def test_any_bytes_come_back(files: dict[str, bytes]) -> None:
    tensors = {name: torch.tensor([*held], dtype=torch.uint8) for name, held in files.items()}
    with unpack(*pack(Checkpoint(tensors))).as_directory() as folder:
        assert contents(folder) == files


@pytest.mark.parametrize("name", ["../up", "/etc/passwd", "a/../../up", "", "a\0b"])
def test_a_file_outside_is_refused(name: str) -> None:
    with pytest.raises(SpecError, match="outside of the directory"):
        Checkpoint({name: torch.zeros(1, dtype=torch.uint8)})


def test_what_is_no_directory_of_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="no directory"):
        Checkpoint.from_directory(tmp_path / "nowhere")
    with pytest.raises(SpecError, match="has no files"):
        Checkpoint.from_directory(tmp_path)
    (tmp_path / "link").symlink_to("/etc/hostname")
    with pytest.raises(SpecError, match="neither a file nor a directory"):
        Checkpoint.from_directory(tmp_path)


class OfRayTrain:
    """As `ray.train.Checkpoint`: a directory that stays where it is."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @contextmanager
    def as_directory(self) -> Iterator[str]:
        yield str(self._folder)


@pytest.mark.parametrize("kind", [Checkpoint.from_directory, OfRayTrain])
def test_a_loop_of_ray_train_goes_on_from_its_files(
    kind: Callable[[Path], Any], tmp_path: Path
) -> None:
    began: list[int] = []

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
        began.append(first)
        for epoch in range(first, 4):
            model(torch.full((1, 2), epoch + 1.0)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            folder = folder_of(tmp_path / str(rank), {"note": b"of an epoch"})
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save({**state, "epoch": epoch + 1}, folder / "state.pt")
            saved = kind(folder)
            distplat.report({"loss": 0.0}, checkpoint=saved if rank == 0 else None)

    whole = call_on_ranks(train, 2)
    again = call_on_ranks(train, 2, saved=whole.checkpoints[2])
    assert began == [0, 0, 2, 2]
    for name, value in whole.trained[0].items():
        assert torch.equal(again.trained[0][name], value)


def test_files_of_another_rank_are_said_not_to_be_kept(caplog: pytest.LogCaptureFixture) -> None:
    def train(config: Mapping[str, Any]) -> None:
        distplat.prepare(nn.Linear(2, 1))
        rank = distplat.get_context().get_world_rank()
        files = Checkpoint({f"of-{rank}": torch.zeros(3, dtype=torch.uint8)})
        for _ in range(2):
            distplat.report({"loss": 0.0}, checkpoint=files)

    with caplog.at_level(logging.WARNING):
        call_on_ranks(train, 2)
    texts = [one.getMessage() for one in caplog.records if "files" in one.getMessage()]
    assert texts == ["rank 1 reported files (of-1, ...), which are not saved: only rank 0's are"]
