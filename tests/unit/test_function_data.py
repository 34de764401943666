"""Prepared loaders and `gather_for_metrics` in a train function."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from function_ranks import call_on_ranks
from plain_functions import (
    GLOBAL_BATCH,
    SAMPLES,
    adam,
    assert_equal,
    data_of,
    loss_of,
    model_of,
    momentum,
    train_plain,
)
from torch import Tensor
from torch.autograd import backward
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    SequentialSampler,
)
from wrapped_mapping import WrappedMapping

import distplat
from distplat.platform.errors import MismatchError, SpecError


def test_set_epoch_of_the_own_distributed_sampler() -> None:
    def train(config: Mapping[str, Any]) -> None:
        sampler: DistributedSampler[int] = DistributedSampler(Indices(), 1, 0)
        loader = distplat.prepare(DataLoader(Indices(), batch_size=2, sampler=sampler))
        orders: dict[int, list[int]] = {}
        for epoch in (3, 4, 3):
            sampler.set_epoch(epoch)
            order = [number for batch in loader for number in batch.tolist()]
            assert orders.setdefault(epoch, order) == order
        assert orders[3] != orders[4]

    call_on_ranks(train)


class Indices(Dataset[int]):
    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> int:
        return index


@pytest.mark.parametrize("shuffle", [False, True])
def test_each_epoch_has_every_sample_in_another_order(shuffle: bool) -> None:
    orders: dict[tuple[int, int], list[int]] = {}

    def train(config: Mapping[str, Any]) -> None:
        loader = distplat.prepare(DataLoader(Indices(), batch_size=2, shuffle=shuffle))
        rank = distplat.get_context().rank
        for epoch in range(2):
            orders[rank, epoch] = [number for batch in loader for number in batch.tolist()]
        loader.set_epoch(0)
        assert [number for batch in loader for number in batch.tolist()] == orders[rank, 0]

    call_on_ranks(train, 2)
    for epoch in range(2):
        assert sorted(orders[0, epoch] + orders[1, epoch]) == [*range(10)]
    assert (orders[0, 0] != orders[0, 1]) == shuffle


class Metrics(NamedTuple):
    numbers: Tensor
    loss: Tensor


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize(("world", "batch"), [(1, 4), (2, 2), (3, 2), (4, 2)])
def test_gather_for_metrics_has_every_sample_once(world: int, batch: int, drop_last: bool) -> None:
    def train(config: Mapping[str, Any]) -> None:
        context = distplat.get_context()
        loader = DataLoader(Indices(), batch_size=batch, shuffle=True, drop_last=drop_last)
        other = distplat.prepare(DataLoader(Indices(), batch_size=1))
        loader = distplat.prepare(loader)
        for _ in range(2):
            gathered: list[int] = []
            for numbers in loader:
                metrics = {"all": [Metrics(numbers, torch.tensor(0.5))], "rank": context.rank}
                result = distplat.gather_for_metrics(metrics)
                assert result["all"][0].loss.tolist() == [0.5] * world
                assert result["rank"].tolist() == [*range(world)]
                gathered += result["all"][0].numbers.tolist()
            assert len(gathered) == len({*gathered})
            assert len(gathered) == 10 if not drop_last else len(gathered) >= 10 - world * batch
        batches = [distplat.gather_for_metrics(numbers) for numbers in other]
        assert sorted(torch.cat(batches).tolist()) == [*range(10)], "the loader read last"

    call_on_ranks(train, world)


@pytest.mark.parametrize("breaks", [False, True])
def test_values_that_are_no_batch_are_gathered_completely(breaks: bool) -> None:
    """A value may be as long as the last batch, which has repeated samples on some ranks."""

    def train(config: Mapping[str, Any]) -> None:
        samples: Any = range(18)
        loader, other = distplat.prepare(DataLoader(samples, 5), DataLoader(samples, 4))
        for batch in other:
            for _ in loader:  # a nested evaluation
                if breaks:
                    break
            assert distplat.gather_for_metrics(torch.ones(5)).sum() == 20
            assert len(distplat.gather_for_metrics(batch)) == {4: 16, 1: 2}[len(batch)]
        assert distplat.gather_for_metrics(torch.ones(1)).sum() == 4

    call_on_ranks(train, 4)


def test_closing_an_old_iterator_does_not_affect_the_next() -> None:
    """Python may close an old iterator during the next epoch."""

    def train(config: Mapping[str, Any]) -> None:
        samples: Any = range(18)
        loader = distplat.prepare(DataLoader(samples, 5))
        first = iter(loader)
        next(first)
        for batch in loader:
            first.close()
            assert len(distplat.gather_for_metrics(batch)) == 18

    call_on_ranks(train, 4)


class Unsized(Dataset[int]):
    def __getitem__(self, index: int) -> int:
        return index


class NotSized(Unsized):
    def __len__(self) -> int:
        raise NotImplementedError


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("data", [Unsized, NotSized])
def test_data_set_without_length_uses_the_sampler_length(data: Any, world: int) -> None:
    def train(config: Mapping[str, Any]) -> None:
        rank, loader = distplat.get_context().rank, DataLoader(data(), 3, sampler=range(12))
        assert torch.cat([*distplat.prepare(loader)]).tolist() == [*range(rank, 12, world)]

    call_on_ranks(train, world)


@pytest.mark.parametrize("next_epoch", [False, True])
def test_interrupted_epoch_resumes_or_ends(next_epoch: bool) -> None:
    """A resumed loop continues the epoch, unless the loop has called `set_epoch`."""

    def train(config: Mapping[str, Any]) -> None:
        samples: Any = range(24)

        def prepared_loader() -> Any:
            return distplat.prepare(DataLoader(samples, 2, shuffle=True))

        loader, whole, resumed = (prepared_loader() for _ in range(3))
        next(batch for number, batch in enumerate(loader) if number == 2)
        if next_epoch:
            loader.set_epoch(1)
        resumed.load_state_dict(loader.state_dict())
        epochs = [[batch.tolist() for batch in whole] for _ in range(2)]
        rest = [batch.tolist() for batch in resumed]
        assert rest == (epochs[1] if next_epoch else epochs[0][3:])

    call_on_ranks(train, 2)


class Backwards(SequentialSampler):
    """A sampler without random numbers, because ranks share the generator here."""

    def __iter__(self) -> Any:
        return reversed(range(len(self)))


@pytest.mark.parametrize("sampler", [None, Backwards])
@pytest.mark.parametrize("new_length", [6, 14])
def test_rejects_data_whose_length_changes(new_length: int, sampler: Any) -> None:
    def train(config: Mapping[str, Any]) -> None:
        samples = [*range(10)]
        own = None if sampler is None else sampler(samples)
        loader = distplat.prepare(DataLoader(samples, 2, sampler=own))  # type: ignore[arg-type]
        assert len([*loader]) == 3
        samples[:] = range(new_length)
        with pytest.raises(SpecError, match=f"{new_length} samples now, and had 10"):
            next(iter(loader))

    call_on_ranks(train, 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.bool, torch.int64, torch.float64])
def test_gather_for_metrics_supports_all_dtypes_and_lengths(dtype: torch.dtype) -> None:
    def train(config: Mapping[str, Any]) -> None:
        rank = distplat.get_context().rank
        gathered = distplat.gather_for_metrics(torch.ones(rank, 2, dtype=dtype))
        assert (gathered.dtype, gathered.shape) == (dtype, (3, 2))
        assert bool(gathered.all())

    call_on_ranks(train, 3)


@dataclass
class Outputs:
    logits: Tensor
    loss: float


def test_dataclasses_are_gathered_field_by_field() -> None:
    results: list[Outputs] = []

    def train(config: Mapping[str, Any]) -> None:
        rank = distplat.get_context().rank
        results.append(distplat.gather_for_metrics(Outputs(torch.full((2,), rank), rank + 1.0)))

    call_on_ranks(train, 2)
    for result in results:
        assert type(result) is Outputs and result.logits.tolist() == [0, 0, 1, 1]
        assert torch.as_tensor(result.loss).tolist() == [1.0, 2.0]


def test_custom_mappings_are_gathered_without_mutation() -> None:
    def train(config: Mapping[str, Any]) -> None:
        values: dict[str, Any] = {"rank": torch.tensor([distplat.get_context().rank])}
        gathered = distplat.gather_for_metrics(WrappedMapping(values))
        assert gathered["rank"].tolist() == [0, 1]
        assert len(values["rank"]) == 1
        assert distplat.gather_for_metrics(Counter(right=2))["right"].tolist() == [2, 2]

    call_on_ranks(train, 2)


def test_gather_for_metrics_rejects_other_types() -> None:
    with pytest.raises(SpecError, match="got a str"):
        call_on_ranks(lambda config: distplat.gather_for_metrics({"a": "text"}))


def test_batch_sampler_of_torch_matches_batch_size() -> None:
    def train(config: Mapping[str, Any]) -> None:
        model, data = model_of(), data_of()
        optimizer = momentum(model.parameters())
        batches = BatchSampler(SequentialSampler(data), GLOBAL_BATCH // 2, drop_last=True)
        loader = DataLoader(data, batch_sampler=batches)
        model, optimizer, loader = distplat.prepare(model, optimizer, loader)
        assert (len(loader), loader.batch_size) == (SAMPLES // GLOBAL_BATCH, GLOBAL_BATCH // 2)
        for batch in loader:
            backward(loss_of(model, batch))
            optimizer.step()
            optimizer.zero_grad()

    assert_equal(call_on_ranks(train, 2).trained[1], train_plain(momentum, epochs=1))


def test_prepared_loader_has_the_attributes_of_the_original() -> None:
    def train(config: Mapping[str, Any]) -> None:
        original = DataLoader(
            data_of(), GLOBAL_BATCH, num_workers=2, drop_last=True, prefetch_factor=3
        )
        loader = distplat.prepare(original)
        for name in ("num_workers", "drop_last", "prefetch_factor", "collate_fn", "pin_memory"):
            assert getattr(loader, name) == getattr(original, name)
        with pytest.raises(AttributeError, match="has no 'shuffle'"):
            _ = loader.shuffle

    call_on_ranks(train, 1)


class OwnBatches(BatchSampler):
    pass


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("cls", [None, BatchSampler, OwnBatches])
def test_set_epoch_of_the_sampler_of_the_batch_sampler(
    cls: type[BatchSampler] | None, parts: int
) -> None:
    def train(config: Mapping[str, Any]) -> None:
        rank = distplat.get_context().get_world_rank() if parts > 1 else 0
        sampler: DistributedSampler[int] = DistributedSampler(
            Indices(), parts, rank, drop_last=True
        )
        batches = cls(sampler, 2, drop_last=True) if cls is not None else None
        options: Any = {"batch_sampler": batches} if batches else {"batch_size": 2, "shuffle": True}
        loader = distplat.prepare(DataLoader(Indices(), **options))
        orders: list[list[Any]] = []
        for epoch in (1, 0, 1):
            loader.batch_sampler.sampler.set_epoch(epoch)
            assert len(loader.batch_sampler) == len(loader)
            expected = [*loader.batch_sampler]
            orders.append([batch.tolist() for batch in loader])
            assert orders[-1] == expected
        assert orders[0] == orders[2] != orders[1]

    call_on_ranks(train, 2)


@pytest.mark.parametrize("name", ["batch_size", "drop_last", "sampler"])
def test_attributes_of_a_prepared_loader_are_read_only(name: str) -> None:
    def train(config: Mapping[str, Any]) -> None:
        loader = distplat.prepare(DataLoader(Indices(), 2))
        with pytest.raises(AttributeError, match=f"the {name} of .* cannot be set: prepare a"):
            setattr(loader.batch_sampler, name, 3)
        with pytest.raises(ValueError, match=f"the {name} of a prepared .* cannot be set"):
            setattr(loader, name, 3)  # as in torch

    call_on_ranks(train, 1)


class Doubling(DataLoader[Any]):
    """A loader whose `__iter__` changes the batches."""

    def __iter__(self) -> Any:
        return (2 * batch for batch in super().__iter__())


class Inner(DataLoader[Any]):
    """A loader that filters batches of the loader processes, like graph loaders."""

    def _get_iterator(self) -> Any:
        return iter([torch.zeros(1)])


class Named(DataLoader[Any]):
    """A loader with another constructor and torch's iteration."""

    def __init__(self, count: int) -> None:
        super().__init__(range(count), 2)  # type: ignore[arg-type]


class Numbering(DataLoader[Any]):
    @property
    def _index_sampler(self) -> Any:
        return [[0], [1]]


class Sharded(DataLoader[Any]):
    """A loader like that of Accelerate."""

    __module__ = "accelerate.data_loader"

    def __iter__(self) -> Any:
        return super().__iter__()


CHANGING: dict[type[DataLoader[Any]], str] = {
    Doubling: "whose __iter__ .*to collate_fn",
    Inner: "whose _get_iterator .*to collate_fn",
    Numbering: "whose _index_sampler .*to collate_fn",
    Sharded: "whose __iter__ .*passed to Accelerate",
}


class Stateful(DataLoader[Any]):
    """A loader like torchdata's: it keeps a loaded position until the next epoch."""

    __module__ = "torchdata.stateful_dataloader"
    next_iter_state: Any = None

    def __iter__(self) -> Any:
        return super().__iter__()


def test_rejects_a_torchdata_loader_with_a_position() -> None:
    def train(config: Mapping[str, Any]) -> None:
        loader = Stateful(Indices(), 5)
        assert len([*distplat.prepare(loader)]) == 2
        loader.next_iter_state = {"_num_yielded": 1}
        with pytest.raises(
            SpecError, match=r"(?s)a Stateful at a position.*that prepare\(\) returns"
        ):
            distplat.prepare(loader)

    call_on_ranks(train)


def test_rejects_loaders_that_change_their_batches() -> None:
    """A prepared loader would yield the original batches."""

    def train(config: Mapping[str, Any]) -> None:
        samples: Any = range(4)
        for cls, text in CHANGING.items():
            with pytest.raises(SpecError, match=rf"(?s)a {cls.__name__}, {text}"):
                distplat.prepare(cls(samples))
        assert [batch.tolist() for batch in distplat.prepare(Named(4))] == [[0, 1], [2, 3]]

    call_on_ranks(train)


@pytest.mark.parametrize("last", ["backward", "barrier"])
def test_rank_with_a_shorter_loop_is_named(last: str) -> None:
    def train(config: Mapping[str, Any]) -> None:
        rank = distplat.get_context().rank
        model = distplat.prepare(model_of())
        backward(loss_of(model, data_of()[:4]))
        if rank == 1:
            return
        if last == "barrier":
            distplat.barrier()  # matches the barrier at the end of rank 1

        backward(loss_of(model, data_of()[:4]))

    with pytest.raises(MismatchError, match=r"ranks 0, 2 in all_reduce; rank 1 in barrier"):
        call_on_ranks(train, 3)


@pytest.mark.parametrize(
    ("world", "is_prepared", "warnings"), [(2, False, 1), (2, True, 0), (1, False, 0)]
)
def test_warns_about_unprepared_loaders(
    world: int, is_prepared: bool, warnings: int, caplog: pytest.LogCaptureFixture
) -> None:
    def train(config: Mapping[str, Any]) -> None:
        model, loader = model_of(), DataLoader(data_of(), GLOBAL_BATCH)
        first, *_, last = model.children()
        optimizers = [momentum(first.parameters()), adam(last.parameters())]
        model, *optimizers = distplat.prepare(model, *optimizers)
        batches = distplat.prepare(loader) if is_prepared else loader
        for batch in batches:
            backward(loss_of(model, batch))
            for optimizer in optimizers:
                optimizer.step()

    call_on_ranks(train, world)
    assert caplog.text.count("workers train on the same samples") == warnings
