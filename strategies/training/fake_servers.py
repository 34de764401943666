"""The server group in memory; `strategies/fakes.py` has the rest of the fakes, and gives it out."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from distplat.platform.errors import ActorLost
from distplat.platform.ledger import Answer, PushId
from distplat.platform.shard_map import Division, Shard, ShardPlan, cut_shards, within
from distplat.strategies.algorithms.shard_release import covered
from distplat.strategies.base import Pushed
from distplat.strategies.ports import ShardCopy
from distplat.strategies.training.client import (
    fetch_copies,
    make_service,
    pushed,
    shard_copy,
)
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
                for shard in self.cuts(initial.numel()):
                    part = self._params[shard.start : shard.stop]
                    name = f"server-{shard.index}"
                    plan = replace(self.plan, uncounted=within(holding.uncounted(flat), shard))
                    self._services.append(make_service(name, plan, limits, part))
                    run = shard.start, shard.stop
                    state = saved.optimizer(flat, *run, holding.places) if saved else {}
                    self._services[-1].restore(flat.version, lambda params: None, state)
            return self._params

    def cuts(self, total: int) -> tuple[Shard, ...]:
        """Give the shards of a vector of so many elements."""
        return cut_shards(total, self.servers, speeds=self.speeds).shards

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
        self._early: dict[int, _Early] = {}  #: shard -> its part's push under way

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

    def one_memory(self) -> bool:
        """See `Shards`."""
        return not self._group.plan.consistency.private and not self._group.apart

    def bounds(self) -> list[tuple[int, int]]:
        """See `Shards`."""
        return [(cut.start, cut.stop) for cut in self._cuts]

    def may_leave(self, shard: int) -> bool:
        """See `Shards`."""
        return self._group.apart

    def push_part(self, shard: int, step: int, task: int | None = None) -> None:
        """See `Shards`."""
        self._early[shard] = _Early(partial(self._push, self._cuts[shard], step, task))

    def push(self, step: int, task: int | None = None) -> Pushed:
        """See `Shards`."""
        began, early = time.monotonic(), self._early
        answers = {c.index: self._push(c, step, task) for c in self._cuts if c.index not in early}
        answers |= {shard: part.answer() for shard, part in early.items()}
        self._early = {}
        result = self._taken([answers[cut.index] for cut in self._cuts])
        hidden = covered([part.span() for part in early.values()], began)
        return replace(result, hidden_s=hidden, exposed_s=time.monotonic() - began)

    def _push(self, cut: Shard, step: int, task: int | None) -> Answer:
        push = PushId(self._group.plan.run, self._attempt, self._rank, step, task)
        gradient = self._flat.grads[cut.start : cut.stop]
        return self._group.service(cut.index, step).push(push, gradient, self._deliver(cut))

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


class _Early:
    """A push of one part in a thread of its own."""

    def __init__(self, push: Callable[[], Answer]) -> None:
        self._answer: Answer | None = None
        self._error: BaseException | None = None
        self._began = self._ended = time.monotonic()
        self._thread = threading.Thread(target=self._run, args=(push,), daemon=True)
        self._thread.start()

    def answer(self) -> Answer:
        """Wait for the answer; the service has the deadline."""
        self._thread.join()
        if self._answer is None:
            assert self._error is not None, "it ends with one of the two"
            raise self._error
        return self._answer

    def span(self) -> tuple[float, float]:
        """Give when it began and ended."""
        return self._began, self._ended

    def _run(self, push: Callable[[], Answer]) -> None:
        try:
            self._answer = push()
        except BaseException as error:
            self._error = error
        self._ended = time.monotonic()
