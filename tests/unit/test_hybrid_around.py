"""What a model does around its layers: kept as plain torch has it, or refused by name."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hybrid_models import BATCH, grid_of, hybrid_job, whole
from local_run import train
from plain_loss import mean_loss
from torch import Tensor, nn
from torch.nn.utils import parametrizations, weight_norm
from torch.utils.data import TensorDataset

from distplat.platform.errors import SpecError
from distplat.strategies.task import Task

STEPS = 3
PLAN = {"0": "colwise", "2": "rowwise"}


class Small(Task):
    """A few linear layers; each test makes something of them."""

    made: Callable[[nn.Sequential], nn.Module] = staticmethod(lambda model: model)

    def model(self) -> nn.Module:
        layers = nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)
        return type(self).made(nn.Sequential(*layers).double())

    def train_data(self) -> TensorDataset:
        generator = torch.Generator().manual_seed(1)
        made = (torch.randn(2 * BATCH, size, generator=generator) for size in (6, 3))
        return TensorDataset(*(tensor.double() for tensor in made))

    def eval_data(self) -> TensorDataset:
        return self.train_data()

    def loss(self, outputs: Any, targets: Any) -> Tensor:
        return nn.functional.mse_loss(outputs, targets)


def task_of(made: Callable[[Any], Any], **methods: Any) -> type[Task]:
    return type("Made", (Small,), {"made": staticmethod(made), **methods})


def plain(kind: type[Task], around: str = "") -> dict[str, Tensor]:
    task = kind()
    torch.manual_seed(5)
    model, (inputs, targets) = task.model(), Small().train_data().tensors
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for step in range(STEPS):
        model.train()
        optimizer.zero_grad()
        here = slice(step % 2 * BATCH, (step % 2 + 1) * BATCH)
        torch.autograd.backward(mean_loss(task, model(inputs[here].clone()), targets[here]))
        optimizer.step()
    return {around + name: value.detach() for name, value in model.state_dict().items()}


def trained(kind: type[Task], grid: tuple[int, int, int], **options: Any) -> dict[str, Tensor]:
    chosen, workers = grid_of(*grid, **options)
    job = hybrid_job(chosen, workers, steps=STEPS, data={"shuffle": False})
    return whole(train(job, kind))


def same(kind: type[Task], grid: tuple[int, int, int] = (2, 1, 1), **options: Any) -> None:
    found, expected = trained(kind, grid, **options), plain(kind)
    assert found.keys() == expected.keys()
    for name in expected:
        assert (found[name] - expected[name]).abs().max() < 1e-10, name


def refused(kind: type[Task], *words: str, grid: tuple[int, int, int] = (2, 1, 1)) -> None:
    more = {"tensor_plan": PLAN} if grid[1] > 1 else {}
    with pytest.raises(SpecError) as caught:
        trained(kind, grid, **more)
    for word in (*words, "strategy" if grid[1] == 1 else ""):
        assert word in str(caught.value)
    assert caught.value.problems[0].hint


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

    refused(task_of(Inside, stages=stages), "compute otherwise than Inside does", "`stages`")


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

    refused(task_of(FrozenBody, stages=stages), "other parameters gradients", "body.0.weight")


class Switching(nn.Sequential):
    def train(self, mode: bool = True) -> "Switching":
        super().train(mode)
        self[1].eval()
        return self


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


def test_a_way_of_its_own_to_switch_the_mode() -> None:
    def made(model: Any) -> nn.Module:
        return Switching(model[0], nn.Dropout(0.5), *model[1:])

    refused(task_of(made), "a `train` of its own")
    same(task_of(made), (1, 1, 2))

    def inner(model: Any) -> nn.Module:
        return nn.Sequential(made(model[:2]), *model[2:])

    same(task_of(inner))


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


class Thawing(nn.Linear):
    calls = 0

    def forward(self, input: Tensor) -> Tensor:
        self.calls += 1
        if self.calls > 5:
            self.weight.requires_grad_(True)
        return super().forward(input)


def test_a_parameter_that_is_thawed() -> None:
    def made(model: nn.Sequential) -> nn.Module:
        layer = Thawing(8, 8).double()
        layer.weight.requires_grad_(False)
        return nn.Sequential(model[0], layer, model[4])

    refused(task_of(made), "thawed during the run", "1.weight")


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


@pytest.mark.parametrize("grid", [(1, 2, 1), (2, 2, 1)])
@pytest.mark.parametrize("made", [hooked, lambda model: model])
def test_hooks_around_slices(made: Callable[[Any], Any], grid: tuple[int, int, int]) -> None:
    more = {"cut": ["3"]} if grid[0] > 1 else {}
    same(task_of(made), grid, tensor_plan=PLAN, **more)


@pytest.mark.parametrize("grid", [(1, 2, 1), (2, 2, 1), (1, 2, 2)])
def test_a_plan_with_more_than_elements_between(grid: tuple[int, int, int]) -> None:
    def made(model: nn.Sequential) -> nn.Module:
        return nn.Sequential(model[0], nn.Softmax(dim=1), *model[2:])  # type: ignore[misc]

    with pytest.raises(SpecError, match="otherwise than whole"):
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
