"""Actors as ranks of a collective group, for the tests of the backends."""

import hashlib
import logging
import os
import threading
import time
from typing import Any

import ray
import torch
from collective_contract import CHECKS, FAILURES

from distplat.actors.collectives.ray_groups import create_group
from distplat.actors.collectives.rendezvous import GroupSettings
from distplat.platform.errors import CollectiveError, InfrastructureError
from distplat.strategies.collective import Handle, ReduceOp

TIMEOUT_S = 3.0
"""Deadline of tests that wait for its expiry."""
LONG_TIMEOUT_S = 100.0
"""Deadline that does not expire: a lost rank is detected earlier."""


class Member:
    """One rank of a group; with `max_concurrency`, several calls run at once."""

    joining = ""

    def pid(self) -> int:
        return os.getpid()

    def node(self) -> str:
        return str(ray.get_runtime_context().get_node_id())

    def join(
        self,
        name: str,
        rank: int,
        world: int,
        backend: str = "gloo",
        debug: bool = False,
        timeout_s: float = LONG_TIMEOUT_S,
    ) -> str:
        """Join a group; return its backend and the reason for the choice."""
        self.settings, self.joining = GroupSettings(timeout_s, LONG_TIMEOUT_S, debug), name
        self.group = create_group(name, backend, rank, world, self.settings)
        return f"{self.group.choice.backend}: {self.group.choice.why}"

    def join_logged(self, name: str, rank: int, world: int, backend: str) -> list[str]:
        """Join; return the log messages."""
        lines: list[str] = []
        handler = logging.Handler()
        handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
        logger = logging.getLogger("distplat.actors.collectives.ray_groups")
        logger.setLevel(logging.INFO)
        logger.addHandler(handler)
        try:
            self.join(name, rank, world, backend)
        finally:
            logger.removeHandler(handler)
        return lines

    def join_incomplete(self, name: str, rank: int, world: int, backend: str) -> float:
        """Wait for an incomplete group until `give_up`; return the seconds since `give_up`."""
        try:
            self.join(name, rank, world, backend)
        except InfrastructureError:
            assert self.settings.abandoned.is_set(), "it did not wait"
            return time.monotonic() - self.aborted_at
        raise AssertionError("the group was formed")

    def give_up(self, name: str) -> None:
        """Abandon `join_incomplete` once it waits."""
        while self.joining != name:
            time.sleep(0.01)
        time.sleep(0.5)
        self.aborted_at = time.monotonic()
        self.settings.abandoned.set()

    def check(self, name: str) -> None:
        CHECKS[name](self.group)

    def fail(self, name: str) -> None:
        FAILURES[name](self.group)

    def all_reduce_until_error(self) -> None:
        """Reduce until an error, then leave as a worker does."""
        try:
            while True:
                self.group.all_reduce(torch.ones(1000))
        finally:
            self.group.close()

    def wait_for_abort(self, operation: str, elements: int) -> tuple[float, str]:
        """Wait for missing ranks; return the seconds from `abort` to the error, and its message."""
        try:
            self.run_operation(operation, elements)
        except CollectiveError as error:
            assert error.missing == ()
            return time.monotonic() - self.aborted_at, str(error)
        raise AssertionError("the operation has completed")

    def abort(self) -> None:
        self.aborted_at = time.monotonic()
        self.group.abort()

    def run_operation(self, operation: str, elements: int = 7, other: int = 1) -> None:
        """Run one operation on a tensor of ones."""
        tensor = torch.ones(elements)
        world = self.group.world
        match operation:
            case "all_reduce":
                self.group.all_reduce(tensor)
            case "start_all_reduce":
                self.group.start_all_reduce(tensor).wait()
            case "all_reduce int64":
                self.group.all_reduce(tensor.long())
            case "all_reduce max":
                self.group.all_reduce(tensor, ReduceOp.MAX)
            case "broadcast":
                self.group.broadcast(tensor, other)
            case "barrier":
                self.group.barrier()
            case "all_gather":
                self.group.all_gather([tensor.clone() for _ in range(world)], tensor)
            case "send":
                self.group.send(tensor, other)
            case "recv":
                self.group.recv(tensor, other)

    def start_waits(self) -> bool:
        return self.group.start_waits

    def repeat(self, operation: str, times: int) -> None:
        for _ in range(times):
            self.run_operation(operation)

    def start_many(self, count: int, elements: int) -> None:
        """Start all operations, then wait for them in reverse order."""
        tensors = [torch.full((elements,), float(i + self.group.rank)) for i in range(count)]
        handles: list[Handle] = [self.group.start_all_reduce(t) for t in tensors]
        for handle in reversed(handles):
            handle.wait()
        world = self.group.world
        for i, tensor in enumerate(tensors):
            assert tensor.eq(i * world + world * (world - 1) / 2).all()

    def digest_of_sum(self, elements: int) -> str:
        """Return a digest of a sum that depends on the order of the summands."""
        tensor = torch.linspace(0.1, 1.7, elements) / (self.group.rank + 3)
        self.group.all_reduce(tensor)
        return hashlib.sha256(tensor.numpy().tobytes()).hexdigest()

    def traffic_of(self, operation: str, elements: int) -> tuple[int, int, float]:
        """Return (bytes sent, bytes received, seconds) of one operation."""
        traffic = self.group.traffic
        before = (traffic.sent_bytes, traffic.received_bytes)
        seconds = traffic.waiting_s + traffic.working_s
        self.run_operation(operation, elements)
        sent, received = traffic.sent_bytes - before[0], traffic.received_bytes - before[1]
        return sent, received, traffic.waiting_s + traffic.working_s - seconds

    def form_groups_in_sequence(
        self, name: str, rank: int, world: int, backend: str, times: int
    ) -> None:
        """Form groups; block in each, abort and close it, as survivors of failures do."""
        for number in range(times):
            self.join(f"{name}/{number}", rank, world, backend)
            self.group.barrier()
            if rank == 0:
                blocked_thread = threading.Thread(target=self._wait_in_all_reduce)
                blocked_thread.start()
                time.sleep(0.05)
            self.abort()
            self.group.close()
            if rank == 0:
                blocked_thread.join(10)
                assert not blocked_thread.is_alive()
        del self.group

    def _wait_in_all_reduce(self) -> None:
        try:
            self.run_operation("all_reduce")
        except CollectiveError:
            return
        raise AssertionError("the operation has completed")

    def count_resources(self) -> tuple[int, int]:
        """Return the number of threads and of descriptors of this process."""
        return len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))

    def leave(self) -> None:
        """Close the group, if any."""
        if hasattr(self, "group"):
            self.group.close()
            del self.group


class Pool:
    """Members shared by the tests of a module: the start of one takes seconds."""

    def __init__(self, **options: object) -> None:
        self._cls = ray.remote(Member).options(num_cpus=0.5, max_concurrency=4, **options)
        self._members: list[Any] = []
        self._taken = 0

    def take(self, count: int) -> list[Any]:
        while len(self._members) < count:
            self._members.append(self._cls.remote())
        taken, self._taken = self._members[:count], count
        ray.get([member.pid.remote() for member in taken], timeout=150)  # before deadlines
        return taken

    def give_back(self) -> None:
        """
        Let the members leave the test's group, and replace dead ones.

        Replacements start while the next tests run, unless these need all members.
        """
        taken, others = self._members[: self._taken], self._members[self._taken :]
        leaving = [actor.leave.remote() for actor in taken]
        alive = []
        for actor, call in zip(taken, leaving, strict=True):
            try:
                ray.get(call, timeout=60)
                alive.append(actor)
            except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError):
                ray.kill(actor)
        lost = self._taken - len(alive)
        self._members = [*alive, *others, *(self._cls.remote() for _ in range(lost))]
        self._taken = 0


def call_all(actors: list[Any], method: str, *args: object) -> list[Any]:
    """Call a method of all actors; return the results."""
    calls = [getattr(actor, method).remote(*args) for actor in actors]
    results: list[Any] = ray.get(calls, timeout=150)
    return results


def join(actors: list[Any], name: str, *settings: object) -> list[str]:
    """Join one group with all actors; return the result of `Member.join` of each."""
    world = len(actors)
    calls = [a.join.remote(name, rank, world, *settings) for rank, a in enumerate(actors)]
    choices: list[str] = ray.get(calls, timeout=150)
    return choices
