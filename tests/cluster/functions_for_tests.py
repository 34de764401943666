"""Train functions of the cluster tests, imported by name."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.autograd import backward
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, TensorDataset

import distplat
from distplat.platform.torchrun import ALONE


def data_of() -> TensorDataset:
    inputs = torch.randn(24, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return TensorDataset(inputs, inputs.square().sum(1, keepdim=True))


def model_of() -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(values)
    return model


def train(config: dict[str, Any]) -> None:
    """Train four epochs; kill rank 1 before epoch `kill_in`; wait before `wait_in` for the kill."""
    model = model_of()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    batch = config["batch_size"] // distplat.get_context().get_world_size()
    loader = DataLoader(data_of(), batch_size=batch, shuffle=True)
    model, optimizer, loader = distplat.prepare(model, optimizer, loader)
    first = 0
    if (saved := distplat.get_checkpoint()) is not None:
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        first = saved["epoch"]
    for epoch in range(first, 4):
        if epoch == config.get("kill_in") and distplat.get_context().get_world_rank() == 1:
            _kill_once(Path(config["folder"]))
        while epoch == config.get("wait_in") and not (Path(config["folder"]) / "killed").exists():
            time.sleep(0.05)
        loader.set_epoch(epoch)
        for inputs, targets in loader:
            loss = (model(inputs) - targets).square().mean()
            backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        figures = {"loss": loss, "began_with": first}
        distplat.report(figures, checkpoint={**state, "epoch": epoch + 1})


class Rows(IterableDataset[Any]):
    """The samples as a stream."""

    def __iter__(self) -> Iterator[Any]:
        return iter(data_of())


def streamed(config: dict[str, Any]) -> None:
    """Train two epochs on a stream; rank 1 is killed before step `kill_in`. Saves every step."""
    model, step = model_of(), 0
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    batch = config["batch_size"] // distplat.get_context().get_world_size()
    loader = DataLoader(Rows(), batch_size=batch, num_workers=config.get("loaders", 0))
    model, optimizer, loader = distplat.prepare(model, optimizer, loader)
    first = 0
    if (saved := distplat.get_checkpoint()) is not None:
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        loader.load_state_dict(saved["loader"])
        first, step = saved["epoch"], saved["step"]
    start_step = step
    for epoch in range(first, 2):
        for inputs, targets in loader:
            if step == config.get("kill_in") and distplat.get_context().get_world_rank() == 1:
                _kill_once(Path(config["folder"]))
            loss = (model(inputs) - targets).square().mean()
            backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            position = {"loader": loader.state_dict(), "epoch": epoch, "step": step}
            distplat.report(
                {"loss": loss, "began_with": start_step}, checkpoint={**state, **position}
            )


def _kill_once(folder: Path) -> None:
    marker = folder / "killed"
    if marker.exists():
        return
    marker.touch()
    while not [*folder.glob("*/checkpoints/*/state.json")]:
        time.sleep(0.05)
    os.kill(os.getpid(), signal.SIGKILL)


LOCAL_RANK = int(os.environ.get("LOCAL_RANK", -1))


def script(batch_size: int, folder: str, *, kill_in: int = -1, raise_in: int = -1) -> None:
    """Train as a DDP script with two changed lines; rank 1 is killed once, or raises an error."""
    dist.init_process_group("gloo")
    rank = int(os.environ["RANK"])
    assert (rank, LOCAL_RANK) == (dist.get_rank(), int(os.environ["LOCAL_RANK"]))
    assert ALONE.keys() <= os.environ.keys()
    inner = model_of()
    optimizer = torch.optim.AdamW(inner.parameters(), lr=0.05)
    model = DistributedDataParallel(inner)
    distplat.prepare(model, optimizer)  # the second changed line; the first is the import
    sampler: DistributedSampler[Any] = DistributedSampler(data_of(), seed=0)
    loader = DataLoader(data_of(), batch_size // dist.get_world_size(), sampler=sampler)
    for epoch in range(4):
        if rank == 1 and epoch == raise_in:
            raise KeyError("no such column")
        if rank == 1 and epoch == kill_in and not (marker := Path(folder) / "killed").exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        sampler.set_epoch(epoch)
        total = torch.zeros(2)
        for inputs, targets in loader:
            loss = (model(inputs) - targets).square().mean()
            backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            total += torch.tensor([loss.item(), 1.0])
        dist.all_reduce(total)
        distplat.report({"loss": total[0] / total[1], "batches": total[1]})
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, {"rank": rank})
    assert found == [{"rank": number} for number in range(len(found))]
    if rank == 0:
        torch.save(model.module.state_dict(), Path(folder) / "model.pt")
    dist.destroy_process_group()


def parting(config: dict[str, Any]) -> None:
    """Train eight epochs; rank 1 returns after the sixth."""
    if config.get("reduces"):
        dist.init_process_group("gloo")
    model = model_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    loader = DataLoader(data_of(), batch_size=4)
    model, optimizer, loader = distplat.prepare(model, optimizer, loader)
    for epoch in range(8):
        if config.get("reduces"):
            dist.all_reduce(torch.ones(1))
        for inputs, targets in loader:
            backward((model(inputs) - targets).square().mean())
            optimizer.step()
            optimizer.zero_grad()
        distplat.report({"epoch": epoch})
        if epoch == 5 and distplat.get_context().get_world_rank() == 1:
            break
