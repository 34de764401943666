"""`distplat verify`: verdicts on correct and incorrect tasks, and the comparison itself."""

from __future__ import annotations

import ast
import copy
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from drawn_tasks import DrawnRun
from in_memory_engine import engine, task_factory
from torch import Tensor, nn
from torch.utils.data import IterableDataset, TensorDataset
from verify_rows import rows

from distplat.cli.verify import exit_code
from distplat.platform.errors import InfrastructureError, SpecError
from distplat.platform.spec import Job
from distplat.strategies.ring import Ring, RingOptions
from distplat.strategies.ring_worker import RingWorker
from distplat.strategies.task import Task
from distplat.strategies.verification import child, verdicts
from distplat.strategies.verification.compare import LOSS, compare
from distplat.strategies.verification.recipes import Trained
from distplat.strategies.verification.references import references
from distplat.strategies.verification.switched import Switches, switched
from distplat.strategies.verification.verdicts import (
    EQUAL,
    MEANING,
    NOT_COMPARED,
    REFUSED,
    EngineRun,
    Row,
    inexact_reason,
    judge,
    watch_losses,
)

ROOT = Path(__file__).parents[2]
RING = DrawnRun(steps=8)


class Classify(Task):
    """23 samples of three classes: the last batch of eight is smaller."""

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))

    def train_data(self) -> TensorDataset:
        generator = torch.Generator().manual_seed(1)
        inputs = torch.randn(23, 5, generator=generator)
        return TensorDataset(inputs, torch.randint(0, 3, (23,), generator=generator))

    def loss(self, outputs: Any, targets: Any) -> Any:
        return nn.functional.cross_entropy(outputs, targets)


def job(strategy: str, **more: Any) -> Job:
    return replace(RING, strategy=strategy, samples=23, batch=8, **more).job()


def test_reference_is_short_and_independent_of_the_engine() -> None:
    text = (ROOT / "strategies/verification/reference.py").read_text()
    assert len(text.splitlines()) <= 150
    imports = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom)]
    modules = {node.module for node in imports if (node.module or "").startswith("distplat")}
    package = "distplat.strategies.verification"
    assert modules == {"distplat.strategies.task", package, f"{package}.recipes"}


@pytest.mark.sweep(2)
@pytest.mark.parametrize(
    ("strategy", "options"),
    [
        ("ring", {}),
        ("ring", {"shard_optimizer": True}),
        ("ps-sync", {"num_servers": 2}),
        ("hybrid", {"pipeline": 2, "cut": "even"}),
    ],
)
def test_correct_task_has_verdict_equal(strategy: str, options: dict[str, Any]) -> None:
    results = rows(Classify, job(strategy, options=options))
    assert {check: row.verdict for check, row in results.items()} == {
        "plain loop": EQUAL,
        "repeat": EQUAL,
        "whole batch": EQUAL,
    }
    assert not any(row.failed for row in results.values())
    assert (results["whole batch"].difference or 0.0) < 1e-12


class ShuffledStream(IterableDataset[Any]):
    """Shuffles each pass with its own generator, because the ranks are threads."""

    def __init__(self, *columns: Tensor) -> None:
        self.columns, self.epoch = columns, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[Any]:
        generator = torch.Generator().manual_seed(self.epoch)
        for index in torch.randperm(len(self.columns[0]), generator=generator).tolist():
            inputs, target = (column[index] for column in self.columns)
            yield inputs + self.epoch, target


class StreamTask(Classify):
    def train_data(self) -> Any:
        return ShuffledStream(*super().train_data().tensors)


class StreamByEpochTask(StreamTask):
    def train_data(self) -> Any:
        stream = type("StreamWithLength", (ShuffledStream,), {"__len__": lambda self: 23})
        return stream(*Classify.train_data(self).tensors)


@pytest.mark.sweep(2)
@pytest.mark.parametrize("cls", [StreamTask, StreamByEpochTask])
@pytest.mark.parametrize(
    ("strategy", "options"), [("ring", {}), ("hybrid", {"pipeline": 2, "cut": "even"})]
)
def test_stream_has_verdict_equal(strategy: str, options: dict[str, Any], cls: type[Task]) -> None:
    spec = job(strategy, options=options)
    results = rows(cls, spec)
    assert [row.verdict for row in results.values()] == [EQUAL] * 3
    assert (results["whole batch"].difference or 0.0) < 1e-12


class LrTask(Classify):
    """Defines `lr`."""

    def lr(self, step: int, total: int) -> float:
        return min(1.0, (step + 1) / 4) * (1.0 - step / total)


def test_reference_uses_the_tasks_lr() -> None:
    results = rows(LrTask, job("ps-sync", options={"num_servers": 2}))
    assert {row.verdict for row in results.values()} == {EQUAL}


class TokenMean(Classify):
    """The loss is a weighted mean, not a mean over samples."""

    def loss(self, outputs: Any, targets: Any) -> Any:
        return nn.functional.cross_entropy(outputs, targets, weight=torch.tensor([1.0, 5.0, 0.2]))


class DictBatches(Classify):
    """Batches and outputs are dicts; the model returns its loss."""

    def model(self) -> nn.Module:
        class Model(nn.Module):
            def __init__(self, inner: nn.Module) -> None:
                super().__init__()
                self.inner = inner

            def forward(self, x: Any, y: Any) -> Any:
                logits = self.inner(x)
                return {"loss": nn.functional.cross_entropy(logits, y), "logits": logits}

        return Model(super().model())

    def collate(self, samples: list[Any]) -> Any:
        x, y = zip(*samples, strict=True)
        return {"x": torch.stack(x), "y": torch.stack(y)}

    def loss(self, outputs: Any, targets: Any) -> Any:
        return nn.functional.cross_entropy(outputs["logits"], targets["y"])


class StepTask(DictBatches):
    """The same in `step`."""

    loss = Task.loss

    def step(self, model: nn.Module, batch: Any) -> Any:
        return model(**batch)


class StepTokenMean(StepTask):
    """A weighted mean in `step`."""

    def step(self, model: nn.Module, batch: Any) -> Any:
        logits, weight = model(**batch)["logits"], torch.tensor([1.0, 5.0, 0.2])
        return nn.functional.cross_entropy(logits, batch["y"], weight=weight.to(logits.dtype))


@pytest.mark.parametrize("cls", [DictBatches, StepTask])
def test_dict_batches_have_verdict_equal(cls: type[Task]) -> None:
    results = rows(cls, job("ring"))
    assert {row.verdict for row in results.values()} == {EQUAL}
    assert (results["whole batch"].difference or 0.0) < 1e-12


class ContrastiveLoss(Classify):
    """The loss of a sample depends on the other samples of the batch."""

    def loss(self, outputs: Any, targets: Any) -> Any:
        logits = outputs @ outputs.t()
        return nn.functional.cross_entropy(logits, torch.arange(len(logits)))


class CenteringModel(Classify):
    """The model's outputs depend on the other samples of the batch."""

    def model(self) -> nn.Module:
        class Centre(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return x - x.mean(0)

        return nn.Sequential(Centre(), nn.Linear(5, 3))


class CenteringModelWithObject(CenteringModel):
    """The model returns an object of an unregistered class."""

    def model(self) -> nn.Module:
        class Wrapped(nn.Module):
            def __init__(self, inner: nn.Module) -> None:
                super().__init__()
                self.inner = inner

            def forward(self, x: Tensor) -> Any:
                return SimpleNamespace(logits=self.inner(x))

        return Wrapped(super().model())

    def loss(self, outputs: Any, targets: Any) -> Any:
        return super().loss(outputs.logits, targets)


@pytest.mark.sweep(2)
@pytest.mark.parametrize(
    ("cls", "fragment"),
    [
        (TokenMean, "(sum, weight)"),
        (StepTokenMean, "(sum, weight)"),
        (ContrastiveLoss, "in-batch"),
        (CenteringModel, "the model"),
        (CenteringModelWithObject, "the model"),
    ],
)
def test_loss_across_samples_has_verdict_meaning(cls: type[Task], fragment: str) -> None:
    results = rows(cls, job("ring"))
    assert results["plain loop"].verdict == EQUAL
    whole = results["whole batch"]
    assert whole.verdict == MEANING and whole.failed and fragment in whole.reason
    assert exit_code([*results.values()]) == 1


class BatchNormTask(Classify):
    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Linear(7, 3))


def test_batch_norm_is_compared_in_frozen_mode() -> None:
    results = rows(BatchNormTask, job("ring"))
    assert results["whole batch"].verdict == EQUAL
    batch_norm = results["batch norm"]
    assert batch_norm.verdict == NOT_COMPARED and not batch_norm.failed


class NanTask(Classify):
    def loss(self, outputs: Any, targets: Any) -> Any:
        return super().loss(outputs, targets) * float("nan")


def test_nan_loss_fails() -> None:
    spec = job("ring")
    results = judge(
        spec, references(spec, task_factory(NanTask)), lambda *_: EngineRun(nan_run(spec))
    )
    assert exit_code(results) == 1 and "NaN" in results[0].reason


def nan_run(spec: Job) -> Trained:
    model = {n: v * float("nan") for n, v in NanTask().model().state_dict().items()}
    return Trained({spec.steps or 0: model}, [float("nan")] * (spec.steps or 0))


def test_rejected_run_has_its_exit_code() -> None:
    def reject(*_: Any) -> EngineRun:
        raise SpecError("unsupported")

    spec = job("ring")
    results = judge(spec, references(spec, task_factory(Classify)), reject)
    assert [(row.verdict, row.failed) for row in results] == [(REFUSED, True)]
    assert exit_code(results) == 2
    lost_row = Row("ring", "run", REFUSED, failed=True, error=InfrastructureError("gone"))
    assert exit_code([lost_row]) == 4 and exit_code([lost_row, replace(lost_row, error=None)]) == 1
    assert exit_code([]) == 0


def test_asynchronous_run_is_not_compared() -> None:
    spec = job("ring")
    run = Trained({8: {}}, [2.0, 1.0, 0.5])
    (row,) = watch_losses(spec, "asynchronous", lambda *_: EngineRun(run, {"staleness_mean": 1.5}))
    assert row.verdict == NOT_COMPARED and not row.failed
    assert "2 -> 0.5" in row.reason and "staleness 1.5" in row.reason


# -- the comparison itself --------------------------------------------------------------------


def make_run(
    change: Callable[[int, dict[str, Tensor]], object] = lambda step, state: None,
) -> Trained:
    """Return a run of four steps with two parameters, a buffer, and `unused` without a gradient."""
    states = {}
    for step in range(5):
        state = {name: torch.ones(3) * (1 + 0.1 * step) for name in ("used", "second", "buffer")}
        state |= {"unused": torch.ones(3)}
        change(step, state)
        states[step] = state
    return Trained(states, [1.0, 0.9, 0.8, 0.7], [{"used", "second"}] * 4)


TRAINABLE = ["used", "second", "unused"]


def diagnose(run: Trained, noise: Trained | None = None) -> tuple[str, int, str]:
    comparison = compare(run, make_run(), noise or make_run(), TRAINABLE)
    assert comparison.diverges
    return comparison.name, comparison.step, comparison.reason


def add(name: str, amount: float, first: int = 1) -> Callable[[int, dict[str, Tensor]], object]:
    return lambda step, state: state[name].add_(amount * (step >= first))


def test_rounding_noise_is_tolerated() -> None:
    noise = make_run(add("used", 1e-5))
    assert not compare(make_run(add("used", 1e-4)), make_run(), noise, TRAINABLE).diverges
    assert compare(make_run(add("used", 1e-3)), make_run(), noise, TRAINABLE).diverges
    assert compare(make_run(add("second", 1e-4)), make_run(), noise, TRAINABLE).diverges


def test_compare_reports_first_step_and_difference() -> None:
    comparison = compare(make_run(add("second", 0.5, first=3)), make_run(), make_run(), TRAINABLE)
    assert (comparison.name, comparison.step) == ("second", 3)
    assert comparison.difference == pytest.approx(0.5)


def test_missing_states_are_skipped() -> None:
    run = make_run(add("second", 0.5, first=2))
    run.states = {step: state for step, state in run.states.items() if step in (1, 4)}
    assert diagnose(run)[:2] == ("second", 4)


def freeze(step: int, state: dict[str, Tensor]) -> None:
    state["used"].fill_(1.0)


def double(step: int, state: dict[str, Tensor]) -> None:
    for name in ("used", "second"):
        state[name].fill_(1 + 0.2 * step)


def lose_updates(step: int, state: dict[str, Tensor]) -> None:
    state["used"][0] -= 0.05 * step


def overflow(step: int, state: dict[str, Tensor]) -> None:
    state["used"] *= float("inf")


REASONS: dict[str, tuple[Callable[[int, dict[str, Tensor]], object], str]] = {
    "unused": (add("unused", -0.01), "without a gradient"),
    "buffer": (add("buffer", 0.01), "buffers"),
    "stuck": (freeze, "stay unchanged"),
    "doubled": (double, "2 times as large"),
    "lost": (lose_updates, "lost or counts twice"),
    "infinite": (overflow, "NaN or infinity"),
}


@pytest.mark.parametrize("case", REASONS)
def test_compare_gives_a_likely_reason(case: str) -> None:
    change, fragment = REASONS[case]
    assert fragment in diagnose(make_run(change))[2]


def test_different_first_loss_points_to_data_and_buffers() -> None:
    run = make_run()
    run.losses[0] += 0.1
    name, step, reason = diagnose(run)
    assert (name, step) == (LOSS, 1) and "samples, buffers" in reason


def test_additional_tensor_is_reported() -> None:
    run = copy.deepcopy(make_run())
    run.states[4]["more"] = torch.ones(1)
    assert diagnose(run)[0] == "more"


# -- switches ----------------------------------------------------------------------------------


class DropoutTask(Classify):
    def __init__(self) -> None:
        self.shares = torch.ones(3)

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(5, 7), nn.Dropout(0.5), nn.BatchNorm1d(7), nn.Linear(7, 3))

    def eval_data(self) -> TensorDataset:
        return self.train_data()


def test_switches_change_only_their_feature() -> None:
    task = switched(
        DropoutTask, Switches(double=True, dropout=False, frozen_norm=True, samples=4)
    )()
    assert isinstance(task, DropoutTask) and task.eval_data() is None
    model, data = task.model().train(), task.train_data()
    inputs, target = data[0]
    assert len(data) == 4
    assert inputs.dtype == torch.float64 and target.dtype == torch.int64
    assert all(p.dtype == torch.float64 for p in model.parameters())
    first, second = model(inputs[None]), model(inputs[None])
    assert torch.equal(first, second)
    task.loss(first, target[None])
    assert task.shares.dtype == torch.float64
    plain = switched(DropoutTask, Switches())()
    assert all(module.training for module in plain.model().train().modules())
    assert type(plain.train_data()) is TensorDataset


def test_child_answers_for_each_strategy(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "child_task.py").write_text(
        "import torch\n"
        "from distplat import Task\n"
        "from torch.utils.data import TensorDataset\n"
        "class T(Task):\n"
        "    def model(self): return torch.nn.Linear(2, 1)\n"
        "    def train_data(self): return TensorDataset(torch.randn(9, 2), torch.randn(9, 1))\n"
        "    def loss(self, outputs, targets): return (outputs - targets).square().mean()\n"
    )
    jobs = [job("ring"), job("hybrid", options={"pipeline": 2})]
    fields = [spec.model_dump(mode="json") for spec in jobs]
    request = child.ChildRequest(fields, "child_task:T", {}, str(tmp_path))
    (tmp_path / child.REQUEST).write_text(json.dumps(asdict(request)))
    monkeypatch.setattr(sys, "argv", ["child", str(tmp_path)])
    monkeypatch.setattr(sys, "path", [*sys.path])
    child.main()
    ring, hybrid = torch.load(tmp_path / child.ANSWER, weights_only=False)
    assert len(ring.plain.losses) == 8 and ring.whole.switches.double
    assert "does not say how its model is split" in hybrid


def test_task_with_step_is_not_compared_under_hybrid() -> None:
    assert (
        child._uncut_reason(job("ring"), StepTask()) == "the task calls the model itself, in step()"
    )
    assert child._uncut_reason(job("ring"), Classify()) == ""


def test_large_models_keep_some_states_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distplat.strategies.verification.references._ROOM_BYTES", 600)
    spec = job("ring")
    reference = references(spec, task_factory(Classify))
    assert reference.every > 1 and len(reference.plain.states) < 8 and 8 in reference.plain.states
    results = judge(spec, reference, engine(Classify))
    assert {row.verdict for row in results} == {EQUAL}


def test_strategy_with_synchronize_is_not_compared(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class WorkerWithSynchronize(RingWorker):
        def synchronize(self) -> None:
            pass

    class LocalSgd(Ring):
        worker = WorkerWithSynchronize

    assert not inexact_reason(job("ps-sync")) and not inexact_reason(job("ring"))
    monkeypatch.setattr(verdicts, "make_strategy", lambda job: LocalSgd(RingOptions()))
    assert "between steps" in inexact_reason(job("ring"))
