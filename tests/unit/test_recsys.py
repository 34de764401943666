"""The recommendation example: synthetic clicks, metrics, and small runs without Ray."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import job_of
from local_run import evaluations, train
from torch.utils.data import Subset

from distplat import Trainer, load_job

FOLDER = Path(__file__).parents[2] / "examples" / "recsys"


@pytest.fixture
def recsys(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module("recsys")


def test_clicks_are_deterministic_and_cover_the_ids(recsys: Any) -> None:
    ids, features, targets = recsys.make_clicks(20_000, seed=1)
    repeated = recsys.make_clicks(20_000, seed=1)
    assert all(map(torch.equal, (ids, features, targets), repeated))
    assert ids.min() >= 0
    for column, count in zip(ids.unbind(1), recsys.TABLES.values(), strict=True):
        assert 0.9 * count < column.max() < count
    popular = (ids[:, 0] < 0.5**recsys.HEAD * recsys.TABLES["user"]).double().mean()
    assert 0.48 < popular < 0.52
    assert 0.3 < targets[:, 0].mean() < 0.5
    category_of = dict(ids[:, 1:].tolist())
    assert all(category_of[item] == category for item, category in ids[:, 1:].tolist())


def test_area_under_curve_of_known_scores(recsys: Any) -> None:
    clicks = torch.tensor([0.0, 1.0, 0.0, 1.0, 1.0])
    scores = torch.tensor([0.1, 0.4, 0.5, 0.6, 0.7])
    assert recsys.area_under_curve(scores, clicks) == pytest.approx(5 / 6)
    assert recsys.area_under_curve(-scores, clicks) == pytest.approx(1 / 6)
    assert recsys.area_under_curve(scores, torch.ones(5)) == 0.5
    assert recsys.area_under_curve(torch.ones(5), clicks) == 0.5
    tied = torch.tensor([0.1, 0.5, 0.5, 0.6, 0.7])
    assert recsys.area_under_curve(tied, clicks) == pytest.approx(5.5 / 6)


def test_ids_predict_better_than_features(recsys: Any) -> None:
    *_, targets = recsys.make_clicks(40_000, seed=2)
    task = recsys.Clicks()
    figures = {
        name: metric.compute() for name, metric in task.metrics(targets[:, 2], targets).items()
    }
    assert figures["auc"] == figures["auc_best_of_all"] > 0.85
    assert 0.6 < figures["auc_best_without_ids"] < 0.64


def test_top_network_gets_the_products_of_all_pairs(recsys: Any) -> None:
    model = recsys.DLRM(8, {})
    model.tables = torch.nn.ModuleDict(
        {"a": torch.nn.Embedding(5, 8), "b": torch.nn.Embedding(5, 8)}
    )
    model.register_buffer("pairs", torch.tril_indices(3, 3, -1))
    top_inputs: list[torch.Tensor] = []
    model.top = torch.nn.Sequential(torch.nn.Linear(8 + 3, 1))
    model.top.register_forward_pre_hook(lambda module, inputs: top_inputs.extend(inputs))
    ids, features = torch.tensor([[1, 2]]), torch.ones(1, recsys.FEATURES)
    model((ids, features))
    dense = model.bottom(features)[0]
    row_a, row_b = model.tables["a"].weight[1], model.tables["b"].weight[2]
    products = torch.stack([dense @ row_a, dense @ row_b, row_a @ row_b])
    torch.testing.assert_close(top_inputs[0][0], torch.cat([dense, products]))


def test_two_workers_match_one_under_ring_and_ps_sync(recsys: Any) -> None:
    """The AUC is over the samples of all workers."""

    class FewClicks(recsys.Clicks):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__(samples=96, width=4)

        def eval_data(self) -> Any:
            return Subset(super().eval_data(), range(200))

    def metrics_of(strategy: str, workers: int, **options: Any) -> list[float]:
        embeddings = {"optimizer": {"name": "Adagrad", "lr": 0.1}, **options}
        job = job_of(strategy, workers, global_batch_size=24, embeddings=embeddings)
        return [
            value for run in evaluations(train(job, FewClicks)) for value in run.metrics.values()
        ]

    single, ring, ps_sync = metrics_of("ring", 1), metrics_of("ring", 2), metrics_of("ps-sync", 2)
    assert len(single) == 4 and ring == ps_sync == pytest.approx(single, rel=1e-5)
    ps_async = metrics_of("ps-async", 2, asynchronous=True)
    assert ps_async[2:] == pytest.approx(single[2:], rel=1e-6), (
        "the AUC of the true probabilities does not depend on the model"
    )
    assert ps_async[1] == pytest.approx(single[1], abs=0.1)


@pytest.mark.sweep(2)
@pytest.mark.parametrize("ids", [True, False])
def test_small_run_writes_metrics_and_tables(ids: bool, tmp_path: Path) -> None:
    overrides = ["scaling.num_workers=0", "task_args.samples=9000", f"storage_path={tmp_path}"]
    if not ids:
        overrides += ["embeddings=null", "task_args.ids=false"]
    result = Trainer(load_job(FOLDER / "job.yaml", overrides=overrides), working_dir=FOLDER).fit()
    assert len(result.history) == 3
    assert {"eval_auc", "eval_auc_best_without_ids"} <= set(result.metrics)
    assert (result.path / "embeddings.json").exists() == ids
    if ids:
        tables = json.loads((result.path / "embeddings.json").read_text())["tables"]
        names = [table["name"] for table in tables]
        assert names == ["tables.user", "tables.item", "tables.category"]
