"""
What the driver knows of a strategy: its options, what it needs, and what it cannot do.

    driver    Strategy         options, roles, problems, the name of the worker's class   no torch
    worker    WorkerStrategy   setup, exchange, update (`worker_strategy.py`)             torch

Listing strategies and checking a job must be quick, so nothing here imports torch
(docs/decisions/strategy_halves.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Literal, TypeVar

from pydantic import Field

from distplat.platform.errors import Problem
from distplat.platform.fields import Resources, Spec
from distplat.platform.shard_map import Division
from distplat.platform.spec import SYNCHRONOUS, Consistency, Job


class Options(Spec):
    """Base of a strategy's options: frozen, unknown names refused, one sentence per field."""


Backend = Literal["auto", "shm", "gloo", "nccl", "hierarchical"]
"""How the bytes of a collective travel: `auto` chooses by where the workers are."""


@dataclass(frozen=True)
class GroupSpec:
    """The collective group of all workers that a strategy asks for."""

    backend: Backend = "auto"
    timeout_s: float = 60.0
    """Deadline of one operation."""
    debug: bool = False
    """Compare every operation between the ranks, not only the first ones."""
    setting: str = ""
    """Field of the job that the deadline is from, for errors."""


@dataclass(frozen=True)
class Roles:
    """What a strategy needs besides the workers, and which of them have what of the model."""

    servers: int = 0
    """Parameter-server nodes; with one or more, workers get the port `Shards`."""
    server_resources: dict[str, float] | None = None
    """Ray resources of one server node."""
    consistency: Consistency = SYNCHRONOUS
    """When the servers apply gradients."""
    replication: int = 1
    """How many servers keep each shard: one, or a primary and its backup."""
    resizes: bool = False
    """Whether there may be more or fewer workers from one attempt to the next: all state is the
    servers', and every worker has the whole model."""
    wire: str | None = None
    """Name in torch of the type that travels between workers and servers of two nodes."""
    split_by_load: bool = False
    """Whether shards are cut by the servers' measured speed; else all have the same size."""
    collective: GroupSpec | None = None
    """The group of all workers; None: workers get no port `Collective`."""
    parts: tuple[tuple[int, ...], ...] = ()
    """By part of a model that is cut, the ranks that have it: `servers` are shared out evenly to
    the parts. Empty: all ranks have the whole."""
    group_size: int = 1
    """Workers that hold one copy of the model together, with consecutive ranks; they are placed on
    one node if it has room for them."""

    def replicas(self, world: int) -> int:
        """Count the copies of the model; each takes its part of every batch."""
        return world // self.group_size

    def holders(self, world: int) -> tuple[tuple[int, ...], ...]:
        """Give, for each part into which the model is cut, the ranks that have it."""
        return self.parts or (tuple(range(world)),)

    def division(self, world: int) -> Division:
        """Say which ranks share which servers."""
        return Division(self.holders(world), self.servers)


OptionsT = TypeVar("OptionsT", bound=Options)

_OF_A_WORKER = ("setup", "exchange", "update")


class Strategy(Generic[OptionsT]):
    """
    One architecture of distributed training, as the driver sees it.

    A subclass is registered under a name. Only the name and the options travel: each process makes
    the strategy anew, and a worker its `WorkerStrategy` from it.

    Raises:
        TypeError: by a subclass that has what belongs to its `WorkerStrategy`.
    """

    summary: ClassVar[str]
    """One line for `distplat strategies`."""
    options_type: ClassVar[type[Options]] = Options
    worker: ClassVar[str | type[Any]]
    """The subclass of `WorkerStrategy`, or `"module:Class"` where it is in a module of its own."""
    has_checkpoints: ClassVar[bool] = False
    """Whether the worker's class has `checkpoint`; a job that wants some is refused elsewhere."""
    gathers: ClassVar[bool] = False
    """Whether all workers compute the same step at a time and gradients are sums over them, so that
    a loss may use `all_gather`; it is refused elsewhere."""
    scales_loss: ClassVar[bool] = False
    """Whether gradients may come multiplied by a loss scale, `precision: fp16`."""
    averages: ClassVar[bool] = False
    """Whether the worker's class has `average`; a job with an `ema` is refused elsewhere."""

    updates_whole: ClassVar[bool] = False
    """Whether each worker updates the whole model by `Context.local_optimizer`, so that it can be a
    task's own; a job with `optimizer: {name: task}` is refused elsewhere."""

    def __init_subclass__(cls, **more: Any) -> None:
        """Refuse a class that was written when a strategy was one class."""
        super().__init_subclass__(**more)
        methods = [f"{name}()" for name in _OF_A_WORKER if name in vars(cls)]
        if methods:
            text = f"{cls.__name__} is a Strategy and has {', '.join(methods)}"
            raise TypeError(f"{text}: {NEW_WAY}")
        refuse_old_names(cls, {"survivors_go_on": "survives_worker_loss"})

    def __init__(self, options: OptionsT) -> None:
        self.options = options

    @classmethod
    def complete(cls, job: Job) -> Job:
        """Give the job with the options that follow from the rest of it, where it does not say."""
        return job

    def detail(self) -> str:
        """Say what a user wants to know of it beside its name, as a run starts; may be empty."""
        return ""

    def roles(self, job: Job) -> Roles:
        """Say what the strategy needs besides workers."""
        return Roles()

    def micro_batches(self, job: Job) -> int:
        """Say into how many micro-batches a replica's part of a batch is cut."""
        return job.gradient_accumulation

    def problems(self, job: Job) -> list[Problem]:
        """Name what in this job the strategy cannot do; an option is never ignored."""
        return []

    def own_loop_problems(self, job: Job) -> list[Problem]:
        """Name what it cannot do for a train function; unless it says more, it runs none."""
        text = f"{job.strategy.name} does not run train functions, which have a loop of their own"
        hint = "use `ring`, `ps-sync` or `ps-async`, or write a distplat.Task"
        return [Problem(("strategy",), text, hint)]

    def survives_worker_loss(self) -> bool:
        """
        Say whether, when workers are lost, the others can go on with the state that they have.

        Then they call `setup` again, beside new workers; else a restart begins at the first step.
        """
        return False


def refuse_old_names(cls: type, names: Mapping[str, str]) -> None:
    """Refuse a class with a method that was renamed, or a base's: it would never be called."""
    for old in (name for name in names if hasattr(cls, name)):
        raise TypeError(f"{cls.__name__}.{old}() is called {names[old]}() now")


NEW_WAY = (
    "what a worker runs goes into a subclass of `distplat.strategy.WorkerStrategy`, which the "
    "attribute `worker` of the Strategy names (docs/own_strategies.md)"
)
"""What is to be said to who has a strategy of one class."""


WIRES: dict[str, str | None] = {"exact": None, "fp16": "float16", "bf16": "bfloat16"}
"""What the servers' option `wire` may be, and the type in torch that it means."""


class ServerOptions(Options):
    """Options of strategies whose parameters are kept by servers."""

    removed_fields: ClassVar[Mapping[str, str]] = {
        "overlap": "it was removed: gradients go to the servers when backward is over"
    }
    num_servers: int = Field(1, ge=1, le=256, strict=True)
    """Server nodes; each keeps an equal part of the parameters."""
    resources_per_server: Resources = Field(default_factory=lambda: {"CPU": 0.0})
    """Ray resources of one server node; by default none, for it works while workers wait."""
    replication: int = Field(1, ge=1, le=2, strict=True)
    """2: each shard has a backup, which takes over when its server is lost."""
    wire: Literal["exact", "fp16", "bf16"] = "exact"
    """Type in which gradients and parameters travel between nodes; on a node nothing travels."""

    def roles(self, consistency: Consistency, **more: Any) -> Roles:
        """Ask for the server group, and for more fields of `Roles`."""
        servers = self.num_servers, self.resources_per_server
        how = {"replication": self.replication, "wire": WIRES[self.wire], **more}
        return Roles(*servers, consistency, **how)


def rows_before_gradients(job: Job) -> bool:
    """
    Say whether gradients of a synchronous strategy must not leave before the step's rows are in.

    Asynchronous tables take no step back. So when the others' step is made, all rows of it must be
    on the servers; rows of a step that is not made are known there when they come once more.
    """
    return job.embeddings is not None and job.embeddings.asynchronous
