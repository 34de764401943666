"""PowerSGD: the factors' mathematics, a dense reference over ranks, error feedback, its price."""

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
    """Two large matrices, one of them a convolution; a small matrix and vectors go as they are."""
    torch.manual_seed(0)
    layers = nn.ModuleList(
        [nn.Linear(11, 9), nn.Conv2d(3, 8, 3), nn.LayerNorm(13), nn.Linear(3, 2, bias=False)]
    )
    return FlatModel(layers)


LARGE = {"0.weight": (9, 11), "1.weight": (8, 27)}
"""Name -> the matrix it is taken as."""


def matrix_of(flat: FlatModel, vector: Tensor, name: str) -> Tensor:
    slot = next(slot for slot in flat.slots if slot.name == name)
    return vector[slot.offset : slot.offset + slot.size].view(LARGE[name])


def gradient(flat: FlatModel, rank: int, step: int) -> Tensor:
    """What one rank brings to one step: zero where the flat vector is padding."""
    values = torch.zeros(flat.size)
    for number, slot in enumerate(flat.slots):
        generator = torch.Generator().manual_seed(1000 * step + 10 * rank + number)
        part = values[slot.offset : slot.offset + slot.size]
        part.copy_(torch.randn(slot.size, generator=generator))
    return values


def reduced(
    world: int, steps: int, rank: int = RANK, bring: Callable[..., Tensor] = gradient
) -> list[tuple[FlatModel, PowerSGDReducer, list[Tensor]]]:
    """Run some steps on a new world; give each rank's model, reducer and sums by step."""
    fabric = Fabric(world)
    models = [model() for _ in range(world)]

    def body(place: int) -> tuple[FlatModel, PowerSGDReducer, list[Tensor]]:
        flat, sums = models[place], []
        reducer = PowerSGDReducer(flat, fabric.collective(place), rank)
        for step in range(steps):
            flat.grads.copy_(bring(flat, place, step))
            reducer.finish(record_of(flat))
            sums.append(flat.grads.clone())
        return flat, reducer, sums

    return on_ranks(world, body)


@pytest.mark.parametrize(
    ("shape", "rank", "expected"),
    [
        ((10, 10), 4, (10, 10)),  # 80 < 100
        ((10, 10), 5, None),  # 100 is no less than 100
        ((64, 3, 3, 3), 4, (64, 27)),
        ((1000,), 1, None),
        ((), 1, None),
        ((0, 5), 1, None),
        ((1, 1000), 1, None),
    ],
)
def test_what_is_taken_as_a_matrix(
    shape: tuple[int, ...], rank: int, expected: tuple[int, int] | None
) -> None:
    assert compression.matrix_shape(shape, rank) == expected


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 6), st.integers(0, 60), st.integers(0, 1 << 20))
def test_orthonormal_with_the_same_span(rank: int, more: int, seed: int) -> None:
    left = torch.randn(rank, rank + more, generator=torch.Generator().manual_seed(seed))
    before = left.clone()
    compression.orthonormalise(left)
    assert (left @ left.t() - torch.eye(rank)).abs().max() < 1e-5
    within = before @ left.t() @ left  # projected on the new rows
    torch.testing.assert_close(within, before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scale", [0.0, 1e-18, 1.0, 1e12])
def test_rows_that_depend_on_each_other_are_made_up(scale: float) -> None:
    """Else a matrix that was zero once would never be heard of again."""
    left = scale * torch.ones(3, 50)
    compression.orthonormalise(left)
    assert (left @ left.t() - torch.eye(3)).abs().max() < 1e-5


def test_orthonormal_in_half_precision() -> None:
    left = torch.randn(2, 40, generator=torch.Generator().manual_seed(0)).bfloat16()
    compression.orthonormalise(left)
    assert (left @ left.t() - torch.eye(2)).abs().max() < 2e-2


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 4), st.integers(5, 30), st.integers(5, 30), st.integers(0, 1 << 20))
def test_a_matrix_of_low_rank_is_reproduced(rank: int, rows: int, cols: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(rows, rank, generator=generator) @ torch.randn(
        rank, cols, generator=generator
    )
    left, right = torch.empty(rank, rows), compression.starting_factor(rank, cols, generator)
    compression.left_factor(matrix, right, out=left)
    # Rounding grows as directions get alike; that a start may be a poor one is no fault.
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
def test_the_sum_is_that_of_a_dense_computation(world: int) -> None:
    """Textbook PowerSGD in float64 on one process: factors of the sum of what all ranks mean."""
    steps = 4
    results = reduced(world, steps)
    flat = results[0][0]
    generator = torch.Generator().manual_seed(20190531)
    for name, (rows, cols) in LARGE.items():
        right = torch.randn(RANK, cols, generator=generator).double().t()
        kept = [torch.zeros(rows, cols, dtype=torch.float64) for _ in range(world)]
        for step in range(steps):
            meant = [
                kept[rank] + matrix_of(flat, gradient(flat, rank, step), name)
                for rank in range(world)
            ]
            total = torch.stack(meant).sum(0)
            left = torch.linalg.qr(total @ right).Q
            right = total.t() @ left
            kept = [m - left @ left.t() @ m for m in meant]
            expected = (left @ right.t()).float()
            for _, _, sums in results:
                actual = matrix_of(flat, sums[step], name)
                torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
        for rank, (_, reducer, _) in enumerate(results):
            actual = matrix_of(flat, reducer.residual, name)
            torch.testing.assert_close(actual, kept[rank].float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("world", [2, 4])
def test_all_else_is_summed_exactly_and_padding_stays_zero(world: int) -> None:
    results = reduced(world, 2)
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


def test_the_result_is_the_same_bits_everywhere() -> None:
    results = reduced(3, 3)
    for _, _, sums in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(sums, results[0][2], strict=True))


@settings(max_examples=15, deadline=None, phases=UNSHRUNK)
@given(st.integers(2, 4), st.integers(1, 3), st.integers(1, 6))
def test_all_that_was_sent_and_the_residuals_are_all_gradients(
    world: int, rank: int, steps: int
) -> None:
    results = reduced(world, steps, rank)
    flat = results[0][0]
    brought = sum(gradient(flat, place, s) for place in range(world) for s in range(steps))
    left = sum(reducer.residual for _, reducer, _ in results)
    assert isinstance(left, Tensor) and left.any()
    for _, _, sums in results:
        torch.testing.assert_close(sum(sums) + left, brought, rtol=1e-4, atol=1e-4)


def low_rank(flat: FlatModel, rank: int, step: int) -> Tensor:
    """Gradients whose matrices have rank 1, in the same directions on every rank."""
    values = torch.zeros(flat.size)
    for name, (rows, cols) in LARGE.items():
        column = torch.linspace(-1, 2, rows)[:, None]
        matrix_of(flat, values, name).copy_(column * torch.linspace(1, 3, cols) * (rank + 1))
    return values


def test_gradients_of_low_rank_arrive_whole() -> None:
    for flat, reducer, sums in reduced(2, 2, 1, low_rank):
        torch.testing.assert_close(sums[1], low_rank(flat, 0, 1) + low_rank(flat, 1, 1))
        assert reducer.figures()["error_norm"] < 1e-5


def test_a_matrix_that_was_zero_is_heard_of_again() -> None:
    def late(flat: FlatModel, rank: int, step: int) -> Tensor:
        return low_rank(flat, rank, step) * (step > 0)

    for flat, _, sums in reduced(2, 3, 1, late):
        assert not sums[0].any()
        both = low_rank(flat, 0, 2) + low_rank(flat, 1, 2)
        total = sums[1] + sums[2]
        torch.testing.assert_close(total, 2 * both, rtol=1e-4, atol=1e-4)


def test_a_warm_start_finds_the_main_direction() -> None:
    """The same matrix step after step: without error feedback, factors approach the best ones."""
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
def test_bytes_are_those_of_the_formula(world: int) -> None:
    results = reduced(world, 2)
    flat = results[0][0]
    others = sum(slot.size for slot in flat.slots if slot.name not in LARGE)
    lefts = RANK * sum(rows for rows, _ in LARGE.values()) + others
    rights = RANK * sum(cols for _, cols in LARGE.values())
    for rank, (_, reducer, _) in enumerate(results):
        figures = reducer.figures()
        parts = [traffic_elements(n, rank, world) for n in (lefts, rights)]
        control = [8 * n for n in traffic_elements(control_size(len(flat.slots)), rank, world)]
        sent, received = (4 * sum(one) for one in zip(*parts, strict=True))
        steps = 2  # the figures were not asked for before
        assert figures["sent_bytes"] == steps * (sent + control[0])
        assert figures["received_bytes"] == steps * (received + control[1])
        plain = 4 * traffic_elements(flat.size, rank, world)[0]
        assert figures["saved_bytes"] == plain - sent > 0


def test_the_error_norm_is_that_of_what_was_not_sent() -> None:
    fabric, models = Fabric(2), [model() for _ in range(2)]

    def body(rank: int) -> tuple[list[float], list[float]]:
        flat = models[rank]
        reducer = PowerSGDReducer(flat, fabric.collective(rank), RANK)
        reported, expected = [], []
        for step in range(4):
            flat.grads.copy_(gradient(flat, rank, step))
            meant = reducer.residual + flat.grads
            reducer.finish(record_of(flat))
            reported.append(reducer.figures()["error_norm"])
            expected.append(float(reducer.residual.norm() / meant.norm()))
        return reported, expected

    for reported, expected in on_ranks(2, body):
        assert reported == pytest.approx(expected, rel=1e-4)
        assert all(0.1 < value < 1 for value in reported)


def test_a_model_without_large_matrices_is_summed_exactly() -> None:
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


def test_alone_the_gradient_stays_as_it_is() -> None:
    ((flat, reducer, sums),) = reduced(1, 2)
    assert torch.equal(sums[1], gradient(flat, 0, 1))
    assert not any(reducer.figures().values()) and not reducer.residual.any()
