"""
A block split over two processes of one host, in comparison with DTensor over gloo and one process.

The block is a transformer's MLP, `x + down(gelu(up(norm(x))))`, in float32; a step is forward,
backward and an SGD update. Ranks are Ray actors with one thread each. distplat uses shared
memory, DTensor's `parallelize_module` gloo with the same plan. Both alternate; the time of a step
is that of the slowest rank since a barrier; medians.
"""

import argparse
import copy
import os
import socket
import time
from collections.abc import Callable
from typing import Any

import ray
import torch
import torch.distributed as dist
from common import WORKERS, median_ms, print_ratio
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from distplat.actors.collectives.ray_groups import create_group
from distplat.actors.collectives.rendezvous import GroupSettings
from distplat.strategies.tensor.parallelize import parallelize

GOALS = {"dtensor": 1.0, "alone": 1.0}
UNTIMED, TIMED = 2, 3


class Block(nn.Module):
    """The MLP of a transformer's layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.down(nn.functional.gelu(self.up(self.norm(x))))
        return out


class Rank:
    """One rank of both groups."""

    def __init__(self, rank: int, port: int) -> None:
        torch.set_num_threads(1)
        self.rank = rank
        method = f"tcp://127.0.0.1:{port}"
        dist.init_process_group("gloo", method, rank=rank, world_size=WORKERS)
        settings = GroupSettings(60, 60, False)
        self.group = create_group("bench", "shm", rank, WORKERS, settings)

    def steps(self, width: int, rows: int, rounds: int) -> dict[str, list[float]]:
        """Return each side's seconds, by step; nothing for one process where it does not run."""
        torch.manual_seed(0)
        alone = Block(width)
        ours, peer = copy.deepcopy(alone), copy.deepcopy(alone)
        parallelize(ours, {"up": "colwise", "down": "rowwise"}, self.group)
        mesh = init_device_mesh("cpu", (WORKERS,))
        parallelize_module(peer, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
        inputs = torch.randn(rows, width)
        sides = {"ours": _step(ours, inputs), "dtensor": _step(peer, inputs)}
        sides["alone"] = _step(alone, inputs) if self.rank == 0 else lambda: None
        times: dict[str, list[float]] = {side: [] for side in sides}
        for _ in range(rounds):
            for side, run in sides.items():
                for number in range(-UNTIMED, TIMED):
                    self.group.barrier()
                    began = time.perf_counter()
                    run()
                    if number >= 0:
                        times[side].append(time.perf_counter() - began)
        return times


def _step(model: nn.Module, inputs: Tensor) -> Callable[[], Any]:
    """Return a step that leaves a gradient at the inputs, as inside a model."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)

    def step() -> None:
        optimizer.zero_grad()
        torch.autograd.backward(model(inputs.requires_grad_()).square().mean())
        optimizer.step()

    return step


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--widths", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--rows", type=int, default=256)
    args = parser.parse_args()
    os.environ["RAY_worker_niceness"] = "0"  # or whatever else runs here comes first
    ray.init(address="local", include_dashboard=False, num_cpus=WORKERS, logging_level="warning")
    port = free_port()
    ranks = [ray.remote(Rank).options(num_cpus=1).remote(r, port) for r in range(WORKERS)]
    for width in args.widths:
        calls = [r.steps.remote(width, args.rows, args.rounds) for r in ranks]
        took = ray.get(calls, timeout=600)
        slowest = {
            side: median_ms([max(pair) for pair in zip(*(t[side] for t in took), strict=True)])
            for side in took[0]
        }
        for peer, goal in GOALS.items():
            what = f"MLP block, width {width}, {args.rows} rows, against {peer}"
            print_ratio(what, slowest["ours"], slowest[peer], goal)
    ray.shutdown()


if __name__ == "__main__":
    main()
