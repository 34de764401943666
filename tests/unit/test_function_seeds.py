"""Seeds and random numbers in a train function."""

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from function_ranks import call_on_ranks
from plain_functions import data_of
from torch import nn
from torch.utils.data import (
    DataLoader,
)

import distplat
from distplat.strategies.function import function_session
from distplat.strategies.loop.seeding import seed_again, seed_function, seed_rank, user_seeded


def test_prepare_of_a_loader_does_not_seed_the_rank(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The model is created after the loader, as in scripts of Ray Train."""
    seeded: list[tuple[int, int]] = []
    monkeypatch.setattr(function_session, "seed_rank", lambda seed, *of: seeded.append(of))

    def train(config: Mapping[str, Any]) -> None:
        distplat.prepare(DataLoader(data_of(), batch_size=6))
        distplat.barrier()
        assert seeded == []
        distplat.barrier()
        distplat.prepare(nn.Linear(4, 1))

    call_on_ranks(train, 2)
    assert sorted(seeded) == [(0, 0), (0, 1)]


@pytest.mark.parametrize("seed", [0, 3])
def test_seed_of_the_loop_is_kept(seed: int) -> None:
    """As under DDP, also if it equals the seed of the job."""
    numbers: dict[int, list[float]] = {}

    def train(config: Mapping[str, Any]) -> None:
        context = distplat.get_context()
        distplat.barrier()
        if context.rank == 0:  # ranks share the generators of one process here
            torch.manual_seed(seed)
        distplat.barrier()
        distplat.prepare(nn.Linear(4, 1))
        distplat.barrier()
        if context.rank == 0:
            numbers[0] = torch.rand(3).tolist()

    call_on_ranks(train, 2)
    torch.manual_seed(seed)
    nn.Linear(4, 1), nn.Linear(4, 1)
    assert numbers[0] == torch.rand(3).tolist()


@pytest.mark.parametrize("seed", [0, 2**32 - 1, 2**40])
def test_seed_function_and_user_seeded(seed: int) -> None:
    torch.manual_seed(seed)
    expected = torch.rand(3).tolist()
    seed_function(seed)
    assert torch.rand(3).tolist() == expected
    assert not user_seeded(seed)
    torch.manual_seed(seed)
    assert user_seeded(seed)


def draw(count: int) -> dict[str, list[float]]:
    """Return random numbers of each generator."""
    python = [random.random() for _ in range(count)]
    numpy = np.random.rand(count).tolist()
    return {"torch": torch.rand(count).tolist(), "numpy": numpy, "python": python}


@pytest.mark.sweep(4)
@pytest.mark.parametrize("seeds", [(), ("numpy",), ("python",), ("numpy", "python"), ("torch",)])
@pytest.mark.parametrize("drawn", [0, 5, 4000])
def test_generators_seeded_by_the_loop_are_kept(seeds: tuple[str, ...], drawn: int) -> None:
    """Also with the seed of the job, and with numbers drawn before and after."""
    seed_functions: dict[str, Any] = {
        "torch": torch.manual_seed,
        "numpy": np.random.seed,
        "python": random.seed,
    }

    def numbers_after(rank: int, *, at_import: bool) -> dict[str, list[float]]:
        seed_function(7)
        draw(drawn)
        for name in seeds if at_import else ():
            seed_functions[name](7)
        seed_again(7)
        draw(drawn)
        for name in () if at_import else seeds:
            seed_functions[name](7)
        draw(drawn)
        seed_rank(7, 0, rank)
        return draw(3)

    for at_import in (True, False):
        first, second = (numbers_after(rank, at_import=at_import) for rank in (0, 1))
        equal = {name for name in seed_functions if first[name] == second[name]}
        assert equal == ({*seed_functions} if "torch" in seeds else {*seeds})
        for name in seeds:
            seed_functions[name](7)
            draw(2 * drawn if at_import else drawn)
            assert draw(3)[name] == first[name]
