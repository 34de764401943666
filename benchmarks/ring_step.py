"""
One whole training step of an MLP of 10.5 M parameters on 2 workers: forward to update.

Ours: `ring` under Trainer. Peer: torch DDP over gloo under Ray Train's TorchTrainer. Same layers,
batch, data, optimizer (SGD with momentum) and threads; each side runs alone, in turn with the
other. A worker's time of a step is taken from loss to loss in its own process; the first steps are
left out.
"""

import argparse
import statistics
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import ray
import torch
from common import WORKERS, alternately, print_ratio
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from distplat import Task, Trainer

GOAL = 1.0
WIDTH, BATCH, WARM = 1024, 128, 10


def mlp() -> nn.Module:
    """Ten linear layers of 1024: 10.5 M parameters."""
    parts: list[nn.Module] = []
    for _ in range(10):
        parts += [nn.Linear(WIDTH, WIDTH), nn.ReLU()]
    return nn.Sequential(*parts[:-1])


def samples(steps: int) -> TensorDataset:
    """Random inputs; each step sees the same few."""
    inputs = torch.randn(BATCH, WIDTH, generator=torch.Generator().manual_seed(0))
    return TensorDataset(inputs.repeat(steps, 1), inputs.repeat(steps, 1))


class Timed(Task):
    """Writes down when each loss was asked for."""

    def __init__(self, steps: int, folder: str) -> None:
        self.steps, self.folder = steps, folder
        self.times: list[float] = []

    def model(self) -> nn.Module:
        return mlp()

    def train_data(self) -> Dataset[Any]:
        return samples(self.steps)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        self.times.append(time.perf_counter())
        if len(self.times) == self.steps:
            write_times(self.folder, self.times)
        return nn.functional.mse_loss(outputs, targets)


def write_times(folder: str, times: list[float]) -> None:
    """Leave one rank's median step where the driver finds it."""
    gaps = [b - a for a, b in zip(times[WARM:], times[WARM + 1 :], strict=False)]
    Path(folder, f"{time.monotonic_ns()}").write_text(str(statistics.median(gaps)))


def read_times(folder: str) -> float:
    """Give the slowest rank's milliseconds."""
    return max(float(p.read_text()) for p in Path(folder).iterdir() if p.is_file()) * 1e3


def ours(strategy: str, steps: int) -> float:
    """Train under distplat; give milliseconds per step."""
    with TemporaryDirectory() as folder, TemporaryDirectory() as runs:
        job = {
            "name": "bench",
            "strategy": strategy,
            "scaling": {"num_workers": WORKERS},
            "optimizer": {"name": "SGD", "lr": 1e-3, "momentum": 0.9},
            "task_args": {"steps": steps, "folder": folder},
            "global_batch_size": BATCH,
            "steps": steps,
            "storage_path": runs,
            "checkpoint": {"save_final": False},
        }
        Trainer(job, Timed).fit()
        return read_times(folder)


def train_loop(config: dict[str, Any]) -> None:
    """Train as Ray Train's users write it."""
    import ray.train.torch
    from torch.utils.data import DataLoader

    torch.set_num_threads(1)
    model = ray.train.torch.prepare_model(mlp())
    loader = DataLoader(samples(config["steps"]), batch_size=BATCH // WORKERS)
    loader = ray.train.torch.prepare_data_loader(loader)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    times = []
    for inputs, targets in loader:
        outputs = model(inputs)
        times.append(time.perf_counter())
        loss = nn.functional.mse_loss(outputs, targets)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
    write_times(config["folder"], times)


def peer(steps: int) -> float:
    """Train under Ray Train; give milliseconds per step."""
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    with TemporaryDirectory() as folder, TemporaryDirectory() as runs:
        TorchTrainer(
            train_loop,
            train_loop_config={"steps": steps, "folder": folder},
            scaling_config=ScalingConfig(num_workers=WORKERS),
            torch_config=TorchConfig(backend="gloo"),
            run_config=RunConfig(storage_path=runs),
        ).fit()
        return read_times(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    ray.init(
        address="local",
        include_dashboard=False,
        num_cpus=4,
        logging_level="warning",
        log_to_driver=False,
    )
    for strategy in ("ring", "ps-sync"):
        mine, other = alternately(
            lambda strategy=strategy: ours(strategy, args.steps),  # type: ignore[misc]
            lambda: peer(args.steps),
            args.rounds,
        )
        print_ratio(f"{strategy} training step, MLP 10.5 M", mine, other, GOAL)
    ray.shutdown()


if __name__ == "__main__":
    main()
