"""LAMB, which torch has not: Algorithm 2 of You et al. 2020, https://arxiv.org/abs/1904.00962."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override


class LAMB(torch.optim.Optimizer):
    """
    Adam with decoupled weight decay, each parameter's step as long as a share `lr` of its norm.

    Where a parameter or its step is all zeros, the step is Adam's: the paper leaves that open, and
    a parameter that begins at zero would stay there.

    Args:
        params: as for any of torch's.
        lr: learning rate.
        betas: of the averages of gradient and square.
        eps: added to the root of the square.
        weight_decay: see above.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        weight_decay: float = 0.01,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
    ) -> None:
        given = {"lr": lr, "weight_decay": weight_decay, "betas": betas, "eps": eps}
        super().__init__(params, given)

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
        way = mean / ((square / (1 - beta2**steps)).sqrt() + group["eps"])
        way += group["weight_decay"] * parameter
        norm, length = parameter.norm(), way.norm()
        trust = torch.where((norm > 0) & (length > 0), norm / length, 1.0)
        parameter.sub_(way.mul_(trust), alpha=group["lr"])
