"""Parameters of the task are trained, saved and resumed like the model's."""

from typing import Any

import pytest
import torch
from jobs import job_of
from local_run import train
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset, default_collate

from distplat.platform.errors import SpecError
from distplat.platform.sampler import Sampler
from distplat.platform.spec import Job
from distplat.platform.tensor_file import decode, encode, split_task_tensors
from distplat.platform.tensor_slices import RawTensor
from distplat.strategies.checkpoint.parts import whole_of
from distplat.strategies.task import Task

SAMPLES, BATCH, STEPS = 20, 8, 7


class TaskWithParameters(Task):
    """The task has a parameter and a module that its loss uses."""

    def __init__(self) -> None:
        self.log_var = nn.Parameter(torch.zeros(3, dtype=torch.float64))
        self.heads = [nn.Linear(3, 1).double()]
        self.calls = 0

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()

    def train_data(self) -> Dataset[Any]:
        generator = torch.Generator().manual_seed(1)
        inputs = torch.randn(SAMPLES, 4, generator=generator, dtype=torch.float64)
        return TensorDataset(
            inputs, torch.randn(SAMPLES, 3, generator=generator, dtype=torch.float64)
        )

    def loss(self, outputs: Any, targets: Any) -> Tensor:
        errors = (outputs - targets).square() * torch.exp(-self.log_var) + self.log_var
        first: Tensor = errors.mean()
        second: Tensor = self.heads[0](outputs).square().mean()
        return first + second * 0.1


def make_job(strategy: dict[str, Any], workers: int, **fields: Any) -> Job:
    return job_of(
        strategy,
        workers,
        optimizer={"name": "AdamW", "lr": 0.05},
        steps=STEPS,
        global_batch_size=BATCH,
        data={"shuffle": False},
        **fields,
    )


def train_plain() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Train in a plain loop, and return the parameters of the model and of the task."""
    torch.manual_seed(0)
    task = TaskWithParameters()
    torch.manual_seed(0)
    model, data = task.model(), task.train_data()
    own: dict[str, Tensor] = {
        "log_var": task.log_var,
        **dict(task.heads[0].named_parameters("heads.0")),
    }
    optimizer = torch.optim.AdamW([*model.parameters(), *own.values()], lr=0.05)
    sampler = Sampler(SAMPLES, BATCH, 1, 0, False, False)
    for step in range(STEPS):
        inputs, targets = default_collate([data[int(i)] for i in sampler.batch_ids(step)])
        optimizer.zero_grad()
        torch.autograd.backward(task.loss(model(inputs), targets))
        optimizer.step()
    return dict(model.named_parameters()), own


@pytest.mark.parametrize(
    ("strategy", "workers"),
    [
        ({"name": "ring"}, 1),
        ({"name": "ring"}, 3),
        ({"name": "ring", "shard_optimizer": True}, 2),
        ({"name": "ps-sync", "num_servers": 2}, 2),
        ({"name": "ps-async"}, 1),
    ],
    ids=str,
)
def test_task_parameters_match_plain_loop(strategy: dict[str, Any], workers: int) -> None:
    run = train(make_job(strategy, workers), TaskWithParameters)
    model, own = train_plain()
    expected = {**model, **{f"task:{name}": value for name, value in own.items()}}
    assert run.trained[0].keys() == expected.keys()
    for name, value in expected.items():
        assert torch.allclose(run.trained[0][name], value, rtol=0, atol=1e-10), name


def test_task_parameters_are_resumed() -> None:
    reference = train(
        make_job({"name": "ring"}, 2, checkpoint={"every_steps": 3}), TaskWithParameters
    )
    resumed = train(
        make_job({"name": "ps-sync"}, 2), TaskWithParameters, saved=reference.checkpoints[3]
    )
    for name, value in reference.trained[0].items():
        assert torch.allclose(resumed.trained[0][name], value, rtol=0, atol=1e-10), name


def test_pipeline_rejects_task_parameters() -> None:
    with pytest.raises(
        SpecError, match=r"the task keeps log_var, heads\.0\.weight, heads\.0\.bias itself"
    ):
        train(make_job({"name": "hybrid", "pipeline": 2, "cut": "even"}, 2), TaskWithParameters)


def test_split_task_tensors_separates_model_and_task() -> None:
    tensors: dict[str, RawTensor] = {
        name: whole_of(torch.arange(3.0)) for name in ("0.weight", "task:log_var")
    }
    model, task = split_task_tensors(b"".join(encode(tensors)))
    assert task is not None
    assert (list(decode(model)), list(decode(task))) == (["0.weight"], ["log_var"])
    assert split_task_tensors(model) == (model, None)
