"""Optimizers of a train function step with torch's fused kernels on CPU, as those of a task."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer, RMSprop

from distplat.strategies.function.fused_kernel import FusedSteps


class CustomAdamW(AdamW):
    """A user-defined optimizer, which may change its groups."""


def steps(
    make: Callable[..., Optimizer],
    fuse: bool,
    dtype: torch.dtype,
    late: bool = False,
    **kwargs: Any,
) -> Any:
    """
    Train three steps; return the parameters, the state, and whether each step was fused.

    Args:
        make: the optimizer's class.
        fuse: whether to fuse the steps.
        dtype: dtype of the parameters.
        late: both parameters are in one group; the second has no gradient in the first step.
        **kwargs: arguments of the class.
    """
    generator = torch.Generator().manual_seed(0)

    def draw() -> Tensor:
        return torch.randn(5, 3, generator=generator).to(dtype)

    parameters = [nn.Parameter(draw()) for _ in range(2)]
    groups = [parameters] if late else [[p] for p in parameters]
    optimizer = make([{"params": group} for group in groups], lr=0.1, **kwargs)
    fused: list[bool] = []
    if fuse:
        FusedSteps(optimizer)

    def record(optimizer: Optimizer, *_: Any) -> None:
        fused.append(all(group.get("fused") is True for group in optimizer.param_groups))

    optimizer.register_step_pre_hook(record)
    for step in range(3):
        for parameter in parameters[: 1 if late and step == 0 else 2]:
            parameter.grad = draw()
        optimizer.step()
    return parameters, optimizer.state_dict(), fused


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("make", "kwargs"),
    [(SGD, {"momentum": 0.9}), (Adam, {"amsgrad": True}), (AdamW, {}), (Adagrad, {})],
)
def test_fused_steps_match_unfused(
    make: Callable[..., Optimizer], kwargs: dict[str, Any], dtype: torch.dtype
) -> None:
    params, state, fused = steps(make, True, dtype, **kwargs)
    expected, expected_state, _ = steps(make, False, dtype, **kwargs)
    assert fused == [True] * 3
    assert state["param_groups"] == expected_state["param_groups"]
    torch.testing.assert_close(params, expected)
    torch.testing.assert_close(state["state"], expected_state["state"])


@pytest.mark.parametrize(
    ("make", "kwargs", "fused"),
    [
        (SGD, {"momentum": 0.9}, [True, False, True]),  # the kernel needs all momenta or none
        (SGD, {}, [True] * 3),
        (Adam, {}, [True] * 3),
        (Adagrad, {}, [True] * 3),
    ],
)
def test_parameter_with_a_later_first_gradient(
    make: Callable[..., Optimizer], kwargs: dict[str, Any], fused: list[bool]
) -> None:
    params, state, steps_fused = steps(make, True, torch.float32, late=True, **kwargs)
    expected, expected_state, _ = steps(make, False, torch.float32, late=True, **kwargs)
    assert steps_fused == fused
    torch.testing.assert_close(params, expected)
    torch.testing.assert_close(state["state"], expected_state["state"])


@pytest.mark.parametrize(
    ("make", "kwargs"),
    [
        (AdamW, {"foreach": False}),
        (AdamW, {"foreach": True}),
        (AdamW, {"fused": False}),
        (CustomAdamW, {}),
        (RMSprop, {}),
    ],
)
def test_explicit_choices_and_unsupported_classes_are_not_fused(
    make: Callable[..., Optimizer], kwargs: dict[str, Any]
) -> None:
    assert steps(make, True, torch.float32, **kwargs)[2] == [False] * 3


def test_16_bit_parameters_are_not_fused() -> None:
    """On CPU, torch's fused kernels do not update 16-bit parameters."""
    params, _, fused = steps(AdamW, True, torch.bfloat16)
    assert fused == [False] * 3
    assert torch.equal(params[0], steps(AdamW, False, torch.bfloat16)[0][0])


def test_sparse_gradient_is_not_fused() -> None:
    layer = nn.Embedding(4, 2, sparse=True)
    optimizer = SGD(layer.parameters(), lr=0.1)
    FusedSteps(optimizer)
    before = layer.weight.detach().clone()
    torch.autograd.backward(layer(torch.tensor([1])).sum())
    optimizer.step()
    assert torch.equal(layer.weight[1], before[1] - 0.1)
