"""A task or a train function of `__main__`, such as a notebook's cell, on workers with loaders."""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from heads import clean_environ, short_folder
from small_runs import weights

from distplat import Result, Trainer

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("local_ray")]

CELL = """
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import distplat

SCALE = 0.1


def scaled(number):
    return torch.full((3,), SCALE * number)


@dataclass
class Target:
    value: torch.Tensor


class Numbers(Dataset):
    def __len__(self):
        return 20

    def __getitem__(self, place):
        return scaled(place), Target(scaled(place).sum())


def collate(samples):
    inputs, targets = zip(*samples)
    return torch.stack(inputs), Target(torch.stack([one.value for one in targets]))


def loss_of(outputs, targets):
    assert type(targets) is Target
    return (outputs[:, 0] - targets.value).square().mean()


class Sum(distplat.Task):
    def model(self):
        return nn.Linear(3, 1)

    def train_data(self):
        return Numbers()

    def collate(self, samples):
        return collate(samples)

    def loss(self, outputs, targets):
        return loss_of(outputs, targets)


def loop(config):
    torch.manual_seed(0)
    model, size = nn.Linear(3, 1), 4 // distplat.get_context().get_world_size()
    loader = DataLoader(Numbers(), size, collate_fn=collate, num_workers=config["loaders"])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    model, optimizer, loader = distplat.prepare(model, optimizer, loader)
    for inputs, targets in loader:
        loss = loss_of(model(inputs), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    whole = distplat.gather_for_metrics(loss).mean()
    distplat.report({"loss": whole})
"""
OF_TASK = {"optimizer": {"name": "SGD", "lr": 0.01}, "global_batch_size": 4, "epochs": 1}


def fit(what: str, strategy: str, workers: int, loaders: int, folder: Path) -> Result:
    """Train what a cell has made, in the module that a cell runs in."""
    made: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(CELL, "<cell 1>", "exec"), made)
    of_task = {**OF_TASK, "data": {"num_workers": loaders}}
    fields = of_task if what == "Sum" else {"task_args": {"loaders": loaders}}
    scaling = {"num_workers": workers, "resources_per_worker": {"CPU": 0.5}}
    job = {"name": "cell", "strategy": strategy, "scaling": scaling, "storage_path": str(folder)}
    return Trainer({**job, **fields}, made[what], progress=False).fit()


def test_loader_processes_change_nothing(tmp_path: Path) -> None:
    """With a cell's classes, which a worker gets, and its loaders from it."""
    alone, loaded = (fit("Sum", "ps-sync", one, 2 * one, tmp_path) for one in (0, 1))
    assert weights(alone).tobytes() == weights(loaded).tobytes()


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ring", "ps-sync"])
@pytest.mark.parametrize("what", ["Sum", "loop"])
def test_two_workers_train_what_a_cell_has_made(what: str, strategy: str, tmp_path: Path) -> None:
    alone = fit(what, strategy, 0, 0, tmp_path).metrics["loss"]
    assert fit(what, strategy, 2, 1, tmp_path).metrics["loss"] == pytest.approx(alone, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("flag", ["-", "-c"])
def test_a_script_without_a_file(flag: str, tmp_path: Path) -> None:
    """From standard input, and from the command line; it starts a Ray of its own."""
    home = short_folder()
    job = {"name": "cell", "strategy": "ps-sync", "scaling": {"num_workers": 2}, **OF_TASK}
    job |= {"data": {"num_workers": 1}, "failure": {"start_timeout_s": 300}}
    text = f"{CELL}\nprint('made', distplat.Trainer({job!r}, Sum).fit().history[-1].step)\n"
    environ = {**clean_environ(home, "disabled"), "RAY_ADDRESS": "local"}
    done = subprocess.run(
        [sys.executable, *((flag, text) if flag == "-c" else (flag,))],
        input=text if flag == "-" else "",
        env=environ,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=110,
    )
    shutil.rmtree(home, ignore_errors=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "made 5"
