"""
What a step of a train function takes, against the same model as a task under the same strategy.

    gpt      nanoGPT's preset for the CPU on one worker, with clipping
    mlp      10.5 M parameters on two workers

Both use torch's fused AdamW, one thread a process. The sides run in turn; figures are medians of
the rounds, of a run the median from loss to loss in the slowest process, the first ones left out.
"""

import argparse
from collections.abc import Mapping
from functools import partial
from tempfile import TemporaryDirectory
from typing import Any

import ray
import torch
from common import WORKERS, alternately, print_ratio
from step_overhead import ADAMW, BATCH, DATA, MODELS, Record, Recorded, loss_of, read
from torch import nn
from torch.utils.data import DataLoader

import distplat
from distplat import Trainer

STEPS = {"gpt": 150, "mlp": 80}
ON = {"gpt": 1, "mlp": WORKERS}


def job_of(kind: str, strategy: str, folder: str, runs: str, **more: Any) -> dict[str, Any]:
    """Make what both sides' jobs have."""
    return {
        "name": "bench",
        "strategy": strategy,
        "scaling": {"num_workers": ON[kind]},
        "task_args": {"kind": kind, "steps": STEPS[kind], "folder": folder},
        "storage_path": runs,
        "checkpoint": {"save_final": False},
        **more,
    }


def as_task(kind: str, strategy: str) -> float:
    """Train as a task; give milliseconds per step."""
    with TemporaryDirectory() as folder, TemporaryDirectory() as runs:
        more = {
            "optimizer": {"name": "AdamW", **ADAMW},
            "clip_norm": 1.0 if kind == "gpt" else None,
            "global_batch_size": BATCH[kind],
            "data": {"shuffle": False},
            "steps": STEPS[kind],
        }
        Trainer(job_of(kind, strategy, folder, runs, **more), Recorded, progress=False).fit()
        return read(folder)[0]


def train(config: Mapping[str, Any]) -> None:
    """Do the same in a loop."""
    kind, steps = config["kind"], config["steps"]
    model = MODELS[kind]()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True, **ADAMW)  # type: ignore[arg-type]
    batch = BATCH[kind] // distplat.get_context().get_world_size()
    loader = DataLoader(DATA[kind](steps * BATCH[kind]), batch_size=batch)
    model, optimizer, loader = distplat.prepare(model, optimizer, loader)
    record = Record(steps, config["folder"])
    for inputs, targets in loader:
        loss = record.add(loss_of(kind, model(inputs), targets))
        torch.autograd.backward(loss)
        if kind == "gpt":
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        distplat.report({"loss": loss.item()})


def as_function(kind: str, strategy: str) -> float:
    """Train as a function; give milliseconds per step."""
    with TemporaryDirectory() as folder, TemporaryDirectory() as runs:
        Trainer(job_of(kind, strategy, folder, runs), train, progress=False).fit()
        return read(folder)[0]


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
        sides = alternately(partial(as_function, *what), partial(as_task, *what), args.rounds)
        print_ratio(f"{kind}, {args.strategy}, {ON[kind]} worker(s): function, task", *sides, 1.05)
    ray.shutdown()


if __name__ == "__main__":
    main()
