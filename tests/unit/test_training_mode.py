"""Warning about modules in evaluation mode, which each step sets to training mode."""

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


class PartInEvalMode(Plain):
    def model(self) -> nn.Module:
        model = super().model()
        model.get_submodule("0").eval()
        return model


class AllInEvalMode(Plain):
    def model(self) -> nn.Module:
        return super().model().eval()


class PartStaysInEval(nn.Sequential):
    def train(self, mode: bool = True) -> "PartStaysInEval":
        super().train(mode)
        self.get_submodule("0").eval()
        return self


class OverridesTrain(Plain):
    def model(self) -> nn.Module:
        return PartStaysInEval(*super().model().children()).train()


def test_submodule_in_evaluation_mode_has_a_warning() -> None:
    prepared = prepare(job_of("ring"), PartInEvalMode())
    (warning,) = prepared.warnings
    assert warning.startswith("model() gives '0' in evaluation mode, and each step starts with")
    assert not prepared.flat.model.get_submodule("0.1").training


def test_consistent_modes_have_no_warning() -> None:
    for task in (Plain, AllInEvalMode, OverridesTrain):
        assert prepare(job_of("ring"), task()).warnings == []
