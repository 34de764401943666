"""The random numbers of a train function."""

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


def test_a_model_that_is_made_after_the_loader_begins_as_the_loop_has_seeded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As in scripts of Ray Train's. Ranks share a process here, and its generators."""
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
def test_a_loop_that_seeds_itself_keeps_its_numbers(seed: int) -> None:
    """As under DDP; with the job's seed, too. At import is early enough."""
    drawn: dict[int, list[float]] = {}

    def train(config: Mapping[str, Any]) -> None:
        context = distplat.get_context()
        distplat.barrier()
        if context.rank == 0:  # ranks share a process here, and its generators
            torch.manual_seed(seed)
        distplat.barrier()
        distplat.prepare(nn.Linear(4, 1))
        distplat.barrier()
        if context.rank == 0:
            drawn[0] = torch.rand(3).tolist()

    call_on_ranks(train, 2)
    torch.manual_seed(seed)
    nn.Linear(4, 1), nn.Linear(4, 1)
    assert drawn[0] == torch.rand(3).tolist()


@pytest.mark.parametrize("seed", [0, 2**32 - 1, 2**40])
def test_a_function_draws_by_the_seed_of_the_job(seed: int) -> None:
    torch.manual_seed(seed)
    wanted = torch.rand(3).tolist()
    seed_function(seed)
    assert torch.rand(3).tolist() == wanted
    assert not user_seeded(seed)
    torch.manual_seed(seed)
    assert user_seeded(seed)


def draw(count: int) -> dict[str, list[float]]:
    """Give some numbers of each generator."""
    of_python = [random.random() for _ in range(count)]
    of_numpy = np.random.rand(count).tolist()
    return {"torch": torch.rand(count).tolist(), "numpy": of_numpy, "python": of_python}


@pytest.mark.sweep(2)
@pytest.mark.parametrize("seeds", [(), ("numpy",), ("python",), ("numpy", "python"), ("torch",)])
@pytest.mark.parametrize("drawn", [0, 5, 4000])
def test_a_generator_that_the_loop_has_seeded_stays_as_it_is(
    seeds: tuple[str, ...], drawn: int
) -> None:
    """By the job's seed, too, and whatever was drawn before and after."""
    ways: dict[str, Any] = {
        "torch": torch.manual_seed,
        "numpy": np.random.seed,
        "python": random.seed,
    }

    def after(rank: int, *, at_import: bool) -> dict[str, list[float]]:
        seed_function(7)
        draw(drawn)
        for one in seeds if at_import else ():
            ways[one](7)
        seed_again(7)
        draw(drawn)
        for one in () if at_import else seeds:
            ways[one](7)
        draw(drawn)
        seed_rank(7, 0, rank)
        return draw(3)

    for at_import in (True, False):
        first, second = after(0, at_import=at_import), after(1, at_import=at_import)
        alike = {name for name in ways if first[name] == second[name]}
        assert alike == ({*ways} if "torch" in seeds else {*seeds})
        for one in seeds:
            ways[one](7)
            draw(2 * drawn if at_import else drawn)
            assert draw(3)[one] == first[one]
