"""
torch's fused kernels on CPUs, for optimizers of a train function that leave it open.

By itself torch takes them on no CPU: it updates one parameter after the other, in several passes
over memory each. A task's optimizer always has them (`strategies/model/optim.py`). The flag is
there during a step alone, so that `state_dict()` is what it would be.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from distplat.strategies.model.optim import FUSED, FUSED_TYPES
from distplat.strategies.model.parameter_layout import dtype_name
from distplat.strategies.torch_compat import not_compiled


class FusedSteps:
    """
    Has an optimizer's steps made by the fused kernel of its class, where that can update all.

    Args:
        optimizer: of any class; one that has no such kernel stays as it is.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._switched = False
        kind = type(optimizer)
        if kind.__name__ in FUSED and kind.__module__.startswith("torch.optim."):
            optimizer.register_step_pre_hook(self._before_step)
            optimizer.register_step_post_hook(self._after_step)

    @not_compiled
    def _before_step(self, optimizer: Optimizer, *_: Any) -> None:
        groups = optimizer.param_groups
        # Of this type are the counters of steps that the kernels read.
        if torch.get_default_dtype() is torch.float32 and all(
            _may_fuse(group) and _have_begun_alike(group, optimizer.state) for group in groups
        ):
            self._switched = True
            for group in groups:
                group["fused"] = True

    @not_compiled
    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        if self._switched:
            self._switched = False
            for group in optimizer.param_groups:
                group["fused"] = None


def _may_fuse(group: Mapping[str, Any]) -> bool:
    """Say whether nothing in a group is chosen, or is such, that a fused kernel would not do it."""
    chosen = group.get("foreach") is not None or group.get("fused", False) is not None
    special = group.get("capturable") or group.get("differentiable")
    plain = not isinstance(group["lr"], Tensor)
    return plain and not chosen and not special and all(map(_is_plain, group["params"]))


def _have_begun_alike(group: Mapping[str, Any], state: Mapping[Tensor, Any]) -> bool:
    """
    Say whether all of a group have a momentum, or none has one yet.

    torch's kernel of SGD raises a `TypeError` otherwise, as where layers were unfrozen, or the
    first batches did not reach them.
    """
    if not group.get("momentum"):
        return True
    moved = [one for one in group["params"] if one.grad is not None]
    return len({state.get(one, {}).get("momentum_buffer") is None for one in moved}) < 2


def _is_plain(parameter: Tensor) -> bool:
    grad = parameter.grad
    dense = grad is None or (grad.layout is torch.strided and grad.dtype is parameter.dtype)
    return dense and parameter.is_cpu and dtype_name(parameter) in FUSED_TYPES
