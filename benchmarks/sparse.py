"""
Pull of rows of an embedding table and push of their gradients, without compute in between.

distplat: a pull and a push of 100 000 of 1 000 000 rows of 64 floats by one worker, as in a step,
including the update by SGD. Peers: the whole table pulled through Ray by one actor call, as in the
parameter-server example in Ray's documentation (`state_dict`, loaded into the worker's model), and
as a plain array that is not read (one copy into Ray's store, which the worker maps). Last, in one
process without a server: torch's `nn.Embedding(sparse=True)`, with lookup, gradients and SGD for
the same rows.
"""

import argparse
import statistics
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import ray
import torch
from common import median_ms, print_ratio
from torch import nn

from distplat.actors.messages import TablePart, WorkOrder
from distplat.actors.servers.node import ServerNode
from distplat.platform.shard_map import TableSpec
from distplat.platform.spec import Job

ROWS, WIDTH, ASKED = 1_000_000, 64, 100_000
GOAL, LOCAL_GOAL = 0.1, 1.0


def job(servers: int) -> Job:
    return Job.model_validate(
        {
            "name": "bench",
            "strategy": "ring",
            "optimizer": {"name": "SGD", "lr": 0.01},
            "embeddings": {"servers": servers, "optimizer": {"name": "SGD", "lr": 0.01}},
            "global_batch_size": 1,
            "steps": 1 << 20,
        }
    )


class OurWorker:
    """A worker whose gradients are ready at once."""

    def connect(self, order: WorkOrder) -> None:
        from distplat.actors.ray_transport import RayTransport
        from distplat.actors.servers.tables import RemoteTables

        torch.set_num_threads(1)
        self.tables = RemoteTables(RayTransport(), order, 0, threading.Event())
        spec = TableSpec("table", ROWS, WIDTH, 0.1, whole=True)
        self.plan, _ = self.tables.connect((spec,), 1 << 20)
        self.tables.begin(0)
        self.random, self.step = np.random.default_rng(0), 0
        self.gradient = np.ones((ASKED, WIDTH), np.float32)

    def run(self, steps: int) -> list[tuple[float, float]]:
        """Return the seconds of each pull and push."""
        from distplat.strategies.sparse.routing import route
        from distplat.strategies.sparse.table import RowGradients

        seconds = []
        for _ in range(steps):
            ids = np.sort(self.random.choice(ROWS, ASKED, replace=False))  # as unique ids come
            began = time.perf_counter()
            routed, _ = route(self.plan, self.plan.tables[0], ids)
            self.tables.pull(0, routed, keep=True)
            between = time.perf_counter()
            given = RowGradients(0, routed.ids, self.gradient)
            self.tables.push(self.step, [(routed, given)]).wait()
            seconds.append((between - began, time.perf_counter() - between))
            self.step += 1
        return seconds


class DenseServer:
    """Server actor that returns the whole table."""

    def __init__(self) -> None:
        self.model = nn.Embedding(ROWS, WIDTH)

    def array(self) -> np.ndarray[Any, Any]:
        return self.model.weight.detach().numpy()

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: value.cpu() for name, value in self.model.state_dict().items()}


class Puller:
    """Worker actor that pulls the whole table."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        self.model = nn.Embedding(ROWS, WIDTH)

    def load(self, server: Any, steps: int) -> list[float]:
        seconds = []
        for _ in range(steps):
            began = time.perf_counter()
            self.model.load_state_dict(ray.get(server.weights.remote(), timeout=60))
            seconds.append(time.perf_counter() - began)
        return seconds

    def look_at_nothing(self, server: Any, steps: int) -> list[float]:
        seconds = []
        for _ in range(steps):
            began = time.perf_counter()
            table = ray.get(server.array.remote(), timeout=60)
            seconds.append(time.perf_counter() - began)
            del table
        return seconds


class LocalWorker:
    """A worker with the table in its own process, for the same step."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        self.table = nn.Embedding(ROWS, WIDTH, sparse=True)
        self.optimizer = torch.optim.SGD(self.table.parameters(), lr=0.01)
        self.random = np.random.default_rng(0)
        self.gradient = torch.ones(ASKED, WIDTH)

    def run(self, steps: int) -> list[float]:
        seconds = []
        for _ in range(steps):
            ids = torch.from_numpy(np.sort(self.random.choice(ROWS, ASKED, replace=False)))
            began = time.perf_counter()
            self.table(ids).backward(self.gradient)
            self.optimizer.step()
            self.optimizer.zero_grad()
            seconds.append(time.perf_counter() - began)
        return seconds


def start(servers: int) -> tuple[Any, list[Any]]:
    """Start distplat's actors; return the worker and its servers."""
    kind = ray.remote(ServerNode).options(num_cpus=0, max_concurrency=4)
    handles = [
        kind.remote(f"server-{i}", tables=TablePart(f"server-{i}", i)) for i in range(servers)
    ]
    worker = ray.remote(OurWorker).options(num_cpus=1).remote()
    order = WorkOrder(
        job(servers), "bench", 0, 0, "", "", None, None, None, embedding_servers=tuple(handles)
    )
    ray.get(worker.connect.remote(order), timeout=120)
    return worker, handles


def measure(servers: int, steps: int, rounds: int) -> None:
    """Print the times of distplat and the peers, measured alternately."""
    worker, handles = start(servers)
    dense = ray.remote(DenseServer).options(num_cpus=0).remote()
    puller = ray.remote(Puller).options(num_cpus=1).remote()
    local = ray.remote(LocalWorker).options(num_cpus=1).remote()
    parts: list[tuple[float, float]] = []

    def ours() -> float:
        found = ray.get(worker.run.remote(steps), timeout=300)
        parts.append((median_ms([p for p, _ in found]), median_ms([p for _, p in found])))
        return median_ms([pull + push for pull, push in found])

    sides: list[Callable[[], float]] = [
        ours,
        lambda: median_ms(ray.get(puller.load.remote(dense, steps), timeout=300)),
        lambda: median_ms(ray.get(puller.look_at_nothing.remote(dense, steps), timeout=300)),
        lambda: median_ms(ray.get(local.run.remote(steps), timeout=300)),
    ]
    for side in sides:
        side()  # warm up
    figures = [[side() for side in sides] for _ in range(rounds)]
    for actor in [worker, *handles, dense, puller, local]:
        ray.kill(actor)
    mine, loaded, bare, at_home = (statistics.median(c) for c in zip(*figures, strict=True))
    what = f"pull + push of {ASKED} rows, {servers} server(s)"
    print(what)
    print_ratio("  whole table, state_dict as in Ray's example", mine, loaded, GOAL)
    print_ratio("  whole table, bare array", mine, bare, GOAL)
    print_ratio("  nn.Embedding in one process", mine, at_home, LOCAL_GOAL)
    pull, push = (statistics.median(column) for column in zip(*parts, strict=True))
    print(f"{'':<44} of ours: pull {pull:.1f} ms, push {push:.1f} ms", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--servers", type=int, nargs="*", default=[1, 2])
    args = parser.parse_args()
    ray.init(
        address="local",
        include_dashboard=False,
        num_cpus=8,
        logging_level="warning",
        log_to_driver=False,
    )
    for servers in args.servers:
        measure(servers, args.steps, args.rounds)
    ray.shutdown()


if __name__ == "__main__":
    main()
