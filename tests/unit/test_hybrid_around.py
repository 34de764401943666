"""Hooks, own forwards and modes around a model's layers: as in plain torch, or refused."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from around_layers import (
    PLAN,
    Small,
    assert_matches_plain,
    assert_refused,
    task_of,
    train_grid,
    train_plain,
)
from torch import Tensor, nn
from torch.nn.utils import parametrizations, weight_norm

from distplat.platform.errors import SpecError


def add_model_hooks(model: nn.Module) -> nn.Module:
    model.register_forward_pre_hook(lambda module, args: (args[0] * 1.5,))
    model.register_forward_pre_hook(lambda module, args: args[0] - 1)
    model.register_forward_hook(lambda module, args, out: out * 2 if module.training else out)
    return model


class Doubled(nn.Sequential):
    """A `Sequential` with its own `forward`."""

    def forward(self, input: Tensor) -> Tensor:
        for layer in self:
            input = layer(input * 2)
        return input + 1


def nest_container(model: nn.Sequential) -> nn.Module:
    inner = model[1:3]
    inner.register_forward_hook(lambda module, args, out: out + args[0])
    return nn.Sequential(model[0], inner, model[3], model[4])


def add_layer_hooks(model: nn.Sequential) -> nn.Module:
    model[2].register_forward_hook(lambda module, args, out: out * 3)

    def halve(module: nn.Module, grad_input: Any, grad_output: Any) -> Any:
        return (grad_input[0] * 0.5,)

    model[4].register_full_backward_hook(halve)
    return model


def add_weight_hooks(model: nn.Sequential) -> nn.Module:
    for parameter in model[2].parameters():
        parameter.register_hook(lambda gradient: gradient * 0.5)  # type: ignore[no-untyped-call]
    return model


def add_parametrizations(model: nn.Sequential) -> nn.Module:
    parametrizations.weight_norm(model[2])
    weight_norm(model[4])
    return model


def add_expanded_buffer(model: nn.Sequential) -> nn.Module:
    model[2].register_buffer("scale", torch.ones(1).double().expand(8))  # cannot be written
    return model


def use_in_place_activations(model: nn.Sequential) -> nn.Module:
    return nn.Sequential(
        model[0], nn.ReLU(inplace=True), model[2], nn.Hardtanh(inplace=True), model[4]
    )


class Shared(nn.Module):
    """Calls one module twice: a cut between the calls puts it on two stages."""

    def __init__(self, layers: nn.Sequential) -> None:
        super().__init__()
        self.first, self.twice, self.last = layers[0], layers[2], layers[4]

    def forward(self, inputs: Tensor) -> Tensor:
        middle = torch.tanh(self.twice(torch.tanh(self.first(inputs))))
        outputs: Tensor = self.last(self.twice(middle))
        return outputs


BUILDERS = {
    "whole model": add_model_hooks,
    "own forward": lambda model: Doubled(*model),
    "container": nest_container,
    "layers": add_layer_hooks,
    "weights": add_weight_hooks,
    "in place": use_in_place_activations,
    "expanded buffer": add_expanded_buffer,
}


@pytest.mark.sweep(2)
@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1"])
@pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS.keys())
def test_matches_plain_torch(build: Callable[[Any], Any], schedule: str) -> None:
    assert_matches_plain(task_of(build), schedule=schedule)


@pytest.mark.sweep(2)
@pytest.mark.parametrize("options", [{"cut": "auto"}, {"recompute": True}], ids=str)
@pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS.keys())
def test_matches_plain_torch_with_other_cuts(
    build: Callable[[Any], Any], options: dict[str, Any]
) -> None:
    assert_matches_plain(task_of(build), **options)


@pytest.mark.sweep(2)
@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
@pytest.mark.parametrize("data_strategy", ["ring", "ps-sync"])
@pytest.mark.parametrize("grid", [(1, 1, 2), (2, 1, 2)])
@pytest.mark.parametrize("build", [add_model_hooks, add_parametrizations, Shared])
def test_matches_plain_torch_with_replicas(
    build: Callable[[Any], Any], grid: tuple[int, int, int], data_strategy: str
) -> None:
    extra: dict[str, Any] = {"cut": ["last"]} if build is Shared and grid[0] > 1 else {}
    if build is add_parametrizations and grid[0] > 1:
        extra = {"cut": ["4"]}
    assert_matches_plain(task_of(build), grid, data_strategy=data_strategy, **extra)


@pytest.mark.parametrize("cut", [["1"], ["3"]])
@pytest.mark.parametrize("recompute", [False, True])
def test_stage_may_begin_with_an_in_place_layer(cut: list[str], recompute: bool) -> None:
    assert_matches_plain(task_of(use_in_place_activations), cut=cut, recompute=recompute)


class RecordsMode(nn.Sequential):
    def train(self, mode: bool = True) -> "RecordsMode":
        self.switched = mode
        return super().train(mode)


class DelegatesTrain(nn.Sequential):
    """Overrides `train` without a change, as Hugging Face's models do."""

    def train(self, mode: bool = True) -> "DelegatesTrain":
        return super().train(mode)


def test_train_override_is_accepted_if_it_only_delegates() -> None:
    assert_matches_plain(task_of(lambda model: DelegatesTrain(*model)))
    assert_refused(task_of(lambda model: RecordsMode(*model)), "a `train` of its own")


class Weighted(Small):
    """Its loss has a parameter outside the model."""

    def __init__(self) -> None:
        self.scales = {"all": nn.Parameter(torch.ones(3).double())}

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()

    def loss(self, outputs: Any, targets: Any) -> Tensor:
        return nn.functional.mse_loss(outputs * self.scales["all"], targets)


@pytest.mark.parametrize("grid", [(1, 1, 2), (2, 1, 1)])
def test_parameters_of_the_task_are_refused(grid: tuple[int, int, int]) -> None:
    assert_refused(Weighted, "scales.all", grid=grid)


@pytest.mark.parametrize("grid", [(1, 2, 1), (2, 2, 1)])
@pytest.mark.parametrize("build", [add_model_hooks, lambda model: model])
def test_model_hooks_with_tensor_slices(
    build: Callable[[Any], Any], grid: tuple[int, int, int]
) -> None:
    extra = {"cut": ["3"]} if grid[0] > 1 else {}
    assert_matches_plain(task_of(build), grid, tensor_plan=PLAN, **extra)


@pytest.mark.parametrize("grid", [(1, 2, 1), (2, 2, 1), (1, 2, 2)])
def test_plan_with_softmax_between_slices_is_refused(grid: tuple[int, int, int]) -> None:
    def build(model: nn.Sequential) -> nn.Module:
        return nn.Sequential(model[0], nn.Softmax(dim=1), *model[2:])  # type: ignore[misc]

    with pytest.raises(SpecError, match="do not compute what whole ones do"):
        extra = {"cut": ["3"]} if grid[0] > 1 else {}
        train_grid(task_of(build), grid, tensor_plan=PLAN, **extra)


class MappingInput(nn.Module):
    """Its input is a mapping."""

    def __init__(self, layers: nn.Sequential) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, inputs: dict[str, Tensor]) -> Any:
        return self.layers(inputs["x"])


class MappingInputAndOutput(MappingInput):
    """Its input and output are mappings."""

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"out": super().forward(inputs)}


class Mapped(Small):
    wrap = MappingInput

    def train_data(self) -> Any:
        pairs = zip(*super().train_data().tensors, strict=True)
        return [({"x": inputs}, targets) for inputs, targets in pairs]

    def eval_data(self) -> Any:
        return None

    def loss(self, outputs: Any, targets: Any) -> Tensor:
        return super().loss(outputs["out"] if isinstance(outputs, dict) else outputs, targets)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("data_strategy", ["ring", "ps-sync"])
@pytest.mark.parametrize("wrapper", [MappingInput, MappingInputAndOutput])
def test_uncut_model_may_have_mapping_inputs_and_outputs(
    wrapper: type[nn.Module], data_strategy: str, recompute: bool
) -> None:
    task_type = type("Made", (Mapped,), {"wrap": wrapper})
    found = train_grid(task_type, (1, 1, 2), data_strategy=data_strategy, recompute=recompute)
    expected = train_plain(Small, around="layers.")
    assert found.keys() == expected.keys()
    for name in expected:
        assert (found[name] - expected[name]).abs().max() < 1e-10, name


@pytest.mark.parametrize("data_strategy", ["ring", "ps-sync"])
def test_stage_without_parameters_is_refused(data_strategy: str) -> None:
    task_type = task_of(lambda model: nn.Sequential(nn.Flatten(), nn.Tanh(), *model))
    for cut in (["1"], ["2"]):
        with pytest.raises(SpecError, match="nothing to train: 0"):
            train_grid(task_type, (2, 1, 1), cut=cut, data_strategy=data_strategy)
    assert_matches_plain(task_type, cut="auto", data_strategy=data_strategy)
