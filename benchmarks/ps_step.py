"""
One synchronous parameter-server step without compute: gradients in, update, parameters out.

distplat: `ps-sync` as workers use it, over shared memory on one node. Peer: the synchronous version
of the parameter-server example in Ray's documentation, written for the same layers: one server
actor, weights are sent as a `state_dict` of tensors, gradients as a list of arrays, and the driver
passes references. Both update by SGD with momentum. Second peer: torch's all-reduce over gloo, of
the same number of bytes between the same workers, without an update.
"""

import argparse
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from common import WORKERS, median_ms, print_ratio
from torch import nn

from distplat.actors.messages import WorkOrder
from distplat.actors.spawn import spawn
from distplat.platform.spec import Job
from distplat.strategies.strategy_spec import Roles

LAYERS = 8
MEGABYTES = (1, 8, 64)
GOAL, GLOO_GOAL = 0.15, 1.0


def layers(megabytes: int) -> nn.ParameterList:
    """Create a model of the given size in MB of float32, in equal layers."""
    size = megabytes * (1 << 20) // 4 // LAYERS
    return nn.ParameterList(nn.Parameter(torch.zeros(size)) for _ in range(LAYERS))


class OurWorker:
    """A worker whose gradients are ready at once."""

    def connect(self, order: WorkOrder, megabytes: int) -> None:
        from distplat.actors.ray_transport import RayTransport
        from distplat.actors.servers.shards import RemoteShards
        from distplat.strategies.loop.control import StepControl
        from distplat.strategies.model.flat import FlatModel

        torch.set_num_threads(1)
        self.flat = FlatModel(layers(megabytes))
        self.shards = RemoteShards(RayTransport(), order, 1 << 20, 0, threading.Event())
        self.shards.connect(self.flat)
        self.flat.grads.fill_(1.0)
        self.control = StepControl(1.0, 1.0, present=self.flat.present)
        self.step = 0

    def run(self, steps: int) -> list[float]:
        seconds = []
        for _ in range(steps):
            began = time.perf_counter()
            self.shards.push(self.step, self.control)
            seconds.append(time.perf_counter() - began)
            self.step += 1
        return seconds


class PeerServer:
    """Server actor with the whole model."""

    def __init__(self, megabytes: int) -> None:
        self.model = layers(megabytes)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01, momentum=0.9)

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: value.cpu() for name, value in self.model.state_dict().items()}

    def apply(self, *gradients: list[np.ndarray[Any, Any]]) -> dict[str, torch.Tensor]:
        summed = [np.stack(parts).sum(axis=0) for parts in zip(*gradients, strict=True)]
        for parameter, gradient in zip(self.model, summed, strict=True):
            parameter.grad = torch.from_numpy(gradient)
        self.optimizer.step()
        return self.weights()


class PeerWorker:
    """Worker actor that loads the weights and returns its gradients."""

    def __init__(self, megabytes: int) -> None:
        torch.set_num_threads(1)
        self.model = layers(megabytes)
        self.gradients = [np.ones(p.shape, dtype=np.float32) for p in self.model]

    def gradient(self, weights: dict[str, torch.Tensor]) -> list[np.ndarray[Any, Any]]:
        self.model.load_state_dict(weights)
        return self.gradients


class GlooWorker:
    """Worker actor that all-reduces a vector with a torch group."""

    def __init__(self, rank: int, file: str, megabytes: int) -> None:
        torch.set_num_threads(1)
        dist: Any = torch.distributed  # torch's stubs leave out most of it
        store = dist.FileStore(file, WORKERS)
        self.group = dist.ProcessGroupGloo(store, rank, WORKERS, timedelta(seconds=60))
        self.vector = torch.ones(megabytes * (1 << 20) // 4)

    def run(self, steps: int) -> list[float]:
        seconds = []
        for _ in range(steps):
            began = time.perf_counter()
            self.group.allreduce([self.vector]).wait()
            seconds.append(time.perf_counter() - began)
        return seconds


def ours(megabytes: int, servers: int, replication: int) -> tuple[Any, list[Any]]:
    """Start distplat's actors; return them and the workers."""
    job = Job.model_validate(
        {
            "name": "bench",
            "strategy": "ps-sync",
            "scaling": {"num_workers": WORKERS},
            "optimizer": {"name": "SGD", "lr": 0.01, "momentum": 0.9},
            "global_batch_size": WORKERS,
            "steps": 1 << 20,
        }
    )
    run = f"bench-{megabytes}-{servers}"
    cast = spawn(job, Roles(servers=servers, replication=replication), run, 0)
    for worker in cast.workers.values():
        ray.kill(worker)
    workers = [ray.remote(OurWorker).options(num_cpus=1).remote() for _ in range(WORKERS)]
    cast.workers = dict(enumerate(workers))
    orders = [
        WorkOrder(job, run, 0, rank, "", "", None, cast.manager, None) for rank in range(WORKERS)
    ]
    ray.get(
        [w.connect.remote(o, megabytes) for w, o in zip(workers, orders, strict=True)],
        timeout=120,
    )
    return cast, workers


def measure(
    megabytes: int, servers: int, replication: int, steps: int, rounds: int
) -> tuple[float, float, float]:
    """Return the milliseconds per step of distplat, the peer and gloo, measured alternately."""
    cast, workers = ours(megabytes, servers, replication)
    server = ray.remote(PeerServer).options(num_cpus=0).remote(megabytes)
    peers = [ray.remote(PeerWorker).options(num_cpus=1).remote(megabytes) for _ in range(WORKERS)]
    folder = tempfile.TemporaryDirectory()
    gloo_class = ray.remote(GlooWorker).options(num_cpus=1)
    file = str(Path(folder.name) / "store")
    gloos = [gloo_class.remote(rank, file, megabytes) for rank in range(WORKERS)]

    def slowest(group: list[Any]) -> float:
        return max(map(median_ms, ray.get([w.run.remote(steps) for w in group], timeout=300)))

    def peer_step() -> float:
        weights = server.weights.remote()
        seconds = []
        for _ in range(steps):
            began = time.perf_counter()
            weights = server.apply.remote(*[p.gradient.remote(weights) for p in peers])
            ray.wait([weights], timeout=60)
            seconds.append(time.perf_counter() - began)
        return median_ms(seconds)

    sides: list[Callable[[], float]]
    sides = [lambda: slowest(workers), peer_step, lambda: slowest(gloos)]
    for side in sides:
        side()  # warm up
    figures = [[side() for side in sides] for _ in range(rounds)]
    cast.end()
    for actor in [server, *peers, *gloos]:
        ray.kill(actor)
    folder.cleanup()
    mine, peer, gloo = (statistics.median(column) for column in zip(*figures, strict=True))
    return mine, peer, gloo


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--servers", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--replication", type=int, default=1)
    args = parser.parse_args()
    ray.init(
        address="local",
        include_dashboard=False,
        num_cpus=8,
        logging_level="warning",
        log_to_driver=False,
    )
    for servers in args.servers:
        for megabytes in MEGABYTES:
            mine, peer, gloo = measure(
                megabytes, servers, args.replication, args.steps, args.rounds
            )
            what = f"ps-sync step, {megabytes} MB, {servers} server(s)"
            print_ratio(what, mine, peer, GOAL)
            print_ratio(f"{what}, all-reduce", mine, gloo, GLOO_GOAL)
    ray.shutdown()


if __name__ == "__main__":
    main()
