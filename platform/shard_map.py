"""
Which server node keeps which parameters: the metadata that the server manager owns.

Parameters lie one after another in one flat vector; a shard is a run of its elements. Cutting the
vector, not the list of tensors, balances the shards by bytes whatever the sizes of the layers: one
huge embedding does not make one server the slow one. Where servers differ they are cut by measured
speed, on request: everybody waits for the slowest shard. An optimizer that looks at whole tensors
has it cut where parameters end.

Of embedding tables there are a plan, which their servers are told, and the names that the calls of
their clients carry.
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
"""Elements: shard bounds fall on cache lines for 4-byte elements, where vector kernels like it."""

EQUAL_SPEED_RATIO = 1.25
"""Servers whose speeds differ less count as equal: so much two measurements of one may differ."""


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


def cut_shards(
    total: int,
    servers: int,
    *,
    speeds: Sequence[float] = (),
    tail: int = 0,
    boundaries: Sequence[int] = (),
) -> ShardMap:
    """
    Cut `total` elements into one shard per server; for a tiny model some may be empty.

    Args:
        total: elements.
        servers: how many.
        speeds: elements that each server updates in a second; empty: as if all were alike.
        tail: how many of the last elements are frozen; the last shard has them on top.
        boundaries: where alone it may be cut; they rise. Empty: anywhere.
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
    """Give each server elements in proportion to its speed, so that all take the same time."""
    blocks, whole = -(-total // align), sum(speeds)
    inner = [round(blocks * part / whole) * align for part in accumulate(speeds[:-1])]
    ends = [*(min(end, total) for end in inner), total]
    return list(zip([0, *ends], ends, strict=False))


def clip_ranges(runs: Sequence[tuple[int, int]], shard: Shard) -> tuple[tuple[int, int], ...]:
    """Give what of some runs of the flat vector is in a shard, counted from its beginning."""
    cut = [(max(start, shard.start), min(stop, shard.stop)) for start, stop in runs]
    return tuple((a - shard.start, b - shard.start) for a, b in cut if a < b)


@dataclass(frozen=True)
class Division:
    """
    Which workers share which servers: of a model that is cut, each part has servers of its own.

        ranks     0, 2        1, 3            peers share servers, and push one vector;
        servers   0, 1        2, 3            they count each other as worker 0 and worker 1
    """

    parts: tuple[tuple[int, ...], ...]
    """By part, the ranks that have it."""
    servers: int
    """In all; as many for each part."""

    @property
    def each(self) -> int:
        """Servers of one part."""
        return self.servers // len(self.parts)

    def part_of(self, rank: int) -> int:
        """Give a rank's part; of a model that is not cut, also that of a rank that came later."""
        if len(self.parts) == 1:
            return 0
        return next(part for part, ranks in enumerate(self.parts) if rank in ranks)

    def part_rank_of(self, rank: int) -> int:
        """Give a rank's number among those that share its servers."""
        return rank if len(self.parts) == 1 else self.parts[self.part_of(rank)].index(rank)

    def servers_of(self, part: int) -> range:
        """Give the numbers of a part's servers, in the order of its shards."""
        return range(part * self.each, (part + 1) * self.each)

    def shard_of(self, server: int) -> tuple[int, int]:
        """Give the part, and which of its shards, that a server keeps."""
        return divmod(server, self.each)


@dataclass(frozen=True)
class OwnLoop:
    """What servers make of the gradients of a train function."""

    optimizer: AnyOptimizer | None = None
    """The function's, as far as it does not change; group 0 has no parameters. None: servers add
    the ranks' gradients up, and the workers make the update."""
    settings: tuple[tuple[str, ...], ...] = ()
    """By group, from 1: the optimizer's numbers whose values come with each push."""


def settings_of(job: Job) -> int:
    """Give how many values come with each push of a task: what its rates go by, if anything."""
    of_evaluations = isinstance(job.lr_schedule, ReduceLROnPlateau) or job.plateau is not None
    return len(PlateauState._fields) if of_evaluations else 0


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
    workers: tuple[int, ...] = ()
    """Their ranks, where those are not 0 to `world - 1`."""
    duplicate_ranges: tuple[tuple[int, int], ...] = ()
    """Runs of the shard that another one has too, and counts in the norm of the gradient."""
    wire: str | None = None
    """Name in torch of the type that travels to other nodes; None: the parameters' own."""
    number: int = 0
    """Number of the shard, among those of all parts of the model."""
    layout: Layout | None = None
    """What lies where in the shard; None: it is as if it were a single parameter."""
    own_loop: OwnLoop | None = None
    """What is made of gradients; None: the job says it."""

    @property
    def settings(self) -> int:
        """Values that come with each push."""
        return (
            settings_of(self.job)
            if self.own_loop is None
            else sum(map(len, self.own_loop.settings))
        )

    def worker(self, part_rank: int) -> str:
        """Name one of the workers, by its number among them."""
        return f"worker-{self.workers[part_rank] if self.workers else part_rank}"


@dataclass(frozen=True)
class TableSpec:
    """One embedding table. Equal on all ranks that train one model."""

    name: str
    """Path of its module in the model."""
    rows: int | None
    """Ids go from 0 to `rows` - 1; None: any id that is not negative."""
    width: int
    """Elements of a row, float32."""
    std: float
    """Standard deviation of a row's first values; 0: zeros."""
    whole: bool = False
    """Whether all rows are there from the start; else a row comes with its first gradient."""


@dataclass(frozen=True)
class TablePlan:
    """What a server must know to serve one attempt."""

    job: Job
    run: str
    """Name of the run; pushes of another are refused."""
    attempt: int
    world: int
    """Workers whose pushes make up a step."""
    total_steps: int
    servers: int
    tables: tuple[TableSpec, ...]
    rewinds: bool = False
    """Keep what the last step has changed: a restart may have to make that step again."""
    checkpoint_every: int = 0
    """Steps between two checkpoints; 0: there are none."""


TABLES = "embeddings-"
"""Begins the names of the files of embedding servers in a checkpoint."""


def file_of(server: int) -> str:
    """Give the name of a server's file in a checkpoint, without its ending."""
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
    Make the plan of one attempt.

    Args:
        job: has the field `embeddings`.
        run: its name.
        attempt: its number.
        tables: the same on all ranks.
        total_steps: of the run.
        rewinds: whether a step may have to be made again; asynchronous tables keep nothing for
            that, their book knows what is in them.
        checkpoint_every: steps between two checkpoints; 0: there are none.
    """
    assert job.embeddings is not None, "only such jobs have servers of tables"
    servers, world = job.embeddings.servers, job.scaling.world
    rewinds = rewinds and not job.embeddings.asynchronous
    return TablePlan(
        job, run, attempt, world, total_steps, servers, tables, rewinds, checkpoint_every
    )
