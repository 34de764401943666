"""A run that is stopped completes its step, saves a checkpoint, and loses no step."""

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
    Block ranks in their fourth step until all have the order to stop with a checkpoint.

    Under `ps-async` a rank may compute the first steps alone, both parts of each.
    """

    def __init__(self, world: int, per_step: int = 1) -> None:
        self.opened, self._left = threading.Event(), world
        self._forward, self._forwards = 3 * per_step + 1, Counter[str]()

    def reaches_gate(self, rank: str) -> bool:
        """Count a forward; return whether it is the one to block."""
        self._forwards[rank] += 1
        return self._forwards[rank] == self._forward

    def count_ordered(self, ranks: int = 1) -> None:
        self._left -= ranks
        if self._left <= 0:
            self.opened.set()


def deterministic_linear(inputs: int, outputs: int) -> nn.Linear:
    layer = nn.Linear(inputs, outputs)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.arange(float(parameter.numel())).view_as(parameter).sin())
    return layer


class GatedTask(Task):
    """Task with a deterministic model, because ranks are threads."""

    gate: Gate
    lost: Callable[[], object] | None = None
    """Function that the last rank calls once at the gate."""

    def model(self) -> nn.Module:
        return nn.Sequential(deterministic_linear(3, 4), nn.Tanh(), deterministic_linear(4, 2))

    def train_data(self) -> TensorDataset:
        numbers = torch.arange(36.0).view(12, 3)
        return TensorDataset(numbers.sin(), numbers[:, 0].long() % 2)

    def eval_data(self) -> TensorDataset:
        return self.train_data()

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        process = process_here()
        if process is not None and outputs.requires_grad and self.gate.reaches_gate(process.name):
            assert self.gate.opened.wait(WAIT_S)
            if process.name == "worker-1" and (lost := GatedTask.lost) is not None:
                GatedTask.lost = None
                lost()
                process.check()
        return nn.functional.cross_entropy(outputs, targets)


class GatedInEvaluation(GatedTask):
    """Task that sends the signal in its final evaluation, which waits until all have the order."""

    ends = False
    signals: Iterator[Callable[[], None]]

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        process = process_here()
        if self.ends and process is not None and process.name.startswith("worker-"):
            if not outputs.requires_grad:
                for send in self.signals:  # one rank only
                    send()
                assert self.gate.opened.wait(WAIT_S)
        return nn.functional.cross_entropy(outputs, targets)


class GatedEmbedding(GatedTask):
    """Task with an embedding table on servers."""

    def model(self) -> nn.Module:
        return nn.Sequential(ShardedEmbedding(10, 4), nn.Flatten(), deterministic_linear(8, 2))

    def train_data(self) -> TensorDataset:
        numbers = torch.arange(24).view(12, 2)
        return TensorDataset(numbers % 10, numbers[:, 0] % 2)


class RequestAfterStep2(Callback):
    """Request a stop after the second step."""

    def __init__(self, request: Callable[[], object]) -> None:
        self._request = request

    def on_step(self, step: StepSummary) -> None:
        if step.step == 2:
            self._request()


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[InMemoryRay]:
    stop, end_early = Session.stop, Scheduler.end_early

    def record_stop(session: Session, attempt: int, order: StopOrder) -> None:
        stop(session, attempt, order)
        if order is StopOrder.SAVE:
            GatedTask.gate.count_ordered()

    async def record_end_early(scheduler: Scheduler, saves: bool = False) -> None:
        await end_early(scheduler, saves)
        if saves:
            GatedTask.gate.count_ordered(ranks=9)

    for module in (controller, controller_client):  # enough on a busy machine
        monkeypatch.setattr(module, "SAVE_S", 300.0)
    monkeypatch.setattr(Session, "stop", record_stop)
    monkeypatch.setattr(Scheduler, "end_early", record_end_early)
    with InMemoryRay() as ray:
        yield ray
        GatedTask.gate.opened.set()


def job(strategy: object, folder: Path, world: int = 2, **more: object) -> Job:
    fields = {"optimizer": {"name": "AdamW", "lr": 0.05}, "steps": STEPS, **more}
    return make_job(fields_of(strategy, world, storage_path=str(folder), **fields))  # type: ignore[arg-type]


def send_sigterm() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def fit(ray: InMemoryRay, spec: Job, task: type[Task], **more: Any) -> Result:
    trainer = Trainer(spec, task, progress=False, log_to_driver=False, **more)
    result: Result = ray.as_driver(trainer.fit)
    return result


def run_until_stopped(
    ray: InMemoryRay, spec: Job, task: type[Task] = GatedTask, request_stop: Any = send_sigterm
) -> Path:
    """Run until the requested stop; return the run directory."""
    per_step = 2 if spec.strategy.name in ("hybrid", "ps-async") else 1
    GatedTask.gate, GatedTask.lost = Gate(spec.scaling.num_workers, per_step), None
    with pytest.raises(Interrupted) as caught:
        fit(ray, spec, task, callbacks=[RequestAfterStep2(request_stop)])
    assert caught.value.exit_code == 143
    (result,) = Path(spec.storage_path).glob("*/result.json")
    assert json.loads(result.read_text())["status"] == "STOPPED"
    assert ray.alive("") == ["driver"]
    return result.parent


def recorded_steps(run: Path, record_kind: str) -> list[int]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line["step"] for line in lines if line["kind"] == record_kind]


def run_stopped_in_final_evaluation(
    ray: InMemoryRay, strategy: str, folder: Path
) -> tuple[Path, int]:
    """Stop a run in its final evaluation after an early end; return its directory and last step."""
    spec = job(strategy, folder, steps=10**6, evaluation={"every_steps": 10**6})
    GatedInEvaluation.ends, GatedInEvaluation.signals = False, iter((send_sigterm,))

    def end_early() -> None:
        GatedInEvaluation.ends = True
        ray.call_actor("controller", "end_early")

    run = run_until_stopped(ray, spec, GatedInEvaluation, request_stop=end_early)
    return run, recorded_steps(run, "step")[-1]


STRATEGIES: dict[str, tuple[object, int]] = {
    "ring": ("ring", 2),
    "ring in shards": ({"name": "ring", "shard_optimizer": True}, 2),
    "one worker": ("ring", 1),
    "ps-sync": ({"name": "ps-sync", "num_servers": 2}, 2),
    "hybrid": ({"name": "hybrid", "pipeline": 2, "micro_batches": 2}, 2),
    "ps-async": ("ps-async", 1),  # one worker: more are not deterministic
}


@pytest.mark.parametrize(
    "name", ["ring", slow("ring in shards"), slow("one worker"), "ps-sync", "hybrid", "ps-async"]
)
def test_resumed_run_is_bit_identical_to_uninterrupted_run(
    cluster: InMemoryRay, tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    spec = job(STRATEGIES[name][0], tmp_path, STRATEGIES[name][1])
    run = run_until_stopped(cluster, spec)
    (step,) = recorded_steps(run, "checkpoint")
    assert 4 <= step < STEPS and recorded_steps(run, "step") == [*range(1, step + 1)]
    assert [path.name for path in run.glob("checkpoints/*")] == [f"step-{step:06d}"]
    assert {*recorded_steps(run, "evaluation")} <= {3, 6, 9}, "no final evaluation"
    assert f"--resume {run} continues after step {step}" in caplog.text
    result = fit(cluster, spec, GatedTask, resume=run)
    assert [summary.step for summary in result.history] == [*range(step + 1, STEPS + 1)]
    assert result.checkpoint is not None
    actual, expected = load_file(result.checkpoint), train(spec, GatedTask).parameters()
    assert all(torch.equal(actual[name], value) for name, value in expected.items())


def test_due_evaluation_is_left_to_the_resumed_run(cluster: InMemoryRay, tmp_path: Path) -> None:
    spec = job("ring", tmp_path, evaluation={"every_steps": 1})
    run = run_until_stopped(cluster, spec)
    (step,) = recorded_steps(run, "checkpoint")
    assert recorded_steps(run, "evaluation") == [*range(1, step)]
    resumed = fit(cluster, spec, GatedTask, resume=run).path
    assert recorded_steps(resumed, "evaluation") == [*range(step, STEPS + 1)]


def test_signal_during_final_evaluation_keeps_the_model(
    cluster: InMemoryRay, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run, last = run_stopped_in_final_evaluation(cluster, "ring", tmp_path)
    assert recorded_steps(run, "evaluation") == [last] and not recorded_steps(run, "checkpoint")
    assert "without a checkpoint" not in caplog.text
    spec = job("ring", tmp_path, steps=last)
    actual, expected = load_file(run / "model.safetensors"), train(spec, GatedTask).parameters()
    assert all(torch.equal(actual[name], value) for name, value in expected.items())


def test_signal_during_final_evaluation_under_ps_async_saves_checkpoint(
    cluster: InMemoryRay, tmp_path: Path
) -> None:
    run, last = run_stopped_in_final_evaluation(cluster, "ps-async", tmp_path)
    assert recorded_steps(run, "checkpoint") == [last]


@pytest.mark.parametrize("method", [slow("signal"), "distplat stop"])
def test_ps_async_runs_each_step_once(cluster: InMemoryRay, tmp_path: Path, method: str) -> None:
    spec = job("ps-async", tmp_path, checkpoint={"every_steps": 5})
    request_stop = (
        send_sigterm
        if method == "signal"
        else lambda: cluster.call_actor("controller", "stop", 0.0, True)
    )
    run = run_until_stopped(cluster, spec, request_stop=request_stop)
    step = recorded_steps(run, "checkpoint")[-1]
    assert recorded_steps(run, "step") == [*range(1, step + 1)]
    result = fit(cluster, spec, GatedTask, resume=run)
    assert [summary.step for summary in result.history] == [*range(step + 1, STEPS + 1)]


def test_checkpoint_contains_rows_of_tables(cluster: InMemoryRay, tmp_path: Path) -> None:
    tables = {"servers": 2, "optimizer": {"name": "SGD", "lr": 0.1}}
    spec = job("ps-sync", tmp_path, embeddings=tables)
    run = run_until_stopped(cluster, spec, GatedEmbedding)
    result = fit(cluster, spec, GatedEmbedding, resume=run)
    GatedTask.gate = Gate(0)
    GatedTask.gate.opened.set()
    uninterrupted = fit(cluster, spec, GatedEmbedding)
    files = [
        sorted(run_result.path.glob("*.safetensors")) for run_result in (result, uninterrupted)
    ]
    assert len(files[0]) >= 2
    for file, expected in zip(*files, strict=True):
        assert file.read_bytes() == expected.read_bytes()


def test_lost_worker_is_replaced_before_the_checkpoint(
    cluster: InMemoryRay, tmp_path: Path
) -> None:
    spec = job("ring", tmp_path, failure={"max_failures": 1}, steps=10**6)
    lose = lambda: cluster.kill_process("worker-1")  # noqa: E731

    def lose_worker_and_stop() -> None:
        GatedTask.lost = lose
        send_sigterm()

    run = run_until_stopped(cluster, spec, request_stop=lose_worker_and_stop)
    assert recorded_steps(run, "failure") and GatedTask.lost is None
    (step,) = recorded_steps(run, "checkpoint")
    assert recorded_steps(run, "step") == [*range(1, step + 1)]


def test_stops_without_checkpoint_if_step_does_not_end(
    cluster: InMemoryRay,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(controller, "SAVE_S", 0.3)
    monkeypatch.setattr(Gate, "count_ordered", lambda gate, ranks=1: None)
    run = run_until_stopped(cluster, job("ring", tmp_path))
    assert not GatedTask.gate.opened.is_set()
    assert recorded_steps(run, "step") in ([1, 2], [1, 2, 3]) and not recorded_steps(
        run, "checkpoint"
    )
    assert "without a checkpoint of it; there is none" in caplog.text


def test_stops_at_once_if_final_model_is_not_saved(cluster: InMemoryRay, tmp_path: Path) -> None:
    run = run_until_stopped(cluster, job("ring", tmp_path, checkpoint={"save_final": False}))
    assert not GatedTask.gate.opened.is_set(), "no order to save"
    assert not (run / "checkpoints").exists()


def test_run_stopped_in_last_step_has_its_model(cluster: InMemoryRay, tmp_path: Path) -> None:
    spec = job("ring", tmp_path, steps=4)
    run = run_until_stopped(cluster, spec)
    assert recorded_steps(run, "step") == [1, 2, 3, 4] and not (run / "checkpoints").exists()
    actual, expected = load_file(run / "model.safetensors"), train(spec, GatedTask).parameters()
    assert all(torch.equal(actual[name], value) for name, value in expected.items())
