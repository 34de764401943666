"""
The worker's half of a strategy, and its connections to other processes.

A strategy decides what is exchanged between the computation of gradients and the update. The
transport of bytes is behind two ports, which `actors/` implements over Ray and within one process:

    worker loop          strategy                 port                         remote side
    -----------          --------                 ----                         -----------
    batch, forward,
    backward        ->   exchange(step, local) -> Collective.all_reduce   ->   other workers
                                            or    Shards.push             ->   server nodes
                         update(step, total)   -> the local optimizer
                                            or    Shards.commit           ->   server nodes

The driver's half of the same strategy is its `Strategy` (`strategies/strategy_spec.py`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any, ClassVar, Generic

from torch import Tensor, nn
from typing_extensions import override

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
from distplat.strategies.model.task_optimizer import ResettableOptimizers, TaskUpdate
from distplat.strategies.ports import Shards
from distplat.strategies.strategy_spec import (
    MIGRATION_HINT,
    OptionsT,
    Strategy,
    reject_renamed_methods,
)
from distplat.strategies.task import Task


@dataclass
class Context:
    """The model, ports and settings of a strategy in one worker, for one attempt."""

    job: Job
    rank: int
    world: int
    total_steps: int
    flat: FlatModel
    _collective: Collective | None
    _shards: Shards | None
    alive: Callable[[], None] = lambda: None
    """
    Call it regularly in a wait that may legitimately take long, so that the worker is not
    considered stuck.
    """
    saved: SavedState | None = None
    """
    The checkpoint that `flat` was loaded from, with the optimizer's state; None: no checkpoint.
    """
    checkpoint_step: int = 0
    """
    Step of the newest checkpoint. A rank's state of an earlier step must not be used to continue.
    """
    table_steps: int | None = None
    """
    Steps that every embedding server has completed. Some servers may have completed one more, and
    can all return to this step. None: the job has no tables.
    """
    model_state: ModelState | None = None
    connect_peers: Callable[[], Collective] | None = None
    """Creates a group of all workers; either every rank calls it or none does. See `peers`."""
    report: Callable[[AnyReport], None] = lambda report: None
    """
    Reports values in addition to the loop's own reports. Returns quickly; call it only from the
    loop's thread.
    """

    optimizers: ResettableOptimizers = ()
    """The optimizers that the task's `optimizer` returned; empty: the job names the optimizer."""

    @property
    def state(self) -> ModelState:
        """State of the model that is not trained: buffers and frozen parameters."""
        assert self.model_state is not None, "join() sets it"
        return self.model_state

    def peers(self) -> Collective | None:
        """
        Create a group of all workers, for a strategy whose `roles` do not include one.

        A model may need it to exchange more than gradients. Either all ranks call this or none
        does, so the decision must depend on the model alone. None: the ports do not offer such a
        group.
        """
        return None if self.connect_peers is None else self.connect_peers()

    @property
    def collective(self) -> Collective:
        """
        The group of all workers. Available only if the strategy's `roles` include a collective
        group.
        """
        assert self._collective is not None, "roles() has no collective group"
        return self._collective

    @property
    def shards(self) -> Shards:
        """The server group. Available only if the strategy's `roles` include servers."""
        assert self._shards is not None, "roles() has no servers"
        return self._shards

    def local_optimizer(self) -> LocalOptimizer:
        """Build the optimizer, schedule and clipping for this worker's parameters."""
        if self.optimizers:
            return TaskUpdate(self.flat, self.job, self.total_steps, self.optimizers)
        return LocalOptimizer(self.flat, self.job, self.total_steps)


class WorkerStrategy(ABC, Generic[OptionsT]):
    """
    The worker's half of a strategy.

    The worker loop calls `setup` once, and then for every step `exchange` and `update`. When it
    calls `exchange` the local gradient is complete: the gradient of this rank's losses, summed and
    divided by the global batch.

    After a failure the remaining workers keep this object and call `setup` again with new ports.
    Replacement workers create a new object (docs/architecture.md).

    Args:
        strategy: the driver's half, with the options.
    """

    cuts_model: ClassVar[bool] = False
    """
    Whether a rank holds only a part of the model. If so, the class overrides `cut_model` and
    `compute`.
    """

    replayed: Share | None = None
    """
    This rank's share of the step before the one that `setup` returned. The rank had not completed
    that step when the previous attempt ended, and completed it in `setup`. None: no such step.
    """

    pending_share: tuple[int, Share] | None = None
    """
    The number of a step, and what this rank contributed to its exchange; None after the step is
    reported. If the attempt ends in between, other ranks or the servers may have completed the
    step.
    """

    @override
    def __init_subclass__(cls, **more: Any) -> None:
        """Reject methods that have been renamed."""
        super().__init_subclass__(**more)
        reject_renamed_methods(cls, {"can_thaw": "can_unfreeze"})

    def __init__(self, strategy: Strategy[OptionsT]) -> None:
        self.strategy, self.options = strategy, strategy.options

    def can_unfreeze(self) -> bool:
        """Return whether parameters that are frozen at the start may be trained later."""
        return False

    def build_model(self, task: Task) -> nn.Module:
        """Build the whole model. The global generators are already seeded."""
        return task.model()

    def cut_model(
        self, prepared: Prepared, rank: int, collective: Collective | None
    ) -> tuple[FlatModel, Holding]:
        """
        Return the parameters that this rank trains, and their position in the whole model.

        Called on all ranks in every attempt if `cuts_model` is set. Ranks may communicate to agree
        on the split.
        """
        raise NotImplementedError(f"{type(self).__name__} does not split the model")

    @abstractmethod
    def setup(self, context: Context) -> int:
        """
        Prepare this worker. The model is built and the ports are connected.

        Returns:
            Steps completed by `flat.params`, the same number on all ranks: 0 in a new run, the step
            of `context.saved` in a run that starts from a checkpoint.
        """

    def compute(self, prepared: Prepared, context: Context) -> Compute:
        """Return the object that computes this rank's gradients; called after `setup`."""
        return WholeModel(prepared, self.last_backward, context.rank, context.alive)

    def skips(self, step: int) -> bool:
        """Return whether this rank skips a step; called once before each step."""
        return False

    def last_backward(self) -> None:
        """
        Called when a step's last backward starts: the gradients that it produces are final.

        Not called on a rank that has no samples in this step.
        """

    @abstractmethod
    def exchange(self, step: int, local: StepControl) -> StepControl:
        """
        Combine the gradients in `flat.grads` with those of the other ranks.

        Args:
            step: the current step; if tasks are leased, the number of the task.
            local: this rank's control record.

        Returns:
            The sum of all ranks' control records, by which every rank makes the same decisions. A
            strategy that does not sum the records must return `StopOrder.NONE` in the record, or
            ranks would stop after different steps.
        """

    @abstractmethod
    def update(self, step: int, total: StepControl) -> None:
        """
        Update `flat.params` from version `step` to version `step + 1`.

        Args:
            step: the same as for `exchange`.
            total: the return value of `exchange`. If `total.skip` is set, parameters and optimizer
                must not change.
        """

    def checkpoint(self, version: int) -> CheckpointPart:
        """
        Return this rank's part of a checkpoint; called between two steps.

        Args:
            version: completed steps, the same number on every rank.
        """
        raise NotImplementedError(f"{type(self).__name__} has no checkpoints")

    def synchronize(self) -> None:
        """Make the parameters of all ranks equal; called before an evaluation and at the end."""

    def average(self) -> Tensor:
        """
        Return the averaged weights that the job's `ema` configures, shape [n]; called between two
        steps.

        Every rank calls this; if tasks are leased, only the rank that evaluates. Called only if the
        driver's half sets `averages`.
        """
        raise NotImplementedError(f"{type(self).__name__} keeps no average of the weights")

    def figures(self) -> dict[str, float]:
        """Return this rank's metrics of the completed step by name."""
        return {}

    def trained(self, flat: FlatModel) -> dict[str, Tensor]:
        """
        Return this rank's part of the trained model by name; the ports are still connected.

        Averaged weights are added with `with_average`.

        A strategy whose ranks communicate here, or in the last update, must end with a barrier: a
        rank that exits may free memory that others have not read yet.
        """
        return flat.state_dict()


def worker_class(strategy: Strategy[Any]) -> type[WorkerStrategy[Any]]:
    """
    Return the class of a strategy's worker half.

    Raises:
        SpecError: The strategy does not name one.
    """
    named = getattr(strategy, "worker", None)
    if isinstance(named, str):
        module, _, name = named.partition(":")
        named = getattr(import_module(module), name, None)
    if isinstance(named, type) and issubclass(named, WorkerStrategy):
        return named
    text = f"{type(strategy).__name__} does not name a WorkerStrategy: {MIGRATION_HINT}"
    raise SpecError(Problem(("strategy",), text))


def make_worker_strategy(job: Job) -> WorkerStrategy[Any]:
    """
    Build the worker's half of the job's strategy.

    Raises:
        SpecError: see `make_strategy`, `worker_class`.
    """
    strategy = make_strategy(job)
    return worker_class(strategy)(strategy)
