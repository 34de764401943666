"""Optimizers of a train function that step by torch's fused kernels on a CPU, as a task's do."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer, RMSprop

from distplat.strategies.function.fused_kernel import FusedSteps


class Own(AdamW):
    """A class of the loop's own may do anything with its groups."""


def steps(
    make: Callable[..., Optimizer], fuse: bool, dtype: torch.dtype, late: bool = False, **more: Any
) -> Any:
    """
    Make three steps; give the parameters, the state, and whether each step was a fused one.

    Args:
        make: the optimizer's class.
        fuse: whether its steps are to be fused.
        dtype: of the parameters.
        late: both are of one group, and the second has no gradient in the first step.
        **more: what the class is given.
    """
    generator = torch.Generator().manual_seed(0)

    def draw() -> Tensor:
        return torch.randn(5, 3, generator=generator).to(dtype)

    parameters = [nn.Parameter(draw()) for _ in range(2)]
    groups = [parameters] if late else [[one] for one in parameters]
    optimizer = make([{"params": group} for group in groups], lr=0.1, **more)
    fused: list[bool] = []
    if fuse:
        FusedSteps(optimizer)

    def note(one: Optimizer, *_: Any) -> None:
        fused.append(all(group.get("fused") is True for group in one.param_groups))

    optimizer.register_step_pre_hook(note)
    for step in range(3):
        for one in parameters[: 1 if late and step == 0 else 2]:
            one.grad = draw()
        optimizer.step()
    return parameters, optimizer.state_dict(), fused


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("make", "more"),
    [(SGD, {"momentum": 0.9}), (Adam, {"amsgrad": True}), (AdamW, {}), (Adagrad, {})],
)
def test_steps_are_fused_and_state_is_what_it_would_be(
    make: Callable[..., Optimizer], more: dict[str, Any], dtype: torch.dtype
) -> None:
    found, state, fused = steps(make, True, dtype, **more)
    wanted, plain, _ = steps(make, False, dtype, **more)
    assert fused == [True] * 3
    assert state["param_groups"] == plain["param_groups"]
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(state["state"], plain["state"])


@pytest.mark.parametrize(
    ("make", "more", "fused"),
    [
        (SGD, {"momentum": 0.9}, [True, False, True]),  # its kernel wants all momenta or none
        (SGD, {}, [True] * 3),
        (Adam, {}, [True] * 3),
        (Adagrad, {}, [True] * 3),
    ],
)
def test_a_parameter_may_have_its_first_gradient_later_than_others(
    make: Callable[..., Optimizer], more: dict[str, Any], fused: list[bool]
) -> None:
    found, state, made = steps(make, True, torch.float32, late=True, **more)
    wanted, plain, _ = steps(make, False, torch.float32, late=True, **more)
    assert made == fused
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(state["state"], plain["state"])


@pytest.mark.parametrize(
    ("make", "more"),
    [
        (AdamW, {"foreach": False}),
        (AdamW, {"foreach": True}),
        (AdamW, {"fused": False}),
        (Own, {}),
        (RMSprop, {}),
    ],
)
def test_what_the_loop_has_chosen_and_what_has_no_kernel_stays(
    make: Callable[..., Optimizer], more: dict[str, Any]
) -> None:
    assert steps(make, True, torch.float32, **more)[2] == [False] * 3


def test_16_bit_parameters_are_updated() -> None:
    """torch's fused kernels do nothing to them on a CPU."""
    found, _, fused = steps(AdamW, True, torch.bfloat16)
    assert fused == [False] * 3
    assert torch.equal(found[0], steps(AdamW, False, torch.bfloat16)[0][0])


def test_a_sparse_gradient_is_no_fused_kernels() -> None:
    layer = nn.Embedding(4, 2, sparse=True)
    optimizer = SGD(layer.parameters(), lr=0.1)
    FusedSteps(optimizer)
    before = layer.weight.detach().clone()
    torch.autograd.backward(layer(torch.tensor([1])).sum())
    optimizer.step()
    assert torch.equal(layer.weight[1], before[1] - 0.1)
