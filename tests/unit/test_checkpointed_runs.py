"""Whole runs that keep checkpoints and go on from them."""

import logging
from pathlib import Path
from typing import Any

import pytest
from damage import corrupt
from jobs import fields_of

from distplat import Result, Trainer
from distplat.cli.main import run as command
from distplat.platform.errors import SpecError, StorageError

HERE = Path(__file__).parents[1] / "cluster"


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
    return Trainer(spec(storage, **more), working_dir=HERE, resume=resume).fit()


def bits(result: Result) -> bytes:
    assert result.checkpoint is not None
    return result.checkpoint.read_bytes()


@pytest.mark.parametrize("strategy", ["ring", {"name": "ps-sync", "num_servers": 2}])
def test_a_run_in_this_process_goes_on(strategy: object, tmp_path: Path) -> None:
    whole = fit(tmp_path, strategy=strategy)
    assert [saved.step for saved in whole.checkpoints][-2:] == [15, 20]
    kinds = (whole.path / "metrics.jsonl").read_text()
    assert kinds.count('"kind": "checkpoint"') == len(whole.checkpoints)
    resumed = fit(tmp_path, whole.path / "checkpoints" / "step-000015", strategy=strategy)
    assert bits(resumed) == bits(whole)
    assert [s.step for s in resumed.history] == list(range(16, 21))
    longer = fit(tmp_path, whole.path, epochs=5, strategy=strategy)
    assert [s.step for s in longer.history] == list(range(21, 26))


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    whole = fit(tmp_path)
    folder = whole.path / "checkpoints"
    corrupt(folder / "step-000020")
    resumed = fit(tmp_path, whole.path)
    assert "step-000020/model.safetensors: SHA-256 is" in caplog.text
    assert "taking the one before" in caplog.text
    assert bits(resumed) == bits(whole)
    corrupt(folder / "step-000015")
    with pytest.raises(StorageError, match="all 2 checkpoints are damaged"):
        fit(tmp_path, whole.path)


def test_what_cannot_go_on_is_told_before_anything_starts(tmp_path: Path) -> None:
    whole = fit(tmp_path)
    with pytest.raises(SpecError, match="the checkpoint was made with 'AdamW'"):
        fit(tmp_path, whole.path, epochs=9, optimizer={"name": "SGD", "lr": 0.1})
    with pytest.raises(SpecError, match=r"model\.safetensors is the trained .* raise `epochs`"):
        fit(tmp_path, whole.path)
    with pytest.raises(SpecError, match="no checkpoint in"):
        fit(tmp_path, tmp_path)
    assert len(list(tmp_path.iterdir())) == 1, "no run directory was made"


def test_the_command_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = fit(tmp_path)
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "job.yaml"
    import yaml

    file.write_text(yaml.safe_dump(spec(tmp_path, epochs=5)))
    line = ["submit", str(file), "--working-dir", str(HERE), "--resume"]
    assert command([*line, whole.path.name, "--dry-run"]) == 0
    assert "would resume after step 20" in capfd.readouterr().err
    assert command([*line, whole.path.name]) == 0
    told = capfd.readouterr().out
    assert "checkpoints    1 written, the last of step 25, in" in told
    assert command([*line, "nowhere"]) == 2
    assert "--resume: there is no directory" in capfd.readouterr().err
    for checkpoint in (whole.path / "checkpoints").iterdir():
        corrupt(checkpoint)
    assert command([*line, whole.path.name]) == 5
