"""
Messages between actors: small frozen dataclasses that need no torch.

The controller and the server manager import this module without torch; dtypes are sent by name.
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
    """Return the key in Ray's key-value store for the address of a group's rank 0."""
    return f"distplat/collective/{group}".encode()


@dataclass(frozen=True)
class MemoryAddress:
    """Address of a memory segment of another process. Valid while the owner keeps it open."""

    node: str
    """Ray's id of the node."""
    pid: int
    fd: int
    elements: int
    dtype: str
    """Name in torch, for example `float32`."""
    inode: int = 0
    """Inode of the memory, because pid and descriptor may be reused. 0: not known."""


@dataclass(frozen=True)
class SavedHandle:
    """A checkpoint in Ray's object store."""

    state: dict[str, Any]
    """Content of `state.json`."""
    files: dict[str, list[Any]]
    """Reference to the tensors of each file; the list keeps Ray from resolving it in a call."""


@dataclass(frozen=True)
class AttachReply:
    """A server's answer to a worker that attaches its memory."""

    shares_memory: bool
    """Whether the server can map the memory; else data is sent in calls."""
    version: int | None
    """Version of the shard's parameters; None: it has no parameters yet."""


@dataclass(frozen=True)
class WorkOrder:
    """Parameters of an attempt for one worker."""

    job: Job
    run: str
    """Name of the run: unique on the cluster."""
    attempt: int
    rank: int
    task: str | bytes
    """`module:Class`, or the class itself, pickled by the driver."""
    search_path: str
    """Folder of the task's module on the driver's node; import path and working directory."""
    strategy_file: LoadedStrategyFile | None
    """A user's file that registers strategies."""
    manager: Any
    """Handle of the server manager; None: neither shards nor replicated tables exist."""
    collective: GroupSpec | None
    """The group of all workers; None: the strategy has none."""
    saved: SavedHandle | None = None
    """The checkpoint to start from, for a worker without state."""
    checkpoint_step: int = 0
    """Step of the newest checkpoint; no attempt starts earlier."""
    embedding_servers: tuple[Any, ...] = ()
    """Handles of the embedding servers, in order."""
    scheduler: Any = None
    """Handle of the task scheduler; None: the strategy has none."""
    rewinds: bool = False
    """Whether embedding tables can undo a step: survivors of a failure may repeat one."""
    checked: bool = False
    """Whether the driver has checked the task's class and logged the warnings."""
    node: str = ""
    """Node of the driver; `search_path` is valid only there."""
    actor_name: str = ""
    """New name of a spare that becomes this worker."""


@dataclass(frozen=True)
class PollResult:
    """A worker's answer to a poll of the controller."""

    reports: list[AnyReport]
    """Reports since the last poll."""
    attempt: int
    """The current or last attempt of the worker."""
    beats: int
    step: int
    finished: bool
    error: DistplatError | None
    """Error that ended the attempt; the worker waits for the next order."""
    deliveries: list[Delivery] = field(default_factory=list)
    """Parts of checkpoints since the last poll."""
    left: bool = False
    """Whether the worker was dismissed and has left the run."""
    node: str = ""
    """Ray's id of the worker's node, once it has started."""
    host: str = ""
    """Name and address of that node, for messages."""
    prepared: bool = False
    """Whether model and data are built."""
    loop: LoopState = field(default_factory=LoopState)
    """Progress of a train function's loop."""
    traceback: str = ""
    """In a train function, the user's frames of `error`."""


@dataclass(frozen=True)
class ModelFacts:
    """Description of a worker's model for the server manager; equal on all data-parallel peers."""

    size: int
    """Elements of the flat parameter vector."""
    dtype: str
    digest: str
    total_steps: int
    checkpoint_every: int = 0
    """Steps between two checkpoints; 0: checkpoints are disabled."""
    duplicate_ranges: tuple[tuple[int, int], ...] = ()
    """Ranges of the vector that other ranks count in the gradient norm."""
    layout: Layout | None = None
    """Layout of the vector; None: the vector counts as a single parameter."""
    schedule: TaskSchedule | None = None
    """Learning-rate schedule of the task; None: the job's."""
    own_loop: OwnLoop | None = None
    """How servers process the gradients of a train function; None: the job runs a task."""


@dataclass(frozen=True)
class Membership:
    """What a worker needs to reach the servers of its part of the model."""

    part: int
    """Index of the part; 0 if the model is not partitioned."""
    part_rank: int
    """Index among the data-parallel peers; the rank if the model is not partitioned."""
    shard_map: ShardMap
    servers: list[Any]
    """Handles of the server nodes, by shard."""
    names: list[str]
    """Their names, by shard."""
    parameters: list[MemoryAddress]
    """Parameter segment of each server's node, by shard; each holds the whole flat vector."""
    private: bool
    """Whether each worker computes on its own copy of the parameters."""
    wire: str | None = None
    """Name in torch of the dtype sent to other nodes; None: the parameters' dtype."""
    part_world: int | None = None
    """Number of workers that share these servers if the model is partitioned; None: all workers."""
    replicated: bool = False
    """Whether each shard has a backup, which replaces a lost server in a newer shard map."""

    @property
    def version(self) -> int:
        """Version of the shard map."""
        return self.shard_map.version


@dataclass(frozen=True)
class TableMap:
    """The embedding server of each part of the tables."""

    version: int
    """Incremented when a backup replaces a lost server."""
    servers: list[Any]
    """Handles of the server nodes, by part."""
    names: list[str]
    """Their names, by part."""


@dataclass(frozen=True)
class TablePart:
    """The part of the embedding tables that a server node keeps."""

    server: str
    """Name of the server, for messages."""
    index: int
    """Index of the part."""
    replicated: bool = False
    """Whether each part has a backup."""
    limit_s: float = 60.0
    """Timeout for a backup to apply an update."""


@dataclass(frozen=True)
class OpenReply:
    """An embedding server's answer to a worker that joins an attempt."""

    shares_memory: bool
    """Whether the server can map the worker's memory; else ids and rows are sent in calls."""
    steps: int
    """Number of steps applied to the tables."""


@dataclass(frozen=True)
class RowTransfer:
    """Ids of one table, and memory for their rows or gradients, in a request to a server."""

    table: int
    count: int
    """Number of ids."""
    ids: MemoryAddress | NDArray[np.int64]
    """Address of the ids, or the ids themselves."""
    values: MemoryAddress | NDArray[np.float32] | None
    """Address of the rows or gradients, or the gradients themselves; None: a pull that returns
    the rows in its answer."""
    first_id: int = 0
    """Index of the first id in the memory at `ids`."""
    first_value: int = 0
    """Index of the first element in the memory at `values`."""
