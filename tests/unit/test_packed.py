"""Weights that are packed once per step give the products of torch's own operation."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from distplat.strategies.pipeline import packed as module
from distplat.strategies.pipeline.packed import LEAST_USES, MOST_ROWS, Packed


@pytest.fixture
def weight() -> Tensor:
    return torch.randn(512, 768, generator=torch.Generator().manual_seed(1)) / 25


@pytest.fixture
def packing(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Note each packing: whether it was that of a transposed weight."""
    found: list[bool] = []
    real = module._OPS._reorder_linear_weight

    class Ops:
        _linear_pointwise = module._OPS._linear_pointwise

        def _reorder_linear_weight(self, tensor: Tensor, rows: int) -> Tensor:
            found.append(tensor.stride(0) == 1)
            return real(tensor, rows)  # type: ignore[no-any-return]

    monkeypatch.setattr(module, "_OPS", Ops())
    return found


def step(uses: int = LEAST_USES) -> Packed:
    packed = Packed()
    packed.begin(uses)
    return packed


@pytest.mark.parametrize("shape", [(768,), (1, 768), (8, 768), (2, 3, 768), (0, 768)])
@pytest.mark.parametrize("bias", [True, False])
def test_the_same_products(shape: tuple[int, ...], bias: bool, weight: Tensor) -> None:
    rows = torch.randn(shape)
    added = torch.randn(512) if bias else None
    mine, theirs = step().linear(rows, weight, added), functional.linear(rows, weight, added)
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    back = step().back(theirs, weight)
    torch.testing.assert_close(back, theirs @ weight, rtol=1e-5, atol=1e-4)


def test_strided_rows_and_weights_inside_a_vector(weight: Tensor) -> None:
    vector = torch.randn(7 + weight.numel())
    weight = vector[7:].view(512, 768)
    rows = torch.randn(768, 5).t()
    mine = step().linear(rows, weight, None)
    torch.testing.assert_close(mine, rows @ weight.t(), rtol=1e-5, atol=1e-3)


def test_packed_once_per_step_and_way(weight: Tensor, packing: list[bool]) -> None:
    packed = step()
    for rows in (8, 8, 3):
        packed.back(packed.linear(torch.randn(rows, 768), weight, None), weight)
    assert packing == [False, True]


def test_the_next_step_has_the_new_weights(weight: Tensor, packing: list[bool]) -> None:
    packed, rows = step(), torch.randn(8, 768)
    packed.linear(rows, weight, None)
    packed.end()
    weight.mul_(2)
    packed.begin(LEAST_USES)
    packed.prepare()
    assert packing == [False, False], "what the last step wanted is packed before it is asked for"
    found = packed.linear(rows, weight, None)
    assert packing == [False, False]
    torch.testing.assert_close(found, rows @ weight.t(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("uses", "rows", "dtype", "size"),
    [
        pytest.param(LEAST_USES - 1, 8, torch.float32, 768, id="few-uses"),
        pytest.param(LEAST_USES, MOST_ROWS + 1, torch.float32, 768, id="many-rows"),
        pytest.param(LEAST_USES, 8, torch.float64, 768, id="double"),
        pytest.param(LEAST_USES, 8, torch.bfloat16, 768, id="half"),
        pytest.param(LEAST_USES, 8, torch.float32, 64, id="small"),
    ],
)
def test_where_it_does_not_pay_torch_does_it(
    uses: int, rows: int, dtype: torch.dtype, size: int, packing: list[bool]
) -> None:
    packed, some = step(uses), torch.randn(rows, size, dtype=dtype)
    matrix = torch.randn(size, size, dtype=dtype)
    assert torch.equal(packed.linear(some, matrix, None), functional.linear(some, matrix))
    assert torch.equal(packed.back(some, matrix), some @ matrix)
    packed.prepare()
    assert packing == []


def test_a_torch_without_the_operations(
    weight: Tensor, packing: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_KNOWN", False)
    rows = torch.randn(8, 768)
    assert torch.equal(step().linear(rows, weight, None), functional.linear(rows, weight))
    assert packing == []
