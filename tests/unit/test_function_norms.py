"""`nn.SyncBatchNorm` in a train function."""

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
def test_sync_batch_norm_matches_one_process(world: int, momentum: float | None) -> None:
    """Two models in sequence, each with its own statistics."""

    def models() -> tuple[nn.Module, nn.Module]:
        wide, narrow = (nn.BatchNorm1d(n, momentum=momentum).double() for n in (6, 1))
        first, _, last = model_of().children()
        return nn.Sequential(first, wide, nn.Tanh(), last), narrow

    def steps(first: nn.Module, second: nn.Module, rank: int = 0, world: int = 1) -> None:
        optimizer = torch.optim.SGD([*first.parameters(), *second.parameters()], lr=0.1)
        for _ in range(4):
            inputs, targets = (tensor[rank::world] for tensor in data_of().tensors)
            backward((second(first(inputs)) - targets).square().mean())
            optimizer.step()
            optimizer.zero_grad()

    def train(config: Any) -> None:
        models_with_sync = map(nn.SyncBatchNorm.convert_sync_batchnorm, models())
        context = distplat.get_context()
        first, second = distplat.prepare(*models_with_sync)
        steps(first, second, context.rank, context.world_size)

    whole = models()
    steps(*whole)
    expected = {f"{n}.{k}": v for n, m in enumerate(whole) for k, v in m.state_dict().items()}
    for trained in call_on_ranks(train, world).trained:
        assert trained.keys() == expected.keys()
        for name, value in expected.items():
            assert torch.allclose(trained[name], value, rtol=1e-10, atol=1e-12), name


class Branching(nn.Module):
    """A model with an optional layer, which rank 1 does not use in the second step."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(3, 4).double(), nn.SyncBatchNorm(4).double()
        self.out, self.extra = (nn.Linear(4, 4).double() for _ in range(2))

    def forward(self, x: Tensor, extra: bool) -> Tensor:
        y: Tensor = self.out(torch.relu(self.norm(self.first(x))))
        return y + self.extra(y) if extra else y


def test_overlap_with_a_parameter_unused_on_one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other rank's hook must not block on the bucket: `SyncBatchNorm` needs both ranks."""
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

    def train_with(overlap: bool) -> list[dict[str, Tensor]]:
        strategy = {"name": "ring", "bucket_mb": 1e-4, "overlap": overlap}
        return call_on_ranks(train, job=function_job(2, strategy=strategy)).trained

    references = train_with(overlap=False)
    block_starts(monkeypatch, start_waits=True)
    for trained, expected in zip(train_with(overlap=True), references, strict=True):
        for name, value in expected.items():
            assert torch.equal(trained[name], value), name


def with_norm(*, synced: bool = False) -> nn.Module:
    first, _, last = model_of().children()
    norm = nn.SyncBatchNorm(6) if synced else nn.BatchNorm1d(6)
    return nn.Sequential(first, norm.double(), nn.Tanh(), last)


@pytest.mark.parametrize("strategy", ["ring", "ps-sync"])
def test_copy_of_a_model_synchronizes_its_batch_norm(strategy: str) -> None:
    """A teacher in training mode whose weights follow the student's."""

    def steps(student: nn.Module, rank: int = 0, world: int = 1) -> None:
        teacher = copy.deepcopy(student).requires_grad_(False)
        optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
        for _ in range(4):
            inputs, targets = (tensor[rank::world] for tensor in data_of().tensors)
            backward((student(inputs) - 0.1 * teacher(inputs) - targets).square().mean())
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                for mean, parameter in zip(teacher.parameters(), student.parameters(), strict=True):
                    mean.lerp_(parameter, 0.1)

    def train(config: Any) -> None:
        context = distplat.get_context()
        model = distplat.prepare(with_norm(synced=True))
        steps(model, context.rank, context.world_size)

    whole = with_norm()
    steps(whole)
    for trained in call_on_ranks(train, job=function_job(2, strategy=strategy)).trained:
        for name, value in whole.state_dict().items():
            assert torch.allclose(trained[name], value, rtol=1e-10, atol=1e-12), name


def test_model_may_contain_a_copy_of_itself() -> None:
    """As the teacher of BYOL, which is a submodule of the student."""

    def train(config: Any) -> None:
        model = distplat.prepare(with_norm(synced=True))
        model[0].teacher = copy.deepcopy(model).requires_grad_(False)
        inputs, _ = data_of().tensors
        backward((model(inputs) - model[0].teacher(inputs) - 1).square().mean())

    call_on_ranks(train, 2)


def test_rejects_sync_batch_norm_after_prepare() -> None:
    def train(config: Any) -> None:
        convert: Any = nn.SyncBatchNorm.convert_sync_batchnorm
        model = convert(distplat.prepare(with_norm()))
        inputs, targets = data_of().tensors
        backward((model(inputs) - targets).square().mean())

    with pytest.raises(SpecError, match=r"'1' of the model became nn\.SyncBatchNorm after prepare"):
        call_on_ranks(train, 2)
    call_on_ranks(train, 1)
