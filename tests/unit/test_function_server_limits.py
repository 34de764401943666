"""Changes in a train function that servers do not support are rejected."""

import copy
import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from plain_functions import (
    ASYNC,
    SYNC,
    Make,
    adam,
    data_of,
    loss_of,
    model_of,
    momentum,
    run_under,
    train_steps,
)
from torch import nn
from torch.autograd import backward

import distplat
from distplat.platform.errors import MismatchError, NonFiniteError, SpecError


def test_error_names_a_rank_with_fewer_backwards() -> None:
    def train(config: Any) -> None:
        rank = distplat.get_context().rank
        model = distplat.prepare(model_of())
        train_steps(model, momentum(model.parameters()), 3 - rank, rank, 2)

    with pytest.raises(MismatchError, match="the train function of worker-1 is over"):
        run_under(SYNC, train, 2)


def test_error_names_a_non_finite_gradient() -> None:
    def train(config: Any) -> None:
        first, second = distplat.prepare(nn.Linear(4, 4).double(), model_of())
        infinite = float("inf") if distplat.get_context().rank else 1.0
        optimizer = momentum(second.parameters())
        backward(second(first(data_of().tensors[0][:2])).mean() * infinite)
        optimizer.step()

    with pytest.raises(NonFiniteError, match=r"rank 1.*weight|weight"):
        run_under(SYNC, train, 2)


def write(model: nn.Module, optimizer: Any) -> None:
    with torch.no_grad():
        next(model.parameters()).zero_()


def replace(model: nn.Module, optimizer: Any) -> None:
    next(model.parameters()).data = torch.ones(6, 4).double()


def set_flag(model: nn.Module, optimizer: Any) -> None:
    optimizer.param_groups[0]["nesterov"] = True


LATE_CHANGES: dict[str, Callable[[nn.Module, Any], object]] = {
    "a model": lambda model, optimizer: distplat.prepare(nn.Linear(1, 1)),
    "an optimizer": lambda model, optimizer: distplat.prepare(adam(model.parameters())),
    "unprepared": lambda model, optimizer: adam(model.parameters()).step(),
    "written": write,
    "replaced": replace,
    "loaded": lambda model, optimizer: optimizer.load_state_dict(optimizer.state_dict()),
    "clamped": lambda model, _: model.get_parameter("2.weight").data.clamp_(-0.01, 0.01),  # WGAN
    "a flag": set_flag,
    "reset": lambda model, optimizer: optimizer.state.clear(),
    "another state": lambda model, optimizer: setattr(optimizer, "state", defaultdict(dict)),
    "read": lambda model, optimizer: optimizer.state[model.get_parameter("0.weight")],
    "iterated": lambda model, optimizer: [*optimizer.state.items()],
    "tested": lambda model, optimizer: model.get_parameter("0.weight") in optimizer.state,
    "counted": lambda model, optimizer: len(optimizer.state),
    "copied": lambda model, optimizer: copy.deepcopy(optimizer),
    "a group": lambda model, optimizer: optimizer.add_param_group(
        {"params": [nn.Parameter(torch.ones(1))]}
    ),
}


@pytest.mark.parametrize(
    ("strategy", "change", "text"),
    [
        (SYNC, "a model", "prepare all models before the first backward"),
        (ASYNC, "a model", "prepare all models and optimizers before the first step"),
        (ASYNC, "an optimizer", "prepare all models and optimizers before the first step"),
        (ASYNC, "unprepared", "pass the optimizer to prepare"),
        (ASYNC, "written", "'0.weight' was written to after the first step"),
        (ASYNC, "replaced", "'0.weight' was written to after the first step"),
        (ASYNC, "clamped", "'2.weight' was written to after the first step"),
        (ASYNC, "loaded", "got a state_dict after the first step"),
        (ASYNC, "reset", "optimizer.state was used after the first step"),
        (ASYNC, "another state", "optimizer.state was used after the first step"),
        (ASYNC, "iterated", "optimizer.state was used after the first step"),
        (ASYNC, "tested", "optimizer.state was used after the first step"),
        (ASYNC, "counted", "optimizer.state was used after the first step"),
        (ASYNC, "copied", "optimizer.state was used after the first step"),
        (ASYNC, "read", r"read it with optimizer.state_dict\(\)"),
        (ASYNC, "a flag", "nesterov of an optimizer has changed"),
        (ASYNC, "a group", "got parameters after the first step"),
    ],
)
def test_rejects_changes_after_the_first_step(
    strategy: Mapping[str, Any], change: str, text: str
) -> None:
    def train(config: Any) -> None:
        model = model_of()
        optimizer = momentum(model.parameters())
        model, optimizer = distplat.prepare(model, optimizer)
        train_steps(model, optimizer, 1)
        LATE_CHANGES[change](model, optimizer)
        train_steps(model, optimizer, 1)

    with pytest.raises(SpecError) as caught:
        run_under(strategy, train, 1)
    message = " ".join([str(caught.value), *(p.hint for p in caught.value.problems)])
    assert re.search(text, message), message


@pytest.mark.parametrize("name", ["lightning.fabric", "lightning_fabric"])
def test_lightning_may_move_the_state(name: str) -> None:
    """Its Trainer moves the state of all optimizers to the CPU at its end, with this loop."""
    module: dict[str, Any] = {"__name__": f"{name}.utilities.optimizer"}
    exec("def move(optimizer):\n    for _ in optimizer.state.items():\n        1 / 0", module)

    def train(config: Any) -> None:
        model, optimizer = distplat.prepare(model := model_of(), momentum(model.parameters()))
        train_steps(model, optimizer, 1)
        module["move"](optimizer)
        train_steps(model, optimizer, 1)

    run_under(ASYNC, train, 1)


class CustomSGD(torch.optim.SGD):
    """A user-defined optimizer."""


def decoupled(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, decoupled_weight_decay=True)


@pytest.mark.parametrize(
    ("makes", "text"),
    [
        ([lambda p: CustomSGD(p, lr=0.1)], "not support CustomSGD"),
        ([lambda p: torch.optim.LBFGS(p)], "not support LBFGS"),
        ([decoupled], "decoupled_weight_decay=True"),
        ([adam, momentum], "one class of optimizer, and got AdamW, SGD"),
    ],
)
def test_rejects_unsupported_optimizers(makes: list[Make], text: str) -> None:
    def train(config: Any) -> None:
        model = model_of()
        layers = [layer for layer in model.children() if isinstance(layer, nn.Linear)]
        optimizers = [make(layer.parameters()) for make, layer in zip(makes, layers, strict=False)]
        distplat.prepare(model, *optimizers)

    with pytest.raises(SpecError, match=text):
        run_under(ASYNC, train, 1)


def test_rejects_a_parameter_of_two_optimizers() -> None:
    def train(config: Any) -> None:
        model = model_of()
        distplat.prepare(model, adam(model.parameters()), adam([*model.parameters()][:1]))

    with pytest.raises(SpecError, match="two optimizers have a parameter in common"):
        run_under(ASYNC, train, 1)


def test_rejects_a_parameter_of_no_model_with_one_rank() -> None:
    def train(config: Any) -> None:
        model, loose = model_of(), nn.Parameter(torch.ones(1).double())
        optimizer = momentum([*model.parameters(), loose])
        model, optimizer = distplat.prepare(model, optimizer)
        backward((loss_of(model, data_of()[:4]) * loose).sum())
        optimizer.step()

    with pytest.raises(SpecError, match=r"would update a parameter of no model"):
        run_under(ASYNC, train, 1)
