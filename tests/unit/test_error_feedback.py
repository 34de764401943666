"""Error feedback of compressed reducers where weights vary and parameters lack gradients."""

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rank_threads import UNSHRUNK, on_ranks
from torch import Tensor, nn

from distplat.strategies.fakes import Fabric
from distplat.strategies.loop.control import StepControl
from distplat.strategies.model.flat import FlatModel
from distplat.strategies.reduction.compressed import (
    CompressedReducer,
    PowerSGDReducer,
    TopKReducer,
)

REDUCERS: dict[str, Callable[..., CompressedReducer]] = {
    "topk": partial(TopKReducer, density=0.2),
    "powersgd": partial(PowerSGDReducer, rank=1),
}
STEP = st.tuples(
    st.lists(st.sampled_from([0.5, 1.0, 3.0, 20.0]), min_size=2, max_size=2),  # weights of ranks
    st.lists(st.booleans(), min_size=4, max_size=4).filter(any),  # parameters with a gradient
)


def model() -> FlatModel:
    torch.manual_seed(0)
    return FlatModel(nn.Sequential(nn.Linear(9, 8), nn.Linear(8, 6)))


def gradients(flat: FlatModel, seed: int, present: list[bool]) -> Tensor:
    """Return a random gradient, with zeros for parameters without one, and for the padding."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.zeros(flat.size)
    for slot, is_present in zip(flat.slots, present, strict=True):
        if is_present:
            values[slot.offset : slot.stop] = torch.randn(slot.size, generator=generator)
    return values


def gradients_of_updated(flat: FlatModel, present: list[bool]) -> Tensor:
    """Return the reduced gradient of the parameters that the optimizer updates."""
    values = torch.zeros(flat.size)
    for slot, is_present in zip(flat.slots, present, strict=True):
        if is_present:
            values[slot.offset : slot.stop] = flat.grads[slot.offset : slot.stop]
    return values


@pytest.mark.parametrize("method", REDUCERS)
@settings(max_examples=40, deadline=None, phases=UNSHRUNK)
@given(steps=st.lists(STEP, min_size=1, max_size=6))
def test_applied_gradients_and_residuals_add_up(
    method: str, steps: list[tuple[list[float], list[bool]]]
) -> None:
    """Each step applies `scale` times the sum, for parameters with a gradient on any rank."""
    fabric = Fabric(2)

    def train(rank: int) -> tuple[Tensor, Tensor, Tensor]:
        flat = model()
        reducer = REDUCERS[method](flat, fabric.collective(rank))
        computed, applied = torch.zeros(flat.size), torch.zeros(flat.size)
        for step, (weights, present) in enumerate(steps):
            flat.grads.copy_(gradients(flat, 10 * step + rank, present))
            local = StepControl(1.0, weights[rank], rank=rank, present=np.array(present))
            before = flat.grads.clone()
            total = reducer.finish(local)
            computed += before * total.scale
            applied += gradients_of_updated(flat, present) * total.scale
        return computed, applied, reducer.residual

    results = on_ranks(2, train)
    expected = sum(computed - residual for computed, _, residual in results)
    for _, applied, _ in results:
        torch.testing.assert_close(applied, expected, rtol=1e-4, atol=1e-4)
