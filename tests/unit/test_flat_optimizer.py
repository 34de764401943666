"""Optimizers on a flat vector match torch's optimizers on the parameters."""

import itertools
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter
from torch import Tensor, nn

from distplat.platform.optimizers import AnyOptimizer
from distplat.strategies.model.flat import FlatModel
from distplat.strategies.model.optim import FlatOptimizer
from distplat.strategies.model.optimizer_state import NUMBERS, PER_PARAMETER, USED

STEPS = 6
ADAPTER: TypeAdapter[Any] = TypeAdapter(AnyOptimizer)

OPTIMIZERS: list[dict[str, Any]] = [
    {"name": "SGD", "lr": 0.1},
    {"name": "SGD", "lr": 0.1, "momentum": 0.9, "weight_decay": 0.01},
    {"name": "SGD", "lr": 0.1, "momentum": 0.9, "dampening": 0.5},
    {"name": "SGD", "lr": 0.1, "momentum": 0.9, "nesterov": True, "maximize": True},
    {"name": "Adam", "lr": 0.01, "weight_decay": 0.1},
    {"name": "Adam", "lr": 0.01, "amsgrad": True},
    {"name": "AdamW", "lr": 0.01, "weight_decay": 0.1},
    {"name": "AdamW", "lr": 0.01, "weight_decay": 0.1, "amsgrad": True},
    {"name": "RMSprop", "lr": 0.01},
    {"name": "RMSprop", "lr": 0.01, "momentum": 0.5, "centered": True, "weight_decay": 0.1},
    {"name": "Adagrad", "lr": 0.05, "lr_decay": 0.01, "initial_accumulator_value": 0.1},
    {"name": "Adadelta", "lr": 0.5, "weight_decay": 0.1},
    {"name": "Adamax", "lr": 0.01, "weight_decay": 0.1},
    {"name": "NAdam", "lr": 0.01, "weight_decay": 0.1, "decoupled_weight_decay": True},
    {"name": "NAdam", "lr": 0.01},
    {"name": "RAdam", "lr": 0.01, "weight_decay": 0.1},
]

GROUPED: dict[str, list[dict[str, Any]]] = {
    "SGD": [{"lr": 0.3, "momentum": 0.5}, {"weight_decay": 0.2, "nesterov": True}],
    "Adam": [{"lr": 0.003, "betas": [0.5, 0.9]}, {"eps": 1e-3, "maximize": True}],
    "AdamW": [{"weight_decay": 0}, {"lr": 0.002, "betas": [0.5, 0.9]}],
    "RMSprop": [{"alpha": 0.5}, {"lr": 0.05, "eps": 1e-3}],
    "Adagrad": [{"lr_decay": 0.5}, {"lr": 0.2, "weight_decay": 0.3}],
    "Adadelta": [{"rho": 0.5}, {"lr": 0.1, "eps": 1e-3}],
    "Adamax": [{"lr": 0.003}, {"betas": [0.5, 0.9], "weight_decay": 0}],
    "NAdam": [{"momentum_decay": 0.1}, {"decoupled_weight_decay": False, "weight_decay": 0.3}],
    "RAdam": [{"decoupled_weight_decay": True}, {"betas": [0.5, 0.9], "lr": 0.1}],
}
"""Arguments of two groups, without changes of `momentum`, `amsgrad` and `centered`."""

DTYPES: dict[str, list[torch.dtype]] = {
    "float64": [torch.float64] * 5,
    "float32": [torch.float32] * 5,
    "bfloat16": [torch.bfloat16] * 5,
    "float16": [torch.float16] * 5,
    "mixed": [torch.float32, torch.bfloat16, torch.float64, torch.float32, torch.float16],
}

SHAPES = [(5, 7), (7,), (), (3, 2, 4), (33,)]

PATTERNS = {
    "always": lambda index, step: True,
    "sometimes": lambda index, step: (index + step) % 3 != 0,
    "never": lambda index, step: index != 1,
    "later": lambda index, step: step >= index,
    "rests": lambda index, step: index != 3 or step in (0, 5),
}

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 3e-2, torch.float16: 4e-3}
"""Relative and absolute. Fused kernels round once, torch's loop after each operation: a difference
of a few units in the last place per step in float32. Half-precision types use torch's loop."""


class FiveParameters(nn.Module):
    """Five parameters of different shapes."""

    def __init__(self, dtypes: list[torch.dtype]) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        for index, (shape, dtype) in enumerate(zip(SHAPES, dtypes, strict=True)):
            values = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
            self.register_parameter(f"p{index}", nn.Parameter(values))


def gradient(index: int, step: int, like: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(100 * step + index)
    return torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like.dtype)


def with_groups(spec: dict[str, Any], *matches: str) -> dict[str, Any]:
    """Return an optimizer with a group for each of up to two matches."""
    arguments = [dict(group) for group in GROUPED[spec["name"]]]
    if spec["name"] == "SGD" and ("momentum" not in spec or "dampening" in spec):
        arguments = [{"lr": 0.3, "maximize": True}, {"weight_decay": 0.2}]
    groups = [{"match": match, **group} for match, group in zip(matches, arguments, strict=False)]
    return {**spec, "groups": groups}


def param_groups(spec: dict[str, Any], model: nn.Module) -> list[dict[str, Any]]:
    """Assign a model's parameters to torch's groups by name."""
    groups = [dict(group) for group in spec.get("groups", [])]
    matches = [group.pop("match").split(",") for group in groups] + [["p0", "p1", "p2", "p3", "p4"]]
    groups.append({})
    for group in groups:
        group["params"] = []
    for name, parameter in model.named_parameters():
        first = next(at for at, match in enumerate(matches) if name in match)
        groups[first]["params"].append(parameter)
    return groups


def plain(spec: dict[str, Any], dtypes: list[torch.dtype], pattern: Any) -> list[Tensor]:
    model = FiveParameters(dtypes)
    parameters = [*model.parameters()]
    arguments = {key: value for key, value in spec.items() if key not in ("name", "groups")}
    groups = param_groups(spec, model)
    optimizer = getattr(torch.optim, spec["name"])(groups, foreach=False, **arguments)
    for step in range(STEPS):
        for index, parameter in enumerate(parameters):
            used = pattern(index, step)
            parameter.grad = gradient(index, step, parameter) if used else None
        optimizer.step()
    return [parameter.detach() for parameter in parameters]


class FlatRun:
    """An optimizer on a flat vector, whole or in shards."""

    def __init__(self, spec: dict[str, Any], dtypes: list[torch.dtype], cuts: int = 1) -> None:
        self.optimizer = ADAPTER.validate_python(spec)
        self.flat = FlatModel(FiveParameters(dtypes), group_of=self.optimizer.group_of)
        self.indices = [int(slot.name[1:]) for slot in self.flat.slots]
        size = -(-self.flat.size // cuts // 16) * 16
        bounds = [min(size * number, self.flat.size) for number in range(cuts)] + [self.flat.size]
        self.runs = list(itertools.pairwise(bounds))
        self.spec = spec
        self.optimizers = [self.make(*run) for run in self.runs]

    def make(self, start: int, stop: int) -> FlatOptimizer:
        flat = self.flat
        vectors = flat.params[start:stop], flat.grads[start:stop]
        return FlatOptimizer(self.optimizer, *vectors, flat.layout.cut(start, stop))

    def step(self, step: int, pattern: Any) -> None:
        present = np.array([pattern(index, step) for index in self.indices])
        self.flat.grads.zero_()
        for index, slot, used in zip(self.indices, self.flat.slots, present, strict=True):
            if used:
                view = slot.view(self.flat.grads)
                view.copy_(gradient(index, step, view))
        for optimizer in self.optimizers:
            optimizer.step(self.optimizer.rates(), present)

    def parameters(self) -> list[Tensor]:
        return [p.detach() for p in self.flat.model.parameters()]


def name_of(spec: dict[str, Any]) -> str:
    return "-".join(str(value) for key, value in spec.items() if key != "groups")


def assert_close_to_torch(ours: list[Tensor], expected: list[Tensor]) -> None:
    for actual, reference in zip(ours, expected, strict=True):
        limit = TOLERANCE[actual.dtype]
        torch.testing.assert_close(actual, reference, rtol=limit, atol=limit, equal_nan=True)


@pytest.mark.sweep(8)
@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("spec", OPTIMIZERS, ids=name_of)
def test_matches_torch(spec: dict[str, Any], dtypes: list[torch.dtype], pattern: Any) -> None:
    expected = plain(spec, dtypes, pattern)
    for cuts in (1, 3):
        ours = FlatRun(spec, dtypes, cuts)
        for step in range(STEPS):
            ours.step(step, pattern)
        assert_close_to_torch(ours.parameters(), expected)


@pytest.mark.sweep(6)
@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
@pytest.mark.parametrize("dtypes", [DTYPES["float64"], DTYPES["mixed"]], ids=["float64", "mixed"])
@pytest.mark.parametrize("spec", OPTIMIZERS, ids=name_of)
def test_groups_match_torch(spec: dict[str, Any], dtypes: list[torch.dtype], pattern: Any) -> None:
    test_matches_torch(with_groups(spec, "p1,p4", "p1,p3"), dtypes, pattern)


@settings(max_examples=150, deadline=None)
@given(st.randoms(use_true_random=True))
def test_any_groups_match_torch(random: Random) -> None:
    names = [f"p{number}" for number in range(5)]
    matches = [",".join(random.sample(names, random.randint(1, 4))) for _ in range(2)]
    spec = with_groups(random.choice(OPTIMIZERS), *matches[: random.randint(1, 2)])
    dtypes, pattern = random.choice([*DTYPES.values()]), random.choice([*PATTERNS.values()])
    if spec.get("centered"):  # the variance cancels in half precision
        dtypes = DTYPES["float64"]
    test_matches_torch(spec, dtypes, pattern)


@pytest.mark.sweep(6)
@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
@pytest.mark.parametrize(
    "spec", [*OPTIMIZERS, *(with_groups(spec, "p2", "p0,p4") for spec in OPTIMIZERS)], ids=name_of
)
def test_state_round_trip_keeps_the_bits(spec: dict[str, Any], pattern: Any) -> None:
    whole, reloaded = FlatRun(spec, DTYPES["mixed"], 2), FlatRun(spec, DTYPES["mixed"], 2)
    for step in range(STEPS):
        whole.step(step, pattern)
        states = [optimizer.state() for optimizer in reloaded.optimizers]
        reloaded.optimizers = [reloaded.make(*run) for run in reloaded.runs]
        for optimizer, state in zip(reloaded.optimizers, states, strict=True):
            optimizer.load({name: value.clone() for name, value in state.items()})
        reloaded.step(step, pattern)
    assert torch.equal(whole.flat.params, reloaded.flat.params)


@pytest.mark.parametrize("spec", OPTIMIZERS, ids=name_of)
def test_state_has_vectors_and_per_parameter_numbers(spec: dict[str, Any]) -> None:
    ours = FlatRun(spec, DTYPES["mixed"])
    assert ours.optimizers[0].state() == {}
    ours.step(0, PATTERNS["later"])
    state = ours.optimizers[0].state()
    if not state:
        assert spec["name"] == "SGD" and "momentum" not in spec
        return
    used = [ours.indices[index] for index in torch.nonzero(state.pop(USED)).flatten().tolist()]
    assert used == [0]
    for name, value in state.items():
        if name.startswith(PER_PARAMETER):
            assert name.removeprefix(PER_PARAMETER) in NUMBERS and value.shape == (5,)
        else:
            assert value.shape == ours.flat.params.shape and name not in NUMBERS


def test_equal_parameters_are_one_operation_per_segment() -> None:
    ours = FlatRun({"name": "AdamW", "lr": 0.1}, DTYPES["mixed"])
    optimizer = ours.optimizers[0]
    for step in range(3):
        ours.step(step, PATTERNS["always"])
        assert optimizer._ranges is None or len(optimizer._ranges) == 4
    before = optimizer._ranges
    ours.step(3, PATTERNS["always"])
    assert optimizer._ranges is before  # not computed again


def test_neighbours_of_a_group_are_one_operation() -> None:
    ours = FlatRun(with_groups({"name": "AdamW", "lr": 0.1}, "p0,p1", "p4"), DTYPES["float32"])
    for step in range(2):
        ours.step(step, PATTERNS["always"])
    runs = ours.optimizers[0]._update_ranges(None)
    assert [(run.group, run.pieces) for run in runs] == [
        (1, slice(0, 2)),
        (0, slice(2, 4)),
        (2, slice(4, 5)),
    ]


def test_zero_gradient_differs_from_none() -> None:
    spec = {"name": "SGD", "lr": 0.1, "momentum": 0.9}
    zero, none = FlatRun(spec, DTYPES["float64"]), FlatRun(spec, DTYPES["float64"])
    for ours in (zero, none):
        ours.step(0, PATTERNS["always"])
    before = zero.parameters()[0].clone()
    for ours, present in ((zero, True), (none, False)):
        ours.flat.grads.zero_()
        ours.optimizers[0].step([0.1], [present] * 5)
    assert not torch.equal(zero.parameters()[0], before)
    assert torch.equal(none.parameters()[0], before)
