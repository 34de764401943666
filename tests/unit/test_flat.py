"""The flat model: parameters and gradients are views of its vectors."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from distplat.strategies.model.flat import FlatModel


def mlp() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))


class Tied(nn.Module):
    """An embedding whose weight is tied to the output layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.out = nn.Linear(4, 6, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.out(self.embed(ids))
        return logits


def test_layout() -> None:
    flat = FlatModel(mlp())
    assert [(s.name, s.shape, s.offset, s.size) for s in flat.slots] == [
        ("0.weight", (7, 5), 0, 35),
        ("0.bias", (7,), 48, 7),
        ("2.weight", (3, 7), 64, 21),
        ("2.bias", (3,), 96, 3),
    ]
    assert flat.size == flat.params.numel() == flat.grads.numel() == 99
    assert all(slot.offset % 16 == 0 for slot in flat.slots)


def test_values_are_kept_and_padding_is_zero() -> None:
    flat, original = FlatModel(mlp()), mlp()
    padding = torch.ones(flat.size, dtype=torch.bool)
    for slot, parameter in zip(flat.slots, original.parameters(), strict=True):
        run = slice(slot.offset, slot.offset + slot.size)
        assert torch.equal(flat.params[run].view(slot.shape), parameter)
        padding[run] = False
    assert flat.params[padding].eq(0).all() and padding.sum() == 99 - 66
    x = torch.randn(2, 5)
    assert torch.equal(flat.model(x), original(x))


def test_parameters_are_views_of_the_vector() -> None:
    flat = FlatModel(mlp())
    flat.params.fill_(0.5)
    assert all(parameter.eq(0.5).all() for parameter in flat.model.parameters())
    weight = next(flat.model.parameters())
    with torch.no_grad():
        weight[0, 2] = 9.0
    assert flat.params[2] == 9.0


def test_backward_adds_into_the_gradient_vector() -> None:
    flat, original = FlatModel(mlp()), mlp()
    x = torch.randn(4, 5)
    torch.autograd.backward(original(x).square().sum())
    for times in (1, 2):
        torch.autograd.backward(flat.model(x).square().sum())
        for slot, parameter in zip(flat.slots, original.parameters(), strict=True):
            assert parameter.grad is not None
            run = flat.grads[slot.offset : slot.offset + slot.size].view(slot.shape)
            torch.testing.assert_close(run, times * parameter.grad)
    flat.grads.zero_()
    assert all(p.grad is not None and p.grad.eq(0).all() for p in flat.model.parameters())


def test_tied_weights_are_one_slot() -> None:
    flat, model = FlatModel(Tied()), Tied()
    assert [slot.name for slot in flat.slots] == ["embed.weight"]
    assert flat.size == 24
    model.load_state_dict(flat.model.state_dict())
    for tied in (flat.model, model):
        torch.autograd.backward(tied(torch.tensor([1, 4])).square().sum())
    assert model.embed.weight.grad is not None
    torch.testing.assert_close(flat.grads.view(6, 4), model.embed.weight.grad)
    flat.params.fill_(2.0)
    assert isinstance(flat.model, Tied)
    assert flat.model.out.weight.eq(2.0).all() and flat.model.embed.weight.eq(2.0).all()


def test_frozen_parameters_have_no_slot() -> None:
    model = mlp()
    assert isinstance(model, nn.Sequential)
    frozen = model[0].requires_grad_(False)
    before = [p.clone() for p in frozen.parameters()]
    flat = FlatModel(model)
    assert [slot.name for slot in flat.slots] == ["2.weight", "2.bias"]
    flat.params.fill_(7.0)
    torch.autograd.backward(model(torch.randn(2, 5)).sum())
    assert all(torch.equal(a, b) for a, b in zip(before, frozen.parameters(), strict=True))
    assert all(p.grad is None for p in frozen.parameters())


def test_move_to_other_vectors() -> None:
    flat = FlatModel(mlp())
    old_params, old_grads = flat.params, flat.grads
    params, grads = torch.full((flat.size,), 0.25), torch.zeros(flat.size)
    flat.move(params, grads)
    assert flat.params is params and flat.grads is grads
    assert all(p.eq(0.25).all() for p in flat.model.parameters())
    torch.autograd.backward(flat.model(torch.ones(1, 5)).sum())
    assert grads.ne(0).any() and old_grads.eq(0).all()
    old_params.fill_(-1.0)
    assert all(p.eq(0.25).all() for p in flat.model.parameters())


def mixed() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).double())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: mlp().requires_grad_(False), "no trainable parameter"),
        (nn.Tanh, "no trainable parameter"),
    ],
)
def test_models_without_trainable_parameters(make: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FlatModel(make())


def test_frozen_part_may_have_another_dtype() -> None:
    model = mixed()
    assert isinstance(model, nn.Sequential)
    model[0].requires_grad_(False)
    assert FlatModel(model).params.dtype is torch.float64


OTHER_MODELS: dict[str, Callable[[], nn.Module]] = {
    "wider": lambda: nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)),
    "dtype": lambda: mlp().double(),
    "names": lambda: nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3)),
    "transposed": lambda: nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(7, 3)),
    "no-bias": lambda: nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3, bias=False)),
}


@pytest.mark.parametrize("other", OTHER_MODELS.values(), ids=OTHER_MODELS)
def test_other_models_have_other_digests(other: Callable[[], nn.Module]) -> None:
    assert FlatModel(other()).digest() != FlatModel(mlp()).digest()


def test_digest_does_not_depend_on_values() -> None:
    first, second = FlatModel(mlp()), FlatModel(mlp())
    second.params.zero_()
    assert first.digest() == second.digest()
