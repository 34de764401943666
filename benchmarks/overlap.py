"""
Gain of overlapping communication with backward: buckets with and without overlap, and DDP.

Two ranks on one host, each with one thread, run forward, backward and exchange without an update:

- an MLP of 10.5 M parameters, where the exchange is a large part of the step, and
- a small convolutional net, which is bound by compute.

"alone" is the same step without any exchange, on both ranks at once. DDP is torch's own reducer
with `gradient_as_bucket_view`, always over torch's gloo. The variants alternate step by step, each
with a separate model, and a value is the median over the steps of the slower rank.

With as many ranks as cores, the exchange uses CPU time of backward, so only waiting can be
overlapped; the hidden fraction is the part of the exchange during backward, not the time saved.
"""

import argparse
import statistics
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import ray
import torch
import torch.distributed
from common import WORKERS
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from distplat.actors.collectives.group import CollectiveGroup
from distplat.actors.collectives.ray_groups import create_group
from distplat.actors.collectives.rendezvous import GroupSettings
from distplat.strategies.loop.control import StepControl
from distplat.strategies.model.flat import FlatModel
from distplat.strategies.reduction.bucket_reducer import BucketReducer

dist: Any = torch.distributed  # torch's stubs leave out the stores

WARM = 5
MIB = 1 << 20
FIGURES = ("exposed_s", "hidden_s", "hidden_fraction")


@dataclass(frozen=True)
class Variant:
    """One way to exchange gradients."""

    name: str
    kind: str
    """`alone`, `ours` or `ddp`."""
    bucket_mb: float = 0.0
    overlap: bool = True
    wire_dtype: str | None = None


def variants() -> list[Variant]:
    """Return the variants; ratios are relative to the second one."""
    return [
        Variant("alone", "alone"),
        Variant("one all-reduce at the end", "ours", 1024, overlap=False),
        Variant("buckets of 8 MiB at the end", "ours", 8, overlap=False),
        *(Variant(f"overlap, {mb} MiB", "ours", mb) for mb in (1, 4, 8, 16, 25)),
        Variant("overlap, 8 MiB, bf16", "ours", 8, wire_dtype="bfloat16"),
        Variant("torch DDP, 25 MiB", "ddp", 25),
        Variant("torch DDP, 8 MiB", "ddp", 8),
    ]


def mlp() -> tuple[nn.Module, Tensor]:
    """Return ten linear layers of 1024 and a rank's batch."""
    layers = [layer for _ in range(10) for layer in (nn.Linear(1024, 1024), nn.ReLU())]
    return nn.Sequential(*layers), torch.randn(64, 1024)


def conv() -> tuple[nn.Module, Tensor]:
    """Return four convolutions of up to 64 channels, 0.1 M parameters, and a rank's batch."""
    channels = [3, 32, 64, 64, 64]
    layers: list[nn.Module] = []
    for a, b in pairwise(channels):
        layers += [nn.Conv2d(a, b, 3, padding=1), nn.ReLU()]
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
    return nn.Sequential(*layers, *head), torch.randn(16, 3, 32, 32)


MODELS = {"mlp": mlp, "conv": conv}


class Stepper:
    """A separate model and the step of one variant."""

    def __init__(self, model: str, variant: Variant, group: CollectiveGroup) -> None:
        torch.manual_seed(0)
        self._network, self._inputs = MODELS[model]()
        self._reducer: BucketReducer | None = None
        if variant.kind == "ours":
            self._flat = flat = FlatModel(self._network)
            flat.move(flat.params, group.share(flat.grads))
            size = int(variant.bucket_mb * MIB)
            self._reducer = BucketReducer(
                flat, group, size, overlap=variant.overlap, wire_dtype=variant.wire_dtype
            )
        elif variant.kind == "ddp":
            self._network = DistributedDataParallel(
                self._network, bucket_cap_mb=variant.bucket_mb, gradient_as_bucket_view=True
            )

    def step(self) -> dict[str, float]:
        """Run forward and backward once; return the seconds, and distplat's metrics."""
        began = time.perf_counter()
        if self._reducer is None:
            self._network.zero_grad()
            torch.autograd.backward(self._network(self._inputs).square().mean())
            return {"step_s": time.perf_counter() - began}
        self._flat.grads.zero_()
        loss = self._network(self._inputs).square().mean()
        self._reducer.last_backward()
        torch.autograd.backward(loss)
        self._reducer.finish(StepControl(1.0, 1.0, present=self._flat.present))
        seconds = time.perf_counter() - began
        figures = self._reducer.figures()
        return {"step_s": seconds, **{name: figures[name] for name in FIGURES}}

    def close(self) -> None:
        """Release the group's memory."""
        if self._reducer is not None:
            self._reducer.close()
            self._flat.move(self._flat.params, torch.zeros_like(self._flat.params))


class Rank:
    """One of the processes."""

    def __init__(self, rank: int, folder: str) -> None:
        torch.set_num_threads(1)
        self._rank = rank
        store = dist.FileStore(str(Path(folder, "store")), WORKERS)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=WORKERS)

    def run(self, model: str, backend: str, steps: int) -> list[list[dict[str, float]]]:
        """Run steps of all variants alternately; return the time of each step of each variant."""
        group = create_group(f"{model}-{backend}", backend, self._rank, WORKERS, GroupSettings())
        steppers = [Stepper(model, variant, group) for variant in variants()]
        seen: list[list[dict[str, float]]] = [[] for _ in steppers]
        for _ in range(steps):
            for stepper, found in zip(steppers, seen, strict=True):
                group.barrier()
                found.append(stepper.step())
        for stepper in steppers:
            stepper.close()
        group.barrier()
        group.close()
        return seen


def measure(
    actors: list[Any], model: str, steps: int, backend: str
) -> dict[Variant, dict[str, float]]:
    """Return each variant's medians of the slower rank's times over the steps."""
    ranks = ray.get([a.run.remote(model, backend, WARM + steps) for a in actors], timeout=1800)
    medians = {}
    for variant, *seen in zip(variants(), *ranks, strict=True):
        both = list(zip(*seen, strict=True))[WARM:]
        medians[variant] = {
            name: statistics.median(max(rank[name] for rank in step) for step in both)
            for name in both[0][0]
        }
    return medians


def show(model: str, backend: str, medians: dict[Variant, dict[str, float]]) -> None:
    """Print one table, with ratios relative to one all-reduce at the end."""
    plain = medians[variants()[1]]["step_s"]
    print(f"\n{model} over {backend}: ms per step, ratio to one all-reduce at the end")
    for variant, found in medians.items():
        line = f"  {variant.name:<30} {found['step_s'] * 1e3:8.2f} {found['step_s'] / plain:6.2f}x"
        if variant.overlap and "hidden_s" in found:
            line += (
                f"   hidden {found['hidden_s'] * 1e3:7.2f} ms, exposed"
                f" {found['exposed_s'] * 1e3:7.2f} ms, fraction {found['hidden_fraction']:.2f}"
            )
        print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--backends", nargs="+", default=["gloo", "shm"])
    parser.add_argument("--models", nargs="+", default=[*MODELS], choices=MODELS)
    args = parser.parse_args()
    ray.init(
        address="local",
        include_dashboard=False,
        num_cpus=WORKERS,
        logging_level="warning",
        log_to_driver=False,
    )
    with TemporaryDirectory() as folder:
        kind = ray.remote(Rank)
        actors = [kind.remote(rank, folder) for rank in range(WORKERS)]
        for backend in args.backends:
            for model in args.models:
                show(model, backend, measure(actors, model, args.steps, backend))
    ray.shutdown()


if __name__ == "__main__":
    main()
