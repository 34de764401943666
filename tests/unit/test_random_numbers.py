"""Random numbers are equal on all ranks, and for a sample in any process at any time."""

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


def draw_run(config: Job, data: Any, start: int = 0) -> dict[tuple[int, int], tuple[float, ...]]:
    """Return the numbers that each sample draws in each epoch, over all ranks."""
    sampler = make_sampler(config, data)
    found = {}
    for rank in range(config.scaling.world):
        steps = range(start, 2 * sampler.steps_per_epoch)
        batches = micro_batches(config, data, sampler, rank, steps, config.gradient_accumulation)
        for step in steps:
            for _ in sampler.micro_batches(step, rank, config.gradient_accumulation):
                torch.rand(rank + 1), np.random.rand(3), random.random()  # draws elsewhere
                for index, numbers in zip(*next(batches), strict=True):
                    found[sampler.epoch_of(step), int(index)] = tuple(numbers.tolist())
    return found


def test_samples_depend_on_seed_epoch_and_index_only() -> None:
    reference = draw_run(job(), Noise())
    assert len(reference) == 22
    for number in range(4):
        assert len({drawn[number] for drawn in reference.values()}) == 22, (
            "samples and epochs differ"
        )
    others = [job(2), job(3), job(8), job(accumulation=3), job(2, accumulation=2), job(1, 2)]
    for other in [*others, job(3, 1, 2)]:
        assert draw_run(other, Noise()) == reference, other
    replaced = draw_run(job(2), Noise(), start=4)
    assert replaced == {key: reference[key] for key in replaced}
    assert draw_run(job(seed=8), Noise()).values() != reference.values()


def test_subset_is_seeded_sample_by_sample() -> None:
    subset = Subset(Subset(Noise(), range(1, 11)), range(9))
    reference = draw_run(job(), subset)
    assert len({drawn[0] for drawn in reference.values()}) == 18
    assert draw_run(job(2, accumulation=2), subset) == reference


class ReadsBatches(Noise):
    def __getitems__(self, ids: list[int]) -> list[tuple[int, Tensor]]:
        return [self[index] for index in ids]


def test_getitems_is_seeded_batch_by_batch() -> None:
    reference = draw_run(job(), ReadsBatches())
    assert len({drawn[0] for drawn in reference.values()}) == 22
    assert draw_run(job(loaders=2), ReadsBatches()) == reference


def test_evaluation_samples_are_equal_each_time() -> None:
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
def test_data_without_random_numbers_is_not_seeded(data: Any, draws_numbers: bool) -> None:
    assert may_use_random(data) is draws_numbers


def test_reading_data_keeps_the_generator_state() -> None:
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


def test_seed_all_matches_a_plain_script() -> None:
    seed_all(5)
    found = torch.rand(2).tolist(), np.random.rand(2).tolist(), random.random()
    torch.manual_seed(5)
    np.random.seed(5)
    random.seed(5)
    assert found == (torch.rand(2).tolist(), np.random.rand(2).tolist(), random.random())


def draw_in_the_model(step: int, rank: int = 0, accumulation: int = 2, noise: bool = True) -> Any:
    prepared = prepare(job(2, accumulation=accumulation), Dropping(noise))
    work = WholeModel(prepared, lambda: None, rank, lambda: None)
    work.start(range(step, 6))
    work.gradients(step, Stopwatch())
    model: Any = prepared.flat.model
    return model.drawn


def test_dropout_is_seeded_by_step_and_rank() -> None:
    seed_step(7, 1, 0)
    expected = [draws(), draws()]
    assert draw_in_the_model(1) == expected
    assert draw_in_the_model(1, accumulation=1) == expected[:1]
    assert draw_in_the_model(1, noise=False) == expected, "data has its own generator"
    others = draw_in_the_model(2), draw_in_the_model(1, rank=1)
    numbers = [number for drawn in (expected, *others) for draw in drawn for number in draw]
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
        self.numbers = torch.rand(1).item(), np.random.rand(), random.random()
    def model(self): ...
    def train_data(self): ...
    def loss(self, outputs, targets): ...
"""
    )
    yield tmp_path
    sys.modules.pop("drawing", None)
    sys.path.remove(str(tmp_path))


def test_task_is_imported_and_created_with_seeded_generators(drawing_module: Path) -> None:
    found = []
    for _ in range(2):
        sys.modules.pop("drawing", None)
        draws()
        config = job(seed=9)
        task: Any = make_task(
            config, lambda: load_task_class("drawing:Drawing", str(drawing_module))
        )
        found.append((sys.modules["drawing"].TOP, task.numbers))
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


def test_model_and_data_are_equal_on_all_ranks() -> None:
    prepared = []
    for _ in range(2):
        draws()
        prepared.append(prepare(job(), FromNumpy()))
    first, second = prepared
    assert torch.equal(first.flat.params, second.flat.params)
    for data, other in ((first.data, second.data), (first.eval_data, second.eval_data)):
        assert data is not None
        assert other is not None
        assert torch.equal(data[0][0], other[0][0])
