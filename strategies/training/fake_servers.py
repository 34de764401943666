"""The server group in memory; `strategies/fakes.py` has the rest of the fakes, and gives it out."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from distplat.platform.errors import ActorLost
from distplat.platform.ledger import Answer, PushId
from distplat.platform.shard_map import Division, Shard, ShardPlan, cut_shards, within
from distplat.strategies.base import Pushed
from distplat.strategies.ports import ShardCopy
from distplat.strategies.training.client import (
    fetch_copies,
    make_service,
    pushed,
    shard_copy,
)
from distplat.strategies.training.control import StepControl
from distplat.strategies.training.flat import FlatModel
from distplat.strategies.training.parts import ALL, Holding, as_array
from distplat.strategies.training.restoring import SavedState
from distplat.strategies.training.service import Deliver, Limits, Service
from distplat.strategies.training.shard import ParameterShard


@dataclass
class ServerGroup:
    """
    Server nodes in memory, shared by the ranks' `InMemoryShards`.

    Set `lost` to make the next call of every rank fail as if a server had died. `servers` is how
    many there are, where the plan's shards are those of several groups.
    """

    plan: ShardPlan
    timeout_s: float = 10.0
    lost: str = ""
    servers: int = 0
    speeds: Sequence[float] = ()
    """See `cut_shards`."""
    apart: bool = False
    """Whether ranks compute on copies that no server writes to, as if on another node."""

    def __post_init__(self) -> None:
        self._opening = threading.Lock()
        self._params: Tensor | None = None
        self._tail = 0  #: elements that are frozen
        self._services: list[Service] = []
        self.servers = self.servers or self.plan.shards

    def open(
        self, flat: FlatModel, saved: SavedState | None = None, holding: Holding = ALL
    ) -> Tensor:
        """Take the first comer's parameters as the initial ones; give the shared vector."""
        initial = flat.params
        with self._opening:
            if self._params is None:
                self._params = initial.clone()
                limits = Limits(self.timeout_s, self.timeout_s)
                self._tail = flat.layout.tail_size
                for shard in self.cuts(initial.numel()):
                    part = self._params[shard.start : shard.stop]
                    name = f"server-{shard.index}"
                    uncounted = within(holding.uncounted(flat), shard)
                    layout = flat.layout.cut(shard.start, shard.stop)
                    plan = replace(self.plan, uncounted=uncounted, layout=layout)
                    self._services.append(make_service(name, plan, limits, part))
                    run = shard.start, shard.stop
                    state = saved.optimizer(flat, *run, holding.places) if saved else {}
                    self._services[-1].restore(flat.version, lambda params: None, state)
            return self._params

    def cuts(self, total: int) -> tuple[Shard, ...]:
        """Give the shards of a vector of so many elements."""
        return cut_shards(total, self.servers, speeds=self.speeds, tail=self._tail).shards

    def service(self, index: int, step: int | None = None) -> Service:
        """
        Reach one shard.

        Raises:
            ActorLost: its server was lost.
        """
        if self.lost:
            raise ActorLost(f"server-{index}", step, self.lost)
        return self._services[index]

    def renew(self, attempt: int, world: int | None = None) -> None:
        """Begin a later attempt: who waits here is told that this one is over."""
        for service in self._services:
            service.exclusively(partial(service.renew, attempt, world))

    def logs(self) -> list[NDArray[np.int64]]:
        """Give each shard's order of updates, where there is one to tell; see `apply_log`."""
        found = [service.log() for service in self._services]
        return [log for log in found if log is not None]


def server_groups(
    plan: ShardPlan, division: Division, timeout_s: float = 10.0, speeds: Sequence[float] = ()
) -> list[ServerGroup]:
    """Make the servers of a run, by part of the model; `plan` is that of a whole one."""
    return [
        ServerGroup(
            replace(plan, world=len(ranks), workers=ranks if len(division.parts) > 1 else ()),
            timeout_s,
            speeds=speeds,
            servers=division.each,
        )
        for ranks in division.parts
    ]


class InMemoryShards:
    """One rank's view of a `ServerGroup` (see `Shards`), in one attempt; `world`: its ranks."""

    def __init__(
        self, group: ServerGroup, rank: int, attempt: int = 0, world: int | None = None
    ) -> None:
        self._group, self._rank, self._attempt = group, rank, attempt
        self._world = world
        self._pulls = 0

    def connect(
        self, flat: FlatModel, saved: SavedState | None = None, holding: Holding | None = None
    ) -> None:
        """See `Shards`."""
        self._flat = flat
        shared = self._group.open(flat, saved, holding or ALL)
        self._cuts = self._group.cuts(flat.size)
        for cut in self._cuts if self._attempt else ():
            service = self._group.service(cut.index)
            service.exclusively(partial(service.forget, self._rank))
        self._group.renew(self._attempt, self._world)
        private = self._group.plan.consistency.private
        if not private and not self._group.apart:
            flat.move(shared, flat.grads)
        self.refresh()
        flat.version = min(self._group.service(cut.index).served.steps for cut in self._cuts)
        if not private:
            self.step_back(flat.version)

    def step_back(self, version: int) -> None:
        """See `Shards`."""
        self._flat.version = version
        if max(self._versions()) == version:
            return
        self._flat.move(self._flat.params.clone(), self._flat.grads)
        for cut in self._cuts:
            shard = self._group.service(cut.index).served
            assert isinstance(shard, ParameterShard), "only they are of one version"
            self._flat.params[cut.start : cut.stop] = shard.values(version)

    def _versions(self) -> list[int]:
        return [self._group.service(cut.index).served.version for cut in self._cuts]

    def push(self, step: int, control: StepControl, task: int | None = None) -> Pushed:
        """See `Shards`."""
        self._control = control
        return self._taken([self._push(cut, step, task) for cut in self._cuts])

    def _push(self, cut: Shard, step: int, task: int | None) -> Answer:
        push = PushId(self._group.plan.run, self._attempt, self._rank, step, task)
        gradient = self._flat.grads[cut.start : cut.stop]
        return self._group.service(cut.index, step).push(
            push, gradient, self._control, self._deliver(cut)
        )

    def commit(self, step: int, norm: float) -> Pushed:
        """See `Shards`."""
        return self._taken(
            [
                self._group.service(cut.index, step).commit(
                    self._rank, step, norm, self._deliver(cut)
                )
                for cut in self._cuts
            ]
        )

    def _taken(self, answers: list[Answer]) -> Pushed:
        """Have the values of the answers, where they are not here."""
        for cut, answer in zip(self._cuts, answers, strict=True):
            if answer.payload is not None:
                self._flat.params[cut.start : cut.stop] = answer.payload
        sizes = [cut.size * self._flat.params.itemsize for cut in self._cuts]
        moved = self._group.apart or self._group.plan.consistency.private
        return pushed(answers, [(size, size * moved) for size in sizes])

    def refresh(self) -> None:
        """See `Shards`."""
        self._taken(
            [
                self._group.service(cut.index).pull(
                    self._rank, (self._attempt, self._pulls), self._deliver(cut)
                )
                for cut in self._cuts
            ]
        )
        self._pulls += 1

    def tail(self) -> NDArray[np.bool_]:
        """See `Shards`."""
        served = self._group.service(0).served
        assert isinstance(served, ParameterShard), "only they have a tail"
        return served.tail

    def copies(self, version: int) -> list[ShardCopy] | None:
        """See `Shards`."""

        def ask(cut: Shard, limit_s: float) -> ShardCopy:
            service = self._group.service(cut.index)
            copy = shard_copy(cut.start, service, version, limit_s)
            return replace(copy, box=None if copy.box is None else [*map(as_array, copy.box)])

        return fetch_copies(
            [partial(ask, cut) for cut in self._cuts], version, self._group.timeout_s
        )

    def _deliver(self, cut: Shard) -> Deliver:
        mine, apart = self._flat.params[cut.start : cut.stop], self._group.apart

        def deliver(values: Tensor, version: int) -> Tensor | None:
            if apart:
                return values.clone()
            if mine.data_ptr() != values.data_ptr():
                mine.copy_(values)
            return None

        return deliver
