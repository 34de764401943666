"""The optimizer classes of the job file match the signatures of torch.optim."""

import inspect
from itertools import chain
from typing import Any, get_args

import pytest
import torch
from jobs import job_of
from pydantic import BaseModel, ValidationError

from distplat.platform import optimizers
from distplat.platform.errors import SpecError
from distplat.platform.optimizers import (
    LAMB,
    OPTIMIZERS,
    REFUSED_OPTIMIZERS,
    Adafactor,
    Adam,
    AnyOptimizer,
    Group,
    Muon,
    Optimizer,
    OptimizerName,
    TaskOptimizer,
)
from distplat.strategies.model.tensor_optimizer import class_of

ELEMENTWISE: list[type[Optimizer]] = list(get_args(get_args(AnyOptimizer)[0]))
OF_TENSORS: list[type[Optimizer]] = [Adafactor, Muon]
ALL: list[type[Optimizer]] = [*ELEMENTWISE, *OF_TENSORS, LAMB]
IMPLEMENTATION_ARGUMENTS = {"params", "foreach", "capturable", "differentiable", "fused"}
"""Arguments that select torch's implementation, not the result."""


def signature(cls: type[Optimizer]) -> dict[str, Any]:
    parameters = inspect.signature(class_of(cls.__name__)).parameters
    return {
        name: parameter.default
        for name, parameter in parameters.items()
        if name not in IMPLEMENTATION_ARGUMENTS
    }


def test_every_public_class_is_registered() -> None:
    types = [value for value in vars(optimizers).values() if isinstance(value, type)]
    public = {cls for cls in types if issubclass(cls, Optimizer) and cls.__name__[0] != "_"}
    assert {*ALL, TaskOptimizer} == {*OPTIMIZERS} == public - {Optimizer}
    assert [cls for cls in OPTIMIZERS if cls.of_tensors] == [*OF_TENSORS, LAMB]
    assert get_args(OptimizerName) == tuple(cls.__name__ for cls in ALL)


def test_torch_has_no_lamb() -> None:
    assert not hasattr(torch.optim, "LAMB")


@pytest.mark.parametrize("cls", ALL)
def test_name_is_the_class_name(cls: type[Optimizer]) -> None:
    assert get_args(cls.model_fields["name"].annotation) == (cls.__name__,)


@pytest.mark.parametrize("cls", ALL)
def test_arguments_and_defaults_match_torch(cls: type[Optimizer]) -> None:
    fields = cls.model_fields.items()
    ours = {name: field.default for name, field in fields if name not in ("name", "groups")}
    theirs = signature(cls)
    if cls is Adam:
        del theirs["decoupled_weight_decay"]  # use AdamW instead
    assert set(ours) == set(theirs)
    assert cls.model_fields["lr"].is_required()
    del ours["lr"], theirs["lr"]
    assert ours == theirs


@pytest.mark.parametrize("cls", ALL)
def test_torch_accepts_the_arguments(cls: type[Optimizer]) -> None:
    config = cls.model_validate({"name": cls.__name__, "lr": 0.5})
    parameter = torch.nn.Parameter(torch.ones(2, 2))
    optimizer = class_of(config.name)([parameter], **config.arguments())
    assert optimizer.defaults["lr"] == 0.5


def test_group_has_every_argument_except_one_ignored_by_torch() -> None:
    classes: list[type[Optimizer]] = [*ELEMENTWISE, Muon, LAMB]
    known = {*chain(*(cls.model_fields for cls in classes))} - {"groups"}
    assert Group.model_fields.keys() - {"match"} == known - {"initial_accumulator_value"}


def accepts(cls: type[BaseModel], fields: dict[str, object]) -> bool:
    try:
        cls.model_validate(fields)
    except ValidationError:
        return False
    return True


@pytest.mark.parametrize("cls", [*ELEMENTWISE, Muon, LAMB])
def test_group_accepts_the_same_values_as_its_optimizer(cls: type[Optimizer]) -> None:
    values = (-1, 0, 0.5, 1, 7.5, 100, True, "x", "original", [0.9, 0.5], [1, 0.5], float("nan"))
    for name in cls.model_fields.keys() & Group.model_fields.keys() - {"name"}:
        for value in (*values, [1, -2, 0.5]):
            accepted = accepts(cls, {"name": cls.__name__, "lr": 0.1, name: value})
            assert accepts(Group, {"match": "*", name: value}) == accepted, (name, value)


@pytest.mark.parametrize("cls", ELEMENTWISE)
def test_update_is_elementwise(cls: type[Optimizer]) -> None:
    """Servers rely on it: a shard can be updated alone, bit-identically."""
    torch.manual_seed(3)
    start, gradients = torch.randn(8), torch.randn(3, 8)

    def train(part: slice) -> torch.Tensor:
        parameter = torch.nn.Parameter(start[part].clone())
        config = cls.model_validate({"name": cls.__name__, "lr": 0.1, "weight_decay": 0.1})
        optimizer = getattr(torch.optim, cls.__name__)([parameter], **config.arguments())
        for gradient in gradients:
            parameter.grad = gradient[part].clone()
            optimizer.step()
        return parameter.detach()

    halves = torch.cat([train(slice(0, 4)), train(slice(4, 8))])
    assert torch.equal(train(slice(0, 8)), halves)


def test_refused_optimizers_are_the_rest_of_torch() -> None:
    assert {name for name in REFUSED_OPTIMIZERS if not hasattr(torch.optim, name)} == set()
    assert REFUSED_OPTIMIZERS.keys().isdisjoint(cls.__name__ for cls in [*ELEMENTWISE, *OF_TENSORS])
    theirs = {n for n, v in vars(torch.optim).items() if isinstance(v, type)} - {"Optimizer"}
    ours = REFUSED_OPTIMIZERS.keys() | {cls.__name__ for cls in [*ELEMENTWISE, *OF_TENSORS]}
    assert theirs == ours


OF_TORCH = [n for n, v in vars(torch.optim).items() if isinstance(v, type)]


@pytest.mark.parametrize("name", sorted({*OF_TORCH} - {"Optimizer"}))
def test_every_torch_optimizer_is_supported_or_has_a_hint(name: str) -> None:
    """The hint proposes no other class, because it would train differently."""
    try:
        job_of(optimizer={"name": name, "lr": 0.1})
    except SpecError as error:
        (problem,) = error.problems
        assert problem.where == ("optimizer", "name")
        assert "did you mean" not in problem.hint
        assert problem.hint.startswith(REFUSED_OPTIMIZERS[name])


@pytest.mark.parametrize("name", ["ASGD", "Rprop"])
def test_hint_suggests_an_optimizer_of_the_task(name: str) -> None:
    message = r"write \{name: task\}, under ring, and create it in the task: optimizer"
    group = {"match": "*", "name": name, "lr": 0.1}
    for optimizer in ({"name": name, "lr": 0.1}, {"name": "SGD", "lr": 0.1, "groups": [group]}):
        with pytest.raises(SpecError, match=message):
            job_of(optimizer=optimizer)
    with pytest.raises(SpecError) as caught:
        job_of(embeddings={"optimizer": {"name": name, "lr": 0.1}})
    (problem,) = caught.value.problems
    assert problem.hint.startswith("allowed: "), "a task creates no optimizer for tables"
