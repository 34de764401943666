"""Cutting of models into layers and stages: names, results, errors, initial values, recompute."""

import random
from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cut_models import stages_of
from torch import Tensor, nn

from distplat.platform.errors import SpecError
from distplat.strategies.algorithms.partition import bounds
from distplat.strategies.model.layers import Layer, layers_of, traced_layers
from distplat.strategies.model.meta import materialise, on_meta
from distplat.strategies.model.module_options import recomputed


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.drop = nn.Linear(4, 4), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:  # cannot be traced: a block is one layer
            x = x + self.drop(self.up(x))
        return x


class Net(nn.Module):
    """Model that is not a Sequential, with a skip connection over two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 4)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.down, self.up = nn.Linear(4, 2), nn.Linear(2, 4)
        self.scale = nn.Parameter(torch.full((4,), 2.0))
        self.head = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        for block in self.blocks:
            x = block(x)
        y = self.down(x)
        x = self.up(y) + x
        outputs: Tensor = self.head(x * self.scale)
        return outputs


def run_in_order(modules: Sequence[nn.Module], inputs: Tensor) -> Tensor:
    torch.manual_seed(7)
    for stage in modules:
        inputs = stage(inputs)
    return inputs


def assert_stages_match_model(model: nn.Module, layers: list[Layer], points: Sequence[int]) -> None:
    inputs = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
    expected = run_in_order([model], inputs)
    model.zero_grad()
    torch.autograd.backward(expected.square().sum())
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    stages = stages_of(layers, points)
    outputs = run_in_order(stages, inputs)
    assert torch.equal(outputs, expected)
    torch.autograd.backward(outputs.square().sum())
    actual = {name: p.grad for stage in stages for name, p in stage.named_parameters()}
    assert actual.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert torch.equal(torch.as_tensor(actual[name]), gradient)
    names = [name for stage in stages for name in stage.state_dict()]
    assert sorted(names) == sorted(model.state_dict())


@pytest.mark.parametrize("points", [[], [1], [2], [1, 2, 3, 4]])
def test_stages_of_sequential_match_model(points: list[int]) -> None:
    torch.manual_seed(0)
    model = mlp()
    layers = layers_of(model)
    assert [layer.name for layer in layers] == ["0", "1", "2", "3", "4"]
    assert_stages_match_model(model, layers, points)


def test_layers_of_model_with_listed_parts() -> None:
    model = Net()
    tail = nn.Sequential(model.down, model.up)  # wraps parts of the model
    layers = layers_of(model, [model.stem, *model.blocks, tail])
    assert [layer.name for layer in layers] == "stem blocks.0 blocks.1 blocks.2 down".split()
    stages = stages_of(layers, [2])
    names = [[name for name, _ in stage.named_parameters()] for stage in stages]
    assert names[0] == ["stem.weight", "stem.bias", "blocks.0.up.weight", "blocks.0.up.bias"]
    assert names[1][-1] == "up.bias"


@pytest.mark.parametrize("count", [0, 1, 3])
def test_stages_of_traced_model_match_model(count: int) -> None:
    torch.manual_seed(0)
    model = Net()
    layers = traced_layers(model)
    for points in combinations(range(1, len(layers)), count):
        assert_stages_match_model(model, layers, points)


def test_traced_layers_are_cut_at_single_tensors() -> None:
    names = [layer.name for layer in traced_layers(Net())]
    assert names == "stem relu blocks.0 blocks.1 blocks.2 down scale head.0 head.1".split()


class SingleLayer(nn.Module):
    def __init__(self, forward: Callable[..., object]) -> None:
        super().__init__()
        self.part, self.function = nn.Linear(4, 4), forward

    def forward(self, x: Tensor) -> object:
        return self.function(self, x)


class TwoInputs(SingleLayer):
    def forward(self, x: Tensor, y: Tensor) -> object:  # type: ignore[override]
        return self.part(x) + y


def no_forward(module: nn.Module, x: Tensor) -> object:
    return None


class UsesRandom(SingleLayer):
    def forward(self, x: Tensor) -> object:
        return x if random.random() < 0 else self.part(x)


class WritesState(SingleLayer):
    """Module whose forward writes into its state."""

    def __init__(self, write: Callable[[Any], object]) -> None:
        super().__init__(no_forward)
        self.write, self.calls, self.losses = write, 0, list[float]()
        self.teacher = nn.Linear(4, 4).requires_grad_(False)
        self.register_buffer("center", torch.ones(4))

    def forward(self, x: Tensor) -> object:
        if self.training:
            self.write(self)
        return self.part(x)


@pytest.mark.parametrize(
    ("write", "name"),
    [
        (lambda m: setattr(m, "calls", m.calls + 1), "calls"),
        (lambda m: m.losses.append(0.5), "losses"),
        (lambda m: setattr(m, "last", 1.0), "last"),
        (lambda m: m.center.mul_(0.9), "center"),
        (lambda m: setattr(m, "center", m.center * 0.9), "center"),
        (lambda m: [p.data.mul_(0.5) for p in m.teacher.parameters()], "teacher.weight"),
        (lambda m: [p.data.clamp_(0, 0.1) for p in m.part.parameters()], "part.weight"),
        (lambda m: [p.requires_grad_(False) for p in m.part.parameters()], "part.weight"),
    ],
)
def test_tracing_rejects_forward_with_side_effects(
    write: Callable[[Any], object], name: str
) -> None:
    """The side effect would happen during tracing, and never again."""
    model = WritesState(write)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(SpecError, match=rf"WritesState\.forward writes .*{name}") as caught:
        traced_layers(model)
    assert "stages(model)" in str(caught.value)
    assert (model.calls, model.losses, hasattr(model, "last")) == (0, [], False)
    assert all(p.requires_grad for p in model.part.parameters())
    for key in before.keys() - {"part.weight", "part.bias"}:
        assert torch.equal(model.state_dict()[key], before[key])


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            SingleLayer(lambda m, x: m.part(x) if x.sum() > 0 else x),
            "SingleLayer cannot be traced: .*control flow",
        ),
        (
            SingleLayer(lambda m, x: F.dropout(m.part(x), 0.5, m.training)),
            "differs between training and",
        ),
        (SingleLayer(lambda m, x: (m.part(x), x)), "gives something else than one tensor"),
        (SingleLayer(lambda m, x: x), "gives something else than one tensor"),
        (TwoInputs(no_forward), r"takes 2 inputs \(x, y\)"),
        (SingleLayer(lambda m, x: m.part(x) + torch.ones(4)), "makes a tensor without its inputs"),
        (
            SingleLayer(lambda m, x: m.part(x) * (0 if torch.rand(()) < 0 else 1)),
            "draws random numbers",
        ),
        (UsesRandom(no_forward), "UsesRandom.forward names `random`"),
    ],
)
def test_untraceable_model_names_the_reason(model: nn.Module, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        traced_layers(model)


def test_tracing_preserves_training_modes() -> None:
    model = Net()
    model.blocks[1].eval()
    before = [module.training for module in model.modules()]
    traced_layers(model)
    assert [module.training for module in model.modules()] == before


def test_dropout_in_traced_layer_follows_training_mode() -> None:
    stage = stages_of(traced_layers(Net()), [])[0].eval()
    inputs = torch.ones(3, 4)
    assert torch.equal(stage(inputs), stage(inputs))


def test_in_place_operations_are_preserved() -> None:
    def forward(module: nn.Module, x: Tensor) -> Tensor:
        x = module.part(x)  # type: ignore[operator]
        x.mul_(2)
        return x

    model = SingleLayer(forward)
    layers = traced_layers(model)
    inputs = torch.ones(2, 4)
    assert torch.equal(
        run_in_order([stages_of(layers, [])[0]], inputs), run_in_order([model], inputs)
    )


class Tied(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Linear(4, 4))
        self[2].weight = self[0].weight


@pytest.mark.parametrize("build", [Tied, lambda: on_meta(Tied)])
def test_rejects_parameters_shared_between_stages(build: Callable[[], nn.Sequential]) -> None:
    layers = layers_of(build())
    expected = r"0.weight \(stage 0\) and 2.weight \(stage 2\) are one tensor"
    with pytest.raises(SpecError, match=expected):
        stages_of(layers, [1, 2])
    assert len(stages_of(layers, [3])) == 2


def test_rejects_module_in_two_stages() -> None:
    model = SingleLayer(lambda m, x: m.part(F.relu(m.part(x))))
    with pytest.raises(SpecError, match=r"part.weight \(stage 0\) and part.weight \(stage 1\)"):
        stages_of(traced_layers(model), [1])


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: layers_of(Net()), "does not say in which order"),
        (lambda: layers_of(nn.Sequential(*[nn.Linear(2, 2)] * 2)), "0 and 1 are one module, 0"),
        (lambda: layers_of(mlp(), [nn.Linear(2, 2)]), "does not have: weight"),
    ],
)
def test_rejects_invalid_layers(build: Callable[[], object], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        build()


def test_layer_may_return_tuple() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LSTM(4, 4))
    outputs, (hidden, cell) = stages_of(layers_of(model), [])[0](torch.ones(2, 4))
    assert outputs.shape == (2, 4) and hidden.shape == cell.shape == (1, 4)


def nested_model() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(4, 8),
        nn.BatchNorm1d(8),
        nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.LayerNorm(8)),
        nn.Embedding(5, 3),
        nn.MultiheadAttention(8, 2),
        nn.Linear(8, 2, bias=False),
    )


def materialise_stages(
    points: Sequence[int], seed: int, build: Callable[[], nn.Module]
) -> dict[str, Tensor]:
    """Materialise each stage from its own model, like the process of the stage."""
    values: dict[str, Tensor] = {}
    for number in range(len(points) + 1):
        layers = layers_of(on_meta(build))
        start, stop = bounds(points, len(layers))[number]
        stage_layers = layers[start:stop]
        materialise(stage_layers, start, seed)
        stage = stages_of(stage_layers, [])[0]
        values |= stage.state_dict()
        other_layers = [layer for layer in layers if layer not in stage_layers]
        assert all(p.is_meta for layer in other_layers for p in layer.module.parameters())
    return values


def test_initial_values_do_not_depend_on_the_cut() -> None:
    expected = materialise_stages([], 3, nested_model)
    assert expected.keys() == nested_model().state_dict().keys()
    assert not any(value.is_meta for value in expected.values())
    for points in ([1], [3], [1, 2, 4], [1, 2, 3, 4, 5]):
        parts = materialise_stages(points, 3, nested_model)
        assert parts.keys() == expected.keys()
        assert all(torch.equal(parts[name], expected[name]) for name in expected)
    assert not torch.equal(
        materialise_stages([], 4, nested_model)["0.weight"], expected["0.weight"]
    )


def test_equal_layers_have_different_values_and_generator_is_unchanged() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    values = materialise_stages([1], 0, lambda: nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)))
    assert not torch.equal(values["0.weight"], values["1.weight"])
    other_seed = materialise_stages([1], 1, lambda: nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)))
    assert not torch.equal(values["1.weight"], other_seed["0.weight"])  # not seed + number
    assert torch.equal(torch.get_rng_state(), before)


def test_shared_parameters_within_stage_stay_shared() -> None:
    values = materialise_stages([3], 0, Tied)
    assert values["0.weight"].data_ptr() == values["2.weight"].data_ptr()
    assert torch.equal(values["0.weight"], materialise_stages([], 0, Tied)["0.weight"])


def test_rejects_modules_without_reset_parameters() -> None:
    model = on_meta(lambda: nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.ReLU(), Net())))
    with pytest.raises(SpecError, match=r"1\.1 \(Net\) has scale and no reset_parameters"):
        materialise(layers_of(model), 0, 0)
    with pytest.raises(SpecError, match="scale is in no module with reset_parameters"):
        materialise(traced_layers(on_meta(Net)), 0, 0)


class CountsCalls(nn.Module):
    """Module that stores the number and the inputs of its calls in attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.means, self.last = 0, list[float](), torch.zeros(8)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.means.append(float(x.detach().mean()))
        self.last = 0.9 * self.last + x.detach().mean(0)
        return torch.tanh(x * self.calls) + sum(self.means) * x + self.last


def model_with_state() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Linear(4, 8), CountsCalls(), nn.BatchNorm1d(8), nn.Dropout(0.5)),
        *(nn.Linear(8, 4), nn.Dropout(0.2)),
    )


def test_recompute_rejects_in_place_write_to_attribute() -> None:
    model = WritesState(lambda m: m.level.mul_(0.9))
    model.level = torch.ones(4)
    with pytest.raises(SpecError, match=r"writes into level, and `recompute` runs it twice"):
        recomputed(model, torch.ones(2, 4))


def train_two_micro_batches(run_stage: Callable[[nn.Module, Tensor], Tensor]) -> tuple[Tensor, ...]:
    model = model_with_state()
    inputs = torch.randn(6, 4, requires_grad=True)
    torch.manual_seed(5)
    outputs = [run_stage(model, inputs), run_stage(model, inputs * 2)]  # two live micro-batches
    for output in reversed(outputs):
        torch.autograd.backward(output.square().sum())
    warming: Any = model[1]
    assert (warming.calls, len(warming.means)) == (2, 2)
    gradients = [torch.as_tensor(p.grad) for p in model.parameters()]
    return (*outputs, *gradients, torch.as_tensor(inputs.grad), *model.buffers())


def test_recomputation_is_bit_identical() -> None:
    expected = train_two_micro_batches(lambda model, inputs: model(inputs))
    recomputed_values = train_two_micro_batches(recomputed)
    assert all(torch.equal(a, b) for a, b in zip(expected, recomputed_values, strict=True))


def test_recomputation_saves_no_activations() -> None:
    def saved_bytes(run_stage: Callable[[nn.Module, Tensor], Tensor]) -> int:
        model, inputs = model_with_state(), torch.randn(64, 4)
        parameters_and_inputs = {p.data_ptr() for p in (*model.parameters(), inputs)}
        saved_tensors: dict[int, Tensor] = {}

        def pack(tensor: Tensor) -> Tensor:
            if tensor.data_ptr() not in parameters_and_inputs:
                saved_tensors[tensor.data_ptr()] = tensor.detach()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
            run_stage(model, inputs)
        return sum(tensor.nbytes for tensor in saved_tensors.values())

    assert saved_bytes(lambda model, inputs: model(inputs)) > 64 * 8 * 4
    assert saved_bytes(recomputed) == 0


def test_no_recomputation_without_gradients() -> None:
    with torch.no_grad():
        assert not recomputed(model_with_state(), torch.ones(2, 4)).requires_grad
