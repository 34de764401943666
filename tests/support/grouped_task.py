"""A task whose optimizer has parameter groups, and a plain torch loop to compare with."""

from typing import Any

import torch
from jobs import job_of
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from distplat.platform.sampler import Sampler
from distplat.platform.spec import Job
from distplat.strategies.task import Task

STEPS, BATCH, SAMPLES = 6, 8, 20
GROUPS: list[dict[str, Any]] = [
    {"match": "*.bias,*norm*", "weight_decay": 0},
    {"match": "head.*", "lr": 0.01, "betas": [0.5, 0.9]},
]
ADAMW: dict[str, Any] = {"name": "AdamW", "lr": 0.05, "weight_decay": 0.3}
GROUPED = {**ADAMW, "groups": GROUPS}


class Small(Task):
    """Linear layers, a norm and a head, in float64; optionally a parameter of the task itself."""

    own = False

    def __init__(self) -> None:
        if self.own:
            self.bend = nn.Parameter(torch.ones(3, dtype=torch.float64))

    def model(self) -> nn.Module:
        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.body, self.norm = nn.Linear(6, 5), nn.LayerNorm(5)
                self.head = nn.Linear(5, 3)

            def forward(self, x: Tensor) -> Tensor:
                result: Tensor = self.head(torch.tanh(self.norm(self.body(x))))
                return result

        return Net().double()

    def train_data(self) -> TensorDataset:
        generator = torch.Generator().manual_seed(1)
        inputs = torch.randn(SAMPLES, 6, generator=generator, dtype=torch.float64)
        return TensorDataset(inputs, inputs[:, :3] * 2 - 1)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        scale = self.bend if self.own else 1.0
        return (outputs * scale - targets).square().mean()


class Own(Small):
    own = True


def job(strategy: Any = "ring", world: int = 1, **more: Any) -> Job:
    fields = {
        "optimizer": GROUPED,
        "lr_schedule": {"name": "cosine", "warmup_steps": 2, "final_factor": 0.1},
        "steps": STEPS,
        "global_batch_size": BATCH,
        "seed": 5,
        "evaluation": {"every_epochs": 0},
        **more,
    }
    return job_of(strategy, world, **fields)


SCALES = [0.5, 1.0, 1.0, 0.775, 0.325, 0.1]
"""Factors of the learning rate by step."""


def plain_loop(
    task: Task,
    model: nn.Module,
    data: Any,
    optimizer: torch.optim.Optimizer,
    clip_norm: float | None,
) -> None:
    """Train the steps of the job in a plain loop."""
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: [*SCALES, 0.0][step])
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    sampler = Sampler(SAMPLES, BATCH, 1, seed=5)
    for step in range(STEPS):
        inputs, targets = zip(*(data[int(i)] for i in sampler.batch_ids(step)), strict=True)
        optimizer.zero_grad()
        loss: Any = task.loss(model(torch.stack(inputs)), torch.stack(targets))
        loss.backward()
        if clip_norm is not None:
            nn.utils.clip_grad_norm_(parameters, clip_norm)
        optimizer.step()
        schedule.step()


def train_with_param_groups(
    task_type: type[Task], clip_norm: float | None = None
) -> dict[str, Tensor]:
    """Train in a plain loop with torch's param groups; return the model."""
    task = task_type()
    torch.manual_seed(5)
    model, data = task.model(), task.train_data()
    named = dict(model.named_parameters())
    first = {name for name in named if name.endswith(".bias") or "norm" in name}
    second = {name for name in named if name.startswith("head.")} - first
    rest = [p for name, p in named.items() if name not in first | second]
    rest += [task.bend] if isinstance(task, Own) else []
    groups: list[dict[str, Any]] = [
        {"params": [named[name] for name in sorted(first)], "weight_decay": 0.0},
        {"params": [named[name] for name in sorted(second)], "lr": 0.01, "betas": (0.5, 0.9)},
        {"params": rest},
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.05, weight_decay=0.3)
    plain_loop(task, model, data, optimizer, clip_norm)
    found = {name: value.detach().clone() for name, value in model.state_dict().items()}
    return {**found, "task:bend": task.bend.detach()} if isinstance(task, Own) else found


def assert_close(
    found: dict[str, Tensor], expected: dict[str, Tensor], limit: float = 1e-9
) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=limit, atol=limit, msg=name)


STRATEGIES: dict[str, tuple[Any, int]] = {
    "ring-1": ("ring", 1),
    "ring-2": ("ring", 2),
    "sharded": ({"name": "ring", "shard_optimizer": True}, 3),
    "ps-sync": ("ps-sync", 2),
    "ps-sync-3-servers": ({"name": "ps-sync", "num_servers": 3}, 2),
    "ps-sync-kept-twice": ({"name": "ps-sync", "num_servers": 2, "replication": 2}, 2),
    "ps-async": ({"name": "ps-async", "num_servers": 2}, 1),
    "hybrid-data": ({"name": "hybrid", "data": 2}, 2),
    "hybrid-servers": ({"name": "hybrid", "data": 2, "data_strategy": "ps-sync"}, 2),
}
