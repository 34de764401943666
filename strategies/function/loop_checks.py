"""
Detect silent mistakes of a train function.

    optimizer.step()    on a parameter that prepare() did not get: its gradients are not averaged
    now and then        different parameters on the ranks: only backward() averages gradients
    loaders             the same order in every epoch
    schedulers          built with the number of batches of all ranks instead of one
    report()            without the metric of `checkpoint.keep_best` or `early_stop`
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook
from torch.utils.data import DataLoader, DistributedSampler

from distplat.platform.errors import Problem, SpecError, hint
from distplat.platform.spec import Job
from distplat.strategies.collective import Collective, gather_values
from distplat.strategies.function.sharded_loader import LoaderUse, MapStyleLoader, ShardedLoader
from distplat.strategies.torch_compat import not_compiled

logger = logging.getLogger(__name__)

_MAX_RELATIVE_DIFFERENCE = 1e-3
"""
Maximum relative difference of two ranks' parameters, after a long run or with a low-precision
dtype.
"""
_MAX_ROUNDINGS = 64
"""
Maximum difference of two ranks in the first steps, as a multiple of the dtype's epsilon.

All ranks have the same gradients, but different processors may round updates differently. If ranks
train different models, their parameters differ by a large part of an update, which with a small
learning rate is less than a thousandth of a parameter.
"""
_MAX_SHOWN = 3


class OptimizerWatch:
    """
    Checks each optimizer that steps in this thread.

    Args:
        trained: returns the parameters that ranks train together.
        check: called before the first step of an optimizer of such parameters.
        before_step: called before each step.
        is_single_rank: whether there is only one rank, which may train any parameter.
    """

    def __init__(
        self,
        trained: Callable[[], Iterable[Tensor]],
        check: Callable[[Optimizer], None],
        before_step: Callable[[Optimizer], None],
        *,
        is_single_rank: bool,
    ) -> None:
        self._trained, self._check, self._is_single_rank = trained, check, is_single_rank
        self._on_step = before_step
        self._thread = threading.get_ident()
        #: number of parameters of each checked optimizer, at the time of the check
        self._checked: weakref.WeakKeyDictionary[Optimizer, int] = weakref.WeakKeyDictionary()
        self._hook = register_optimizer_step_pre_hook(self._before_step)

    def close(self) -> None:
        """Stop checking."""
        self._hook.remove()

    @not_compiled
    def _before_step(self, optimizer: Optimizer, *_: Any) -> None:
        """
        Called before each step in any thread.

        Raises:
            SpecError: The optimizer has parameters whose gradients are not averaged.
        """
        if threading.get_ident() != self._thread:
            return
        self._on_step(optimizer)
        parameters = parameters_of(optimizer)
        if self._checked.get(optimizer) == len(parameters):
            return
        trained = {id(p) for p in self._trained()}
        active = [p for p in parameters if p.requires_grad and p.numel()]
        unprepared = [p for p in active if id(p) not in trained]
        if unprepared and not self._is_single_rank:
            raise unprepared_error(optimizer, unprepared)
        if any(id(p) in trained for p in parameters):
            self._check(optimizer)
        self._checked[optimizer] = len(parameters)


def parameters_of(optimizer: Optimizer) -> list[Tensor]:
    """Return the parameters of all param groups of an optimizer."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def unprepared_error(optimizer: Optimizer, parameters: Sequence[Tensor]) -> SpecError:
    """Return the error for an optimizer with parameters that no rank shares."""
    shapes = ", ".join(str([*p.shape]) for p in parameters[:_MAX_SHOWN])
    shapes += ", ..." if len(parameters) > _MAX_SHOWN else ""
    what = "a parameter" if len(parameters) == 1 else f"{len(parameters)} parameters"
    text = (
        f"{type(optimizer).__name__}.step() would update {what} of no model that prepare() got, of "
        f"shape {shapes}: each worker would train its own"
    )
    hint = (
        "call distplat.prepare(model, optimizer) before the first step; put a single parameter "
        "into a module, such as a ParameterList"
    )
    return SpecError(Problem(("task",), text, hint))


@torch.no_grad()
def check_same_parameters(model: nn.Module, group: Collective, when: str, steps: int = 0) -> None:
    """
    Check that all ranks have the same trained parameters; every rank calls this.

    Args:
        model: a model whose gradients are averaged.
        group: all ranks.
        when: the time of the check, for the message.
        steps: number of steps so far; 0: unknown.

    Raises:
        ValueError: The parameters differ; the message names the first parameter and a rank.
    """
    if group.world == 1:
        return
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    local = [_checksums(p) for _, p in named]
    device = named[0][1].device if named else torch.device("cpu")
    checksums = gather_values(local, group, device)
    for index, (name, parameter) in enumerate(named):
        first, *others = (sums[index] for sums in checksums)
        tolerance = _relative_tolerance(parameter.dtype, steps) * first[-1]
        for rank, other in enumerate(others, 1):
            if max(abs(a - b) for a, b in zip(first, other, strict=True)) > tolerance:
                raise ValueError(
                    f"{when} {name!r} of rank {rank} is not that of rank 0: each rank trains its "
                    "own model. Only backward() averages gradients. Not averaged are: results of "
                    "torch.autograd.grad, gradients of a backward() in no_sync(), direct writes "
                    "to a parameter, a step() that not all ranks call, and a step() that depends "
                    "on a rank's own loss, such as a line search"
                )


def _checksums(parameter: Tensor) -> tuple[float, float, float]:
    """Return the sum, a sum with alternating signs, and the norm: updates change one."""
    flat = parameter.detach().double().reshape(-1)
    total, odd = float(flat.sum()), float(flat[1::2].sum())
    return total, total - 2 * odd, float(flat.norm())


def _relative_tolerance(dtype: torch.dtype, steps: int) -> float:
    """Return the maximum relative difference that rounding may cause."""
    rounding = _MAX_ROUNDINGS * torch.finfo(dtype).eps * max(1.0, steps / 30)
    return min(_MAX_RELATIVE_DIFFERENCE, rounding) if steps else _MAX_RELATIVE_DIFFERENCE


class EpochWatch:
    """
    Checks epochs of loaders and lengths of schedulers, and warns of likely mistakes.

    Args:
        world: number of ranks.
    """

    def __init__(self, world: int) -> None:
        self._world, self._warned = world, False
        self._samplers: deque[DistributedSampler[Any]] = deque(maxlen=2)
        self._loaders: list[_Lengths] = []
        self._schedulers: list[LRScheduler] = []

    def add_loader(self, prepared: ShardedLoader, original: DataLoader[Any]) -> None:
        """Register a prepared loader and the user's loader."""
        if isinstance(prepared, MapStyleLoader) and prepared.sampler.shuffle:
            self._check_sampler(prepared.sampler)
        with suppress(TypeError, ValueError, NotImplementedError):  # a loader without a length
            lengths = prepared.batches_of_pass(), len(original)
            self._loaders.append(_Lengths(*lengths, prepared.use))

    def _check_sampler(self, sampler: DistributedSampler[Any]) -> None:
        """Warn if this is the third loader in a row of the same data, all of them at epoch 0."""
        same_data = [s for s in self._samplers if s.dataset is sampler.dataset]
        same_order = [s for s in same_data if s.epoch == 0 == sampler.epoch]
        if len(same_order) == self._samplers.maxlen and not self._warned:
            self._warned = True
            logger.warning(
                "prepare() got a third loader of the same data: each starts with the order of "
                "epoch 0. Prepare it once, before the epochs, or call its set_epoch(epoch)"
            )
        self._samplers.append(sampler)

    def add_scheduler(self, scheduler: LRScheduler) -> None:
        """Register a prepared scheduler."""
        if not any(lengths.use.called_len for lengths in self._loaders):  # else the length is right
            self._schedulers.append(scheduler)

    def on_return(self) -> None:
        """Check the schedulers after the function has returned."""
        for scheduler in self._schedulers:
            steps: Any = getattr(scheduler, "total_steps", None)
            steps = steps or getattr(scheduler, "T_max", None)
            done = getattr(scheduler, "last_epoch", 0)  # a ChainedScheduler has no counter
            if steps and 0 < done < steps and self._counts_all_ranks(steps, done):
                logger.warning(
                    "%s was built for %d steps, and took %d: compute the number of steps from the "
                    "loader that prepare() returns, whose len() is that of one of %d workers",
                    type(scheduler).__name__,
                    steps,
                    done,
                    self._world,
                )

    def _counts_all_ranks(self, steps: int, done: int) -> bool:
        """
        Return whether `steps` is the number of batches of all ranks in the completed passes.

        Any other number is intended, for example in a run that has ended early, or with a schedule
        by epochs.
        """
        if done <= max((lengths.use.passes for lengths in self._loaders), default=0):
            return False
        return any(
            _counts_all_ranks(loaders, steps, done)
            for loaders in (*([lengths] for lengths in self._loaders), self._loaders)
        )


class _Lengths(NamedTuple):
    """Numbers of batches in a pass over a loader."""

    own: int
    """Batches of this rank."""
    total: int
    """Batches of the loader that `prepare` got."""
    use: LoaderUse


def _counts_all_ranks(loaders: Sequence[_Lengths], steps: int, done: int) -> bool:
    """
    See `EpochWatch._counts_all_ranks`; the loaders were iterated side by side, or one after the
    other.
    """
    passes = sum(lengths.use.passes for lengths in loaders)
    own = sum(lengths.use.passes * lengths.own for lengths in loaders)
    total = sum(lengths.use.passes * lengths.total for lengths in loaders)
    per_step = max(1, round(own / done))  # batches per step, with gradient accumulation
    return own < total and abs(steps * per_step - total) <= passes * (per_step - 1) + per_step


class ReportWatch:
    """Checks one rank's reports."""

    def __init__(self, job: Job) -> None:
        self._best, self._stop = job.checkpoint.keep_best, job.early_stop
        self._names: dict[str, None] = {}  #: names of all metrics reported so far

    def on_report(self, figures: Mapping[str, float], *, has_checkpoint: bool) -> None:
        """
        Check a report.

        Args:
            figures: metrics by name.
            has_checkpoint: whether the report has a checkpoint.

        Raises:
            SpecError: The checkpoint has no metric for `checkpoint.keep_best`.
        """
        self._names.update(dict.fromkeys(figures))
        if has_checkpoint and self._best is not None and self._best.metric not in figures:
            name = self._best.metric
            text = f"report() has a checkpoint, but no {name!r} to compare checkpoints by"
            where = ("checkpoint", "keep_best", "metric")
            raise SpecError(Problem(where, text, hint(name, figures)))

    def on_return(self) -> None:
        """
        Check the reports after the function has returned.

        Raises:
            SpecError: No report had the metric of `early_stop`.
        """
        if self._stop is not None and self._names and self._stop.metric not in self._names:
            text = f"no report() had a {self._stop.metric!r}"
            name = hint(self._stop.metric, self._names)
            raise SpecError(Problem(("early_stop", "metric"), text, name))
