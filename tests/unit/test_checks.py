"""Errors of user tasks: each message names the cause and the place, with its exit code."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import local_run
import pytest
import torch
import torch.nn.functional as F
from good_task import FIELDS, Good, fit, samples, training_error
from jobs import job_of
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from distplat import Task, Trainer
from distplat.platform.errors import SpecError, UserCodeError
from distplat.platform.progress import EvalReport, ReportAggregator
from distplat.strategies.loop.session import prepare

pytestmark = pytest.mark.usefixtures("loader_server")


def test_trains_a_valid_task(tmp_path: Path) -> None:
    assert fit(Good, tmp_path).checkpoint is not None


def with_loss(function: Callable[[Any, Any], Any]) -> type[Task]:
    class Bad(Good):
        def loss(self, outputs: Any, targets: Any) -> Any:
            return function(outputs, targets)

    return Bad


class Wrapped:
    def __init__(self, loss: Tensor) -> None:
        self.loss = loss


@pytest.mark.parametrize(
    ("loss", "message"),
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
def test_rejects_loss_without_gradient(
    loss: Callable[[Any, Any], Any], message: str, tmp_path: Path
) -> None:
    error = training_error(with_loss(loss), tmp_path)
    assert error.step == 1
    line = with_loss(loss).loss.__code__.co_firstlineno
    with pytest.raises(UserCodeError, match=rf"test_checks.py:{line}: loss\(\) .*{message}"):
        raise error


def test_rejects_model_that_detaches_its_output(tmp_path: Path) -> None:
    class Detaching(nn.Linear):
        def forward(self, inputs: Tensor) -> Tensor:
            with torch.no_grad():
                return super().forward(inputs)

    class Bad(Good):
        def model(self) -> nn.Module:
            return Detaching(3, 2)

    assert "does not either: its forward() detaches it" in training_error(Bad, tmp_path).summary


@pytest.mark.parametrize(
    ("metrics", "message"),
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
def test_rejects_metrics_that_are_not_numbers(metrics: Any, message: str, tmp_path: Path) -> None:
    class Bad(Good):
        def eval_data(self) -> Dataset[Any]:
            return samples()

        def metrics(self, outputs: Any, targets: Any) -> Any:
            return metrics

    error = training_error(Bad, tmp_path)
    assert message in error.summary
    assert "test_checks.py:" in error.summary
    assert "in the evaluation after step 2" in str(error)


def scripted(module: nn.Module) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated by torch, and still used
        return torch.jit.script(module)


@pytest.mark.parametrize(
    ("build", "message"),
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
def test_rejects_invalid_models(build: Callable[[], Any], message: str, tmp_path: Path) -> None:
    class Bad(Good):
        def model(self) -> Any:
            return build()

    error = training_error(Bad, tmp_path)
    assert message in error.summary
    assert error.step is None


def test_trains_an_initialized_lazy_model(tmp_path: Path) -> None:
    class Lazy(Good):
        def model(self) -> nn.Module:
            model = nn.LazyLinear(2)
            model(torch.zeros(1, 3))
            return model

    assert fit(Lazy, tmp_path).checkpoint is not None


def test_batch_norm_fails_on_a_batch_of_one_sample(tmp_path: Path) -> None:
    class WithBatchNorm(Good):
        def model(self) -> nn.Module:
            return nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))

        def train_data(self) -> Dataset[Any]:
            return samples(5)

    error = training_error(WithBatchNorm, tmp_path)
    assert error.step == 2
    assert "`data.drop_last: true` leaves out a short last batch" in error.remedy
    assert str(error).endswith(f"hint: {error.remedy}")
    assert fit(WithBatchNorm, tmp_path, data={"drop_last": True}).checkpoint is not None


def test_out_of_memory_error_names_settings_that_save_memory(tmp_path: Path) -> None:
    class Large(Good):
        def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
            return torch.zeros(1 << 60).sum() + outputs.sum()

    class OutOfGpuMemory(Good):
        def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    for task in (Large, OutOfGpuMemory):
        remedy = training_error(task, tmp_path).remedy
        assert "raise `gradient_accumulation`" in remedy
        assert "lower `global_batch_size`" in remedy


class ScaledByFrequency(Task):
    """An embedding with `scale_grad_by_freq`, which depends on the rows of the whole batch."""

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
def test_rejects_scale_grad_by_freq_if_batches_are_split(
    strategy: Any, workers: int, more: dict[str, Any], parts: int
) -> None:
    job = job_of(strategy, workers, **more)
    if parts == 1:
        local_run.train(job, ScaledByFrequency)
        return
    with pytest.raises(SpecError, match="'0' with `scale_grad_by_freq`") as caught:
        local_run.train(job, ScaledByFrequency)
    assert f"this job splits a batch into {parts} micro-batches" in str(caught.value)


def test_rejects_use_gpu_without_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SpecError, match=r"scaling\.use_gpu: torch .* sees no GPU") as caught:
        fit(Good, tmp_path, scaling={"num_workers": 0, "use_gpu": True})
    assert caught.value.exit_code == 2


def with_buffer(value: Any) -> nn.Module:
    model = nn.Linear(3, 2)
    model.register_buffer("odd", value)
    return model


class WithExtraState(nn.Linear):
    def get_extra_state(self) -> Any:
        return {"seen": 3}


class Spectral(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(3, 2, dtype=torch.complex64))

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = (torch.fft.fft(inputs) @ self.w).abs()
        return outputs


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
        (
            lambda: WithExtraState(3, 2),
            0,
            "'_extra_state' in its state_dict(), a dict: only tensors",
        ),
        (Spectral, 2, "the parameter 'w' of type complex64, which workers cannot exchange"),
    ],
)
def test_rejects_unsupported_state_before_the_run(
    build: Callable[[], nn.Module], workers: int, message: str
) -> None:
    class Unsupported(Good):
        def model(self) -> nn.Module:
            return build()

    with pytest.raises(SpecError) as caught:
        local_run.train(job_of("ring", workers, epochs=1), Unsupported)
    assert message in str(caught.value)
    assert "hint: " in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("strategy", ["ring", "ps-sync", "ps-async"])
def test_trains_and_saves_empty_and_tied_tensors(strategy: str, tmp_path: Path) -> None:
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
            outputs: Tensor = self.b(self.a(inputs))
            return outputs

    class EmptyAndTied(Good):
        def model(self) -> nn.Module:
            return Model()

    result = fit(EmptyAndTied, tmp_path, strategy=strategy, checkpoint={"every_steps": 1})
    assert result.checkpoint is not None
    assert result.checkpoints[-1].step == 2
    resumed = Trainer(
        {**FIELDS, "strategy": strategy, "epochs": 2},
        EmptyAndTied,
        working_dir=tmp_path,
        resume=result.path,
    )
    assert resumed.fit().checkpoint is not None


def test_metric_is_the_mean_over_batches_that_return_it() -> None:
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
        aggregator = ReportAggregator(workers)
        summaries = [
            summary
            for reports in run.reports
            for report in reports
            if isinstance(report, EvalReport)
            for summary in aggregator.add(report)
        ]
        # One worker has batches of 4: the second has one positive in 3 samples. Two workers have
        # batches of 2: one batch has one positive in 2 samples.
        size = 4 // workers
        starts = [*range(0, 7, size)] if workers == 1 else [0, 2, 4, 6]
        data = [[0, 0, 0, 0, 1, 0, 0][at : at + size] for at in starts]
        positive = [batch for batch in data if 1 in batch]
        expected = sum(sum(batch) for batch in positive) / sum(len(batch) for batch in positive)
        (summary,) = summaries[:1]
        assert getattr(summary, "metrics")["share"] == pytest.approx(expected)  # noqa: B009
        assert getattr(summary, "samples") == 7  # noqa: B009


def shrink(parameter: Tensor) -> None:
    assert parameter.grad is not None
    parameter.grad.mul_(0.1)


HOOKS: dict[str, Callable[[Any], object]] = {
    "a hook": lambda p: p.register_hook(lambda gradient: gradient.clamp(-0.1, 0.1)),
    "a post-accumulate hook": lambda p: p.register_post_accumulate_grad_hook(shrink),
}


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize(("world", "micro", "warns"), [(1, 1, False), (2, 1, True), (1, 2, True)])
def test_warns_of_gradient_hooks_if_batches_are_split(
    hook: str, world: int, micro: int, warns: bool
) -> None:
    class Hooked(Good):
        def model(self) -> nn.Module:
            model = super().model()
            HOOKS[hook](next(model.parameters()))
            return model

    warned = prepare(
        job_of("ring", world, epochs=1, gradient_accumulation=micro), Hooked()
    ).warnings
    assert [text for text in warned if text.startswith(f"{hook} on the parameter")] == warned
    assert bool(warned) == warns
    assert not prepare(job_of("ring", 2, epochs=1), Good()).warnings


class UpdatesInBackward(Good):
    """Updates each parameter in backward and frees its gradient."""

    def model(self) -> nn.Module:
        model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
        for parameter in model.parameters():
            optimizer = torch.optim.SGD([parameter], lr=0.1)

            def update(_: Tensor, optimizer: torch.optim.Optimizer = optimizer) -> None:
                optimizer.step()
                optimizer.zero_grad()

            parameter.register_post_accumulate_grad_hook(update)  # type: ignore[no-untyped-call]
        return model


@pytest.mark.parametrize(
    ("strategy", "world", "micro"),
    [
        ("ring", 2, 1),
        ("ring", 1, 2),
        ({"name": "hybrid", "pipeline": 2, "cut": "even", "micro_batches": 2}, 2, 1),
        ({"name": "hybrid", "pipeline": 1, "data": 2}, 2, 1),
    ],
)
def test_rejects_updates_in_backward_if_batches_are_split(
    strategy: Any, world: int, micro: int
) -> None:
    job = job_of(strategy, world, epochs=1, gradient_accumulation=micro)
    with pytest.raises(SpecError, match=r"post-accumulate hook changes '[01]\.\w+' in backward"):
        local_run.train(job, UpdatesInBackward)


def test_allows_updates_in_backward_of_whole_batches() -> None:
    local_run.train(job_of("ring", 1, epochs=1), UpdatesInBackward)
