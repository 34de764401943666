"""The written-out optimizers against the signatures of torch.optim."""

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

KINDS: list[type[Optimizer]] = list(get_args(get_args(AnyOptimizer)[0]))
WHOLE: list[type[Optimizer]] = [Adafactor, Muon]
EVERY: list[type[Optimizer]] = [*KINDS, *WHOLE, LAMB]
NOT_OURS = {"params", "foreach", "capturable", "differentiable", "fused"}
"""Arguments that say how torch computes, not what."""


def signature(kind: type[Optimizer]) -> dict[str, Any]:
    parameters = inspect.signature(class_of(kind.__name__)).parameters
    return {name: one.default for name, one in parameters.items() if name not in NOT_OURS}


def test_every_class_of_the_module_may_be_named() -> None:
    there = [one for one in vars(optimizers).values() if isinstance(one, type)]
    public = {one for one in there if issubclass(one, Optimizer) and one.__name__[0] != "_"}
    assert {*EVERY, TaskOptimizer} == {*OPTIMIZERS} == public - {Optimizer}
    assert [kind for kind in OPTIMIZERS if kind.of_tensors] == [*WHOLE, LAMB]
    assert get_args(OptimizerName) == tuple(kind.__name__ for kind in EVERY)


def test_torch_has_no_lamb() -> None:
    assert not hasattr(torch.optim, "LAMB")


@pytest.mark.parametrize("kind", EVERY)
def test_the_name_is_the_classs_own(kind: type[Optimizer]) -> None:
    assert get_args(kind.model_fields["name"].annotation) == (kind.__name__,)


@pytest.mark.parametrize("kind", EVERY)
def test_arguments_and_defaults_are_torchs(kind: type[Optimizer]) -> None:
    fields = kind.model_fields.items()
    ours = {name: one.default for name, one in fields if name not in ("name", "groups")}
    theirs = signature(kind)
    if kind is Adam:
        del theirs["decoupled_weight_decay"]  # that is AdamW
    assert set(ours) == set(theirs)
    assert kind.model_fields["lr"].is_required()
    del ours["lr"], theirs["lr"]
    assert ours == theirs


@pytest.mark.parametrize("kind", EVERY)
def test_torch_takes_the_arguments(kind: type[Optimizer]) -> None:
    rule = kind.model_validate({"name": kind.__name__, "lr": 0.5})
    parameter = torch.nn.Parameter(torch.ones(2, 2))
    made = class_of(rule.name)([parameter], **rule.arguments())
    assert made.defaults["lr"] == 0.5


def test_a_group_has_every_argument_but_one_that_torch_ignores_there() -> None:
    kinds: list[type[Optimizer]] = [*KINDS, Muon, LAMB]
    known = {*chain(*(kind.model_fields for kind in kinds))} - {"groups"}
    assert Group.model_fields.keys() - {"match"} == known - {"initial_accumulator_value"}


def takes(kind: type[BaseModel], fields: dict[str, object]) -> bool:
    try:
        kind.model_validate(fields)
    except ValidationError:
        return False
    return True


@pytest.mark.parametrize("kind", [*KINDS, Muon, LAMB])
def test_a_group_takes_the_values_that_its_optimizer_takes(kind: type[Optimizer]) -> None:
    values = (-1, 0, 0.5, 1, 7.5, 100, True, "x", "original", [0.9, 0.5], [1, 0.5], float("nan"))
    for name in kind.model_fields.keys() & Group.model_fields.keys() - {"name"}:
        for value in (*values, [1, -2, 0.5]):
            own = takes(kind, {"name": kind.__name__, "lr": 0.1, name: value})
            assert takes(Group, {"match": "*", name: value}) == own, (name, value)


@pytest.mark.parametrize("kind", KINDS)
def test_an_update_needs_nothing_but_the_elements_own_gradient(kind: type[Optimizer]) -> None:
    """The reason for this list: a shard can be updated alone, to the same bits."""
    torch.manual_seed(3)
    start, gradients = torch.randn(8), torch.randn(3, 8)

    def train(part: slice) -> torch.Tensor:
        parameter = torch.nn.Parameter(start[part].clone())
        rule = kind.model_validate({"name": kind.__name__, "lr": 0.1, "weight_decay": 0.1})
        made = getattr(torch.optim, kind.__name__)([parameter], **rule.arguments())
        for gradient in gradients:
            parameter.grad = gradient[part].clone()
            made.step()
        return parameter.detach()

    halves = torch.cat([train(slice(0, 4)), train(slice(4, 8))])
    assert torch.equal(train(slice(0, 8)), halves)


def test_the_others_are_torchs_too() -> None:
    assert {name for name in REFUSED_OPTIMIZERS if not hasattr(torch.optim, name)} == set()
    assert REFUSED_OPTIMIZERS.keys().isdisjoint(kind.__name__ for kind in [*KINDS, *WHOLE])
    theirs = {n for n, one in vars(torch.optim).items() if isinstance(one, type)} - {"Optimizer"}
    ours = REFUSED_OPTIMIZERS.keys() | {kind.__name__ for kind in [*KINDS, *WHOLE]}
    assert theirs == ours


OF_TORCH = [n for n, one in vars(torch.optim).items() if isinstance(one, type)]


@pytest.mark.parametrize("name", sorted({*OF_TORCH} - {"Optimizer"}))
def test_a_job_that_names_one_of_torchs_has_it_or_is_told_what_to_do(name: str) -> None:
    """No other class is proposed in its place: it would train otherwise."""
    try:
        job_of(optimizer={"name": name, "lr": 0.1})
    except SpecError as error:
        (problem,) = error.problems
        assert problem.where == ("optimizer", "name")
        assert "did you mean" not in problem.hint
        assert problem.hint.startswith(REFUSED_OPTIMIZERS[name])


@pytest.mark.parametrize("name", ["ASGD", "Rprop"])
def test_what_a_task_can_make_is_said(name: str) -> None:
    told = r"write \{name: task\}, under ring, and create it in the task: optimizer"
    group = {"match": "*", "name": name, "lr": 0.1}
    for optimizer in ({"name": name, "lr": 0.1}, {"name": "SGD", "lr": 0.1, "groups": [group]}):
        with pytest.raises(SpecError, match=told):
            job_of(optimizer=optimizer)
    with pytest.raises(SpecError) as caught:
        job_of(embeddings={"optimizer": {"name": name, "lr": 0.1}})
    (problem,) = caught.value.problems
    assert problem.hint.startswith("allowed: "), "a task makes none for tables"
