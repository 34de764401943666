"""The stream example: its rows, its position, and a small run without Ray."""

import importlib
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distplat import Trainer, load_job

FOLDER = Path(__file__).parents[2] / "examples" / "stream"


@pytest.fixture
def rides(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    monkeypatch.syspath_prepend(FOLDER)
    module = importlib.import_module("rides")
    monkeypatch.setattr(module, "FILES", 2)
    monkeypatch.setattr(module, "GROUP", 40)
    module.write(tmp_path / "data", rows=100)
    return module


def test_stream_resumes_at_any_position(rides: Any, tmp_path: Path) -> None:
    data = rides.Rides(str(tmp_path / "data")).train_data()
    rows = list(data)
    assert len(rows) == 200 and list(data) == rows
    for position in (0, 1, 39, 40, 99, 100, 163, 199, 200):
        iterator = iter(data)
        assert list(islice(iterator, position)) == rows[:position]
        state = data.state_dict() if position else {"next": [0, 0, 0]}
        other = rides.Rides(str(tmp_path / "data")).train_data()
        other.load_state_dict(state)
        assert list(other) == rows[position:], position
        assert list(other) == rows, "the next epoch starts with the first row"


def test_rates_depend_on_the_weekday(rides: Any) -> None:
    monday_8, sunday_8 = 4 * 24 + 8, 3 * 24 + 8  # 1970 began on a Thursday
    monday, sunday = rides.rates(np.array(4), np.array([monday_8, sunday_8]), np.array(15.0))
    assert monday > 5 * sunday


def test_small_run_approaches_the_best_loss(rides: Any, tmp_path: Path) -> None:
    rides.write(tmp_path / "more", rows=1500)
    overrides = [
        *("scaling.num_workers=0", "steps=150", "global_batch_size=64", "data.num_workers=0"),
        *("evaluation.every_steps=null", "checkpoint.every_steps=null"),
        *(f"storage_path={tmp_path}", f"task_args.folder={tmp_path / 'more'}"),
    ]
    result = Trainer(load_job(FOLDER / "job.yaml", overrides=overrides), working_dir=FOLDER).fit()
    figures = result.metrics
    assert figures["eval_best_loss"] < figures["eval_loss"] < figures["eval_best_loss"] + 0.5
    assert torch.isfinite(torch.tensor(figures["eval_loss"]))


def test_row_has_the_rate_of_its_time(rides: Any, tmp_path: Path) -> None:
    for row in islice(rides.Rides(str(tmp_path / "data")).train_data(), 50):
        time = np.array([row["time"]], "datetime64[h]").astype(np.int64)
        noisy = rides.rates(np.array([row["station"]]), time, np.array([row["celsius"]]))
        assert noisy[0] == pytest.approx(row["rate"], rel=0.01), "celsius is rounded"
