"""Loaders of train functions with the user's sampler: its order is split over the ranks."""

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from function_ranks import call_on_ranks, function_job
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

import distplat
from distplat.platform.errors import SpecError
from distplat.strategies.function.sharded_sampler import ShardedSampler

SAMPLES = 22


def data() -> TensorDataset:
    inputs = torch.randn(SAMPLES, 4, generator=torch.Generator().manual_seed(1)).double()
    return TensorDataset(inputs, inputs.sum(1, keepdim=True).sin(), torch.arange(SAMPLES))


class RotatingSampler(Sampler[int]):
    """All samples in reverse order; each epoch starts at another sample."""

    def __init__(self, size: int = SAMPLES) -> None:
        self.epoch, self.size = 0, size

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        return iter([(3 * self.epoch - place) % SAMPLES for place in range(SAMPLES)])


SAMPLERS: list[Callable[[], Any]] = [
    lambda: WeightedRandomSampler([1.0, 5.0, 2.0, 9.0], 13),
    lambda: SubsetRandomSampler(range(3, 10)),
    lambda: RandomSampler(range(5), replacement=True, num_samples=11),
    lambda: RandomSampler(range(9), num_samples=4),
    lambda: [4, 2, 0, 1, 3],
    RotatingSampler,
]


@pytest.mark.parametrize("make_sampler", SAMPLERS)
@pytest.mark.parametrize("drop_last", [False, True])
def test_ranks_share_one_order(make_sampler: Callable[[], Any], drop_last: bool) -> None:
    full = ShardedSampler(make_sampler(), 0, 1, 7, drop_last=drop_last)
    for world in (2, 3):
        parts = [
            ShardedSampler(make_sampler(), rank, world, 7, drop_last=drop_last)
            for rank in range(world)
        ]
        for epoch in (0, 1, 0):
            orders = []
            for number, sampler in enumerate((full, *parts)):
                torch.manual_seed(number)  # must have no effect
                sampler.set_epoch(epoch)
                orders.append([*sampler])
            order, *orders = orders
            assert {len(sampler) for sampler in orders} == {len(parts[0])}
            merged = [sample for samples in zip(*orders, strict=True) for sample in samples]
            repeated = (order * world)[: len(merged)]
            assert merged == repeated and abs(len(merged) - len(order)) < world
            assert {sampler.fingerprint for sampler in parts} == {full.fingerprint}


def test_order_depends_on_epoch_and_seed() -> None:
    orders = set()
    for seed in (1, 2):
        sampler = ShardedSampler(
            RandomSampler(range(30), replacement=True), 0, 1, seed, drop_last=False
        )
        for epoch in range(3):
            sampler.set_epoch(epoch)
            orders.add((*sampler,))
    assert len(orders) == 6


def make_model() -> nn.Module:
    model = nn.Linear(4, 1).double()
    with torch.no_grad():
        model.weight.fill_(0.3)
        model.bias.zero_()
    return model


def train_loop(world: int, prepare: Callable[..., Any]) -> tuple[nn.Module, list[Tensor]]:
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sampler, batches = RotatingSampler(), []
    sampler.set_epoch(5)  # like after a restart
    loader = DataLoader(data(), batch_size=4 // world, sampler=sampler)
    model, optimizer, loader = prepare(model, optimizer, loader)
    for epoch in (5, 6, 2):
        if not isinstance(loader, DataLoader) and epoch == 6:
            pass  # the prepared loader increments the epoch
        else:
            sampler.set_epoch(epoch)
        for inputs, targets, numbers in loader:
            batches.append(numbers)
            optimizer.zero_grad()
            torch.autograd.backward((model(inputs) - targets).square().mean())
            optimizer.step()
    return model, batches


@pytest.mark.parametrize("strategy", ["ring", "ps-sync"])
def test_loop_matches_one_process(strategy: str) -> None:
    rank_batches: dict[int, list[Tensor]] = {}

    def train(config: Mapping[str, Any]) -> None:
        rank_batches[distplat.get_context().get_world_rank()] = train_loop(2, distplat.prepare)[1]

    run = call_on_ranks(train, job=function_job(2, strategy=strategy))
    model, batches = train_loop(1, lambda *things: things)
    for first, second, expected in zip(rank_batches[0], rank_batches[1], batches, strict=True):
        assert torch.equal(torch.stack([first, second], 1).flatten(), expected)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(run.trained[1][name], value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("sampler", "numbers"),
    [
        ([1, 3, 5, 7, 9, 11, 13], [1, 3, 5, 7, 9, 11, 13]),
        (SequentialSampler(range(10)), [*range(10)]),
    ],
)
def test_gather_for_metrics_drops_padding(sampler: Any, numbers: list[int]) -> None:
    results: list[list[int]] = []

    def train(config: Mapping[str, Any]) -> None:
        loader = distplat.prepare(DataLoader(data(), 2, sampler=sampler))
        gathered = [distplat.gather_for_metrics(batch[2]) for batch in loader]
        results.append(sorted(torch.cat(gathered).tolist()))

    call_on_ranks(train, 3)
    assert results == [numbers] * 3


class Endless:
    def __iter__(self) -> Iterator[int]:
        return iter([0])


class Unending:
    def __len__(self) -> int:
        return 5

    def __iter__(self) -> Iterator[int]:
        return itertools.chain(range(100), unbounded())


class Long:
    """Sampler of many passes over the data set."""

    def __len__(self) -> int:
        return 10**10

    def __iter__(self) -> Iterator[int]:
        return unbounded()


def unbounded() -> Iterator[Any]:
    raise AssertionError("more samples were drawn than needed to detect the wrong length")
    yield


def seeded_sampler() -> Any:
    return WeightedRandomSampler([1.0] * SAMPLES, 9, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(
    ("make_sampler", "message"),
    [
        (seeded_sampler, "WeightedRandomSampler, which yields another order in each"),
        (Endless, "Endless, which has no length"),
        (
            lambda: RotatingSampler(7),
            "RotatingSampler, which yields 8 or more samples and whose length is 7",
        ),
        (
            lambda: RotatingSampler(30),
            "RotatingSampler, which yields 22 samples and whose length is 30",
        ),
        (Unending, "Unending, which yields 6 or more samples and whose length is 5"),
        (Long, "Long, which yields 10000000000 samples in a pass over 22"),
    ],
)
def test_rejects_sampler_without_order(make_sampler: Callable[[], Any], message: str) -> None:
    def train(config: Mapping[str, Any]) -> None:
        distplat.prepare(DataLoader(data(), 2, sampler=make_sampler()))

    with pytest.raises(SpecError, match=message):
        call_on_ranks(train, 1)


class OwnBatches(BatchSampler):
    pass


class Unsized(Dataset[int]):
    def __getitem__(self, index: int) -> int:
        return index


@pytest.mark.parametrize(
    ("make_loader", "message"),
    [
        (
            lambda: DataLoader(data(), batch_sampler=OwnBatches(Long(), 2, drop_last=False)),
            "OwnBatches, which yields 5000000000 batches in a pass over 22 samples",
        ),
        (
            lambda: DataLoader(data(), None, sampler=OwnBatches(Long(), 2, drop_last=False)),
            "OwnBatches, which yields 5000000000 batches in a pass over 22 samples",
        ),
        (
            lambda: DataLoader(Unsized(), 2, sampler=Long()),
            "Long, which yields 10000000000 samples in a pass\n",
        ),
        (
            lambda: DataLoader(Unsized(), batch_sampler=OwnBatches(Long(), 2, drop_last=False)),
            "OwnBatches, which yields 5000000000 batches in a pass\n",
        ),
    ],
)
def test_rejects_sampler_of_many_passes_without_drawing(
    make_loader: Callable[[], DataLoader[Any]], message: str
) -> None:
    def train(config: Mapping[str, Any]) -> None:
        distplat.prepare(make_loader())

    with pytest.raises(SpecError, match=message):
        call_on_ranks(train, 1)


def test_accepts_sampler_with_many_repetitions() -> None:
    def train(config: Mapping[str, Any]) -> None:
        sampler = RandomSampler(data(), replacement=True, num_samples=SAMPLES * 101)
        assert len(distplat.prepare(DataLoader(data(), 101, sampler=sampler))) == SAMPLES

    call_on_ranks(train, 1)


class DivergingSampler(RotatingSampler):
    """Sampler whose order differs between ranks from an epoch on."""

    def __init__(self, since: int) -> None:
        super().__init__()
        self.since, self.rank = since, distplat.get_context().get_world_rank()

    def __iter__(self) -> Iterator[int]:
        return iter(range(SAMPLES) if self.epoch < self.since else [self.rank] * SAMPLES)


@pytest.mark.parametrize(
    ("since", "error", "message"),
    [
        (0, SpecError, "sampler that yields another order on rank 1 than on rank 0"),
        (1, ValueError, "in step 4 worker-.*its sampler gave another order"),
    ],
)
def test_reports_ranks_with_different_orders(
    since: int, error: type[Exception], message: str
) -> None:
    def train(config: Mapping[str, Any]) -> None:
        loader = DataLoader(data(), 4, sampler=DivergingSampler(since))
        model, loader = distplat.prepare(make_model(), loader)
        for _ in range(2):
            for inputs, targets, _ in loader:
                torch.autograd.backward((model(inputs) - targets).square().mean())
                distplat.report({"loss": 0.0})

    with pytest.raises(error, match=message):
        call_on_ranks(train, 2)
