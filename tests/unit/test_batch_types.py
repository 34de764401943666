"""Batches keep their types: put together from samples, and moved to a device."""

import copy
from collections import OrderedDict, UserDict, defaultdict, namedtuple
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from jobs import job_of
from local_run import train
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from distplat.strategies.loop.collate import collated, to_device
from distplat.strategies.task import Task

META = torch.device("meta")
CPU = torch.device("cpu")

Pair = namedtuple("Pair", "a b")


@dataclass(frozen=True)
class Frozen:
    a: Tensor
    name: str = "x"
    made: Any = field(init=False, default=None)


@dataclass(slots=True)
class Slotted:
    a: Tensor
    inner: Any


class Encoding(UserDict[str, Any]):
    """As transformers' BatchEncoding: a mapping that is no dict, and has more than its items."""

    def __init__(self, data: Any = None, encodings: Any = None) -> None:
        super().__init__(data)
        self.encodings = encodings


class Odd(list[Any]):
    def __init__(self, first: Any, second: Any) -> None:
        super().__init__([first, second])


def ones() -> Tensor:
    return torch.ones(2)


def test_types_are_kept_on_the_way_to_a_device() -> None:
    pair = to_device(Pair(ones(), 1), META)
    assert type(pair) is Pair
    assert (pair.a.device, pair.b) == (META, 1)
    frozen = to_device(Frozen(ones()), META)
    assert type(frozen) is Frozen
    assert (frozen.a.device, frozen.name) == (META, "x")
    slotted = to_device(Slotted(ones(), [Pair(1, ones())]), META)
    assert type(slotted) is Slotted
    assert slotted.inner[0].b.device == META
    encoding = to_device(Encoding({"ids": ones()}, encodings="kept"), META)
    assert type(encoding) is Encoding
    assert (encoding["ids"].device, encoding.encodings) == (META, "kept")
    mappings: list[Any] = [OrderedDict(a=ones()), defaultdict(ones, a=ones())]
    for mapping in [*mappings, MappingProxyType({"a": 1})]:
        assert type(to_device(mapping, META)) is type(mapping)
    assert to_device(MappingProxyType({"a": ones()}), META)["a"].device == META
    packed = to_device(pack_sequence([ones(), ones()]), META)
    assert isinstance(packed, PackedSequence)
    assert packed.data.device == META
    assert packed.batch_sizes.device == CPU
    assert type(to_device(torch.Size([1, 2]), META)) is torch.Size
    assert [one.device for one in to_device(Odd(ones(), ones()), META)] == [META, META]


@pytest.mark.parametrize(
    "value",
    [Odd(ones(), 1), Pair(ones(), {"a": ones()}), Encoding({"a": ones()}), Frozen(ones()), "text"],
)
def test_what_need_not_move_is_given_back_as_it_is(value: Any) -> None:
    assert to_device(value, CPU) is value


def test_the_source_stays_as_it_was() -> None:
    value = {"a": [ones()], "b": Frozen(ones())}
    before = copy.copy(value)
    to_device(value, META)
    assert value == before
    assert value["a"][0].device == CPU  # type: ignore[index]


def test_dataclasses_are_put_together_field_by_field() -> None:
    batch = collated([(Slotted(torch.full((2,), i), {"n": i}), Frozen(ones())) for i in range(3)])
    first, second = batch
    assert type(first) is Slotted
    assert first.a.tolist() == [[0, 0], [1, 1], [2, 2]]
    assert first.inner["n"].tolist() == [0, 1, 2]
    assert type(second) is Frozen
    assert second.a.shape == (3, 2)
    assert second.name == ["x", "x", "x"]  # type: ignore[comparison-overlap]


def test_other_samples_are_put_together_as_torch_does() -> None:
    samples = [(Pair(np.float32(i), i), Encoding({"a": ones()})) for i in range(2)]
    expected = torch.utils.data.default_collate(samples)
    found = collated(samples)
    assert type(found[0]) is Pair
    assert type(found[1]) is Encoding
    assert torch.equal(found[0].a, expected[0].a)
    with pytest.raises(TypeError, match="default_collate: batch must contain"):
        collated([(object(), 1)])


class OfPairs(Task):
    """Takes namedtuples in a model, as `D12` of issue 12."""

    def model(self) -> nn.Module:
        class Model(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layer = nn.Linear(2, 1)

            def forward(self, pair: Any) -> Tensor:
                assert type(pair) is Pair
                outputs: Tensor = self.layer(pair.a) + pair.b.unsqueeze(1)
                return outputs

        return Model()

    def train_data(self) -> Any:
        return [(Pair(torch.full((2,), i / 8), i), Frozen(torch.ones(1))) for i in range(8)]

    def loss(self, outputs: Tensor, targets: Frozen) -> Tensor:
        assert type(targets) is Frozen
        return ((outputs - targets.a) ** 2).mean()


def test_namedtuples_and_dataclasses_are_trained_on() -> None:
    job = job_of("ring", 2, steps=3, data={"shuffle": False})
    found = train(job, OfPairs).parameters()
    torch.manual_seed(job.seed)
    task = OfPairs()
    model, data = task.model(), task.train_data()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(3):
        ids = [(4 * step + i) % 8 for i in range(4)]
        inputs = Pair(torch.stack([data[i][0].a for i in ids]), torch.tensor(ids))
        optimizer.zero_grad()
        torch.autograd.backward(task.loss(model(inputs), Frozen(torch.ones(4, 1))))
        optimizer.step()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(found[name], value)
