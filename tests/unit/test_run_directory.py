"""The run directory: readable files, and errors of writes."""

import errno
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import job_of
from safetensors.torch import load_file, save
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from distplat.actors.training import saved_model
from distplat.platform.disk import RecordFile
from distplat.platform.errors import StorageError
from distplat.platform.job_file import read_job
from distplat.platform.pipeline_trace import Trace
from distplat.platform.progress import EvalSummary, StepSummary
from distplat.platform.run_directory import RunDirectory, new_run_name

JOB = job_of(
    {"name": "ring", "timeout_s": 5},
    name="kept",
    task="model:Digits",
    optimizer={"name": "AdamW", "lr": 0.1},
    steps=10,
    global_batch_size=64,
    storage_path="some/runs",
)
STEPS = [
    StepSummary(
        s,
        s // 2,
        1.0 / (s + 1),
        64,
        {"data": 0.25, "compute": 0.5},
        of=3,
        figures={"sent_bytes": 8.0},
    )
    for s in range(3)
]
EVALUATION = EvalSummary(3, 100, {"loss": 0.5, "accuracy": 0.75})


def bytes_of(value: torch.Tensor) -> list[int]:
    return value.contiguous().reshape(-1).view(torch.uint8).tolist()


def make(base: Path) -> RunDirectory:
    return RunDirectory(JOB, "kept-1", base)


def lines(directory: RunDirectory) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory.path / "metrics.jsonl").open()]


def test_run_names_are_random() -> None:
    names = {new_run_name(JOB.name) for _ in range(20)}
    assert len(names) > 15  # 4 hex digits: some of 20 may be equal
    assert all(re.fullmatch(r"kept-\d{8}-\d{6}-[0-9a-f]{4}", name) for name in names)


def test_files_of_a_finished_run(tmp_path: Path) -> None:
    directory = make(tmp_path)
    assert directory.path == tmp_path.resolve() / "some/runs/kept-1"
    directory.record(STEPS[0])
    directory.draw(STEPS[0])
    directory.save_model(b"what the worker sent")
    directory.finish("SUCCEEDED", {"metrics": {"loss": 0.5}, "seconds": 3.0})
    names = sorted(path.name for path in directory.path.iterdir())
    assert names == ["job.yaml", "metrics.jsonl", "model.safetensors", "result.json", "tensorboard"]
    assert directory.path.stat().st_mode & 0o007 == 0
    assert json.loads((directory.path / "result.json").read_text()) == {
        "status": "SUCCEEDED",
        "metrics": {"loss": 0.5},
        "seconds": 3.0,
    }


def test_job_file_round_trip(tmp_path: Path) -> None:
    assert read_job(make(tmp_path).path / "job.yaml") == JOB


def test_metrics_are_written_at_once(tmp_path: Path) -> None:
    directory = make(tmp_path)
    for number, summary in enumerate(STEPS):
        directory.record(summary)
        assert len(lines(directory)) == number + 1
    directory.record(EVALUATION)
    assert lines(directory)[1:] == [
        {
            "kind": "step",
            "step": 1,
            "epoch": 0,
            "loss": 0.5,
            "samples": 64,
            "seconds": {"data": 0.25, "compute": 0.5},
            "of": 3,
            "figures": {"sent_bytes": 8.0},
        },
        {
            "kind": "step",
            "step": 2,
            "epoch": 1,
            "loss": 1 / 3,
            "samples": 64,
            "seconds": {"data": 0.25, "compute": 0.5},
            "of": 3,
            "figures": {"sent_bytes": 8.0},
        },
        {
            "kind": "evaluation",
            "step": 3,
            "samples": 100,
            "metrics": {"loss": 0.5, "accuracy": 0.75},
        },
    ]


def test_tensorboard_has_the_curves(tmp_path: Path) -> None:
    directory = make(tmp_path)
    for summary in STEPS:
        directory.draw(summary)
    directory.draw(EVALUATION)
    directory.draw(Trace(0, 1, "1f1b", 1, ()))
    directory.finish("SUCCEEDED", {})
    board = EventAccumulator(str(directory.path / "tensorboard"))
    board.Reload()
    curves = {
        tag: [(point.step, point.value) for point in board.Scalars(tag)]
        for tag in board.Tags()["scalars"]
    }
    assert curves == {
        "train/loss": [(0, 1.0), (1, 0.5), (2, pytest.approx(1 / 3))],
        "train/samples": [(0, 64.0), (1, 64.0), (2, 64.0)],
        "seconds/data": [(0, 0.25), (1, 0.25), (2, 0.25)],
        "seconds/compute": [(0, 0.5), (1, 0.5), (2, 0.5)],
        "figures/sent_bytes": [(0, 8.0), (1, 8.0), (2, 8.0)],
        "eval/loss": [(3, 0.5)],
        "eval/accuracy": [(3, 0.75)],
    }


@pytest.mark.parametrize(
    "value",
    [
        torch.randn(3, 4, generator=torch.Generator().manual_seed(1)),
        torch.tensor([float("nan"), float("inf"), -0.0]),
        torch.tensor(7),
        torch.tensor(0.1, dtype=torch.float64),
        torch.randn(3, 4).t(),
        torch.zeros(0, 5),
        torch.tensor([True, False]),
        torch.randn(5).half(),
        torch.randn(5).bfloat16(),
        torch.ones(3, dtype=torch.uint8).view(torch.float8_e8m0fnu),
    ],
    ids=[
        *("matrix", "nan", "0-d", "0-d-double", "transposed", "empty", "bool", "half", "bfloat16"),
        "scales",
    ],
)
def test_saved_model_is_bit_identical(value: torch.Tensor, tmp_path: Path) -> None:
    model = torch.nn.Module()
    model.register_buffer("first", value)
    model.register_buffer("tied", value)
    content = saved_model(model.state_dict())
    assert content == save({name: value.clone().contiguous() for name in ("first", "tied")})
    path = make(tmp_path).save_model(content)
    read = load_file(path)
    assert sorted(read) == ["first", "tied"]
    for found in read.values():
        assert (found.shape, found.dtype) == (value.shape, value.dtype)
        assert bytes_of(found) == bytes_of(value)
    assert not list(path.parent.glob("*.partial"))


def test_non_finite_loss_is_null(tmp_path: Path) -> None:
    directory = make(tmp_path)
    directory.record(StepSummary(0, 0, float("nan"), 8, {"data": float("inf")}))
    line = (directory.path / "metrics.jsonl").read_text()
    assert "NaN" not in line
    assert (json.loads(line)["loss"], json.loads(line)["seconds"]) == (None, {"data": None})


def test_result_of_a_failed_run_has_the_error(tmp_path: Path) -> None:
    directory = make(tmp_path)
    directory.finish("FAILED", {"error": "worker-1 was lost: killed"})
    result = json.loads((directory.path / "result.json").read_text())
    assert result == {"status": "FAILED", "error": "worker-1 was lost: killed"}
    assert not (directory.path / "tensorboard").exists()


def test_existing_run_directory_is_rejected(tmp_path: Path) -> None:
    make(tmp_path)
    with pytest.raises(StorageError, match=r"cannot make the run directory .*kept-1"):
        make(tmp_path)


def test_directory_that_cannot_be_created_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "some").write_text("a file at this path stops root too, permissions do not")
    with pytest.raises(StorageError, match=r"cannot make the run directory .*some/runs/kept-1"):
        make(tmp_path)


def fill_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make each write store a part and then fail, as on a full disk."""
    original = os.write

    def write(file: int, data: bytes) -> int:
        if len(data) > 8:
            return original(file, bytes(data[: len(data) // 2]))
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def fsync(file: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", write)
    monkeypatch.setattr(os, "fsync", fsync)


@pytest.mark.parametrize(
    ("write", "name"),
    [
        (lambda directory: directory.record(STEPS[1]), "metrics.jsonl"),
        (lambda directory: directory.save_model(b"x" * 100), "model.safetensors"),
        (lambda directory: directory.keep("apply_log.safetensors", b"x" * 100), "apply_log"),
        (lambda directory: directory.record(Trace(0, 1, "1f1b", 1, ())), "pipeline_trace.json"),
        (lambda directory: directory.finish("SUCCEEDED", {}), "result.json"),
    ],
    ids=["metrics", "model", "log", "trace", "result"],
)
def test_full_disk_is_reported_and_leaves_no_partial_file(
    write: Callable[[RunDirectory], None],
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    directory = make(tmp_path)
    directory.record(STEPS[0])
    before = {path.name: path.stat().st_size for path in directory.path.iterdir()}
    fill_the_disk(monkeypatch)
    message = (
        rf"cannot write .*kept-1/{name}.*No space left on device; free some space, or set `storage_"
    )
    with pytest.raises(StorageError, match=message) as caught:
        write(directory)
    assert caught.value.exit_code == 5
    assert {path.name: path.stat().st_size for path in directory.path.iterdir()} == before
    assert [line["step"] for line in lines(directory)] == [0]


def test_full_disk_for_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = make(tmp_path)
    with monkeypatch.context() as patch:
        fill_the_disk(patch)
        with pytest.raises(StorageError, match=r"cannot write .*kept-1/tensorboard: No space left"):
            directory.draw(STEPS[0])
    directory.draw(STEPS[0])
    (events,) = (directory.path / "tensorboard").iterdir()
    size = events.stat().st_size
    with monkeypatch.context() as patch:
        fill_the_disk(patch)
        with pytest.raises(StorageError, match=r"cannot write .*kept-1/tensorboard: No space left"):
            directory.draw(STEPS[1])
    assert events.stat().st_size == size, "no partial event is left"
    directory.draw(STEPS[2])
    assert events.stat().st_size > size, "the disk has space again"
    directory.finish("FAILED", {})


def test_model_is_saved_if_the_disk_is_full_for_the_ema(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full after the model is written."""
    tensors = {"w": torch.ones(2), "ema:w": torch.zeros(2)}
    directory, saved = make(tmp_path), list[Path]()

    def save_then_fill(name: str, data: bytes) -> None:
        saved.append(directory.keep(name, data))
        fill_the_disk(monkeypatch)

    with pytest.raises(StorageError, match=r"model_ema\.safetensors.*No space left"):
        directory.save_model(saved_model(tensors), save_then_fill)
    monkeypatch.undo()
    assert load_file(saved[0])["w"].tolist() == [1.0, 1.0]


def test_full_disk_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill_the_disk(monkeypatch)
    with pytest.raises(StorageError, match=r"cannot make the run directory .*No space left"):
        make(tmp_path)
    assert not list((tmp_path / "some/runs/kept-1").iterdir())


@pytest.mark.parametrize(
    "write",
    [
        lambda directory: directory.save_model(b""),
        lambda directory: directory.finish("FAILED", {}),
    ],
    ids=["save_model", "finish"],
)
def test_removed_directory_is_reported(
    write: Callable[[RunDirectory], None], tmp_path: Path
) -> None:
    directory = make(tmp_path)
    shutil.rmtree(directory.path)
    with pytest.raises(StorageError, match=r"cannot write .*kept-1.*No such file"):
        write(directory)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a separate file system of 512 KiB."""
    command = ["mount", "-t", "tmpfs", "-o", "size=512k", "none", str(tmp_path)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("only root mounts a disk")
    yield tmp_path
    subprocess.run(["umount", "--lazy", str(tmp_path)], check=True)


def test_result_is_written_on_a_full_disk(small_disk: Path) -> None:
    directory = make(small_disk)
    step = StepSummary(1, 0, 1.0, 64, {f"part {number}": 0.25 for number in range(400)})
    with pytest.raises(StorageError, match="No space left on device; free some"):
        for _ in range(1000):
            directory.record(step)
    with pytest.raises(StorageError, match="No space left"):
        directory.save_model(b"x" * 2**20)
    with (
        pytest.raises(OSError, match="No space left"),
        (small_disk / "another's").open("wb", 0) as f,
    ):
        while True:
            f.write(b"x" * 512)
    directory.finish("FAILED", {"error": "the disk is full"})
    assert json.loads((directory.path / "result.json").read_text())["error"] == "the disk is full"
    assert len(lines(directory)) > 1
    assert not list(small_disk.rglob("*.partial"))


def test_result_is_written_if_a_file_cannot_be_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = make(tmp_path)
    directory.record(STEPS[0])

    def fail(self: RecordFile) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(RecordFile, "close", fail)
    directory.finish("FAILED", {"error": "lost"})
    assert json.loads((directory.path / "result.json").read_text())["status"] == "FAILED"
