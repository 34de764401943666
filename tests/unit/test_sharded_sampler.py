"""Loaders of train functions that have a sampler of their own: ranks share its order."""

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


class Turning(Sampler[int]):
    """All samples, backwards, from another one on in each epoch."""

    def __init__(self, size: int = SAMPLES) -> None:
        self.epoch, self.size = 0, size

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        return iter([(3 * self.epoch - place) % SAMPLES for place in range(SAMPLES)])


MADE: list[Callable[[], Any]] = [
    lambda: WeightedRandomSampler([1.0, 5.0, 2.0, 9.0], 13),
    lambda: SubsetRandomSampler(range(3, 10)),
    lambda: RandomSampler(range(5), replacement=True, num_samples=11),
    lambda: RandomSampler(range(9), num_samples=4),
    lambda: [4, 2, 0, 1, 3],
    Turning,
]


@pytest.mark.parametrize("made", MADE)
@pytest.mark.parametrize("drop_last", [False, True])
def test_ranks_share_one_order(made: Callable[[], Any], drop_last: bool) -> None:
    whole = ShardedSampler(made(), 0, 1, 7, drop_last=drop_last)
    for world in (2, 3):
        parts = [
            ShardedSampler(made(), rank, world, 7, drop_last=drop_last) for rank in range(world)
        ]
        for epoch in (0, 1, 0):
            dealt = []
            for number, one in enumerate((whole, *parts)):
                torch.manual_seed(number)  # has no part in it
                one.set_epoch(epoch)
                dealt.append([*one])
            order, *dealt = dealt
            assert {len(one) for one in dealt} == {len(parts[0])}
            together = [sample for some in zip(*dealt, strict=True) for sample in some]
            repeated = (order * world)[: len(together)]
            assert together == repeated and abs(len(together) - len(order)) < world
            assert {one.fingerprint for one in parts} == {whole.fingerprint}


def test_each_epoch_and_seed_has_an_order_of_its_own() -> None:
    found = set()
    for seed in (1, 2):
        one = ShardedSampler(
            RandomSampler(range(30), replacement=True), 0, 1, seed, drop_last=False
        )
        for epoch in range(3):
            one.set_epoch(epoch)
            found.add((*one,))
    assert len(found) == 6


def model_of() -> nn.Module:
    model = nn.Linear(4, 1).double()
    with torch.no_grad():
        model.weight.fill_(0.3)
        model.bias.zero_()
    return model


def trained(world: int, prepare: Callable[..., Any]) -> tuple[nn.Module, list[Tensor]]:
    model = model_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sampler, seen = Turning(), []
    sampler.set_epoch(5)  # as after a restart
    loader = DataLoader(data(), batch_size=4 // world, sampler=sampler)
    model, optimizer, loader = prepare(model, optimizer, loader)
    for epoch in (5, 6, 2):
        if not isinstance(loader, DataLoader) and epoch == 6:
            pass  # the next epoch follows by itself
        else:
            sampler.set_epoch(epoch)
        for inputs, targets, numbers in loader:
            seen.append(numbers)
            optimizer.zero_grad()
            torch.autograd.backward((model(inputs) - targets).square().mean())
            optimizer.step()
    return model, seen


@pytest.mark.parametrize("strategy", ["ring", "ps-sync"])
def test_a_loop_trains_as_one_process(strategy: str) -> None:
    seen: dict[int, list[Tensor]] = {}

    def train(config: Mapping[str, Any]) -> None:
        seen[distplat.get_context().get_world_rank()] = trained(2, distplat.prepare)[1]

    run = call_on_ranks(train, job=function_job(2, strategy=strategy))
    model, batches = trained(1, lambda *things: things)
    for mine, other, whole in zip(seen[0], seen[1], batches, strict=True):
        assert torch.equal(torch.stack([mine, other], 1).flatten(), whole)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(run.trained[1][name], value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("sampler", "numbers"),
    [
        ([1, 3, 5, 7, 9, 11, 13], [1, 3, 5, 7, 9, 11, 13]),
        (SequentialSampler(range(10)), [*range(10)]),
    ],
)
def test_samples_that_it_leaves_out_or_repeats_are_no_metrics(
    sampler: Any, numbers: list[int]
) -> None:
    found: list[list[int]] = []

    def train(config: Mapping[str, Any]) -> None:
        loader = distplat.prepare(DataLoader(data(), 2, sampler=sampler))
        seen = [distplat.gather_for_metrics(batch[2]) for batch in loader]
        found.append(sorted(torch.cat(seen).tolist()))

    call_on_ranks(train, 3)
    assert found == [numbers] * 3


class Endless:
    def __iter__(self) -> Iterator[int]:
        return iter([0])


class Unending:
    def __len__(self) -> int:
        return 5

    def __iter__(self) -> Iterator[int]:
        return itertools.chain(range(100), unbounded())


class Long:
    """Of many passes, so that a loop has no epochs."""

    def __len__(self) -> int:
        return 10**10

    def __iter__(self) -> Iterator[int]:
        return unbounded()


def unbounded() -> Iterator[Any]:
    raise AssertionError("it is asked for more than shows that it does not end")
    yield


def drawn() -> Any:
    return WeightedRandomSampler([1.0] * SAMPLES, 9, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (drawn, "WeightedRandomSampler, which yields another order in each"),
        (Endless, "Endless, which has no length"),
        (lambda: Turning(7), "Turning, which yields 8 or more samples and whose length is 7"),
        (lambda: Turning(30), "Turning, which yields 22 samples and whose length is 30"),
        (Unending, "Unending, which yields 6 or more samples and whose length is 5"),
        (Long, "Long, which yields 10000000000 samples in a pass over 22"),
    ],
)
def test_what_gives_no_order_is_refused(made: Callable[[], Any], message: str) -> None:
    def train(config: Mapping[str, Any]) -> None:
        distplat.prepare(DataLoader(data(), 2, sampler=made()))

    with pytest.raises(SpecError, match=message):
        call_on_ranks(train, 1)


class OwnBatches(BatchSampler):
    pass


class Unsized(Dataset[int]):
    def __getitem__(self, index: int) -> int:
        return index


@pytest.mark.parametrize(
    ("made", "message"),
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
def test_batches_of_many_passes_are_refused_before_they_are_drawn(
    made: Callable[[], DataLoader[Any]], message: str
) -> None:
    def train(config: Mapping[str, Any]) -> None:
        distplat.prepare(made())

    with pytest.raises(SpecError, match=message):
        call_on_ranks(train, 1)


def test_a_pass_may_have_each_sample_many_times() -> None:
    def train(config: Mapping[str, Any]) -> None:
        many = RandomSampler(data(), replacement=True, num_samples=SAMPLES * 101)
        assert len(distplat.prepare(DataLoader(data(), 101, sampler=many))) == SAMPLES

    call_on_ranks(train, 1)


class Apart(Turning):
    """Gives each rank samples of its own, from an epoch on."""

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
def test_ranks_with_other_orders_are_told(since: int, error: type[Exception], message: str) -> None:
    def train(config: Mapping[str, Any]) -> None:
        loader = DataLoader(data(), 4, sampler=Apart(since))
        model, loader = distplat.prepare(model_of(), loader)
        for _ in range(2):
            for inputs, targets, _ in loader:
                torch.autograd.backward((model(inputs) - targets).square().mean())
                distplat.report({"loss": 0.0})

    with pytest.raises(error, match=message):
        call_on_ranks(train, 2)
