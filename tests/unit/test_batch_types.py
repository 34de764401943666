"""`collated` and `to_device` keep the types of batches."""

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
    derived: Any = field(init=False, default=None)


@dataclass(slots=True)
class Slotted:
    a: Tensor
    inner: Any


class Encoding(UserDict[str, Any]):
    """Like `BatchEncoding` of transformers: a mapping with attributes besides its items."""

    def __init__(self, data: Any = None, encodings: Any = None) -> None:
        super().__init__(data)
        self.encodings = encodings


class TwoArgumentList(list[Any]):
    def __init__(self, first: Any, second: Any) -> None:
        super().__init__([first, second])


def ones() -> Tensor:
    return torch.ones(2)


def test_to_device_keeps_types() -> None:
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
    assert [tensor.device for tensor in to_device(TwoArgumentList(ones(), ones()), META)] == [
        META,
        META,
    ]


@pytest.mark.parametrize(
    "value",
    [
        TwoArgumentList(ones(), 1),
        Pair(ones(), {"a": ones()}),
        Encoding({"a": ones()}),
        Frozen(ones()),
        "text",
    ],
)
def test_to_device_returns_the_same_object_if_nothing_moves(value: Any) -> None:
    assert to_device(value, CPU) is value


def test_to_device_does_not_modify_its_input() -> None:
    value = {"a": [ones()], "b": Frozen(ones())}
    before = copy.copy(value)
    to_device(value, META)
    assert value == before
    assert value["a"][0].device == CPU  # type: ignore[index]


def test_collates_dataclasses_field_by_field() -> None:
    batch = collated([(Slotted(torch.full((2,), i), {"n": i}), Frozen(ones())) for i in range(3)])
    first, second = batch
    assert type(first) is Slotted
    assert first.a.tolist() == [[0, 0], [1, 1], [2, 2]]
    assert first.inner["n"].tolist() == [0, 1, 2]
    assert type(second) is Frozen
    assert second.a.shape == (3, 2)
    assert second.name == ["x", "x", "x"]  # type: ignore[comparison-overlap]


def test_collates_other_samples_like_default_collate() -> None:
    samples = [(Pair(np.float32(i), i), Encoding({"a": ones()})) for i in range(2)]
    expected = torch.utils.data.default_collate(samples)
    batch = collated(samples)
    assert type(batch[0]) is Pair
    assert type(batch[1]) is Encoding
    assert torch.equal(batch[0].a, expected[0].a)
    with pytest.raises(TypeError, match="default_collate: batch must contain"):
        collated([(object(), 1)])


class PairTask(Task):
    """A model with namedtuples as inputs (issue 12, `D12`)."""

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


def test_trains_on_namedtuples_and_dataclasses() -> None:
    job = job_of("ring", 2, steps=3, data={"shuffle": False})
    params = train(job, PairTask).parameters()
    torch.manual_seed(job.seed)
    task = PairTask()
    model, data = task.model(), task.train_data()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(3):
        ids = [(4 * step + i) % 8 for i in range(4)]
        inputs = Pair(torch.stack([data[i][0].a for i in ids]), torch.tensor(ids))
        optimizer.zero_grad()
        torch.autograd.backward(task.loss(model(inputs), Frozen(torch.ones(4, 1))))
        optimizer.step()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(params[name], value)
