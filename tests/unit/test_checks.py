"""What a user's task may get wrong: each mistake in clear words, with its place and exit code."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import local_run
import pytest
import torch
import torch.nn.functional as F
from good_task import FIELDS, Good, fit, samples, told
from jobs import job_of
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from distplat import Task, Trainer
from distplat.platform.errors import SpecError, UserCodeError
from distplat.platform.progress import EvalReport, ReportAggregator
from distplat.strategies.loop.session import prepare

pytestmark = pytest.mark.usefixtures("loader_server")


def test_a_good_task_is_trained(tmp_path: Path) -> None:
    assert fit(Good, tmp_path).checkpoint is not None


def outputs_without(graph: Callable[[Any, Any], Any]) -> type[Task]:
    class Bad(Good):
        def loss(self, outputs: Any, targets: Any) -> Any:
            return graph(outputs, targets)

    return Bad


class Wrapped:
    def __init__(self, loss: Tensor) -> None:
        self.loss = loss


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (lambda o, t: F.cross_entropy(o, t).item(), r"got a float 0\.\d+: .*without \.item\(\)"),
        (lambda o, t: 3, r"got an int 3: return the tensor itself"),
        (lambda o, t: None, r"got None: is there a `return`\?"),
        (lambda o, t: {"ce": o.sum(), "aux": o.sum()}, r"got a dict of 'ce', 'aux': return the"),
        (lambda o, t: Wrapped(o.sum()), r"got a Wrapped: return its \.loss"),
        (lambda o, t: F.cross_entropy(o, t, reduction="none"), r"got shape \[4\]: take its mean"),
        (lambda o, t: (o.argmax(1) == t).sum(), r"real number, got one of type int64"),
        (
            lambda o, t: F.cross_entropy(o, t).detach(),
            r"does not require grad: the model's output does;",
        ),
        (
            lambda o, t: F.cross_entropy(o.detach(), t),
            r"does not require grad: the model's output does;",
        ),
    ],
)
def test_a_loss_that_cannot_be_differentiated(
    returned: Callable[[Any, Any], Any], message: str, tmp_path: Path
) -> None:
    error = told(outputs_without(returned), tmp_path)
    assert error.step == 1
    line = outputs_without(returned).loss.__code__.co_firstlineno
    with pytest.raises(UserCodeError, match=rf"test_checks.py:{line}: loss\(\) .*{message}"):
        raise error


def test_a_model_that_detaches(tmp_path: Path) -> None:
    class Cut(nn.Linear):
        def forward(self, inputs: Tensor) -> Tensor:
            with torch.no_grad():
                return super().forward(inputs)

    class Bad(Good):
        def model(self) -> nn.Module:
            return Cut(3, 2)

    assert "does not either: its forward() detaches it" in told(Bad, tmp_path).summary


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"per_class": torch.ones(3)}, "gives 'per_class' as a tensor of shape [3], float32"),
        ({"per_class": torch.ones(3)}, "such as 'per_class_0'"),
        ({"text": "0.5"}, "gives 'text' as a str: expected one number"),
        ({"none": None}, "gives 'none' as None"),
        ({3: 0.5}, "a name in metrics() must be text, got 3"),
        (0.5, "metrics() must return a mapping of names to numbers, got a float"),
        (None, "got None: is there a `return`?"),
    ],
)
def test_a_metric_that_is_no_number(given: Any, message: str, tmp_path: Path) -> None:
    class Bad(Good):
        def eval_data(self) -> Dataset[Any]:
            return samples()

        def metrics(self, outputs: Any, targets: Any) -> Any:
            return given

    error = told(Bad, tmp_path)
    assert message in error.summary
    assert "test_checks.py:" in error.summary
    assert "in the evaluation after step 2" in str(error)


def scripted(module: nn.Module) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates it, and people have it
        return torch.jit.script(module)


@pytest.mark.parametrize(
    ("built", "message"),
    [
        (lambda: None, "got None: is there a `return`?"),
        (lambda: nn.Linear, "got the class Linear: call it, Linear(...)"),
        (lambda: 3, "must return a torch.nn.Module, got an int"),
        (lambda: nn.LazyLinear(2), "'weight', 'bias' of the model have no shape yet"),
        (
            lambda: nn.Sequential(nn.Linear(3, 2), nn.LazyBatchNorm1d(affine=False)),
            "'1.running_mean', '1.running_var' of the model have no shape yet",
        ),
        (lambda: scripted(nn.Linear(3, 2)), "the model is a ScriptModule of torch.jit"),
        (lambda: nn.Sequential(scripted(nn.Linear(3, 2))), "'0' is a ScriptModule of torch.jit"),
    ],
)
def test_a_model_that_is_none(built: Callable[[], Any], message: str, tmp_path: Path) -> None:
    class Bad(Good):
        def model(self) -> Any:
            return built()

    error = told(Bad, tmp_path)
    assert message in error.summary
    assert error.step is None


def test_a_lazy_model_that_saw_a_batch_is_trained(tmp_path: Path) -> None:
    class Lazy(Good):
        def model(self) -> nn.Module:
            model = nn.LazyLinear(2)
            model(torch.zeros(1, 3))
            return model

    assert fit(Lazy, tmp_path).checkpoint is not None


def test_a_last_batch_of_one_meets_a_batch_norm(tmp_path: Path) -> None:
    class Normed(Good):
        def model(self) -> nn.Module:
            return nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))

        def train_data(self) -> Dataset[Any]:
            return samples(5)

    error = told(Normed, tmp_path)
    assert error.step == 2
    assert "`data.drop_last: true` leaves out a short last batch" in error.remedy
    assert str(error).endswith(f"hint: {error.remedy}")
    assert fit(Normed, tmp_path, data={"drop_last": True}).checkpoint is not None


def test_out_of_memory_names_what_takes_less(tmp_path: Path) -> None:
    class Large(Good):
        def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
            return torch.zeros(1 << 60).sum() + outputs.sum()

    class OnCard(Good):
        def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    for kind in (Large, OnCard):
        remedy = told(kind, tmp_path).remedy
        assert "raise `gradient_accumulation`" in remedy
        assert "lower `global_batch_size`" in remedy


class Frequencies(Task):
    """A row that a batch has often moves no further than the others."""

    def model(self) -> nn.Module:
        table = nn.Embedding(5, 3, scale_grad_by_freq=True)
        return nn.Sequential(table, nn.Flatten(), nn.Linear(6, 2))

    def train_data(self) -> Dataset[Any]:
        torch.manual_seed(3)
        return TensorDataset(torch.randint(0, 5, (8, 2)), torch.randint(0, 2, (8,)))

    def loss(self, outputs: Any, targets: Any) -> Tensor:
        return F.cross_entropy(outputs, targets)


@pytest.mark.parametrize(
    ("strategy", "workers", "more", "parts"),
    [
        ("ring", 1, {}, 1),
        ("ring", 3, {}, 3),
        ("ps-sync", 2, {"gradient_accumulation": 2}, 4),
        ({"name": "hybrid", "data": 2, "pipeline": 1, "micro_batches": 2}, 2, {}, 4),
        ({"name": "hybrid", "pipeline": 2, "micro_batches": 1, "cut": "even"}, 2, {}, 1),
    ],
)
def test_an_embedding_that_counts_a_batchs_rows_is_refused_where_batches_are_cut(
    strategy: Any, workers: int, more: dict[str, Any], parts: int
) -> None:
    job = job_of(strategy, workers, **more)
    if parts == 1:
        local_run.train(job, Frequencies)
        return
    with pytest.raises(SpecError, match="'0' with `scale_grad_by_freq`") as caught:
        local_run.train(job, Frequencies)
    assert f"this job splits a batch into {parts} micro-batches" in str(caught.value)


def test_a_card_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SpecError, match=r"scaling\.use_gpu: torch .* sees no GPU") as caught:
        fit(Good, tmp_path, scaling={"num_workers": 0, "use_gpu": True})
    assert caught.value.exit_code == 2


def with_buffer(value: Any) -> nn.Module:
    model = nn.Linear(3, 2)
    model.register_buffer("odd", value)
    return model


class WithExtra(nn.Linear):
    def get_extra_state(self) -> Any:
        return {"seen": 3}


class Spectral(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(3, 2, dtype=torch.complex64))

    def forward(self, inputs: Tensor) -> Tensor:
        found: Tensor = (torch.fft.fft(inputs) @ self.w).abs()
        return found


@pytest.mark.parametrize(
    ("build", "workers", "message"),
    [
        (
            lambda: with_buffer(torch.zeros(2, dtype=torch.complex128)),
            0,
            "the state 'odd' of type complex128, which cannot be saved",
        ),
        (
            lambda: with_buffer(torch.eye(2).to_sparse()),
            0,
            "the state 'odd' of type float32, torch.sparse_coo, which cannot be saved",
        ),
        (lambda: WithExtra(3, 2), 0, "'_extra_state' in its state_dict(), a dict: only tensors"),
        (Spectral, 2, "the parameter 'w' of type complex64, which workers cannot exchange"),
    ],
)
def test_what_cannot_be_kept_is_refused_before_the_run(
    build: Callable[[], nn.Module], workers: int, message: str
) -> None:
    class Odd(Good):
        def model(self) -> nn.Module:
            return build()

    with pytest.raises(SpecError) as caught:
        local_run.train(job_of("ring", workers, epochs=1), Odd)
    assert message in str(caught.value)
    assert "hint: " in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("strategy", ["ring", "ps-sync", "ps-async"])
def test_empty_and_tied_tensors_are_trained_and_kept(strategy: str, tmp_path: Path) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.none = nn.Parameter(torch.zeros(0, 3))
            self.a = nn.Linear(3, 3)
            self.b = nn.Linear(3, 3)
            self.b.weight = self.a.weight
            self.register_buffer("empty", torch.zeros(0))
            self.last = nn.Parameter(torch.zeros(2, 0))

        def forward(self, inputs: Tensor) -> Tensor:
            found: Tensor = self.b(self.a(inputs))
            return found

    class Odd(Good):
        def model(self) -> nn.Module:
            return Model()

    result = fit(Odd, tmp_path, strategy=strategy, checkpoint={"every_steps": 1})
    assert result.checkpoint is not None
    assert result.checkpoints[-1].step == 2
    again = Trainer(
        {**FIELDS, "strategy": strategy, "epochs": 2}, Odd, working_dir=tmp_path, resume=result.path
    )
    assert again.fit().checkpoint is not None


def test_a_metric_is_a_mean_over_the_batches_that_gave_it() -> None:
    class Sometimes(Good):
        def eval_data(self) -> Dataset[Any]:
            return TensorDataset(torch.zeros(7, 3), torch.tensor([0, 0, 0, 0, 1, 0, 0]))

        def metrics(self, outputs: Any, targets: Any) -> dict[str, float]:
            if not bool((targets == 1).any()):
                return {}
            return {"share": float((targets == 1).float().mean())}

    for workers in (1, 2):
        job = job_of("ring", workers, epochs=1)
        run = local_run.train(job, Sometimes)
        gathering = ReportAggregator(workers)
        found = [
            summary
            for reports in run.reports
            for report in reports
            if isinstance(report, EvalReport)
            for summary in gathering.add(report)
        ]
        # Batches of 4 on one worker: 1 of the 3 in the second; of 2 on two, 1 of the 2 in one.
        size = 4 // workers
        starts = [*range(0, 7, size)] if workers == 1 else [0, 2, 4, 6]
        data = [[0, 0, 0, 0, 1, 0, 0][at : at + size] for at in starts]
        giving = [part for part in data if 1 in part]
        wanted = sum(sum(part) for part in giving) / sum(len(part) for part in giving)
        (summary,) = found[:1]
        assert getattr(summary, "metrics")["share"] == pytest.approx(wanted)  # noqa: B009
        assert getattr(summary, "samples") == 7  # noqa: B009


def shrink(parameter: Tensor) -> None:
    assert parameter.grad is not None
    parameter.grad.mul_(0.1)


HOOKS: dict[str, Callable[[Any], object]] = {
    "a hook": lambda one: one.register_hook(lambda gradient: gradient.clamp(-0.1, 0.1)),
    "a post-accumulate hook": lambda one: one.register_post_accumulate_grad_hook(shrink),
}


@pytest.mark.parametrize("kind", HOOKS)
@pytest.mark.parametrize(("world", "micro", "said"), [(1, 1, False), (2, 1, True), (1, 2, True)])
def test_a_hook_that_sees_parts_of_a_batch_is_warned_of(
    kind: str, world: int, micro: int, said: bool
) -> None:
    class Hooked(Good):
        def model(self) -> nn.Module:
            made = super().model()
            HOOKS[kind](next(made.parameters()))
            return made

    found = prepare(job_of("ring", world, epochs=1, gradient_accumulation=micro), Hooked()).warnings
    assert [one for one in found if one.startswith(f"{kind} on the parameter")] == found
    assert bool(found) == said
    assert not prepare(job_of("ring", 2, epochs=1), Good()).warnings


class InBackward(Good):
    """Updates each parameter as soon as its gradient is there, to keep none."""

    def model(self) -> nn.Module:
        made = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
        for one in made.parameters():
            rule = torch.optim.SGD([one], lr=0.1)

            def update(_: Tensor, rule: torch.optim.Optimizer = rule) -> None:
                rule.step()
                rule.zero_grad()

            one.register_post_accumulate_grad_hook(update)  # type: ignore[no-untyped-call]
        return made


@pytest.mark.parametrize(
    ("strategy", "world", "micro"),
    [
        ("ring", 2, 1),
        ("ring", 1, 2),
        ({"name": "hybrid", "pipeline": 2, "cut": "even", "micro_batches": 2}, 2, 1),
        ({"name": "hybrid", "pipeline": 1, "data": 2}, 2, 1),
    ],
)
def test_updates_in_backward_are_refused_where_batches_are_cut(
    strategy: Any, world: int, micro: int
) -> None:
    job = job_of(strategy, world, epochs=1, gradient_accumulation=micro)
    with pytest.raises(SpecError, match=r"post-accumulate hook changes '[01]\.\w+' in backward"):
        local_run.train(job, InBackward)


def test_updates_in_backward_of_whole_batches_are_left_to_the_task() -> None:
    local_run.train(job_of("ring", 1, epochs=1), InBackward)
