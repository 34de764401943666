"""What a model does around its layers that a pipeline refuses by name."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from around_layers import refused, same, task_of, trained
from torch import Tensor, nn

from distplat.platform.errors import SpecError
from distplat.strategies.task import Task


def backward_hook(model: nn.Module) -> nn.Module:
    model.register_full_backward_hook(lambda module, given, got: None)
    return model


def kwargs_hook(model: nn.Module) -> nn.Module:
    model.register_forward_hook(lambda module, args, kwargs, out: out, with_kwargs=True)
    return model


def own_forward(model: nn.Sequential) -> nn.Module:
    forward: Any = model.forward
    model.forward = lambda inputs: forward(inputs) * 2  # type: ignore[method-assign]
    return model


def saving(model: nn.Module) -> nn.Module:
    hook = lambda module, state, prefix, meta: None  # noqa: E731
    model.register_state_dict_post_hook(hook)  # type: ignore[no-untyped-call]
    return model


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize(
    ("made", "words"),
    [
        (backward_hook, ("Sequential", "a backward hook")),
        (kwargs_hook, ("with_kwargs",)),
        (own_forward, ("a `forward` of its own object",)),
        (saving, ("state_dict hook",)),
    ],
)
def test_refused_of_the_whole_model(made: Callable[[Any], Any], words: tuple[str, ...]) -> None:
    refused(task_of(made), *words)
    same(task_of(made), (1, 1, 2))


def test_a_hook_that_asks_for_more_than_a_stage_has() -> None:
    def asking(what: Callable[[Any, Any], Any]) -> type[Task]:
        def made(model: nn.Module) -> nn.Module:
            model.register_forward_hook(lambda module, args, out: out + what(module, args) * 0)
            return model

        return task_of(made)

    refused(asking(lambda module, args: args[0].sum()), "inputs")
    refused(asking(lambda module, args: module[0].weight.sum()), "parts of the whole model")
    refused(asking(lambda module, args: sum(p.sum() for p in module.parameters())), "`parameters`")


@pytest.fixture
def hook_for_all() -> Iterator[None]:
    handle = torch.nn.modules.module.register_module_forward_hook(lambda module, args, out: None)
    yield
    handle.remove()


@pytest.mark.usefixtures("hook_for_all")
def test_hooks_for_all_modules() -> None:
    refused(task_of(lambda model: model), "hooks for all modules")


class Inside(nn.Module):
    def __init__(self, layers: nn.Sequential) -> None:
        super().__init__()
        self.body, self.head = layers[:4], layers[4]

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.head(self.body(inputs))
        return outputs


def test_a_module_of_which_only_parts_are_layers() -> None:
    def made(model: nn.Sequential) -> nn.Module:
        inside = Inside(model)
        inside.get_submodule("body").register_forward_hook(lambda module, args, out: out * 2)
        return inside

    def stages(self: Task, model: Any) -> list[nn.Module]:
        return [*model.body, model.head]

    refused(task_of(made, stages=stages), "body (Sequential) has a forward hook", "name body")


def test_layers_that_are_not_the_model() -> None:
    def stages(self: Task, model: Any) -> list[nn.Module]:
        return [*model.body[:3], model.head]

    refused(task_of(Inside, stages=stages), "do not compute what Inside does", "`stages`")


class FrozenBody(Inside):
    """Trains its head alone, without having frozen the rest."""

    def forward(self, inputs: Tensor) -> Tensor:
        with torch.no_grad():
            middle = self.body(inputs)
        outputs: Tensor = self.head(middle)
        return outputs


class Exact(Inside):
    """Has a part that is never computed in halves."""

    def forward(self, inputs: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            middle = self.body(inputs)
        outputs: Tensor = self.head(middle)
        return outputs


@pytest.mark.parametrize(
    ("made", "words"),
    [(FrozenBody, ("body", "torch.no_grad")), (Exact, ("body", "torch.autocast"))],
)
def test_contexts_that_a_trace_leaves_out(made: type[Inside], words: tuple[str, ...]) -> None:
    with pytest.raises(SpecError) as caught:
        trained(task_of(made), (2, 1, 1))
    assert all(word in str(caught.value) for word in words)
    same(task_of(made), (1, 1, 2))


def test_layers_that_reach_other_parameters() -> None:
    def stages(self: Task, model: Any) -> list[nn.Module]:
        return [*model.body, model.head]

    refused(task_of(FrozenBody, stages=stages), "gradients of other parameters", "body.0.weight")


class Switching(nn.Sequential):
    def train(self, mode: bool = True) -> "Switching":
        super().train(mode)
        self[1].eval()
        return self


def test_a_way_of_its_own_to_switch_the_mode() -> None:
    def made(model: Any) -> nn.Module:
        return Switching(model[0], nn.Dropout(0.5), *model[1:])

    refused(task_of(made), "a `train` of its own")
    same(task_of(made), (1, 1, 2))

    def inner(model: Any) -> nn.Module:
        return nn.Sequential(made(model[:2]), *model[2:])

    same(task_of(inner))


class Borrowing(nn.Module):
    """Uses a weight that another layer has, without its being a part of this one."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.others, self.own = [layer], nn.Linear(6, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.own(inputs @ self.others[0].weight)
        return outputs


def test_a_weight_that_nobody_trains() -> None:
    """As in plain torch: what is no part of the model stays as it is."""

    def made(model: nn.Sequential) -> nn.Module:
        torch.manual_seed(7)
        return nn.Sequential(Borrowing(nn.Linear(6, 6).double()).double(), nn.Linear(3, 3).double())

    same(task_of(made))


def test_a_weight_of_another_stage() -> None:
    made = lambda model: nn.Sequential(model[0], Borrowing(model[0]).double())  # noqa: E731
    refused(task_of(made), "0.weight", "in none of its layers")
    same(task_of(made), (1, 1, 2))


class Unfreezing(nn.Linear):
    calls = 0

    def forward(self, input: Tensor) -> Tensor:
        self.calls += 1
        if self.calls > 5:
            self.weight.requires_grad_(True)
        return super().forward(input)


def test_a_parameter_that_is_unfrozen() -> None:
    def made(model: nn.Sequential) -> nn.Module:
        layer = Unfreezing(8, 8).double()
        layer.weight.requires_grad_(False)
        return nn.Sequential(model[0], layer, model[4])

    refused(task_of(made), "unfrozen during the run", "1.weight")


def test_sync_batch_norm() -> None:
    made = lambda model: nn.Sequential(model[0], nn.SyncBatchNorm(8).double(), model[4])  # noqa: E731
    refused(task_of(made), "'1' is nn.SyncBatchNorm", "ring")


def on_sliced_weight(model: nn.Sequential) -> nn.Module:
    weight: Any = model[0].weight
    weight.register_hook(lambda gradient: gradient * 0.5)
    return model


def late_on_sliced_weight(model: nn.Sequential) -> nn.Module:
    weight: Any = model[2].weight
    weight.register_post_accumulate_grad_hook(lambda parameter: None)
    return model


def on_sliced_module(model: nn.Sequential) -> nn.Module:
    model[0].register_forward_hook(lambda module, args, out: out / out.norm())
    return model


def parametrized_bias(model: nn.Sequential) -> nn.Module:
    nn.utils.parametrize.register_parametrization(model[0], "bias", nn.Tanh())
    return model


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (on_sliced_weight, ("0.weight", "a hook")),
        (late_on_sliced_weight, ("2.weight", "a post-accumulate hook")),
        (on_sliced_module, ("0 (Linear)", "a forward hook")),
        (parametrized_bias, ("0 (ParametrizedLinear)", "a parametrization")),
    ],
)
def test_refused_of_what_is_sliced(made: Callable[[Any], Any], words: tuple[str, ...]) -> None:
    refused(task_of(made), *words, grid=(1, 2, 1))
