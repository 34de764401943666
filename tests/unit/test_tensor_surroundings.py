"""Split modules in stages, with recomputation, autocast and dropout, and after errors."""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cut_models import stages_of
from rank_threads import on_ranks
from tensor_models import CASES, Bypass, LoneRank, features, run_split, train_split
from torch import Tensor, nn

from distplat.strategies.collective import Collective
from distplat.strategies.fakes import Fabric
from distplat.strategies.model.flat import FlatModel
from distplat.strategies.model.layers import layers_of
from distplat.strategies.model.module_options import recomputed
from distplat.strategies.tensor.parallelize import parallelize, reconnect

CHARLM = {
    "*.token": "embedding",
    "*.attention.1": "heads",
    "*.mlp.1": "colwise",
    "*.mlp.3": "rowwise",
    "4": "colwise_gather",
}


@pytest.fixture
def gpt(monkeypatch: pytest.MonkeyPatch) -> Callable[[], nn.Module]:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "examples" / "charlm"))
    task: Any = importlib.import_module("charlm").CharLM(block=8, layers=2, width=24, heads=3)

    def build() -> nn.Module:
        torch.manual_seed(0)
        model: nn.Module = task.model()
        return model

    return build


def backward(model: nn.Module, inputs: Tensor) -> dict[str, Tensor]:
    """Return the gradients, and the outputs as `outputs`."""
    outputs = model(inputs)
    torch.autograd.backward(outputs.float().square().mean())
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return gradients | {"outputs": outputs.detach()}


def test_example_gpt_matches_whole_model(gpt: Callable[[], nn.Module]) -> None:
    inputs = torch.arange(16).view(2, 8)
    for world in (2, 3):
        results = run_split(gpt, CHARLM, lambda model, _: backward(model, inputs), world)
        expected = backward(gpt(), inputs)
        for rank in results:
            torch.testing.assert_close(rank["outputs"], expected["outputs"])
            torch.testing.assert_close(rank["0.position"], expected["0.position"])
            assert rank.keys() == expected.keys()


def test_each_stage_applies_its_part_of_the_plan(gpt: Callable[[], nn.Module]) -> None:
    inputs = torch.arange(16).view(2, 8)
    fabric = Fabric(2)
    stages = [stages_of(layers_of(gpt()), [2]) for _ in range(2)]

    def run_stages(rank: int) -> dict[str, Tensor]:
        group, value = fabric.collective(rank), inputs
        parameters: dict[str, nn.Parameter] = {}
        for stage in stages[rank]:
            parallelize(stage, CHARLM, group, partial=True)
            flat = FlatModel(stage)
            value = stage(value)
            parameters |= {n: p for n, p in stage.named_parameters()}
            assert flat.size < sum(p.numel() for p in gpt().parameters())
        torch.autograd.backward(value.square().mean())
        gradients = {n: p.grad for n, p in parameters.items() if p.grad is not None}
        return gradients | {"outputs": value.detach()}

    expected = backward(gpt(), inputs)
    for rank in on_ranks(2, run_stages):
        torch.testing.assert_close(rank["outputs"], expected["outputs"])
        torch.testing.assert_close(rank["3.weight"], expected["3.weight"])
        assert rank.keys() == expected.keys()


@pytest.mark.parametrize("name", ["gated", "encoder", "branches", "tied"])
def test_recomputation_is_bit_identical(name: str) -> None:
    case = CASES[name]

    def run(model: nn.Module, recompute: bool) -> dict[str, Tensor]:
        inputs = case.inputs
        if inputs.is_floating_point():
            inputs = inputs.clone().requires_grad_()
        out = recomputed(model, inputs) if recompute else model(inputs)
        torch.autograd.backward(out.square().mean())
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    def build() -> nn.Module:
        torch.manual_seed(0)
        return case.build()

    plain = run_split(build, case.plan, lambda model, _: run(model, False))
    recomputed_ranks = run_split(build, case.plan, lambda model, _: run(model, True))
    for rank, other in zip(plain, recomputed_ranks, strict=True):
        assert rank.keys() == other.keys()
        assert all(torch.equal(gradient, other[n]) for n, gradient in rank.items())


class IdentityBranch(nn.Module):
    """A linear layer and two branches, one of which saves nothing for backward."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(12, 12)
        self.branches = nn.ModuleList([nn.Identity(), nn.Linear(12, 12)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return torch.cat([branch(x) for branch in self.branches], dim=-1)


def test_recomputation_stops_at_the_same_layer_on_all_ranks() -> None:
    """Torch stops recomputation after the last saved tensor, which differs between the ranks."""

    def run(model: nn.Module, _: Collective) -> dict[str, Tensor]:
        out = recomputed(model, features(4, 12).requires_grad_())
        torch.autograd.backward(out.square().mean())
        return {}

    run_split(IdentityBranch, {"first": "rowwise", "branches.*": "branches"}, run)


@pytest.mark.parametrize("name", CASES)
def test_bf16_autocast_matches_whole_model(name: str) -> None:
    case = CASES[name]

    def run(model: nn.Module, _: Collective = None) -> dict[str, Tensor]:  # type: ignore[assignment]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return backward(model, case.inputs)

    def build() -> nn.Module:
        torch.manual_seed(0)
        return case.build()

    expected = run(build())["outputs"]
    for rank in run_split(build, case.plan, run):
        assert rank["outputs"].dtype == expected.dtype
        assert (rank["outputs"] - expected).norm() <= 2e-2 * expected.norm()


@pytest.mark.parametrize("name", CASES)
def test_evaluation_matches_whole_model(name: str) -> None:
    case = CASES[name]

    @torch.no_grad()
    def run(model: nn.Module, _: object = None) -> dict[str, Tensor]:
        return {"outputs": model.eval()(case.inputs)}

    def build() -> nn.Module:
        torch.manual_seed(0)
        return case.build()

    expected = run(build())["outputs"]
    for rank in run_split(build, case.plan, run):
        torch.testing.assert_close(rank["outputs"], expected)


def test_repeated_run_is_bit_identical() -> None:
    first, second = (train_split(CASES["encoder"], 3, 5) for _ in range(2))
    for rank, other in zip(first, second, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(rank.outputs, other.outputs, strict=True))


@pytest.mark.parametrize(("name", "sums"), [("gated", 4), ("heads", 2), ("encoder", 8)])
def test_colwise_layers_with_one_input_sum_its_gradient_once(name: str, sums: int) -> None:
    """Each split has one sum in forward and one in backward."""
    group, model = LoneRank(0, 2), CASES[name].build()
    parallelize(model, CASES[name].plan, group)  # type: ignore[arg-type]
    inputs = CASES[name].inputs.clone().requires_grad_()
    with torch.no_grad():
        model(inputs)
    assert group.sums == sums / 2
    group.sums = 0
    torch.autograd.backward(model(inputs).sum())
    assert group.sums == sums


@pytest.mark.parametrize("world", [2, 3])
def test_dropout_differs_between_ranks_inside_a_split_only(world: int) -> None:
    """The ranks have different numbers of the 31 features, so they draw different numbers."""
    masks, draws = [], []
    for rank in range(world):
        model = nn.Sequential(nn.Linear(4, 31), nn.Dropout(0.5), nn.Linear(31, 4))
        parallelize(model, {"0": "colwise", "2": "rowwise"}, LoneRank(rank, world))  # type: ignore[arg-type]
        model[1].register_forward_hook(lambda _m, _i, out: masks.append(out != 0))
        torch.manual_seed(3)
        model(torch.ones(8, 4))
        draws.append(torch.rand(5))
    assert all(torch.equal(draw, draws[0]) for draw in draws)
    assert not torch.equal(masks[0][:, :10], masks[1][:, :10])


def fail(*_: object) -> None:
    raise RuntimeError("once")


def call_whole(model: nn.Module, inputs: Tensor, _: Collective) -> Tensor:
    outputs: Tensor = model(inputs)
    return outputs


def call_by_layer(model: nn.Module, inputs: Tensor, group: Collective) -> Tensor:
    """Call the layers one at a time, as a pipeline does."""
    reconnect(model, group)
    for module in model.children():
        inputs = module(inputs)
    return inputs


@pytest.mark.parametrize("call", [call_whole, call_by_layer])
def test_generators_agree_after_a_failed_forward(
    call: Callable[[nn.Module, Tensor, Any], Tensor],
) -> None:
    draws = []
    for rank in range(2):
        model = nn.Sequential(nn.Linear(4, 31), nn.ReLU(), nn.Linear(31, 4))
        group: Any = LoneRank(rank, 2)
        parallelize(model, {"0": "colwise", "2": "rowwise"}, group)
        if rank == 0:
            failing = model[1].register_forward_hook(fail)
            with pytest.raises(RuntimeError, match="once"):
                call(model, torch.ones(1, 4), group)
            failing.remove()
        torch.manual_seed(3)
        call(model, torch.ones(1, 4), group)
        draws.append(torch.rand(3))
    assert torch.equal(*draws)


def test_failed_forward_discards_branch_outputs() -> None:
    inputs = features(5, 12)

    def run(model: nn.Module, group: Collective) -> dict[str, Tensor]:
        failing = model.get_submodule("0.branches.1").register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="once"):
            model(inputs)
        failing.remove()
        return {"whole": model(inputs * 2), "by_layer": call_by_layer(model, inputs * 2, group)}

    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(Bypass())

    expected = build()(inputs * 2)
    for outputs in run_split(build, {"0.*.*": "branches"}, run):
        torch.testing.assert_close(outputs["whole"], expected)
        torch.testing.assert_close(outputs["by_layer"], expected)
