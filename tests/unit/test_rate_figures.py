"""Learning rate and gradient norm in the metrics of a step."""

from typing import Any

import pytest
import torch
from grouped_task import ADAMW, BATCH, SAMPLES, SCALES, STEPS, STRATEGIES, Small, job
from local_run import LocalRun, train
from torch import nn

from distplat.platform.progress import ReportAggregator, StepReport, StepSummary
from distplat.platform.sampler import Sampler

LIMIT = 0.5


def figures(run: LocalRun) -> list[dict[str, float]]:
    """Return the figures of each step as in the run's metrics."""
    aggregator = ReportAggregator(len(run.reports))
    found = []
    steps = sorted((r.step, rank, r) for rank, reports in enumerate(run.reports) for r in reports
                   if isinstance(r, StepReport))  # fmt: skip
    for _, _, report in steps:
        found += [s.figures for s in aggregator.add(report) if isinstance(s, StepSummary)]
    assert len(found) == STEPS
    return found


def norms() -> list[float]:
    """Return the norms of torch's clipping in a plain loop."""
    task = Small()
    torch.manual_seed(5)
    model, data = task.model(), task.train_data()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.3)
    sampler = Sampler(SAMPLES, BATCH, 1, seed=5)
    found = []
    for step in range(STEPS):
        inputs, targets = zip(*(data[int(i)] for i in sampler.batch_ids(step)), strict=True)
        optimizer.zero_grad()
        torch.autograd.backward(task.loss(model(torch.stack(inputs)), torch.stack(targets)))
        found.append(float(nn.utils.clip_grad_norm_(model.parameters(), LIMIT)))
        optimizer.param_groups[0]["lr"] = 0.05 * SCALES[step]
        optimizer.step()
    return found


PIPELINES: dict[str, tuple[Any, int]] = {
    "hybrid-pipeline": ({"name": "hybrid", "pipeline": 2, "cut": "even"}, 2),
    "hybrid-servers-of-stages": (
        {"name": "hybrid", "pipeline": 2, "cut": "even", "data_strategy": "ps-sync"},
        2,
    ),
}


class Chain(Small):
    """The same layers as a Sequential, which a pipeline can cut."""

    def model(self) -> nn.Module:
        net: Any = super().model()
        return nn.Sequential(net.body, net.norm, nn.Tanh(), net.head)


@pytest.mark.sweep(2)
@pytest.mark.parametrize("name", [*STRATEGIES, *PIPELINES])
def test_each_step_reports_lr_and_grad_norm(name: str) -> None:
    strategy = (STRATEGIES | PIPELINES)[name]
    task_class = Chain if name in PIPELINES else Small
    steps = figures(train(job(*strategy, optimizer=ADAMW, clip_norm=LIMIT), task_class))
    assert [step["lr"] for step in steps] == pytest.approx([0.05 * scale for scale in SCALES])
    assert [step["grad_norm"] for step in steps] == pytest.approx(norms(), rel=1e-9)


@pytest.mark.parametrize("name", STRATEGIES)
def test_no_grad_norm_without_clipping(name: str) -> None:
    for step in figures(train(job(*STRATEGIES[name]), Small)):
        assert "grad_norm" not in step


def test_group_with_its_own_lr_has_a_figure() -> None:
    for number, step in enumerate(figures(train(job(), Small))):
        assert {name for name in step if name.startswith("lr")} == {"lr", "lr_group_1"}
        assert step["lr_group_1"] == pytest.approx(0.01 * SCALES[number])


@pytest.mark.parametrize("name", ["ring-2", "ps-sync", "ps-sync-3-servers", "hybrid-servers"])
def test_skipped_step_has_no_grad_norm(name: str) -> None:
    class InfiniteLoss(Small):
        calls = 0

        def loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            loss = super().loss(outputs, targets)
            return loss * float("inf") if self.calls == 3 else loss

    config = job(*STRATEGIES[name], clip_norm=LIMIT, failure={"non_finite": "skip"})
    steps = figures(train(config, InfiniteLoss))
    assert [number for number, step in enumerate(steps) if "grad_norm" not in step] == [2]
