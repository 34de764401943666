"""
All-reduce between processes of one host: distplat's shared memory and torch's gloo.

Ranks are Ray actors with one thread each. Gloo is a plain `torch.distributed` group; distplat's
backend is called through `ray.util.collective`, on plain tensors (staged) and on shared vectors
(shared). Both alternate; the time of an operation is that of the slowest rank since a barrier;
medians. The first operations after each switch are not timed, because gloo tends to leave the ranks
on one core, and the caches filled with its buffers.
"""

import argparse
import os
import socket
import time
from collections.abc import Callable
from typing import Any

import ray
import ray.util.collective as rayc
import torch
import torch.distributed as dist
from common import median_ms, print_ratio
from ray.util.collective.types import ReduceOp

from distplat.actors.collectives.ray_groups import register

MB = 2**20
GOALS = {1: 1 / 6, 8: 1 / 5, 64: 1 / 3}
GROUP = "bench"
UNTIMED, TIMED = 5, 5


class Rank:
    """One rank of both groups."""

    def __init__(self, rank: int, world: int) -> None:
        torch.set_num_threads(1)
        self.rank, self.world = rank, world
        self.backend = register("shm")

    def join(self, port: int) -> None:
        method = f"tcp://127.0.0.1:{port}"
        dist.init_process_group("gloo", method, rank=self.rank, world_size=self.world)
        rayc.init_collective_group(self.world, self.rank, self.backend, GROUP)

    def all_reduce(self, size: int, dtype: str, rounds: int) -> dict[str, list[float]]:
        """Return each side's seconds, by round."""
        plain = torch.zeros(size // getattr(torch, dtype).itemsize, dtype=getattr(torch, dtype))
        shared = rayc.get_group_handle(GROUP).group.share(plain)
        return self._in_turn(
            {
                "gloo": lambda: dist.all_reduce(plain),
                "staged": lambda: rayc.allreduce(plain, GROUP, ReduceOp.SUM),
                "shared": lambda: rayc.allreduce(shared, GROUP, ReduceOp.SUM),
            },
            rounds,
        )

    def there_and_back(self, size: int, rounds: int) -> dict[str, list[float]]:
        """Send between ranks 0 and 1; give each side's seconds for one way."""
        tensor = torch.zeros(size // 4)
        there, peer = self.rank == 0, 1 - self.rank

        def gloo() -> None:
            for sends in (there, not there):
                dist.send(tensor, peer) if sends else dist.recv(tensor, peer)

        def ours() -> None:
            for sends in (there, not there):
                if sends:
                    rayc.send(tensor, peer, GROUP)
                else:
                    rayc.recv(tensor, peer, GROUP)

        if self.rank > 1:
            gloo = ours = lambda: None
        times = self._in_turn({"gloo": gloo, "ours": ours}, rounds)
        return {side: [seconds / 2 for seconds in took] for side, took in times.items()}

    def _in_turn(self, sides: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
        times: dict[str, list[float]] = {side: [] for side in sides}
        for _ in range(rounds):
            for side, run in sides.items():
                for number in range(-UNTIMED, TIMED):
                    rayc.barrier(GROUP)
                    began = time.perf_counter()
                    run()
                    if number >= 0:
                        times[side].append(time.perf_counter() - began)
        return times


def slowest(of_ranks: list[dict[str, list[float]]]) -> dict[str, float]:
    """Return each side's median over the rounds of the slowest rank's milliseconds."""
    return {
        side: median_ms([max(took) for took in zip(*(r[side] for r in of_ranks), strict=True)])
        for side in of_ranks[0]
    }


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def measure(world: int, rounds: int) -> None:
    """Print all rows of one world size."""
    kind = ray.remote(Rank).options(num_cpus=1)
    ranks = [kind.remote(rank, world) for rank in range(world)]
    port = free_port()
    ray.get([r.join.remote(port) for r in ranks], timeout=120)

    def rows(what: str, goal: float, method: str, *args: Any) -> None:
        calls = [getattr(r, method).remote(*args) for r in ranks]
        took = slowest(ray.get(calls, timeout=600))
        for side, ms in took.items():
            if side != "gloo":
                print_ratio(f"{world} ranks, {what}, {side}", ms, took["gloo"], goal)

    for size, goal in GOALS.items():
        times = rounds if size < 64 else max(3, rounds // 3)
        rows(f"all-reduce {size} MB", goal, "all_reduce", size * MB, "float32", times)
    rows("all-reduce 8 MB bfloat16", GOALS[8], "all_reduce", 8 * MB, "bfloat16", rounds)
    rows("send/recv 1 MB", 1.0, "there_and_back", MB, rounds)
    for actor in ranks:
        ray.kill(actor)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--worlds", type=int, nargs="+", default=[2, 4])
    args = parser.parse_args()
    os.environ["RAY_worker_niceness"] = "0"  # or whatever else runs here comes first
    ray.init(
        address="local",
        include_dashboard=False,
        num_cpus=max(args.worlds),
        logging_level="warning",
    )
    for world in args.worlds:
        measure(world, args.rounds)
    ray.shutdown()


if __name__ == "__main__":
    main()
