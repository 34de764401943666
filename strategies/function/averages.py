"""Models whose gradients are averaged in backward: by the group of `ring`, or by servers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer
from typing_extensions import override

from distplat.platform.errors import Problem, SpecError
from distplat.strategies.function.gradient_average import (
    BucketAverage,
    Exchange,
    GradientAverage,
    SessionContext,
)
from distplat.strategies.function.loop_checks import parameters_of
from distplat.strategies.function.server_sum import ServerAverage, ServerSum
from distplat.strategies.ports import LoopShards
from distplat.strategies.ring import RingOptions


class Averages(Exchange):
    """
    Ranks average gradients in backward; each makes the same update.

    Args:
        made: makes what averages a model's; is given the model, its number, and whether no other
            one comes with it.
        left: is told that this rank's function has returned.
    """

    def __init__(
        self,
        made: Callable[[nn.Module, int, bool], GradientAverage],
        left: Callable[[], None] = lambda: None,
    ) -> None:
        self._made, self._left = made, left
        self._averages: list[GradientAverage] = []

    @classmethod
    def of_group(cls, context: SessionContext, options: RingOptions) -> Averages:
        """Give averages by the group, see `BucketAverage`."""
        return cls(partial(BucketAverage, context=context, options=options))

    @classmethod
    def of_servers(cls, context: SessionContext, shards: LoopShards) -> Averages:
        """Give averages by servers, see `server_sum.py`."""
        servers = ServerSum(context, shards)
        return cls(lambda model, number, _: ServerAverage(model, servers, number), servers.leave)

    @property
    @override
    def models(self) -> list[nn.Module]:
        return [one.model for one in self._averages]

    @property
    @override
    def parameters(self) -> Iterator[Tensor]:
        return (one for average in self._averages for one in average.flat.parameters)

    @override
    def add(self, model: nn.Module, *, alone: bool) -> None:
        grads = [(one, one.grad) for one in model.parameters()]  # the loop's, as ever
        self._averages.append(self._made(model, len(self._averages), alone))
        for one, grad in grads:
            one.grad = grad

    @override
    def leave(self) -> None:
        self._left()

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
