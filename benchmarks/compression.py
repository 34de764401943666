"""
Savings and cost of each `compression` of `ring`: an MLP of 10.5 M parameters on 2 workers, gloo.

Every method trains a separate model on the same samples, without overlap, and only the exchange is
timed, from a barrier to its end, on the slower rank. The methods alternate, so that drift affects
all of them. On one host transfers are nearly free, so most methods are slower there.

The times over slower links are computed, not measured: compression time + bytes sent / speed of the
link, in comparison with an uncompressed exchange. Latency and the network stack are ignored.
"""

import argparse
import statistics
import time
from typing import Any

import ray
import torch
from common import WORKERS
from ring_step import WIDTH, mlp
from torch import Tensor, nn

from distplat.actors.collectives.ray_groups import create_group
from distplat.actors.collectives.rendezvous import GroupSettings
from distplat.strategies.algorithms.reduce import traffic_elements
from distplat.strategies.collective import Collective
from distplat.strategies.loop.control import StepControl
from distplat.strategies.model.flat import FlatModel
from distplat.strategies.reduction.base import Reducer
from distplat.strategies.reduction.bucket_reducer import BucketReducer
from distplat.strategies.reduction.compressed import PowerSGDReducer, TopKReducer

METHODS = ("none", "fp16", "bf16", "topk 1 %", "topk 0.1 %", "powersgd 4", "powersgd 16")
LINKS_GBIT = (1.0, 10.0, 25.0, 100.0)
BATCH, CLASSES, RATE, WARM = 64, 100, 0.03, 2

Row = dict[str, float]


def make(method: str, flat: FlatModel, group: Collective) -> Reducer:
    """Create the reducer of a `compression`."""
    match method.split():
        case ["topk", percent, _]:
            return TopKReducer(flat, group, float(percent) / 100)
        case ["powersgd", rank]:
            return PowerSGDReducer(flat, group, int(rank))
    wire = {"none": None, "fp16": "float16", "bf16": "bfloat16"}[method]
    return BucketReducer(flat, group, 1 << 30, overlap=False, wire_dtype=wire)


def fresh_mlp() -> nn.Module:
    """Initialize weights so that gradients reach the first layer (He et al. 2015)."""
    torch.manual_seed(0)
    model = mlp()
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    return model


class Side:
    """One worker, with a model for each method."""

    def join(self, rank: int) -> None:
        torch.set_num_threads(1)
        self.group = create_group("compression", "gloo", rank, WORKERS, GroupSettings())
        self.centres = torch.randn(CLASSES, WIDTH, generator=torch.Generator().manual_seed(0)) / 4
        self.steps = dict.fromkeys(METHODS, 0)
        self.flats: dict[str, FlatModel] = {}
        self.reducers: dict[str, Reducer] = {}
        for method in METHODS:
            flat = self.flats[method] = FlatModel(fresh_mlp())
            flat.move(flat.params, self.group.share(flat.grads))
            self.reducers[method] = make(method, flat, self.group)

    def run(self, method: str, steps: int) -> list[Row]:
        """Train some steps; return the metrics of each step."""
        flat, reducer = self.flats[method], self.reducers[method]
        rows = []
        for _ in range(steps):
            flat.grads.zero_()
            inputs, targets = self.batch(method)
            loss = nn.functional.cross_entropy(flat.model(inputs), targets)
            torch.autograd.backward(loss / WORKERS)
            self.group.barrier()
            began = time.perf_counter()
            reducer.finish(StepControl(1.0, 1.0, present=flat.present))
            row = {"exchange_s": time.perf_counter() - began, **reducer.figures()}
            rows.append({**row, "loss": loss.item()})
            flat.params.add_(flat.grads, alpha=-RATE)
        return rows

    def batch(self, method: str) -> tuple[Tensor, Tensor]:
        """Return the next samples, which are noise around the centre of a class."""
        seed = self.steps[method] * WORKERS + self.group.rank
        self.steps[method] += 1
        generator = torch.Generator().manual_seed(seed)
        targets = torch.randint(CLASSES, (BATCH,), generator=generator)
        noise = torch.randn(BATCH, WIDTH, generator=generator)
        return self.centres[targets] + noise, targets


def measure(steps: int, rounds: int) -> dict[str, Row]:
    """Return the median of each metric over steps, on the slower rank, for each method."""
    sides: list[Any] = [ray.remote(Side).options(num_cpus=1).remote() for _ in range(WORKERS)]
    ray.get([side.join.remote(rank) for rank, side in enumerate(sides)], timeout=120)

    def run(method: str, steps: int) -> list[list[Row]]:
        asked = [side.run.remote(method, steps) for side in sides]
        rows: list[list[Row]] = ray.get(asked, timeout=300)
        return rows

    seen: dict[str, list[Row]] = {method: [] for method in METHODS}
    for method in METHODS:
        run(method, WARM)
    for _ in range(rounds):
        for method in METHODS:
            for pair in zip(*run(method, steps), strict=True):
                seen[method].append(max(pair, key=lambda row: row["exchange_s"]))
    return {method: summary(rows, steps) for method, rows in seen.items()}


def summary(rows: list[Row], steps: int) -> Row:
    """Return medians over the steps that have a metric; the loss only over the last `steps`."""
    names = sorted({name for row in rows for name in row})
    found = {name: statistics.median(row[name] for row in rows if name in row) for name in names}
    return {**found, "loss": statistics.median(row["loss"] for row in rows[-steps:])}


def print_measured(found: dict[str, Row], plain_bytes: float) -> None:
    """Print the measurements."""
    print(f"{'method':<12} exchange  ratio   sent      saved  compress  error  loss")
    plain_s = found["none"]["exchange_s"]
    for method, row in found.items():
        saved = row.get("saved_bytes", 0.0)
        print(
            f"{method:<12} {row['exchange_s'] * 1e3:6.1f} ms {row['exchange_s'] / plain_s:5.2f}x "
            f"{(plain_bytes - saved) / 1e6:6.2f} MB {saved / plain_bytes:6.1%} "
            f"{row.get('compress_s', 0.0) * 1e3:6.1f} ms  {row.get('error_norm', 0.0):5.3f}  "
            f"{row['loss']:.3f}"
        )


def print_links(found: dict[str, Row], plain_bytes: float) -> None:
    """Print the computed times for links of other speeds."""
    header = "  ".join(f"{link:5g} Gbit/s" for link in LINKS_GBIT)
    print(f"\ncomputed     {header}   pays on links slower than")
    for method, row in found.items():
        saved, compress_s = row.get("saved_bytes", 0.0), row.get("compress_s", 0.0)
        cells = []
        for link in LINKS_GBIT:
            seconds = compress_s + (plain_bytes - saved) * 8 / (link * 1e9)
            cells.append(f"{seconds * 1e3:9.1f} ms")
        limit = f"{saved * 8 / compress_s / 1e9:6.1f} Gbit/s" if compress_s else "-"
        print(f"{method:<12} {'  '.join(cells)}   {limit}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=4)
    args = parser.parse_args()
    ray.init(
        address="local",
        include_dashboard=False,
        num_cpus=4,
        logging_level="warning",
        log_to_driver=False,
    )
    found = measure(args.steps, args.rounds)
    plain_bytes = 4.0 * traffic_elements(FlatModel(mlp()).size, 0, WORKERS)[0]
    print_measured(found, plain_bytes)
    print_links(found, plain_bytes)
    ray.shutdown()


if __name__ == "__main__":
    main()
