"""The learning rate and the gradient's norm in the metrics of a step."""

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
    """Give the figures of the run's steps as its metrics have them."""
    joined = ReportAggregator(len(run.reports))
    found = []
    steps = sorted((one.step, rank, one) for rank, some in enumerate(run.reports) for one in some
                   if isinstance(one, StepReport))  # fmt: skip
    for _, _, report in steps:
        found += [one.figures for one in joined.add(report) if isinstance(one, StepSummary)]
    assert len(found) == STEPS
    return found


def norms() -> list[float]:
    """What torch's clipping gives in a plain loop."""
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


CUT: dict[str, tuple[Any, int]] = {
    "hybrid-pipeline": ({"name": "hybrid", "pipeline": 2, "cut": "even"}, 2),
    "hybrid-servers-of-stages": (
        {"name": "hybrid", "pipeline": 2, "cut": "even", "data_strategy": "ps-sync"},
        2,
    ),
}


class Chain(Small):
    """The same layers, which a pipeline can cut."""

    def model(self) -> nn.Module:
        net: Any = super().model()
        return nn.Sequential(net.body, net.norm, nn.Tanh(), net.head)


@pytest.mark.parametrize("name", [*STRATEGIES, *CUT])
def test_rate_and_norm_of_each_step(name: str) -> None:
    where = (STRATEGIES | CUT)[name]
    kind = Chain if name in CUT else Small
    found = figures(train(job(*where, optimizer=ADAMW, clip_norm=LIMIT), kind))
    assert [one["lr"] for one in found] == pytest.approx([0.05 * scale for scale in SCALES])
    assert [one["grad_norm"] for one in found] == pytest.approx(norms(), rel=1e-9)


@pytest.mark.parametrize("name", STRATEGIES)
def test_without_clipping_no_norm_is_computed(name: str) -> None:
    for one in figures(train(job(*STRATEGIES[name]), Small)):
        assert "grad_norm" not in one


def test_a_group_with_a_rate_of_its_own_has_a_figure() -> None:
    for at, one in enumerate(figures(train(job(), Small))):
        assert {name for name in one if name.startswith("lr")} == {"lr", "lr_group_1"}
        assert one["lr_group_1"] == pytest.approx(0.01 * SCALES[at])


@pytest.mark.parametrize("name", ["ring-2", "ps-sync", "ps-sync-3-servers", "hybrid-servers"])
def test_a_step_that_is_left_out_has_no_norm(name: str) -> None:
    class Breaks(Small):
        calls = 0

        def loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            found = super().loss(outputs, targets)
            return found * float("inf") if self.calls == 3 else found

    of = job(*STRATEGIES[name], clip_norm=LIMIT, failure={"non_finite": "skip"})
    found = figures(train(of, Breaks))
    assert [at for at, one in enumerate(found) if "grad_norm" not in one] == [2]
