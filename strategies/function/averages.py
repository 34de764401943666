"""Models whose gradients are averaged in backward: by the group of `ring`, or by servers."""

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
    Ranks average gradients in backward; each makes the same update.

    Args:
        average_of: makes what averages a model's gradients; is given the model, its number,
            whether no other one comes with it, and the modules whose buffers are each rank's own.
        on_leave: called when this rank's function has returned.
    """

    def __init__(
        self,
        average_of: Callable[[nn.Module, int, bool, Set[nn.Module]], GradientAverage],
        on_leave: Callable[[], None] = lambda: None,
    ) -> None:
        self._average_of, self._on_leave = average_of, on_leave
        self._averages: list[GradientAverage] = []

    @property
    @override
    def models(self) -> list[nn.Module]:
        return [one.model for one in self._averages]

    @property
    @override
    def parameters(self) -> Iterator[Tensor]:
        return (one for average in self._averages for one in average.flat.parameters)

    @override
    def add(self, model: nn.Module, *, alone: bool, own_buffers: Set[nn.Module]) -> None:
        grads = [(one, one.grad) for one in model.parameters()]  # the loop's, as ever
        average = self._average_of(model, len(self._averages), alone, own_buffers)
        self._averages.append(average)
        for one, grad in grads:
            one.grad = grad

    @override
    def leave(self) -> None:
        self._on_leave()

    @override
    def check(self, optimizer: Optimizer) -> None:
        several = any(one.context.group.world > 1 for one in self._averages)
        if isinstance(optimizer, torch.optim.SparseAdam) and several:
            text = (
                "SparseAdam takes sparse gradients, and those of several workers are averaged dense"
            )
            hint = "use Adam or Adagrad; of large tables, a Task with distplat.nn.ShardedEmbedding"
            raise SpecError(Problem(("task",), text, hint))

    @override
    def before_step(self, optimizer: Optimizer) -> None:
        idle = [one for one in self._averages if not one.averaged]
        moved = {*map(id, parameters_of(optimizer))} if idle else set()
        for one in idle:
            if any(id(p) in moved for p in one.flat.parameters):
                one.before_step()
        broken = [one for one in self._averages if one.broken is not None]
        if not broken or float(getattr(optimizer, "found_inf", 0.0)):
            return  # a GradScaler has a fused optimizer leave the step out itself
        moved = {*map(id, parameters_of(optimizer))}
        for one in broken:
            if one.broken is not None and any(id(p) in moved for p in one.flat.parameters):
                raise one.broken

    @override
    def enable(self, on: bool, model: nn.Module | None = None) -> None:
        for one in self._averages:
            if model is None or one.model is model:
                one.enabled = on

    @override
    def settle(self) -> None:
        for one in self._averages:
            one.check_alike("at the end")
            one.check_finite()

    @override
    def close(self) -> None:
        for one in self._averages:
            one.close()
