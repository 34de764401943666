"""Complete runs that save checkpoints and resume from them."""

import logging
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from damage import corrupt
from jobs import fields_of

from distplat import Result, Trainer
from distplat.cli.main import run as command
from distplat.platform.errors import SpecError, StorageError
from distplat.platform.run_directory import CURVES

CLUSTER_TESTS = Path(__file__).parents[1] / "cluster"


def spec(storage: Path, **more: Any) -> dict[str, Any]:
    fields = {
        "task": "tasks_for_tests:Blobs",
        "optimizer": {"name": "AdamW", "lr": 0.1},
        "global_batch_size": 8,
        "epochs": 4,
        "checkpoint": {"every_epochs": 1},
        "storage_path": str(storage),
    }
    return fields_of(workers=0, **{**fields, **more})


def fit(storage: Path, resume: Path | None = None, **more: Any) -> Result:
    return Trainer(spec(storage, **more), working_dir=CLUSTER_TESTS, resume=resume).fit()


def bits(result: Result) -> bytes:
    assert result.checkpoint is not None
    return result.checkpoint.read_bytes()


@pytest.mark.parametrize("strategy", ["ring", {"name": "ps-sync", "num_servers": 2}])
def test_local_run_resumes(strategy: object, tmp_path: Path) -> None:
    first = fit(tmp_path, strategy=strategy)
    assert [saved.step for saved in first.checkpoints][-2:] == [15, 20]
    metrics = (first.path / "metrics.jsonl").read_text()
    assert metrics.count('"kind": "checkpoint"') == len(first.checkpoints)
    resumed = fit(tmp_path, first.path / "checkpoints" / "step-000015", strategy=strategy)
    assert bits(resumed) == bits(first)
    assert [s.step for s in resumed.history] == list(range(16, 21))
    longer = fit(tmp_path, first.path, epochs=5, strategy=strategy)
    assert [s.step for s in longer.history] == list(range(21, 26))


@pytest.mark.parametrize("strategy", ["ring", {"name": "ps-sync", "num_servers": 2}, "ps-async"])
def test_run_leaves_no_thread(strategy: object, tmp_path: Path) -> None:
    """A notebook or a search for hyperparameters makes many runs in one process."""
    before = {*threading.enumerate()}
    fit(tmp_path, strategy=strategy)
    deadline = time.monotonic() + 30
    while left := {thread for thread in {*threading.enumerate()} - before if is_of_run(thread)}:
        assert time.monotonic() < deadline, left
        time.sleep(0.01)


def is_of_run(thread: threading.Thread) -> bool:
    """Return whether a new thread is the driver's; threads of other tests may still start more."""
    return thread.name in ("metrics", CURVES, "checkpoints", "callbacks")


def test_damaged_checkpoint_falls_back_to_the_previous_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    first = fit(tmp_path)
    folder = first.path / "checkpoints"
    corrupt(folder / "step-000020")
    resumed = fit(tmp_path, first.path)
    assert "step-000020/model.safetensors: SHA-256 is" in caplog.text
    assert "taking the one before" in caplog.text
    assert bits(resumed) == bits(first)
    corrupt(folder / "step-000015")
    with pytest.raises(StorageError, match="all 2 checkpoints are damaged"):
        fit(tmp_path, first.path)


def test_rejects_invalid_resume_before_the_start(tmp_path: Path) -> None:
    first = fit(tmp_path)
    with pytest.raises(SpecError, match="the checkpoint was made with 'AdamW'"):
        fit(tmp_path, first.path, epochs=9, optimizer={"name": "SGD", "lr": 0.1})
    with pytest.raises(SpecError, match=r"model\.safetensors is the trained .* raise `epochs`"):
        fit(tmp_path, first.path)
    with pytest.raises(SpecError, match="no checkpoint in"):
        fit(tmp_path, tmp_path)
    assert len(list(tmp_path.iterdir())) == 1, "no run directory was created"


def test_cli_resume(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = fit(tmp_path)
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "job.yaml"
    import yaml

    file.write_text(yaml.safe_dump(spec(tmp_path, epochs=5)))
    args = ["submit", str(file), "--working-dir", str(CLUSTER_TESTS), "--resume"]
    assert command([*args, first.path.name, "--dry-run"]) == 0
    assert "would resume after step 20" in capfd.readouterr().err
    assert command([*args, first.path.name]) == 0
    output = capfd.readouterr().out
    assert "checkpoints    1 written, the last of step 25, in" in output
    assert command([*args, "nowhere"]) == 2
    assert "--resume: there is no directory" in capfd.readouterr().err
    for checkpoint in (first.path / "checkpoints").iterdir():
        corrupt(checkpoint)
    assert command([*args, first.path.name]) == 5
