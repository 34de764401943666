"""Synchronized batch norm in a train function."""

import copy
from typing import Any

import pytest
import torch
from blocking_starts import block_starts
from function_ranks import call_on_ranks, function_job
from plain_functions import data_of, model_of
from torch import Tensor, nn
from torch.autograd import backward

import distplat
from distplat.platform.errors import SpecError


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_synchronized_batch_norm_is_over_all_ranks(world: int, momentum: float | None) -> None:
    """Two models have it, one behind the other: each its own statistics."""

    def models() -> tuple[nn.Module, nn.Module]:
        wide, narrow = (nn.BatchNorm1d(n, momentum=momentum).double() for n in (6, 1))
        first, _, last = model_of().children()
        return nn.Sequential(first, wide, nn.Tanh(), last), narrow

    def steps(first: nn.Module, second: nn.Module, rank: int = 0, world: int = 1) -> None:
        optimizer = torch.optim.SGD([*first.parameters(), *second.parameters()], lr=0.1)
        for _ in range(4):
            inputs, targets = (one[rank::world] for one in data_of().tensors)
            backward((second(first(inputs)) - targets).square().mean())
            optimizer.step()
            optimizer.zero_grad()

    def train(config: Any) -> None:
        made = map(nn.SyncBatchNorm.convert_sync_batchnorm, models())
        context = distplat.get_context()
        first, second = distplat.prepare(*made)
        steps(first, second, context.rank, context.world)

    whole = models()
    steps(*whole)
    expected = {f"{n}.{k}": v for n, one in enumerate(whole) for k, v in one.state_dict().items()}
    for found in call_on_ranks(train, world).trained:
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert torch.allclose(found[name], value, rtol=1e-10, atol=1e-12), name


class Branching(nn.Module):
    """On rank 1 it does not reach `extra` in the second step."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(3, 4).double(), nn.SyncBatchNorm(4).double()
        self.out, self.extra = (nn.Linear(4, 4).double() for _ in range(2))

    def forward(self, x: Tensor, extra: bool) -> Tensor:
        y: Tensor = self.out(torch.relu(self.norm(self.first(x))))
        return y + self.extra(y) if extra else y


def test_a_parameter_that_one_rank_does_not_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its bucket is complete on the other rank, whose hook may not wait: the layer needs both."""
    initial = Branching()

    def train(config: Any) -> None:
        model = distplat.prepare(copy.deepcopy(initial))
        rank = distplat.get_context().rank
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for step in range(3):
            inputs = torch.linspace(-1, 1 + rank, 12).double().reshape(4, 3)
            optimizer.zero_grad()
            backward(model(inputs, extra=(step, rank) != (1, 1)).square().mean())
            optimizer.step()

    def trained(overlap: bool) -> list[dict[str, Tensor]]:
        strategy = {"name": "ring", "bucket_mb": 1e-4, "overlap": overlap}
        return call_on_ranks(train, job=function_job(2, strategy=strategy)).trained

    wanted = trained(overlap=False)
    block_starts(monkeypatch, said=True)
    for found, expected in zip(trained(overlap=True), wanted, strict=True):
        for name, value in expected.items():
            assert torch.equal(found[name], value), name


def with_norm(*, synced: bool = False) -> nn.Module:
    first, _, last = model_of().children()
    norm = nn.SyncBatchNorm(6) if synced else nn.BatchNorm1d(6)
    return nn.Sequential(first, norm.double(), nn.Tanh(), last)


@pytest.mark.parametrize("strategy", ["ring", "ps-sync"])
def test_a_copy_of_a_model_with_sync_batch_norm_is_computed_like_it(strategy: str) -> None:
    """A teacher that is in training mode, and follows its student."""

    def steps(student: nn.Module, rank: int = 0, world: int = 1) -> None:
        teacher = copy.deepcopy(student).requires_grad_(False)
        optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
        for _ in range(4):
            inputs, targets = (one[rank::world] for one in data_of().tensors)
            backward((student(inputs) - 0.1 * teacher(inputs) - targets).square().mean())
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                for mine, other in zip(teacher.parameters(), student.parameters(), strict=True):
                    mine.lerp_(other, 0.1)

    def train(config: Any) -> None:
        place = distplat.get_context()
        model = distplat.prepare(with_norm(synced=True))
        steps(model, place.rank, place.world)

    whole = with_norm()
    steps(whole)
    for found in call_on_ranks(train, job=function_job(2, strategy=strategy)).trained:
        for name, value in whole.state_dict().items():
            assert torch.allclose(found[name], value, rtol=1e-10, atol=1e-12), name


def test_a_model_may_keep_a_copy_of_its_sync_batch_norm() -> None:
    """Such as the teacher of BYOL, in a module of the student's."""

    def train(config: Any) -> None:
        model = distplat.prepare(with_norm(synced=True))
        model[0].teacher = copy.deepcopy(model).requires_grad_(False)
        inputs, _ = data_of().tensors
        backward((model(inputs) - model[0].teacher(inputs) - 1).square().mean())

    call_on_ranks(train, 2)


def test_sync_batch_norm_that_comes_behind_prepare_is_refused() -> None:
    def train(config: Any) -> None:
        convert: Any = nn.SyncBatchNorm.convert_sync_batchnorm
        model = convert(distplat.prepare(with_norm()))
        inputs, targets = data_of().tensors
        backward((model(inputs) - targets).square().mean())

    with pytest.raises(SpecError, match=r"'1' of the model became nn\.SyncBatchNorm after prepare"):
        call_on_ranks(train, 2)
    call_on_ranks(train, 1)
