"""Tensors in nested containers, and rebuilding containers with other items."""

from collections import Counter, OrderedDict, UserDict, namedtuple
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_sequence
from wrapped_mapping import WrappedMapping

from distplat.strategies.loop.containers import items_in, rebuilt, tensors_in

Named = namedtuple("Named", ["first", "second"])


@dataclass
class State:
    first: Any
    second: Any


@pytest.mark.parametrize(
    "build",
    [
        State,
        Named,
        lambda a, b: [a, b],
        lambda a, b: (a, b),
        lambda a, b: {"a": a, "b": b},
        lambda a, b: OrderedDict(a=a, b=b),
        lambda a, b: UserDict(a=a, b=b),
        lambda a, b: MappingProxyType({"a": a, "b": b}),
    ],
)
def test_finds_tensors_in_order_and_rebuilds_containers(build: Any) -> None:
    a, b, c = (torch.tensor(float(number)) for number in range(3))
    value = build(a, {"text": "x", "inner": [b, None]})
    assert [*map(id, tensors_in(value))] == [id(a), id(b)]
    items = items_in(value)
    assert items is not None
    other = rebuilt(value, [c, *items[1:]])
    assert type(other) is type(value)
    assert [*map(id, tensors_in(other))] == [id(c), id(b)]
    assert [*map(id, tensors_in(value))] == [id(a), id(b)]


@dataclass(frozen=True)
class Encoded(Mapping[str, Any]):
    """A mapping with an attribute that is not an item."""

    first: Any
    second: Any
    name: str

    def __getitem__(self, key: str) -> Any:
        return getattr(self, key)

    def __iter__(self) -> Iterator[str]:
        return iter(("first", "second"))

    def __len__(self) -> int:
        return 2


class Attributes(dict[str, Any]):
    """A dict whose items are its attributes."""

    def __init__(self, **items: Any) -> None:
        super().__init__(**items)
        self.__dict__ = self


def test_rebuilds_dict_with_items_as_attributes() -> None:
    other: Any = rebuilt(Attributes(a=1), [2])
    assert (other["a"], other.a) == (2, 2)


def test_rebuilds_other_mappings() -> None:
    other = rebuilt(value := WrappedMapping({"a": 1, "b": 2}), [3, 4])
    assert type(other) is WrappedMapping
    assert (value.wrapped, other.wrapped) == ({"a": 1, "b": 2}, {"a": 3, "b": 4})
    assert rebuilt(Counter(a=3), [5]) == Counter(a=5)
    assert rebuilt(Encoded(1, 2, "text"), [3, 4]) == Encoded(3, 4, "text")


def test_self_referencing_list_terminates() -> None:
    value: list[Any] = [torch.ones(1)]
    value.append({"again": value})
    assert len([*tensors_in(value)]) == 1


@pytest.mark.parametrize("value", ["text", 1.0, None, {1}, State, object()])
def test_other_values_have_no_items(value: object) -> None:
    assert items_in(value) is None
    assert [*tensors_in(value)] == []


def test_model_outputs_of_transformers_and_packed_sequences() -> None:
    outputs_module = pytest.importorskip("transformers.modeling_outputs")

    logits = torch.zeros(2, 3)
    outputs = rebuilt(outputs_module.CausalLMOutput(logits=logits), [torch.ones(2, 3)])
    assert type(outputs) is outputs_module.CausalLMOutput
    assert torch.equal(outputs.logits, torch.ones(2, 3))
    assert outputs["logits"] is outputs.logits
    packed: Tensor = next(tensors_in(pack_sequence([torch.ones(2), torch.ones(1)])))
    assert packed.shape == (3,)
