"""
Which server node keeps which parameters: metadata of the server manager.

Parameters lie one after another in one flat vector; a shard is a range of its elements. Splitting
the vector, not the list of tensors, balances the shards by bytes for any layer sizes: one huge
embedding does not slow down one server. On request the split follows measured server speeds,
because every step waits for the slowest shard. For an optimizer of whole tensors, shards end at
parameter bounds.

Embedding tables have a plan, which is sent to their servers, and names for the calls of their
clients.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from distplat.platform.even_split import snap_to_boundaries, split_evenly
from distplat.platform.lr_schedules import ReduceLROnPlateau
from distplat.platform.optimizers import AnyOptimizer
from distplat.platform.plateau import PlateauState
from distplat.platform.spec import SYNCHRONOUS, Consistency, Job
from distplat.platform.vector_layout import Layout

_ALIGN = 16
"""Elements: shard bounds fall on cache lines for 4-byte elements, which vector kernels prefer."""

EQUAL_SPEED_RATIO = 1.25
"""Servers with a lower speed ratio count as equally fast: measurements vary that much."""


@dataclass(frozen=True)
class Shard:
    """A range of the flat parameter vector."""

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


def cut_shards(
    total: int,
    servers: int,
    *,
    speeds: Sequence[float] = (),
    tail: int = 0,
    boundaries: Sequence[int] = (),
) -> ShardMap:
    """
    Split `total` elements into one shard per server; in a tiny model some may be empty.

    Args:
        total: number of elements.
        servers: number of servers.
        speeds: elements per second of each server's updates; empty: equal speeds.
        tail: number of frozen elements at the end, which the last shard gets in addition.
        boundaries: allowed shard bounds, ascending. Empty: any.
    """
    whole, total = total, total - tail
    align = _ALIGN if total >= servers * _ALIGN else 1
    if not speeds or max(speeds) <= EQUAL_SPEED_RATIO * min(speeds):
        bounds = split_evenly(total, servers, align=align)
    else:
        bounds = _bounds_by_speed(total, speeds, align)
    if boundaries:
        bounds = snap_to_boundaries(bounds, [at for at in boundaries if at < total])
    bounds[-1] = bounds[-1][0], whole
    shards = tuple(Shard(i, start, stop) for i, (start, stop) in enumerate(bounds))
    return ShardMap(1, whole, shards)


def _bounds_by_speed(total: int, speeds: Sequence[float], align: int) -> list[tuple[int, int]]:
    """Split elements in proportion to the servers' speeds, for equal update times."""
    blocks, whole = -(-total // align), sum(speeds)
    inner = [round(blocks * part / whole) * align for part in accumulate(speeds[:-1])]
    ends = [*(min(end, total) for end in inner), total]
    return list(zip([0, *ends], ends, strict=False))


def clip_ranges(runs: Sequence[tuple[int, int]], shard: Shard) -> tuple[tuple[int, int], ...]:
    """Intersect ranges of the flat vector with a shard; results are relative to the shard."""
    cut = [(max(start, shard.start), min(stop, shard.stop)) for start, stop in runs]
    return tuple((a - shard.start, b - shard.start) for a, b in cut if a < b)


@dataclass(frozen=True)
class Division:
    """
    Assignment of workers to servers; each part of a split model has its own servers.

        ranks     0, 2        1, 3            peers share servers, and push one vector;
        servers   0, 1        2, 3            within a part they are worker 0 and worker 1
    """

    parts: tuple[tuple[int, ...], ...]
    """Ranks of each part."""
    servers: int
    """Number of servers over all parts; the same for each part."""

    @property
    def servers_per_part(self) -> int:
        """Number of servers per part."""
        return self.servers // len(self.parts)

    def part_of(self, rank: int) -> int:
        """Return a rank's part; 0 if the model is not split, also for ranks that joined later."""
        if len(self.parts) == 1:
            return 0
        return next(part for part, ranks in enumerate(self.parts) if rank in ranks)

    def part_rank_of(self, rank: int) -> int:
        """Return a rank's index among the ranks that share its servers."""
        return rank if len(self.parts) == 1 else self.parts[self.part_of(rank)].index(rank)

    def servers_of(self, part: int) -> range:
        """Return the numbers of a part's servers, in the order of its shards."""
        return range(part * self.servers_per_part, (part + 1) * self.servers_per_part)

    def shard_of(self, server: int) -> tuple[int, int]:
        """Return a server's part, and its shard within the part."""
        return divmod(server, self.servers_per_part)


@dataclass(frozen=True)
class OwnLoop:
    """How servers use the gradients of a train function."""

    optimizer: AnyOptimizer | None = None
    """The function's optimizer, without arguments that change; group 0 has no parameters. None:
    servers only sum gradients, and the workers apply updates."""
    settings: tuple[tuple[str, ...], ...] = ()
    """By group, from 1: names of optimizer arguments whose values are sent with each push."""


def settings_of(job: Job) -> int:
    """Return the number of values sent with each push of a task: its schedule's state."""
    of_evaluations = isinstance(job.lr_schedule, ReduceLROnPlateau) or job.plateau is not None
    return len(PlateauState._fields) if of_evaluations else 0


@dataclass(frozen=True)
class ShardPlan:
    """Configuration of one shard for one attempt."""

    job: Job
    run: str
    """Name of the run; pushes of other runs are refused."""
    attempt: int
    world: int
    """Number of workers whose pushes make up a step."""
    total_steps: int
    shards: int
    """Number of shards of the model; a single shard knows the norm of the whole gradient."""
    consistency: Consistency = SYNCHRONOUS
    checkpoint_every: int = 0
    """Steps between checkpoints, for which shards keep copies; 0: no checkpoints."""
    workers: tuple[int, ...] = ()
    """Ranks of the workers, if not 0 to `world - 1`."""
    duplicate_ranges: tuple[tuple[int, int], ...] = ()
    """Ranges that another shard has too, and counts in the norm of the gradient."""
    wire: str | None = None
    """torch's name of the dtype for transfers between nodes; None: the parameters' own."""
    number: int = 0
    """Number of the shard among those of all parts of the model."""
    layout: Layout | None = None
    """Layout of the shard; None: a single parameter."""
    own_loop: OwnLoop | None = None
    """How to use gradients of a train function; None: the job's optimizer updates."""

    @property
    def settings(self) -> int:
        """Number of values sent with each push."""
        return (
            settings_of(self.job)
            if self.own_loop is None
            else sum(map(len, self.own_loop.settings))
        )

    def worker(self, part_rank: int) -> str:
        """Return a worker's role, by its index among this shard's workers."""
        return f"worker-{self.workers[part_rank] if self.workers else part_rank}"


@dataclass(frozen=True)
class TableSpec:
    """One embedding table; equal on all ranks that train one model."""

    name: str
    """Path of its module in the model."""
    rows: int | None
    """Ids are 0 to `rows` - 1; None: any non-negative id."""
    width: int
    """Elements per row, float32."""
    std: float
    """Standard deviation of initial values; 0: zeros."""
    whole: bool = False
    """Whether all rows exist from the start; else a row is created by its first gradient."""


@dataclass(frozen=True)
class TablePlan:
    """Configuration of an embedding server for one attempt."""

    job: Job
    run: str
    """Name of the run; pushes of other runs are refused."""
    attempt: int
    world: int
    """Number of workers whose pushes make up a step."""
    total_steps: int
    servers: int
    tables: tuple[TableSpec, ...]
    rewinds: bool = False
    """Whether to keep the changes of the last step: a restart may repeat that step."""
    checkpoint_every: int = 0
    """Steps between checkpoints; 0: no checkpoints."""


TABLES = "embeddings-"
"""Prefix of embedding servers' files in a checkpoint."""


def file_of(server: int) -> str:
    """Return the name of a server's file in a checkpoint, without extension."""
    return f"{TABLES}{server}"


def plan_of(
    job: Job,
    run: str,
    attempt: int,
    tables: tuple[TableSpec, ...],
    total_steps: int,
    *,
    rewinds: bool,
    checkpoint_every: int = 0,
) -> TablePlan:
    """
    Build the plan of one attempt.

    Args:
        job: a job with the field `embeddings`.
        run: name of the run.
        attempt: its number.
        tables: the same on all ranks.
        total_steps: of the run.
        rewinds: whether a step may be repeated. Asynchronous tables never rewind, because their
            ledger knows the applied pushes.
        checkpoint_every: steps between checkpoints; 0: no checkpoints.
    """
    assert job.embeddings is not None, "only jobs with embeddings have table servers"
    servers, world = job.embeddings.servers, job.scaling.world
    rewinds = rewinds and not job.embeddings.asynchronous
    return TablePlan(
        job, run, attempt, world, total_steps, servers, tables, rewinds, checkpoint_every
    )
