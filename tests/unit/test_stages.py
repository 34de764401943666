"""Models as layers and stages: names, the same result, what cannot be cut, values from nowhere."""

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
        if x.sum() > 0:  # cannot be traced: blocks are taken whole
            x = x + self.drop(self.up(x))
        return x


class Net(nn.Module):
    """No Sequential, with a skip over two parts in its middle."""

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


def run(stages: Sequence[nn.Module], inputs: Tensor) -> Tensor:
    torch.manual_seed(7)
    for stage in stages:
        inputs = stage(inputs)
    return inputs


def same_as_whole(model: nn.Module, layers: list[Layer], points: Sequence[int]) -> None:
    inputs = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
    expected = run([model], inputs)
    model.zero_grad()
    torch.autograd.backward(expected.square().sum())
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    stages = stages_of(layers, points)
    outputs = run(stages, inputs)
    assert torch.equal(outputs, expected)
    torch.autograd.backward(outputs.square().sum())
    found = {name: p.grad for stage in stages for name, p in stage.named_parameters()}
    assert found.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert torch.equal(torch.as_tensor(found[name]), gradient)
    names = [name for stage in stages for name in stage.state_dict()]
    assert sorted(names) == sorted(model.state_dict())


@pytest.mark.parametrize("points", [[], [1], [2], [1, 2, 3, 4]])
def test_stages_of_a_sequential_give_what_the_model_gives(points: list[int]) -> None:
    torch.manual_seed(0)
    model = mlp()
    layers = layers_of(model)
    assert [layer.name for layer in layers] == ["0", "1", "2", "3", "4"]
    same_as_whole(model, layers, points)


def test_any_model_with_its_parts_listed() -> None:
    model = Net()
    rest = nn.Sequential(model.down, model.up)  # made around parts of the model
    layers = layers_of(model, [model.stem, *model.blocks, rest])
    assert [layer.name for layer in layers] == "stem blocks.0 blocks.1 blocks.2 down".split()
    stages = stages_of(layers, [2])
    names = [[name for name, _ in stage.named_parameters()] for stage in stages]
    assert names[0] == ["stem.weight", "stem.bias", "blocks.0.up.weight", "blocks.0.up.bias"]
    assert names[1][-1] == "up.bias"


@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_traced_model_in_stages_gives_what_it_gave(count: int) -> None:
    torch.manual_seed(0)
    model = Net()
    layers = traced_layers(model)
    for some in combinations(range(1, len(layers)), count):
        same_as_whole(model, layers, some)


def test_traced_layers_are_cut_where_one_tensor_crosses() -> None:
    names = [layer.name for layer in traced_layers(Net())]
    assert names == "stem relu blocks.0 blocks.1 blocks.2 down scale head.0 head.1".split()


class Odd(nn.Module):
    def __init__(self, forward: Callable[..., object]) -> None:
        super().__init__()
        self.part, self.way = nn.Linear(4, 4), forward

    def forward(self, x: Tensor) -> object:
        return self.way(self, x)


class Two(Odd):
    def forward(self, x: Tensor, y: Tensor) -> object:  # type: ignore[override]
        return self.part(x) + y


def nothing(module: nn.Module, x: Tensor) -> object:
    return None


class Drops(Odd):
    def forward(self, x: Tensor) -> object:
        return x if random.random() < 0 else self.part(x)


class Remembers(Odd):
    """Has what a forward may write beside its outputs."""

    def __init__(self, write: Callable[[Any], object]) -> None:
        super().__init__(nothing)
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
def test_what_a_forward_writes_beside_its_outputs_is_no_part_of_a_trace(
    write: Callable[[Any], object], name: str
) -> None:
    """It would be done when the model is traced, and never again."""
    model = Remembers(write)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(SpecError, match=rf"Remembers\.forward writes .*{name}") as caught:
        traced_layers(model)
    assert "stages(model)" in str(caught.value)
    assert (model.calls, model.losses, hasattr(model, "last")) == (0, [], False)
    assert all(p.requires_grad for p in model.part.parameters())
    for key in before.keys() - {"part.weight", "part.bias"}:
        assert torch.equal(model.state_dict()[key], before[key])


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Odd(lambda m, x: m.part(x) if x.sum() > 0 else x), "Odd cannot be traced: .*control flow"),
        (Odd(lambda m, x: F.dropout(m.part(x), 0.5, m.training)), "differs between training and"),
        (Odd(lambda m, x: (m.part(x), x)), "gives something else than one tensor"),
        (Odd(lambda m, x: x), "gives something else than one tensor"),
        (Two(nothing), r"takes 2 inputs \(x, y\)"),
        (Odd(lambda m, x: m.part(x) + torch.ones(4)), "makes a tensor without its inputs"),
        (Odd(lambda m, x: m.part(x) * (0 if torch.rand(()) < 0 else 1)), "draws random numbers"),
        (Drops(nothing), "Drops.forward names `random`"),
    ],
)
def test_what_cannot_be_traced_says_why(model: nn.Module, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        traced_layers(model)


def test_tracing_leaves_the_modes_alone() -> None:
    model = Net()
    model.blocks[1].eval()
    before = [module.training for module in model.modules()]
    traced_layers(model)
    assert [module.training for module in model.modules()] == before


def test_dropout_in_a_traced_layer_follows_the_mode() -> None:
    stage = stages_of(traced_layers(Net()), [])[0].eval()
    inputs = torch.ones(3, 4)
    assert torch.equal(stage(inputs), stage(inputs))


def test_steps_in_place_stay() -> None:
    def way(module: nn.Module, x: Tensor) -> Tensor:
        x = module.part(x)  # type: ignore[operator]
        x.mul_(2)
        return x

    model = Odd(way)
    layers = traced_layers(model)
    inputs = torch.ones(2, 4)
    assert torch.equal(run([stages_of(layers, [])[0]], inputs), run([model], inputs))


class Tied(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Linear(4, 4))
        self[2].weight = self[0].weight


@pytest.mark.parametrize("build", [Tied, lambda: on_meta(Tied)])
def test_shared_parameters_are_named(build: Callable[[], nn.Sequential]) -> None:
    layers = layers_of(build())
    expected = r"0.weight \(stage 0\) and 2.weight \(stage 2\) are one tensor"
    with pytest.raises(SpecError, match=expected):
        stages_of(layers, [1, 2])
    assert len(stages_of(layers, [3])) == 2


def test_a_module_in_two_stages_is_named() -> None:
    model = Odd(lambda m, x: m.part(F.relu(m.part(x))))
    with pytest.raises(SpecError, match=r"part.weight \(stage 0\) and part.weight \(stage 1\)"):
        stages_of(traced_layers(model), [1])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: layers_of(Net()), "does not say in which order"),
        (lambda: layers_of(nn.Sequential(*[nn.Linear(2, 2)] * 2)), "0 and 1 are one module, 0"),
        (lambda: layers_of(mlp(), [nn.Linear(2, 2)]), "does not have: weight"),
    ],
)
def test_layers_that_are_none(make: Callable[[], object], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        make()


def test_a_layer_may_give_a_tuple() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LSTM(4, 4))
    outputs, (hidden, cell) = stages_of(layers_of(model), [])[0](torch.ones(2, 4))
    assert outputs.shape == (2, 4) and hidden.shape == cell.shape == (1, 4)


def deep() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(4, 8),
        nn.BatchNorm1d(8),
        nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.LayerNorm(8)),
        nn.Embedding(5, 3),
        nn.MultiheadAttention(8, 2),
        nn.Linear(8, 2, bias=False),
    )


def filled(points: Sequence[int], seed: int, build: Callable[[], nn.Module]) -> dict[str, Tensor]:
    """Materialise every stage by itself, each from a model of its own, as its process would."""
    values: dict[str, Tensor] = {}
    for number in range(len(points) + 1):
        layers = layers_of(on_meta(build))
        start, stop = bounds(points, len(layers))[number]
        own = layers[start:stop]
        materialise(own, start, seed)
        stage = stages_of(own, [])[0]
        values |= stage.state_dict()
        rest = [layer for layer in layers if layer not in own]
        assert all(p.is_meta for layer in rest for p in layer.module.parameters())
    return values


def test_values_do_not_depend_on_the_cut() -> None:
    whole = filled([], 3, deep)
    assert whole.keys() == deep().state_dict().keys()
    assert not any(value.is_meta for value in whole.values())
    for points in ([1], [3], [1, 2, 4], [1, 2, 3, 4, 5]):
        parts = filled(points, 3, deep)
        assert parts.keys() == whole.keys()
        assert all(torch.equal(parts[name], whole[name]) for name in whole)
    assert not torch.equal(filled([], 4, deep)["0.weight"], whole["0.weight"])


def test_equal_layers_get_values_of_their_own_and_the_generator_stays() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    values = filled([1], 0, lambda: nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)))
    assert not torch.equal(values["0.weight"], values["1.weight"])
    other = filled([1], 1, lambda: nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)))
    assert not torch.equal(values["1.weight"], other["0.weight"])  # not seed + number
    assert torch.equal(torch.get_rng_state(), before)


def test_shared_parameters_of_one_stage_stay_shared() -> None:
    values = filled([3], 0, Tied)
    assert values["0.weight"].data_ptr() == values["2.weight"].data_ptr()
    assert torch.equal(values["0.weight"], filled([], 0, Tied)["0.weight"])


def test_modules_that_do_not_say_how_they_begin_are_named() -> None:
    model = on_meta(lambda: nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.ReLU(), Net())))
    with pytest.raises(SpecError, match=r"1\.1 \(Net\) has scale and no reset_parameters"):
        materialise(layers_of(model), 0, 0)
    with pytest.raises(SpecError, match="scale is in no module with reset_parameters"):
        materialise(traced_layers(on_meta(Net)), 0, 0)


class Warming(nn.Module):
    """Keeps in attributes how often it was called, and on what."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.means, self.last = 0, list[float](), torch.zeros(8)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.means.append(float(x.detach().mean()))
        self.last = 0.9 * self.last + x.detach().mean(0)
        return torch.tanh(x * self.calls) + sum(self.means) * x + self.last


def noisy() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Linear(4, 8), Warming(), nn.BatchNorm1d(8), nn.Dropout(0.5)),
        *(nn.Linear(8, 4), nn.Dropout(0.2)),
    )


def test_a_tensor_in_an_attribute_is_not_written_twice() -> None:
    model = Remembers(lambda m: m.level.mul_(0.9))
    model.level = torch.ones(4)
    with pytest.raises(SpecError, match=r"writes into level, and `recompute` runs it twice"):
        recomputed(model, torch.ones(2, 4))


def trained(run_stage: Callable[[nn.Module, Tensor], Tensor]) -> tuple[Tensor, ...]:
    model = noisy()
    inputs = torch.randn(6, 4, requires_grad=True)
    torch.manual_seed(5)
    outputs = [run_stage(model, inputs), run_stage(model, inputs * 2)]  # two live micro-batches
    for one in reversed(outputs):
        torch.autograd.backward(one.square().sum())
    warming: Any = model[1]
    assert (warming.calls, len(warming.means)) == (2, 2)
    gradients = [torch.as_tensor(p.grad) for p in model.parameters()]
    return (*outputs, *gradients, torch.as_tensor(inputs.grad), *model.buffers())


def test_recomputation_gives_the_same_bits() -> None:
    plain = trained(lambda model, inputs: model(inputs))
    again = trained(recomputed)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_recomputation_keeps_less() -> None:
    def kept(run_stage: Callable[[nn.Module, Tensor], Tensor]) -> int:
        model, inputs = noisy(), torch.randn(64, 4)
        own = {p.data_ptr() for p in (*model.parameters(), inputs)}
        found: dict[int, Tensor] = {}

        def pack(tensor: Tensor) -> Tensor:
            if tensor.data_ptr() not in own:
                found[tensor.data_ptr()] = tensor.detach()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
            run_stage(model, inputs)
        return sum(tensor.nbytes for tensor in found.values())

    assert kept(lambda model, inputs: model(inputs)) > 64 * 8 * 4
    assert kept(recomputed) == 0


def test_without_gradients_nothing_is_recomputed() -> None:
    with torch.no_grad():
        assert not recomputed(noisy(), torch.ones(2, 4)).requires_grad
