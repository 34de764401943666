"""Models whose gradients are averaged in backward, by the `ring` group or by servers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Set

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer
from typing_extensions import override

from distplat.platform.errors import Problem, SpecError
from distplat.strategies.function.gradient_average import Exchange, GradientAverage
from distplat.strategies.function.loop_checks import parameters_of


class Averages(Exchange):
    """
    Ranks average gradients in backward, and each rank runs the same update.

    Args:
        build_average: creates a model's `GradientAverage`. Its arguments are the model, the
            model's number, whether it is prepared without other models, and the modules whose
            buffers stay local to each rank.
        on_leave: called when this rank's function has returned.
    """

    def __init__(
        self,
        build_average: Callable[[nn.Module, int, bool, Set[nn.Module]], GradientAverage],
        on_leave: Callable[[], None] = lambda: None,
    ) -> None:
        self._build_average, self._on_leave = build_average, on_leave
        self._averages: list[GradientAverage] = []

    @property
    @override
    def models(self) -> list[nn.Module]:
        return [average.model for average in self._averages]

    @property
    @override
    def parameters(self) -> Iterator[Tensor]:
        return (p for average in self._averages for p in average.flat.parameters)

    @override
    def add_model(
        self, model: nn.Module, *, is_only_model: bool, local_buffers: Set[nn.Module]
    ) -> None:
        grads = [(p, p.grad) for p in model.parameters()]  # existing gradients are kept
        average = self._build_average(model, len(self._averages), is_only_model, local_buffers)
        self._averages.append(average)
        for p, grad in grads:
            p.grad = grad

    @override
    def leave(self) -> None:
        self._on_leave()

    @override
    def check_optimizer(self, optimizer: Optimizer) -> None:
        distributed = any(average.context.group.world > 1 for average in self._averages)
        if isinstance(optimizer, torch.optim.SparseAdam) and distributed:
            text = "SparseAdam needs sparse gradients, but several workers average dense gradients"
            hint = "use Adam or Adagrad; of large tables, a Task with distplat.nn.ShardedEmbedding"
            raise SpecError(Problem(("task",), text, hint))

    @override
    def before_step(self, optimizer: Optimizer) -> None:
        never_averaged = [average for average in self._averages if not average.averaged]
        updated = {*map(id, parameters_of(optimizer))} if never_averaged else set()
        for average in never_averaged:
            if any(id(p) in updated for p in average.flat.parameters):
                average.before_step()
        broken = [average for average in self._averages if average.non_finite is not None]
        if not broken or float(getattr(optimizer, "found_inf", 0.0)):
            return  # with `found_inf` of a GradScaler, a fused optimizer skips the step itself
        updated = {*map(id, parameters_of(optimizer))}
        for average in broken:
            if average.non_finite is not None and any(
                id(p) in updated for p in average.flat.parameters
            ):
                raise average.non_finite

    @override
    def enable(self, on: bool, model: nn.Module | None = None) -> None:
        for average in self._averages:
            if model is None or average.model is model:
                average.enabled = on

    @override
    def finalize(self) -> None:
        for average in self._averages:
            average.check_same_parameters("at the end")
            average.check_finite()

    @override
    def close(self) -> None:
        for average in self._averages:
            average.close()
