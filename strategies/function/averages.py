"""Models whose gradients are averaged in backward: by the group of `ring`, or by servers."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer
from typing_extensions import override

from distplat.platform.errors import Problem, SpecError
from distplat.strategies.function.gradient_average import (
    BucketAverage,
    Exchange,
    GradientAverage,
    Surroundings,
)
from distplat.strategies.function.server_sum import ServerAverage, ServerSum
from distplat.strategies.ports import LoopShards
from distplat.strategies.ring import RingOptions


class Averages(Exchange):
    """Ranks average gradients in backward; each makes the same update."""

    def __init__(self) -> None:
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
    def check(self, optimizer: Optimizer) -> None:
        several = any(one.around.group.world > 1 for one in self._averages)
        if isinstance(optimizer, torch.optim.SparseAdam) and several:
            text = (
                "SparseAdam takes sparse gradients, and those of several workers are averaged dense"
            )
            hint = "use Adam or Adagrad; of large tables, a Task with distplat.nn.ShardedEmbedding"
            raise SpecError(Problem(("task",), text, hint))

    @override
    def before_step(self, optimizer: Optimizer) -> None:
        idle = [one for one in self._averages if not one.averaged]
        moved = _moved(optimizer) if idle else set()
        for one in idle:
            if any(id(p) in moved for p in one.flat.parameters):
                one.before_step()
        broken = [one for one in self._averages if one.broken is not None]
        if not broken or float(getattr(optimizer, "found_inf", 0.0)):
            return  # a GradScaler has a fused optimizer leave the step out itself
        moved = _moved(optimizer)
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


def _moved(optimizer: Optimizer) -> set[int]:
    return {id(p) for group in optimizer.param_groups for p in group["params"]}


class GroupAverages(Averages):
    """
    Gradients are averaged by the group, see `BucketAverage`.

    Args:
        around: the run.
        options: of `ring`.
    """

    def __init__(self, around: Surroundings, options: RingOptions) -> None:
        super().__init__()
        self._around, self._options = around, options

    @override
    def add(self, model: nn.Module, *, alone: bool) -> None:
        number = len(self._averages)
        overlap = alone and not number
        made = BucketAverage(model, self._around, self._options, overlap=overlap, number=number)
        self._averages.append(made)


class ServerAverages(Averages):
    """
    Gradients are averaged by servers, see `server_sum.py`.

    Args:
        around: the run.
        shards: the way to the servers.
    """

    def __init__(self, around: Surroundings, shards: LoopShards) -> None:
        super().__init__()
        self._servers = ServerSum(around, shards)

    @override
    def add(self, model: nn.Module, *, alone: bool) -> None:
        self._averages.append(ServerAverage(model, self._servers, len(self._averages)))

    @override
    def leave(self) -> None:
        self._servers.leave()
