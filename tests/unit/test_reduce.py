"""Sums in a fixed order, norms and clipping, compared with plain torch."""

from functools import reduce

import pytest
import torch

from distplat.strategies.algorithms.reduce import (
    BLOCK_ELEMENTS,
    clip_factor,
    squared_norm,
    sum_in_order,
)

SIZES = [0, 1, 17, BLOCK_ELEMENTS - 1, BLOCK_ELEMENTS, BLOCK_ELEMENTS + 1, 2 * BLOCK_ELEMENTS + 5]


def random_vectors(count: int, size: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(size + count)
    scales = [10.0 ** (3 * (i % 3)) for i in range(count)]  # another order gives other roundings
    return [torch.randn(size, generator=generator) * scale for scale in scales]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_sum_in_order_adds_from_left_to_right(count: int, size: int) -> None:
    parts = random_vectors(count, size)
    out = torch.full((size,), float("nan"))
    sum_in_order(parts, out)
    assert torch.equal(out, reduce(torch.add, parts))


def test_sum_depends_on_the_order() -> None:
    """Control of the test above."""
    parts = random_vectors(5, 1000)
    assert not torch.equal(reduce(torch.add, parts), reduce(torch.add, parts[::-1]))


@pytest.mark.parametrize("count", [1, 2, 4])
def test_sum_in_order_may_write_into_the_first_part(count: int) -> None:
    parts = random_vectors(count, BLOCK_ELEMENTS + 3)
    expected = reduce(torch.add, [part.clone() for part in parts])
    sum_in_order(parts, parts[0])
    assert torch.equal(parts[0], expected)


@pytest.mark.parametrize("size", SIZES)
def test_squared_norm(size: int) -> None:
    vector = random_vectors(1, size)[0]
    assert squared_norm(vector) == pytest.approx(float(vector.double().square().sum()), rel=1e-5)


@pytest.mark.parametrize("limit", [1e-3, 0.5, 1.0, 3.0, 1e6])
@pytest.mark.parametrize("scale", [0.0, 1e-4, 1.0, 100.0])
def test_clip_factor_matches_torch(scale: float, limit: float) -> None:
    gradient = random_vectors(1, 50)[0] * scale
    parameter = torch.nn.Parameter(torch.zeros(50))
    parameter.grad = gradient.clone()
    torch.nn.utils.clip_grad_norm_([parameter], limit)
    ours = gradient * clip_factor(squared_norm(gradient) ** 0.5, limit)
    torch.testing.assert_close(ours, parameter.grad)
    assert float(torch.linalg.vector_norm(ours)) <= limit * (1 + 1e-6)
