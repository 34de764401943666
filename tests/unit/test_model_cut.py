"""Profiles of layers, and the cuts of a model into stages."""

import pytest
import torch
from cut_models import profile
from torch import Tensor, nn

from distplat.platform.errors import SpecError
from distplat.strategies.algorithms.pipeline_schedule import gpipe, one_f_one_b
from distplat.strategies.model.layers import layers_of
from distplat.strategies.pipeline import model_partition
from distplat.strategies.pipeline.model_partition import LayerCost, Memory, cut, points_before


class Clock:
    """Fake clock, advanced by the layers."""

    now = 100.0

    def perf_counter(self) -> float:
        return self.now


CLOCK = Clock()


class Slow(nn.Module):
    """Advances the clock by known times in forward and backward."""

    def __init__(self, forward_s: float, backward_s: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.times = forward_s, backward_s

    def forward(self, x: Tensor) -> Tensor:
        CLOCK.now += self.times[0]
        outputs = x * self.weight
        if outputs.requires_grad:
            outputs.register_hook(self._advance)  # type: ignore[no-untyped-call]
        return outputs

    def _advance(self, gradient: Tensor) -> None:
        CLOCK.now += self.times[1]


def test_profile_measures_the_time_of_each_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_partition, "time", CLOCK)
    layers = layers_of(nn.Sequential(Slow(0.01, 0.03), Slow(0.03, 0.0), Slow(0.0, 0.0)))
    costs = profile(layers, torch.ones(2), repeats=3)
    assert [cost.name for cost in costs] == ["0", "1", "2"]
    times = [second for cost in costs for second in (cost.forward_s, cost.backward_s)]
    assert times == pytest.approx([0.01, 0.03, 0.03, 0.0, 0.0, 0.0])
    assert cut(costs, 2) == [1]


def test_profile_measures_bytes() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.BatchNorm1d(8), nn.Flatten())
    linear, relu, norm, flatten = profile(layers_of(model), torch.ones(16, 4), repeats=1)
    assert linear.parameter_bytes == 4 * (4 * 8 + 8)
    assert linear.output_bytes == relu.output_bytes == 4 * 16 * 8
    assert linear.activation_bytes == 4 * 16 * 4  # its input
    assert relu.activation_bytes == 4 * 16 * 8  # its output
    assert norm.parameter_bytes == 4 * 4 * 8 + 8  # two parameters, two statistics, a count
    assert norm.activation_bytes == 4 * (16 * 8 + 2 * 8)  # its input, mean and deviation
    assert flatten.activation_bytes == 0


class Square(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * x


def test_tensor_saved_twice_counts_once() -> None:
    (square,) = profile(layers_of(nn.Sequential(Square())), torch.ones(16, 4), repeats=1)
    assert square.activation_bytes == 4 * 16 * 4


def test_profile_accepts_integer_inputs() -> None:
    model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 2))
    costs = profile(layers_of(model), torch.randint(10, (3, 5)), repeats=1)
    assert costs[1].output_bytes == 4 * 3 * 5 * 2


def test_profile_leaves_model_and_generator_unchanged() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    generator = torch.get_rng_state()
    inputs = torch.ones(8, 4)
    profile(layers_of(model), inputs, repeats=1)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), generator)
    assert not inputs.requires_grad


def test_output_bytes_include_all_output_tensors() -> None:
    _, lstm = profile(layers_of(nn.Sequential(nn.Linear(4, 4), nn.LSTM(4, 4))), torch.ones(2, 4))
    assert lstm.output_bytes == 4 * (2 * 4 + 4 + 4), "outputs and two states"


def cost(seconds: float, parameters: int = 0, activations: int = 0, outputs: int = 0) -> LayerCost:
    return LayerCost("", seconds / 3, seconds * 2 / 3, parameters, activations, outputs)


def test_cut_by_time() -> None:
    assert cut([cost(s) for s in (3, 1, 4, 1, 5, 9, 2, 6)], 4) == [3, 5, 6]


def test_cut_counts_forward_and_backward() -> None:
    assert cut([LayerCost("", f, b, 0, 0, 0) for f, b in ((1, 9), (5, 1), (4, 1))], 2) == [1]
    assert cut([LayerCost("", f, b, 0, 0, 0) for f, b in ((1, 1), (5, 1), (4, 9))], 2) == [2]


def test_first_stage_of_1f1b_gets_fewer_layers() -> None:
    costs = [cost(1, activations=10)] * 6
    live = one_f_one_b(2, 8).peak_activations()
    assert live == [2, 1]
    assert cut(costs, 2) == [3]
    assert cut(costs, 2, Memory([40, 40], live)) == [2]
    with pytest.raises(ValueError, match="use more stages, smaller micro-batches"):
        cut(costs, 2, Memory([30, 30], live))
    with pytest.raises(ValueError, match="for each of 3 stages"):
        cut(costs, 3, Memory([30, 30], live))


def test_memory_of_a_stage() -> None:
    costs = [cost(1, 100, 10, 3), cost(1, 200, 20, 5)]
    live = gpipe(2, 8).peak_activations()
    plain = Memory([0, 0], live)
    assert plain.needed(costs, 0, 0, 2) == 4 * 300 + 8 * 30
    assert plain.needed(costs, 1, 1, 2) == 4 * 200 + 8 * 20
    recomputing = Memory([0, 0], live, copies=2, recompute=True)
    assert recomputing.needed(costs, 1, 1, 2) == 2 * 200 + 8 * 3 + 20


def test_cut_points_by_name() -> None:
    layers = layers_of(nn.Sequential(*[nn.Linear(2, 2) for _ in range(4)]))
    assert points_before(layers, ["1", "3"]) == [1, 3]
    with pytest.raises(SpecError, match=r"no layer '33'.*\n.*did you mean '3'. allowed: 1, 2, 3"):
        points_before(layers, ["33"])
    with pytest.raises(SpecError, match="must be ascending"):
        points_before(layers, ["3", "1"])
    with pytest.raises(SpecError, match="must be ascending, each from 1 to 3"):
        points_before(layers, ["0"])
