"""What `distplat verify` says: of tasks that are as they should be, and of those that are not."""

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
from drawn_tasks import Drawn
from in_memory_engine import engine, make
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
RING = Drawn(steps=8)


class Classify(Task):
    """Twenty-three samples of three classes, so that batches of eight are cut unevenly."""

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


def test_the_reference_is_short_and_owes_nothing_to_the_engine() -> None:
    text = (ROOT / "strategies/verification/reference.py").read_text()
    assert len(text.splitlines()) <= 150
    found = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom)]
    ours = {node.module for node in found if (node.module or "").startswith("distplat")}
    home = "distplat.strategies.verification"
    assert ours == {"distplat.strategies.task", home, f"{home}.recipes"}


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
def test_a_task_that_means_what_is_trained(strategy: str, options: dict[str, Any]) -> None:
    found = rows(Classify, job(strategy, options=options))
    assert {check: row.verdict for check, row in found.items()} == {
        "plain loop": EQUAL,
        "repeat": EQUAL,
        "whole batch": EQUAL,
    }
    assert not any(row.failed for row in found.values())
    assert (found["whole batch"].difference or 0.0) < 1e-12


class Shuffled(IterableDataset[Any]):
    """Shuffles itself anew in each pass, with a generator of its own: ranks are threads here."""

    def __init__(self, *columns: Tensor) -> None:
        self.columns, self.epoch = columns, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[Any]:
        draws = torch.Generator().manual_seed(self.epoch)
        for place in torch.randperm(len(self.columns[0]), generator=draws).tolist():
            inputs, target = (column[place] for column in self.columns)
            yield inputs + self.epoch, target


class Streamed(Classify):
    def train_data(self) -> Any:
        return Shuffled(*super().train_data().tensors)


class StreamedByEpoch(Streamed):
    def train_data(self) -> Any:
        kind = type("Long", (Shuffled,), {"__len__": lambda self: 23})
        return kind(*Classify.train_data(self).tensors)


@pytest.mark.sweep(2)
@pytest.mark.parametrize("kind", [Streamed, StreamedByEpoch])
@pytest.mark.parametrize(
    ("strategy", "options"), [("ring", {}), ("hybrid", {"pipeline": 2, "cut": "even"})]
)
def test_a_stream_is_verified(strategy: str, options: dict[str, Any], kind: type[Task]) -> None:
    one = job(strategy, options=options)
    found = rows(kind, one)
    assert [row.verdict for row in found.values()] == [EQUAL] * 3
    assert (found["whole batch"].difference or 0.0) < 1e-12


class WarmedUp(Classify):
    """With rates of its own."""

    def lr(self, step: int, total: int) -> float:
        return min(1.0, (step + 1) / 4) * (1.0 - step / total)


def test_rates_of_the_task_are_the_references_too() -> None:
    found = rows(WarmedUp, job("ps-sync", options={"num_servers": 2}))
    assert {row.verdict for row in found.values()} == {EQUAL}


class TokenMean(Classify):
    """A mean over something else than samples."""

    def loss(self, outputs: Any, targets: Any) -> Any:
        return nn.functional.cross_entropy(outputs, targets, weight=torch.tensor([1.0, 5.0, 0.2]))


class Keyed(Classify):
    """Dicts, which go into the model by keywords; it gives a dict, its loss in it."""

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


class Stepped(Keyed):
    """All of it in a `step`."""

    loss = Task.loss

    def step(self, model: nn.Module, batch: Any) -> Any:
        return model(**batch)


class SteppedTokenMean(Stepped):
    """A mean over something else than samples, from a `step`."""

    def step(self, model: nn.Module, batch: Any) -> Any:
        logits, weight = model(**batch)["logits"], torch.tensor([1.0, 5.0, 0.2])
        return nn.functional.cross_entropy(logits, batch["y"], weight=weight.to(logits.dtype))


@pytest.mark.parametrize("kind", [Keyed, Stepped])
def test_batches_of_any_form_are_verified(kind: type[Task]) -> None:
    found = rows(kind, job("ring"))
    assert {row.verdict for row in found.values()} == {EQUAL}
    assert (found["whole batch"].difference or 0.0) < 1e-12


class InBatch(Classify):
    """Each sample looks at the others."""

    def loss(self, outputs: Any, targets: Any) -> Any:
        logits = outputs @ outputs.t()
        return nn.functional.cross_entropy(logits, torch.arange(len(logits)))


class Centred(Classify):
    """The model looks at the others."""

    def model(self) -> nn.Module:
        class Centre(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return x - x.mean(0)

        return nn.Sequential(Centre(), nn.Linear(5, 3))


class CentredObject(Centred):
    """What the model gives is an object of a class that nobody knows."""

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
    ("kind", "says"),
    [
        (TokenMean, "(sum, weight)"),
        (SteppedTokenMean, "(sum, weight)"),
        (InBatch, "in-batch"),
        (Centred, "the model"),
        (CentredObject, "the model"),
    ],
)
def test_what_cannot_be_put_together_differs_by_meaning(kind: type[Task], says: str) -> None:
    found = rows(kind, job("ring"))
    assert found["plain loop"].verdict == EQUAL
    whole = found["whole batch"]
    assert whole.verdict == MEANING and whole.failed and says in whole.reason
    assert exit_code([*found.values()]) == 1


class Normed(Classify):
    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Linear(7, 3))


def test_local_batch_norm_is_compared_frozen_and_said() -> None:
    found = rows(Normed, job("ring"))
    assert found["whole batch"].verdict == EQUAL
    note = found["batch norm"]
    assert note.verdict == NOT_COMPARED and not note.failed


class Spoiled(Classify):
    def loss(self, outputs: Any, targets: Any) -> Any:
        return super().loss(outputs, targets) * float("nan")


def test_a_task_that_is_not_finite_does_not_pass() -> None:
    drawn = job("ring")
    found = judge(drawn, references(drawn, make(Spoiled)), lambda *_: EngineRun(nan_run(drawn)))
    assert exit_code(found) == 1 and "NaN" in found[0].reason


def nan_run(drawn: Job) -> Trained:
    model = {n: v * float("nan") for n, v in Spoiled().model().state_dict().items()}
    return Trained({drawn.steps or 0: model}, [float("nan")] * (drawn.steps or 0))


def test_a_refused_run_is_shown_with_its_own_code() -> None:
    def refuses(*_: Any) -> EngineRun:
        raise SpecError("not this one")

    drawn = job("ring")
    found = judge(drawn, references(drawn, make(Classify)), refuses)
    assert [(row.verdict, row.failed) for row in found] == [(REFUSED, True)]
    assert exit_code(found) == 2
    lost = Row("ring", "run", REFUSED, failed=True, error=InfrastructureError("gone"))
    assert exit_code([lost]) == 4 and exit_code([lost, replace(lost, error=None)]) == 1
    assert exit_code([]) == 0


def test_asynchronous_runs_are_watched_not_compared() -> None:
    drawn = job("ring")
    run = Trained({8: {}}, [2.0, 1.0, 0.5])
    (row,) = watch_losses(drawn, "asynchronous", lambda *_: EngineRun(run, {"staleness_mean": 1.5}))
    assert row.verdict == NOT_COMPARED and not row.failed
    assert "2 -> 0.5" in row.reason and "staleness 1.5" in row.reason


# -- the comparison itself --------------------------------------------------------------------


def trained(
    change: Callable[[int, dict[str, Tensor]], object] = lambda step, state: None,
) -> Trained:
    """Two parameters and a buffer over four steps, `unused` without a gradient."""
    states = {}
    for step in range(5):
        state = {name: torch.ones(3) * (1 + 0.1 * step) for name in ("used", "second", "buffer")}
        state |= {"unused": torch.ones(3)}
        change(step, state)
        states[step] = state
    return Trained(states, [1.0, 0.9, 0.8, 0.7], [{"used", "second"}] * 4)


TRAINABLE = ["used", "second", "unused"]


def said(run: Trained, noise: Trained | None = None) -> tuple[str, int, str]:
    found = compare(run, trained(), noise or trained(), TRAINABLE)
    assert found.diverges
    return found.name, found.step, found.reason


def add(name: str, amount: float, first: int = 1) -> Callable[[int, dict[str, Tensor]], object]:
    return lambda step, state: state[name].add_(amount * (step >= first))


def test_rounding_is_no_difference_and_more_is_one() -> None:
    noise = trained(add("used", 1e-5))
    assert not compare(trained(add("used", 1e-4)), trained(), noise, TRAINABLE).diverges
    assert compare(trained(add("used", 1e-3)), trained(), noise, TRAINABLE).diverges
    assert compare(trained(add("second", 1e-4)), trained(), noise, TRAINABLE).diverges


def test_where_they_part_first_and_by_how_much() -> None:
    found = compare(trained(add("second", 0.5, first=3)), trained(), trained(), TRAINABLE)
    assert (found.name, found.step) == ("second", 3)
    assert found.difference == pytest.approx(0.5)


def test_states_that_a_run_left_out_are_passed_over() -> None:
    run = trained(add("second", 0.5, first=2))
    run.states = {step: state for step, state in run.states.items() if step in (1, 4)}
    assert said(run)[:2] == ("second", 4)


def stuck(step: int, state: dict[str, Tensor]) -> None:
    state["used"].fill_(1.0)


def doubled(step: int, state: dict[str, Tensor]) -> None:
    for name in ("used", "second"):
        state[name].fill_(1 + 0.2 * step)


def lost(step: int, state: dict[str, Tensor]) -> None:
    state["used"][0] -= 0.05 * step


def infinite(step: int, state: dict[str, Tensor]) -> None:
    state["used"] *= float("inf")


REASONS: dict[str, tuple[Callable[[int, dict[str, Tensor]], object], str]] = {
    "unused": (add("unused", -0.01), "without a gradient"),
    "buffer": (add("buffer", 0.01), "buffers"),
    "stuck": (stuck, "stay unchanged"),
    "doubled": (doubled, "2 times as large"),
    "lost": (lost, "lost or counts twice"),
    "infinite": (infinite, "NaN or infinity"),
}


@pytest.mark.parametrize("case", REASONS)
def test_the_likely_reason(case: str) -> None:
    change, says = REASONS[case]
    assert says in said(trained(change))[2]


def test_a_loss_that_differs_at_once_is_the_data_or_the_buffers() -> None:
    run = trained()
    run.losses[0] += 0.1
    name, step, reason = said(run)
    assert (name, step) == (LOSS, 1) and "samples, buffers" in reason


def test_other_tensors_are_named() -> None:
    run = copy.deepcopy(trained())
    run.states[4]["more"] = torch.ones(1)
    assert said(run)[0] == "more"


# -- switches ----------------------------------------------------------------------------------


class Dropping(Classify):
    def __init__(self) -> None:
        self.shares = torch.ones(3)

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(5, 7), nn.Dropout(0.5), nn.BatchNorm1d(7), nn.Linear(7, 3))

    def eval_data(self) -> TensorDataset:
        return self.train_data()


def test_switches_change_what_they_say_and_nothing_else() -> None:
    task = switched(Dropping, Switches(double=True, dropout=False, frozen_norm=True, samples=4))()
    assert isinstance(task, Dropping) and task.eval_data() is None
    model, data = task.model().train(), task.train_data()
    inputs, target = data[0]
    assert len(data) == 4
    assert inputs.dtype == torch.float64 and target.dtype == torch.int64
    assert all(p.dtype == torch.float64 for p in model.parameters())
    first, again = model(inputs[None]), model(inputs[None])
    assert torch.equal(first, again)
    task.loss(first, target[None])
    assert task.shares.dtype == torch.float64
    plain = switched(Dropping, Switches())()
    assert all(module.training for module in plain.model().train().modules())
    assert type(plain.train_data()) is TensorDataset


def test_the_child_answers_for_each_strategy(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "asked_of_child.py").write_text(
        "import torch\n"
        "from distplat import Task\n"
        "from torch.utils.data import TensorDataset\n"
        "class T(Task):\n"
        "    def model(self): return torch.nn.Linear(2, 1)\n"
        "    def train_data(self): return TensorDataset(torch.randn(9, 2), torch.randn(9, 1))\n"
        "    def loss(self, outputs, targets): return (outputs - targets).square().mean()\n"
    )
    jobs = [job("ring"), job("hybrid", options={"pipeline": 2})]
    fields = [one.model_dump(mode="json") for one in jobs]
    asked = child.ChildRequest(fields, "asked_of_child:T", {}, str(tmp_path))
    (tmp_path / child.REQUEST).write_text(json.dumps(asdict(asked)))
    monkeypatch.setattr(sys, "argv", ["child", str(tmp_path)])
    monkeypatch.setattr(sys, "path", [*sys.path])
    child.main()
    ring, hybrid = torch.load(tmp_path / child.ANSWER, weights_only=False)
    assert len(ring.plain.losses) == 8 and ring.whole.switches.double
    assert "does not say how its model is split" in hybrid


def test_a_task_that_calls_the_model_is_not_compared_under_hybrid() -> None:
    assert (
        child._uncut_reason(job("ring"), Stepped()) == "the task calls the model itself, in step()"
    )
    assert child._uncut_reason(job("ring"), Classify()) == ""


def test_of_large_models_not_every_state_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distplat.strategies.verification.references._ROOM_BYTES", 600)
    drawn = job("ring")
    known = references(drawn, make(Classify))
    assert known.every > 1 and len(known.plain.states) < 8 and 8 in known.plain.states
    found = judge(drawn, known, engine(Classify))
    assert {row.verdict for row in found} == {EQUAL}


def test_a_strategy_whose_ranks_differ_between_steps_is_watched(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Worker(RingWorker):
        def synchronize(self) -> None:
            pass

    class Local(Ring):
        worker = Worker

    assert not inexact_reason(job("ps-sync")) and not inexact_reason(job("ring"))
    monkeypatch.setattr(verdicts, "make_strategy", lambda job: Local(RingOptions()))
    assert "between steps" in inexact_reason(job("ring"))
