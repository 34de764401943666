"""LAMB, which torch lacks: Algorithm 2 of You et al. 2020, https://arxiv.org/abs/1904.00962."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override


class LAMB(torch.optim.Optimizer):
    """
    Adam with decoupled weight decay, whose step has `lr` times the norm of the parameter.

    If a parameter or its step is all zeros, the step is not rescaled. The paper does not define
    this case, and a parameter initialized with zeros would otherwise never change.

    Args:
        params: as for torch's optimizers.
        lr: learning rate.
        betas: decay rates of the averages of gradient and squared gradient.
        eps: added to the root of the averaged square.
        weight_decay: coefficient of the decoupled weight decay.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        weight_decay: float = 0.01,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
    ) -> None:
        defaults = {"lr": lr, "weight_decay": weight_decay, "betas": betas, "eps": eps}
        super().__init__(params, defaults)

    @override
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state, (beta1, beta2) = self.state[parameter], group["betas"]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        state["step"] += 1
        steps = float(state["step"])
        state["exp_avg"].lerp_(gradient, 1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        mean, square = state["exp_avg"] / (1 - beta1**steps), state["exp_avg_sq"]
        update = mean / ((square / (1 - beta2**steps)).sqrt() + group["eps"])
        update += group["weight_decay"] * parameter
        norm, update_norm = parameter.norm(), update.norm()
        trust = torch.where((norm > 0) & (update_norm > 0), norm / update_norm, 1.0)
        parameter.sub_(update.mul_(trust), alpha=group["lr"])
