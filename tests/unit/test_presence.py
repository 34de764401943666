"""Parameters without a gradient in some or all steps are skipped, as in torch with grad None."""

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


def job(strategy: Any, world: int, **overrides: Any) -> Job:
    fields = {
        "optimizer": {"name": "Adam", "lr": 0.1, "weight_decay": 0.1},
        "steps": STEPS,
        "global_batch_size": BATCH,
        "data": {"shuffle": False},
        "evaluation": {"every_epochs": 0},
        **overrides,
    }
    return job_of(strategy, world, **fields)


class Base(Task):
    """Twenty samples in batches of 8, 8 and 4, so a third rank has few."""

    dtype = torch.float64

    def train_data(self) -> TensorDataset:
        return TensorDataset(X.to(self.dtype), Y.to(self.dtype))

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs - targets).square().mean()


class Unused(Base):
    """One layer is never used."""

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
    """One expert is used in every third step, another by some samples only."""

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
    """Calls zero_grad() in forward."""

    set_to_none = True

    def model(self) -> nn.Module:
        set_to_none = self.set_to_none

        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a = nn.Linear(6, 3).double()

            def forward(self, x: Tensor) -> Tensor:
                if self.training:
                    self.zero_grad(set_to_none=set_to_none)
                result: Tensor = self.a(x)
                return result

        return Net()


class InPlaceZeroGrad(ZeroGrad):
    set_to_none = False


class Unfrozen(Base):
    """One layer is frozen for three steps."""

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
    """Layers of four dtypes."""

    def model(self) -> nn.Module:
        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                dtypes = torch.float64, torch.float32, torch.bfloat16, torch.float64, torch.float16
                self.layers = nn.ModuleList(nn.Linear(6, 6).to(dtype) for dtype in dtypes)
                self.head = nn.Linear(6, 3).double()

            def forward(self, x: Tensor) -> Tensor:
                for layer in self.layers:
                    x = torch.tanh(layer(x.to(next(layer.parameters()).dtype)))
                result: Tensor = self.head(x.double())
                return result

        return Net()


def plain_loop(config: Job, task_class: type[Task]) -> dict[str, Tensor]:
    task = task_class()
    torch.manual_seed(config.seed)
    model = task.model()
    arguments = config.optimizer.arguments()
    optimizer = getattr(torch.optim, config.optimizer.name)(model.parameters(), **arguments)
    steps_done = 0
    while steps_done < STEPS:
        for start in range(0, len(X), BATCH):
            if steps_done == STEPS:
                break
            optimizer.zero_grad()
            inputs, targets = task.train_data()[start : start + BATCH]
            torch.autograd.backward(mean_loss(task, model(inputs), targets))
            if config.clip_norm is not None:
                nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
            optimizer.step()
            steps_done += 1
    return model.state_dict()


def assert_matches_plain_loop(
    config: Job, task_class: type[Task], tolerance: float = 1e-10
) -> None:
    expected, ours = plain_loop(config, task_class), train(config, task_class).parameters()
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(ours[name], value, rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.sweep(3)
@pytest.mark.parametrize("clip_norm", [None, 0.1])
@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("strategy", STRATEGIES.values(), ids=STRATEGIES)
@pytest.mark.parametrize("task_class", [Unused, Sometimes, ZeroGrad, InPlaceZeroGrad])
def test_parameters_without_gradients_match_plain_loop(
    task_class: type[Task], strategy: Any, world: int, clip_norm: float | None
) -> None:
    assert_matches_plain_loop(job(strategy, world, clip_norm=clip_norm), task_class)


@pytest.mark.parametrize("strategy", STRATEGIES.values(), ids=STRATEGIES)
def test_model_of_several_dtypes_matches_plain_loop(strategy: Any) -> None:
    """
    Exact to the last bit of float16 on one rank without clipping. Torch rounds norms in half
    precision to 8 or 11 bits before clipping, and sums over ranks are rounded too.
    """
    momentum = {"name": "SGD", "lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}
    assert_matches_plain_loop(job(strategy, 1, optimizer=momentum), Mixed, 2e-4)
    assert_matches_plain_loop(job(strategy, 1, optimizer=momentum, clip_norm=0.5), Mixed, 2e-3)
    assert_matches_plain_loop(job(strategy, 3, optimizer=momentum, clip_norm=0.5), Mixed, 1e-2)


@pytest.mark.parametrize("strategy", STRATEGIES.values(), ids=STRATEGIES)
@pytest.mark.parametrize("optimizer", ["SGD", "Adam"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_model_in_half_precision_is_trained(
    strategy: Any, optimizer: str, dtype: torch.dtype
) -> None:
    class Half(Base):
        def model(self) -> nn.Module:
            return nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 3)).to(dtype)

    Half.dtype = dtype
    # In float16 the default eps and squares of small gradients are zero: 0 / 0, as in torch.
    eps = {"eps": 1e-3} if optimizer == "Adam" else {}
    config = job(strategy, 2, optimizer={"name": optimizer, "lr": 0.05, **eps})
    torch.manual_seed(config.seed)
    start = Half().model().state_dict()
    expected, ours = plain_loop(config, Half), train(config, Half).parameters()
    for name, value in expected.items():
        update, expected_update = (ours[name] - start[name]).float(), (value - start[name]).float()
        assert (update - expected_update).norm() < 0.2 * expected_update.norm(), name


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("strategy", [STRATEGIES[n] for n in ("ring", "ps-sync", "two-servers")])
@pytest.mark.parametrize("clip_norm", [None, 0.1])
def test_unfrozen_layer_matches_plain_loop(
    strategy: Any, world: int, clip_norm: float | None
) -> None:
    assert_matches_plain_loop(job(strategy, world, clip_norm=clip_norm), Unfrozen)


def test_sharded_optimizer_rejects_an_unfrozen_layer() -> None:
    with pytest.raises(SpecError, match=r"step 4: 'a\.weight' has requires_grad=True"):
        train(job(STRATEGIES["sharded"], 2), Unfrozen)


def with_accumulation(task_class: type[Task]) -> Callable[[], object]:
    return lambda: train(job("ring", 1, gradient_accumulation=2), task_class)


def test_zero_grad_between_micro_batches() -> None:
    assert_matches_plain_loop(job("ring", 1, gradient_accumulation=2), ZeroGrad)
    assert_matches_plain_loop(job("ps-sync", 2, gradient_accumulation=2), ZeroGrad)
    with pytest.raises(SpecError, match=r"'a\.weight' away between micro-batches"):
        with_accumulation(InPlaceZeroGrad)()


@pytest.mark.parametrize("compression", ["fp16", "bf16", "topk", "powersgd"])
def test_compression_of_several_dtypes_is_rejected(compression: str) -> None:
    config = job({"name": "ring", "compression": compression}, 2)
    with pytest.raises(SpecError, match="the trainable parameters are bfloat16 and float16 and"):
        train(config, Mixed)
