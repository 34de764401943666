"""
`nn.SyncBatchNorm` over all ranks matches one batch norm over the whole batch.

The reference is a plain loop with `nn.BatchNorm`. The last batch has two samples, so that some
ranks have none.
"""

import copy
from typing import Any

import pytest
import torch
from blocking_starts import block_starts
from jobs import job_of
from local_run import train
from rank_threads import on_ranks
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from distplat.platform.errors import SpecError
from distplat.platform.sampler import Sampler
from distplat.platform.spec import Job
from distplat.strategies.fakes import Fabric
from distplat.strategies.model.sync_batch_norm import SyncNorms
from distplat.strategies.task import Task

SAMPLES, BATCH, STEPS = 18, 8, 7
DTYPE = torch.float64


class PlainTask(Task):
    """Residual network in which one output and one layer are used twice."""

    def model(self) -> nn.Module:
        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.first = nn.Conv2d(2, 4, 3, padding=1, dtype=DTYPE)
                self.norm = nn.BatchNorm2d(4, dtype=DTYPE)
                self.second = nn.Conv2d(4, 4, 3, padding=1, dtype=DTYPE)
                self.plain = nn.BatchNorm2d(4, affine=False, momentum=None, dtype=DTYPE)
                self.out = nn.Linear(4, 3, dtype=DTYPE)

            def forward(self, x: Tensor) -> Tensor:
                x = torch.relu(self.norm(self.first(x)))
                x = x + self.plain(self.norm(self.second(x)))
                outputs: Tensor = self.out(x.mean((2, 3)))
                return outputs

        return Net()

    def train_data(self) -> TensorDataset:
        generator = torch.Generator().manual_seed(1)
        x = 3 + torch.randn(SAMPLES, 2, 4, 4, generator=generator, dtype=DTYPE)
        return TensorDataset(x, torch.randn(SAMPLES, 3, generator=generator, dtype=DTYPE))

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs - targets).square().mean()


def with_sync_batch_norm(model: nn.Module) -> nn.Module:
    """Replace batch norms with `nn.SyncBatchNorm`."""
    convert: Any = nn.SyncBatchNorm.convert_sync_batchnorm
    converted: nn.Module = convert(model)
    return converted


class SyncTask(PlainTask):
    def model(self) -> nn.Module:
        return with_sync_batch_norm(super().model())

    def eval_data(self) -> TensorDataset:
        return self.train_data()


def job(strategy: Any, world: int, **more: Any) -> Job:
    fields = {
        "optimizer": {"name": "SGD", "lr": 0.1, "momentum": 0.9},
        "steps": STEPS,
        "global_batch_size": BATCH,
        **more,
    }
    return job_of(strategy, world, **fields)


def train_plain() -> dict[str, Tensor]:
    torch.manual_seed(0)
    task = PlainTask()
    model, data = task.model(), task.train_data()
    sampler = Sampler(SAMPLES, BATCH, 1, 0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for step in range(STEPS):
        inputs, targets = data[sampler.batch_ids(step).tolist()]
        optimizer.zero_grad()
        torch.autograd.backward(task.loss(model.train()(inputs), targets))
        optimizer.step()
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


RING = {"name": "ring", "bucket_mb": 1e-4}
"""About one bucket per parameter."""


@pytest.mark.sweep(4)
@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize("strategy", [RING, {**RING, "overlap": False}, "ps-sync"])
def test_matches_one_process_for_any_world(strategy: Any, world: int) -> None:
    run, expected = train(job(strategy, world), SyncTask), train_plain()
    for rank in range(world):
        for name, value in run.parameters(rank).items():
            assert torch.allclose(value, expected[name], rtol=0, atol=1e-10), (name, rank)


def test_overlap_with_unequal_numbers_of_micro_batches(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In the last batch one rank has two samples, the other one."""
    block_starts(monkeypatch, start_waits=False)
    parts = {"global_batch_size": 5, "steps": 5, "gradient_accumulation": 2}
    overlapped, expected = (
        train(job({**RING, "overlap": overlap}, 2, **parts), SyncTask).parameters()
        for overlap in (True, False)
    )
    assert overlapped.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(overlapped[name], value), name


class Branching(SyncTask):
    """In the second step one of two ranks does not use a parameter."""

    def model(self) -> nn.Module:
        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.first, self.out = nn.Linear(3, 4, dtype=DTYPE), nn.Linear(4, 2, dtype=DTYPE)
                self.norm = nn.SyncBatchNorm(4, dtype=DTYPE)
                self.extra = nn.Linear(2, 2, dtype=DTYPE)

            def forward(self, x: Tensor) -> Tensor:
                y: Tensor = self.out(torch.relu(self.norm(self.first(x))))
                return y if (x[:, 0] > 0).any() else y + self.extra(y)

        return Net()

    def train_data(self) -> TensorDataset:
        x = torch.randn(16, 3, generator=torch.Generator().manual_seed(1), dtype=DTYPE)
        x[:, 0] = -1.0
        x[5, 0] = 1.0
        return TensorDataset(x, torch.zeros(16, 2, dtype=DTYPE))


def test_parameter_without_gradient_on_one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bucket is complete on one rank only, whose hook must not block the norm's exchange."""
    parts = {"global_batch_size": 4, "steps": 3, "data": {"shuffle": False}}
    expected = train(job({**RING, "overlap": False}, 2, **parts), Branching).parameters()
    block_starts(monkeypatch, start_waits=True)
    actual = train(job(RING, 2, **parts), Branching).parameters()
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


@pytest.mark.parametrize("micro_batches", [[2, 1, 0], [0, 3, 3], [1, 1, 2], [2, 2, 2]])
def test_any_number_of_micro_batches_per_rank(micro_batches: list[int]) -> None:
    """The n-th micro-batches of all ranks are normalized as one batch."""
    torch.manual_seed(0)
    world, most = len(micro_batches), max(micro_batches)
    sizes = [[2 + rank + n for n in range(count)] for rank, count in enumerate(micro_batches)]
    parts = [[torch.randn(size, 2, 4, 4, dtype=DTYPE) for size in rank] for rank in sizes]
    reference = PlainTask().model().train()
    models = [with_sync_batch_norm(copy.deepcopy(reference)) for _ in range(world)]
    fabric = Fabric(world)

    def body(rank: int) -> None:
        norms = SyncNorms.of(models[rank], fabric.collective(rank), lambda step: micro_batches)
        assert norms is not None
        for step in range(2):
            for x in parts[rank]:
                models[rank](x).square().sum().backward()
            norms.finish(step)

    on_ranks(world, body)
    for _ in range(2):
        for n in range(most):
            micro_batch = [rank[n] for rank in parts if len(rank) > n]
            reference(torch.cat(micro_batch)).square().sum().backward()
    for name, parameter in reference.named_parameters():
        gradient = sum(grad for m in models if (grad := m.get_parameter(name).grad) is not None)
        assert torch.allclose(
            torch.as_tensor(gradient), _grad(parameter), rtol=1e-10, atol=1e-10
        ), name
    longest = models[micro_batches.index(most)]
    for name, buffer in reference.named_buffers():
        assert torch.allclose(longest.get_buffer(name), buffer, rtol=0, atol=1e-12), name


def _grad(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_preserves_dtype_and_accuracy_with_large_mean(dtype: torch.dtype) -> None:
    fabric, outputs = Fabric(2), {}
    x = (1000 + torch.randn(64, 3)).to(dtype)

    def body(rank: int) -> None:
        layer = nn.SyncBatchNorm(3)
        group = fabric.collective(rank)
        norms = SyncNorms.of(nn.Sequential(layer), group, lambda step: [1, 1])
        assert norms is not None
        outputs[rank] = layer(x[rank::2])

    on_ranks(2, body)
    expected = nn.BatchNorm1d(3)(x.float())
    for rank in range(2):
        assert outputs[rank].dtype is dtype
        error = (outputs[rank].float() - expected[rank::2]).abs().max()
        assert error < (1e-3 if dtype is torch.float32 else 2e-2)


def test_rejects_one_value_per_channel_like_torch() -> None:
    """Rank 1 has no micro-batch, so one value of rank 0 is the only one of all ranks."""
    fabric = Fabric(2)

    def body(rank: int) -> None:
        model = nn.Sequential(nn.SyncBatchNorm(3))
        norms = SyncNorms.of(model, fabric.collective(rank), lambda step: [1, 0])
        assert norms is not None
        if rank == 0:
            with pytest.raises(ValueError, match="more than 1 value per channel over all ranks"):
                model(torch.zeros(1, 3))
        norms.finish(0)

    on_ranks(2, body)


def test_close_restores_layers() -> None:
    layer = nn.SyncBatchNorm(3)
    model = nn.Sequential(layer)
    fabric = Fabric(2)

    def body(rank: int) -> SyncNorms | None:
        rank_model = model if rank == 0 else nn.Sequential(nn.SyncBatchNorm(3))
        return SyncNorms.of(rank_model, fabric.collective(rank), lambda step: [1, 1])

    norms = on_ranks(2, body)[0]
    assert norms is not None
    assert "forward" in vars(layer)
    assert [*model.state_dict()] == [*nn.Sequential(nn.BatchNorm1d(3)).state_dict()]
    norms.close()
    assert "forward" not in vars(layer)


@pytest.mark.parametrize(
    "strategy",
    [
        "ps-async",
        {"name": "ps-sync", "backup_workers": 1},
        {"name": "hybrid", "pipeline": 1, "data": 2},
    ],
)
def test_rejects_strategies_without_lockstep(strategy: Any) -> None:
    with pytest.raises(SpecError, match=r"norm' is nn.SyncBatchNorm"):
        train(job(strategy, 2), SyncTask)
