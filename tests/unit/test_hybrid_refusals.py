"""Hooks, own forwards and modes around a model's layers that a pipeline refuses by name."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from around_layers import assert_matches_plain, assert_refused, task_of, train_grid
from torch import Tensor, nn

from distplat.platform.errors import SpecError
from distplat.strategies.task import Task


def backward_hook(model: nn.Module) -> nn.Module:
    model.register_full_backward_hook(lambda module, grad_input, grad_output: None)
    return model


def kwargs_hook(model: nn.Module) -> nn.Module:
    model.register_forward_hook(lambda module, args, kwargs, out: out, with_kwargs=True)
    return model


def own_forward(model: nn.Sequential) -> nn.Module:
    forward: Any = model.forward
    model.forward = lambda inputs: forward(inputs) * 2  # type: ignore[method-assign]
    return model


def state_dict_hook(model: nn.Module) -> nn.Module:
    hook = lambda module, state, prefix, meta: None  # noqa: E731
    model.register_state_dict_post_hook(hook)  # type: ignore[no-untyped-call]
    return model


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize(
    ("build", "words"),
    [
        (backward_hook, ("Sequential", "a backward hook")),
        (kwargs_hook, ("with_kwargs",)),
        (own_forward, ("a `forward` of its own object",)),
        (state_dict_hook, ("state_dict hook",)),
    ],
)
def test_hooks_of_the_whole_model_are_refused(
    build: Callable[[Any], Any], words: tuple[str, ...]
) -> None:
    assert_refused(task_of(build), *words)
    assert_matches_plain(task_of(build), (1, 1, 2))


def test_hook_that_reads_the_whole_model_is_refused() -> None:
    def hooked(read: Callable[[Any, Any], Any]) -> type[Task]:
        def build(model: nn.Module) -> nn.Module:
            model.register_forward_hook(lambda module, args, out: out + read(module, args) * 0)
            return model

        return task_of(build)

    assert_refused(hooked(lambda module, args: args[0].sum()), "inputs")
    assert_refused(hooked(lambda module, args: module[0].weight.sum()), "parts of the whole model")
    assert_refused(
        hooked(lambda module, args: sum(p.sum() for p in module.parameters())), "`parameters`"
    )


@pytest.fixture
def hook_for_all() -> Iterator[None]:
    handle = torch.nn.modules.module.register_module_forward_hook(lambda module, args, out: None)
    yield
    handle.remove()


@pytest.mark.usefixtures("hook_for_all")
def test_global_module_hooks_are_refused() -> None:
    assert_refused(task_of(lambda model: model), "hooks for all modules")


class BodyAndHead(nn.Module):
    def __init__(self, layers: nn.Sequential) -> None:
        super().__init__()
        self.body, self.head = layers[:4], layers[4]

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.head(self.body(inputs))
        return outputs


def test_hook_of_a_module_split_by_stages_is_refused() -> None:
    def build(model: nn.Sequential) -> nn.Module:
        module = BodyAndHead(model)
        module.get_submodule("body").register_forward_hook(lambda module, args, out: out * 2)
        return module

    def stages(self: Task, model: Any) -> list[nn.Module]:
        return [*model.body, model.head]

    assert_refused(
        task_of(build, stages=stages), "body (Sequential) has a forward hook", "name body"
    )


def test_stages_that_omit_layers_are_refused() -> None:
    def stages(self: Task, model: Any) -> list[nn.Module]:
        return [*model.body[:3], model.head]

    assert_refused(
        task_of(BodyAndHead, stages=stages), "do not compute what BodyAndHead does", "`stages`"
    )


class FrozenBody(BodyAndHead):
    """Computes its body without gradients; the parameters are not frozen."""

    def forward(self, inputs: Tensor) -> Tensor:
        with torch.no_grad():
            middle = self.body(inputs)
        outputs: Tensor = self.head(middle)
        return outputs


class NoAutocastBody(BodyAndHead):
    """Disables autocast for its body."""

    def forward(self, inputs: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            middle = self.body(inputs)
        outputs: Tensor = self.head(middle)
        return outputs


@pytest.mark.parametrize(
    ("build", "words"),
    [(FrozenBody, ("body", "torch.no_grad")), (NoAutocastBody, ("body", "torch.autocast"))],
)
def test_contexts_lost_by_tracing_are_refused(
    build: type[BodyAndHead], words: tuple[str, ...]
) -> None:
    with pytest.raises(SpecError) as caught:
        train_grid(task_of(build), (2, 1, 1))
    assert all(word in str(caught.value) for word in words)
    assert_matches_plain(task_of(build), (1, 1, 2))


def test_stages_that_train_other_parameters_are_refused() -> None:
    def stages(self: Task, model: Any) -> list[nn.Module]:
        return [*model.body, model.head]

    assert_refused(
        task_of(FrozenBody, stages=stages), "gradients of other parameters", "body.0.weight"
    )


class OverridesTrain(nn.Sequential):
    def train(self, mode: bool = True) -> "OverridesTrain":
        super().train(mode)
        self[1].eval()
        return self


def test_train_override_of_the_whole_model_is_refused() -> None:
    def build(model: Any) -> nn.Module:
        return OverridesTrain(model[0], nn.Dropout(0.5), *model[1:])

    assert_refused(task_of(build), "a `train` of its own")
    assert_matches_plain(task_of(build), (1, 1, 2))

    def build_nested(model: Any) -> nn.Module:
        return nn.Sequential(build(model[:2]), *model[2:])

    assert_matches_plain(task_of(build_nested))


class UsesOtherWeight(nn.Module):
    """Uses the weight of another layer, which is not one of its submodules."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.others, self.own = [layer], nn.Linear(6, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.own(inputs @ self.others[0].weight)
        return outputs


def test_weight_outside_the_model_is_not_updated() -> None:
    """As in plain torch, a weight outside the model is not updated."""

    def build(model: nn.Sequential) -> nn.Module:
        torch.manual_seed(7)
        return nn.Sequential(
            UsesOtherWeight(nn.Linear(6, 6).double()).double(), nn.Linear(3, 3).double()
        )

    assert_matches_plain(task_of(build))


def test_weight_of_another_stage_is_refused() -> None:
    build = lambda model: nn.Sequential(model[0], UsesOtherWeight(model[0]).double())  # noqa: E731
    assert_refused(task_of(build), "0.weight", "in none of its layers")
    assert_matches_plain(task_of(build), (1, 1, 2))


class UnfreezesItself(nn.Linear):
    calls = 0

    def forward(self, input: Tensor) -> Tensor:
        self.calls += 1
        if self.calls > 5:
            self.weight.requires_grad_(True)
        return super().forward(input)


def test_unfreezing_a_parameter_is_refused() -> None:
    def build(model: nn.Sequential) -> nn.Module:
        layer = UnfreezesItself(8, 8).double()
        layer.weight.requires_grad_(False)
        return nn.Sequential(model[0], layer, model[4])

    assert_refused(task_of(build), "unfrozen during the run", "1.weight")


def test_sync_batch_norm_is_refused() -> None:
    build = lambda model: nn.Sequential(model[0], nn.SyncBatchNorm(8).double(), model[4])  # noqa: E731
    assert_refused(task_of(build), "'1' is nn.SyncBatchNorm", "ring")


def hook_on_sliced_weight(model: nn.Sequential) -> nn.Module:
    weight: Any = model[0].weight
    weight.register_hook(lambda gradient: gradient * 0.5)
    return model


def post_accumulate_hook_on_sliced_weight(model: nn.Sequential) -> nn.Module:
    weight: Any = model[2].weight
    weight.register_post_accumulate_grad_hook(lambda parameter: None)
    return model


def hook_on_sliced_module(model: nn.Sequential) -> nn.Module:
    model[0].register_forward_hook(lambda module, args, out: out / out.norm())
    return model


def parametrization_of_sliced_bias(model: nn.Sequential) -> nn.Module:
    nn.utils.parametrize.register_parametrization(model[0], "bias", nn.Tanh())
    return model


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (hook_on_sliced_weight, ("0.weight", "a hook")),
        (post_accumulate_hook_on_sliced_weight, ("2.weight", "a post-accumulate hook")),
        (hook_on_sliced_module, ("0 (Linear)", "a forward hook")),
        (parametrization_of_sliced_bias, ("0 (ParametrizedLinear)", "a parametrization")),
    ],
)
def test_hooks_of_sliced_modules_are_refused(
    build: Callable[[Any], Any], words: tuple[str, ...]
) -> None:
    assert_refused(task_of(build), *words, grid=(1, 2, 1))
