"""What a model does around its layers: kept as plain torch has it, or refused by name."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from around_layers import PLAN, Small, plain, refused, same, task_of, trained
from torch import Tensor, nn
from torch.nn.utils import parametrizations, weight_norm

from distplat.platform.errors import SpecError


def hooked(model: nn.Module) -> nn.Module:
    model.register_forward_pre_hook(lambda module, args: (args[0] * 1.5,))
    model.register_forward_pre_hook(lambda module, args: args[0] - 1)
    model.register_forward_hook(lambda module, args, out: out * 2 if module.training else out)
    return model


class Doubled(nn.Sequential):
    """A `Sequential` that is more than its children one after the other."""

    def forward(self, input: Tensor) -> Tensor:
        for layer in self:
            input = layer(input * 2)
        return input + 1


def nested(model: nn.Sequential) -> nn.Module:
    inner = model[1:3]
    inner.register_forward_hook(lambda module, args, out: out + args[0])
    return nn.Sequential(model[0], inner, model[3], model[4])


def on_layers(model: nn.Sequential) -> nn.Module:
    model[2].register_forward_hook(lambda module, args, out: out * 3)

    def halved(module: nn.Module, given: Any, got: Any) -> Any:
        return (given[0] * 0.5,)

    model[4].register_full_backward_hook(halved)
    return model


def on_weights(model: nn.Sequential) -> nn.Module:
    for parameter in model[2].parameters():
        parameter.register_hook(lambda gradient: gradient * 0.5)  # type: ignore[no-untyped-call]
    return model


def parametrized(model: nn.Sequential) -> nn.Module:
    parametrizations.weight_norm(model[2])
    weight_norm(model[4])
    return model


def expanded(model: nn.Sequential) -> nn.Module:
    model[2].register_buffer("scale", torch.ones(1).double().expand(8))  # cannot be written
    return model


def in_place(model: nn.Sequential) -> nn.Module:
    return nn.Sequential(
        model[0], nn.ReLU(inplace=True), model[2], nn.Hardtanh(inplace=True), model[4]
    )


class Shared(nn.Module):
    """One module twice; whoever cuts between has it on two stages."""

    def __init__(self, layers: nn.Sequential) -> None:
        super().__init__()
        self.first, self.twice, self.last = layers[0], layers[2], layers[4]

    def forward(self, inputs: Tensor) -> Tensor:
        middle = torch.tanh(self.twice(torch.tanh(self.first(inputs))))
        outputs: Tensor = self.last(self.twice(middle))
        return outputs


KEPT = {
    "whole model": hooked,
    "forward of its own": lambda model: Doubled(*model),
    "container": nested,
    "layers": on_layers,
    "weights": on_weights,
    "in place": in_place,
    "an expanded buffer": expanded,
}


@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1"])
@pytest.mark.parametrize("made", KEPT.values(), ids=KEPT.keys())
def test_kept(made: Callable[[Any], Any], schedule: str) -> None:
    same(task_of(made), schedule=schedule)


@pytest.mark.sweep(2)
@pytest.mark.parametrize("how", [{"cut": "auto"}, {"recompute": True}], ids=str)
@pytest.mark.parametrize("made", KEPT.values(), ids=KEPT.keys())
def test_kept_however_it_is_cut(made: Callable[[Any], Any], how: dict[str, Any]) -> None:
    same(task_of(made), **how)


@pytest.mark.sweep(2)
@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
@pytest.mark.parametrize("data_strategy", ["ring", "ps-sync"])
@pytest.mark.parametrize("grid", [(1, 1, 2), (2, 1, 2)])
@pytest.mark.parametrize("made", [hooked, parametrized, Shared])
def test_kept_with_replicas(
    made: Callable[[Any], Any], grid: tuple[int, int, int], data_strategy: str
) -> None:
    more: dict[str, Any] = {"cut": ["last"]} if made is Shared and grid[0] > 1 else {}
    if made is parametrized and grid[0] > 1:
        more = {"cut": ["4"]}
    same(task_of(made), grid, data_strategy=data_strategy, **more)


@pytest.mark.parametrize("where", [["1"], ["3"]])
@pytest.mark.parametrize("recompute", [False, True])
def test_a_stage_may_begin_in_place(where: list[str], recompute: bool) -> None:
    same(task_of(in_place), cut=where, recompute=recompute)


class Logging(nn.Sequential):
    def train(self, mode: bool = True) -> "Logging":
        self.switched = mode
        return super().train(mode)


class Alike(nn.Sequential):
    """As Hugging Face's models."""

    def train(self, mode: bool = True) -> "Alike":
        return super().train(mode)


def test_a_train_that_does_as_torchs_is_none_of_its_own() -> None:
    same(task_of(lambda model: Alike(*model)))
    refused(task_of(lambda model: Logging(*model)), "a `train` of its own")


class Weighted(Small):
    """The loss has a parameter of its own."""

    def __init__(self) -> None:
        self.scales = {"all": nn.Parameter(torch.ones(3).double())}

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()

    def loss(self, outputs: Any, targets: Any) -> Tensor:
        return nn.functional.mse_loss(outputs * self.scales["all"], targets)


@pytest.mark.parametrize("grid", [(1, 1, 2), (2, 1, 1)])
def test_parameters_of_the_task(grid: tuple[int, int, int]) -> None:
    refused(Weighted, "scales.all", grid=grid)


@pytest.mark.parametrize("grid", [(1, 2, 1), (2, 2, 1)])
@pytest.mark.parametrize("made", [hooked, lambda model: model])
def test_hooks_around_slices(made: Callable[[Any], Any], grid: tuple[int, int, int]) -> None:
    more = {"cut": ["3"]} if grid[0] > 1 else {}
    same(task_of(made), grid, tensor_plan=PLAN, **more)


@pytest.mark.parametrize("grid", [(1, 2, 1), (2, 2, 1), (1, 2, 2)])
def test_a_plan_with_more_than_elements_between(grid: tuple[int, int, int]) -> None:
    def made(model: nn.Sequential) -> nn.Module:
        return nn.Sequential(model[0], nn.Softmax(dim=1), *model[2:])  # type: ignore[misc]

    with pytest.raises(SpecError, match="do not compute what whole ones do"):
        more = {"cut": ["3"]} if grid[0] > 1 else {}
        trained(task_of(made), grid, tensor_plan=PLAN, **more)


class Inwards(nn.Module):
    """Takes a mapping."""

    def __init__(self, layers: nn.Sequential) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, given: dict[str, Tensor]) -> Any:
        return self.layers(given["x"])


class Outwards(Inwards):
    """Gives one, too."""

    def forward(self, given: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"out": super().forward(given)}


class Mapped(Small):
    made = Inwards

    def train_data(self) -> Any:
        pairs = zip(*super().train_data().tensors, strict=True)
        return [({"x": inputs}, targets) for inputs, targets in pairs]

    def eval_data(self) -> Any:
        return None

    def loss(self, outputs: Any, targets: Any) -> Tensor:
        return super().loss(outputs["out"] if isinstance(outputs, dict) else outputs, targets)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("data_strategy", ["ring", "ps-sync"])
@pytest.mark.parametrize("made", [Inwards, Outwards])
def test_any_inputs_and_outputs_where_nothing_is_cut(
    made: type[nn.Module], data_strategy: str, recompute: bool
) -> None:
    kind = type("Made", (Mapped,), {"made": made})
    found = trained(kind, (1, 1, 2), data_strategy=data_strategy, recompute=recompute)
    expected = plain(Small, around="layers.")
    assert found.keys() == expected.keys()
    for name in expected:
        assert (found[name] - expected[name]).abs().max() < 1e-10, name


@pytest.mark.parametrize("data_strategy", ["ring", "ps-sync"])
def test_a_stage_with_nothing_to_train(data_strategy: str) -> None:
    kind = task_of(lambda model: nn.Sequential(nn.Flatten(), nn.Tanh(), *model))
    for cut in (["1"], ["2"]):
        with pytest.raises(SpecError, match="nothing to train: 0"):
            trained(kind, (2, 1, 1), cut=cut, data_strategy=data_strategy)
    same(kind, cut="auto", data_strategy=data_strategy)
