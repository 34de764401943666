"""Train functions, and plain torch loops to compare with."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from function_ranks import FunctionRun, call_on_ranks, function_job
from torch import Tensor, nn
from torch.autograd import backward
from torch.utils.data import DataLoader, TensorDataset

import distplat

GLOBAL_BATCH = 12
SAMPLES = 48


def model_of(seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(values)
    return model


def data_of() -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(SAMPLES, 4, generator=generator, dtype=torch.float64)
    return TensorDataset(inputs, inputs.square().sum(1, keepdim=True))


def loss_of(model: nn.Module, batch: Any) -> Tensor:
    loss: Tensor = (model(batch[0]) - batch[1]).square().mean()
    return loss


Change = Callable[[nn.Module], object]
Make = Callable[[Any], torch.optim.Optimizer]


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.05)


def momentum(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.02, momentum=0.9)


def adagrad(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adagrad(parameters, lr=0.1)


def train_plain(make: Make, *, epochs: int = 2, clip: float | None = None) -> dict[str, Tensor]:
    model = model_of()
    optimizer = make(model.parameters())
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    for _ in range(epochs):
        for batch in DataLoader(data_of(), batch_size=GLOBAL_BATCH):
            backward(loss_of(model, batch))
            if clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()
        scheduler.step()
    return model.state_dict()


def function_of(
    make: Make,
    world: int,
    *,
    clip: float | None = None,
    set_to_none: bool = True,
) -> Callable[[Mapping[str, Any]], object]:
    def train(config: Mapping[str, Any]) -> None:
        model = model_of(seed=distplat.get_context().rank)  # all ranks get rank 0's model
        optimizer = make(model.parameters())
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
        loader = DataLoader(data_of(), batch_size=GLOBAL_BATCH // world)
        model, optimizer, loader, scheduler = distplat.prepare(model, optimizer, loader, scheduler)
        for _ in range(2):
            for batch in loader:
                loss = loss_of(model, batch)
                backward(loss)
                if clip is not None:
                    nn.utils.clip_grad_norm_(model.parameters(), clip)
                optimizer.step()
                optimizer.zero_grad(set_to_none=set_to_none)
                distplat.report({"loss": loss.item()})
            scheduler.step()

    return train


def assert_equal(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-10)


class Branches(nn.Module):
    """Some ranks use the second branch, and no rank the third."""

    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleList(nn.Linear(4, 1).double() for _ in range(3))

    def forward(self, x: Tensor, *, both: bool) -> Tensor:
        found: Tensor = self.branches[0](x)
        return found + self.branches[1](x) if both else found


def resumable(steps: int) -> Callable[[Mapping[str, Any]], object]:
    def train(config: Mapping[str, Any]) -> None:
        model = model_of()
        optimizer = adam(model.parameters())
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
        loader = DataLoader(data_of(), batch_size=24, shuffle=True)
        model, optimizer, loader = distplat.prepare(model, optimizer, loader)
        first = 0
        if (saved := distplat.get_checkpoint()) is not None:
            model.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
            scheduler.load_state_dict(saved["scheduler"])
            np.random.RandomState().set_state(saved["numpy"])
            first = saved["epoch"]
        for epoch in range(first, steps):
            loader.set_epoch(epoch)
            for batch in loader:
                loss = loss_of(model, batch)
                backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            scheduler.step()
            state = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "scheduler": scheduler.state_dict(),
                "epoch": epoch + 1,
                "best": (0.5, None, [True, "x"]),
                "numpy": np.random.RandomState(3).get_state(),
            }
            distplat.report({"loss": loss}, checkpoint=state)

    return train


SYNC = {"name": "ps-sync", "num_servers": 2}
ASYNC = {"name": "ps-async", "num_servers": 2}

Loop = Callable[[Mapping[str, Any]], object]


def run_under(
    strategy: Mapping[str, Any],
    train: Loop,
    workers: int,
    **more: Any,
) -> FunctionRun:
    return call_on_ranks(train, job=function_job(workers, strategy=strategy), **more)


def train_steps(
    model: nn.Module, optimizer: Any, number: int, rank: int = 0, world: int = 1
) -> None:
    """Train steps with this rank's samples of a batch of twelve."""
    for step in range(number):
        batch = [tensor[12 * step :][:12][rank::world] for tensor in data_of().tensors]
        backward(loss_of(model, batch))
        optimizer.step()
        optimizer.zero_grad()
