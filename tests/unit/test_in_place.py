"""Gradients of linear layers that are added up inside the matrix product."""

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn

from distplat.strategies.pipeline.in_place import ENOUGH_ROWS, InPlace, Sums
from distplat.strategies.pipeline.packed import Packed


def net(*, bias: bool = True) -> nn.Sequential:
    torch.manual_seed(3)
    layers = nn.Linear(5, 7, bias=bias), nn.GELU(), nn.Linear(7, 2, bias=bias)
    model = nn.Sequential(*layers).double()
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 0.5)
    return model


def backward(model: nn.Module, inputs: Tensor, *, in_place: bool) -> list[Tensor]:
    """Give the gradients of inputs and parameters."""
    inputs, sums = inputs.detach().requires_grad_(), Sums(Packed())
    with InPlace(sums, flush=True) if in_place else nullcontext():
        outputs = model(inputs)
    torch.autograd.backward(outputs.square().sum())
    sums.settle()
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
    with InPlace(Sums(Packed()), flush=True):
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


def test_what_is_saved_may_be_packed() -> None:
    model = net()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach().clone(), lambda t: t):
        packed = backward(model, torch.ones(3, 5).double(), in_place=True)
    plain = backward(net(), torch.ones(3, 5).double(), in_place=True)
    assert all(torch.equal(a, b) for a, b in zip(packed, plain, strict=True))


@pytest.mark.parametrize("rows", [1, 3, ENOUGH_ROWS // 2, ENOUGH_ROWS - 1, ENOUGH_ROWS])
@pytest.mark.parametrize("count", [1, 2, 7])
@pytest.mark.parametrize("late", [0, 1, 3])
def test_micro_batches_together(rows: int, count: int, late: int) -> None:
    """Their memory is used again as soon as a backward is over, and nothing is left at the end."""
    generator = torch.Generator().manual_seed(rows)
    batches = torch.randn(count, rows, 5, dtype=torch.float64, generator=generator)
    mine, other, sums = net(), net(), Sums(Packed())
    for number, batch in enumerate(batches):
        buffer = batch.clone()
        with InPlace(sums, flush=number + 1 == count):
            outputs = mine(buffer)
        torch.autograd.backward(outputs.square().sum())
        buffer.fill_(torch.nan)
        if late and number % late == 0:
            sums.settle()
        torch.autograd.backward(other(batch).square().sum())
    sums.settle()
    for one, two in zip(mine.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("late", [1, 2, 7])
def test_when_products_are_made_does_not_change_the_bits(late: int) -> None:
    def gradients(every: int) -> list[Tensor]:
        model, sums = net(), Sums(Packed())
        for number in range(7):
            inputs = torch.randn(13, 5, generator=torch.Generator().manual_seed(number)).double()
            with InPlace(sums, flush=number == 6):
                outputs = model(inputs)
            torch.autograd.backward(outputs.square().sum())
            if number % every == 0:
                sums.settle()
        sums.settle()
        return [torch.as_tensor(p.grad) for p in model.parameters()]

    assert all(map(torch.equal, gradients(1), gradients(late)))


def test_settling_says_whether_there_was_anything() -> None:
    model, sums = net(), Sums(Packed())
    with InPlace(sums, flush=True):
        outputs = model(torch.ones(2, 5).double())
    torch.autograd.backward(outputs.sum())
    assert sums.settle()
    assert not sums.settle()
