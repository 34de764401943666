"""
The driver's half of a strategy: its options, requirements and limits.

    driver    Strategy         options, roles, problems, the worker class's name          no torch
    worker    WorkerStrategy   setup, exchange, update (`worker_strategy.py`)             torch

Listing strategies and checking a job must be fast, so this module does not import torch
(docs/decisions/strategy_halves.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Literal, TypeVar

from pydantic import Field
from typing_extensions import override

from distplat.platform.errors import Problem
from distplat.platform.fields import Resources, Spec
from distplat.platform.shard_map import Division
from distplat.platform.spec import SYNCHRONOUS, Consistency, Job


class Options(Spec):
    """Base class of a strategy's options: frozen, rejects unknown names."""


Backend = Literal["auto", "shm", "gloo", "nccl", "hierarchical"]
"""Transport of a collective. `auto` chooses by the nodes and devices of the workers."""


@dataclass(frozen=True)
class GroupSpec:
    """The collective group of all workers that a strategy requires."""

    backend: Backend = "auto"
    timeout_s: float = 60.0
    """Timeout of one operation."""
    debug: bool = False
    """Whether ranks compare every operation; by default they compare only the first ones."""
    setting: str = ""
    """The job field that sets the timeout, for error messages."""


@dataclass(frozen=True)
class Roles:
    """
    The processes and groups that a strategy requires besides workers, and the ranks of each model
    part.
    """

    servers: int = 0
    """Number of parameter-server nodes. With at least one, workers get the port `Shards`."""
    server_resources: dict[str, float] | None = None
    """Ray resources of each server node."""
    consistency: Consistency = SYNCHRONOUS
    """When the servers apply gradients."""
    replication: int = 1
    """Copies of each shard: 1, or 2 for a primary and a backup."""
    resizes: bool = False
    """
    Whether the number of workers may change between attempts. Requires that servers hold all state
    and every worker holds the whole model.
    """
    wire: str | None = None
    """Name of the torch dtype for transfers between workers and servers on different nodes."""
    split_by_load: bool = False
    """
    Whether shard sizes follow the servers' measured speed; otherwise all shards have the same size.
    """
    collective: GroupSpec | None = None
    """The group of all workers; None: workers do not get the port `Collective`."""
    parts: tuple[tuple[int, ...], ...] = ()
    """
    Ranks of each part of a split model. The `servers` are divided evenly among the parts. Empty:
    all ranks hold the whole model.
    """
    group_size: int = 1
    """
    Workers of a worker group. They have consecutive ranks, and are placed on one node if the node
    has enough resources.
    """

    def replicas(self, world: int) -> int:
        """
        Return the number of replicas of the model. Each replica processes its own part of every
        batch.
        """
        return world // self.group_size

    def holders(self, world: int) -> tuple[tuple[int, ...], ...]:
        """Return the ranks that hold each part of the model."""
        return self.parts or (tuple(range(world)),)

    def division(self, world: int) -> Division:
        """Return the assignment of ranks to servers."""
        return Division(self.holders(world), self.servers)


OptionsT = TypeVar("OptionsT", bound=Options)

_WORKER_METHODS = ("setup", "exchange", "update")


class Strategy(Generic[OptionsT]):
    """
    The driver's half of a strategy.

    Register a subclass under a name with `register`. Only the name and the options are sent to
    other processes: each process creates its own instance, and a worker creates its
    `WorkerStrategy` from that instance.

    Raises:
        TypeError: A subclass defines methods that belong to its `WorkerStrategy`.
    """

    summary: ClassVar[str]
    """One line for `distplat strategies`."""
    options_type: ClassVar[type[Options]] = Options
    worker: ClassVar[str | type[Any]]
    """The subclass of `WorkerStrategy`, or `"module:Class"` if another module defines it."""
    has_checkpoints: ClassVar[bool] = False
    """
    Whether the worker class implements `checkpoint`. If not, jobs with checkpoints are rejected.
    """
    gathers: ClassVar[bool] = False
    """
    Whether a loss may use `all_gather`; if not, jobs whose loss uses it are rejected. Requires that
    all workers compute the same step at a time, and that gradients are sums over the workers.
    """
    scales_loss: ClassVar[bool] = False
    """Whether gradients may be multiplied by a loss scale, as with `precision: fp16`."""
    averages: ClassVar[bool] = False
    """Whether the worker class implements `average`. If not, jobs with an `ema` are rejected."""

    updates_whole: ClassVar[bool] = False
    """
    Whether each worker updates the whole model with `Context.local_optimizer`, so that a task's own
    optimizer is possible. If not, jobs with `optimizer: {name: task}` are rejected.
    """

    @override
    def __init_subclass__(cls, **more: Any) -> None:
        """Reject a class written for the earlier API, in which a strategy was a single class."""
        super().__init_subclass__(**more)
        methods = [f"{name}()" for name in _WORKER_METHODS if name in vars(cls)]
        if methods:
            text = f"{cls.__name__} is a Strategy and has {', '.join(methods)}"
            raise TypeError(f"{text}: {MIGRATION_HINT}")
        reject_renamed_methods(cls, {"survivors_go_on": "survives_worker_loss"})

    def __init__(self, options: OptionsT) -> None:
        self.options = options

    @classmethod
    def complete(cls, job: Job) -> Job:
        """Return the job with strategy options filled in that follow from the rest of the job."""
        return job

    def detail(self) -> str:
        """Return details to log after the strategy's name at the start of a run; may be empty."""
        return ""

    def roles(self, job: Job) -> Roles:
        """Return the requirements of the strategy besides workers."""
        return Roles()

    def micro_batches(self, job: Job) -> int:
        """Return the number of micro-batches into which a replica's part of a batch is split."""
        return job.gradient_accumulation

    def problems(self, job: Job) -> list[Problem]:
        """
        Return the job's settings that the strategy does not support. No option may be ignored
        silently.
        """
        return []

    def own_loop_problems(self, job: Job) -> list[Problem]:
        """
        Return the settings that the strategy does not support for a train function.

        By default a strategy does not run train functions at all.
        """
        text = f"{job.strategy.name} does not run train functions, which have a loop of their own"
        hint = "use `ring`, `ps-sync` or `ps-async`, or write a distplat.Task"
        return [Problem(("strategy",), text, hint)]

    def survives_worker_loss(self) -> bool:
        """
        Return whether the remaining workers can continue with their own state after a loss of
        workers.

        If so, they call `setup` again, together with replacement workers. If not, all workers
        restart, from the newest checkpoint or from the first step.
        """
        return False


def reject_renamed_methods(cls: type, names: Mapping[str, str]) -> None:
    """Reject a class that has a method under its old name, which nothing would call."""
    for old in (name for name in names if hasattr(cls, name)):
        raise TypeError(f"{cls.__name__}.{old}() was renamed to {names[old]}()")


MIGRATION_HINT = (
    "move the worker's methods to a subclass of `distplat.strategy.WorkerStrategy`, and name that "
    "class in the attribute `worker` of the Strategy (docs/own_strategies.md)"
)
"""Hint for strategies that are written as a single class."""


WIRES: dict[str, str | None] = {"exact": None, "fp16": "float16", "bf16": "bfloat16"}
"""Values of the servers' option `wire`, and the name of the torch dtype of each."""


class ServerOptions(Options):
    """Options of strategies whose parameters are stored on servers."""

    removed_fields: ClassVar[Mapping[str, str]] = {
        "overlap": "it was removed: gradients go to the servers when backward is over"
    }
    num_servers: int = Field(1, ge=1, le=256, strict=True)
    """Server nodes; each stores an equal part of the parameters."""
    resources_per_server: Resources = Field(default_factory=lambda: {"CPU": 0.0})
    """Ray resources of each server node. None by default: a server computes while workers wait."""
    replication: int = Field(1, ge=1, le=2, strict=True)
    """2: each shard has a backup, which takes over if its server is lost."""
    wire: Literal["exact", "fp16", "bf16"] = "exact"
    """Dtype of gradients and parameters between nodes; within a node nothing is copied."""

    def roles(self, consistency: Consistency, **more: Any) -> Roles:
        """
        Return roles with a server group.

        Args:
            consistency: when servers apply gradients.
            more: further fields of `Roles`.
        """
        return Roles(
            servers=self.num_servers,
            server_resources=self.resources_per_server,
            consistency=consistency,
            replication=self.replication,
            wire=WIRES[self.wire],
            **more,
        )


def rows_before_gradients(job: Job) -> bool:
    """
    Return whether a synchronous strategy must push a step's embedding rows before its gradients.

    Asynchronous tables cannot undo a push. When other ranks complete a step, all of its rows must
    therefore already be on the servers. If the step is repeated instead, servers recognize rows
    that they have already received.
    """
    return job.embeddings is not None and job.embeddings.asynchronous
