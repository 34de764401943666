"""
`nn.SyncBatchNorm` over all ranks, forward and backward, through the port `Collective`.

    forward    every rank: count, mean, sum of squared differences ── all_gather ──▶ global values
    backward   every rank: sum(dy), sum(dy * (x - mean))           ── all_reduce ──▶ global sums

torch's own layer requires torch.distributed, and is a plain batch norm without it. Here the layers'
`forward` is replaced; class, names and values stay.

A rank with fewer micro-batches than others joins the operations of the missing micro-batches with a
count of zero. Ranks that have such a micro-batch announce each of its operations, and the end of
the step.

    rank 0  (2 micro-batches)   op   op  | announces op, op   | announces the end
    rank 1  (1 micro-batch)     op   op  | joins              | until then
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from typing_extensions import override

from distplat.platform.errors import Problem, SpecError
from distplat.strategies.collective import Collective, gather_numbers, gather_tensors
from distplat.strategies.torch_compat import check_input

_NOTHING, _FORWARD, _BACKWARD, _END = range(4)


def sync_layers(model: nn.Module) -> list[nn.SyncBatchNorm]:
    """Return the model's `nn.SyncBatchNorm` layers."""
    return [layer for layer in model.modules() if isinstance(layer, nn.SyncBatchNorm)]


def refuse_sync_batch_norm(model: nn.Module, why: str, hint: str) -> None:
    """
    Refuse a model that has `nn.SyncBatchNorm`.

    Raises:
        SpecError: the model has such a layer; names it.
    """
    for name, layer in model.named_modules():
        if isinstance(layer, nn.SyncBatchNorm):
            text = f"the model's {name or 'only layer'!r} is nn.SyncBatchNorm, {why}"
            raise SpecError(Problem(("strategy",), text, hint))


class SyncNorms:
    """
    The `nn.SyncBatchNorm` layers of one rank's model, in one attempt.

    Args:
        model: its layers have their `forward` replaced until `close`.
        group: all ranks; must not be used for other operations.
        micro_batches: returns the number of micro-batches of a step, by rank.
    """

    def __init__(
        self, model: nn.Module, group: Collective, micro_batches: Callable[[int], Sequence[int]]
    ) -> None:
        self._group, self._micro_batches = group, micro_batches
        self._layers = sync_layers(model)
        self._device = next(model.parameters()).device
        self._step = 0  #: current step
        self._forwards = 0  #: forwards of the whole model in the current step
        self._hook = model.register_forward_pre_hook(self._on_forward)
        for layer in self._layers:
            layer.forward = partial(self._forward, layer)  # type: ignore[method-assign]

    @classmethod
    def of(
        cls,
        model: nn.Module,
        group: Collective | None,
        micro_batches: Callable[[int], Sequence[int]],
        name: str = "sync-batch-norm",
    ) -> SyncNorms | None:
        """Replace the forwards of a model's layers; None: no such layers, or a single rank."""
        if group is None or group.world == 1 or not sync_layers(model):
            return None
        own_group = group.subgroup(name, range(group.world))
        return cls(model, own_group, micro_batches)

    def __deepcopy__(self, memo: dict[int, Any]) -> SyncNorms:
        """Return itself: a copy of the model, such as an average, also synchronizes all ranks."""
        return self

    def has(self, layer: nn.SyncBatchNorm) -> bool:
        """Return whether a layer is one of these layers, or a copy."""
        forward = vars(layer).get("forward")
        return isinstance(forward, partial) and forward.func == self._forward

    def close(self) -> None:
        """Restore the layers' own `forward`."""
        self._hook.remove()
        for layer in self._layers:
            layer.__dict__.pop("forward", None)

    @property
    def ranks_wait(self) -> bool:
        """Whether ranks with fewer micro-batches in this step wait in `finish` for the others."""
        counts = self._micro_batches(self._step)
        return min(counts) < max(counts)

    def begin(self, step: int) -> None:
        """Start a step, before its forwards."""
        self._step, self._forwards = step, 0

    def finish(self, step: int) -> None:
        """
        Join the operations of ranks with more micro-batches, until all ranks have finished.

        Raises:
            CollectiveError: a rank is missing.
        """
        counts = self._micro_batches(step)
        if counts[self._group.rank] < max(counts):
            while (announced := self._announcements(_NOTHING, 0)[0])[0] != _END:
                operation, width = announced
                if operation == _FORWARD:
                    gather_tensors(self._zeros(2 * width + 1), self._group)
                else:
                    self._group.all_reduce(self._zeros(2 * width))
        elif min(counts) < max(counts):
            self._announce(_END, 0)
        self.begin(step + 1)

    def statistics(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """
        Return mean, biased variance and count over all ranks, of shapes [C], [C] and [], float64.

        Args:
            x: this rank's part, shape [N, C, ...].
        """
        channels = x.shape[1]
        self._announce_if_needed(_FORWARD, channels)
        wide, over = x.detach().to(_accumulation_dtype(x)), _all_but_channels(x)
        count = x.numel() // max(1, channels)
        mean = wide.mean(over) if count else wide.new_zeros(channels)
        spread = (wide - _broadcast_channels(mean, x)).square().sum(over)
        local = torch.cat([mean.new_tensor([count]), mean, spread]).double()
        table = torch.stack(gather_tensors(local, self._group))
        counts, means, spreads = table[:, :1], table[:, 1 : channels + 1], table[:, channels + 1 :]
        total = counts.sum()
        global_mean = (counts * means).sum(0) / total
        between = (counts * (means - global_mean).square()).sum(0)
        return global_mean, (spreads.sum(0) + between) / total, total

    def sum_over_ranks(self, sums: Tensor) -> Tensor:
        """Return the sums of a backward over all ranks, shape [2C], float64."""
        self._announce_if_needed(_BACKWARD, sums.numel() // 2)
        sums = sums.to(torch.float64, copy=True)
        self._group.all_reduce(sums)
        return sums

    def _zeros(self, size: int) -> Tensor:
        return torch.zeros(size, dtype=torch.float64, device=self._device)

    def _announce_if_needed(self, operation: int, channels: int) -> None:
        """Announce an operation if a rank lacks the micro-batch."""
        if min(self._micro_batches(self._step)) < self._forwards:
            self._announce(operation, channels)

    def _announce(self, operation: int, channels: int) -> None:
        """Announce an operation; other announcing ranks must announce the same."""
        announced = self._announcements(operation, channels)
        if any(announcement != (operation, channels) for announcement in announced):
            raise RuntimeError(
                "ranks do not compute the same nn.SyncBatchNorm layers in the same order: "
                f"{announced}; which layers a forward uses must not depend on its samples"
            )

    def _announcements(self, operation: int, channels: int) -> list[tuple[int, int]]:
        rows = gather_numbers([operation, channels], self._group, self._device)
        return [(other, width) for other, width in rows if other != _NOTHING]

    def _on_forward(self, model: nn.Module, inputs: Any) -> None:
        if model.training:
            self._forwards += 1

    def _forward(self, layer: nn.SyncBatchNorm, x: Tensor) -> Tensor:
        """Replace the `forward` of a layer."""
        if not layer.training:
            return type(layer).forward(layer, x)
        check_input(layer, x)
        mean, variance, total = self.statistics(x)
        if total <= 1:
            raise ValueError(
                "nn.SyncBatchNorm needs more than 1 value per channel over all ranks when "
                f"training, got input of shape {[*x.shape]}"
            )
        _track(layer, mean, variance * (total / (total - 1)))
        apply: Any = _Normalize.apply
        normalized: Tensor = apply(
            x, layer.weight, layer.bias, mean, variance, total, layer.eps, self
        )
        return normalized


class _Normalize(torch.autograd.Function):
    """Normalizes with the statistics of all ranks."""

    @staticmethod
    @override
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        variance: Tensor,
        total: Tensor,
        eps: float,
        norms: SyncNorms,
    ) -> Tensor:
        """Return (x - mean) / sqrt(variance + eps) * weight + bias, in the dtype of x."""
        wide = _accumulation_dtype(x)
        mean, scale = mean.to(wide), torch.rsqrt(variance + eps).to(wide)
        ctx.save_for_backward(x, weight, mean, scale, total)
        ctx.norms, ctx.has_bias = norms, bias is not None
        gain = scale if weight is None else scale * weight.to(wide)
        result = (x.to(wide) - _broadcast_channels(mean, x)) * _broadcast_channels(gain, x)
        if bias is not None:
            result += _broadcast_channels(bias.to(wide), x)
        return result.to(x.dtype)

    @staticmethod
    @once_differentiable
    @override
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, weight and bias; of weight and bias, this rank's part."""
        x, weight, mean, scale, total = ctx.saved_tensors
        wide, over = _accumulation_dtype(x), _all_but_channels(x)
        dy, centred = dy.to(wide), x.to(wide) - _broadcast_channels(mean, x)
        own = torch.cat([dy.sum(over), (dy * centred).sum(over)])
        first, second = (ctx.norms.sum_over_ranks(own) / total).to(wide).chunk(2)
        gain = scale if weight is None else scale * weight.to(wide)
        dx = (
            dy
            - _broadcast_channels(first, x)
            - centred * _broadcast_channels(scale.square() * second, x)
        )
        dx = (dx * _broadcast_channels(gain, x)).to(x.dtype)
        plain, along = own.chunk(2)
        d_weight = None if weight is None else (along * scale).to(weight.dtype)
        d_bias = plain.to(x.dtype if weight is None else weight.dtype) if ctx.has_bias else None
        return dx, d_weight, d_bias, None, None, None, None, None


@torch.no_grad()
def _track(layer: nn.SyncBatchNorm, mean: Tensor, variance: Tensor) -> None:
    """Update running statistics as torch does."""
    if layer.num_batches_tracked is not None:
        layer.num_batches_tracked.add_(1)
    factor = layer.momentum
    if factor is None:
        counted = layer.num_batches_tracked
        factor = 1.0 / float(counted) if counted is not None else 0.0
    for running, now in ((layer.running_mean, mean), (layer.running_var, variance)):
        if running is not None:
            running.mul_(1 - factor).add_(now.to(running.dtype), alpha=factor)


def _accumulation_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of sums: float32 for 16-bit floats."""
    return torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype


def _all_but_channels(x: Tensor) -> list[int]:
    return [dim for dim in range(x.ndim) if dim != 1]


def _broadcast_channels(values: Tensor, x: Tensor) -> Tensor:
    """View values by channel so that they broadcast over x."""
    return values.view(1, -1, *[1] * (x.ndim - 2))
