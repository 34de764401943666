"""Tasks and functions defined in `__main__` and local scopes, on workers with loaders."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from heads import clean_environ, short_folder
from marks import slow

pytestmark = pytest.mark.cluster

SCRIPT = """
import json, sys
from dataclasses import dataclass

import ray
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
        return 8

    def __getitem__(self, place):
        return scaled(place), Target(scaled(place).sum())


def collate(samples):
    inputs, targets = zip(*samples)
    return torch.stack(inputs), Target(torch.stack([target.value for target in targets]))


def loss_of(outputs, targets):
    assert type(targets) is Target
    return (outputs[:, 0] - targets.value).square().mean()


def local_task():
    class Sum(distplat.Task):
        def model(self):
            return nn.Linear(3, 1)

        def train_data(self):
            return Numbers()

        def collate(self, samples):
            return collate(samples)

        def loss(self, outputs, targets):
            return loss_of(outputs, targets)

    return Sum


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
    distplat.report({"loss": distplat.gather_for_metrics(loss).mean()})


def final_loss(workers, target):
    loaders = int(workers > 0)
    fields = {"task_args": {"loaders": loaders}}
    if target is not loop:
        sgd = {"name": "SGD", "lr": 0.01}
        fields = {"optimizer": sgd, "global_batch_size": 4, "epochs": 1}
        fields["data"] = {"num_workers": loaders}
    scaling = {"num_workers": workers, "resources_per_worker": {"CPU": 0.5}}
    failure = {"start_timeout_s": 300, "step_timeout_s": 300, "heartbeat_timeout_s": 120}
    job = {"name": "cell", "strategy": sys.argv[2], "scaling": scaling, "failure": failure}
    return distplat.Trainer({**job, **fields}, target, progress=False).fit().metrics["loss"]


ray.init(address="local", include_dashboard=False, num_cpus=4, _temp_dir=sys.argv[1])
targets = {"task": local_task(), "function": loop}
counts = 0, int(sys.argv[3])
losses = {name: [final_loss(n, target) for n in counts] for name, target in targets.items()}
print(json.dumps(losses))
"""


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("strategy", "workers"), [("ring", 1), slow("ps-sync", 2)])
def test_script_on_stdin_trains_its_task_and_function(
    strategy: str, workers: int, tmp_path: Path
) -> None:
    """Workers and loaders cannot import the script: its definitions are pickled."""
    home = short_folder()
    environ = {**clean_environ(home, "disabled"), "RAY_ADDRESS": "local"}
    options = {"input": SCRIPT, "text": True, "env": environ, "cwd": tmp_path, "timeout": 550}
    try:
        command = [sys.executable, "-", str(home), strategy, str(workers)]
        completed = subprocess.run(command, capture_output=True, **options)  # type: ignore[call-overload]
    finally:
        shutil.rmtree(home, ignore_errors=True)
    assert completed.returncode == 0, completed.stderr
    for name, (one_process, distributed) in json.loads(completed.stdout.splitlines()[-1]).items():
        assert distributed == pytest.approx(one_process, rel=1e-5), name
