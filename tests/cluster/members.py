"""An actor that is one rank of a collective group, for the tests of the backend."""

import os

import torch
from collective_contract import CHECKS, FAILURES

from distplat.actors.collective import RayCollective
from distplat.actors.group import Settings

TIMEOUT_S = 3.0


class Member:
    """One rank of a group."""

    def pid(self) -> int:
        return os.getpid()

    def join(self, name: str, rank: int, world: int) -> None:
        self.group = RayCollective(name, "gloo", rank, world, Settings(TIMEOUT_S, 30))

    def check(self, name: str) -> None:
        CHECKS[name](self.group)

    def fail(self, name: str) -> None:
        FAILURES[name](self.group)

    def all_reduce_for_ever(self) -> None:
        while True:
            self.group.all_reduce(torch.ones(1000))

    def leave(self) -> None:
        self.group.close()
