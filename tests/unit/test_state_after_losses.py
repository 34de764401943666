"""A lost worker leaves no trace in buffers and frozen parameters: the same bits at the end."""

import threading
from functools import cache
from typing import Any

import pytest
import torch
from in_memory_run import train
from rank_threads import on_ranks
from test_model_state import STEPS, WIDE, Data, Teacher, job
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from distplat.actors.local_actors import Servers
from distplat.platform.errors import Abandoned, ActorLost, CollectiveError, ProtocolError
from distplat.strategies.base import Strategy
from distplat.strategies.catalog import make_strategy
from distplat.strategies.fakes import Fabric
from distplat.strategies.training.loop import Progress
from distplat.strategies.training.session import Ports, Prepared, join, prepare

WORLD = 3


class Both(Data):
    """A batch norm before a student and its teacher."""

    def model(self) -> nn.Module:
        return nn.Sequential(nn.BatchNorm1d(6, dtype=WIDE), Teacher("data assigned"))

    def train_data(self) -> TensorDataset:
        """No rank has a batch of one."""
        return TensorDataset(*(tensor[:24] for tensor in super().train_data().tensors))


@cache
def unfailed(strategy: str) -> dict[str, Tensor]:
    return train(job(strategy, WORLD), Both).parameters()


class Workers:
    """Three ranks, over attempts."""

    def __init__(self, strategy: str) -> None:
        self.job = job(strategy, WORLD)
        self.strategies: dict[int, Strategy[Any]] = {}
        self.ranks: dict[int, Prepared] = {}
        for rank in range(WORLD):
            self.renew(rank)
        roles = self.strategies[0].roles(self.job)
        self.servers = Servers(self.job, roles) if roles.servers else None
        self.starts: list[int] = []

    def renew(self, rank: int) -> None:
        self.strategies[rank] = make_strategy(self.job)
        self.ranks[rank] = prepare(self.job, Both(), strategy=self.strategies[rank])

    def attempt(self, number: int, fabric: Fabric) -> bool:
        """Say whether all came to the end."""
        stopped: list[Exception] = []
        self.starts.clear()
        over = threading.Event()

        def body(rank: int) -> None:
            collective = fabric.collective(rank)
            shards = None
            if self.servers is not None:
                shards = self.servers.shards(rank, STEPS, attempt=number, abandoned=over)
            ports = Ports(collective, shards, peers=lambda: collective)
            own = self.ranks[rank], self.strategies[rank], rank, ports
            try:
                loop = join(*own, report=lambda part: None, progress=Progress())
                self.starts.append(loop.start)
                loop.run()
            except (Abandoned, ActorLost, CollectiveError, ProtocolError) as error:
                stopped.append(error)
                over.set()
                fabric.give_up()

        on_ranks(WORLD, body)
        return not stopped


@pytest.mark.parametrize("victim", [0, 2])
@pytest.mark.parametrize("after", range(11, 41, 5))
@pytest.mark.parametrize("strategy", ["ring", "ps-sync"])
def test_one_is_lost_at_any_operation(strategy: str, after: int, victim: int) -> None:
    workers, fabric = Workers(strategy), Fabric(WORLD)
    fabric.kill(victim, after=after)
    if not workers.attempt(0, fabric):
        workers.renew(victim)
        assert workers.attempt(1, Fabric(WORLD))
        assert len({*workers.starts}) == 1
    for rank in range(WORLD):
        found = workers.ranks[rank].flat.model.state_dict()
        for name, value in unfailed(strategy).items():
            assert torch.equal(found[name], value), (name, rank, workers.starts)
