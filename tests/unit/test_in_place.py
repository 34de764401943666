"""Gradients of linear layers that are added up inside the matrix product."""

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn

from distplat.strategies.pipeline.in_place import InPlace


def net(*, bias: bool = True) -> nn.Sequential:
    torch.manual_seed(3)
    layers = nn.Linear(5, 7, bias=bias), nn.GELU(), nn.Linear(7, 2, bias=bias)
    model = nn.Sequential(*layers).double()
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 0.5)
    return model


def backward(model: nn.Module, inputs: Tensor, *, in_place: bool) -> list[Tensor]:
    """Give the gradients of inputs and parameters."""
    inputs = inputs.detach().requires_grad_()
    with InPlace() if in_place else nullcontext():
        outputs = model(inputs)
    torch.autograd.backward(outputs.square().sum())
    return [torch.as_tensor(t.grad) for t in (inputs, *model.parameters())]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5,), (4, 5), (2, 3, 5), (0, 5)])
def test_the_same_gradients(shape: tuple[int, ...], bias: bool) -> None:
    inputs = torch.randn(shape, dtype=torch.float64)
    here = backward(net(bias=bias), inputs, in_place=True)
    theirs = backward(net(bias=bias), inputs, in_place=False)
    for mine, other in zip(here, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)


def uses(model: nn.Module, inputs: Tensor) -> bool:
    """Whether a layer of the model goes the way in place."""
    with InPlace():
        found = model(inputs)
    return found.grad_fn is not None and "_Linear" in type(found.grad_fn).__name__


def test_where_it_does_not_fit_torch_does_it() -> None:
    layer, inputs = nn.Linear(5, 5), torch.ones(2, 5)
    assert not uses(layer, inputs), "no gradient to add to"
    for parameter in layer.parameters():
        parameter.grad = torch.zeros_like(parameter)
    assert uses(layer, inputs)
    with torch.no_grad():
        assert not uses(layer, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        assert not uses(layer, inputs)
    layer.weight.requires_grad_(False)
    assert not uses(layer, inputs)
