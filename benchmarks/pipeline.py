"""
A pipeline of 2 stages on one host: 8 linear layers of 1024, batch 256, 1F1B.

distplat: `hybrid` under Trainer. Peer: torch.distributed.pipelining over gloo, two plain processes.
Both have the same layers, loader, optimizer and threads (one for each stage), and run alternately.
The time of a step is measured on the last stage, from first loss to first loss. The ideal is the
time of a single process divided by two stages, plus the schedule's bubble (p-1)/(m+p-1).

Further measurements: the bubble of the busiest stage, also if compute dominates (micro-batches of
256 rows); and activation memory by number of micro-batches, which is constant under 1F1B.
"""

import argparse
import gc
import os
import statistics
import sys
import threading
import time
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import ray
import torch
from common import alternately, print_ratio
from ring_step import WARM, Repeated, read_times, write_times
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from distplat import Task, Trainer

sys.path.append(str(Path(__file__).parent.parent / "tests" / "support"))

STAGES, LAYERS, WIDTH, BATCH = 2, 8, 1024, 256
GOALS = {8: 0.9, 32: 0.75}
LARGE = 256
"""Rows of a micro-batch whose compute time is much longer than its transfer."""
ROWS = 8
"""Rows of a micro-batch in the memory measurement."""


def model() -> nn.Sequential:
    """Return eight linear layers with 8.4 M parameters."""
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)))


def samples(steps: int, batch: int = BATCH) -> Dataset[Any]:
    """Random inputs and targets, the same in each step."""
    generator = torch.Generator().manual_seed(0)
    pair = (torch.randn(batch, WIDTH, generator=generator) for _ in range(2))
    return Repeated(TensorDataset(*pair), steps)


class Timed(Task):
    """Records the time of the first loss of each step."""

    def __init__(self, steps: int, micro_batches: int, folder: str, batch: int = BATCH) -> None:
        self.steps, self.micro_batches, self.folder = steps, micro_batches, folder
        self.batch = batch
        self.times: list[float] = []
        self.calls = 0

    def model(self) -> nn.Module:
        return model()

    def train_data(self) -> Dataset[Any]:
        return samples(self.steps, self.batch)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        if self.calls % self.micro_batches == 0:
            self.times.append(time.perf_counter())
            if len(self.times) == self.steps:
                write_times(self.folder, self.times)
        self.calls += 1
        return nn.functional.mse_loss(outputs, targets)


BUBBLES: dict[tuple[int, int], list[float]] = {}
"""By number and rows of micro-batches."""


def ours(micro_batches: int, steps: int, batch: int = BATCH) -> float:
    """Train under distplat; return milliseconds per step."""
    with TemporaryDirectory() as folder, TemporaryDirectory() as runs:
        job = {
            "name": "bench",
            "strategy": {
                "name": "hybrid",
                "pipeline": STAGES,
                "micro_batches": micro_batches,
                "cut": "even",
            },
            "scaling": {"num_workers": STAGES},
            "optimizer": {"name": "SGD", "lr": 1e-3},
            "task_args": {
                "steps": steps,
                "micro_batches": micro_batches,
                "folder": folder,
                "batch": batch,
            },
            "global_batch_size": batch,
            "steps": steps,
            "data": {"shuffle": False},
            "storage_path": runs,
            "checkpoint": {"save_final": False},
        }
        result = Trainer(job, Timed, progress=False).fit()
        figures = [step.figures for step in result.history[WARM:]]
        bubbles = [1 - one["stage_busy_s"] / one["pipeline_s"] for one in figures]
        key = micro_batches, batch // micro_batches
        BUBBLES.setdefault(key, []).append(statistics.median(bubbles))
        return read_times(folder)


def peer_stage(rank: int, micro_batches: int, steps: int, folder: str, store: str) -> None:
    """Run one stage as in torch's tutorial."""
    import torch.distributed as dist
    from torch.distributed.pipelining import PipelineStage, Schedule1F1B

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=STAGES)
    torch.manual_seed(0)
    half = LAYERS // STAGES
    part = model()[rank * half : (rank + 1) * half]
    stage = PipelineStage(part, rank, STAGES, torch.device("cpu"))
    times: list[float] = []
    calls = 0

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        nonlocal calls
        if calls % micro_batches == 0:
            times.append(time.perf_counter())
        calls += 1
        return nn.functional.mse_loss(outputs, targets)

    schedule = Schedule1F1B(stage, micro_batches, loss_fn=loss)
    optimizer = torch.optim.SGD(part.parameters(), lr=1e-3)
    for inputs, targets in DataLoader(samples(steps), batch_size=BATCH):
        optimizer.zero_grad()
        if rank == 0:
            schedule.step(inputs)
        else:
            schedule.step(target=targets)
        optimizer.step()
    if rank == STAGES - 1:
        write_times(folder, times)
    dist.destroy_process_group()


def peer(micro_batches: int, steps: int) -> float:
    """Train under torch's pipelining; return milliseconds per step."""
    with TemporaryDirectory() as folder, TemporaryDirectory() as place:
        store = os.path.join(place, "store")
        start = get_context("spawn").Process
        stages = [
            start(target=peer_stage, args=(rank, micro_batches, steps, folder, store))
            for rank in range(STAGES)
        ]
        for stage in stages:
            stage.start()
        for stage in stages:
            stage.join()
            if stage.exitcode:
                raise RuntimeError(f"the peer ended with exit code {stage.exitcode}")
        return read_times(folder)


def ideal(micro_batches: int, repeats: int = 10) -> float:
    """Return the milliseconds of a step without communication."""
    torch.set_num_threads(1)
    whole = model()
    parts = torch.randn(BATCH, WIDTH).chunk(micro_batches)
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        for part in parts:
            torch.autograd.backward(nn.functional.mse_loss(whole(part), part))
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds) * 1e3 / STAGES * bubble_factor(micro_batches)


def bubble_factor(micro_batches: int) -> float:
    """Return the ratio of a 1F1B step to its compute time."""
    return (micro_batches + STAGES - 1) / micro_batches


class Kept:
    """Counts the bytes that autograd saves for backward in one thread, and their maximum."""

    def __init__(self) -> None:
        self.now = self.most = 0

    def pack(self, tensor: Tensor) -> "Held":
        """Count a tensor."""
        return Held(self, tensor)


class Held:
    """A saved tensor."""

    def __init__(self, kept: Kept, tensor: Tensor) -> None:
        self.kept, self.tensor = kept, tensor
        # Weights are kept, too, but are there anyway; activations have a micro-batch's rows.
        self.size = tensor.nbytes if tensor.shape[:1] == (ROWS,) else 0
        kept.now += self.size
        kept.most = max(kept.most, kept.now)

    def __del__(self) -> None:
        self.kept.now -= self.size


def peak_bytes(schedule: str, micro_batches: int) -> list[int]:
    """Run a step in memory, stages as threads; return each stage's maximum saved bytes."""
    from local_run import train

    from distplat.platform.spec import Job

    spec = {
        "name": "bench",
        "strategy": {
            "name": "hybrid",
            "pipeline": STAGES,
            "schedule": schedule,
            "micro_batches": micro_batches,
            "cut": "even",
        },
        "scaling": {"num_workers": STAGES},
        "optimizer": {"name": "SGD", "lr": 1e-3},
        "task_args": {"steps": 1, "micro_batches": micro_batches, "folder": "."},
        "global_batch_size": ROWS * micro_batches,
        "steps": 1,
    }
    most: dict[int, int] = {}
    run = threading.Thread.run

    def counting(self: threading.Thread) -> None:
        kept = Kept()
        with torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda held: held.tensor):
            run(self)
        most[len(most)] = kept.most

    threading.Thread.run = counting  # type: ignore[method-assign]
    try:
        train(Job.model_validate(spec), Untimed)
    finally:
        threading.Thread.run = run  # type: ignore[method-assign]
    gc.collect()
    return sorted(most.values(), reverse=True)


class Untimed(Timed):
    """A task that records no times."""

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.mse_loss(outputs, targets)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    ray.init(
        address="local",
        include_dashboard=False,
        num_cpus=4,
        logging_level="warning",
        log_to_driver=False,
    )
    for micro_batches, goal in GOALS.items():
        best = ideal(micro_batches)
        mine, other = alternately(
            partial(ours, micro_batches, args.steps),
            partial(peer, micro_batches, args.steps),
            args.rounds,
        )
        print_ratio(f"pipeline step, {micro_batches} micro-batches", mine, other, goal)
        print(f"  ideal {best:.1f} ms, ours {mine / best:.2f}x of it", flush=True)
    for micro_batches in (4, 8, 16):
        ours(micro_batches, args.steps // 2, LARGE * micro_batches)
    ray.shutdown()
    for (micro_batches, rows), found in BUBBLES.items():
        expected = 1 - 1 / bubble_factor(micro_batches)
        print(
            f"bubble of {micro_batches} micro-batches of {rows} rows: "
            f"{statistics.median(found):.3f}, (p-1)/(m+p-1) is {expected:.3f}",
            flush=True,
        )
    for schedule in ("1f1b", "gpipe"):
        peaks = {m: peak_bytes(schedule, m)[0] / 2**20 for m in (4, 8, 16, 32)}
        shown = ", ".join(f"m={m}: {peak:.2f} MiB" for m, peak in peaks.items())
        print(f"activations of the first stage, {schedule}: {shown}", flush=True)


if __name__ == "__main__":
    main()
