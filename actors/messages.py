"""
What travels between actors: small frozen values, readable without torch.

The controller and the server manager import this and stay light; dtypes travel by name.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from distplat.platform.diverged_loops import LoopState

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from distplat.platform.checkpoints import Delivery
    from distplat.platform.errors import DistplatError
    from distplat.platform.lr_schedules import TaskSchedule
    from distplat.platform.progress import AnyReport
    from distplat.platform.shard_map import OwnLoop, ShardMap
    from distplat.platform.spec import Job
    from distplat.platform.vector_layout import Layout
    from distplat.strategies.catalog import LoadedStrategyFile
    from distplat.strategies.strategy_spec import GroupSpec


def rendezvous_key(group: str) -> bytes:
    """Give the key in Ray's key-value store under which a group's rank 0 leaves its address."""
    return f"distplat/collective/{group}".encode()


@dataclass(frozen=True)
class MemoryAddress:
    """Where another process finds a memory segment. Good while its owner holds it open."""

    node: str
    """Ray's id of the node."""
    pid: int
    fd: int
    elements: int
    dtype: str
    """Name in torch, for example `float32`."""
    inode: int = 0
    """Inode of the memory: pid and descriptor may be reused by now. 0: not known."""


@dataclass(frozen=True)
class SavedHandle:
    """A checkpoint in Ray's store."""

    state: dict[str, Any]
    """What `state.json` holds."""
    files: dict[str, list[Any]]
    """By name, a reference to its tensors; in a list, or Ray would send them along."""


@dataclass(frozen=True)
class AttachReply:
    """A server's answer to a worker that attaches its memory."""

    shares_memory: bool
    """Whether the server reaches it; else bytes are sent."""
    version: int | None
    """Version of the shard's parameters; None: it has none yet."""


@dataclass(frozen=True)
class WorkOrder:
    """All that a worker is told when it starts."""

    job: Job
    run: str
    """Name of the run: unique on the cluster."""
    attempt: int
    rank: int
    task: str | bytes
    """`module:Class`, or the class itself, pickled by the driver."""
    search_path: str
    """Folder of the task's module with the driver: import path and current directory there."""
    strategy_file: LoadedStrategyFile | None
    """A user's file that registers strategies."""
    manager: Any
    """Handle of the server manager; None: there are neither shards nor tables kept twice."""
    collective: GroupSpec | None
    """The group of all workers; None: the strategy has none."""
    saved: SavedHandle | None = None
    """The checkpoint to begin from, for a worker that has no state yet."""
    checkpoint_step: int = 0
    """Steps of the newest checkpoint: no attempt begins before it."""
    embedding_servers: tuple[Any, ...] = ()
    """Handles of the servers of embedding tables, in order."""
    scheduler: Any = None
    """Handle of the task scheduler; None: the strategy has none."""
    rewinds: bool = False
    """Whether these can take a step back: survivors of a failure may have to repeat one."""
    checked: bool = False
    """The driver has looked at the task's class: nothing about it need be said again."""
    node: str = ""
    """The driver's: a folder of another node may have the same path, and anything in it."""
    actor_name: str = ""
    """What a spare is called from now on."""


@dataclass(frozen=True)
class PollResult:
    """A worker's answer to the controller's question how things stand."""

    reports: list[AnyReport]
    """What was finished since the last question."""
    attempt: int
    """The one that it works at, or has ended."""
    beats: int
    step: int
    finished: bool
    error: DistplatError | None
    """Why it stopped; it now waits for orders."""
    deliveries: list[Delivery] = field(default_factory=list)
    """Parts of checkpoints since the last question."""
    left: bool = False
    """It has finished because it was told to leave: the run goes on without it."""
    node: str = ""
    """Where it is, once it has begun."""
    host: str = ""
    """That node's name and address, for people to read."""
    prepared: bool = False
    """It has made its model and data."""
    loop: LoopState = field(default_factory=LoopState)
    """Where the loop of a train function is."""
    traceback: str = ""
    """The user's frames of `error`; of a train function."""


@dataclass(frozen=True)
class ModelFacts:
    """What a worker tells the server manager of its model; equal on all ranks that share it."""

    size: int
    """Elements of the flat parameter vector."""
    dtype: str
    digest: str
    total_steps: int
    checkpoint_every: int = 0
    """Steps between two checkpoints; 0: there are none."""
    duplicate_ranges: tuple[tuple[int, int], ...] = ()
    """Runs of the vector that others have too, and count in the norm of the gradient."""
    layout: Layout | None = None
    """What lies where in the vector; None: it is as if it were a single parameter."""
    schedule: TaskSchedule | None = None
    """Learning rates that the task says itself; None: the job's."""
    own_loop: OwnLoop | None = None
    """What servers make of the gradients of a train function; None: it is a task."""


@dataclass(frozen=True)
class Membership:
    """What a worker must know to talk to the servers of its part of the model."""

    part: int
    """Its number; 0 where no model is cut."""
    part_rank: int
    """The worker's number among those that have this part; where no model is cut its rank."""
    shard_map: ShardMap
    servers: list[Any]
    """Handles of the server nodes, by shard."""
    names: list[str]
    """Their names, by shard."""
    parameters: list[MemoryAddress]
    """The parameter segment of each server's node, by shard: the whole flat vector."""
    private: bool
    """Whether each worker computes on a copy of its own."""
    wire: str | None = None
    """Name in torch of the type that travels to other nodes; None: the parameters' own."""
    part_world: int | None = None
    """Workers that share these servers, where the model is cut; None: all of the run."""
    replicated: bool = False
    """Whether each shard is kept twice: a lost server is followed by another, in a newer map."""

    @property
    def version(self) -> int:
        """Version of the shard map."""
        return self.shard_map.version


@dataclass(frozen=True)
class TableMap:
    """The server that keeps each part of the embedding tables."""

    version: int
    """Grows when a lost server is followed by its backup."""
    servers: list[Any]
    """Handles of the server nodes, by part."""
    names: list[str]
    """Their names, by part."""


@dataclass(frozen=True)
class TablePart:
    """Which part of the embedding tables a server node keeps."""

    server: str
    """Its name, for messages."""
    index: int
    """Number of the part."""
    replicated: bool = False
    """Whether each part is kept twice."""
    limit_s: float = 60.0
    """How long a backup may take for an update."""


@dataclass(frozen=True)
class OpenReply:
    """What a server of embedding tables answers to a worker that joins an attempt."""

    shares_memory: bool
    """Whether it reaches the worker's memory; else ids and rows travel in the calls."""
    steps: int
    """That its tables have behind them."""


@dataclass(frozen=True)
class RowTransfer:
    """Ids of one table and memory for their rows, or their gradients, on the way to a server."""

    table: int
    count: int
    """Number of ids."""
    ids: MemoryAddress | NDArray[np.int64]
    """Where they are, or themselves."""
    values: MemoryAddress | NDArray[np.float32] | None
    """Where rows go to or gradients come from, or the gradients themselves; None: a pull, whose
    rows go into the answer."""
    first_id: int = 0
    """Index of the first one in the memory at `ids`."""
    first_value: int = 0
    """Index of its first element in the memory at `values`."""
