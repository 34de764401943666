"""What prepared loaders give to a train function, and what is gathered behind them."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from function_ranks import call_on_ranks
from plain_functions import (
    GLOBAL,
    SAMPLES,
    adam,
    assert_equal,
    data_of,
    loss_of,
    model_of,
    momentum,
    plain,
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


def test_the_loops_own_distributed_sampler_says_which_epoch_it_is() -> None:
    def train(config: Mapping[str, Any]) -> None:
        sampler: DistributedSampler[int] = DistributedSampler(Odd(), 1, 0)
        loader = distplat.prepare(DataLoader(Odd(), batch_size=2, sampler=sampler))
        seen: dict[int, list[int]] = {}
        for epoch in (3, 4, 3):
            sampler.set_epoch(epoch)
            order = [number for batch in loader for number in batch.tolist()]
            assert seen.setdefault(epoch, order) == order
        assert seen[3] != seen[4]

    call_on_ranks(train)


class Odd(Dataset[int]):
    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> int:
        return index


@pytest.mark.parametrize("shuffle", [False, True])
def test_each_epoch_has_every_sample_in_an_order_of_its_own(shuffle: bool) -> None:
    seen: dict[tuple[int, int], list[int]] = {}

    def train(config: Mapping[str, Any]) -> None:
        loader = distplat.prepare(DataLoader(Odd(), batch_size=2, shuffle=shuffle))
        rank = distplat.get_context().rank
        for epoch in range(2):
            seen[rank, epoch] = [number for batch in loader for number in batch.tolist()]
        loader.set_epoch(0)
        assert [number for batch in loader for number in batch.tolist()] == seen[rank, 0]

    call_on_ranks(train, 2)
    for epoch in range(2):
        assert sorted(seen[0, epoch] + seen[1, epoch]) == [*range(10)]
    assert (seen[0, 0] != seen[0, 1]) == shuffle


class Metrics(NamedTuple):
    numbers: Tensor
    loss: Tensor


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize(("world", "batch"), [(1, 4), (2, 2), (3, 2), (4, 2)])
def test_gathered_metrics_are_of_every_sample_once(world: int, batch: int, drop_last: bool) -> None:
    def train(config: Mapping[str, Any]) -> None:
        context = distplat.get_context()
        loader = DataLoader(Odd(), batch_size=batch, shuffle=True, drop_last=drop_last)
        other = distplat.prepare(DataLoader(Odd(), batch_size=1))
        loader = distplat.prepare(loader)
        for _ in range(2):
            found: list[int] = []
            for numbers in loader:
                given = {"all": [Metrics(numbers, torch.tensor(0.5))], "rank": context.rank}
                every = distplat.gather_for_metrics(given)
                assert every["all"][0].loss.tolist() == [0.5] * world
                assert every["rank"].tolist() == [*range(world)]
                found += every["all"][0].numbers.tolist()
            assert len(found) == len({*found})
            assert len(found) == 10 if not drop_last else len(found) >= 10 - world * batch
        seen = [distplat.gather_for_metrics(numbers) for numbers in other]
        assert sorted(torch.cat(seen).tolist()) == [*range(10)], "the loader that was read last"

    call_on_ranks(train, world)


@pytest.mark.parametrize("left", [False, True])
def test_what_was_counted_over_a_pass_is_gathered_whole(left: bool) -> None:
    """It may be as long as the last batch, of which some ranks have repeated samples."""

    def train(config: Mapping[str, Any]) -> None:
        samples: Any = range(18)
        loader, other = distplat.prepare(DataLoader(samples, 5), DataLoader(samples, 4))
        for batch in other:
            for _ in loader:  # an evaluation, of one batch
                if left:
                    break
            assert distplat.gather_for_metrics(torch.ones(5)).sum() == 20
            assert len(distplat.gather_for_metrics(batch)) == {4: 16, 1: 2}[len(batch)]
        assert distplat.gather_for_metrics(torch.ones(1)).sum() == 4

    call_on_ranks(train, 4)


def test_a_pass_that_is_over_late_leaves_the_next_one() -> None:
    """An iterator that the loop still holds may be closed in the middle of another pass."""

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
def test_data_without_a_length_has_that_of_its_sampler(data: Any, world: int) -> None:
    def train(config: Mapping[str, Any]) -> None:
        rank, given = distplat.get_context().rank, DataLoader(data(), 3, sampler=range(12))
        assert torch.cat([*distplat.prepare(given)]).tolist() == [*range(rank, 12, world)]

    call_on_ranks(train, world)


@pytest.mark.parametrize("ends", [False, True])
def test_a_pass_that_the_loop_has_left_goes_on_there_or_is_over(ends: bool) -> None:
    """A loop that was stopped goes on there; one that takes a part of each epoch says so."""

    def train(config: Mapping[str, Any]) -> None:
        samples: Any = range(24)

        def made() -> Any:
            return distplat.prepare(DataLoader(samples, 2, shuffle=True))

        loader, whole, again = made(), made(), made()
        next(batch for number, batch in enumerate(loader) if number == 2)
        if ends:
            loader.set_epoch(1)
        again.load_state_dict(loader.state_dict())
        epochs = [[batch.tolist() for batch in whole] for _ in range(2)]
        rest = [batch.tolist() for batch in again]
        assert rest == (epochs[1] if ends else epochs[0][3:])

    call_on_ranks(train, 2)


class Backwards(SequentialSampler):
    """Draws nothing: ranks share a process here, and its generators."""

    def __iter__(self) -> Any:
        return reversed(range(len(self)))


@pytest.mark.parametrize("sampler", [None, Backwards])
@pytest.mark.parametrize("now", [6, 14])
def test_data_whose_length_changes_is_refused(now: int, sampler: Any) -> None:
    def train(config: Mapping[str, Any]) -> None:
        samples = [*range(10)]
        own = None if sampler is None else sampler(samples)
        loader = distplat.prepare(DataLoader(samples, 2, sampler=own))  # type: ignore[arg-type]
        assert len([*loader]) == 3
        samples[:] = range(now)
        with pytest.raises(SpecError, match=f"{now} samples now, and had 10"):
            next(iter(loader))

    call_on_ranks(train, 2)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.bool, torch.int64, torch.float64])
def test_tensors_of_any_type_and_length_are_gathered(kind: torch.dtype) -> None:
    def train(config: Mapping[str, Any]) -> None:
        rank = distplat.get_context().rank
        found = distplat.gather_for_metrics(torch.ones(rank, 2, dtype=kind))
        assert (found.dtype, found.shape) == (kind, (3, 2))
        assert bool(found.all())

    call_on_ranks(train, 3)


@dataclass
class Outputs:
    logits: Tensor
    loss: float


def test_dataclasses_are_gathered_field_by_field() -> None:
    found: list[Outputs] = []

    def train(config: Mapping[str, Any]) -> None:
        rank = distplat.get_context().rank
        found.append(distplat.gather_for_metrics(Outputs(torch.full((2,), rank), rank + 1.0)))

    call_on_ranks(train, 2)
    for one in found:
        assert type(one) is Outputs and one.logits.tolist() == [0, 0, 1, 1]
        assert torch.as_tensor(one.loss).tolist() == [1.0, 2.0]


def test_mappings_of_another_kind_stay_as_they_are() -> None:
    def train(config: Mapping[str, Any]) -> None:
        given: dict[str, Any] = {"rank": torch.tensor([distplat.get_context().rank])}
        found = distplat.gather_for_metrics(WrappedMapping(given))
        assert found["rank"].tolist() == [0, 1]
        assert len(given["rank"]) == 1
        assert distplat.gather_for_metrics(Counter(right=2))["right"].tolist() == [2, 2]

    call_on_ranks(train, 2)


def test_what_cannot_be_gathered_is_named() -> None:
    with pytest.raises(SpecError, match="got a str"):
        call_on_ranks(lambda config: distplat.gather_for_metrics({"a": "text"}))


def test_a_batch_sampler_of_torch_is_a_batch_size() -> None:
    def train(config: Mapping[str, Any]) -> None:
        model, data = model_of(), data_of()
        optimizer = momentum(model.parameters())
        batches = BatchSampler(SequentialSampler(data), GLOBAL // 2, drop_last=True)
        loader = DataLoader(data, batch_sampler=batches)
        model, optimizer, loader = distplat.prepare(model, optimizer, loader)
        assert (len(loader), loader.batch_size) == (SAMPLES // GLOBAL, GLOBAL // 2)
        for batch in loader:
            backward(loss_of(model, batch))
            optimizer.step()
            optimizer.zero_grad()

    assert_equal(call_on_ranks(train, 2).trained[1], plain(momentum, epochs=1))


def test_a_prepared_loader_tells_what_the_given_one_does() -> None:
    def train(config: Mapping[str, Any]) -> None:
        given = DataLoader(data_of(), GLOBAL, num_workers=2, drop_last=True, prefetch_factor=3)
        loader = distplat.prepare(given)
        for name in ("num_workers", "drop_last", "prefetch_factor", "collate_fn", "pin_memory"):
            assert getattr(loader, name) == getattr(given, name)
        with pytest.raises(AttributeError, match="has no 'shuffle'"):
            _ = loader.shuffle

    call_on_ranks(train, 1)


class OwnBatches(BatchSampler):
    pass


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("kind", [None, BatchSampler, OwnBatches])
def test_a_loop_may_tell_the_sampler_of_the_batch_sampler_the_epoch(
    kind: type[BatchSampler] | None, parts: int
) -> None:
    def train(config: Mapping[str, Any]) -> None:
        rank = distplat.get_context().get_world_rank() if parts > 1 else 0
        sampler: DistributedSampler[int] = DistributedSampler(Odd(), parts, rank, drop_last=True)
        batches = kind(sampler, 2, drop_last=True) if kind is not None else None
        given: Any = {"batch_sampler": batches} if batches else {"batch_size": 2, "shuffle": True}
        loader = distplat.prepare(DataLoader(Odd(), **given))
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
def test_what_a_prepared_loader_shows_of_its_batches_is_not_set(name: str) -> None:
    def train(config: Mapping[str, Any]) -> None:
        loader = distplat.prepare(DataLoader(Odd(), 2))
        with pytest.raises(AttributeError, match=f"the {name} of .* cannot be set: prepare a"):
            setattr(loader.batch_sampler, name, 3)
        with pytest.raises(ValueError, match=f"the {name} of a prepared .* cannot be set"):
            setattr(loader, name, 3)  # as torch's

    call_on_ranks(train, 1)


class Doubling(DataLoader[Any]):
    """Changes batches on their way."""

    def __iter__(self) -> Any:
        return (2 * batch for batch in super().__iter__())


class Inner(DataLoader[Any]):
    """As loaders of graphs do, which filter what loader processes send."""

    def _get_iterator(self) -> Any:
        return iter([torch.zeros(1)])


class Named(DataLoader[Any]):
    """Is made otherwise, and goes through its batches as torch's."""

    def __init__(self, count: int) -> None:
        super().__init__(range(count), 2)  # type: ignore[arg-type]


class Numbering(DataLoader[Any]):
    @property
    def _index_sampler(self) -> Any:
        return [[0], [1]]


class Sharded(DataLoader[Any]):
    """As Accelerate's."""

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
    """As torchdata's: it keeps a position that it was given until the next pass."""

    __module__ = "torchdata.stateful_dataloader"
    next_iter_state: Any = None

    def __iter__(self) -> Any:
        return super().__iter__()


def test_a_loader_of_torchdatas_is_taken_where_it_begins() -> None:
    def train(config: Mapping[str, Any]) -> None:
        given = Stateful(Odd(), 5)
        assert len([*distplat.prepare(given)]) == 2
        given.next_iter_state = {"_num_yielded": 1}
        with pytest.raises(
            SpecError, match=r"(?s)a Stateful at a position.*that prepare\(\) returns"
        ):
            distplat.prepare(given)

    call_on_ranks(train)


def test_a_loader_that_changes_its_batches_itself_is_refused() -> None:
    """A prepared one would give them as they were."""

    def train(config: Mapping[str, Any]) -> None:
        samples: Any = range(4)
        for kind, text in CHANGING.items():
            with pytest.raises(SpecError, match=rf"(?s)a {kind.__name__}, {text}"):
                distplat.prepare(kind(samples))
        assert [batch.tolist() for batch in distplat.prepare(Named(4))] == [[0, 1], [2, 3]]

    call_on_ranks(train)


@pytest.mark.parametrize("last", ["backward", "barrier"])
def test_a_loop_that_ends_earlier_is_named(last: str) -> None:
    def train(config: Mapping[str, Any]) -> None:
        rank = distplat.get_context().rank
        model = distplat.prepare(model_of())
        backward(loss_of(model, data_of()[:4]))
        if rank == 1:
            return
        if last == "barrier":
            distplat.barrier()  # is met by the end of rank 1

        backward(loss_of(model, data_of()[:4]))

    with pytest.raises(MismatchError, match=r"ranks 0, 2 in all_reduce; rank 1 in barrier"):
        call_on_ranks(train, 3)


@pytest.mark.parametrize(
    ("world", "prepared", "warned"), [(2, False, 1), (2, True, 0), (1, False, 0)]
)
def test_workers_that_may_train_on_the_same_samples_are_warned(
    world: int, prepared: bool, warned: int, caplog: pytest.LogCaptureFixture
) -> None:
    def train(config: Mapping[str, Any]) -> None:
        model, loader = model_of(), DataLoader(data_of(), GLOBAL)
        first, *_, last = model.children()
        optimizers = [momentum(first.parameters()), adam(last.parameters())]
        model, *optimizers = distplat.prepare(model, *optimizers)
        read = distplat.prepare(loader) if prepared else loader
        for batch in read:
            backward(loss_of(model, batch))
            for optimizer in optimizers:
                optimizer.step()

    call_on_ranks(train, world)
    assert caplog.text.count("workers train on the same samples") == warned
