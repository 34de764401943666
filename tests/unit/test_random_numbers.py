"""Random numbers: the same on all ranks, and for a sample whoever reads it, whenever."""

import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from random_draws import Dropping, Noise, draws, job
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, Subset, TensorDataset

from distplat.actors.task_loading import load_task_class
from distplat.platform.spec import Job
from distplat.strategies.loop.batches import (
    EvalLoader,
    make_sampler,
    may_use_random,
    micro_batches,
    one_batch,
)
from distplat.strategies.loop.compute import Stopwatch, WholeModel
from distplat.strategies.loop.seeding import preserve_rng_state, seed_all, seed_step
from distplat.strategies.loop.session import make_task, prepare

pytestmark = pytest.mark.usefixtures("loader_server")


def drawn_in_a_run(one: Job, data: Any, start: int = 0) -> dict[tuple[int, int], tuple[float, ...]]:
    """Give what each sample drew in each epoch, over all ranks."""
    sampler = make_sampler(one, data)
    found = {}
    for rank in range(one.scaling.world):
        steps = range(start, 2 * sampler.steps_per_epoch)
        batches = micro_batches(one, data, sampler, rank, steps, one.gradient_accumulation)
        for step in steps:
            for _ in sampler.micro_batches(step, rank, one.gradient_accumulation):
                torch.rand(rank + 1), np.random.rand(3), random.random()  # what others do
                for index, numbers in zip(*next(batches), strict=True):
                    found[sampler.epoch_of(step), int(index)] = tuple(numbers.tolist())
    return found


def test_samples_draw_by_seed_epoch_and_place_alone() -> None:
    alone = drawn_in_a_run(job(), Noise())
    assert len(alone) == 22
    for number in range(4):
        assert len({drawn[number] for drawn in alone.values()}) == 22, "samples and epochs differ"
    others = [job(2), job(3), job(8), job(accumulation=3), job(2, accumulation=2), job(1, 2)]
    for other in [*others, job(3, 1, 2)]:
        assert drawn_in_a_run(other, Noise()) == alone, other
    replaced = drawn_in_a_run(job(2), Noise(), start=4)
    assert replaced == {key: alone[key] for key in replaced}
    assert drawn_in_a_run(job(seed=8), Noise()).values() != alone.values()


def test_a_part_of_a_data_set_is_seeded_sample_by_sample() -> None:
    part = Subset(Subset(Noise(), range(1, 11)), range(9))
    alone = drawn_in_a_run(job(), part)
    assert len({drawn[0] for drawn in alone.values()}) == 18
    assert drawn_in_a_run(job(2, accumulation=2), part) == alone


class Together(Noise):
    def __getitems__(self, ids: list[int]) -> list[tuple[int, Tensor]]:
        return [self[index] for index in ids]


def test_a_data_set_that_reads_whole_batches_has_one_seed_for_each() -> None:
    alone = drawn_in_a_run(job(), Together())
    assert len({drawn[0] for drawn in alone.values()}) == 22
    assert drawn_in_a_run(job(loaders=2), Together()) == alone


def test_evaluation_samples_draw_the_same_each_time() -> None:
    found = []
    for loaders, size in ((0, 4), (0, 3), (2, 4)):
        batches = EvalLoader(job(loaders=loaders), Dropping()).batches(Noise(), range(2, 9), size)
        found.append(torch.cat([numbers for (_, numbers), _ in batches]).tolist())
    assert found[0] == found[1] == found[2]
    assert len({numbers[0] for numbers in found[0]}) == 7


@pytest.mark.parametrize(
    ("data", "draws_numbers"),
    [
        (TensorDataset(torch.zeros(3)), False),
        ([1, 2, 3], False),
        (Subset(ConcatDataset([TensorDataset(torch.zeros(3))]), [0]), False),
        (Subset(ConcatDataset([TensorDataset(torch.zeros(3)), Noise()]), [0]), True),
        (type("Other", (TensorDataset,), {})(torch.zeros(3)), True),
    ],
)
def test_data_that_cannot_draw_is_not_seeded(data: Any, draws_numbers: bool) -> None:
    assert may_use_random(data) is draws_numbers


def test_reading_data_leaves_the_generators_where_they_were() -> None:
    seed_all(3)
    expected = draws(), draws()
    seed_all(3)
    first = draws()
    one_batch(Noise(), [1, 2])
    assert (first, draws()) == expected
    seed_all(3)
    with preserve_rng_state():
        seed_all(4)
        draws()
    assert draws() == expected[0]


def test_the_seed_is_the_one_that_a_plain_script_would_set() -> None:
    seed_all(5)
    found = torch.rand(2).tolist(), np.random.rand(2).tolist(), random.random()
    torch.manual_seed(5)
    np.random.seed(5)
    random.seed(5)
    assert found == (torch.rand(2).tolist(), np.random.rand(2).tolist(), random.random())


def drawn_by_the_model(step: int, rank: int = 0, accumulation: int = 2, noise: bool = True) -> Any:
    one = job(2, accumulation=accumulation)
    prepared = prepare(one, Dropping(noise))
    work = WholeModel(prepared, lambda: None, rank, lambda: None)
    work.start(range(step, 6))
    work.gradients(step, Stopwatch())
    model: Any = prepared.flat.model
    return model.drawn


def test_dropout_is_seeded_by_step_and_rank_and_goes_on_over_micro_batches() -> None:
    seed_step(7, 1, 0)
    expected = [draws(), draws()]
    assert drawn_by_the_model(1) == expected
    assert drawn_by_the_model(1, accumulation=1) == expected[:1]
    assert drawn_by_the_model(1, noise=False) == expected, "data draws from numbers of its own"
    others = drawn_by_the_model(2), drawn_by_the_model(1, rank=1)
    numbers = [number for drawn in (expected, *others) for one in drawn for number in one]
    assert len(set(numbers)) == len(numbers)


@pytest.fixture
def drawing_module(tmp_path: Path) -> Iterator[Path]:
    (tmp_path / "drawing.py").write_text(
        """
import random
import numpy as np
import torch
from distplat import Task
TOP = torch.rand(1).item(), np.random.rand(), random.random()
class Drawing(Task):
    def __init__(self):
        self.made = torch.rand(1).item(), np.random.rand(), random.random()
    def model(self): ...
    def train_data(self): ...
    def loss(self, outputs, targets): ...
"""
    )
    yield tmp_path
    sys.modules.pop("drawing", None)
    sys.path.remove(str(tmp_path))


def test_a_task_is_imported_and_made_with_seeded_generators(drawing_module: Path) -> None:
    found = []
    for _ in range(2):
        sys.modules.pop("drawing", None)
        draws()
        one = job(seed=9)
        task: Any = make_task(one, lambda: load_task_class("drawing:Drawing", str(drawing_module)))
        found.append((sys.modules["drawing"].TOP, task.made))
    seed_all(9)
    numbers = torch.rand(1).item(), np.random.rand(), random.random()
    assert found == [(numbers, numbers)] * 2


class FromNumpy(Dropping):
    def model(self) -> nn.Module:
        model = nn.Linear(4, 1)
        model.weight.data = torch.tensor(np.random.randn(1, 4) + random.random()).float()
        return model

    def train_data(self) -> Any:
        return TensorDataset(torch.tensor(np.random.rand(8, 4)), torch.zeros(8))

    def eval_data(self) -> Any:
        return TensorDataset(torch.tensor([[random.random()]]), torch.zeros(1))


def test_model_and_data_are_the_same_on_all_ranks() -> None:
    prepared = []
    for _ in range(2):
        draws()
        prepared.append(prepare(job(), FromNumpy()))
    one, other = prepared
    assert torch.equal(one.flat.params, other.flat.params)
    for mine, its in ((one.data, other.data), (one.eval_data, other.eval_data)):
        assert mine is not None
        assert its is not None
        assert torch.equal(mine[0][0], its[0][0])
