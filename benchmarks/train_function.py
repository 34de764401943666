"""
Time of a step of a train function, in comparison with the same model as a task.

    gpt      nanoGPT's preset for the CPU on one worker, with clipping
    mlp      10.5 M parameters on two workers

Both use the same strategy, torch's fused AdamW, and one thread per process, and run alternately.
Results are medians of the rounds; the result of a run is the median time from loss to loss in the
slowest process, without the first steps. The CPU time of a step, of all workers and servers, is
printed as well: it varies less than the wall time if the machine has other work.
"""

import argparse
import os
import statistics
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import ray
import torch
from common import WORKERS, print_ratio
from step_overhead import ADAMW, BATCH, DATA, MODELS, WARM, Record, Recorded, loss_of, read
from torch import Tensor, nn
from torch.utils.data import DataLoader

import distplat
from distplat import Trainer

STEPS = {"gpt": 150, "mlp": 80}
ON = {"gpt": 1, "mlp": WORKERS}


class Timed(Record):
    """Also records the CPU time of this run's processes; see `Record`."""

    def add(self, loss: Tensor) -> Tensor:
        """Record a loss and return it."""
        made = len(self.times)
        if made == WARM:
            self.began_ms = processor_ms()
        if made + 1 == self.steps:
            ms = (processor_ms() - self.began_ms) / (made - WARM)
            Path(self.folder, f"processor-{time.monotonic_ns()}").write_text(str(ms))
        return super().add(loss)


def processor_ms() -> float:
    """Return the CPU time of workers and servers, which are children of one Ray process."""
    used, mine = 0, os.getppid()
    for one in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended
            if not (one / "cmdline").read_bytes().startswith((b"ray::Worker", b"ray::ServerNode")):
                continue
            fields = (one / "stat").read_text().rpartition(")")[2].split()
            used += (int(fields[11]) + int(fields[12])) * (int(fields[1]) == mine)
    return used / os.sysconf("SC_CLK_TCK") * 1e3


class TimedTask(Recorded):
    """A task with one of the models and a timer."""

    def __init__(self, kind: str, steps: int, folder: str) -> None:
        super().__init__(kind, steps, folder)
        self.record = Timed(steps, folder)


def figures_of(folder: str) -> tuple[float, float]:
    """Return the milliseconds and the CPU milliseconds of a step."""
    found = [float(one.read_text()) for one in Path(folder).glob("processor-*")]
    return read(folder)[0], statistics.median(found)


def job_of(kind: str, strategy: str, folder: str, runs: str, **more: Any) -> dict[str, Any]:
    """Return the common fields of both jobs."""
    return {
        "name": "bench",
        "strategy": strategy,
        "scaling": {"num_workers": ON[kind]},
        "task_args": {"kind": kind, "steps": STEPS[kind], "folder": folder},
        "storage_path": runs,
        "checkpoint": {"save_final": False},
        **more,
    }


def as_task(kind: str, strategy: str) -> tuple[float, float]:
    """Train as a task; see `figures_of`."""
    with TemporaryDirectory() as folder, TemporaryDirectory() as runs:
        more = {
            "optimizer": {"name": "AdamW", **ADAMW},
            "clip_norm": 1.0 if kind == "gpt" else None,
            "global_batch_size": BATCH[kind],
            "data": {"shuffle": False},
            "steps": STEPS[kind],
        }
        Trainer(job_of(kind, strategy, folder, runs, **more), TimedTask, progress=False).fit()
        return figures_of(folder)


def train(config: Mapping[str, Any]) -> None:
    """Train function with the same training."""
    kind, steps = config["kind"], config["steps"]
    model = MODELS[kind]()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True, **ADAMW)  # type: ignore[arg-type]
    batch = BATCH[kind] // distplat.get_context().get_world_size()
    loader = DataLoader(DATA[kind](steps * BATCH[kind]), batch_size=batch)
    model, optimizer, loader = distplat.prepare(model, optimizer, loader)
    record = Timed(steps, config["folder"])
    for inputs, targets in loader:
        loss = record.add(loss_of(kind, model(inputs), targets))
        torch.autograd.backward(loss)
        if kind == "gpt":
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        distplat.report({"loss": loss.item()})


def as_function(kind: str, strategy: str) -> tuple[float, float]:
    """Train as a function; see `figures_of`."""
    with TemporaryDirectory() as folder, TemporaryDirectory() as runs:
        Trainer(job_of(kind, strategy, folder, runs), train, progress=False).fit()
        return figures_of(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", nargs="+", default=[*STEPS], choices=STEPS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--strategy", default="ring", choices=["ring", "ps-sync", "ps-async"])
    args = parser.parse_args()
    given = {"include_dashboard": False, "logging_level": "warning", "log_to_driver": False}
    ray.init(address="local", num_cpus=4, **given)
    for kind in args.rows:
        what = kind, args.strategy
        rounds = [(as_function(*what), as_task(*what)) for _ in range(args.rounds)]
        (ms, task_ms), (used, task_used) = (
            [statistics.median(side[n] for side in sides) for sides in zip(*rounds, strict=True)]
            for n in range(2)
        )
        print_ratio(f"{kind}, {args.strategy}, {ON[kind]} worker(s)", ms, task_ms, 1.05)
        print(f"  processor time: {used:.0f} ms, task {task_used:.0f} ms: {used / task_used:.2f}x")
    ray.shutdown()


if __name__ == "__main__":
    main()
