"""A pipeline task that kills processes in the forward or backward of given micro-batches."""

import os
import signal
import time

import ray
import torch
from tasks_for_tests import Blobs, create_marker, process_of
from torch import Tensor, nn

CHECKPOINT_DELAY_S = 2.0


class Staged(Blobs):
    """
    Four blocks with batch norm and dropout.

    Args:
        folder: for the markers of faults: each fault is injected once.
        faults: `kill 1 forward 6` kills rank 1 in its seventh forward in training. Instead of
            `kill`: `stop` freezes the rank, `late` kills it after a delay for the write of
            checkpoints, `server` kills a server of the first part after the same delay, once
            backups are ready. `backward` is the backward of that forward. `all` instead of a
            rank: every rank.
    """

    def __init__(self, folder: str, faults: list[str]) -> None:
        self.folder, self.faults = folder, [fault.split() for fault in faults]
        self.rank = str(ray.get_runtime_context().get_actor_name()).split("/")[1].split("-")[1]

    def model(self) -> nn.Module:
        blocks = [CountingBlock(self, 16) for _ in range(4)]
        return nn.Sequential(nn.Linear(5, 16), *blocks, nn.Linear(16, 3))

    def act(self, moment: str, forwards: int) -> None:
        """Inject the faults of this moment."""
        for number, (fault, rank, when, at) in enumerate(self.faults):
            mine = rank in ("all", self.rank) and (when, int(at)) == (moment, forwards)
            name = f"{number}-{self.rank}" if rank == "all" else str(number)
            if mine and create_marker(os.path.join(self.folder, name)):
                time.sleep(CHECKPOINT_DELAY_S if fault in ("late", "server") else 0.0)
                victim = server_of_first_part() if fault == "server" else os.getpid()
                os.kill(victim, signal.SIGSTOP if fault == "stop" else signal.SIGKILL)


def server_of_first_part() -> int:
    """Return the process of the server of shard 0; wait for its backup, if any."""
    name = "small/server-manager"
    actors = ray.util.list_named_actors(all_namespaces=True)
    run = next(actor["namespace"] for actor in actors if actor["name"] == name)
    manager = ray.get_actor(name, namespace=run)
    deadline = time.monotonic() + 60
    while assignments := ray.get(manager.assignments.remote(), timeout=30):
        if all(assignment.ready for assignment in assignments):
            address = ray.get(manager.follow.remote(0, 0, 0, 1.0), timeout=30).parameters[0]
            return int(address.pid)
        assert time.monotonic() < deadline, assignments
        time.sleep(0.05)
    return process_of("ServerNode")


class CountingBlock(nn.Module):
    """Counts its forwards in training in a buffer, and injects the task's faults."""

    def __init__(self, task: Staged, width: int) -> None:
        super().__init__()
        self.task = task
        self.parts = nn.Sequential(
            nn.Linear(width, width), nn.BatchNorm1d(width), nn.Tanh(), nn.Dropout(0.1)
        )
        self.register_buffer("forwards", torch.zeros((), dtype=torch.int64))

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.parts(inputs)
        if self.training:
            forwards = int(self.get_buffer("forwards"))
            self.get_buffer("forwards").add_(1)
            self.task.act("forward", forwards)
            time.sleep(0.002)
            outputs.register_hook(  # type: ignore[no-untyped-call]
                lambda _: self.task.act("backward", forwards)
            )
        return outputs
