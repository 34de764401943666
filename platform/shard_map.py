"""
Which server node keeps which parameters: the metadata that the server manager owns.

Parameters lie one after another in one flat vector; a shard is a run of its elements. Cutting the
vector, not the list of tensors, balances the shards by bytes whatever the sizes of the layers: one
huge embedding does not make one server the slow one.
"""

from dataclasses import dataclass

from distplat.platform.clocks import SYNCHRONOUS, Consistency
from distplat.platform.cut import even_bounds
from distplat.platform.spec import Job

_ALIGN = 16
"""Elements: shard bounds fall on cache lines for 4-byte elements, where vector kernels like it."""


@dataclass(frozen=True)
class Shard:
    """A run of the flat parameter vector."""

    index: int
    start: int
    stop: int

    @property
    def size(self) -> int:
        """Number of elements."""
        return self.stop - self.start


@dataclass(frozen=True)
class ShardMap:
    """All shards of one model; a client with an older version must ask again."""

    version: int
    total: int
    """Elements of the flat vector."""
    shards: tuple[Shard, ...]


def cut_shards(total: int, servers: int, *, version: int = 1) -> ShardMap:
    """Cut `total` elements into one shard per server; for a tiny model some may be empty."""
    align = _ALIGN if total >= servers * _ALIGN else 1
    bounds = even_bounds(total, servers, align=align)
    shards = tuple(Shard(i, start, stop) for i, (start, stop) in enumerate(bounds))
    return ShardMap(version, total, shards)


@dataclass(frozen=True)
class ShardPlan:
    """What a shard must know to work on its own."""

    job: Job
    run: str
    """Name of the run; pushes of another are refused."""
    attempt: int
    world: int
    """Workers whose pushes make up a step."""
    total_steps: int
    shards: int
    """Shards of the model: the only one sees the norm of the whole gradient."""
    consistency: Consistency = SYNCHRONOUS
    checkpoint_every: int = 0
    """Steps between two checkpoints, for which shards keep copies; 0: there are none."""
    wire: str | None = None
    """Name in torch of the type that travels to other nodes; None: the parameters' own."""
