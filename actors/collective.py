"""The port `Collective` over `ray.util.collective`, with a backend of ours behind it."""

from collections.abc import Callable, Sequence

import ray.util.collective as rayc
from ray.util.collective.types import ReduceOp as RayOp
from torch import Tensor

from distplat.actors import gloo
from distplat.strategies.base import Collective, Handle, ReduceOp

_BACKENDS = {"gloo": gloo}
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
        deadlines: of one operation, and of the ranks' coming together.
    """

    def __init__(
        self, name: str, backend: str, rank: int, world: int, deadlines: gloo.Deadlines
    ) -> None:
        self._name, self._backend, self._deadlines = name, backend, deadlines
        self._rank, self._world = rank, world
        _BACKENDS[backend].register(name, deadlines)
        rayc.init_collective_group(world, rank, _BACKENDS[backend].BACKEND, name)

    @property
    def rank(self) -> int:
        """Place in the group."""
        return self._rank

    @property
    def world(self) -> int:
        """Ranks in the group."""
        return self._world

    def all_reduce(self, tensor: Tensor, op: ReduceOp = ReduceOp.SUM) -> None:
        """See `Collective`."""
        rayc.allreduce(tensor, self._name, _RAY_OPS[op])
        self._average(tensor, op)

    def start_all_reduce(self, tensor: Tensor, op: ReduceOp = ReduceOp.SUM) -> Handle:
        """See `Collective`. Ray's own calls all block, so this one asks the group itself."""
        group = rayc.get_group_handle(self._name)
        finish = group.start_allreduce([tensor], _RAY_OPS[op])
        return _Pending(finish, lambda: self._average(tensor, op))

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
        return RayCollective(full, self._backend, place, len(ranks), self._deadlines)

    def close(self) -> None:
        """Leave the group; peers in an operation fail at once."""
        rayc.destroy_collective_group(self._name)

    def _average(self, tensor: Tensor, op: ReduceOp) -> None:
        if op is ReduceOp.AVG:
            tensor.div_(self._world)
