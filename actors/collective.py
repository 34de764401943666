"""The port `Collective` over `ray.util.collective`, with a backend of ours behind it."""

from collections.abc import Callable, Sequence

import ray.util.collective as rayc
from ray.util.collective.types import ReduceOp as RayOp
from torch import Tensor

from distplat.actors.gloo import GlooGroup
from distplat.actors.group import Group, Settings, prepare, register
from distplat.strategies.base import Collective, Handle, ReduceOp, Traffic

_BACKENDS: dict[str, type[Group]] = {"gloo": GlooGroup, "auto": GlooGroup}
_RAY_OPS = {
    ReduceOp.SUM: RayOp.SUM,
    ReduceOp.AVG: RayOp.SUM,
    ReduceOp.MIN: RayOp.MIN,
    ReduceOp.MAX: RayOp.MAX,
    ReduceOp.PRODUCT: RayOp.PRODUCT,
}


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
        backend: a name of ours, for example `gloo`.
        rank: place in the group.
        world: ranks in the group.
        settings: deadlines, and how the group is given up.
    """

    def __init__(self, name: str, backend: str, rank: int, world: int, settings: Settings) -> None:
        self._name, self._backend, self._settings = name, backend, settings
        self._rank, self._world = rank, world
        kind = _BACKENDS[backend]
        register(kind.backend(), kind)
        prepare(name, settings)
        rayc.init_collective_group(world, rank, kind.backend(), name)
        self._group: Group = rayc.get_group_handle(name)

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
        rayc.allreduce(tensor, self._name, _RAY_OPS[op])
        self._average(tensor, op)

    def start_all_reduce(self, tensor: Tensor, op: ReduceOp = ReduceOp.SUM) -> Handle:
        """See `Collective`. Ray's own calls all block, so this one asks the group itself."""
        handle = self._group.start_allreduce(tensor, _RAY_OPS[op])
        return _Pending(handle.wait, lambda: self._average(tensor, op))

    def reduce_scatter(
        self, output: Tensor, inputs: Sequence[Tensor], op: ReduceOp = ReduceOp.SUM
    ) -> None:
        """See `Collective`."""
        rayc.reducescatter(output, list(inputs), self._name, _RAY_OPS[op])
        self._average(output, op)

    def all_gather(self, outputs: Sequence[Tensor], tensor: Tensor) -> None:
        """See `Collective`."""
        rayc.allgather(list(outputs), tensor, self._name)

    def broadcast(self, tensor: Tensor, source: int = 0) -> None:
        """See `Collective`."""
        rayc.broadcast(tensor, source, self._name)

    def send(self, tensor: Tensor, to: int) -> None:
        """See `Collective`."""
        rayc.send(tensor, to, self._name)

    def recv(self, tensor: Tensor, source: int) -> None:
        """See `Collective`."""
        rayc.recv(tensor, source, self._name)

    def barrier(self) -> None:
        """See `Collective`."""
        rayc.barrier(self._name)

    def subgroup(self, name: str, ranks: Sequence[int]) -> Collective:
        """See `Collective`."""
        place = list(ranks).index(self._rank)
        full = f"{self._name}/{name}"
        return RayCollective(full, self._backend, place, len(ranks), self._settings)

    def abort(self) -> None:
        """Make whoever waits in this rank's operations fail soon; from any thread."""
        self._settings.abandoned.set()
        self._group.abort()

    def close(self) -> None:
        """Leave the group; peers in an operation fail at once."""
        rayc.destroy_collective_group(self._name)

    def _average(self, tensor: Tensor, op: ReduceOp) -> None:
        if op is ReduceOp.AVG:
            tensor.div_(self._world)
