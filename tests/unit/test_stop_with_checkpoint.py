"""A run that is asked to stop ends a step, takes a checkpoint of it, and loses nothing."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from in_memory_processes import process_here
from jobs import fields_of
from local_run import train
from marks import slow
from ray_in_memory import InMemoryRay
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from distplat import Task, Trainer
from distplat.actors import controller, controller_client
from distplat.actors.callbacks import Callback
from distplat.actors.result import Result
from distplat.actors.servers.scheduler import Scheduler
from distplat.actors.training import Session
from distplat.nn import ShardedEmbedding
from distplat.platform.errors import Interrupted
from distplat.platform.progress import StepSummary
from distplat.platform.spec import Job
from distplat.platform.stop_order import StopOrder
from distplat.strategies.catalog import make_job

STEPS = 12
WAIT_S = 60.0


class Gate:
    """
    Holds ranks in their fourth step until all are told to stop with a checkpoint.

    Under `ps-async` a rank may make the first steps alone, both parts of each.
    """

    def __init__(self, world: int, per_step: int = 1) -> None:
        self.opened, self._left = threading.Event(), world
        self._forward, self._forwards = 3 * per_step + 1, Counter[str]()

    def holds(self, rank: str) -> bool:
        """Count a forward; say whether it is the one."""
        self._forwards[rank] += 1
        return self._forwards[rank] == self._forward

    def told(self, ranks: int = 1) -> None:
        self._left -= ranks
        if self._left <= 0:
            self.opened.set()


def filled(inputs: int, outputs: int) -> nn.Linear:
    layer = nn.Linear(inputs, outputs)
    with torch.no_grad():
        for one in layer.parameters():
            one.copy_(torch.arange(float(one.numel())).view_as(one).sin())
    return layer


class Held(Task):
    """Ranks are threads, so its model draws nothing."""

    gate: Gate
    lost: Callable[[], object] | None = None
    """Called once by the last rank, at the gate."""

    def model(self) -> nn.Module:
        return nn.Sequential(filled(3, 4), nn.Tanh(), filled(4, 2))

    def train_data(self) -> TensorDataset:
        numbers = torch.arange(36.0).view(12, 3)
        return TensorDataset(numbers.sin(), numbers[:, 0].long() % 2)

    def eval_data(self) -> TensorDataset:
        return self.train_data()

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        process = process_here()
        if process is not None and outputs.requires_grad and self.gate.holds(process.name):
            assert self.gate.opened.wait(WAIT_S)
            if process.name == "worker-1" and (lost := Held.lost) is not None:
                Held.lost = None
                lost()
                process.check()
        return nn.functional.cross_entropy(outputs, targets)


class Ended(Held):
    """Gets the signal in the evaluation at its end, which goes on when all are told of it."""

    ends = False
    signals: Iterator[Callable[[], None]]

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        process = process_here()
        if self.ends and process is not None and process.name.startswith("worker-"):
            if not outputs.requires_grad:
                for send in self.signals:  # one rank does
                    send()
                assert self.gate.opened.wait(WAIT_S)
        return nn.functional.cross_entropy(outputs, targets)


class Words(Held):
    """Has a table on servers."""

    def model(self) -> nn.Module:
        return nn.Sequential(ShardedEmbedding(10, 4), nn.Flatten(), filled(8, 2))

    def train_data(self) -> TensorDataset:
        numbers = torch.arange(24).view(12, 2)
        return TensorDataset(numbers % 10, numbers[:, 0] % 2)


class Asks(Callback):
    """Asks for an end after the second step."""

    def __init__(self, asks: Callable[[], object]) -> None:
        self._asks = asks

    def on_step(self, step: StepSummary) -> None:
        if step.step == 2:
            self._asks()


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[InMemoryRay]:
    stop, end_early = Session.stop, Scheduler.end_early

    def told(session: Session, attempt: int, how: StopOrder) -> None:
        stop(session, attempt, how)
        if how is StopOrder.SAVE:
            Held.gate.told()

    async def scheduler_told(scheduler: Scheduler, saves: bool = False) -> None:
        await end_early(scheduler, saves)
        if saves:
            Held.gate.told(ranks=9)

    for module in (controller, controller_client):  # a busy machine may take its time
        monkeypatch.setattr(module, "SAVE_S", 300.0)
    monkeypatch.setattr(Session, "stop", told)
    monkeypatch.setattr(Scheduler, "end_early", scheduler_told)
    with InMemoryRay() as ray:
        yield ray
        Held.gate.opened.set()


def job(strategy: object, folder: Path, world: int = 2, **more: object) -> Job:
    fields = {"optimizer": {"name": "AdamW", "lr": 0.05}, "steps": STEPS, **more}
    return make_job(fields_of(strategy, world, storage_path=str(folder), **fields))  # type: ignore[arg-type]


def sigterm() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def fit(ray: InMemoryRay, given: Job, task: type[Task], **more: Any) -> Result:
    trainer = Trainer(given, task, progress=False, log_to_driver=False, **more)
    result: Result = ray.as_driver(trainer.fit)
    return result


def stopped(ray: InMemoryRay, given: Job, task: type[Task] = Held, asks: Any = sigterm) -> Path:
    """Make a run that is asked to stop; give its directory."""
    per_step = 2 if given.strategy.name in ("hybrid", "ps-async") else 1
    Held.gate, Held.lost = Gate(given.scaling.num_workers, per_step), None
    with pytest.raises(Interrupted) as caught:
        fit(ray, given, task, callbacks=[Asks(asks)])
    assert caught.value.exit_code == 143
    (result,) = Path(given.storage_path).glob("*/result.json")
    assert json.loads(result.read_text())["status"] == "STOPPED"
    assert ray.living("") == ["driver"]
    return result.parent


def recorded(run: Path, kind: str) -> list[int]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line["step"] for line in lines if line["kind"] == kind]


def ended(ray: InMemoryRay, strategy: str, folder: Path) -> tuple[Path, int]:
    """Make a run that is stopped in the evaluation after an early end; and give its last step."""
    given = job(strategy, folder, steps=10**6, evaluation={"every_steps": 10**6})
    Ended.ends, Ended.signals = False, iter((sigterm,))

    def end() -> None:
        Ended.ends = True
        ray.ask("controller", "end_early")

    run = stopped(ray, given, Ended, asks=end)
    return run, recorded(run, "step")[-1]


STRATEGIES: dict[str, tuple[object, int]] = {
    "ring": ("ring", 2),
    "ring in shards": ({"name": "ring", "shard_optimizer": True}, 2),
    "one worker": ("ring", 1),
    "ps-sync": ({"name": "ps-sync", "num_servers": 2}, 2),
    "hybrid": ({"name": "hybrid", "pipeline": 2, "micro_batches": 2}, 2),
    "ps-async": ("ps-async", 1),  # of one worker: the result of more does not repeat
}


@pytest.mark.parametrize(
    "kind", ["ring", slow("ring in shards"), slow("one worker"), "ps-sync", "hybrid", "ps-async"]
)
def test_a_run_that_was_stopped_goes_on_to_the_bits_of_one_that_was_not(
    cluster: InMemoryRay, tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    given = job(STRATEGIES[kind][0], tmp_path, STRATEGIES[kind][1])
    run = stopped(cluster, given)
    (step,) = recorded(run, "checkpoint")
    assert 4 <= step < STEPS and recorded(run, "step") == [*range(1, step + 1)]
    assert [path.name for path in run.glob("checkpoints/*")] == [f"step-{step:06d}"]
    assert {*recorded(run, "evaluation")} <= {3, 6, 9}, "none is made for the end"
    assert f"--resume {run} continues after step {step}" in caplog.text
    result = fit(cluster, given, Held, resume=run)
    assert [one.step for one in result.history] == [*range(step + 1, STEPS + 1)]
    assert result.checkpoint is not None
    found, expected = load_file(result.checkpoint), train(given, Held).parameters()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_an_evaluation_that_is_due_is_left_to_the_resumed_run(
    cluster: InMemoryRay, tmp_path: Path
) -> None:
    given = job("ring", tmp_path, evaluation={"every_steps": 1})
    run = stopped(cluster, given)
    (step,) = recorded(run, "checkpoint")
    assert recorded(run, "evaluation") == [*range(1, step)]
    resumed = fit(cluster, given, Held, resume=run).path
    assert recorded(resumed, "evaluation") == [*range(step, STEPS + 1)]


def test_a_signal_while_a_run_that_ended_early_evaluates_loses_no_model(
    cluster: InMemoryRay, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run, last = ended(cluster, "ring", tmp_path)
    assert recorded(run, "evaluation") == [last] and not recorded(run, "checkpoint")
    assert "without a checkpoint" not in caplog.text
    plain = job("ring", tmp_path, steps=last)
    found, expected = load_file(run / "model.safetensors"), train(plain, Held).parameters()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_under_ps_async_such_a_signal_takes_a_checkpoint(
    cluster: InMemoryRay, tmp_path: Path
) -> None:
    run, last = ended(cluster, "ps-async", tmp_path)
    assert recorded(run, "checkpoint") == [last]


@pytest.mark.parametrize("asks", [slow("signal"), "distplat stop"])
def test_under_ps_async_each_step_is_made_once(
    cluster: InMemoryRay, tmp_path: Path, asks: str
) -> None:
    given = job("ps-async", tmp_path, checkpoint={"every_steps": 5})
    ask = sigterm if asks == "signal" else lambda: cluster.ask("controller", "stop", 0.0, True)
    run = stopped(cluster, given, asks=ask)
    step = recorded(run, "checkpoint")[-1]
    assert recorded(run, "step") == [*range(1, step + 1)]
    result = fit(cluster, given, Held, resume=run)
    assert [one.step for one in result.history] == [*range(step + 1, STEPS + 1)]


def test_rows_of_tables_are_in_it(cluster: InMemoryRay, tmp_path: Path) -> None:
    tables = {"servers": 2, "optimizer": {"name": "SGD", "lr": 0.1}}
    given = job("ps-sync", tmp_path, embeddings=tables)
    run = stopped(cluster, given, Words)
    result = fit(cluster, given, Words, resume=run)
    Held.gate = Gate(0)
    Held.gate.opened.set()
    whole = fit(cluster, given, Words)
    files = [sorted(one.path.glob("*.safetensors")) for one in (result, whole)]
    assert len(files[0]) >= 2
    for mine, other in zip(*files, strict=True):
        assert mine.read_bytes() == other.read_bytes()


def test_who_is_lost_meanwhile_is_replaced_first(cluster: InMemoryRay, tmp_path: Path) -> None:
    given = job("ring", tmp_path, failure={"max_failures": 1}, steps=10**6)
    lose = lambda: cluster.kill_process("worker-1")  # noqa: E731

    def ask() -> None:
        Held.lost = lose
        sigterm()

    run = stopped(cluster, given, asks=ask)
    assert recorded(run, "failure") and Held.lost is None
    (step,) = recorded(run, "checkpoint")
    assert recorded(run, "step") == [*range(1, step + 1)]


def test_a_step_that_does_not_end_is_not_waited_for(
    cluster: InMemoryRay,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(controller, "SAVE_S", 0.3)
    monkeypatch.setattr(Gate, "told", lambda gate, ranks=1: None)
    run = stopped(cluster, job("ring", tmp_path))
    assert not Held.gate.opened.is_set()
    assert recorded(run, "step") in ([1, 2], [1, 2, 3]) and not recorded(run, "checkpoint")
    assert "without a checkpoint of it; there is none" in caplog.text


def test_a_run_that_keeps_nothing_of_its_model_stops_at_once(
    cluster: InMemoryRay, tmp_path: Path
) -> None:
    run = stopped(cluster, job("ring", tmp_path, checkpoint={"save_final": False}))
    assert not Held.gate.opened.is_set(), "nobody was told to save"
    assert not (run / "checkpoints").exists()


def test_a_run_that_made_its_last_step_has_its_model(cluster: InMemoryRay, tmp_path: Path) -> None:
    given = job("ring", tmp_path, steps=4)
    run = stopped(cluster, given)
    assert recorded(run, "step") == [1, 2, 3, 4] and not (run / "checkpoints").exists()
    found, expected = load_file(run / "model.safetensors"), train(given, Held).parameters()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
