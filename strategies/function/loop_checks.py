"""
What a train function could get wrong without a word, found: ranks that do not train one model, or
do not have one data set; that an order, or a schedule of learning rates, is not what it seems.

    optimizer.step()    of a parameter that prepare() never saw? Its gradients are this rank's own
    now and then        the same parameters on all ranks? Only backward() averages

And reports that lack what the job goes by: `checkpoint.keep_best`, `early_stop`.
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
from distplat.strategies.function.sharded_loader import LoaderUse, NumberedLoader, ShardedLoader
from distplat.strategies.torch_compat import not_compiled

logger = logging.getLogger(__name__)

_APART = 1e-3
"""Relative difference of two ranks' parameters after a long run, or of coarse types."""
_ROUNDINGS = 64
"""
Roundings by which two ranks may differ in the first steps. All have the same gradients, but
processors of two kinds may round updates differently. Ranks that train their own differ by much of
an update, which of a small learning rate is below a thousandth of a parameter.
"""
_SHOWN = 3


class OptimizerWatch:
    """
    Looks at each optimizer that steps in this thread.

    Args:
        trained: gives the parameters that ranks train together.
        alone: whether there is one rank, to whom all parameters belong.
        check: is asked about one that moves something of them, before its first step.
        before_step: is told of each step.
    """

    def __init__(
        self,
        trained: Callable[[], Iterable[Tensor]],
        check: Callable[[Optimizer], None],
        before_step: Callable[[Optimizer], None],
        *,
        alone: bool,
    ) -> None:
        self._trained, self._check, self._alone = trained, check, alone
        self._on_step = before_step
        self._thread = threading.get_ident()
        #: how many parameters it had when it was looked at
        self._seen: weakref.WeakKeyDictionary[Optimizer, int] = weakref.WeakKeyDictionary()
        self._hook = register_optimizer_step_pre_hook(self._before_step)

    def close(self) -> None:
        """Look no more."""
        self._hook.remove()

    @not_compiled
    def _before_step(self, optimizer: Optimizer, *_: Any) -> None:
        """
        Be called before each step, of any thread.

        Raises:
            SpecError: it would move parameters whose gradients are those of this rank alone.
        """
        if threading.get_ident() != self._thread:
            return
        self._on_step(optimizer)
        given = parameters_of(optimizer)
        if self._seen.get(optimizer) == len(given):
            return
        known = {id(one) for one in self._trained()}
        there = [one for one in given if one.requires_grad and one.numel()]
        strange = [one for one in there if id(one) not in known]
        if strange and not self._alone:
            raise not_prepared(optimizer, strange)
        if any(id(one) in known for one in given):
            self._check(optimizer)
        self._seen[optimizer] = len(given)


def parameters_of(optimizer: Optimizer) -> list[Tensor]:
    """Give the parameters of all of an optimizer's groups."""
    return [one for group in optimizer.param_groups for one in group["params"]]


def not_prepared(optimizer: Optimizer, strange: Sequence[Tensor]) -> SpecError:
    """Say that an optimizer has parameters that no rank shares with the others."""
    shapes = ", ".join(str([*one.shape]) for one in strange[:_SHOWN])
    shapes += ", ..." if len(strange) > _SHOWN else ""
    what = "a parameter" if len(strange) == 1 else f"{len(strange)} parameters"
    text = (
        f"{type(optimizer).__name__}.step() would move {what} of no model that prepare() got, of "
        f"shape {shapes}: each worker would train its own"
    )
    hint = (
        "call distplat.prepare(model, optimizer) before the first step; a parameter by itself "
        "belongs into a model, such as a ParameterList"
    )
    return SpecError(Problem(("task",), text, hint))


@torch.no_grad()
def check_alike(model: nn.Module, group: Collective, when: str, steps: int = 0) -> None:
    """
    See whether all ranks have the same trained parameters; every rank calls this.

    Args:
        model: whose gradients are averaged.
        group: all ranks.
        when: for the message.
        steps: that were made; 0: nobody has counted them.

    Raises:
        ValueError: they are apart; names the first parameter, and a rank.
    """
    if group.world == 1:
        return
    named = [(name, one) for name, one in model.named_parameters() if one.requires_grad]
    mine = [_figures(one) for _, one in named]
    device = named[0][1].device if named else torch.device("cpu")
    every = gather_values(mine, group, device)
    for position, (name, one) in enumerate(named):
        first, *others = (sums[position] for sums in every)
        allowed = _allowed(one.dtype, steps) * first[-1]
        for rank, its in enumerate(others, 1):
            if max(abs(a - b) for a, b in zip(first, its, strict=True)) > allowed:
                raise ValueError(
                    f"{when} {name!r} of rank {rank} is not that of rank 0: each trains its own. "
                    "Gradients are averaged in backward(); what torch.autograd.grad gives is this "
                    "rank's alone, and so is what a backward() in no_sync() leaves, what is "
                    "written into a parameter otherwise, a step() that not all ranks make, and one "
                    "that goes by a rank's own loss, as a line search does"
                )


def _figures(parameter: Tensor) -> tuple[float, float, float]:
    """Give the sum, one with signs that alternate, and the norm: an update changes one of them."""
    flat = parameter.detach().double().reshape(-1)
    whole, second = float(flat.sum()), float(flat[1::2].sum())
    return whole, whole - 2 * second, float(flat.norm())


def _allowed(dtype: torch.dtype, steps: int) -> float:
    """Give the relative difference that roundings may come to."""
    rounding = _ROUNDINGS * torch.finfo(dtype).eps * max(1.0, steps / 30)
    return min(_APART, rounding) if steps else _APART


class EpochWatch:
    """
    Looks at what counts epochs and steps, and says what trains otherwise than it seems to.

    Args:
        world: ranks.
    """

    def __init__(self, world: int) -> None:
        self._world, self._warned = world, False
        self._samplers: deque[DistributedSampler[Any]] = deque(maxlen=2)
        self._loaders: list[_Lengths] = []
        self._schedulers: list[LRScheduler] = []

    def loader(self, prepared: ShardedLoader, given: DataLoader[Any]) -> None:
        """Be told of a loader that was prepared, and of what."""
        if isinstance(prepared, NumberedLoader) and prepared.sampler.shuffle:
            self._sampler(prepared.sampler)
        with suppress(TypeError, ValueError, NotImplementedError):  # it has no length
            lengths = prepared.batches_of_pass(), len(given)
            self._loaders.append(_Lengths(*lengths, prepared.use))

    def _sampler(self, sampler: DistributedSampler[Any]) -> None:
        """Look at the order of a loader; the third one in a row of the same data shows."""
        before = [one for one in self._samplers if one.dataset is sampler.dataset]
        alike = [one for one in before if one.epoch == 0 == sampler.epoch]
        if len(alike) == self._samplers.maxlen and not self._warned:
            self._warned = True
            logger.warning(
                "prepare() got a third loader of the same data: each begins with the order of "
                "epoch 0. Prepare it once, before the epochs, or call its set_epoch(epoch)"
            )
        self._samplers.append(sampler)

    def scheduler(self, scheduler: LRScheduler) -> None:
        """Be told of a scheduler that was prepared."""
        if not any(one.use.asked for one in self._loaders):  # else it is made by what is right
            self._schedulers.append(scheduler)

    def over(self) -> None:
        """Be told that the function has returned."""
        for one in self._schedulers:
            steps: Any = getattr(one, "total_steps", None) or getattr(one, "T_max", None)
            made = getattr(one, "last_epoch", 0)  # a ChainedScheduler counts nothing
            if steps and 0 < made < steps and self._are_of_all_ranks(steps, made):
                logger.warning(
                    "%s was made for %d steps, and made %d: with len(loader), make it of the "
                    "loader that prepare() gives, which has the batches of one of %d workers",
                    type(one).__name__,
                    steps,
                    made,
                    self._world,
                )

    def _are_of_all_ranks(self, steps: int, made: int) -> bool:
        """
        Whether so many steps are those of the batches of all ranks, of the passes that were made.

        Any other number is the loop's own: that of a run which has ended earlier, for example, or
        of a schedule by epochs.
        """
        if made <= max((one.use.passes for one in self._loaders), default=0):
            return False
        return any(
            _are_of_all_ranks(some, steps, made)
            for some in (*([one] for one in self._loaders), self._loaders)
        )


class _Lengths(NamedTuple):
    """Batches of a pass over a loader."""

    own: int
    """Of this rank."""
    whole: int
    """Of the loader that `prepare` got."""
    use: LoaderUse


def _are_of_all_ranks(loaders: Sequence[_Lengths], steps: int, made: int) -> bool:
    """See `EpochWatch._are_of_all_ranks`; these were gone through side by side, or in turn."""
    passes = sum(one.use.passes for one in loaders)
    own = sum(one.use.passes * one.own for one in loaders)
    whole = sum(one.use.passes * one.whole for one in loaders)
    batches = max(1, round(own / made))  # of a step: it may accumulate gradients
    return own < whole and abs(steps * batches - whole) <= passes * (batches - 1) + batches


class ReportWatch:
    """
    Looks at one rank's reports.

    Args:
        job: the run.
    """

    def __init__(self, job: Job) -> None:
        self._best, self._stop = job.checkpoint.keep_best, job.early_stop
        self._names: dict[str, None] = {}  #: of all figures so far

    def reported(self, figures: Mapping[str, float], *, kept: bool) -> None:
        """
        Look at a report.

        Args:
            figures: by name.
            kept: whether it has a checkpoint.

        Raises:
            SpecError: nobody could say how good that is.
        """
        self._names.update(dict.fromkeys(figures))
        if kept and self._best is not None and self._best.metric not in figures:
            name = self._best.metric
            text = f"report() has a checkpoint, and no {name!r} to say how good it is"
            where = ("checkpoint", "keep_best", "metric")
            raise SpecError(Problem(where, text, hint(name, figures)))

    def over(self) -> None:
        """
        Be told that the function has returned.

        Raises:
            SpecError: it reported, and never what `early_stop` goes by.
        """
        if self._stop is not None and self._names and self._stop.metric not in self._names:
            text = f"no report() had a {self._stop.metric!r}"
            name = hint(self._stop.metric, self._names)
            raise SpecError(Problem(("early_stop", "metric"), text, name))
