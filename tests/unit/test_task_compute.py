"""What a leased task computes on: its own samples, whatever was leased beside it."""

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


class Jittered(Dataset[Any]):
    """Draws noise for each sample, wherever it is read."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return index + torch.rand(4), torch.zeros(3)


class Noisy(Mlp):
    def model(self) -> nn.Module:
        return nn.Linear(4, 3)

    def train_data(self) -> Any:
        return Jittered()


def prepared(loaders: int) -> tuple[Prepared, TaskModel]:
    job = job_of("ps-async", 2, seed=5, data={"num_workers": loaders})
    strategy = make_worker_strategy(job)
    made = prepare(job, Noisy(), strategy=strategy)
    return made, TaskModel(made, strategy.last_backward, lambda: None)


@pytest.mark.parametrize("loaders", [0, 2])
def test_the_data_of_a_task_does_not_depend_on_its_lease(loaders: int) -> None:
    made, whole = prepared(loaders)
    _, parts = prepared(loaders)
    expected = inputs_of(whole, [range(8)])
    found = inputs_of(parts, [range(5, 8), range(2), range(2, 5)])
    for task in range(8):
        assert torch.equal(found[task], expected[task]), task
        ids = made.sampler.rank_ids(task // 2, task % 2)
        assert found[task].int()[:, 0].tolist() == ids.tolist()
    values = torch.cat([*found.values()]).flatten().tolist()
    assert len(set(values)) == len(values), "no two draws are the same"


def inputs_of(model: TaskModel, leases: list[range]) -> dict[int, Tensor]:
    """Give what the model computes on in each task."""
    seen: list[Tensor] = []
    model.flat.model.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    for lease in leases:
        model.read(lease)
        for task in lease:
            model.gradients(task, Stopwatch())
    model.close()
    assert not [child for child in multiprocessing.active_children() if child.is_alive()]
    return dict(zip([task for lease in leases for task in lease], seen, strict=True))
