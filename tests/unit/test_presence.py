"""Models whose layers are not all used, or not always: as in plain torch, where grad is None."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from jobs import job_of
from local_run import train
from plain_loss import mean_loss
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from distplat.platform.errors import SpecError
from distplat.platform.spec import Job
from distplat.strategies.task import Task

STEPS, BATCH = 6, 8
GENERATOR = torch.Generator().manual_seed(1)
X = torch.randn(20, 6, generator=GENERATOR, dtype=torch.float64)
Y = torch.randn(20, 3, generator=GENERATOR, dtype=torch.float64)

STRATEGIES: dict[str, Any] = {
    "ring": "ring",
    "sharded": {"name": "ring", "shard_optimizer": True},
    "ps-sync": "ps-sync",
    "two-servers": {"name": "ps-sync", "num_servers": 2},
}


def job(strategy: Any, world: int, **more: Any) -> Job:
    fields = {
        "optimizer": {"name": "Adam", "lr": 0.1, "weight_decay": 0.1},
        "steps": STEPS,
        "global_batch_size": BATCH,
        "data": {"shuffle": False},
        "evaluation": {"every_epochs": 0},
        **more,
    }
    return job_of(strategy, world, **fields)


class Base(Task):
    """Twenty samples: batches of 8, 8 and 4, so that a third rank has few."""

    dtype = torch.float64

    def train_data(self) -> TensorDataset:
        return TensorDataset(X.to(self.dtype), Y.to(self.dtype))

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs - targets).square().mean()


class Unused(Base):
    """A head that no batch uses."""

    def model(self) -> nn.Module:
        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.used, self.unused = nn.Linear(6, 3).double(), nn.Linear(6, 3).double()

            def forward(self, x: Tensor) -> Tensor:
                result: Tensor = self.used(x)
                return result

        return Net()


class Sometimes(Base):
    """An expert that every third step uses, and one that only some samples use."""

    def model(self) -> nn.Module:
        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a, self.b, self.c = (nn.Linear(6, 3).double() for _ in range(3))
                self.n = 0

            def forward(self, x: Tensor) -> Tensor:
                result: Tensor = self.a(x)
                if self.training:
                    if self.n % 3 == 0:
                        result = result + self.b(x)
                    self.n += 1
                few = x[:, 0] > 1.2  # in the first step on one rank only
                if few.any():
                    result = result + few[:, None] * self.c(x)
                return result

        return Net()


class ZeroGrad(Base):
    """zero_grad() in forward: gradients are None there."""

    set_to_none = True

    def model(self) -> nn.Module:
        how = self.set_to_none

        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a = nn.Linear(6, 3).double()

            def forward(self, x: Tensor) -> Tensor:
                if self.training:
                    self.zero_grad(set_to_none=how)
                result: Tensor = self.a(x)
                return result

        return Net()


class InPlaceZeroGrad(ZeroGrad):
    set_to_none = False


class Unfrozen(Base):
    """A layer that is frozen for three steps."""

    def model(self) -> nn.Module:
        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a, self.b = nn.Linear(6, 6).double(), nn.Linear(6, 3).double()
                self.n = 0
                self.a.requires_grad_(False)

            def forward(self, x: Tensor) -> Tensor:
                if self.training:
                    if self.n == 3:
                        self.a.requires_grad_(True)
                    self.n += 1
                result: Tensor = self.b(torch.tanh(self.a(x)))
                return result

        return Net()


class Mixed(Base):
    """Layers of four types."""

    def model(self) -> nn.Module:
        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                types = torch.float64, torch.float32, torch.bfloat16, torch.float64, torch.float16
                self.layers = nn.ModuleList(nn.Linear(6, 6).to(kind) for kind in types)
                self.head = nn.Linear(6, 3).double()

            def forward(self, x: Tensor) -> Tensor:
                for layer in self.layers:
                    x = torch.tanh(layer(x.to(next(layer.parameters()).dtype)))
                result: Tensor = self.head(x.double())
                return result

        return Net()


def plain(of: Job, kind: type[Task]) -> dict[str, Tensor]:
    """The loop that a user would write."""
    task = kind()
    torch.manual_seed(of.seed)
    model = task.model()
    arguments = of.optimizer.arguments()
    optimizer = getattr(torch.optim, of.optimizer.name)(model.parameters(), **arguments)
    made = 0
    while made < STEPS:
        for start in range(0, len(X), BATCH):
            if made == STEPS:
                break
            optimizer.zero_grad()
            inputs, targets = task.train_data()[start : start + BATCH]
            torch.autograd.backward(mean_loss(task, model(inputs), targets))
            if of.clip_norm is not None:
                nn.utils.clip_grad_norm_(model.parameters(), of.clip_norm)
            optimizer.step()
            made += 1
    return model.state_dict()


def compare(of: Job, kind: type[Task], limit: float = 1e-10) -> None:
    expected, ours = plain(of, kind), train(of, kind).parameters()
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(ours[name], value, rtol=limit, atol=limit, msg=name)


@pytest.mark.sweep(3)
@pytest.mark.parametrize("clip_norm", [None, 0.1])
@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("strategy", STRATEGIES.values(), ids=STRATEGIES)
@pytest.mark.parametrize("kind", [Unused, Sometimes, ZeroGrad, InPlaceZeroGrad])
def test_as_a_plain_loop(
    kind: type[Task], strategy: Any, world: int, clip_norm: float | None
) -> None:
    compare(job(strategy, world, clip_norm=clip_norm), kind)


@pytest.mark.parametrize("strategy", STRATEGIES.values(), ids=STRATEGIES)
def test_a_model_of_several_types(strategy: Any) -> None:
    """
    Alone to the last place of float16; torch's norms of halves are rounded to 8 or 11 bits before
    they clip all layers, and sums of halves over ranks are rounded, too.
    """
    momentum = {"name": "SGD", "lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}
    compare(job(strategy, 1, optimizer=momentum), Mixed, 2e-4)
    compare(job(strategy, 1, optimizer=momentum, clip_norm=0.5), Mixed, 2e-3)
    compare(job(strategy, 3, optimizer=momentum, clip_norm=0.5), Mixed, 1e-2)


@pytest.mark.parametrize("strategy", STRATEGIES.values(), ids=STRATEGIES)
@pytest.mark.parametrize("optimizer", ["SGD", "Adam"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_of_halves_is_trained(strategy: Any, optimizer: str, dtype: torch.dtype) -> None:
    class Half(Base):
        def model(self) -> nn.Module:
            return nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 3)).to(dtype)

    Half.dtype = dtype
    # In float16 the usual eps is zero, and so are squares of small gradients: 0 / 0, as in torch.
    eps = {"eps": 1e-3} if optimizer == "Adam" else {}
    of = job(strategy, 2, optimizer={"name": optimizer, "lr": 0.05, **eps})
    torch.manual_seed(of.seed)
    start = Half().model().state_dict()
    expected, ours = plain(of, Half), train(of, Half).parameters()
    for name, value in expected.items():
        moved, wanted = (ours[name] - start[name]).float(), (value - start[name]).float()
        assert (moved - wanted).norm() < 0.2 * wanted.norm(), name


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("strategy", [STRATEGIES[n] for n in ("ring", "ps-sync", "two-servers")])
@pytest.mark.parametrize("clip_norm", [None, 0.1])
def test_a_layer_is_unfrozen(strategy: Any, world: int, clip_norm: float | None) -> None:
    compare(job(strategy, world, clip_norm=clip_norm), Unfrozen)


def test_the_tail_is_not_unfrozen_under_a_sharded_optimizer() -> None:
    with pytest.raises(SpecError, match=r"step 4: 'a\.weight' has requires_grad=True"):
        train(job(STRATEGIES["sharded"], 2), Unfrozen)


def with_accumulation(kind: type[Task]) -> Callable[[], object]:
    return lambda: train(job("ring", 1, gradient_accumulation=2), kind)


def test_earlier_micro_batches_are_not_lost() -> None:
    compare(job("ring", 1, gradient_accumulation=2), ZeroGrad)
    compare(job("ps-sync", 2, gradient_accumulation=2), ZeroGrad)
    with pytest.raises(SpecError, match=r"'a\.weight' away between micro-batches"):
        with_accumulation(InPlaceZeroGrad)()


@pytest.mark.parametrize("compression", ["fp16", "bf16", "topk", "powersgd"])
def test_several_types_are_not_compressed(compression: str) -> None:
    of = job({"name": "ring", "compression": compression}, 2)
    with pytest.raises(SpecError, match="the trainable parameters are bfloat16 and float16 and"):
        train(of, Mixed)
