"""A lost worker leaves no trace in buffers and frozen parameters: the same bits at the end."""

from functools import cache

import pytest
import torch
from hybrid_workers import UntilOneIsLost
from local_run import LocalRun, train
from test_model_state import WIDE, Data, Teacher, job
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from distplat.strategies.fakes import Fabric

WORLD = 3


class Both(Data):
    """A batch norm before a student and its teacher."""

    def model(self) -> nn.Module:
        return nn.Sequential(nn.BatchNorm1d(6, dtype=WIDE), Teacher("data assigned"))

    def train_data(self) -> TensorDataset:
        """No rank has a batch of one."""
        return TensorDataset(*(tensor[:24] for tensor in super().train_data().tensors))


@cache
def unfailed(strategy: str) -> dict[str, Tensor]:
    return train(job(strategy, WORLD), Both).parameters()


@pytest.mark.parametrize("victim", [0, 2])
@pytest.mark.parametrize("after", range(11, 41, 5))
@pytest.mark.parametrize("strategy", ["ring", "ps-sync"])
def test_one_is_lost_at_any_operation(strategy: str, after: int, victim: int) -> None:
    run, fabric = LocalRun(job(strategy, WORLD), Both), Fabric(WORLD)
    fabric.kill(victim, after=after)
    if not UntilOneIsLost(run, fabric).make():
        run.renew(victim)
        attempt = UntilOneIsLost(run)
        assert attempt.make()
        assert len({*attempt.starts}) == 1
    run.close()
    for rank in range(WORLD):
        found = run.parameters(rank)
        for name, value in unfailed(strategy).items():
            assert torch.equal(found[name], value), (name, rank)
