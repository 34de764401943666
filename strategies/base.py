"""
What a strategy is, and the ports through which it reaches the others.

A strategy says what is exchanged between gradients and update; how bytes travel is behind two
ports, which `actors/` implements, over Ray and inside one process:

    worker loop          strategy                 port                         behind it
    -----------          --------                 ----                         ---------
    batch, forward,
    backward        ->   exchange(step, local) -> Collective.all_reduce   ->   other workers
                                            or    Shards.push             ->   server nodes
                         update(step, total)   -> the local optimizer
                                            or    Shards.commit           ->   server nodes

This module needs no torch itself: listing strategies and checking a job must be quick.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Generic, TypeVar

from distplat.platform.consistency import SYNCHRONOUS, Consistency
from distplat.platform.errors import Problem
from distplat.platform.fields import Spec
from distplat.platform.shard_map import Division
from distplat.platform.spec import Job
from distplat.strategies.collective import Collective as Collective
from distplat.strategies.collective import Handle as Handle
from distplat.strategies.collective import ReduceOp as ReduceOp
from distplat.strategies.ports import Pushed as Pushed
from distplat.strategies.ports import Shards as Shards
from distplat.strategies.ports import Traffic as Traffic

if TYPE_CHECKING:
    from torch import Tensor, nn

    from distplat.platform.pieces import Place
    from distplat.platform.pipeline_trace import TraceReport
    from distplat.strategies.task import Task
    from distplat.strategies.training.compute import Compute, Share
    from distplat.strategies.training.control import StepControl
    from distplat.strategies.training.flat import FlatModel
    from distplat.strategies.training.model_state import ModelState
    from distplat.strategies.training.optim import LocalOptimizer
    from distplat.strategies.training.parts import Part
    from distplat.strategies.training.restoring import SavedState
    from distplat.strategies.training.session import Prepared


class Options(Spec):
    """Base of a strategy's options: frozen, unknown names refused, one sentence per field."""

    removed: ClassVar[Mapping[str, str]] = {}
    """Options that there were once, and what is to be said to who still sets them."""


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
    """Workers that hold one copy of the model together; they are placed on one node if it has
    room for them."""

    def division(self, world: int) -> Division:
        """Say which ranks share which servers."""
        return Division(self.parts or (tuple(range(world)),), self.servers)


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
    tables_made: int | None = None
    """Steps that every server of embedding tables has made, or one more; None: there are none.
    They can all go back to as many."""
    model_state: ModelState | None = None
    meet_peers: Callable[[], Collective] | None = None
    """Makes a group of all workers; every rank calls it, or none. See `peers`."""

    @property
    def state(self) -> ModelState:
        """What the model has beside what gradients train."""
        assert self.model_state is not None, "join() makes it"
        return self.model_state

    def peers(self) -> Collective | None:
        """
        Make a group of all workers, for a strategy whose `roles` asked for none.

        For models that have more to agree on than gradients: all ranks must come to the same
        answer, from the model alone, whether they call this. None: the ports have no such group.
        """
        return None if self.meet_peers is None else self.meet_peers()

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
    `setup`, then for every step `exchange` (the local gradient is ready: that of this rank's
    losses, summed and divided by the global batch) and `update`.

    After a failure the workers that are left keep their strategy object and call `setup` again,
    with new ports; new workers come to theirs with a new object (docs/architecture.md).
    """

    summary: ClassVar[str]
    """One line for `distplat strategies`."""
    options_type: ClassVar[type[Options]] = Options
    cuts_model: ClassVar[bool] = False
    """Whether a rank has a part of the model only: then `replicas`, `holders`, `build`, `own_part`
    and `compute` are its own, too."""
    has_parts: ClassVar[bool] = False
    """Whether `part` is there; a job that wants checkpoints is refused where it is not."""

    def __init__(self, options: OptionsT) -> None:
        self.options = options

    def can_thaw(self) -> bool:
        """Say whether parameters that are frozen at first may take part in training later."""
        return False

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

    def replicas(self, job: Job) -> int:
        """Count the copies of the model; each takes its part of every batch."""
        return job.scaling.world

    def holders(self, job: Job) -> tuple[tuple[int, ...], ...]:
        """Give, for each part into which the model is cut, the ranks that have it."""
        return (tuple(range(job.scaling.world)),)

    def build(self, task: Task) -> nn.Module:
        """Build the model, whole; seeded before."""
        return task.model()

    def own_part(self, prepared: Prepared, rank: int, collective: Collective | None) -> FlatModel:
        """
        Give what this rank trains; asked in every attempt, of all ranks.

        A strategy that cuts the model may talk to the other ranks about where.
        """
        return prepared.flat

    @abstractmethod
    def setup(self, context: Context) -> int:
        """
        Prepare this worker; its model is built, its ports are connected.

        Returns:
            Steps that `flat.params` now has behind it, the same on all ranks; 0 in a fresh run,
            those of `context.saved` in one that begins from a checkpoint.
        """

    def caught_up(self) -> Share | None:
        """
        Give what this rank computed of the step before the one that `setup` gave.

        For a rank that had not made that step when the attempt before ended, and made it in
        `setup`: its part is still to be reported. None: nothing is.
        """
        return None

    def compute(self, prepared: Prepared, context: Context) -> Compute:
        """Give what makes this rank's share of the gradients; asked after `setup`."""
        from distplat.strategies.training.compute import WholeModel  # torch: in workers only

        return WholeModel(prepared, self, context.rank, context.alive)

    def skips(self, step: int) -> bool:
        """Say whether this rank leaves the step out; asked once before each step."""
        return False

    def last_backward(self, step: int) -> None:
        """
        Be told that the step's last backward begins: gradients that it finishes are final.

        Not called on a rank that has no samples in this step.

        Args:
            step: as `exchange` will be told; where tasks are leased, the number of the task.
        """

    @abstractmethod
    def exchange(self, step: int, local: StepControl) -> StepControl:
        """
        Gradients are ready in `flat.grads`: combine them with the other ranks'.

        Args:
            step: the present one; where tasks are leased, the number of the task.
            local: this rank's control record.

        Returns:
            The records of all ranks, summed: what every rank decides by.
        """

    @abstractmethod
    def update(self, step: int, total: StepControl) -> None:
        """
        Bring `flat.params` from version `step` to version `step + 1`.

        Args:
            step: as for `exchange`.
            total: what `exchange` gave; with `total.skip` parameters and optimizer stay as they
                are.
        """

    def places(self, flat: FlatModel) -> dict[str, Place] | None:
        """Say where each tensor of `flat` lies in the whole model; None: `flat` is the whole."""
        return None

    def showing(self, job: Job) -> tuple[int, ...]:
        """Give the ranks that together show the whole model to `distplat.weights`."""
        return (0,)

    def shown(self, flat: FlatModel) -> Part:
        """Give this rank's part of the model as it is; asked where several ranks show it."""
        from distplat.strategies.training.parts import model_part  # torch: in workers only

        return model_part(flat)

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

    def trace(self, step: int) -> TraceReport | None:
        """Tell when what was done in the step just made, where that is wanted."""
        return None

    def trained(self, flat: FlatModel) -> dict[str, Tensor]:
        """
        Give this rank's part of the trained model by name; the ports are still there.

        A strategy whose ranks send to each other here, or in the last update, ends with a barrier:
        who leaves may take with it what was not yet read.
        """
        return flat.state_dict()
