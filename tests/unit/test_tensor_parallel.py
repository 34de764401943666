"""Tensor-parallel modules compared with whole ones: outputs, gradients, trained parameters."""

import pytest
import torch
from tensor_models import CASES, Outcome, train_split, train_whole
from torch import Tensor

STEPS = 20


def is_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> bool:
    assert actual.shape == expected.shape
    return bool((actual - expected).norm() <= tolerance * expected.norm() + 1e-7)


def assert_same_state(actual: Outcome, expected: Outcome) -> None:
    for name, tensor in expected.state.items():
        assert is_close(actual.state[name].double(), tensor.double()), name
    assert actual.state.keys() == expected.state.keys()


@pytest.mark.sweep(6)
@pytest.mark.parametrize(
    ("name", "world"),
    [(name, world) for name in CASES for world in (1, 2, 3, 4) if name != "bypass" or world <= 2],
)
def test_split_model_matches_whole_model(name: str, world: int) -> None:
    expected = train_whole(CASES[name], STEPS)
    ranks = train_split(CASES[name], world, STEPS)
    for rank in ranks:
        assert is_close(rank.outputs[0], expected.outputs[0])
        assert is_close(rank.outputs[-1], expected.outputs[-1])
        assert all(torch.equal(a, b) for a, b in zip(rank.outputs, ranks[0].outputs, strict=True))
        assert rank.own.keys() == ranks[0].own.keys()
        assert all(torch.equal(g, ranks[0].own[n]) for n, g in rank.own.items())
    assert_same_state(ranks[0], expected)
    first = train_split(CASES[name], world, 1)[0]
    for parameter, gradient in train_whole(CASES[name], 1).gradients.items():
        assert is_close(first.gradients[parameter], gradient), parameter
