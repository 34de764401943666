"""
What a strategy is, and the ports through which it reaches the others.

A strategy says what is exchanged between gradients and update; how bytes travel is behind two
ports, which `actors/` implements over Ray and `strategies/fakes.py` inside one process:

    worker loop          strategy                 port                         behind it
    -----------          --------                 ----                         ---------
    batch, forward,
    backward        ->   exchange(step)     ->    Collective.all_reduce   ->   other workers
                                            or    Shards.push             ->   server nodes
                         update(step)       ->    the local optimizer
                                            or    Shards.commit           ->   server nodes

This module needs no torch itself: listing strategies and checking a job must be quick.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, ClassVar, Generic, Protocol, TypeVar

from distplat.platform.clocks import SYNCHRONOUS, Consistency
from distplat.platform.errors import Problem
from distplat.platform.fields import Spec
from distplat.platform.spec import Job
from distplat.strategies.ports import Pushed as Pushed
from distplat.strategies.ports import Shards as Shards
from distplat.strategies.ports import Traffic as Traffic

if TYPE_CHECKING:
    from torch import Tensor

    from distplat.strategies.training.flat import FlatModel
    from distplat.strategies.training.optim import LocalOptimizer
    from distplat.strategies.training.parts import Part
    from distplat.strategies.training.restoring import SavedState


class ReduceOp(StrEnum):
    """How a collective combines the ranks' values."""

    SUM = "sum"
    AVG = "avg"
    MIN = "min"
    MAX = "max"
    PRODUCT = "product"


class Handle(Protocol):
    """An operation under way."""

    def wait(self) -> None:
        """
        Return when the result is there.

        Raises:
            CollectiveError: it failed or ran out of time; names the missing ranks.
        """


class Collective(Protocol):
    """
    A group of ranks as one of them sees it. Every rank calls the same operations in the same order.

    Tensors are contiguous and of equal shape and dtype on all ranks; results are written in place
    and are the same bits on every rank. Every operation raises `CollectiveError`, also where ranks
    are found to be in different operations, or in one with different shapes.
    """

    @property
    def rank(self) -> int:
        """This rank's place in the group, from 0."""

    @property
    def world(self) -> int:
        """Ranks in the group."""

    @property
    def traffic(self) -> Traffic:
        """What this rank's operations have cost, sub-groups apart; updated as they end."""

    def share(self, like: Tensor) -> Tensor:
        """
        Give a vector of zeros of the shape, dtype and device of `like`, for this group's use.

        Where ranks share memory, an operation on it, or on the same part of it on every rank,
        copies nothing. Every rank calls this. It is the group's: when the group is closed, take
        what is needed out of it and let it go.
        """

    def all_reduce(self, tensor: Tensor, op: ReduceOp = ReduceOp.SUM) -> None:
        """Replace `tensor` by its combination over all ranks."""

    def start_all_reduce(self, tensor: Tensor, op: ReduceOp = ReduceOp.SUM) -> Handle:
        """Begin an all-reduce and go on; `tensor` is not to be touched until the handle is done."""

    def reduce_scatter(
        self, output: Tensor, inputs: Sequence[Tensor], op: ReduceOp = ReduceOp.SUM
    ) -> None:
        """
        Combine `inputs[r]` over all ranks into `output` of rank r; one input per rank.

        Inputs may be of uneven sizes, the r-th the same on all ranks; `output` may be this rank's
        own input.
        """

    def all_gather(self, outputs: Sequence[Tensor], tensor: Tensor) -> None:
        """
        Copy `tensor` of rank r into `outputs[r]` of every rank.

        The ranks' tensors may be of uneven sizes; `tensor` may be this rank's own output.
        """

    def broadcast(self, tensor: Tensor, source: int = 0) -> None:
        """Replace `tensor` by that of rank `source`."""

    def send(self, tensor: Tensor, to: int) -> None:
        """Hand `tensor` to rank `to`, which calls `recv`."""

    def recv(self, tensor: Tensor, source: int) -> None:
        """Fill `tensor` with what rank `source` sends."""

    def barrier(self) -> None:
        """Return when every rank has come here."""

    def subgroup(self, name: str, ranks: Sequence[int]) -> Collective:
        """
        Make a group of some of these ranks, in that order; each of them calls this.

        Args:
            name: one that no other group within this one has, members apart or not.
            ranks: places in this group.
        """


class Options(Spec):
    """Base of a strategy's options: frozen, unknown names refused, one sentence per field."""


@dataclass(frozen=True)
class GroupSpec:
    """The collective group of all workers that a strategy asks for."""

    backend: str = "auto"
    """How bytes travel: `auto` chooses by where the workers are."""
    timeout_s: float = 60.0
    """Deadline of one operation."""
    debug: bool = False
    """Compare every operation between the ranks, not only the first ones."""


WIRES: dict[str, str | None] = {"exact": None, "fp16": "float16", "bf16": "bfloat16"}
"""What the servers' option `wire` may be, and the type in torch that it means."""


@dataclass(frozen=True)
class Roles:
    """What a strategy needs besides the workers."""

    servers: int = 0
    """Parameter-server nodes; with one or more, workers get the port `Shards`."""
    server_resources: dict[str, float] | None = None
    """Ray resources of one server node."""
    consistency: Consistency = SYNCHRONOUS
    """When the servers apply gradients."""
    replication: int = 1
    """How many servers keep each shard: one, or a primary and its backup."""
    wire: str | None = None
    """Name in torch of the type that travels between workers and servers of two nodes."""
    collective: GroupSpec | None = None
    """The group of all workers; None: workers get no port `Collective`."""


@dataclass
class Context:
    """What a strategy works with inside one worker."""

    job: Job
    rank: int
    world: int
    total_steps: int
    flat: FlatModel
    _collective: Collective | None
    _shards: Shards | None
    alive: Callable[[], None] = lambda: None
    """To be called now and then in a wait that may be long for a good reason."""
    saved: SavedState | None = None
    """The checkpoint that `flat` was filled from, with the optimizer's state; None: from none."""
    base: int = 0
    """Steps of the newest checkpoint: what has fewer behind it is no state to go on from."""

    @property
    def collective(self) -> Collective:
        """The group of all workers; only if the strategy's `roles` asked for it."""
        assert self._collective is not None, "roles() did not ask for a collective group"
        return self._collective

    @property
    def shards(self) -> Shards:
        """The server group; only if the strategy's `roles` asked for it."""
        assert self._shards is not None, "roles() did not ask for servers"
        return self._shards

    def local_optimizer(self) -> LocalOptimizer:
        """Build the job's optimizer, schedule and clipping over this worker's parameters."""
        from distplat.strategies.training.optim import LocalOptimizer  # torch: in workers only

        return LocalOptimizer(self.flat, self.job, self.total_steps)


OptionsT = TypeVar("OptionsT", bound=Options)


class Strategy(ABC, Generic[OptionsT]):
    """
    One architecture of distributed training.

    A subclass in one file, registered under a name, is all there is to add. The worker loop calls
    `setup`, then for every step `exchange` (the local gradient is ready: the gradient of the
    global batch's mean loss, of which this rank's samples are one term of the sum) and `update`.

    After a failure the workers that are left keep their strategy object and call `setup` again,
    with new ports; new workers come to theirs with a new object (docs/architecture.md).
    """

    summary: ClassVar[str]
    """One line for `distplat strategies`."""
    options_type: ClassVar[type[Options]] = Options
    has_parts: ClassVar[bool] = False
    """Whether `part` is there; a job that wants checkpoints is refused where it is not."""

    def __init__(self, options: OptionsT) -> None:
        self.options = options

    def roles(self, job: Job) -> Roles:
        """Say what the strategy needs besides workers."""
        return Roles()

    def problems(self, job: Job) -> list[Problem]:
        """Name what in this job the strategy cannot do; an option is never ignored."""
        return []

    def survivors_go_on(self) -> bool:
        """
        Say whether, when workers are lost, the others can go on with the state that they have.

        Then they call `setup` again, beside new workers; else a restart begins at the first step.
        """
        return False

    @abstractmethod
    def setup(self, context: Context) -> int:
        """
        Prepare this worker; its model is built, its ports are connected.

        Returns:
            Steps that `flat.params` now has behind it, the same on all ranks; 0 in a fresh run,
            those of `context.saved` in one that begins from a checkpoint.
        """

    def skips(self, step: int) -> bool:
        """Say whether this rank leaves the step out; asked once before each step."""
        return False

    def last_backward(self, step: int) -> None:
        """
        Be told that the step's last backward begins: gradients that it finishes are final.

        Not called on a rank that has no samples in this step.
        """

    @abstractmethod
    def exchange(self, step: int) -> None:
        """Gradients are ready in `flat.grads`: combine them with the other ranks'."""

    @abstractmethod
    def update(self, step: int) -> None:
        """Bring `flat.params` from version `step` to version `step + 1`."""

    def part(self, version: int) -> Part:
        """
        Give what this rank is responsible for in a checkpoint; called between two steps.

        Args:
            version: steps done, on every rank the same ones.
        """
        raise NotImplementedError(f"{type(self).__name__} has no checkpoints")

    def synchronize(self) -> None:
        """Make all ranks' parameters equal; called before an evaluation and at the end."""

    def gather(self, data: bytes) -> list[bytes]:
        """
        Give what all ranks brought, in rank order; only `data` where ranks do not talk.

        What every rank has, no rank can take with it: evaluations are gathered.
        """
        return [data]

    def figures(self) -> dict[str, float]:
        """Give this rank's figures of the step just made, by name, for metrics and report."""
        return {}
