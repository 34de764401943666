"""The GAN example: its metric, and a small run in memory."""

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from function_ranks import call_on_ranks, function_job

from distplat.platform.progress import StepReport

FOLDER = Path(__file__).parents[2] / "examples" / "gan"


@pytest.fixture
def gan(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module("gan")


def test_covered_counts_places_with_enough_points(gan: Any) -> None:
    (data,) = gan.points(2000).tensors
    assert gan.covered(data) == 8
    half = data[data[:, 1] > 0.1]
    assert gan.covered(half) == 3
    few = torch.cat([gan.places()[:1].expand(9, 2), torch.full((991, 2), 5.0)])
    assert gan.covered(few) == 0


@pytest.mark.parametrize("strategy", ["ring", "ps-sync", "ps-async"])
def test_both_models_are_equal_on_all_ranks(strategy: str, gan: Any) -> None:
    small = {"epochs": 2, "lr": 0.01, "width": 8, "samples": 64, "batch_size": 8}
    run = call_on_ranks(lambda config: gan.train(small), job=function_job(2, strategy=strategy))
    first, second = run.trained
    assert first.keys() == second.keys()
    assert {name.split(".")[0] for name in first} == {"0", "1"}
    assert all(torch.equal(first[name], second[name]) for name in first)
    figures = [r.figures.keys() for r in run.reports if isinstance(r, StepReport)]
    server_figures = (
        {"staleness", "staleness_mean", "waiting_s"} if strategy == "ps-async" else set()
    )
    assert figures == [{"critic_loss", "covered"} | server_figures] * 2
