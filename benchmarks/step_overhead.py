"""
Overhead of a training step in comparison with a plain loop.

    gpt      nanoGPT's preset for the CPU (4 layers, 4 heads, 128 wide, block 64, batch 12) on one
             worker under `ring`; peer: a plain torch loop. Also compares the loss curves.
    mlp      10.5 M parameters on 2 workers under `ring`; peer: an earlier result, or checkout
    small    3000 tensors of 36 elements on 2 workers under `ring`; peer: torch DDP over gloo

Both sides run alternately, with one thread per process; results are medians of the rounds. The time
of a step is measured from loss to loss in the training process, without the first steps.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import ray
import torch
import torch.distributed
import torch.nn.functional as F
from common import WORKERS, alternately, print_ratio
from ring_step import WIDTH as MLP_WIDTH
from ring_step import mlp
from ring_step import ours as train_mlp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset

from distplat import Task, Trainer

dist: Any = torch.distributed  # torch's stubs leave out the stores

WARM = 10
VOCABULARY, BLOCK, LAYERS, HEADS, WIDTH = 65, 64, 4, 4, 128
TENSORS, SIDE = 3000, 6
BATCH = {"gpt": 12, "small": 16, "mlp": 64}
STEPS = {"gpt": 200, "mlp": 80, "small": 120}
ADAMW = {"lr": 1e-3, "betas": (0.9, 0.99), "weight_decay": 0.1}


class Layer(nn.Module):
    """A block of GPT-2, without biases and dropout as in nanoGPT's preset."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.between = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.inwards = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.outwards = nn.Linear(WIDTH, WIDTH, bias=False)
        self.up = nn.Linear(WIDTH, 4 * WIDTH, bias=False)
        self.down = nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, block, width] -> the same shape."""
        split = self.inwards(self.before(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        query, key, value = split
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.outwards(mixed.transpose(1, 2).flatten(2))
        found: Tensor = x + self.down(F.gelu(self.up(self.between(x))))
        return found


class GPT(nn.Module):
    """The model of nanoGPT, with a tied head."""

    def __init__(self) -> None:
        super().__init__()
        self.characters = nn.Embedding(VOCABULARY, WIDTH)
        self.places = nn.Embedding(BLOCK, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)
        self.head.weight = self.characters.weight

    def forward(self, characters: Tensor) -> Tensor:
        """[batch, block] -> [batch, block, vocabulary]."""
        x = self.characters(characters) + self.places(torch.arange(characters.shape[1]))
        for layer in self.layers:
            x = layer(x)
        found: Tensor = self.head(self.norm(x))
        return found


class Small(nn.Module):
    """A model of many small tensors, with one operation over all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.tensors = nn.ParameterList(torch.randn(SIDE, SIDE) for _ in range(TENSORS))

    def forward(self, x: Tensor) -> Tensor:
        """[batch, side] -> the same shape."""
        return x @ torch.stack(list(self.tensors)).mean(0)


MODELS: dict[str, Any] = {"gpt": GPT, "small": Small, "mlp": mlp}


class Text(Dataset[Any]):
    """Windows of a random walk over the characters; a sample's position depends on its index."""

    def __init__(self, samples: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.text = torch.randint(-2, 3, (200_000,), generator=generator).cumsum(0) % VOCABULARY
        self.samples = samples

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        first = index * 7919 % (len(self.text) - BLOCK - 1)
        return self.text[first : first + BLOCK], self.text[first + 1 : first + BLOCK + 1]


class Points(Dataset[Any]):
    """Random points and targets, repeated."""

    def __init__(self, samples: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.points = torch.randn(2, 1000, SIDE, generator=generator)
        self.samples = samples

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.points[0, index % 1000], self.points[1, index % 1000]


class Wide(Dataset[Any]):
    """Random points, repeated, which are also their targets."""

    def __init__(self, samples: int) -> None:
        self.points = torch.randn(64, MLP_WIDTH, generator=torch.Generator().manual_seed(0))
        self.samples = samples

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.points[index % 64], self.points[index % 64]


DATA: dict[str, Any] = {"gpt": Text, "small": Points, "mlp": Wide}


def loss_of(kind: str, outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the mean over a batch."""
    if kind == "gpt":
        return F.cross_entropy(outputs.flatten(0, 1), targets.flatten())
    return F.mse_loss(outputs, targets)


class Record:
    """
    Records the time and value of each loss.

    Args:
        steps: number of steps after which the record is written.
        folder: output folder.
    """

    def __init__(self, steps: int, folder: str) -> None:
        self.steps, self.folder = steps, folder
        self.times, self.losses = list[float](), list[Tensor]()

    def add(self, loss: Tensor) -> Tensor:
        """Record a loss and return it."""
        self.times.append(time.perf_counter())
        self.losses.append(loss.detach())
        if len(self.times) == self.steps:
            gaps = [b - a for a, b in zip(self.times[WARM:], self.times[WARM + 1 :], strict=False)]
            found = {
                "ms": statistics.median(gaps) * 1e3,
                "losses": torch.stack(self.losses).tolist(),
            }
            Path(self.folder, f"{time.monotonic_ns()}").write_text(json.dumps(found))
        return loss


class Recorded(Task):
    """A task with one of these models and a timer."""

    def __init__(self, kind: str, steps: int, folder: str) -> None:
        self.kind, self.steps, self.folder = kind, steps, folder
        self.record: Record | None = None

    def model(self) -> nn.Module:
        found: nn.Module = MODELS[self.kind]()
        return found

    def train_data(self) -> Dataset[Any]:
        found: Dataset[Any] = DATA[self.kind](self.steps * BATCH[self.kind])
        return found

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        loss = loss_of(self.kind, outputs, targets)
        if not loss.requires_grad:  # asked beside the training
            return loss
        self.record = self.record or Record(self.steps, self.folder)
        return self.record.add(loss)


def read(folder: str) -> tuple[float, list[float]]:
    """Return the slowest rank's milliseconds, and the mean of the ranks' losses."""
    ranks = [json.loads(path.read_text()) for path in Path(folder).glob("[0-9]*")]
    losses = [statistics.mean(step) for step in zip(*(r["losses"] for r in ranks), strict=True)]
    return max(rank["ms"] for rank in ranks), losses


def ours(kind: str, workers: int, steps: int, curves: list[list[float]]) -> float:
    """Train under `ring`; return milliseconds per step, and append the loss curve."""
    with TemporaryDirectory() as folder, TemporaryDirectory() as runs:
        job: dict[str, Any] = {
            "name": "bench",
            "strategy": "ring",
            "scaling": {"num_workers": workers},
            "optimizer": {"name": "AdamW", **ADAMW},
            "clip_norm": 1.0 if kind == "gpt" else None,
            "task_args": {"kind": kind, "steps": steps, "folder": folder},
            "global_batch_size": BATCH[kind],
            "data": {"shuffle": False},
            "steps": steps,
            "storage_path": runs,
            "checkpoint": {"save_final": False},
            "seed": 0,
        }
        Trainer(job, Recorded, progress=False).fit()
        ms, losses = read(folder)
    curves.append(losses)
    return ms


def loop(kind: str, rank: int, world: int, steps: int, folder: str) -> None:
    """Train with a plain torch loop, with DDP for several processes."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = MODELS[kind]()
    if world > 1:
        store = dist.FileStore(str(Path(folder, "store")), world)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
        model = DistributedDataParallel(model, gradient_as_bucket_view=True)
    optimizer = torch.optim.AdamW(model.parameters(), **ADAMW)  # type: ignore[arg-type]
    data, batch = DATA[kind](steps * BATCH[kind]), BATCH[kind] // world
    record = Record(steps, folder)
    for step in range(steps):
        first = step * BATCH[kind] + rank * batch
        samples = [data[index] for index in range(first, first + batch)]
        inputs, targets = (torch.stack(part) for part in zip(*samples, strict=True))
        loss = record.add(loss_of(kind, model(inputs), targets))
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        if kind == "gpt":
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        loss.item()  # both sides tell each step's
    if world > 1:
        dist.destroy_process_group()


def peer(kind: str, workers: int, steps: int, curves: list[list[float]]) -> float:
    """Train in `workers` processes; return milliseconds per step, and append the loss curve."""
    with TemporaryDirectory() as folder:
        run = ray.remote(num_cpus=1, max_calls=1)(loop)
        ranks = [run.remote(kind, rank, workers, steps, folder) for rank in range(workers)]
        ray.get(ranks, timeout=1800)
        ms, losses = read(folder)
    curves.append(losses)
    return ms


def show_curves(mine: list[list[float]], other: list[list[float]]) -> None:
    """Print the difference of the loss curves."""
    pairs = [pair for a, b in zip(mine, other, strict=True) for pair in zip(a, b, strict=True)]
    largest = max(abs(a - b) for a, b in pairs)
    print(f"  loss {mine[-1][0]:.3f} to {mine[-1][-1]:.3f}, curves differ by {largest:.2g} at most")


def baseline_of(text: str, steps: int) -> float:
    """Return the baseline in milliseconds: a number, or the time of another checkout."""
    try:
        return float(text)
    except ValueError:
        root = Path(text).resolve()
        environment = {**os.environ, "PYTHONPATH": str(root)}
        words = [
            sys.executable,
            str(Path(__file__).resolve()),
            "--rows",
            "mlp",
            "--rounds",
            "1",
            "--steps",
            str(steps),
        ]
        run = subprocess.run(  # Ray's workers import from the working directory first
            words, cwd=root, env=environment, capture_output=True, text=True, timeout=1800
        )
        run.check_returncode()
        return float(run.stdout.split()[-2])


def mlp_row(steps: int, rounds: int, baseline: str | None) -> None:
    """Print the times of the MLP."""
    what = "ring, 2 workers: MLP of 10.5 M parameters"
    if baseline is None:
        mine = partial(train_mlp, "ring", steps, "mlp")
        print(f"{what:<44} ours {statistics.median(mine() for _ in range(rounds)):9.2f} ms")
        return
    # Both in a process of their own: this one's grows from run to run.
    here = partial(baseline_of, str(Path(__file__).parents[1]), steps)
    print_ratio(what, *alternately(here, partial(baseline_of, baseline, steps), rounds), 1.03)


def row(kind: str, steps: int, rounds: int) -> None:
    """Print the times of one of these models."""
    workers, goal = (1, 1 / 0.98) if kind == "gpt" else (WORKERS, 0.7)
    mine, other = list[list[float]](), list[list[float]]()
    medians = alternately(
        partial(ours, kind, workers, steps, mine),
        partial(peer, kind, workers, steps, other),
        rounds,
    )
    what = "one worker: nanoGPT" if kind == "gpt" else f"ring, 2 workers: {TENSORS} small tensors"
    print_ratio(what, *medians, goal)
    if kind == "gpt":
        speeds = [BATCH[kind] * BLOCK / ms * 1e3 for ms in medians]
        ratio = speeds[0] / speeds[1]
        print(f"  {speeds[0]:.0f} tokens/s against {speeds[1]:.0f}: {ratio:.3f}x, goal >= 0.98x")
    show_curves(mine, other)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", nargs="+", default=[*STEPS], choices=STEPS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, help="of each run, instead of those of each row")
    parser.add_argument("--baseline", help="of the MLP: earlier milliseconds, or another checkout")
    args = parser.parse_args()
    ray.init(
        address="local",
        include_dashboard=False,
        num_cpus=4,
        logging_level="warning",
        log_to_driver=False,
    )
    for name in args.rows:
        steps = args.steps or STEPS[name]
        if name == "mlp":
            mlp_row(steps, args.rounds, args.baseline)
        else:
            row(name, steps, args.rounds)
    ray.shutdown()


if __name__ == "__main__":
    main()
