"""Actors that are ranks of a collective group, for the tests of the backends."""

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
"""For tests in which a rank is late: they wait for it."""
FAR_S = 100.0
"""A deadline that is not to be waited for: what is lost is found before."""


class Member:
    """One rank of a group; with `max_concurrency`, several of its calls run at once."""

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
        timeout_s: float = FAR_S,
    ) -> str:
        """Join a group; gives the backend that it has and why."""
        self.settings, self.joining = GroupSettings(timeout_s, FAR_S, debug), name
        self.group = create_group(name, backend, rank, world, self.settings)
        return f"{self.group.choice.backend}: {self.group.choice.why}"

    def join_logged(self, name: str, rank: int, world: int, backend: str) -> list[str]:
        """Join; gives what was logged meanwhile."""
        lines: list[str] = []
        keeper = logging.Handler()
        keeper.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
        logger = logging.getLogger("distplat.actors.collectives.ray_groups")
        logger.setLevel(logging.INFO)
        logger.addHandler(keeper)
        try:
            self.join(name, rank, world, backend)
        finally:
            logger.removeHandler(keeper)
        return lines

    def join_in_vain(self, name: str, rank: int, world: int, backend: str) -> float:
        """Wait for a group that does not form, until told to give up; gives the seconds since."""
        try:
            self.join(name, rank, world, backend)
        except InfrastructureError:
            return time.monotonic() - self.given_up_at
        raise AssertionError("the group has formed")

    def give_up(self, name: str) -> None:
        """Tell the thread in `join_in_vain`, once it is there."""
        while self.joining != name:
            time.sleep(0.01)
        time.sleep(0.5)
        self.given_up_at = time.monotonic()
        self.settings.abandoned.set()

    def check(self, name: str) -> None:
        CHECKS[name](self.group)

    def fail(self, name: str) -> None:
        FAILURES[name](self.group)

    def all_reduce_for_ever(self) -> None:
        """Go on until it fails, and leave then, as a worker does: others may still be looking."""
        try:
            while True:
                self.group.all_reduce(torch.ones(1000))
        finally:
            self.group.close()

    def blocked(self, operation: str, elements: int) -> tuple[float, str]:
        """Wait where nobody comes; gives the seconds from `abort` to the error, and its text."""
        try:
            self.act(operation, elements)
        except CollectiveError as error:
            assert error.missing == ()
            return time.monotonic() - self.given_up_at, str(error)
        raise AssertionError("the operation has ended")

    def abort(self) -> None:
        self.given_up_at = time.monotonic()
        self.group.abort()

    def act(self, operation: str, elements: int = 7, other: int = 1) -> None:
        """Do one operation with a tensor of ones."""
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
            self.act(operation)

    def many_under_way(self, count: int, elements: int) -> None:
        """All are started before the first is waited for; the last is waited for first."""
        tensors = [torch.full((elements,), float(i + self.group.rank)) for i in range(count)]
        handles: list[Handle] = [self.group.start_all_reduce(t) for t in tensors]
        for handle in reversed(handles):
            handle.wait()
        world = self.group.world
        for i, tensor in enumerate(tensors):
            assert tensor.eq(i * world + world * (world - 1) / 2).all()

    def digest_of_sum(self, elements: int) -> str:
        """Sum fractions, whose sum depends on the order; gives a digest of the bits."""
        tensor = torch.linspace(0.1, 1.7, elements) / (self.group.rank + 3)
        self.group.all_reduce(tensor)
        return hashlib.sha256(tensor.numpy().tobytes()).hexdigest()

    def traffic_of(self, operation: str, elements: int) -> tuple[int, int, float]:
        """Give (bytes sent, bytes received, seconds) of one operation."""
        traffic = self.group.traffic
        before = (traffic.sent_bytes, traffic.received_bytes)
        seconds = traffic.waiting_s + traffic.working_s
        self.act(operation, elements)
        sent, received = traffic.sent_bytes - before[0], traffic.received_bytes - before[1]
        return sent, received, traffic.waiting_s + traffic.working_s - seconds

    def groups_one_after_the_other(
        self, name: str, rank: int, world: int, backend: str, times: int
    ) -> None:
        """Form groups, be stuck in each, abort and close it, as survivors of failures do."""
        for number in range(times):
            self.join(f"{name}/{number}", rank, world, backend)
            self.group.barrier()
            if rank == 0:
                stuck = threading.Thread(target=self._be_stuck)
                stuck.start()
                time.sleep(0.05)
            self.abort()
            self.group.close()
            if rank == 0:
                stuck.join(10)
                assert not stuck.is_alive()
        del self.group

    def _be_stuck(self) -> None:
        try:
            self.act("all_reduce")
        except CollectiveError:
            return
        raise AssertionError("the operation has ended")

    def held(self) -> tuple[int, int]:
        """Give how many threads and descriptors this process has."""
        return len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))

    def leave(self) -> None:
        """Close the group; one that did not form, or was left, is none."""
        if hasattr(self, "group"):
            self.group.close()
            del self.group


class Pool:
    """Members for the tests of a module: starting one takes seconds, so all tests share them."""

    def __init__(self, **options: object) -> None:
        self._kind = ray.remote(Member).options(num_cpus=0.5, max_concurrency=4, **options)
        self._members: list[Any] = []

    def take(self, count: int) -> list[Any]:
        while len(self._members) < count:
            self._members.append(self._kind.remote())
        ray.get([one.pid.remote() for one in self._members], timeout=150)  # in no deadline
        return self._members[:count]

    def give_back(self) -> None:
        """Let all leave the group that a test has made; the dead are replaced."""
        leaving = [actor.leave.remote() for actor in self._members]
        alive = []
        for actor, call in zip(self._members, leaving, strict=True):
            try:
                ray.get(call, timeout=60)
                alive.append(actor)
            except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError):
                ray.kill(actor)
        self._members = alive


def everybody(actors: list[Any], method: str, *args: object) -> list[Any]:
    done: list[Any] = ray.get([getattr(a, method).remote(*args) for a in actors], timeout=150)
    return done


def join(actors: list[Any], name: str, *settings: object) -> list[str]:
    """All join one group (see `Member.join`); gives what each chose and why."""
    world = len(actors)
    calls = [a.join.remote(name, rank, world, *settings) for rank, a in enumerate(actors)]
    choices: list[str] = ray.get(calls, timeout=150)
    return choices
