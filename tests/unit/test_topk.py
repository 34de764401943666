"""Top-k compression: the exact entries, the sum over ranks, error feedback, and its figures."""

import pytest
import torch
from control_records import record_of
from hypothesis import given, settings
from hypothesis import strategies as st
from rank_threads import UNSHRUNK, on_ranks
from torch import Tensor, nn

from distplat.platform.errors import CollectiveError
from distplat.strategies.algorithms.compression import add_sparse, entries_sent, largest_indices
from distplat.strategies.algorithms.reduce import traffic_elements
from distplat.strategies.fakes import Fabric
from distplat.strategies.loop.control import control_size
from distplat.strategies.model.flat import FlatModel
from distplat.strategies.reduction.compressed import TopKReducer

FIGURES = {
    *("sent_bytes", "received_bytes", "waiting_s", "working_s", "exposed_s"),
    *("saved_bytes", "compress_s", "baseline_s", "saved_s", "error_norm"),
}


def largest_by_sorting(vector: Tensor, count: int) -> list[int]:
    """Return the indices of the `count` largest magnitudes by a stable sort."""
    sizes = vector.abs().nan_to_num(nan=torch.inf, posinf=torch.inf)
    order: list[int] = torch.sort(sizes, descending=True, stable=True).indices.tolist()
    return sorted(order[:count])


def gradient(flat: FlatModel, rank: int, step: int) -> Tensor:
    """Return a rank's random gradient of a step, with zeros in the padding."""
    values = torch.zeros(flat.size)
    for number, slot in enumerate(flat.slots):
        generator = torch.Generator().manual_seed(1000 * step + 10 * rank + number)
        part = values[slot.offset : slot.offset + slot.size]
        part.copy_(torch.randn(slot.size, generator=generator))
    return values


def small_model() -> FlatModel:
    torch.manual_seed(0)
    return FlatModel(nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3)))


ENTRIES = st.lists(
    st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.5, -2.5, 1e-30, torch.inf, -torch.inf, torch.nan])
    | st.floats(-1e6, 1e6, width=32),
    min_size=1,
    max_size=80,
)


@settings(max_examples=300, deadline=None)
@given(ENTRIES, st.data())
def test_largest_indices_match_sorting(entries: list[float], data: st.DataObject) -> None:
    count = data.draw(st.integers(1, len(entries)))
    vector = torch.tensor(entries, dtype=torch.float32)
    assert largest_indices(vector, count).tolist() == largest_by_sorting(vector, count)


def test_ties_are_broken_by_index() -> None:
    assert largest_indices(torch.tensor([1.0, -2.0, 2.0, 2.0, -2.0]), 3).tolist() == [1, 2, 3]


LONG_SIZE = 300_001
"""Larger than the sample and than a block."""


def unlike_its_sample() -> Tensor:
    """Return a vector whose sample gives a threshold that selects too few entries."""
    vector = torch.linspace(0.0, 1.0, LONG_SIZE)
    vector[::5] = 2.0  # the sample takes every 5th entry
    vector[2::5] += torch.arange(LONG_SIZE // 5 + 1).remainder(2)[: vector[2::5].numel()] * 0.5
    return vector


@pytest.mark.sweep(2)
@pytest.mark.parametrize("count", [1, 2, 3000, 150_000, LONG_SIZE - 1, LONG_SIZE])
@pytest.mark.parametrize(
    "vector",
    [
        torch.randn(LONG_SIZE, generator=torch.Generator().manual_seed(0)),
        torch.zeros(LONG_SIZE),
        torch.arange(LONG_SIZE).remainder(7).float(),
        torch.arange(LONG_SIZE).eq(77).float(),
        unlike_its_sample(),
    ],
    ids=["random", "zeros", "ties", "one", "unlike-its-sample"],
)
def test_largest_indices_of_a_long_vector(vector: Tensor, count: int) -> None:
    assert largest_indices(vector, count).tolist() == largest_by_sorting(vector, count)


def test_largest_indices_correct_a_misleading_sample() -> None:
    """Only every 5th entry is large, fewer than `count`."""
    vector = torch.zeros(LONG_SIZE)
    vector[::5] = 1.0 + torch.arange(LONG_SIZE // 5 + 1)
    count = 100_000  # the sample contains large entries only
    assert largest_indices(vector, count).tolist() == largest_by_sorting(vector, count)


@pytest.mark.parametrize(
    ("density", "size", "count"), [(0.01, 1000, 10), (1e-9, 1000, 1), (1.0, 7, 7), (0.25, 6, 2)]
)
def test_entries_sent(density: float, size: int, count: int) -> None:
    assert entries_sent(density, size) == count


def test_add_sparse_adds_in_rank_order() -> None:
    """In float32 1e8 + 1 - 1e8 is 0 and 1e8 - 1e8 + 1 is 1."""
    out, index = torch.zeros(3), torch.tensor([1], dtype=torch.int32)
    add_sparse(out, [index] * 3, [torch.tensor([v]) for v in (1e8, -1e8, 1.0)])
    assert out.tolist() == [0.0, 1.0, 0.0]
    out.zero_()
    add_sparse(out, [index] * 3, [torch.tensor([v]) for v in (1e8, 1.0, -1e8)])
    assert out.tolist() == [0.0, 0.0, 0.0]


@pytest.mark.sweep(3)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("density", [0.001, 0.1, 1.0])
def test_step_sends_the_largest_entries_and_keeps_the_residual(
    world: int, density: float, dtype: torch.dtype
) -> None:
    fabric = Fabric(world)
    models = [FlatModel(small_model().model.to(dtype)) for _ in range(world)]
    size = models[0].size
    count = entries_sent(density, size)
    residuals = [torch.zeros(size, dtype=dtype) for _ in range(world)]

    def make_reducer(rank: int) -> TopKReducer:
        return TopKReducer(models[rank], fabric.collective(rank), density)

    reducers = on_ranks(world, make_reducer)
    for step in range(3):
        expected = torch.zeros(size, dtype=dtype)
        for rank, flat in enumerate(models):
            flat.grads.copy_(gradient(flat, rank, step))
            total = residuals[rank] + flat.grads
            indices = largest_by_sorting(total, count)
            expected[indices] += total[indices]
            residuals[rank] = total.clone()
            residuals[rank][indices] = 0
        on_ranks(world, lambda rank: reducers[rank].finish(record_of(models[rank])))
        for rank, flat in enumerate(models):
            assert torch.equal(flat.grads, expected)
            assert torch.equal(reducers[rank].residual, residuals[rank])
            assert flat.model[0].weight.grad.data_ptr() == flat.grads.data_ptr()  # type: ignore


@settings(max_examples=25, deadline=None, phases=UNSHRUNK)
@given(st.integers(2, 4), st.floats(0.001, 1.0), st.integers(1, 6))
def test_sums_and_residuals_add_up_to_all_gradients(world: int, density: float, steps: int) -> None:
    fabric = Fabric(world)
    models = [small_model() for _ in range(world)]

    def reduce_steps(rank: int) -> tuple[Tensor, Tensor, Tensor]:
        flat = models[rank]
        reducer = TopKReducer(flat, fabric.collective(rank), density)
        gradients, sums = torch.zeros(flat.size), torch.zeros(flat.size)
        for step in range(steps):
            flat.grads.copy_(gradient(flat, rank, step))
            gradients += flat.grads
            reducer.finish(record_of(flat))
            sums += flat.grads
        return gradients, sums, reducer.residual

    results = on_ranks(world, reduce_steps)
    expected = sum(gradients - residual for gradients, _, residual in results)
    for _, sums, _ in results:
        torch.testing.assert_close(sums, expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(sums, results[0][1])


@pytest.mark.parametrize("world", [2, 3, 5])
@pytest.mark.parametrize("density", [0.02, 0.5])
def test_reported_bytes_match_the_formula(world: int, density: float) -> None:
    fabric = Fabric(world)

    def reduce_step(rank: int) -> dict[str, float]:
        flat = small_model()
        group = fabric.collective(rank)
        reducer = TopKReducer(flat, group, density)
        flat.grads.copy_(gradient(flat, rank, 0))
        group.broadcast(torch.zeros(5000))  # during setup: not counted
        reducer.finish(record_of(flat))
        group.broadcast(torch.zeros(1000))  # counted, although not part of the exchange
        return reducer.figures()

    size = small_model().size
    sent = entries_sent(density, size) * (4 + 4) * (world - 1)
    for rank, figures in enumerate(on_ranks(world, reduce_step)):
        assert set(figures) == FIGURES
        slots = len(small_model().slots)
        control = [8 * n for n in traffic_elements(control_size(slots), rank, world)]
        assert figures["sent_bytes"] == sent + control[0] + 4000 * (world - 1) * (rank == 0)
        assert figures["received_bytes"] == sent + control[1] + 4000 * (rank > 0)
        assert figures["saved_bytes"] == 4 * traffic_elements(size, rank, world)[0] - sent
        assert figures["compress_s"] > 0 and figures["baseline_s"] > 0


def test_error_norm_is_that_of_the_residual() -> None:
    fabric = Fabric(2)

    def reduce_steps(rank: int) -> tuple[list[float], list[float]]:
        flat = small_model()
        reducer = TopKReducer(flat, fabric.collective(rank), 0.3)
        reported, expected = [], []
        for step in range(3):
            flat.grads.copy_(gradient(flat, rank, step))
            total = reducer.residual + flat.grads
            reducer.finish(record_of(flat))
            reported.append(reducer.figures()["error_norm"])
            expected.append(float(reducer.residual.norm() / total.norm()))
        return reported, expected

    for reported, expected in on_ranks(2, reduce_steps):
        assert reported == pytest.approx(expected, rel=1e-5)
        assert all(0.1 < value < 0.9 for value in reported)


def test_all_zero_gradients_have_error_norm_0() -> None:
    """A rank without samples in a step has zero gradients, possibly on all ranks."""
    fabric = Fabric(2)

    def reduce_step(rank: int) -> tuple[Tensor, float]:
        flat = small_model()
        reducer = TopKReducer(flat, fabric.collective(rank), 0.1)
        reducer.finish(record_of(flat))
        return flat.grads, reducer.figures()["error_norm"]

    for grads, error in on_ranks(2, reduce_step):
        assert not grads.any() and error == 0.0


def test_nan_reaches_all_ranks() -> None:
    fabric = Fabric(2)

    def reduce_step(rank: int) -> Tensor:
        flat = small_model()
        reducer = TopKReducer(flat, fabric.collective(rank), 0.02, check_finite=False)
        flat.grads.copy_(gradient(flat, rank, 0))
        if rank == 1:
            flat.grads[5] = torch.nan
        reducer.finish(record_of(flat))
        return flat.grads

    assert all(grads[5].isnan() for grads in on_ranks(2, reduce_step))


def test_one_rank_does_not_compress() -> None:
    flat = small_model()
    reducer = TopKReducer(flat, Fabric(1).collective(0), 0.01)
    flat.grads.copy_(gradient(flat, 0, 0))
    reducer.finish(record_of(flat))
    assert torch.equal(flat.grads, gradient(flat, 0, 0))
    assert not any(reducer.figures().values()) and not reducer.residual.any()


def test_failed_exchange_keeps_the_residual_for_the_next_group() -> None:
    fabric = Fabric(2, timeout_s=0.3)
    fabric.kill(1, after=7)  # barrier, three baselines, two of step 0; then the last of step 1

    def fail_second_step(rank: int) -> TopKReducer:
        flat = small_model()
        reducer = TopKReducer(flat, fabric.collective(rank), 0.1)
        flat.grads.copy_(gradient(flat, rank, 0))
        reducer.finish(record_of(flat))
        before = reducer.residual.clone()
        flat.grads.copy_(gradient(flat, rank, 1))
        with pytest.raises(CollectiveError):
            reducer.finish(record_of(flat))
        assert torch.equal(reducer.residual, before) and before.any()
        return reducer

    old_reducers = on_ranks(2, fail_second_step)
    new_fabric = Fabric(2)

    def next_group(rank: int) -> bool:
        flat = small_model()
        reducer = TopKReducer(flat, new_fabric.collective(rank), 0.1)
        if rank == 0:  # rank 1 is a new worker without a residual
            reducer.inherit(old_reducers[0])
            return torch.equal(reducer.residual, old_reducers[0].residual)
        return not reducer.residual.any()

    assert on_ranks(2, next_group) == [True, True]


def test_too_many_parameters_for_int32_are_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distplat.strategies.reduction.compressed._MOST_ELEMENTS", 10)
    with pytest.raises(ValueError, match="at most 10 parameters"):
        TopKReducer(small_model(), Fabric(1).collective(0), 0.1)
