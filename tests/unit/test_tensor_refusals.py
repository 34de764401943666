"""Errors of tensor parallelism: in the plan, in the model, and in forward."""

from collections.abc import Callable, Mapping

import pytest
import torch
from hybrid_models import CLASSES, Classify, grid_of, hybrid_job
from local_run import train
from tensor_models import CASES, Gated, Inception, LoneRank, features, run_split
from torch import Tensor, nn

from distplat.platform.errors import CollectiveError, SpecError
from distplat.strategies.fakes import Fabric
from distplat.strategies.tensor.parallelize import parallelize


def error_of(model: nn.Module, plan: Mapping[str, str], world: int = 2) -> str:
    with pytest.raises(SpecError) as caught:
        parallelize(model, plan, Fabric(world).collective(0))
    return str(caught.value)


class ScaledLinear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


def headless() -> nn.Module:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(4, 12)

    return Attention()


@pytest.mark.parametrize(
    ("model", "style", "message"),
    [
        (nn.GELU(), "colwise_gather", "0 is a GELU, and `colwise` splits Linear"),
        (ScaledLinear(4, 4), "rowwise", "0 (ScaledLinear) computes otherwise than Linear"),
        (nn.Linear(4, 6), "colwise", "no `rowwise` layer takes 6 inputs"),
        (nn.Linear(4, 1), "colwise_gather", "0: 1 cannot be shared out to 2 ranks"),
        (nn.Embedding(4, 4, sparse=True), "embedding", "`sparse` cannot be split"),
        (nn.Embedding(4, 4, max_norm=1.0), "embedding", "`max_norm` cannot be split"),
        (headless(), "heads", "0 (Attention) does not say where its heads are"),
        (headless(), "heads", "in model() if its class is not yours: which of qkv give heads"),
        (nn.GELU(), "heads", "it has no nn.Linear, and others are not sliced: leave it whole"),
        (nn.MultiheadAttention(4, 1), "heads", "1 cannot be shared out to 2 ranks"),
        (nn.MultiheadAttention(4, 2, add_zero_attn=True), "heads", "`add_zero_attn`"),
        (nn.Linear(4, 4), "branches", "the model: 1 branches cannot be shared out to 2 ranks"),
        (nn.PReLU(), "branches", "1 branches cannot be"),
    ],
)
def test_unsupported_modules_are_rejected(model: nn.Module, style: str, message: str) -> None:
    assert message in error_of(nn.Sequential(model), {"0": style})


def test_all_problems_are_reported_at_once() -> None:
    message = error_of(nn.Sequential(nn.GELU(), nn.Tanh()), {"0": "rowwise", "1": "embedding"})
    assert "0 is a GELU" in message and "1 is a Tanh" in message


def test_tied_parameters_must_be_split_alike() -> None:
    message = error_of(CASES["tied"].build(), {"0": "embedding"})
    assert "0.weight and 2.weight are one tensor, and the plan does not split them alike" in message


def test_split_embedding_rejects_indices_out_of_range() -> None:
    for world in (1, 2):
        model = nn.Sequential(nn.Embedding(6, 2))
        parallelize(model, {"0": "embedding"}, Fabric(world).collective(0))
        for index in (6, -1):
            with pytest.raises(IndexError):
                model(torch.tensor([index]))


def test_rowwise_layer_rejects_partial_inputs() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4), nn.MaxPool1d(2))
    parallelize(model, {"0": "colwise", "1": "rowwise"}, LoneRank(0, 2))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"1 \(rowwise\) has 4 of 8 inputs on this rank"):
        model[1](torch.ones(1, 3))


def test_branches_with_different_inputs_are_rejected() -> None:
    class DifferentInputs(Inception):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([branch(x * 1) for branch in self.mixed], dim=1)

    with pytest.raises(ValueError, match="mixed: branches on different ranks must have one input"):
        run_split(
            DifferentInputs, {"mixed.*": "branches"}, lambda m, _: {"out": m(features(2, 3, 8, 8))}
        )


def test_collective_error_names_the_missing_rank() -> None:
    fabric = Fabric(2, timeout_s=0.2)
    model = nn.Sequential(Gated())
    parallelize(model, CASES["gated"].plan, fabric.collective(0))
    with pytest.raises(CollectiveError, match="missing ranks: 1"):
        model(features(2, 12))


class HalfSliced(Classify):
    """A gated MLP: a plan may split only one of its two input layers."""

    shape = (12,)

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(12, 12), Gated(), nn.Linear(12, CLASSES))


@pytest.mark.parametrize(("split", "missing"), [("gate", "up"), ("up", "gate")])
@pytest.mark.parametrize("pipeline", [1, 2])
def test_layer_that_is_missing_in_the_plan_is_named(
    split: str, missing: str, pipeline: int
) -> None:
    plan = {f"1.{split}": "colwise", "1.down": "rowwise"}
    options, workers = grid_of(pipeline, 2, 1, tensor_plan=plan)
    with pytest.raises(SpecError) as caught:
        train(hybrid_job(options, workers, steps=1), HalfSliced)
    [problem] = caught.value.problems
    assert problem.where == ("strategy", "tensor_plan")
    assert "layers fail, and do not if whole: The size of tensor" in problem.message
    assert f"split 1.{missing} as 1.{split} is" in str(problem.hint)


class ResidualMlp(nn.Module):
    """An MLP with `inside` between its two layers."""

    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.up, self.inside, self.down = nn.Linear(12, 16), inside, nn.Linear(16, 12)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.down(self.inside(self.up(x)))
        return out


class NormalizeInTraining(nn.Module):
    """Normalizes over the whole width in training, is the identity in evaluation."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.normalize(x, dim=-1) if self.training else x


@pytest.mark.parametrize(
    ("inside", "message"),
    [
        (nn.PReLU, "layers give 1.inside.weight a different gradient than whole ones"),
        (NormalizeInTraining, "layers do not compute what whole ones do in training"),
        (nn.GELU, ""),
        (lambda: nn.Dropout(0.5), ""),
    ],
)
@pytest.mark.parametrize("pipeline", [1, 2])
def test_errors_in_training_mode_and_gradients_are_found_before_step_0(
    inside: Callable[[], nn.Module], message: str, pipeline: int
) -> None:
    class Task(HalfSliced):
        def model(self) -> nn.Module:
            return nn.Sequential(nn.Linear(12, 12), ResidualMlp(inside()), nn.Linear(12, CLASSES))

    plan = {"1.up": "colwise", "1.down": "rowwise"}
    options, workers = grid_of(pipeline, 2, 1, tensor_plan=plan)
    job = hybrid_job(options, workers, steps=1)
    if not message:
        train(job, Task)
        return
    with pytest.raises(SpecError, match=message):
        train(job, Task)
