"""
What a worker runs of a strategy, and the ports through which it reaches the others.

A strategy says what is exchanged between gradients and update; how bytes travel is behind two
ports, which `actors/` implements, over Ray and inside one process:

    worker loop          strategy                 port                         behind it
    -----------          --------                 ----                         ---------
    batch, forward,
    backward        ->   exchange(step, local) -> Collective.all_reduce   ->   other workers
                                            or    Shards.push             ->   server nodes
                         update(step, total)   -> the local optimizer
                                            or    Shards.commit           ->   server nodes

What the driver knows of the same strategy is its `Strategy` (`strategies/strategy_spec.py`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any, ClassVar, Generic

from torch import Tensor, nn

from distplat.platform.errors import Problem, SpecError
from distplat.platform.progress import AnyReport
from distplat.platform.spec import Job
from distplat.strategies.catalog import make_strategy
from distplat.strategies.checkpoint.checkpoint_reader import SavedState
from distplat.strategies.checkpoint.checkpoint_types import CheckpointPart, Holding
from distplat.strategies.collective import Collective
from distplat.strategies.loop.compute import Compute, Share, WholeModel
from distplat.strategies.loop.control import StepControl
from distplat.strategies.loop.prepared import Prepared
from distplat.strategies.model.flat import FlatModel
from distplat.strategies.model.model_state import ModelState
from distplat.strategies.model.optim import LocalOptimizer
from distplat.strategies.model.task_optimizer import MadeOptimizers, TaskUpdate
from distplat.strategies.ports import Shards
from distplat.strategies.strategy_spec import NEW_WAY, OptionsT, Strategy, refuse_old_names
from distplat.strategies.task import Task


@dataclass
class Context:
    """What a strategy works with inside one worker, in one attempt."""

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
    checkpoint_step: int = 0
    """Steps of the newest checkpoint: what has fewer behind it is no state to go on from."""
    table_steps: int | None = None
    """Steps that every server of embedding tables has made, or one more; None: there are none.
    They can all go back to as many."""
    model_state: ModelState | None = None
    connect_peers: Callable[[], Collective] | None = None
    """Makes a group of all workers; every rank calls it, or none. See `peers`."""
    report: Callable[[AnyReport], None] = lambda report: None
    """Takes what the strategy reports beside the loop's own; quick, and of the loop's thread."""

    optimizers: MadeOptimizers = ()
    """What the task's `optimizer` gave; empty: the job names one."""

    @property
    def state(self) -> ModelState:
        """The model's untrained state: buffers and frozen parameters."""
        assert self.model_state is not None, "join() makes it"
        return self.model_state

    def peers(self) -> Collective | None:
        """
        Make a group of all workers, for a strategy whose `roles` asked for none.

        For models that have more to agree on than gradients: all ranks must come to the same
        answer, from the model alone, whether they call this. None: the ports have no such group.
        """
        return None if self.connect_peers is None else self.connect_peers()

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
        """Build the optimizer, schedule and clipping over this worker's parameters."""
        if self.optimizers:
            return TaskUpdate(self.flat, self.job, self.total_steps, self.optimizers)
        return LocalOptimizer(self.flat, self.job, self.total_steps)


class WorkerStrategy(ABC, Generic[OptionsT]):
    """
    One worker's part in a strategy.

    The worker loop calls `setup`, then for every step `exchange` (the local gradient is ready:
    that of this rank's losses, summed and divided by the global batch) and `update`.

    After a failure the workers that are left keep this object and call `setup` again, with new
    ports; new workers come to theirs with a new object (docs/architecture.md).

    Args:
        strategy: what the driver knows of it, with the options.
    """

    cuts_model: ClassVar[bool] = False
    """Whether a rank has a part of the model only: then `cut_model` and `compute` are its own."""

    replayed: Share | None = None
    """What this rank computed of the step before the one that `setup` gave: it had not made that
    step when the attempt before ended, and made it in `setup`. None: there is no such step."""

    pending_share: tuple[int, Share] | None = None
    """A step, and what this rank has given to its exchange; None once it is reported. Where the
    attempt ended in between, the others or the servers may have made the step."""

    def __init_subclass__(cls, **more: Any) -> None:
        """Refuse names that the methods had before."""
        super().__init_subclass__(**more)
        refuse_old_names(cls, {"can_thaw": "can_unfreeze"})

    def __init__(self, strategy: Strategy[OptionsT]) -> None:
        self.strategy, self.options = strategy, strategy.options

    def can_unfreeze(self) -> bool:
        """Say whether parameters that are frozen at first may take part in training later."""
        return False

    def build_model(self, task: Task) -> nn.Module:
        """Build the model, whole; seeded before."""
        return task.model()

    def cut_model(
        self, prepared: Prepared, rank: int, collective: Collective | None
    ) -> tuple[FlatModel, Holding]:
        """
        Give what this rank trains, and what of the whole model that is.

        Asked in every attempt, of all ranks, which may talk to each other about where; only with
        `cuts_model`.
        """
        raise NotImplementedError(f"{type(self).__name__} does not cut the model")

    @abstractmethod
    def setup(self, context: Context) -> int:
        """
        Prepare this worker; its model is built, its ports are connected.

        Returns:
            Steps that `flat.params` now has behind it, the same on all ranks; 0 in a fresh run,
            those of `context.saved` in one that begins from a checkpoint.
        """

    def compute(self, prepared: Prepared, context: Context) -> Compute:
        """Give what makes this rank's share of the gradients; asked after `setup`."""
        return WholeModel(prepared, self.last_backward, context.rank, context.alive)

    def skips(self, step: int) -> bool:
        """Say whether this rank leaves the step out; asked once before each step."""
        return False

    def last_backward(self) -> None:
        """
        Called when a step's last backward begins: gradients that it finishes are final.

        Not called on a rank that has no samples in this step.
        """

    @abstractmethod
    def exchange(self, step: int, local: StepControl) -> StepControl:
        """
        Gradients are ready in `flat.grads`: combine them with the other ranks'.

        Args:
            step: the present one; where tasks are leased, the number of the task.
            local: this rank's control record.

        Returns:
            The records of all ranks, summed: what every rank decides by. One that was not summed
            must have `StopOrder.NONE`, or ranks would stop after different steps.
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

    def checkpoint(self, version: int) -> CheckpointPart:
        """
        Give what this rank is responsible for in a checkpoint; called between two steps.

        Args:
            version: steps done, on every rank the same ones.
        """
        raise NotImplementedError(f"{type(self).__name__} has no checkpoints")

    def synchronize(self) -> None:
        """Make all ranks' parameters equal; called before an evaluation and at the end."""

    def average(self) -> Tensor:
        """
        Give the average that the job's `ema` asks for, shape [n], as it is between two steps.

        Every rank calls this; where tasks are leased, who evaluates. Only where the driver's half
        says that it `averages`.
        """
        raise NotImplementedError(f"{type(self).__name__} keeps no average of the weights")

    def figures(self) -> dict[str, float]:
        """Give this rank's figures of the step just made, by name, for metrics and report."""
        return {}

    def trained(self, flat: FlatModel) -> dict[str, Tensor]:
        """
        Give this rank's part of the trained model by name; the ports are still there.

        An average of it stands beside it, see `with_average`.

        A strategy whose ranks send to each other here, or in the last update, ends with a barrier:
        who leaves may take with it what was not yet read.
        """
        return flat.state_dict()


def worker_class(strategy: Strategy[Any]) -> type[WorkerStrategy[Any]]:
    """
    Give the class that a worker runs.

    Raises:
        SpecError: the strategy names none.
    """
    named = getattr(strategy, "worker", None)
    if isinstance(named, str):
        module, _, name = named.partition(":")
        named = getattr(import_module(module), name, None)
    if isinstance(named, type) and issubclass(named, WorkerStrategy):
        return named
    text = f"{type(strategy).__name__} names no WorkerStrategy: {NEW_WAY}"
    raise SpecError(Problem(("strategy",), text))


def make_worker_strategy(job: Job) -> WorkerStrategy[Any]:
    """
    Build what this worker runs of the job's strategy.

    Raises:
        SpecError: see `make_strategy`, `worker_class`.
    """
    strategy = make_strategy(job)
    return worker_class(strategy)(strategy)
