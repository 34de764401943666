"""The warning for losses that are not a mean over samples: no false positives or negatives."""

import importlib
import random
from collections import OrderedDict, UserDict, namedtuple
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from types import MethodType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_sequence
from torch.utils.data import default_collate
from wrapped_mapping import WrappedMapping

from distplat.nn import connect
from distplat.strategies.loop.loss_check import MeanCheck, loss_warning, states_of
from distplat.strategies.loop.losses import BatchResult, LossTerm, evaluate_batch
from distplat.strategies.task import Task

EXAMPLES = Path(__file__).parents[2] / "examples"
SIZES = [2, 3, 7, 16]
Loss = Callable[[Any, Any], Any]


def warning_of(loss: Loss, outputs: Any, targets: Any, samples: int | None = None) -> str | None:
    size = samples or len(targets)
    return loss_warning(loss, outputs, targets, loss(outputs, targets), samples=size)


def classification_batch(size: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(size)
    outputs = torch.randn(size, 5, generator=generator).to(dtype).requires_grad_()
    return outputs, torch.randint(0, 5, (size,), generator=generator)


def token_batch(size: int) -> tuple[Tensor, Tensor]:
    """Return sequences of 6 tokens with increasing padding, class 0."""
    generator = torch.Generator().manual_seed(size)
    targets = torch.randint(1, 5, (size, 6), generator=generator)
    for sample in range(size):
        targets[sample, 6 - (4 * sample) // size :] = 0
    return torch.randn(size, 6, 5, generator=generator), targets


def token_mean(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs.flatten(0, 1), targets.flatten(), ignore_index=0)


def token_sums(outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    flat = outputs.flatten(0, 1), targets.flatten()
    return F.cross_entropy(*flat, ignore_index=0, reduction="sum"), (targets > 0).sum()


def in_batch_negatives(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs @ outputs.T, torch.arange(len(outputs)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", SIZES)
def test_means_give_no_warning(size: int, dtype: torch.dtype) -> None:
    outputs, targets = classification_batch(size, dtype)
    assert warning_of(F.cross_entropy, outputs, targets) is None
    assert warning_of(lambda o, t: (o**2).mean(), outputs, targets) is None
    assert warning_of(lambda o, t: (o.sum(1) - t).mean() + 3, outputs, targets) is None
    ragged = token_batch(size)
    assert warning_of(token_sums, *ragged) is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", SIZES)
def test_sum_is_named(size: int, dtype: torch.dtype) -> None:
    outputs, targets = classification_batch(size, dtype)
    warning = warning_of(lambda o, t: F.cross_entropy(o, t, reduction="sum"), outputs, targets)
    assert warning is not None and "It is a sum" in warning


@pytest.mark.parametrize("size", SIZES)
def test_mean_over_tokens_suggests_sum_and_weight(size: int) -> None:
    outputs, targets = token_batch(size)
    warning = warning_of(token_mean, outputs, targets)
    middle = size // 2
    values = [
        token_mean(outputs[:middle], targets[:middle]),
        token_mean(outputs[middle:], targets[middle:]),
    ]
    halves, loss = [f"{value:.6g}" for value in values], token_mean(outputs, targets)
    assert warning is not None
    assert f"halves give {halves[0]} and {halves[1]}, the whole gives {loss:.6g};" in warning
    assert "return (sum, weight)" in warning


def test_half_without_tokens_gives_a_warning() -> None:
    outputs, targets = token_batch(6)
    targets[:3] = 0
    warning = warning_of(token_mean, outputs, targets)
    assert warning is not None and "halves give nan and" in warning


@pytest.mark.parametrize("size", SIZES)
def test_in_batch_negatives_suggest_gathering_outputs(size: int) -> None:
    outputs = F.normalize(classification_batch(size)[0], dim=1)
    warning = warning_of(in_batch_negatives, outputs, torch.zeros(size))
    assert warning is not None and "gather the outputs" in warning
    assert "return (sum, weight)" not in warning
    warning = warning_of(
        lambda o, t: (in_batch_negatives(o, t) * len(o), len(o)), outputs, torch.zeros(size)
    )
    assert warning is not None and "do not add up" in warning and "gather the outputs" in warning


@dataclass
class Pair:
    """A batch of two tensors."""

    first: Tensor
    second: Tensor


@dataclass
class Result(OrderedDict[str, Any]):
    """Like Hugging Face's `ModelOutput`: a dataclass and a dict of the fields that are not None."""

    loss: Any = None
    logits: Any = None
    hidden: Any = None

    def __post_init__(self) -> None:
        for field in fields(self):
            if (value := getattr(self, field.name)) is not None:
                self[field.name] = value


Named = namedtuple("Named", ["logits", "scale"])


@pytest.mark.parametrize(
    ("pack", "unpack"),
    [
        (lambda o: [o, o], lambda p: p[1]),
        (lambda o: (torch.tensor(2.0), o), lambda p: p[1]),
        (lambda o: {"a": {"b": o}, "what": "text"}, lambda p: p["a"]["b"]),
        (lambda o: Pair(o, o), lambda p: p.second),
        (lambda o: Named(o, 3.0), lambda p: p.logits),
        (lambda o: Result(torch.tensor(1.0), o, (o, o)), lambda p: p["logits"] + p.hidden[1]),
        (lambda o: [{"row": row} for row in o], lambda p: torch.stack([q["row"] for q in p])),
        (lambda o: tuple(o), lambda p: torch.stack(p)),
    ],
)
@pytest.mark.parametrize("size", [2, 7, 8])
def test_nested_batches(size: int, pack: Any, unpack: Any) -> None:
    outputs, targets = classification_batch(size)
    packed = pack(outputs)
    for swapped in (False, True):
        left, right = (targets, packed) if swapped else (packed, targets)

        def mean(left: Any, right: Any, swapped: bool = swapped) -> Tensor:
            outputs, targets = (right, left) if swapped else (left, right)
            return F.cross_entropy(unpack(outputs), targets)

        def total(left: Any, right: Any, mean: Loss = mean, size: int = size) -> Tensor:
            loss: Tensor = mean(left, right) * len(left if isinstance(left, Tensor) else right)
            return loss

        assert warning_of(mean, left, right, size) is None
        warning = warning_of(total, left, right, size)
        assert warning is not None and "It is a sum" in warning


@pytest.mark.parametrize(
    ("outputs", "targets", "samples"),
    [
        (torch.randn(4, 7, 3), torch.zeros(7), 7),
        (pack_sequence([torch.randn(3, 2), torch.randn(2, 2)]), torch.zeros(2), 2),
        (object(), torch.zeros(4), 4),
        (torch.randn(1, 3), torch.zeros(1), 1),
    ],
    ids=["time-first", "packed", "unknown", "one sample"],
)
def test_batches_that_cannot_be_split_are_skipped(outputs: Any, targets: Any, samples: int) -> None:
    arguments = outputs, targets, torch.ones(())
    loss = lambda o, t: torch.tensor(9.0)  # noqa: E731
    assert loss_warning(loss, *arguments, samples=samples) is None


class SharedMapping(WrappedMapping):
    """A user's mapping whose copy shares its items."""

    def __init__(self, **items: Any) -> None:
        super().__init__(items)


@pytest.mark.parametrize("cls", [SharedMapping, UserDict, OrderedDict, dict])
def test_batch_is_not_changed(cls: Any) -> None:
    outputs, targets = classification_batch(8)
    batch = cls(x=outputs, y=targets)
    warning = warning_of(
        lambda o, b: F.cross_entropy(b["x"], b["y"], reduction="sum"), outputs, batch, 8
    )
    assert (warning is None) == (cls is SharedMapping)
    assert batch["x"] is outputs and batch["y"] is targets


def test_failing_or_invalid_losses_are_skipped() -> None:
    outputs, targets = classification_batch(8)

    def small(outputs: Tensor, targets: Tensor) -> Tensor:
        if len(outputs) < 8:
            raise RuntimeError("too small")
        return outputs.sum()

    def none(outputs: Tensor, targets: Tensor) -> Any:
        return outputs.sum() if len(outputs) == 8 else None

    def backward(outputs: Tensor, targets: Tensor) -> Tensor:
        loss = outputs.sum()
        torch.autograd.backward(loss, retain_graph=True)
        return loss

    for loss in (small, none, backward):
        assert warning_of(loss, outputs, targets) is None
    for value in (1.0, None, {"loss": 1}, outputs, torch.tensor(float("nan"))):
        assert loss_warning(small, outputs, targets, value, samples=8) is None


@pytest.mark.parametrize(
    "draw", [torch.rand, lambda _: random.random(), lambda _: np.random.rand()]
)
def test_random_losses_are_skipped_and_generators_restored(draw: Any) -> None:
    outputs, targets = classification_batch(8)
    loss = (outputs.sum() * draw(())).detach()
    numpy_before: Any = np.random.get_state()
    states = torch.get_rng_state(), random.getstate()
    random_loss = lambda o, t: o.sum() * draw(())  # noqa: E731
    assert loss_warning(random_loss, outputs, targets, loss, samples=8) is None
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    numpy_after: Any = np.random.get_state()
    assert np.array_equal(numpy_after[1], numpy_before[1]) and numpy_after[2:] == numpy_before[2:]


class StatefulLoss(Task):
    """Its loss counts calls, writes into its arguments, and updates tensors and buffers."""

    def __init__(self) -> None:
        self.calls, self.losses, self.center = 0, list[float](), torch.zeros(5)
        self.norm, self.seen = nn.BatchNorm1d(5), OrderedDict[int, int]()
        self.teachers = [nn.Linear(5, 5).requires_grad_(False), nn.BatchNorm1d(5)]

    def model(self) -> nn.Module:
        return nn.Linear(5, 5)

    def train_data(self) -> Any:
        return []

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        self.calls += 1
        self.center.mul_(0.9).add_(outputs.detach().mean(0), alpha=0.1)
        self.norm(outputs.detach())
        self.teachers[1](self.teachers[0](outputs.detach()))
        self.teachers[0].get_parameter("weight").data.mul_(0.9)
        self.seen[len(self.seen)] = len(outputs)
        loss = F.cross_entropy(outputs, targets)
        self.losses.append(loss.item())
        outputs.detach().clamp_(-1, 1)
        targets.zero_()
        return loss


def test_check_restores_task_and_arguments() -> None:
    task = StatefulLoss()
    outputs, targets = classification_batch(8)
    leaf, outputs = outputs, outputs * 1
    loss = task.loss(outputs, targets)
    outputs, targets = leaf * 1, targets + 1
    modules = [task.norm, *task.teachers]
    tensors = [task.center, *(t for m in modules for t in m.state_dict().values())]
    tensors += [outputs.detach(), targets]
    before = [tensor.clone() for tensor in tensors]
    states = states_of(task, task.model())
    assert loss_warning(task.loss, outputs, targets, loss * 8, samples=8, states=states)
    assert task.calls == len(task.losses) == len(task.seen) == 1
    for tensor, old in zip(tensors, before, strict=True):
        assert torch.equal(tensor, old)
    torch.autograd.backward(F.cross_entropy(outputs, targets * 0))
    assert leaf.grad is not None


@pytest.mark.parametrize(
    "attribute",
    [
        torch.Generator(),
        np.random.default_rng(0),
        random.Random(0),
        torch.zeros(2**20 + 1),
        iter([]),
    ],
    ids=["torch", "numpy", "python", "queue", "iterator"],
)
def test_task_with_uncopyable_attribute_is_skipped(attribute: Any) -> None:
    task, calls = StatefulLoss(), list[Tensor]()
    outputs, targets = classification_batch(8)

    def total(self: Task, outputs: Tensor, targets: Tensor) -> Tensor:
        calls.append(outputs)
        return outputs.sum()

    bound = MethodType(total, task)
    assert loss_warning(bound, outputs, targets, outputs.sum() * 9, samples=8) is not None
    assert len(calls) == 2
    vars(task)["kept"] = attribute
    assert loss_warning(bound, outputs, targets, outputs.sum() * 9, samples=8) is None
    assert len(calls) == 2


def test_buffers_of_the_model_are_restored() -> None:
    norm = nn.BatchNorm1d(5)
    outputs, targets = classification_batch(8)
    loss = F.cross_entropy(norm(outputs), targets)
    before = [buffer.clone() for buffer in norm.buffers()]
    normed = lambda o, t: F.cross_entropy(norm(o), t)  # noqa: E731
    arguments, states = (outputs, targets, loss), states_of(StatefulLoss(), norm)
    assert loss_warning(normed, *arguments, samples=8, states=states) is not None
    for buffer, old in zip(norm.buffers(), before, strict=True):
        assert torch.equal(buffer, old)
    torch.autograd.backward(loss)


@pytest.mark.parametrize(
    ("folder", "name", "arguments"),
    [
        ("digits", "Digits", {"model": "mlp"}),
        ("digits", "Digits", {"model": "cnn", "hidden": 16}),
        ("charlm", "CharLM", {"block": 16, "layers": 2, "width": 32, "heads": 2}),
        ("recsys", "Clicks", {"samples": 64}),
    ],
)
@pytest.mark.parametrize("size", [2, 7, 32])
def test_examples_give_no_warning(
    monkeypatch: pytest.MonkeyPatch, folder: str, name: str, arguments: dict[str, Any], size: int
) -> None:
    monkeypatch.syspath_prepend(EXAMPLES / folder)
    task: Task = getattr(importlib.import_module(folder), name)(**arguments)
    torch.manual_seed(0)
    model, data = task.model(), task.train_data()
    connect(model)
    inputs, targets = default_collate([data[index] for index in range(size)])
    with torch.autocast("cpu", torch.bfloat16, enabled=size == 32):
        assert warning_of(task.loss, model(inputs), targets, samples=size) is None
        warning = warning_of(
            lambda o, t: task.loss(o, t) * len(t), model(inputs), targets, samples=size
        )
        assert warning is not None and "It is a sum" in warning


class SomeMeans(Task):
    """Some of its metrics are means over samples; counts calls."""

    def __init__(self) -> None:
        self.counted = 0

    def model(self) -> nn.Module:
        return nn.Linear(5, 5)

    def train_data(self) -> Any:
        return [(torch.zeros(5), 0)]

    def metrics(self, outputs: Tensor, targets: Tensor) -> dict[str, Any]:
        self.counted += 1
        right = outputs.argmax(1) == targets
        squared = (outputs[:, 0] - targets).square().mean()
        return {
            "accuracy": right.double().mean(),
            "constant": 3,
            "rmse": squared.sqrt(),
            "correct": right.sum(),
            "largest": float(outputs.max()),
            "nothing": float("nan"),
        }


class OnlyMeans(SomeMeans):
    def metrics(self, outputs: Tensor, targets: Tensor) -> dict[str, Any]:
        all_metrics = super().metrics(outputs, targets)
        return {name: all_metrics[name] for name in ("accuracy", "constant", "nothing")}


class RandomMetric(SomeMeans):
    def metrics(self, outputs: Tensor, targets: Tensor) -> dict[str, Any]:
        return {"rmse": torch.rand(())}


class MetricWithState(SomeMeans):
    """Has a metric with state, which a check of halves would update."""

    def __init__(self) -> None:
        super().__init__()
        self.kept = {"auc": Counter()}


class IteratorMetric(SomeMeans):
    """Each call consumes a value of an iterator."""

    def __init__(self) -> None:
        super().__init__()
        self.scores = iter([0.3, 0.2, 0.9, 0.1])

    def metrics(self, outputs: Tensor, targets: Tensor) -> dict[str, Any]:
        return {"score": next(self.scores)}


class Counter:
    def update(self) -> None: ...

    def compute(self) -> float:
        return 1.0


def evaluate_with(task: Task, check: MeanCheck, size: int) -> None:
    outputs, targets = classification_batch(size, torch.float64)
    outputs = outputs.detach()
    result = BatchResult(outputs, targets, LossTerm(torch.zeros(()), float(size), float(size)))
    check.look_at_metrics(result, evaluate_batch(task, result, size), size)


@pytest.mark.parametrize("size", SIZES)
def test_metrics_that_are_not_means_are_named_once(
    size: int, caplog: pytest.LogCaptureFixture
) -> None:
    task = SomeMeans()
    check = MeanCheck(task, task.model())
    for _ in range(3):
        evaluate_with(task, check, size)
    (record,) = caplog.records
    assert "'rmse'" in record.message and "metric with state" in record.message
    assert not any(f"'{name}'" in record.message for name in ("accuracy", "constant", "nothing"))
    assert task.counted == 3, "halves are evaluated by a copy of the task"


@pytest.mark.parametrize("cls", [OnlyMeans, RandomMetric, MetricWithState, IteratorMetric])
def test_other_metrics_give_no_warning(cls: type[Task], caplog: pytest.LogCaptureFixture) -> None:
    task = cls()
    check = MeanCheck(task, task.model())
    for size in SIZES:
        evaluate_with(task, check, size)
    assert not caplog.records


class StepTask(Task):
    def model(self) -> nn.Module:
        return nn.Linear(3, 3)

    def train_data(self) -> Any: ...

    def step(self, model: nn.Module, batch: Any) -> Any: ...


@pytest.mark.parametrize(
    ("weight", "weighted", "samples", "count"),
    [
        (0.375, True, 8, 1),
        (1.0, True, 8, 0),
        (3.5, True, 8, 0),
        (0.5, True, 1, 0),
        (0.375, False, 8, 0),
        (0.0, True, 8, 0),
    ],
)
def test_second_value_of_step_is_warned_of_if_taken_as_weight(
    weight: float, weighted: bool, samples: int, count: int, caplog: pytest.LogCaptureFixture
) -> None:
    task = StepTask()
    check = MeanCheck(task, task.model())
    term = LossTerm(torch.zeros(()), 1.0, weight, weighted)
    for step in range(3):
        check.begin(step)
        check.look(step, BatchResult(None, torch.zeros(samples), term), samples)
    assert caplog.text.count("taken as (sum, weight): the loss is divided by it") == count
