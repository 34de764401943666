"""Batches of any form, and tasks that call the model themselves: equal to the plain loop."""

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
    Dicts,
    Listed,
    Nested,
    Packed,
    Tagger,
    Tags,
    Triples,
    of_the_end,
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


KINDS: list[type[Task]] = [Dicts, Triples, Nested, Listed, Packed]


@cache
def plain() -> tuple[dict[str, Tensor], float]:
    """Train in a loop as one would write it; give the model, and its loss on all samples."""
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


def trained(kind: type[Task], strategy: Any, workers: int, **fields: Any) -> LocalRun:
    sgd = {"name": "SGD", "lr": 0.1, "momentum": 0.9}
    given = {"optimizer": sgd, "steps": STEPS, "global_batch_size": BATCH, **fields}
    return train(job_of(strategy, workers, **given), kind)


@pytest.mark.sweep(2)
@pytest.mark.parametrize("kind", KINDS)
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
def test_any_batch_trains_as_a_plain_loop(
    kind: type[Task], strategy: str, workers: int, fields: dict[str, Any]
) -> None:
    run = trained(kind, strategy, workers, **fields)
    expected, loss = plain()
    found = run.trained[0]
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-12)
    last = of_the_end(run)
    assert sum(one.samples for one in last) == SAMPLES
    assert total(last, "loss") == pytest.approx(loss, rel=1e-9)
    words = sum(map(len, Sentences(SAMPLES).words)) / SAMPLES
    assert total(last, "words") == pytest.approx(words, rel=1e-6)


class HuggingFace(Dicts):
    """The shortest way: the model has its loss."""

    loss = Task.loss

    def step(self, model: nn.Module, batch: Any) -> Any:
        return model(**batch)


def test_outputs_with_a_loss_in_them_are_what_a_step_may_give() -> None:
    """One worker: the loss is a mean over words, which parts of a batch have more or less of."""
    found, (expected, _) = trained(HuggingFace, "ring", 1).trained[0], plain()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-12)


def test_the_default_step_is_the_loss_of_the_default_forward() -> None:
    class Pairs(Tags):
        def loss(self, outputs: Any, targets: Any) -> Any:
            return outputs, targets

    twice = nn.Module()
    twice.forward = lambda x: 2 * x
    assert Pairs().step(twice, (3, 4)) == (6, 4)
    assert Pairs().step(twice, [3, 4]) == (6, 4)
    assert Pairs().step(twice, {"x": 3}) == (6, {"x": 3})


def test_a_number_that_a_task_keeps_as_step_is_no_step() -> None:
    class Counting(Dicts):
        def __init__(self) -> None:
            vars(self)["step"] = 0

        def loss(self, outputs: Any, targets: Any) -> Any:
            vars(self)["step"] += 1
            return super().loss(outputs, targets)

    found, (expected, _) = trained(Counting, "ring", 2).trained[0], plain()
    torch.testing.assert_close(found["head.bias"], expected["head.bias"], rtol=1e-9, atol=1e-12)


def stepping(value: Any) -> type[Task]:
    """Give a task whose `step` makes something of its loss."""

    class Stepping(Dicts):
        loss = Task.loss

        def step(self, model: nn.Module, batch: Any) -> Any:
            return value(model(**batch)["loss"])

    return Stepping


@pytest.mark.parametrize(
    ("value", "told"),
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
def test_what_step_may_not_give(value: Any, told: str) -> None:
    with pytest.raises(ValueError, match=rf"test_task_step\.py:\d+: {told}"):
        trained(stepping(value), "ring", 1)


class Unsaid(Triples):
    """Three things, and nobody says how the model takes them."""

    forward = Task.forward


def test_a_batch_that_nobody_says_how_to_take_is_refused() -> None:
    told = r"it is a tuple of 3\. For any other batch Unsaid needs forward\(model, batch\) or step"
    with pytest.raises(ValueError, match=told):
        trained(Unsaid, "ring", 1)
    with pytest.raises(SpecError, match="a batch is a tuple of 3, and the task does not say how"):
        trained(Unsaid, HYBRID, 2)


class Ragged(Dicts):
    """A mean over words, which are not as many in each sample."""

    def loss(self, outputs: Any, targets: Any) -> Any:
        return F.cross_entropy(outputs["logits"].flatten(0, 1), targets["labels"].flatten())


def test_a_mean_over_words_is_told(caplog: pytest.LogCaptureFixture) -> None:
    trained(Ragged, "ring", 1)
    (told,) = [one.getMessage() for one in caplog.records if "not a mean" in one.getMessage()]
    assert told.startswith("loss() is not a mean over the samples of a batch: halves give ")
    assert "return (sum, weight) instead" in told


class OwnLoss(Dicts):
    """A mean over words, which the model makes itself."""

    def loss(self, outputs: Any, targets: Any) -> Any:
        return outputs["loss"]


@pytest.mark.parametrize("kind", [OwnLoss, HuggingFace])
@pytest.mark.parametrize("strategy", ["ring", HYBRID], ids=str)
def test_a_mean_over_words_of_the_models_own_is_told(
    kind: type[Task], strategy: Any, caplog: pytest.LogCaptureFixture
) -> None:
    trained(kind, strategy, 2)
    (told, *_) = [one.getMessage() for one in caplog.records if "the model's own" in one.message]
    assert re.search(r"have \d to \d+ labels that are not -100", told)
    assert "Return (sum, weight) instead" in told


@pytest.mark.parametrize("kind", [Dicts, Triples, Nested, Listed])
def test_a_sum_over_words_with_its_weight_is_not(
    kind: type[Task], caplog: pytest.LogCaptureFixture
) -> None:
    trained(kind, "ring", 1)
    assert not [one for one in caplog.records if "mean" in one.getMessage()]


class Counting(Tagger):
    """Counts its forwards."""

    calls = 0

    def forward(self, *given: Any, **named: Any) -> Any:
        self.calls += 1
        return super().forward(*given, **named)


@pytest.mark.parametrize("kind", [Ragged, Triples, Nested])
def test_the_model_runs_once_a_batch(kind: type[Task]) -> None:
    class Counted(kind):  # type: ignore[misc, valid-type]
        def model(self) -> nn.Module:
            return Counting()

    model: Any = trained(Counted, "ring", 1, steps=4).ranks[0].prepared.flat.model
    assert model.calls == 4 + -(-SAMPLES // BATCH)  # four steps, and the evaluation after them


class Figured(Dicts):
    """Counts its losses in the task, and has a layer of its own that it counts with."""

    def __init__(self) -> None:
        self.calls = 0
        self.norm = nn.BatchNorm1d(1, affine=False, dtype=torch.float64)

    def loss(self, outputs: Any, targets: Any) -> Any:
        self.calls += 1
        self.norm(outputs["logits"].detach().reshape(-1, 1))
        return super().loss(outputs, targets)


def test_looking_at_a_loss_leaves_the_task_as_it_is() -> None:
    task: Any = trained(Figured, "ring", 1, steps=3).ranks[0].prepared.task
    assert task.calls == 3 + -(-SAMPLES // BATCH)
    assert task.norm.num_batches_tracked == 3


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        (Triples, r"Triples\.forward\(\) calls the whole model, which can be cut only if it"),
        (Nested, r"Nested\.step\(\) calls the whole model, which can be cut only if it"),
        (Dicts, r"Tagger\.forward takes 3 inputs"),
    ],
)
def test_a_model_without_blocks_is_not_cut_around_a_call(kind: type[Task], told: str) -> None:
    with pytest.raises(SpecError, match=told):
        trained(kind, {**HYBRID, "pipeline": 2, "data": 1}, 2)
