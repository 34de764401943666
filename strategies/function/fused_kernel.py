"""
Use torch's fused CPU kernels for optimizers of a train function that do not set `fused`.

By default torch does not use them on a CPU, and updates one parameter after another with several
passes over memory. A task's optimizer always uses them (`strategies/model/optim.py`). The flag is
set only during a step, so that `state_dict()` does not contain it.
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
    Run an optimizer's steps with the fused kernel of its class, if the kernel supports all
    parameters.

    Args:
        optimizer: of any class; optimizers without a fused kernel are not changed.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._is_fused = False
        cls = type(optimizer)
        if cls.__name__ in FUSED and cls.__module__.startswith("torch.optim."):
            optimizer.register_step_pre_hook(self._before_step)
            optimizer.register_step_post_hook(self._after_step)

    @not_compiled
    def _before_step(self, optimizer: Optimizer, *_: Any) -> None:
        groups = optimizer.param_groups
        # The kernels require step counters of this dtype.
        if torch.get_default_dtype() is torch.float32 and all(
            _can_fuse(group) and _has_uniform_momentum(group, optimizer.state) for group in groups
        ):
            self._is_fused = True
            for group in groups:
                group["fused"] = True

    @not_compiled
    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        if self._is_fused:
            self._is_fused = False
            for group in optimizer.param_groups:
                group["fused"] = None


def _can_fuse(group: Mapping[str, Any]) -> bool:
    """Return whether a group has only defaults and parameters that a fused kernel supports."""
    is_explicit = group.get("foreach") is not None or group.get("fused", False) is not None
    is_special = group.get("capturable") or group.get("differentiable")
    if is_explicit or is_special or isinstance(group["lr"], Tensor):
        return False
    return all(map(_is_supported, group["params"]))


def _has_uniform_momentum(group: Mapping[str, Any], state: Mapping[Tensor, Any]) -> bool:
    """
    Return whether all parameters of a group have a momentum buffer, or none has one.

    Otherwise torch's SGD kernel raises a `TypeError`, for example after layers were unfrozen, or if
    the first batches did not reach some parameters.
    """
    if not group.get("momentum"):
        return True
    updated = [p for p in group["params"] if p.grad is not None]
    return len({state.get(p, {}).get("momentum_buffer") is None for p in updated}) < 2


def _is_supported(parameter: Tensor) -> bool:
    grad = parameter.grad
    is_dense = grad is None or (grad.layout is torch.strided and grad.dtype is parameter.dtype)
    return is_dense and parameter.is_cpu and dtype_name(parameter) in FUSED_TYPES
