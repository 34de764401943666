"""Activations computed again in backward, and compiled calls: the model trains as without."""

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
    """Statistics, random numbers, buffers that it reads and writes, and another block inside."""

    calls: Tensor
    gain: Tensor

    def __init__(self, depth: int = 1, *, keeps: bool = False) -> None:
        super().__init__()
        self.keeps = keeps
        self.linear = nn.utils.parametrizations.spectral_norm(nn.Linear(6, 6))
        self.norm = nn.BatchNorm1d(6)
        self.inner = Block(depth - 1, keeps=keeps) if depth else None
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("gain", torch.ones(6))
        self.seen, self.means, self.level = 0, list[float](), torch.zeros(6)

    def remember(self, x: Tensor) -> Tensor:
        """Keep something in attributes, which a compiler would have to follow in every step."""
        self.seen += 1
        self.means.append(float(x.detach().mean()))
        self.level.lerp_(x.detach().mean(0), 0.1)
        return x * (1 + 0.1 * self.seen) + sum(self.means) + self.level

    def forward(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():  # the graph is compiled anew for each length
            CALLS.append("inner" if self.inner is None else "outer")
        x = self.remember(x) if self.keeps else x
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


class Keeping(Deep):
    def model(self) -> nn.Module:
        blocks = (Block(keeps=True) for _ in range(2))
        return nn.Sequential(nn.Linear(4, 6), *blocks, nn.Linear(6, 2))


# One rank: those of a test are threads, which draw from one generator.
def options_job(strategy: str = "ring", **fields: Any) -> Job:
    optimizer = {"name": "AdamW", "lr": 0.05}
    return job_of(strategy, 1, optimizer=optimizer, steps=4, global_batch_size=6, seed=2, **fields)


@pytest.mark.sweep(4)
@pytest.mark.parametrize("strategy", ["ring", "ps-sync", "ps-async"])
@pytest.mark.parametrize("patterns", ["1", "1,2", "*.inner", "1,*.inner"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_activations_that_are_computed_again_change_no_bit(
    strategy: str, patterns: str, accumulation: int
) -> None:
    fields: dict[str, Any] = {"gradient_accumulation": accumulation}
    plain = train(options_job(strategy, **fields), Keeping)
    saving = train(options_job(strategy, activation_checkpointing=patterns, **fields), Keeping)
    expected = plain.parameters()
    found = saving.parameters()
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize(
    ("patterns", "again"),
    [("1", ["outer", "inner"]), ("*.inner", ["inner"] * 2), ("1,1.inner", ["outer", "inner"])],
)
def test_what_matches_is_computed_again_once(patterns: str, again: list[str]) -> None:
    model = Deep().model()
    apply_module_options(options_job(activation_checkpointing=patterns), model)
    loss = model(torch.randn(5, 4)).sum()
    CALLS.clear()
    loss.backward()
    assert sorted(CALLS) == sorted(again)
    assert [name for name, _ in model.named_modules()] == [
        name for name, _ in Deep().model().named_modules()
    ]
    with torch.no_grad():
        model.eval()(torch.randn(5, 4))


def penalised(model: nn.Module, inputs: Tensor) -> dict[str, Tensor]:
    """Train on a penalty of the inputs' gradient, which needs activations twice in backward."""
    torch.manual_seed(5)
    given = inputs.clone().requires_grad_()
    outputs = model(given)
    (slope,) = torch.autograd.grad(outputs.sum(), given, create_graph=True)
    torch.autograd.backward(outputs.square().mean() + slope.square().sum())
    found = {name: one.grad for name, one in model.named_parameters() if one.grad is not None}
    return found | dict(model.named_buffers())


def test_a_gradient_of_a_gradient_is_the_same() -> None:
    plain, saving = (Keeping().model() for _ in range(2))
    saving.load_state_dict(plain.state_dict())
    apply_module_options(options_job(activation_checkpointing="1,2"), saving)
    for _ in range(4):
        inputs = torch.randn(5, 4)
        expected, found = penalised(plain, inputs), penalised(saving, inputs)
        assert expected.keys() == found.keys()
        assert all(torch.equal(found[name], value) for name, value in expected.items())


class Late(nn.Module):
    """Writes a buffer once it is told to."""

    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.writes = False
        self.register_buffer("scale", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.writes:
            self.scale *= 0.5
        return x.tanh() * self.scale


def test_a_buffer_that_is_written_later_is_told_and_not_read_twice() -> None:
    late = Late()
    module = nn.Sequential(nn.Linear(3, 3), late)
    checkpoint_activations(module)
    for _ in range(4):
        torch.autograd.backward(module(torch.ones(2, 3)).sum())
    late.writes = True
    with pytest.raises(ValueError, match="writes the buffer 'scale' now"):
        module(torch.ones(2, 3))


def test_a_pattern_that_matches_no_module_is_refused() -> None:
    with pytest.raises(
        SpecError, match=r"(?s)'1\.iner' matches no module.*did you mean '1\.inner'"
    ):
        apply_module_options(options_job(activation_checkpointing="2,1.iner"), Deep().model())


@pytest.mark.sweep(3)
@pytest.mark.parametrize("strategy", ["ring", "ps-sync", "ps-async"])
def test_a_compiled_model_trains_as_the_plain_one(strategy: str) -> None:
    plain = train(options_job(strategy), Deep).parameters()
    compiled = train(options_job(strategy, compile={"backend": "aot_eager"}), Deep)
    found = compiled.parameters()
    assert plain.keys() == found.keys()
    for name, value in plain.items():
        torch.testing.assert_close(found[name], value, msg=name)


class Weighted(Deep):
    """Weights, and state, that a run looks at in its first steps; the model is one graph."""

    def __init__(self) -> None:
        self.scale: Any = None

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))

    def step(self, model: nn.Module, batch: Any) -> Any:
        loss = self.computed(model, *batch)
        self.scale = loss.detach() + (0 if self.scale is None else self.scale)
        return loss / self.scale, (batch[1] > 0).sum() + 1

    @staticmethod
    def computed(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.mse_loss(model(inputs), targets, reduction="sum")


class Written(Weighted):
    """Keeps them in a tensor that it writes."""

    def step(self, model: nn.Module, batch: Any) -> Any:
        self.scale = torch.zeros(()) if self.scale is None else self.scale
        loss = self.computed(model, *batch)
        self.scale += loss.detach()
        return loss


def test_what_a_task_keeps_is_not_counted_twice() -> None:
    """Under `hybrid` its `step` is a part of what is computed again."""
    plain = train(options_job("hybrid"), Weighted).parameters()
    saving = options_job("hybrid", activation_checkpointing="0")
    found = train(saving, Weighted).parameters()
    assert all(torch.equal(found[name], value) for name, value in plain.items())
    with pytest.raises(SpecError, match=r"writes into task\.scale, and `recompute` runs it twice"):
        train(saving, Written)


class CompiledByTask(Weighted):
    computed = staticmethod(torch.compile(Weighted.computed, fullgraph=True, backend="eager"))


@pytest.mark.parametrize("by", ["job", "task"])
def test_a_model_that_is_compiled_whole_is_not_looked_at(by: str) -> None:
    chosen: Any = {"compile": {"backend": "eager", "fullgraph": True}} if by == "job" else {}
    plain = train(options_job(), Weighted).parameters()
    task = Weighted if by == "job" else CompiledByTask
    found = train(options_job(**chosen), task).parameters()
    assert all(torch.equal(found[name], value) for name, value in plain.items())


def test_a_compiled_module_is_known() -> None:
    plain = nn.Linear(1, 1)
    compiled: Any = torch.compile(plain, backend="eager")
    assert compiled_module(compiled) is plain
    assert compiled_module(plain) is None


def test_what_cannot_be_compiled_runs_as_it_is() -> None:
    def broken(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("no compiler here")

    torch._dynamo.register_backend(broken, name="broken")
    job = options_job(compile={"backend": "broken"})
    plain = train(options_job(), Deep).parameters()
    found = train(job, Deep).parameters()
    assert all(torch.equal(found[name], value) for name, value in plain.items())


@pytest.mark.parametrize(
    ("given", "found"),
    [
        (True, Compile()),
        (False, None),
        (None, None),
        ({"mode": "reduce-overhead"}, Compile(mode="reduce-overhead")),
    ],
)
def test_compile_may_be_a_flag_or_what_torch_is_told(given: Any, found: Compile | None) -> None:
    assert options_job(compile=given).compile == found
    with pytest.raises((SpecError, ValidationError), match="mode"):
        options_job(compile={"mode": "fast"})


def test_stages_are_not_compiled() -> None:
    data = options_job().model_dump()
    data |= {"strategy": {"name": "hybrid", "pipeline": 2}, "scaling": {"num_workers": 2}}
    with pytest.raises(SpecError, match=r"(?s)compile: cannot.* with stages.*use `ring`"):
        make_job({**data, "compile": True})


def test_whole_models_of_hybrid_are_compiled() -> None:
    graphs = []

    def counting(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    torch._dynamo.register_backend(counting, name="counting")
    plain = train(options_job("hybrid"), Weighted).parameters()
    found = train(options_job("hybrid", compile={"backend": "counting"}), Weighted).parameters()
    assert graphs, "or nothing was compiled"
    assert all(torch.equal(found[name], value) for name, value in plain.items())
