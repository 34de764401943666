"""The warning for losses that are no mean over samples: said where it is true, and nowhere else."""

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


def asked(loss: Loss, outputs: Any, targets: Any, samples: int | None = None) -> str | None:
    size = samples or len(targets)
    return loss_warning(loss, outputs, targets, loss(outputs, targets), samples=size)


def classes(size: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(size)
    outputs = torch.randn(size, 5, generator=generator).to(dtype).requires_grad_()
    return outputs, torch.randint(0, 5, (size,), generator=generator)


def tokens(size: int) -> tuple[Tensor, Tensor]:
    """Sequences of 6 places with ever more padding, class 0."""
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


def negatives(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs @ outputs.T, torch.arange(len(outputs)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", SIZES)
def test_means_pass(size: int, dtype: torch.dtype) -> None:
    outputs, targets = classes(size, dtype)
    assert asked(F.cross_entropy, outputs, targets) is None
    assert asked(lambda o, t: (o**2).mean(), outputs, targets) is None
    assert asked(lambda o, t: (o.sum(1) - t).mean() + 3, outputs, targets) is None
    ragged = tokens(size)
    assert asked(token_sums, *ragged) is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", SIZES)
def test_sums_are_named(size: int, dtype: torch.dtype) -> None:
    outputs, targets = classes(size, dtype)
    said = asked(lambda o, t: F.cross_entropy(o, t, reduction="sum"), outputs, targets)
    assert said is not None and "It is a sum" in said


@pytest.mark.parametrize("size", SIZES)
def test_a_mean_over_tokens_is_told_of_sums_and_weights(size: int) -> None:
    outputs, targets = tokens(size)
    said = asked(token_mean, outputs, targets)
    cut = size // 2
    values = [token_mean(outputs[:cut], targets[:cut]), token_mean(outputs[cut:], targets[cut:])]
    halves, whole = [f"{value:.6g}" for value in values], token_mean(outputs, targets)
    assert said is not None
    assert f"halves give {halves[0]} and {halves[1]}, the whole gives {whole:.6g};" in said
    assert "return (sum, weight)" in said


def test_a_half_without_a_token_is_no_mean_either() -> None:
    outputs, targets = tokens(6)
    targets[:3] = 0
    said = asked(token_mean, outputs, targets)
    assert said is not None and "halves give nan and" in said


@pytest.mark.parametrize("size", SIZES)
def test_negatives_of_the_batch_have_no_weights(size: int) -> None:
    outputs = F.normalize(classes(size)[0], dim=1)
    said = asked(negatives, outputs, torch.zeros(size))
    assert said is not None and "gather the outputs" in said
    assert "return (sum, weight)" not in said
    said = asked(lambda o, t: (negatives(o, t) * len(o), len(o)), outputs, torch.zeros(size))
    assert said is not None and "do not add up" in said and "gather the outputs" in said


@dataclass
class Pair:
    """A batch of two tensors."""

    first: Tensor
    second: Tensor


@dataclass
class Result(OrderedDict[str, Any]):
    """As Hugging Face's `ModelOutput`: a dataclass that is a dictionary of what is not None."""

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
def test_batches_of_many_forms(size: int, pack: Any, unpack: Any) -> None:
    outputs, targets = classes(size)
    packed = pack(outputs)
    for turned in (False, True):
        left, right = (targets, packed) if turned else (packed, targets)

        def mean(one: Any, other: Any, turned: bool = turned) -> Tensor:
            found, wanted = (other, one) if turned else (one, other)
            return F.cross_entropy(unpack(found), wanted)

        def total(one: Any, other: Any, mean: Loss = mean, size: int = size) -> Tensor:
            found: Tensor = mean(one, other) * len(one if isinstance(one, Tensor) else other)
            return found

        assert asked(mean, left, right, size) is None
        said = asked(total, left, right, size)
        assert said is not None and "It is a sum" in said


@pytest.mark.parametrize(
    ("outputs", "targets", "samples"),
    [
        (torch.randn(4, 7, 3), torch.zeros(7), 7),
        (pack_sequence([torch.randn(3, 2), torch.randn(2, 2)]), torch.zeros(2), 2),
        (object(), torch.zeros(4), 4),
        (torch.randn(1, 3), torch.zeros(1), 1),
    ],
    ids=["time-first", "packed", "unknown", "one"],
)
def test_what_cannot_be_cut_is_passed_over(outputs: Any, targets: Any, samples: int) -> None:
    given = outputs, targets, torch.ones(())
    loss = lambda o, t: torch.tensor(9.0)  # noqa: E731
    assert loss_warning(loss, *given, samples=samples) is None


class Inside(WrappedMapping):
    """A mapping of the user's own, whose copy shares what it holds."""

    def __init__(self, **items: Any) -> None:
        super().__init__(items)


@pytest.mark.parametrize("kind", [Inside, UserDict, OrderedDict, dict])
def test_a_batch_stays_whole(kind: Any) -> None:
    outputs, targets = classes(8)
    batch = kind(x=outputs, y=targets)
    said = asked(lambda o, b: F.cross_entropy(b["x"], b["y"], reduction="sum"), outputs, batch, 8)
    assert (said is None) == (kind is Inside)
    assert batch["x"] is outputs and batch["y"] is targets


def test_a_loss_that_fails_or_gives_something_else_is_passed_over() -> None:
    outputs, targets = classes(8)

    def small(outputs: Tensor, targets: Tensor) -> Tensor:
        if len(outputs) < 8:
            raise RuntimeError("too small")
        return outputs.sum()

    def other(outputs: Tensor, targets: Tensor) -> Any:
        return outputs.sum() if len(outputs) == 8 else None

    def backward(outputs: Tensor, targets: Tensor) -> Tensor:
        loss = outputs.sum()
        torch.autograd.backward(loss, retain_graph=True)
        return loss

    for loss in (small, other, backward):
        assert asked(loss, outputs, targets) is None
    for given in (1.0, None, {"loss": 1}, outputs, torch.tensor(float("nan"))):
        assert loss_warning(small, outputs, targets, given, samples=8) is None


@pytest.mark.parametrize(
    "draw", [torch.rand, lambda _: random.random(), lambda _: np.random.rand()]
)
def test_random_losses_are_passed_over_and_generators_put_back(draw: Any) -> None:
    outputs, targets = classes(8)
    loss = (outputs.sum() * draw(())).detach()
    numpy: Any = np.random.get_state()
    states = torch.get_rng_state(), random.getstate()
    drawn = lambda o, t: o.sum() * draw(())  # noqa: E731
    assert loss_warning(drawn, outputs, targets, loss, samples=8) is None
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    now: Any = np.random.get_state()
    assert np.array_equal(now[1], numpy[1]) and now[2:] == numpy[2:]


class Keeping(Task):
    """A loss that counts, writes into its arguments, and moves figures and buffers."""

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


def test_nothing_is_changed() -> None:
    task = Keeping()
    outputs, targets = classes(8)
    leaf, outputs = outputs, outputs * 1
    loss = task.loss(outputs, targets)
    outputs, targets = leaf * 1, targets + 1
    kept = [task.norm, *task.teachers]
    figures = [task.center, *(t for m in kept for t in m.state_dict().values())]
    figures += [outputs.detach(), targets]
    before = [figure.clone() for figure in figures]
    states = states_of(task, task.model())
    assert loss_warning(task.loss, outputs, targets, loss * 8, samples=8, states=states)
    assert task.calls == len(task.losses) == len(task.seen) == 1
    for figure, old in zip(figures, before, strict=True):
        assert torch.equal(figure, old)
    torch.autograd.backward(F.cross_entropy(outputs, targets * 0))
    assert leaf.grad is not None


@pytest.mark.parametrize(
    "kept",
    [
        torch.Generator(),
        np.random.default_rng(0),
        random.Random(0),
        torch.zeros(2**20 + 1),
        iter([]),
    ],
    ids=["torch", "numpy", "python", "queue", "iterator"],
)
def test_a_task_that_keeps_what_cannot_be_copied_is_passed_over(kept: Any) -> None:
    task, calls = Keeping(), list[Tensor]()
    outputs, targets = classes(8)

    def total(self: Task, outputs: Tensor, targets: Tensor) -> Tensor:
        calls.append(outputs)
        return outputs.sum()

    bound = MethodType(total, task)
    assert loss_warning(bound, outputs, targets, outputs.sum() * 9, samples=8) is not None
    assert len(calls) == 2
    vars(task)["kept"] = kept
    assert loss_warning(bound, outputs, targets, outputs.sum() * 9, samples=8) is None
    assert len(calls) == 2


def test_buffers_of_the_model_are_put_back() -> None:
    norm = nn.BatchNorm1d(5)
    outputs, targets = classes(8)
    loss = F.cross_entropy(norm(outputs), targets)
    before = [buffer.clone() for buffer in norm.buffers()]
    normed = lambda o, t: F.cross_entropy(norm(o), t)  # noqa: E731
    given, states = (outputs, targets, loss), states_of(Keeping(), norm)
    assert loss_warning(normed, *given, samples=8, states=states) is not None
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
def test_the_examples_pass(
    monkeypatch: pytest.MonkeyPatch, folder: str, name: str, arguments: dict[str, Any], size: int
) -> None:
    monkeypatch.syspath_prepend(EXAMPLES / folder)
    task: Task = getattr(importlib.import_module(folder), name)(**arguments)
    torch.manual_seed(0)
    model, data = task.model(), task.train_data()
    connect(model)
    inputs, targets = default_collate([data[index] for index in range(size)])
    with torch.autocast("cpu", torch.bfloat16, enabled=size == 32):
        assert asked(task.loss, model(inputs), targets, samples=size) is None
        wrong = asked(lambda o, t: task.loss(o, t) * len(t), model(inputs), targets, samples=size)
        assert wrong is not None and "It is a sum" in wrong


class Figures(Task):
    """Metrics of which some are means over samples; `drawn` and `counted` change with each call."""

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


class Means(Figures):
    def metrics(self, outputs: Tensor, targets: Tensor) -> dict[str, Any]:
        found = super().metrics(outputs, targets)
        return {name: found[name] for name in ("accuracy", "constant", "nothing")}


class Drawn(Figures):
    def metrics(self, outputs: Tensor, targets: Tensor) -> dict[str, Any]:
        return {"rmse": torch.rand(())}


class Kept(Figures):
    """A metric with state is among what the task keeps, so calls would count."""

    def __init__(self) -> None:
        super().__init__()
        self.kept = {"auc": Counter()}


class Given(Figures):
    """Each call takes one more of what is there."""

    def __init__(self) -> None:
        super().__init__()
        self.scores = iter([0.3, 0.2, 0.9, 0.1])

    def metrics(self, outputs: Tensor, targets: Tensor) -> dict[str, Any]:
        return {"score": next(self.scores)}


class Counter:
    def update(self) -> None: ...

    def compute(self) -> float:
        return 1.0


def judged_by(task: Task, check: MeanCheck, size: int) -> None:
    outputs, targets = classes(size, torch.float64)
    outputs = outputs.detach()
    made = BatchResult(outputs, targets, LossTerm(torch.zeros(()), float(size), float(size)))
    check.look_at_metrics(made, evaluate_batch(task, made, size), size)


@pytest.mark.parametrize("size", SIZES)
def test_metrics_that_are_no_means_are_named_once(
    size: int, caplog: pytest.LogCaptureFixture
) -> None:
    task = Figures()
    check = MeanCheck(task, task.model())
    for _ in range(3):
        judged_by(task, check, size)
    (record,) = caplog.records
    assert "'rmse'" in record.message and "metric with state" in record.message
    assert not any(f"'{name}'" in record.message for name in ("accuracy", "constant", "nothing"))
    assert task.counted == 3, "halves are shown to a copy of the task"


@pytest.mark.parametrize("kind", [Means, Drawn, Kept, Given])
def test_other_metrics_are_left_alone(kind: type[Task], caplog: pytest.LogCaptureFixture) -> None:
    task = kind()
    check = MeanCheck(task, task.model())
    for size in SIZES:
        judged_by(task, check, size)
    assert not caplog.records


class Stepping(Task):
    def model(self) -> nn.Module:
        return nn.Linear(3, 3)

    def train_data(self) -> Any: ...

    def step(self, model: nn.Module, batch: Any) -> Any: ...


@pytest.mark.parametrize(
    ("weight", "weighted", "samples", "told"),
    [
        (0.375, True, 8, 1),
        (1.0, True, 8, 0),
        (3.5, True, 8, 0),
        (0.5, True, 1, 0),
        (0.375, False, 8, 0),
        (0.0, True, 8, 0),
    ],
)
def test_a_figure_beside_the_loss_of_a_step_is_told(
    weight: float, weighted: bool, samples: int, told: int, caplog: pytest.LogCaptureFixture
) -> None:
    task = Stepping()
    check = MeanCheck(task, task.model())
    term = LossTerm(torch.zeros(()), 1.0, weight, weighted)
    for step in range(3):
        check.begin(step)
        check.look(step, BatchResult(None, torch.zeros(samples), term), samples)
    assert caplog.text.count("taken as (sum, weight): the loss is divided by it") == told
