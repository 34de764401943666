"""Top-k: the exact entries, the sum over ranks, error feedback, and what it costs."""

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


def by_sorting(vector: Tensor, count: int) -> list[int]:
    """The reference: sort all by magnitude, equal ones in the order of their places."""
    sizes = vector.abs().nan_to_num(nan=torch.inf, posinf=torch.inf)
    order: list[int] = torch.sort(sizes, descending=True, stable=True).indices.tolist()
    return sorted(order[:count])


def gradient(flat: FlatModel, rank: int, step: int) -> Tensor:
    """What one rank brings to one step: zero where the flat vector is padding."""
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
def test_largest_is_what_sorting_gives(entries: list[float], data: st.DataObject) -> None:
    count = data.draw(st.integers(1, len(entries)))
    vector = torch.tensor(entries, dtype=torch.float32)
    assert largest_indices(vector, count).tolist() == by_sorting(vector, count)


def test_of_equal_entries_the_first_win() -> None:
    assert largest_indices(torch.tensor([1.0, -2.0, 2.0, 2.0, -2.0]), 3).tolist() == [1, 2, 3]


LONG = 300_001
"""Longer than the sample and than a block."""


def hidden_from_the_sample() -> Tensor:
    """Large only where the sample does not look, so that its first guesses find too few."""
    vector = torch.linspace(0.0, 1.0, LONG)
    vector[::5] = 2.0  # the sample takes every 5th entry
    vector[2::5] += torch.arange(LONG // 5 + 1).remainder(2)[: vector[2::5].numel()] * 0.5
    return vector


@pytest.mark.sweep(2)
@pytest.mark.parametrize("count", [1, 2, 3000, 150_000, LONG - 1, LONG])
@pytest.mark.parametrize(
    "vector",
    [
        torch.randn(LONG, generator=torch.Generator().manual_seed(0)),
        torch.zeros(LONG),
        torch.arange(LONG).remainder(7).float(),
        torch.arange(LONG).eq(77).float(),
        hidden_from_the_sample(),
    ],
    ids=["random", "zeros", "ties", "one", "unlike-its-sample"],
)
def test_largest_of_a_long_vector(vector: Tensor, count: int) -> None:
    assert largest_indices(vector, count).tolist() == by_sorting(vector, count)


def test_a_bad_sample_is_mended() -> None:
    """Every 5th entry is large, and of those fewer than asked for."""
    vector = torch.zeros(LONG)
    vector[::5] = 1.0 + torch.arange(LONG // 5 + 1)
    count = 100_000  # the sample thinks that all entries are as large
    assert largest_indices(vector, count).tolist() == by_sorting(vector, count)


@pytest.mark.parametrize(
    ("density", "size", "count"), [(0.01, 1000, 10), (1e-9, 1000, 1), (1.0, 7, 7), (0.25, 6, 2)]
)
def test_entries_sent(density: float, size: int, count: int) -> None:
    assert entries_sent(density, size) == count


def test_add_sparse_adds_rank_after_rank() -> None:
    """In float32 1e8 + 1 - 1e8 is 0 and 1e8 - 1e8 + 1 is 1: the order shows."""
    out, place = torch.zeros(3), torch.tensor([1], dtype=torch.int32)
    add_sparse(out, [place] * 3, [torch.tensor([v]) for v in (1e8, -1e8, 1.0)])
    assert out.tolist() == [0.0, 1.0, 0.0]
    out.zero_()
    add_sparse(out, [place] * 3, [torch.tensor([v]) for v in (1e8, 1.0, -1e8)])
    assert out.tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("density", [0.001, 0.1, 1.0])
def test_each_step_sends_the_largest_and_keeps_the_rest(
    world: int, density: float, dtype: torch.dtype
) -> None:
    fabric = Fabric(world)
    models = [FlatModel(small_model().model.to(dtype)) for _ in range(world)]
    size = models[0].size
    count = entries_sent(density, size)
    kept = [torch.zeros(size, dtype=dtype) for _ in range(world)]  # the reference's residuals

    def body(rank: int) -> TopKReducer:
        return TopKReducer(models[rank], fabric.collective(rank), density)

    reducers = on_ranks(world, body)
    for step in range(3):
        expected = torch.zeros(size, dtype=dtype)
        for rank, flat in enumerate(models):
            flat.grads.copy_(gradient(flat, rank, step))
            meant = kept[rank] + flat.grads
            places = by_sorting(meant, count)
            expected[places] += meant[places]
            kept[rank] = meant.clone()
            kept[rank][places] = 0
        on_ranks(world, lambda rank: reducers[rank].finish(record_of(models[rank])))
        for rank, flat in enumerate(models):
            assert torch.equal(flat.grads, expected)
            assert torch.equal(reducers[rank].residual, kept[rank])
            assert flat.model[0].weight.grad.data_ptr() == flat.grads.data_ptr()  # type: ignore


@settings(max_examples=25, deadline=None, phases=UNSHRUNK)
@given(st.integers(2, 4), st.floats(0.001, 1.0), st.integers(1, 6))
def test_all_that_was_sent_and_the_residuals_are_all_gradients(
    world: int, density: float, steps: int
) -> None:
    fabric = Fabric(world)
    models = [small_model() for _ in range(world)]

    def body(rank: int) -> tuple[Tensor, Tensor, Tensor]:
        flat = models[rank]
        reducer = TopKReducer(flat, fabric.collective(rank), density)
        mine, sums = torch.zeros(flat.size), torch.zeros(flat.size)
        for step in range(steps):
            flat.grads.copy_(gradient(flat, rank, step))
            mine += flat.grads
            reducer.finish(record_of(flat))
            sums += flat.grads
        return mine, sums, reducer.residual

    results = on_ranks(world, body)
    everything = sum(mine - residual for mine, _, residual in results)
    for _, sums, _ in results:
        torch.testing.assert_close(sums, everything, rtol=1e-5, atol=1e-5)
        assert torch.equal(sums, results[0][1])


@pytest.mark.parametrize("world", [2, 3, 5])
@pytest.mark.parametrize("density", [0.02, 0.5])
def test_bytes_are_those_of_the_formula(world: int, density: float) -> None:
    fabric = Fabric(world)

    def body(rank: int) -> dict[str, float]:
        flat = small_model()
        group = fabric.collective(rank)
        reducer = TopKReducer(flat, group, density)
        flat.grads.copy_(gradient(flat, rank, 0))
        group.broadcast(torch.zeros(5000))  # while setting up: no step's
        reducer.finish(record_of(flat))
        group.broadcast(torch.zeros(1000))  # the step's, not the exchange's
        return reducer.figures()

    size = small_model().size
    sent = entries_sent(density, size) * (4 + 4) * (world - 1)
    for rank, figures in enumerate(on_ranks(world, body)):
        assert set(figures) == FIGURES
        slots = len(small_model().slots)
        control = [8 * n for n in traffic_elements(control_size(slots), rank, world)]
        assert figures["sent_bytes"] == sent + control[0] + 4000 * (world - 1) * (rank == 0)
        assert figures["received_bytes"] == sent + control[1] + 4000 * (rank > 0)
        assert figures["saved_bytes"] == 4 * traffic_elements(size, rank, world)[0] - sent
        assert figures["compress_s"] > 0 and figures["baseline_s"] > 0


def test_the_error_norm_is_that_of_what_was_not_sent() -> None:
    fabric = Fabric(2)

    def body(rank: int) -> tuple[list[float], list[float]]:
        flat = small_model()
        reducer = TopKReducer(flat, fabric.collective(rank), 0.3)
        reported, expected = [], []
        for step in range(3):
            flat.grads.copy_(gradient(flat, rank, step))
            meant = reducer.residual + flat.grads
            reducer.finish(record_of(flat))
            reported.append(reducer.figures()["error_norm"])
            expected.append(float(reducer.residual.norm() / meant.norm()))
        return reported, expected

    for reported, expected in on_ranks(2, body):
        assert reported == pytest.approx(expected, rel=1e-5)
        assert all(0.1 < value < 0.9 for value in reported)


def test_nothing_is_meant_and_nothing_goes_wrong() -> None:
    """A rank without samples in a step brings zeros; so may all."""
    fabric = Fabric(2)

    def body(rank: int) -> tuple[Tensor, float]:
        flat = small_model()
        reducer = TopKReducer(flat, fabric.collective(rank), 0.1)
        reducer.finish(record_of(flat))
        return flat.grads, reducer.figures()["error_norm"]

    for grads, error in on_ranks(2, body):
        assert not grads.any() and error == 0.0


def test_a_nan_reaches_everybody() -> None:
    fabric = Fabric(2)

    def body(rank: int) -> Tensor:
        flat = small_model()
        reducer = TopKReducer(flat, fabric.collective(rank), 0.02, check_finite=False)
        flat.grads.copy_(gradient(flat, rank, 0))
        if rank == 1:
            flat.grads[5] = torch.nan
        reducer.finish(record_of(flat))
        return flat.grads

    assert all(grads[5].isnan() for grads in on_ranks(2, body))


def test_alone_the_gradient_stays_as_it_is() -> None:
    flat = small_model()
    reducer = TopKReducer(flat, Fabric(1).collective(0), 0.01)
    flat.grads.copy_(gradient(flat, 0, 0))
    reducer.finish(record_of(flat))
    assert torch.equal(flat.grads, gradient(flat, 0, 0))
    assert not any(reducer.figures().values()) and not reducer.residual.any()


def test_an_exchange_that_failed_leaves_the_residual_for_the_next_group() -> None:
    fabric = Fabric(2, timeout_s=0.3)
    fabric.kill(1, after=7)  # a barrier, three baselines, a step of two; then the second's last

    def body(rank: int) -> TopKReducer:
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

    olds = on_ranks(2, body)
    again = Fabric(2)

    def next_group(rank: int) -> bool:
        flat = small_model()
        reducer = TopKReducer(flat, again.collective(rank), 0.1)
        if rank == 0:  # rank 1 is new and has none
            reducer.inherit(olds[0])
            return torch.equal(reducer.residual, olds[0].residual)
        return not reducer.residual.any()

    assert on_ranks(2, next_group) == [True, True]


def test_too_many_parameters_for_an_int32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distplat.strategies.reduction.compressed._MOST_ELEMENTS", 10)
    with pytest.raises(ValueError, match="at most 10 parameters"):
        TopKReducer(small_model(), Fabric(1).collective(0), 0.1)
