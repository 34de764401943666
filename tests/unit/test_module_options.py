"""Activation checkpointing and `torch.compile` do not change the trained model."""

from typing import Any

import pytest
import torch
from jobs import job_of
from local_run import train
from pydantic import ValidationError
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from distplat import Task
from distplat.platform.errors import SpecError
from distplat.platform.model_options import Compile
from distplat.platform.spec import Job
from distplat.strategies.catalog import make_job
from distplat.strategies.model.module_options import apply_module_options, checkpoint_activations
from distplat.strategies.torch_compat import compiled_module

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
CALLS: list[str] = []


class Block(nn.Module):
    """Batch statistics, dropout, buffers that forward reads and writes, and a nested block."""

    calls: Tensor
    gain: Tensor

    def __init__(self, depth: int = 1, *, has_state: bool = False) -> None:
        super().__init__()
        self.has_state = has_state
        self.linear = nn.utils.parametrizations.spectral_norm(nn.Linear(6, 6))
        self.norm = nn.BatchNorm1d(6)
        self.inner = Block(depth - 1, has_state=has_state) if depth else None
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("gain", torch.ones(6))
        self.seen, self.means, self.level = 0, list[float](), torch.zeros(6)

    def update_state(self, x: Tensor) -> Tensor:
        """Write attributes that a compiler would have to guard in every step."""
        self.seen += 1
        self.means.append(float(x.detach().mean()))
        self.level.lerp_(x.detach().mean(0), 0.1)
        return x * (1 + 0.1 * self.seen) + sum(self.means) + self.level

    def forward(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():  # each length is compiled to a new graph
            CALLS.append("inner" if self.inner is None else "outer")
        x = self.update_state(x) if self.has_state else x
        self.calls += 1
        self.gain = self.gain + 0.1 * self.calls  # another tensor
        y = nn.functional.dropout(self.norm(self.linear(x)).tanh(), 0.3, self.training)
        y = y * self.gain
        return x + (y if self.inner is None else self.inner(y))


class Deep(Task):
    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(4, 6), Block(), Block(), nn.Linear(6, 2))

    def train_data(self) -> Dataset[Any]:
        draw = torch.Generator().manual_seed(3)
        return TensorDataset(*(torch.randn(18, n, generator=draw) for n in (4, 2)))

    def eval_data(self) -> Dataset[Any]:
        return self.train_data()

    def loss(self, outputs: Any, targets: Any) -> Tensor:
        return nn.functional.mse_loss(outputs, targets)


class DeepWithState(Deep):
    def model(self) -> nn.Module:
        blocks = (Block(has_state=True) for _ in range(2))
        return nn.Sequential(nn.Linear(4, 6), *blocks, nn.Linear(6, 2))


# One rank: ranks of a test are threads, which share one generator.
def options_job(strategy: str = "ring", **fields: Any) -> Job:
    optimizer = {"name": "AdamW", "lr": 0.05}
    return job_of(strategy, 1, optimizer=optimizer, steps=4, global_batch_size=6, seed=2, **fields)


@pytest.mark.sweep(8)
@pytest.mark.parametrize("strategy", ["ring", "ps-sync", "ps-async"])
@pytest.mark.parametrize("patterns", ["1", "1,2", "*.inner", "1,*.inner"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_activation_checkpointing_is_bit_identical(
    strategy: str, patterns: str, accumulation: int
) -> None:
    fields: dict[str, Any] = {"gradient_accumulation": accumulation}
    plain = train(options_job(strategy, **fields), DeepWithState)
    checkpointed = train(
        options_job(strategy, activation_checkpointing=patterns, **fields), DeepWithState
    )
    expected = plain.parameters()
    found = checkpointed.parameters()
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize(
    ("patterns", "recomputed"),
    [("1", ["outer", "inner"]), ("*.inner", ["inner"] * 2), ("1,1.inner", ["outer", "inner"])],
)
def test_matching_modules_are_recomputed_once(patterns: str, recomputed: list[str]) -> None:
    model = Deep().model()
    apply_module_options(options_job(activation_checkpointing=patterns), model)
    loss = model(torch.randn(5, 4)).sum()
    CALLS.clear()
    loss.backward()
    assert sorted(CALLS) == sorted(recomputed)
    assert [name for name, _ in model.named_modules()] == [
        name for name, _ in Deep().model().named_modules()
    ]
    with torch.no_grad():
        model.eval()(torch.randn(5, 4))


def gradient_penalty_step(model: nn.Module, inputs: Tensor) -> dict[str, Tensor]:
    """Backpropagate a gradient penalty, which needs activations twice in backward."""
    torch.manual_seed(5)
    leaf = inputs.clone().requires_grad_()
    outputs = model(leaf)
    (slope,) = torch.autograd.grad(outputs.sum(), leaf, create_graph=True)
    torch.autograd.backward(outputs.square().mean() + slope.square().sum())
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return gradients | dict(model.named_buffers())


def test_activation_checkpointing_supports_double_backward() -> None:
    plain, checkpointed = (DeepWithState().model() for _ in range(2))
    checkpointed.load_state_dict(plain.state_dict())
    apply_module_options(options_job(activation_checkpointing="1,2"), checkpointed)
    for _ in range(4):
        inputs = torch.randn(5, 4)
        expected, found = (
            gradient_penalty_step(plain, inputs),
            gradient_penalty_step(checkpointed, inputs),
        )
        assert expected.keys() == found.keys()
        assert all(torch.equal(found[name], value) for name, value in expected.items())


class LateWriter(nn.Module):
    """Writes a buffer in forward if `writes` is set."""

    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.writes = False
        self.register_buffer("scale", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.writes:
            self.scale *= 0.5
        return x.tanh() * self.scale


def test_buffer_first_written_in_a_later_step_is_an_error() -> None:
    late = LateWriter()
    module = nn.Sequential(nn.Linear(3, 3), late)
    checkpoint_activations(module)
    for _ in range(4):
        torch.autograd.backward(module(torch.ones(2, 3)).sum())
    late.writes = True
    with pytest.raises(ValueError, match="writes the buffer 'scale' now"):
        module(torch.ones(2, 3))


def test_pattern_without_a_match_is_rejected() -> None:
    with pytest.raises(
        SpecError, match=r"(?s)'1\.iner' matches no module.*did you mean '1\.inner'"
    ):
        apply_module_options(options_job(activation_checkpointing="2,1.iner"), Deep().model())


@pytest.mark.sweep(3)
@pytest.mark.parametrize("strategy", ["ring", "ps-sync", "ps-async"])
def test_compiled_model_matches_the_plain_one(strategy: str) -> None:
    plain = train(options_job(strategy), Deep).parameters()
    compiled = train(options_job(strategy, compile={"backend": "aot_eager"}), Deep)
    found = compiled.parameters()
    assert plain.keys() == found.keys()
    for name, value in plain.items():
        torch.testing.assert_close(found[name], value, msg=name)


class Weighted(Deep):
    """A weighted loss and a state of the task, which a run inspects in its first steps."""

    def __init__(self) -> None:
        self.scale: Any = None

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))

    def step(self, model: nn.Module, batch: Any) -> Any:
        loss = self.loss_sum(model, *batch)
        self.scale = loss.detach() + (0 if self.scale is None else self.scale)
        return loss / self.scale, (batch[1] > 0).sum() + 1

    @staticmethod
    def loss_sum(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.mse_loss(model(inputs), targets, reduction="sum")


class Written(Weighted):
    """Writes its state in place."""

    def step(self, model: nn.Module, batch: Any) -> Any:
        self.scale = torch.zeros(()) if self.scale is None else self.scale
        loss = self.loss_sum(model, *batch)
        self.scale += loss.detach()
        return loss


def test_state_of_the_task_is_not_updated_twice() -> None:
    """`hybrid` recomputes `step` of the task too."""
    plain = train(options_job("hybrid"), Weighted).parameters()
    checkpointed = options_job("hybrid", activation_checkpointing="0")
    found = train(checkpointed, Weighted).parameters()
    assert all(torch.equal(found[name], value) for name, value in plain.items())
    with pytest.raises(SpecError, match=r"writes into task\.scale, and `recompute` runs it twice"):
        train(checkpointed, Written)


class CompiledByTask(Weighted):
    loss_sum = staticmethod(torch.compile(Weighted.loss_sum, fullgraph=True, backend="eager"))


@pytest.mark.parametrize("compiled_by", ["job", "task"])
def test_fullgraph_model_is_not_inspected(compiled_by: str) -> None:
    options: Any = (
        {"compile": {"backend": "eager", "fullgraph": True}} if compiled_by == "job" else {}
    )
    plain = train(options_job(), Weighted).parameters()
    task = Weighted if compiled_by == "job" else CompiledByTask
    found = train(options_job(**options), task).parameters()
    assert all(torch.equal(found[name], value) for name, value in plain.items())


def test_compiled_module_returns_the_original() -> None:
    plain = nn.Linear(1, 1)
    compiled: Any = torch.compile(plain, backend="eager")
    assert compiled_module(compiled) is plain
    assert compiled_module(plain) is None


def test_falls_back_to_eager_if_compile_fails() -> None:
    def broken(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("no compiler here")

    torch._dynamo.register_backend(broken, name="broken")
    job = options_job(compile={"backend": "broken"})
    plain = train(options_job(), Deep).parameters()
    found = train(job, Deep).parameters()
    assert all(torch.equal(found[name], value) for name, value in plain.items())


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (True, Compile()),
        (False, None),
        (None, None),
        ({"mode": "reduce-overhead"}, Compile(mode="reduce-overhead")),
    ],
)
def test_compile_accepts_a_flag_or_arguments_of_torch(value: Any, expected: Compile | None) -> None:
    assert options_job(compile=value).compile == expected
    with pytest.raises((SpecError, ValidationError), match="mode"):
        options_job(compile={"mode": "fast"})


def test_compile_with_stages_is_rejected() -> None:
    data = options_job().model_dump()
    data |= {"strategy": {"name": "hybrid", "pipeline": 2}, "scaling": {"num_workers": 2}}
    with pytest.raises(SpecError, match=r"(?s)compile: cannot.* with stages.*use `ring`"):
        make_job({**data, "compile": True})


def test_hybrid_without_stages_compiles_the_model() -> None:
    graphs = []

    def counting(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    torch._dynamo.register_backend(counting, name="counting")
    plain = train(options_job("hybrid"), Weighted).parameters()
    found = train(options_job("hybrid", compile={"backend": "counting"}), Weighted).parameters()
    assert graphs, "nothing was compiled"
    assert all(torch.equal(found[name], value) for name, value in plain.items())
