"""
One training step on 2 workers, forward to update: an MLP of 10.5 M parameters, a conv net.

distplat: `ring` (each worker updates all parameters, or its part) and `ps-sync` under Trainer.
Peer: torch DDP over gloo under Ray Train's TorchTrainer. Both have the same layers, batch, data,
optimizer (SGD with momentum) and threads, and run alternately. The time of a step is measured from
loss to loss in each worker, without the first steps. The MLP is bound by communication, the conv
net by compute.
"""

import argparse
import statistics
import time
from functools import partial
from inspect import signature
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import ray
import torch
from common import WORKERS, alternately, print_ratio
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from distplat import Task, Trainer

STRATEGIES: dict[str, Any] = {
    "ring": "ring",
    "ring, shard_optimizer": {"name": "ring", "shard_optimizer": True},
    "ps-sync": "ps-sync",
}
GOALS = {
    ("mlp", "ring"): 0.75,
    ("mlp", "ring, shard_optimizer"): 0.75,
    ("mlp", "ps-sync"): 1.0,
    ("conv", "ring"): 1.0,
}
WIDTH, BATCH, WARM = 1024, 128, 10
QUIET: dict[str, Any] = {"progress": False} if "progress" in signature(Trainer).parameters else {}
"""An earlier checkout, run by `step_overhead.py --baseline`, has no such word and draws nothing."""


def mlp() -> nn.Module:
    """Return ten linear layers of 1024 with 10.5 M parameters."""
    parts: list[nn.Module] = []
    for _ in range(10):
        parts += [nn.Linear(WIDTH, WIDTH), nn.ReLU()]
    return nn.Sequential(*parts[:-1])


def conv() -> nn.Module:
    """Return four 3x3 convolutions for images of 32 x 32: 24 k parameters, 0.05 GFLOP a sample."""
    channels = [3, 16, 32, 32, 32]
    parts: list[nn.Module] = []
    for inputs, outputs in pairwise(channels):
        parts += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


MODELS = {"mlp": mlp, "conv": conv}
SHAPES = {"mlp": ((WIDTH,), (WIDTH,)), "conv": ((3, 32, 32), (10,))}


def samples(steps: int, kind: str = "mlp") -> Dataset[Any]:
    """A few random inputs and targets, repeated in each step."""
    generator = torch.Generator().manual_seed(0)
    inputs, targets = (torch.randn(BATCH, *s, generator=generator) for s in SHAPES[kind])
    return Repeated(TensorDataset(inputs, targets), steps)


class Repeated(Dataset[Any]):
    """A data set repeated without a copy."""

    def __init__(self, data: TensorDataset, times: int) -> None:
        self.data, self.times = data, times

    def __len__(self) -> int:
        return len(self.data) * self.times

    def __getitem__(self, index: int) -> Any:
        return self.data[index % len(self.data)]


class Timed(Task):
    """Records the time of each loss."""

    def __init__(self, steps: int, folder: str, kind: str) -> None:
        self.steps, self.folder, self.kind = steps, folder, kind
        self.times: list[float] = []

    def model(self) -> nn.Module:
        return MODELS[self.kind]()

    def train_data(self) -> Dataset[Any]:
        return samples(self.steps, self.kind)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        self.times.append(time.perf_counter())
        if len(self.times) == self.steps:
            write_times(self.folder, self.times)
        return nn.functional.mse_loss(outputs, targets)


def write_times(folder: str, times: list[float]) -> None:
    """Write one rank's median step time to a file for the driver."""
    gaps = [b - a for a, b in zip(times[WARM:], times[WARM + 1 :], strict=False)]
    Path(folder, f"{time.monotonic_ns()}").write_text(str(statistics.median(gaps)))


def read_times(folder: str) -> float:
    """Return the slowest rank's milliseconds."""
    return max(float(p.read_text()) for p in Path(folder).iterdir() if p.is_file()) * 1e3


def ours(strategy: object, steps: int, kind: str, **fields: Any) -> float:
    """Train under distplat; return milliseconds per step. `fields` are further job fields."""
    with TemporaryDirectory() as folder, TemporaryDirectory() as runs:
        job = {
            "name": "bench",
            "strategy": strategy,
            "scaling": {"num_workers": WORKERS},
            "optimizer": {"name": "SGD", "lr": 1e-3, "momentum": 0.9},
            "task_args": {"steps": steps, "folder": folder, "kind": kind},
            "global_batch_size": BATCH,
            "steps": steps,
            "storage_path": runs,
            "checkpoint": {"save_final": False},
            **fields,
        }
        Trainer(job, Timed, **QUIET).fit()
        return read_times(folder)


def train_loop(config: dict[str, Any]) -> None:
    """Train function for Ray Train."""
    import ray.train.torch
    from torch.utils.data import DataLoader

    torch.set_num_threads(1)
    model = ray.train.torch.prepare_model(MODELS[config["kind"]]())
    data = samples(config["steps"], config["kind"])
    loader = DataLoader(data, batch_size=BATCH // WORKERS)
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


def peer(steps: int, kind: str) -> float:
    """Train under Ray Train; return milliseconds per step."""
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    with TemporaryDirectory() as folder, TemporaryDirectory() as runs:
        TorchTrainer(
            train_loop,
            train_loop_config={"steps": steps, "folder": folder, "kind": kind},
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
    for (kind, strategy), goal in GOALS.items():
        mine, other = alternately(
            partial(ours, STRATEGIES[strategy], args.steps, kind),
            partial(peer, args.steps, kind),
            args.rounds,
        )
        print_ratio(f"{strategy} training step, {kind}", mine, other, goal)
    ray.shutdown()


if __name__ == "__main__":
    main()
