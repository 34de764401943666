"""`ReduceLROnPlateau`: the rates of a plain loop with torch's own, through failures and resumes."""

from typing import Any

import pytest
import torch
from jobs import job_of
from local_run import LocalRun, train
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau as OfTorch
from torch.utils.data import TensorDataset

from distplat import Task
from distplat.platform.progress import StepReport
from distplat.platform.sampler import Sampler
from distplat.platform.spec import Job

SAMPLES, BATCH, STEPS, EVERY = 40, 12, 24, 2
LR, HEAD_LR = 0.5, 0.2
RULE: dict[str, Any] = {
    "name": "ReduceLROnPlateau",
    "factor": 0.3,
    "patience": 1,
    "threshold": 0.03,
    "cooldown": 1,
    "min_lr": 0.06,
}
GRID = {"name": "hybrid", "pipeline": 2, "data": 2, "cut": "even", "micro_batches": 2}


class Steep(Task):
    """Its loss gets no better in the second half."""

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Linear(8, 3))

    def train_data(self) -> TensorDataset:
        made = torch.Generator().manual_seed(1)
        inputs = torch.randn(SAMPLES, 4, generator=made)
        return TensorDataset(inputs, torch.randn(SAMPLES, 3, generator=made))

    def eval_data(self) -> Any:
        return self.train_data()

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs - targets).square().mean()

    def metrics(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        return {"score": -(outputs - targets).abs().mean()}


def job(strategy: Any = "ring", world: int = 1, **more: Any) -> Job:
    fields: dict[str, Any] = {
        "optimizer": {"name": "SGD", "lr": LR, "groups": [{"match": "3.*", "lr": HEAD_LR}]},
        "lr_schedule": RULE,
        "global_batch_size": BATCH,
        "steps": STEPS,
        "evaluation": {"every_steps": EVERY},
        **more,
    }
    return job_of(strategy, world, **fields)


def plain(rule: dict[str, Any]) -> tuple[dict[str, Tensor], list[list[float]]]:
    """A loop by torch's documents; gives the rates of each step, too."""
    torch.manual_seed(0)
    model, task = Steep().model(), Steep()
    data, evaluated = task.train_data(), task.eval_data()
    head: Any = model.get_submodule("3")
    rest = [p for name, p in model.named_parameters() if not name.startswith("3.")]
    optimizer = torch.optim.SGD(
        [{"params": rest}, {"params": [*head.parameters()], "lr": HEAD_LR}], lr=LR
    )
    arguments = {k: v for k, v in rule.items() if k not in ("name", "metric")}
    scheduler, rates = OfTorch(optimizer, **arguments), []
    sampler = Sampler(SAMPLES, BATCH, 1, 0)
    for step in range(STEPS):
        rates.append([float(group["lr"]) for group in optimizer.param_groups])
        ids = [int(i) for i in sampler.batch_ids(step)]
        optimizer.zero_grad()
        inputs, targets = (torch.stack(one) for one in zip(*(data[i] for i in ids), strict=True))
        torch.autograd.backward(task.loss(model(inputs), targets))
        optimizer.step()
        if (step + 1) % EVERY == 0:
            with torch.no_grad():
                inputs, targets = evaluated.tensors
                outputs = model(inputs)
                found = {"loss": task.loss(outputs, targets), **task.metrics(outputs, targets)}
            scheduler.step(found[rule.get("metric", "loss")])
    return {name: one.detach() for name, one in model.state_dict().items()}, rates


def rates(run: LocalRun, rank: int = 0) -> list[list[float]]:
    """Give the rates that were shown, by step; what was told again replaces what was told."""
    steps = {one.step: one for one in run.reports[rank] if isinstance(one, StepReport)}
    return [[one.figures["lr"], one.figures["lr_group_0"]] for _, one in sorted(steps.items())]


WAYS: list[tuple[Any, int]] = [
    ("ring", 1),
    ("ring", 3),
    ({"name": "ring", "shard_optimizer": True}, 2),
    ("ps-sync", 1),
    ({"name": "ps-sync", "num_servers": 2}, 3),
    ({"name": "ps-sync", "replication": 2}, 2),
    (GRID, 4),
    ({**GRID, "data_strategy": "ps-sync"}, 4),
]


@pytest.mark.parametrize(("strategy", "world"), WAYS, ids=str)
def test_a_run_is_a_loop_with_torchs_scheduler(strategy: Any, world: int) -> None:
    expected, of_torch = plain(RULE)
    assert len({*map(tuple, of_torch)}) > 2, "or there is nothing to see"
    assert of_torch[-1] == [0.06, 0.06]
    run = train(job(strategy, world), Steep)
    for rank in range(world):
        assert rates(run, rank) == of_torch, "bit by bit"
    found = {name: one for part in run.trained for name, one in part.items()}
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)
