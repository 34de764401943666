"""The recommendation example: its clicks, its figures, and a small run without Ray."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from distplat import Trainer, load_job

FOLDER = Path(__file__).parents[2] / "examples" / "recsys"


@pytest.fixture
def recsys(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module("recsys")


def test_the_clicks_are_the_same_every_time_and_cover_the_ids(recsys: Any) -> None:
    ids, features, targets = recsys.make_clicks(20_000, seed=1)
    again = recsys.make_clicks(20_000, seed=1)
    assert all(map(torch.equal, (ids, features, targets), again))
    assert ids.min() >= 0
    assert ids[:, 0].max() > 0.9 * recsys.USERS and ids[:, 0].max() < recsys.USERS
    assert ids[:, 1].max() > 0.9 * recsys.ITEMS and ids[:, 1].max() < recsys.ITEMS
    popular = (ids[:, 0] < 0.5**recsys.HEAD * recsys.USERS).double().mean()
    assert 0.48 < popular < 0.52
    assert 0.3 < targets[:, 0].mean() < 0.5


def test_the_curve_of_known_scores(recsys: Any) -> None:
    clicks = torch.tensor([0.0, 1.0, 0.0, 1.0, 1.0])
    scores = torch.tensor([0.1, 0.4, 0.5, 0.6, 0.7])
    assert recsys.area_under_curve(scores, clicks) == pytest.approx(5 / 6)
    assert recsys.area_under_curve(-scores, clicks) == pytest.approx(1 / 6)
    assert recsys.area_under_curve(scores, torch.ones(5)) == 0.5


def test_ids_tell_more_than_features(recsys: Any) -> None:
    *_, targets = recsys.make_clicks(40_000, seed=2)
    figures = recsys.Clicks().metrics(targets[:, 2], targets)
    assert figures["auc"] == figures["auc_best_of_all"] > 0.85
    assert 0.6 < figures["auc_best_without_ids"] < 0.64


@pytest.mark.parametrize("ids", [True, False])
def test_a_small_run(ids: bool, tmp_path: Path) -> None:
    overrides = ["scaling.num_workers=0", "task_args.samples=9000", f"storage_path={tmp_path}"]
    if not ids:
        overrides += ["embeddings=null", "task_args.ids=false"]
    result = Trainer(load_job(FOLDER / "job.yaml", overrides=overrides), working_dir=FOLDER).fit()
    assert len(result.history) == 3
    assert {"eval_auc", "eval_auc_best_without_ids"} <= set(result.metrics)
    assert (result.path / "embeddings.json").exists() == ids
    if ids:
        tables = json.loads((result.path / "embeddings.json").read_text())["tables"]
        assert [table["name"] for table in tables] == ["users", "items"]
