"""A task for pipelines whose stages are lost at given micro-batches, forward or backward."""

import os
import signal
import time

import ray
import torch
from tasks_for_tests import Blobs, first_to_come, process_of
from torch import Tensor, nn

LATE_S = 2.0


class Staged(Blobs):
    """
    Four blocks with batch norm and dropout: all that a stage keeps must come out the same.

    Args:
        folder: where deeds leave their marks, so that each is done once.
        deeds: `kill 1 forward 6`: rank 1, in its seventh forward in training; `stop` freezes,
            `late` kills when checkpoints had time to be written, `server` kills a server of the
            first part at such a time, or when backups are ready; `backward` is the backward of that
            forward, `all` instead of a rank is every one.
    """

    def __init__(self, folder: str, deeds: list[str]) -> None:
        self.folder, self.deeds = folder, [deed.split() for deed in deeds]
        self.rank = str(ray.get_runtime_context().get_actor_name()).split("/")[1].split("-")[1]

    def model(self) -> nn.Module:
        blocks = [Deeds(self, 16) for _ in range(4)]
        return nn.Sequential(nn.Linear(5, 16), *blocks, nn.Linear(16, 3))

    def act(self, moment: str, forwards: int) -> None:
        """Do what is to be done at this moment."""
        for number, (deed, rank, when, at) in enumerate(self.deeds):
            mine = rank in ("all", self.rank) and (when, int(at)) == (moment, forwards)
            name = f"{number}-{self.rank}" if rank == "all" else str(number)
            if mine and first_to_come(os.path.join(self.folder, name)):
                time.sleep(LATE_S if deed in ("late", "server") else 0.0)
                victim = server_of_first_part() if deed == "server" else os.getpid()
                os.kill(victim, signal.SIGSTOP if deed == "stop" else signal.SIGKILL)


def server_of_first_part() -> int:
    """Give the process that serves shard 0, as soon as its backup is ready if it has one."""
    name = "small/server-manager"
    actors = ray.util.list_named_actors(all_namespaces=True)
    run = next(actor["namespace"] for actor in actors if actor["name"] == name)
    manager = ray.get_actor(name, namespace=run)
    until = time.monotonic() + 60
    while assignments := ray.get(manager.assignments.remote(), timeout=30):
        if all(assignment.ready for assignment in assignments):
            address = ray.get(manager.follow.remote(0, 0, 0, 1.0), timeout=30).parameters[0]
            return int(address.pid)
        assert time.monotonic() < until, assignments
        time.sleep(0.05)
    return process_of("ServerNode")


class Deeds(nn.Module):
    """A block that counts its forwards in training, in a buffer."""

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
