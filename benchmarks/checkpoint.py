"""
Cost of checkpoints for the training: an MLP of 10.5 M parameters under Adam, 126 MB every 10 steps.

distplat: the mean step with and without checkpoints, alternating; the difference times 10 is the
cost of one checkpoint, including the copy and the CPU time of the write.
Peer: `torch.save` of the same state between two steps, as in most loops, with and without sync.
"""

import argparse
import os
import statistics
import time
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import ray
import torch
from common import WORKERS, alternately, print_ratio
from ring_step import BATCH, Timed, mlp

from distplat import Trainer

EVERY, WARM = 10, 25
GOAL = 1.0


class Written(Timed):
    """Records all times instead of their median, since one step in ten has a checkpoint."""

    def loss(self, outputs: Any, targets: Any) -> Any:
        self.times.append(time.perf_counter())
        if len(self.times) == self.steps:
            gaps = [b - a for a, b in zip(self.times[WARM:], self.times[WARM + 1 :], strict=False)]
            name = Path(self.folder, f"{time.monotonic_ns()}")
            name.write_text(" ".join(map(str, gaps)))
        return torch.nn.functional.mse_loss(outputs, targets)


def mean_step(strategy: str, steps: int, every: int | None) -> float:
    """Train; return the slowest rank's mean milliseconds per step, without the first steps."""
    with TemporaryDirectory() as folder, TemporaryDirectory() as runs:
        job = {
            "name": "bench",
            "strategy": strategy,
            "scaling": {"num_workers": WORKERS},
            "optimizer": {"name": "Adam", "lr": 1e-3},
            "task_args": {"steps": steps, "folder": folder, "kind": "mlp"},
            "global_batch_size": BATCH,
            "steps": steps,
            "storage_path": runs,
            "checkpoint": {"save_final": False, "every_steps": every},
        }
        Trainer(job, Written, progress=False).fit()
        ranks = [
            [float(gap) for gap in path.read_text().split()] for path in Path(folder).iterdir()
        ]
        return max(statistics.mean(gaps) for gaps in ranks) * 1e3


def saved(*, sync: bool) -> float:
    """Save the same state with torch; return milliseconds."""
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    with TemporaryDirectory() as folder, Path(folder, "x.pt").open("wb") as file:
        began = time.perf_counter()
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
        if sync:
            file.flush()
            os.fsync(file.fileno())
        return (time.perf_counter() - began) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=110)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    ray.init(
        address="local",
        include_dashboard=False,
        num_cpus=4,
        logging_level="error",
        log_to_driver=False,
    )
    plain, synced = alternately(
        partial(saved, sync=False), partial(saved, sync=True), max(3, args.rounds)
    )
    for strategy in ("ring", "ps-sync"):
        with_, without = alternately(
            partial(mean_step, strategy, args.steps, EVERY),
            partial(mean_step, strategy, args.steps, None),
            args.rounds,
        )
        print(f"{strategy}: step {with_:.1f} ms with checkpoints, {without:.1f} ms without")
        cost = (with_ - without) * EVERY
        print_ratio(f"{strategy}, taken from training, torch.save", cost, plain, GOAL)
        print_ratio(f"{strategy}, taken from training, and synced", cost, synced, GOAL)
    ray.shutdown()


if __name__ == "__main__":
    main()
