"""Parts of a model in evaluation mode, which a step puts in training mode: said, not silent."""

import torch
from jobs import job_of
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from distplat.strategies.loop.session import prepare
from distplat.strategies.task import Task


class Plain(Task):
    def model(self) -> nn.Module:
        return nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), nn.Linear(2, 1))

    def train_data(self) -> TensorDataset:
        return TensorDataset(torch.ones(8, 2), torch.ones(8, 1))

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs - targets).square().mean()


class PartEvaluates(Plain):
    def model(self) -> nn.Module:
        model = super().model()
        model.get_submodule("0").eval()
        return model


class AllEvaluates(Plain):
    def model(self) -> nn.Module:
        return super().model().eval()


class Kept(nn.Sequential):
    def train(self, mode: bool = True) -> "Kept":
        super().train(mode)
        self.get_submodule("0").eval()
        return self


class KeepsPart(Plain):
    def model(self) -> nn.Module:
        return Kept(*super().model().children()).train()


def test_a_part_in_evaluation_mode_is_warned_of() -> None:
    prepared = prepare(job_of("ring"), PartEvaluates())
    (found,) = prepared.warnings
    assert found.startswith("model() gives '0' in evaluation mode, and each step starts with")
    assert not prepared.flat.model.get_submodule("0.1").training


def test_what_is_meant_is_not() -> None:
    for task in (Plain, AllEvaluates, KeepsPart):
        assert prepare(job_of("ring"), task()).warnings == []
