"""
The port `Collective` over `ray.util.collective`, with a backend of ours behind it.

Groups are made and destroyed through Ray, so they are Ray's groups as any other. Operations go to
the group itself: Ray's own calls look it up under a lock that is held while another group of this
process forms, and write their options into a class that all threads share.
"""

import logging
from collections.abc import Callable, Sequence
from importlib import import_module

import ray.util.collective as rayc
from ray.util.collective import types
from torch import Tensor

from distplat.actors.collective.group import Group, Settings, prepare, register
from distplat.actors.collective.places import forget, meet
from distplat.platform.topology import Choice, Place, choose, chosen_by_user
from distplat.strategies.collective import Collective, Handle, ReduceOp, Traffic

logger = logging.getLogger(__name__)

_RAY_OPS = {
    ReduceOp.SUM: types.ReduceOp.SUM,
    ReduceOp.AVG: types.ReduceOp.SUM,
    ReduceOp.MIN: types.ReduceOp.MIN,
    ReduceOp.MAX: types.ReduceOp.MAX,
    ReduceOp.PRODUCT: types.ReduceOp.PRODUCT,
}


_BACKENDS = {
    "gloo": ("distplat.actors.collective.gloo", "GlooGroup"),
    "shm": ("distplat.actors.shm.group", "ShmGroup"),
    "hierarchical": ("distplat.actors.collective.hierarchical", "HierarchicalGroup"),
    "nccl": ("distplat.actors.collective.nccl", "NcclGroup"),
}
"""Module and class by name: only what is used is imported."""


def _backend(name: str) -> type[Group]:
    module, kind = _BACKENDS[name]
    found: type[Group] = getattr(import_module(module), kind)
    return found


class _Pending:
    """An operation under way, and what to do when it is over."""

    def __init__(self, finish: Callable[[], None], after: Callable[[], None]) -> None:
        self._finish, self._after = finish, after

    def wait(self) -> None:
        """Wait for the result."""
        self._finish()
        self._after()


class RayCollective:
    """
    One rank's end of a named group (see `Collective`).

    Args:
        name: unique on the cluster.
        backend: `auto`, `gloo`, `shm`, `hierarchical` or `nccl`.
        rank: place in the group.
        world: ranks in the group.
        settings: deadlines, and how the group is given up.
        places: where the ranks are; None: they tell each other.

    Raises:
        SpecError: the backend cannot work where the ranks are.
        DeadlineExceeded: somebody did not come; names the workers.
        CollectiveError: the group broke while it formed, or `settings.abandoned` was set.
    """

    def __init__(
        self,
        name: str,
        backend: str,
        rank: int,
        world: int,
        settings: Settings,
        places: tuple[Place, ...] | None = None,
    ) -> None:
        self._name, self._asked, self._settings = name, backend, settings
        self._rank, self._world = rank, world
        self._places = places
        self._parts: list[RayCollective] = []
        self._closed = False
        asks = places is None and backend != "gloo"  # gloo works anywhere
        if asks:
            self._places = meet(name, rank, world, settings)
        self.choice = self._choose()
        if rank == 0:
            logger.info("collective %s: %s (%s)", name, self.choice.backend, self.choice.why)
        kind = _backend(self.choice.backend)
        register(kind.backend(), kind)
        prepare(name, settings, self._places)
        rayc.init_collective_group(world, rank, kind.backend(), name)
        self._group: Group = rayc.get_group_handle(name)
        if asks and rank == 0:
            forget(name)

    def _choose(self) -> Choice:
        if self._asked == "auto" and self._places is not None:
            return choose(self._places)
        return chosen_by_user(self._asked, self._places or ())

    @property
    def rank(self) -> int:
        """Place in the group."""
        return self._rank

    @property
    def world(self) -> int:
        """Ranks in the group."""
        return self._world

    @property
    def traffic(self) -> Traffic:
        """See `Collective`."""
        return self._group.traffic

    def share(self, like: Tensor) -> Tensor:
        """See `Collective`."""
        return self._group.share(like)

    def all_reduce(self, tensor: Tensor, op: ReduceOp = ReduceOp.SUM) -> None:
        """See `Collective`."""
        options = types.AllReduceOptions()
        options.reduceOp = _RAY_OPS[op]
        self._group.allreduce([tensor], options)
        self._average(tensor, op)

    def start_all_reduce(self, tensor: Tensor, op: ReduceOp = ReduceOp.SUM) -> Handle:
        """See `Collective`."""
        handle = self._group.start_allreduce(tensor, _RAY_OPS[op])
        return _Pending(handle.wait, lambda: self._average(tensor, op))

    def reduce_scatter(
        self, output: Tensor, inputs: Sequence[Tensor], op: ReduceOp = ReduceOp.SUM
    ) -> None:
        """See `Collective`."""
        options = types.ReduceScatterOptions()
        options.reduceOp = _RAY_OPS[op]
        self._group.reducescatter([output], [list(inputs)], options)
        self._average(output, op)

    def all_gather(self, outputs: Sequence[Tensor], tensor: Tensor) -> None:
        """See `Collective`."""
        self._group.allgather([list(outputs)], [tensor], types.AllGatherOptions())

    def broadcast(self, tensor: Tensor, source: int = 0) -> None:
        """See `Collective`."""
        options = types.BroadcastOptions()
        options.root_rank = source
        self._group.broadcast([tensor], options)

    def send(self, tensor: Tensor, to: int) -> None:
        """See `Collective`."""
        options = types.SendOptions()
        options.dst_rank, options.n_elements = to, tensor.numel()
        self._group.send([tensor], options)

    def start_send(self, tensor: Tensor, to: int) -> Handle:
        """See `Collective`."""
        return self._group.start_send(tensor, to)

    def recv(self, tensor: Tensor, source: int) -> None:
        """See `Collective`."""
        options = types.RecvOptions()
        options.src_rank, options.n_elements = source, tensor.numel()
        self._group.recv([tensor], options)

    def barrier(self) -> None:
        """See `Collective`."""
        self._group.barrier(types.BarrierOptions())

    def subgroup(self, name: str, ranks: Sequence[int]) -> Collective:
        """See `Collective`. It ends with this group at the latest."""
        place = list(ranks).index(self._rank)
        places = None if self._places is None else tuple(self._places[rank] for rank in ranks)
        part = RayCollective(
            f"{self._name}/{name}", self._asked, place, len(ranks), self._settings, places
        )
        self._parts.append(part)
        return part

    def abort(self) -> None:
        """
        Make whoever waits in this rank's operations fail soon; from any thread.

        This ends all groups that have these settings: sub-groups, and the one this was cut from.
        """
        self._settings.abandoned.set()
        for part in self._parts:
            part.abort()
        self._group.abort()

    def close(self) -> None:
        """Leave the group and those cut from it; peers in an operation fail soon."""
        if self._closed:
            return
        self._closed = True
        for part in self._parts:
            part.close()
        rayc.destroy_collective_group(self._name)

    def _average(self, tensor: Tensor, op: ReduceOp) -> None:
        if op is ReduceOp.AVG:
            tensor.div_(self._world)
