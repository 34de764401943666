"""TaskModel: the inputs of a task do not depend on its lease."""

import multiprocessing
from typing import Any

import pytest
import torch
from classifiers import Mlp
from jobs import job_of
from torch import Tensor, nn
from torch.utils.data import Dataset

from distplat.strategies.loop.compute import Stopwatch, TaskModel
from distplat.strategies.loop.prepared import Prepared
from distplat.strategies.loop.session import prepare
from distplat.strategies.worker_strategy import make_worker_strategy


class NoisyData(Dataset[Any]):
    """Adds random noise to each sample."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return index + torch.rand(4), torch.zeros(3)


class NoisyTask(Mlp):
    def model(self) -> nn.Module:
        return nn.Linear(4, 3)

    def train_data(self) -> Any:
        return NoisyData()


def prepare_model(loaders: int) -> tuple[Prepared, TaskModel]:
    job = job_of("ps-async", 2, seed=5, data={"num_workers": loaders})
    strategy = make_worker_strategy(job)
    prepared = prepare(job, NoisyTask(), strategy=strategy)
    return prepared, TaskModel(prepared, strategy.last_backward, lambda: None)


@pytest.mark.parametrize("loaders", [0, 2])
def test_inputs_of_a_task_do_not_depend_on_its_lease(loaders: int) -> None:
    prepared, one_lease = prepare_model(loaders)
    _, three_leases = prepare_model(loaders)
    expected = inputs_of(one_lease, [range(8)])
    actual = inputs_of(three_leases, [range(5, 8), range(2), range(2, 5)])
    for task in range(8):
        assert torch.equal(actual[task], expected[task]), task
        ids = prepared.sampler.rank_ids(task // 2, task % 2)
        assert actual[task].int()[:, 0].tolist() == ids.tolist()
    values = torch.cat([*actual.values()]).flatten().tolist()
    assert len(set(values)) == len(values), "each sample has its own noise"


def inputs_of(model: TaskModel, leases: list[range]) -> dict[int, Tensor]:
    """Return the inputs of the model's forward by task."""
    inputs: list[Tensor] = []
    model.flat.model.register_forward_pre_hook(lambda module, args: inputs.append(args[0].clone()))
    for lease in leases:
        model.read(lease)
        for task in lease:
            model.gradients(task, Stopwatch())
    model.close()
    assert not [child for child in multiprocessing.active_children() if child.is_alive()]
    return dict(zip([task for lease in leases for task in lease], inputs, strict=True))
