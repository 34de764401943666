"""Batches of any form and tasks with `step` or `forward`, compared with a plain loop."""

import re
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from batch_forms import (
    BATCH,
    SAMPLES,
    STEPS,
    DataclassBatches,
    DictBatches,
    ListBatches,
    NestedBatches,
    Tagger,
    Tags,
    TupleBatches,
    last_eval_reports,
    padded,
    total,
)
from jobs import job_of
from local_run import LocalRun, train
from sentences import Sentences
from torch import Tensor, nn

from distplat import Task
from distplat.platform.errors import SpecError
from distplat.platform.sampler import Sampler

pytestmark = pytest.mark.usefixtures("loader_server")

HYBRID = {"name": "hybrid", "pipeline": 1, "tensor": 1, "data": 2}


TASK_CLASSES: list[type[Task]] = [
    DictBatches,
    TupleBatches,
    NestedBatches,
    ListBatches,
    DataclassBatches,
]


@cache
def train_plain() -> tuple[dict[str, Tensor], float]:
    """Train in a plain loop, and return the model and its loss on all samples."""
    torch.manual_seed(0)
    model, data = Tagger(), Sentences(SAMPLES)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    sampler = Sampler(SAMPLES, BATCH, 1, 0, True, False)
    for step in range(STEPS):
        words, mask, classes = padded([data[int(i)] for i in sampler.batch_ids(step)])
        optimizer.zero_grad()
        torch.autograd.backward(model(words, mask, classes)["loss"])
        optimizer.step()
    words, mask, classes = padded([data[i] for i in range(SAMPLES)])
    return model.state_dict(), model(words, mask, classes)["loss"].item()


def train_task(cls: type[Task], strategy: Any, workers: int, **fields: Any) -> LocalRun:
    sgd = {"name": "SGD", "lr": 0.1, "momentum": 0.9}
    options = {"optimizer": sgd, "steps": STEPS, "global_batch_size": BATCH, **fields}
    return train(job_of(strategy, workers, **options), cls)


@pytest.mark.sweep(4)
@pytest.mark.parametrize("cls", TASK_CLASSES)
@pytest.mark.parametrize(
    ("strategy", "workers", "fields"),
    [
        ("ring", 1, {}),
        ("ring", 2, {"gradient_accumulation": 2}),
        ("ring", 2, {"data": {"num_workers": 1}}),
        ("ps-sync", 3, {}),
        ("ps-async", 1, {}),
        (HYBRID, 2, {}),
    ],
    ids=str,
)
def test_run_matches_plain_loop_for_any_batch(
    cls: type[Task], strategy: str, workers: int, fields: dict[str, Any]
) -> None:
    run = train_task(cls, strategy, workers, **fields)
    expected, loss = train_plain()
    parameters = run.trained[0]
    assert parameters.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(parameters[name], value, rtol=1e-9, atol=1e-12)
    last = last_eval_reports(run)
    assert sum(report.samples for report in last) == SAMPLES
    assert total(last, "loss") == pytest.approx(loss, rel=1e-9)
    words = sum(map(len, Sentences(SAMPLES).words)) / SAMPLES
    assert total(last, "words") == pytest.approx(words, rel=1e-6)


class HuggingFace(DictBatches):
    """The model's outputs contain the loss, as in Hugging Face Transformers."""

    loss = Task.loss

    def step(self, model: nn.Module, batch: Any) -> Any:
        return model(**batch)


def test_step_may_return_outputs_with_a_loss() -> None:
    """One worker only: the loss is a mean over words, and parts of a batch differ in words."""
    parameters, (expected, _) = train_task(HuggingFace, "ring", 1).trained[0], train_plain()
    for name, value in expected.items():
        torch.testing.assert_close(parameters[name], value, rtol=1e-9, atol=1e-12)


def test_default_step_calls_forward_and_loss() -> None:
    class Pairs(Tags):
        def loss(self, outputs: Any, targets: Any) -> Any:
            return outputs, targets

    twice = nn.Module()
    twice.forward = lambda x: 2 * x
    assert Pairs().step(twice, (3, 4)) == (6, 4)
    assert Pairs().step(twice, [3, 4]) == (6, 4)
    assert Pairs().step(twice, {"x": 3}) == (6, {"x": 3})


def test_attribute_named_step_is_no_hook() -> None:
    class Counting(DictBatches):
        def __init__(self) -> None:
            vars(self)["step"] = 0

        def loss(self, outputs: Any, targets: Any) -> Any:
            vars(self)["step"] += 1
            return super().loss(outputs, targets)

    parameters, (expected, _) = train_task(Counting, "ring", 2).trained[0], train_plain()
    torch.testing.assert_close(
        parameters["head.bias"], expected["head.bias"], rtol=1e-9, atol=1e-12
    )


def task_with_step(value: Any) -> type[Task]:
    """Return a task whose `step` returns `value(loss)`."""

    class StepTask(DictBatches):
        loss = Task.loss

        def step(self, model: nn.Module, batch: Any) -> Any:
            return value(model(**batch)["loss"])

    return StepTask


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            lambda loss: {"los": loss, "x": 1},
            r"step\(\) must return .* as 'loss'; got a dict of 'los', 'x'",
        ),
        (lambda loss: {}, r"step\(\) must return .* as 'loss'; got a dict of nothing"),
        (
            lambda loss: {"loss": loss.item()},
            r"step\(\) must return a scalar tensor.*without \.item\(\)",
        ),
        (
            lambda loss: loss.detach(),
            r"step\(\) returned a scalar that does not require grad: \.detach\(",
        ),
        (lambda loss: loss.repeat(3), r"step\(\) must return a scalar, .* got shape \[3\]"),
        (lambda loss: (loss, -1), r"step\(\) gives the weight -1"),
        (lambda loss: (loss, loss * 2), r"step\(\) gives a weight that depends on parameters"),
        (lambda loss: None, r"step\(\) must return a scalar tensor, got None: is there a `return`"),
    ],
)
def test_invalid_step_values_are_rejected(value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=rf"test_task_step\.py:\d+: {message}"):
        train_task(task_with_step(value), "ring", 1)


class WithoutForward(TupleBatches):
    """Batches of three tensors without `forward` or `step`."""

    forward = Task.forward


def test_batch_of_three_needs_forward_or_step() -> None:
    message = r"For any other batch WithoutForward needs forward\(model, batch\) or step"
    with pytest.raises(ValueError, match=message):
        train_task(WithoutForward, "ring", 1)
    with pytest.raises(SpecError, match="a batch is a tuple of 3, and the task does not say how"):
        train_task(WithoutForward, HYBRID, 2)


class WordMean(DictBatches):
    """The loss is a mean over words, and samples differ in words."""

    def loss(self, outputs: Any, targets: Any) -> Any:
        return F.cross_entropy(outputs["logits"].flatten(0, 1), targets["labels"].flatten())


def test_mean_over_words_has_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    train_task(WordMean, "ring", 1)
    (message,) = [r.getMessage() for r in caplog.records if "not a mean" in r.getMessage()]
    assert message.startswith("loss() is not a mean over the samples of a batch: halves give ")
    assert "return (sum, weight) instead" in message


class ModelLoss(DictBatches):
    """The model computes a mean over words."""

    def loss(self, outputs: Any, targets: Any) -> Any:
        return outputs["loss"]


@pytest.mark.parametrize("cls", [ModelLoss, HuggingFace])
@pytest.mark.parametrize("strategy", ["ring", HYBRID], ids=str)
def test_mean_over_words_in_the_model_has_a_warning(
    cls: type[Task], strategy: Any, caplog: pytest.LogCaptureFixture
) -> None:
    train_task(cls, strategy, 2)
    (message, *_) = [r.getMessage() for r in caplog.records if "the model's own" in r.message]
    assert re.search(r"have \d to \d+ labels that are not -100", message)
    assert "Return (sum, weight) instead" in message


@pytest.mark.parametrize("cls", [DictBatches, TupleBatches, NestedBatches, ListBatches])
def test_weighted_sum_over_words_has_no_warning(
    cls: type[Task], caplog: pytest.LogCaptureFixture
) -> None:
    train_task(cls, "ring", 1)
    assert not [record for record in caplog.records if "mean" in record.getMessage()]


class CountingTagger(Tagger):
    calls = 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return super().forward(*args, **kwargs)


@pytest.mark.parametrize("cls", [WordMean, TupleBatches, NestedBatches])
def test_model_runs_once_per_batch(cls: type[Task]) -> None:
    class Counted(cls):  # type: ignore[misc, valid-type]
        def model(self) -> nn.Module:
            return CountingTagger()

    model: Any = train_task(Counted, "ring", 1, steps=4).ranks[0].prepared.flat.model
    assert model.calls == 4 + -(-SAMPLES // BATCH)  # four steps and the evaluation


class CountingTask(DictBatches):
    """Counts losses in an attribute and in a batch norm outside the model."""

    def __init__(self) -> None:
        self.calls = 0
        self.norm = nn.BatchNorm1d(1, affine=False, dtype=torch.float64)

    def loss(self, outputs: Any, targets: Any) -> Any:
        self.calls += 1
        self.norm(outputs["logits"].detach().reshape(-1, 1))
        return super().loss(outputs, targets)


def test_loss_check_does_not_change_the_task() -> None:
    task: Any = train_task(CountingTask, "ring", 1, steps=3).ranks[0].prepared.task
    assert task.calls == 3 + -(-SAMPLES // BATCH)
    assert task.norm.num_batches_tracked == 3


@pytest.mark.parametrize(
    ("cls", "message"),
    [
        (
            TupleBatches,
            r"TupleBatches\.forward\(\) calls the whole model, which can be cut only if it",
        ),
        (
            NestedBatches,
            r"NestedBatches\.step\(\) calls the whole model, which can be cut only if it",
        ),
        (DictBatches, r"Tagger\.forward takes 3 inputs"),
    ],
)
def test_pipeline_rejects_tasks_that_call_the_whole_model(cls: type[Task], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        train_task(cls, {**HYBRID, "pipeline": 2, "data": 1}, 2)
