"""Training with compressed gradients: error feedback keeps the accuracy of plain training."""

from functools import cache
from typing import Any

import pytest
import torch
from jobs import job_of
from local_run import LocalRun, train
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from distplat.platform.progress import StepReport
from distplat.strategies import ring_worker
from distplat.strategies.loop.control import StepControl
from distplat.strategies.reduction.compressed import CompressedReducer
from distplat.strategies.task import Task

TRAIN = 1440
METHODS: dict[str, dict[str, Any]] = {
    "none": {},
    "topk": {"compression": "topk", "topk_density": 0.01},
    "powersgd": {"compression": "powersgd", "powersgd_rank": 1},
}


@cache
def digits() -> tuple[Tensor, Tensor]:
    """Return the 1797 images of scikit-learn's digits, in a seeded order."""
    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    inputs = torch.tensor(data.data / 16, dtype=torch.float32)
    return inputs[order], torch.tensor(data.target)[order]


class Digits(Task):
    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10))

    def train_data(self) -> TensorDataset:
        inputs, targets = digits()
        return TensorDataset(inputs[:TRAIN], targets[:TRAIN])

    def loss(self, outputs: Any, targets: Any) -> Tensor:
        return nn.functional.cross_entropy(outputs, targets)


def run(method: str, steps: int = 300, world: int = 2, **more: Any) -> LocalRun:
    fields = {
        "optimizer": {"name": "SGD", "lr": 0.02, "momentum": 0.9},
        "steps": steps,
        "global_batch_size": 48,
        "seed": 3,
        **more,
    }
    return train(job_of({"name": "ring", **METHODS[method]}, world, **fields), Digits)


def loss_and_accuracy(result: LocalRun) -> tuple[float, float]:
    """Return loss and accuracy on the test images."""
    inputs, targets = digits()
    with torch.no_grad():
        outputs = result.ranks[0].prepared.flat.model(inputs[TRAIN:])
    hits = (outputs.argmax(1) == targets[TRAIN:]).float().mean()
    return float(nn.functional.cross_entropy(outputs, targets[TRAIN:])), float(hits)


@cache
def uncompressed() -> tuple[float, float]:
    return loss_and_accuracy(run("none"))


@pytest.mark.sweep(2)
@pytest.mark.parametrize("method", ["topk", "powersgd"])
def test_accuracy_is_close_to_uncompressed_training(method: str) -> None:
    loss, accuracy = loss_and_accuracy(run(method))
    plain_loss, plain_accuracy = uncompressed()
    assert plain_accuracy > 0.93
    assert accuracy > plain_accuracy - 0.03
    assert loss < 1.25 * plain_loss


@pytest.mark.parametrize(
    ("method", "reducer"),
    [("topk", "TopKReducer"), ("powersgd", "PowerSGDReducer")],
    ids=["topk", "powersgd"],
)
def test_accuracy_drops_without_the_residual(
    method: str, reducer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The accuracy of the test above depends on error feedback."""

    class WithoutResidual(getattr(ring_worker, reducer)):  # type: ignore[misc]
        def finish(self, local: StepControl) -> StepControl:
            total: StepControl = super().finish(local)
            assert isinstance(self, CompressedReducer)
            self.residual.zero_()
            return total

    monkeypatch.setattr(ring_worker, reducer, WithoutResidual)
    loss, accuracy = loss_and_accuracy(run(method))
    plain_loss, plain_accuracy = uncompressed()
    assert loss > 2.5 * plain_loss
    assert accuracy < plain_accuracy - 0.05


@pytest.mark.sweep(2)
@pytest.mark.parametrize("method", ["topk", "powersgd"])
@pytest.mark.parametrize("world", [2, 3])
def test_ranks_agree_and_runs_are_bit_identical(method: str, world: int) -> None:
    """Also if some ranks have no samples: the second batch of an epoch has one sample."""
    more = {"global_batch_size": TRAIN - 1, "gradient_accumulation": 2, "clip_norm": 0.5}
    first = run(method, 5, world, **more)
    second = run(method, 5, world, **more)
    for result in (first, second):
        for rank in range(world):
            assert torch.equal(
                result.ranks[rank].prepared.flat.params, first.ranks[0].prepared.flat.params
            )
    initial = run(method, 1, world, optimizer={"name": "SGD", "lr": 1e-30})
    assert not torch.equal(
        first.ranks[0].prepared.flat.params, initial.ranks[0].prepared.flat.params
    )


@pytest.mark.parametrize("method", ["topk", "powersgd"])
def test_each_step_reports_figures_of_compression(method: str) -> None:
    result = run(method, 3)
    for reports in result.reports:
        for report in reports:
            assert isinstance(report, StepReport)
            assert report.figures["saved_bytes"] > 0
            assert 0 < report.figures["error_norm"] < 1
            assert {"compress_s", "baseline_s", "saved_s", "sent_bytes"} <= set(report.figures)
