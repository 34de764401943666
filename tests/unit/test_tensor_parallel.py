"""Split modules against whole ones: outputs, gradients, and parameters after training."""

import pytest
import torch
from tensor_models import CASES, Outcome, split, whole
from torch import Tensor

STEPS = 20


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> bool:
    assert found.shape == expected.shape
    return bool((found - expected).norm() <= tolerance * expected.norm() + 1e-7)


def same(found: Outcome, expected: Outcome) -> None:
    for name, tensor in expected.state.items():
        assert close(found.state[name].double(), tensor.double()), name
    assert found.state.keys() == expected.state.keys()


@pytest.mark.sweep(3)
@pytest.mark.parametrize(
    ("name", "world"),
    [(name, world) for name in CASES for world in (1, 2, 3, 4) if name != "bypass" or world <= 2],
)
def test_a_split_model_is_the_model(name: str, world: int) -> None:
    expected = whole(CASES[name], STEPS)
    ranks = split(CASES[name], world, STEPS)
    for rank in ranks:
        assert close(rank.outputs[0], expected.outputs[0])
        assert close(rank.outputs[-1], expected.outputs[-1])
        assert all(torch.equal(a, b) for a, b in zip(rank.outputs, ranks[0].outputs, strict=True))
        assert rank.own.keys() == ranks[0].own.keys()
        assert all(torch.equal(g, ranks[0].own[n]) for n, g in rank.own.items())
    same(ranks[0], expected)
    first = split(CASES[name], world, 1)[0]
    for parameter, gradient in whole(CASES[name], 1).gradients.items():
        assert close(first.gradients[parameter], gradient), parameter
