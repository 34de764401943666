"""
`nn.SyncBatchNorm` over all ranks, forward and backward, through the port `Collective`.

    forward    every rank: count, mean, sum of squared differences ── all_gather ──▶ the whole's
    backward   every rank: sum(dy), sum(dy * (x - mean))           ── all_reduce ──▶ the whole's

torch's own layer wants torch.distributed, and is a plain batch norm without it. Here the layers of
the worker's model get another `forward`; class, names and values stay.

A rank that has fewer micro-batches than another takes part in the operations of those that it does
not have, with a count of zero. It learns which they are: where a micro-batch is not everybody's,
each operation begins with an announcement of it, and a step ends with the announcement of its end.

    rank 0  (2 micro-batches)   op   op  | announces op, op   | announces the end
    rank 1  (1 micro-batch)     op   op  | takes part         | until then
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from distplat.platform.errors import Problem, SpecError
from distplat.strategies.collective import Collective, gather_numbers, gather_tensors
from distplat.strategies.torch_compat import check_input

_NOTHING, _FORWARD, _BACKWARD, _END = range(4)


def sync_layers(model: nn.Module) -> list[nn.SyncBatchNorm]:
    """Give the model's layers that are to be computed over all ranks."""
    return [layer for layer in model.modules() if isinstance(layer, nn.SyncBatchNorm)]


def refuse_sync_batch_norm(model: nn.Module, why: str, hint: str) -> None:
    """
    Refuse a model that has `nn.SyncBatchNorm`.

    Raises:
        SpecError: it has; names the layer.
    """
    for name, layer in model.named_modules():
        if isinstance(layer, nn.SyncBatchNorm):
            text = f"the model's {name or 'only layer'!r} is nn.SyncBatchNorm, {why}"
            raise SpecError(Problem(("strategy",), text, hint))


class SyncNorms:
    """
    The `nn.SyncBatchNorm` layers of one rank's model, in one attempt.

    Args:
        model: its layers get another `forward` until `close`.
        group: all ranks; no other operation may go through it.
        micro_batches: by rank, how many micro-batches it has in a step.
    """

    def __init__(
        self, model: nn.Module, group: Collective, micro_batches: Callable[[int], Sequence[int]]
    ) -> None:
        self._group, self._micro_batches = group, micro_batches
        self._layers = sync_layers(model)
        self._device = next(model.parameters()).device
        self._step = 0  #: the one under way
        self._made = 0  #: forwards of the whole model in it
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
        """Take a model's layers over; None: it has none, or the rank is alone. See the class."""
        if group is None or group.world == 1 or not sync_layers(model):
            return None
        own = group.subgroup(name, range(group.world))
        return cls(model, own, micro_batches)

    def __deepcopy__(self, memo: dict[int, Any]) -> SyncNorms:
        """A copy of the model, such as an average of it, is computed over all ranks like it."""
        return self

    def has(self, layer: nn.SyncBatchNorm) -> bool:
        """Say whether it is one of its layers, or a copy of one."""
        forward = vars(layer).get("forward")
        return isinstance(forward, partial) and forward.func == self._forward

    def close(self) -> None:
        """Give the layers their own `forward` back."""
        self._hook.remove()
        for layer in self._layers:
            layer.__dict__.pop("forward", None)

    @property
    def ranks_wait(self) -> bool:
        """Whether ranks with fewer micro-batches in this step wait in `finish` for the others."""
        counts = self._micro_batches(self._step)
        return min(counts) < max(counts)

    def begin(self, step: int) -> None:
        """Called with the step whose forwards come next."""
        self._step, self._made = step, 0

    def finish(self, step: int) -> None:
        """
        Take part in what ranks with more micro-batches compute; return when all have made theirs.

        Raises:
            CollectiveError: a rank is missing.
        """
        counts = self._micro_batches(step)
        most = max(counts)
        if counts[self._group.rank] < most:
            while (other := self._announcements(_NOTHING, 0)[0])[0] != _END:
                kind, width = other
                if kind == _FORWARD:
                    gather_tensors(self._zeros(2 * width + 1), self._group)
                else:
                    self._group.all_reduce(self._zeros(2 * width))
        elif min(counts) < most:
            self._announce(_END, 0)
        self.begin(step + 1)

    def statistics(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """
        Give mean, biased variance and count over all ranks, of shapes [C], [C] and [], float64.

        Args:
            x: this rank's part, shape [N, C, ...].
        """
        channels = x.shape[1]
        self._announce_if_needed(_FORWARD, channels)
        wide, over = x.detach().to(_wide(x)), _all_but_channels(x)
        count = x.numel() // max(1, channels)
        mean = wide.mean(over) if count else wide.new_zeros(channels)
        spread = (wide - _along(mean, x)).square().sum(over)
        own = torch.cat([mean.new_tensor([count]), mean, spread]).double()
        table = torch.stack(gather_tensors(own, self._group))
        counts, means, spreads = table[:, :1], table[:, 1 : channels + 1], table[:, channels + 1 :]
        total = counts.sum()
        together = (counts * means).sum(0) / total
        moved = (counts * (means - together).square()).sum(0)
        return together, (spreads.sum(0) + moved) / total, total

    def sum_over_ranks(self, sums: Tensor) -> Tensor:
        """Give the sums of a backward over all ranks, shape [2C], float64."""
        self._announce_if_needed(_BACKWARD, sums.numel() // 2)
        sums = sums.to(torch.float64, copy=True)
        self._group.all_reduce(sums)
        return sums

    def _zeros(self, size: int) -> Tensor:
        return torch.zeros(size, dtype=torch.float64, device=self._device)

    def _announce_if_needed(self, kind: int, channels: int) -> None:
        """Tell what is computed, where a rank that does not know takes part in it."""
        if min(self._micro_batches(self._step)) < self._made:
            self._announce(kind, channels)

    def _announce(self, kind: int, channels: int) -> None:
        """Tell what comes next; the others that know must be there too."""
        announced = self._announcements(kind, channels)
        if any(one != (kind, channels) for one in announced):
            raise RuntimeError(
                "ranks do not compute the same nn.SyncBatchNorm layers in the same order: "
                f"{announced}; which layers a forward uses must not depend on its samples"
            )

    def _announcements(self, kind: int, channels: int) -> list[tuple[int, int]]:
        rows = gather_numbers([kind, channels], self._group, self._device)
        return [(kind, width) for kind, width in rows if kind != _NOTHING]

    def _on_forward(self, model: nn.Module, inputs: Any) -> None:
        if model.training:
            self._made += 1

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
    """Normalise with the statistics of all ranks."""

    @staticmethod
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
        """Give (x - mean) / sqrt(variance + eps) * weight + bias, in the dtype of x."""
        wide = _wide(x)
        mean, scale = mean.to(wide), torch.rsqrt(variance + eps).to(wide)
        ctx.save_for_backward(x, weight, mean, scale, total)
        ctx.norms, ctx.has_bias = norms, bias is not None
        gain = scale if weight is None else scale * weight.to(wide)
        result = (x.to(wide) - _along(mean, x)) * _along(gain, x)
        if bias is not None:
            result += _along(bias.to(wide), x)
        return result.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Give the gradients of x, weight and bias; those of the last two are this rank's part."""
        x, weight, mean, scale, total = ctx.saved_tensors
        wide, over = _wide(x), _all_but_channels(x)
        dy, centred = dy.to(wide), x.to(wide) - _along(mean, x)
        own = torch.cat([dy.sum(over), (dy * centred).sum(over)])
        first, second = (ctx.norms.sum_over_ranks(own) / total).to(wide).chunk(2)
        gain = scale if weight is None else scale * weight.to(wide)
        dx = dy - _along(first, x) - centred * _along(scale.square() * second, x)
        dx = (dx * _along(gain, x)).to(x.dtype)
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


def _wide(x: Tensor) -> torch.dtype:
    """Sums of 16-bit floats are made in float32."""
    return torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype


def _all_but_channels(x: Tensor) -> list[int]:
    return [dim for dim in range(x.ndim) if dim != 1]


def _along(values: Tensor, x: Tensor) -> Tensor:
    """View values by channel so that they spread over x."""
    return values.view(1, -1, *[1] * (x.ndim - 2))
