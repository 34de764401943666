"""PowerSGD: factors, a dense reference over ranks, error feedback, traffic."""

from collections.abc import Callable

import pytest
import torch
from control_records import record_of
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from rank_threads import UNSHRUNK, on_ranks
from torch import Tensor, nn

from distplat.strategies.algorithms import compression
from distplat.strategies.algorithms.reduce import traffic_elements
from distplat.strategies.fakes import Fabric
from distplat.strategies.loop.control import control_size
from distplat.strategies.model.flat import FlatModel
from distplat.strategies.reduction.compressed import PowerSGDReducer

RANK = 2


def model() -> FlatModel:
    """Two large matrices, one of them a convolution; others are too small for compression."""
    torch.manual_seed(0)
    layers = nn.ModuleList(
        [nn.Linear(11, 9), nn.Conv2d(3, 8, 3), nn.LayerNorm(13), nn.Linear(3, 2, bias=False)]
    )
    return FlatModel(layers)


LARGE = {"0.weight": (9, 11), "1.weight": (8, 27)}
"""Name -> shape of the compressed matrix."""


def matrix_of(flat: FlatModel, vector: Tensor, name: str) -> Tensor:
    slot = next(slot for slot in flat.slots if slot.name == name)
    return vector[slot.offset : slot.offset + slot.size].view(LARGE[name])


def gradient(flat: FlatModel, rank: int, step: int) -> Tensor:
    """Random gradient of a rank in a step; padding of the flat vector is zero."""
    values = torch.zeros(flat.size)
    for number, slot in enumerate(flat.slots):
        generator = torch.Generator().manual_seed(1000 * step + 10 * rank + number)
        part = values[slot.offset : slot.offset + slot.size]
        part.copy_(torch.randn(slot.size, generator=generator))
    return values


def reduce_steps(
    world: int, steps: int, rank: int = RANK, gradient_of: Callable[..., Tensor] = gradient
) -> list[tuple[FlatModel, PowerSGDReducer, list[Tensor]]]:
    """Run steps in a new world; return each rank's model, reducer and sums by step."""
    fabric = Fabric(world)
    models = [model() for _ in range(world)]

    def body(place: int) -> tuple[FlatModel, PowerSGDReducer, list[Tensor]]:
        flat, sums = models[place], []
        reducer = PowerSGDReducer(flat, fabric.collective(place), rank)
        for step in range(steps):
            flat.grads.copy_(gradient_of(flat, place, step))
            reducer.finish(record_of(flat))
            sums.append(flat.grads.clone())
        return flat, reducer, sums

    return on_ranks(world, body)


@pytest.mark.parametrize(
    ("shape", "rank", "expected"),
    [
        ((10, 10), 4, (10, 10)),  # 80 < 100
        ((10, 10), 5, None),  # 100 is not less than 100
        ((64, 3, 3, 3), 4, (64, 27)),
        ((1000,), 1, None),
        ((), 1, None),
        ((0, 5), 1, None),
        ((1, 1000), 1, None),
    ],
)
def test_matrix_shape_of_a_parameter(
    shape: tuple[int, ...], rank: int, expected: tuple[int, int] | None
) -> None:
    assert compression.matrix_shape(shape, rank) == expected


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 6), st.integers(0, 60), st.integers(0, 1 << 20))
def test_orthonormalise_keeps_the_span(rank: int, extra: int, seed: int) -> None:
    left = torch.randn(rank, rank + extra, generator=torch.Generator().manual_seed(seed))
    before = left.clone()
    compression.orthonormalise(left)
    assert (left @ left.t() - torch.eye(rank)).abs().max() < 1e-5
    projected = before @ left.t() @ left
    torch.testing.assert_close(projected, before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scale", [0.0, 1e-18, 1.0, 1e12])
def test_orthonormalise_replaces_dependent_rows(scale: float) -> None:
    """Otherwise the factors of a matrix that was zero once would stay zero."""
    left = scale * torch.ones(3, 50)
    compression.orthonormalise(left)
    assert (left @ left.t() - torch.eye(3)).abs().max() < 1e-5


def test_orthonormalise_in_half_precision() -> None:
    left = torch.randn(2, 40, generator=torch.Generator().manual_seed(0)).bfloat16()
    compression.orthonormalise(left)
    assert (left @ left.t() - torch.eye(2)).abs().max() < 2e-2


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 4), st.integers(5, 30), st.integers(5, 30), st.integers(0, 1 << 20))
def test_matrix_of_low_rank_is_exact(rank: int, rows: int, cols: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(rows, rank, generator=generator) @ torch.randn(
        rank, cols, generator=generator
    )
    left, right = torch.empty(rank, rows), compression.starting_factor(rank, cols, generator)
    compression.left_factor(matrix, right, out=left)
    # Rounding errors grow with nearly parallel directions; skip such starting factors.
    spread = torch.linalg.svdvals(left)
    assume(float(spread[-1] / spread[0]) > 1e-2)
    compression.orthonormalise(left)
    compression.right_factor(matrix, left, out=right)
    product = torch.empty(rows, cols)
    compression.write_product(left, right, out=product)
    size = float(matrix.abs().max())
    torch.testing.assert_close(product, matrix, rtol=0, atol=1e-3 * size)
    compression.subtract_product(matrix, left, right)
    assert float(matrix.abs().max()) < 1e-3 * size


@pytest.mark.parametrize("world", [2, 3])
def test_sum_matches_a_dense_reference(world: int) -> None:
    """The reference is PowerSGD in float64 in one process, on the sum of corrected gradients."""
    steps = 4
    results = reduce_steps(world, steps)
    flat = results[0][0]
    generator = torch.Generator().manual_seed(20190531)
    for name, (rows, cols) in LARGE.items():
        right = torch.randn(RANK, cols, generator=generator).double().t()
        residuals = [torch.zeros(rows, cols, dtype=torch.float64) for _ in range(world)]
        for step in range(steps):
            corrected = [
                residuals[rank] + matrix_of(flat, gradient(flat, rank, step), name)
                for rank in range(world)
            ]
            total = torch.stack(corrected).sum(0)
            left = torch.linalg.qr(total @ right).Q
            right = total.t() @ left
            residuals = [m - left @ left.t() @ m for m in corrected]
            expected = (left @ right.t()).float()
            for _, _, sums in results:
                actual = matrix_of(flat, sums[step], name)
                torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
        for rank, (_, reducer, _) in enumerate(results):
            actual = matrix_of(flat, reducer.residual, name)
            torch.testing.assert_close(actual, residuals[rank].float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("world", [2, 4])
def test_uncompressed_parameters_are_exact_and_padding_is_zero(world: int) -> None:
    results = reduce_steps(world, 2)
    flat = results[0][0]
    expected = gradient(flat, 0, 1)
    for rank in range(1, world):
        expected += gradient(flat, rank, 1)
    padding = torch.ones(flat.size, dtype=torch.bool)
    for slot in flat.slots:
        place = slice(slot.offset, slot.offset + slot.size)
        padding[place] = False
        for _, reducer, sums in results:
            if slot.name not in LARGE:
                assert torch.equal(sums[1][place], expected[place])
                assert not reducer.residual[place].any()
    assert padding.any()
    assert not any(sums[1][padding].any() for _, _, sums in results)


def test_sums_are_bit_identical_on_all_ranks() -> None:
    results = reduce_steps(3, 3)
    for _, _, sums in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(sums, results[0][2], strict=True))


@settings(max_examples=15, deadline=None, phases=UNSHRUNK)
@given(st.integers(2, 4), st.integers(1, 3), st.integers(1, 6))
def test_sums_and_residuals_add_up_to_the_gradients(world: int, rank: int, steps: int) -> None:
    results = reduce_steps(world, steps, rank)
    flat = results[0][0]
    total_gradient = sum(gradient(flat, place, s) for place in range(world) for s in range(steps))
    residual = sum(reducer.residual for _, reducer, _ in results)
    assert isinstance(residual, Tensor) and residual.any()
    for _, _, sums in results:
        torch.testing.assert_close(sum(sums) + residual, total_gradient, rtol=1e-4, atol=1e-4)


def low_rank(flat: FlatModel, rank: int, step: int) -> Tensor:
    """Gradient with matrices of rank 1, in the same directions on every rank."""
    values = torch.zeros(flat.size)
    for name, (rows, cols) in LARGE.items():
        column = torch.linspace(-1, 2, rows)[:, None]
        matrix_of(flat, values, name).copy_(column * torch.linspace(1, 3, cols) * (rank + 1))
    return values


def test_gradients_of_low_rank_are_exact() -> None:
    for flat, reducer, sums in reduce_steps(2, 2, 1, low_rank):
        torch.testing.assert_close(sums[1], low_rank(flat, 0, 1) + low_rank(flat, 1, 1))
        assert reducer.figures()["error_norm"] < 1e-5


def test_matrix_that_was_zero_is_reduced_again() -> None:
    def zero_at_first(flat: FlatModel, rank: int, step: int) -> Tensor:
        return low_rank(flat, rank, step) * (step > 0)

    for flat, _, sums in reduce_steps(2, 3, 1, zero_at_first):
        assert not sums[0].any()
        expected = low_rank(flat, 0, 2) + low_rank(flat, 1, 2)
        total = sums[1] + sums[2]
        torch.testing.assert_close(total, 2 * expected, rtol=1e-4, atol=1e-4)


def test_warm_start_converges_to_the_best_factors() -> None:
    """The matrix is the same in each step, without error feedback."""
    torch.manual_seed(3)
    matrix = torch.randn(12, 20)
    best = float(torch.linalg.svdvals(matrix)[RANK:].norm())
    right, left = torch.randn(RANK, 20), torch.empty(RANK, 12)
    errors = []
    for _ in range(60):
        compression.left_factor(matrix, right, out=left)
        compression.orthonormalise(left)
        compression.right_factor(matrix, left, out=right)
        rest = matrix.clone()
        compression.subtract_product(rest, left, right)
        errors.append(float(rest.norm()))
    assert errors[0] > 1.05 * best
    assert errors[-1] == pytest.approx(best, rel=1e-3)


@pytest.mark.parametrize("world", [2, 3, 5])
def test_traffic_matches_the_formula(world: int) -> None:
    results = reduce_steps(world, 2)
    flat = results[0][0]
    others = sum(slot.size for slot in flat.slots if slot.name not in LARGE)
    lefts = RANK * sum(rows for rows, _ in LARGE.values()) + others
    rights = RANK * sum(cols for _, cols in LARGE.values())
    for rank, (_, reducer, _) in enumerate(results):
        figures = reducer.figures()
        parts = [traffic_elements(n, rank, world) for n in (lefts, rights)]
        control = [8 * n for n in traffic_elements(control_size(len(flat.slots)), rank, world)]
        sent, received = (4 * sum(counts) for counts in zip(*parts, strict=True))
        steps = 2  # the figures are those since the last call
        assert figures["sent_bytes"] == steps * (sent + control[0])
        assert figures["received_bytes"] == steps * (received + control[1])
        plain = 4 * traffic_elements(flat.size, rank, world)[0]
        assert figures["saved_bytes"] == plain - sent > 0


def test_error_norm_is_that_of_the_residual() -> None:
    fabric, models = Fabric(2), [model() for _ in range(2)]

    def body(rank: int) -> tuple[list[float], list[float]]:
        flat = models[rank]
        reducer = PowerSGDReducer(flat, fabric.collective(rank), RANK)
        reported, expected = [], []
        for step in range(4):
            flat.grads.copy_(gradient(flat, rank, step))
            corrected = reducer.residual + flat.grads
            reducer.finish(record_of(flat))
            reported.append(reducer.figures()["error_norm"])
            expected.append(float(reducer.residual.norm() / corrected.norm()))
        return reported, expected

    for reported, expected in on_ranks(2, body):
        assert reported == pytest.approx(expected, rel=1e-4)
        assert all(0.1 < value < 1 for value in reported)


def test_model_without_large_matrices_is_exact() -> None:
    fabric = Fabric(2)

    def body(rank: int) -> tuple[Tensor, dict[str, float]]:
        flat = FlatModel(nn.Linear(3, 2))
        reducer = PowerSGDReducer(flat, fabric.collective(rank), 4)
        flat.grads.copy_(gradient(flat, rank, 0))
        reducer.finish(record_of(flat))
        return flat.grads, reducer.figures()

    flat = FlatModel(nn.Linear(3, 2))
    for grads, figures in on_ranks(2, body):
        assert torch.equal(grads, gradient(flat, 0, 0) + gradient(flat, 1, 0))
        assert figures["error_norm"] == 0.0


def test_single_rank_keeps_its_gradient() -> None:
    ((flat, reducer, sums),) = reduce_steps(1, 2)
    assert torch.equal(sums[1], gradient(flat, 0, 1))
    assert not any(reducer.figures().values()) and not reducer.residual.any()
