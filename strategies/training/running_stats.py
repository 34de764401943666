"""Buffers of a model: running statistics are averaged, and a step that is repeated starts clean."""

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from distplat.strategies.base import Collective, ReduceOp


class Buffers:
    """
    A model's buffers as they were before the step in flight: a forward writes into them.

    Args:
        model: on its device.
    """

    def __init__(self, model: nn.Module) -> None:
        self._buffers = list(model.buffers())
        self._kept = [buffer.clone() for buffer in self._buffers]
        self._before = [buffer.clone() for buffer in self._buffers]

    def keep(self) -> None:
        """Remember all buffers as those of the present version."""
        self._kept, self._before = self._before, self._kept
        for kept, buffer in zip(self._kept, self._buffers, strict=True):
            kept.copy_(buffer)

    def restore(self) -> None:
        """Put back what was kept last."""
        for kept, buffer in zip(self._kept, self._buffers, strict=True):
            buffer.copy_(kept)

    def step_back(self) -> None:
        """Put back what was kept before that."""
        self._kept, self._before = self._before, self._kept
        self.restore()


class RunningStatistics(Buffers):
    """
    Keeps the running statistics of normalisation layers equal: their mean, in every step.

    So an evaluation and the saved model see all samples, and no rank holds anything that dies with
    it. Other buffers are left alone: most are constants, which a mean would round.

    Args:
        model: on its device.
        group: all ranks.
    """

    def __init__(self, model: nn.Module, group: Collective) -> None:
        super().__init__(model)
        self._group = group
        self._by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for layer in model.modules():
            if isinstance(layer, _NormBase):
                for buffer in (layer.running_mean, layer.running_var):
                    if buffer is not None:
                        self._by_dtype.setdefault(buffer.dtype, []).append(buffer)

    def average(self) -> None:
        """
        Replace running means and variances by their means over the ranks.

        Raises:
            CollectiveError: a rank is missing.
        """
        if self._group.world == 1:
            return
        for buffers in self._by_dtype.values():
            together = torch.cat([buffer.reshape(-1) for buffer in buffers])
            self._group.all_reduce(together, ReduceOp.AVG)
            sizes = [buffer.numel() for buffer in buffers]
            for buffer, mean in zip(buffers, torch.split(together, sizes), strict=True):
                buffer.copy_(mean.view(buffer.shape))
