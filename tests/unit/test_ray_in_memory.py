"""Complete runs without Ray: driver, controller and workers in memory, with killed actors."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from call_faults import Fault, inject
from in_memory_processes import process_here
from jobs import fields_of
from killing_task import KillsInForward
from local_run import train
from ray_in_memory import InMemoryRay
from safetensors.torch import load_file
from torch.utils.data import DataLoader, TensorDataset

import distplat
from distplat import Callback, Trainer
from distplat.actors import model_pieces
from distplat.actors.actor_group import ActorGroup
from distplat.actors.controller_actor import ControllerActor
from distplat.actors.result import Result
from distplat.actors.retrying_calls import POLL_S
from distplat.platform.errors import ActorLost
from distplat.platform.progress import Saved
from distplat.platform.spec import Job
from distplat.strategies.catalog import make_job

STEPS = 6
STRATEGIES = ["ring", {"name": "ps-sync", "num_servers": 2}]


class Evaluated(KillsInForward):
    def eval_data(self) -> TensorDataset:
        return self.train_data()


@pytest.fixture
def cluster() -> Iterator[InMemoryRay]:
    with InMemoryRay() as ray:
        KillsInForward.ray, KillsInForward.killed = ray, ""
        yield ray


def job(strategy: object, folder: Path) -> Job:
    fields = {"steps": STEPS, "checkpoint": {"every_steps": 2}, "storage_path": str(folder)}
    return make_job(fields_of(strategy, 2, **fields))  # type: ignore[arg-type]


def fit(ray: InMemoryRay, strategy: object, folder: Path) -> Result:
    trainer = Trainer(job(strategy, folder), KillsInForward, progress=False, log_to_driver=False)
    result: Result = ray.as_driver(trainer.fit)
    return result


@pytest.mark.parametrize("killed", ["", "worker-0"])
@pytest.mark.parametrize("strategy", STRATEGIES, ids=["ring", "ps-sync"])
def test_run_is_bit_identical_to_ranks_without_a_driver(
    cluster: InMemoryRay,
    tmp_path: Path,
    strategy: object,
    killed: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    KillsInForward.killed = killed
    monkeypatch.setattr(model_pieces, "PIECE_BYTES", 50)
    result = fit(cluster, strategy, tmp_path)
    expected = train(job(strategy, tmp_path), KillsInForward).parameters()
    assert result.checkpoint is not None
    found = load_file(result.checkpoint)
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert [summary.step for summary in result.history] == [*range(1, STEPS + 1)]
    assert bool(result.failures) == bool(killed)


def test_controller_ends_the_run_by_early_stop(
    cluster: InMemoryRay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The driver's request to end the run is disabled; it would only come later."""
    monkeypatch.setattr(ControllerActor, "end_early", lambda self: None)
    fields = {"steps": 3000, "evaluation": {"every_steps": 1}, "storage_path": str(tmp_path)}
    rule = {"metric": "loss", "mode": "max", "patience": 2}
    config = make_job(fields_of("ring", 2, early_stop=rule, **fields))
    trainer = Trainer(config, Evaluated, progress=False, log_to_driver=False)
    result: Result = cluster.as_driver(trainer.fit)
    assert result.stopped == "loss got no better since step 1, in 2 evaluations"
    assert 3 <= result.totals.steps < 3000
    lines = map(json.loads, (result.path / "metrics.jsonl").read_text().splitlines())
    (event,) = [line for line in lines if line["kind"] == "early stop"]
    assert event == {"kind": "early stop", "step": 3, "reason": result.stopped}


def test_lost_worker_without_replacement_is_named(cluster: InMemoryRay, tmp_path: Path) -> None:
    KillsInForward.killed = "worker-1"
    fields = {"steps": STEPS, "failure": {"max_failures": 0}, "storage_path": str(tmp_path)}
    trainer = Trainer(
        fields_of("ring", 2, **fields), KillsInForward, progress=False, log_to_driver=False
    )
    with pytest.raises(ActorLost, match=r"worker-1 was lost.*killed") as caught:
        cluster.as_driver(trainer.fit)
    assert caught.value.exit_code == 4


def test_lost_controller_ends_its_actors(cluster: InMemoryRay, tmp_path: Path) -> None:
    KillsInForward.killed = "controller"
    with pytest.raises(ActorLost, match="controller was lost"):
        fit(cluster, "ring", tmp_path)
    assert cluster.alive("") == ["driver"]


@pytest.mark.parametrize("lost", ["request", "reply"])
def test_lost_poll_messages_are_no_failure(
    cluster: InMemoryRay, tmp_path: Path, lost: Literal["request", "reply"]
) -> None:
    """The reports of a lost answer arrive with a later answer."""
    inject(cluster.cluster, "poll", Fault(lose=lost), times=6)
    result = fit(cluster, "ring", tmp_path)
    assert result.failures == []
    assert [summary.step for summary in result.history] == [*range(1, STEPS + 1)]


def test_model_is_saved_before_other_files(
    cluster: InMemoryRay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Example: an embedding server is lost after the last step; no step is repeated."""

    def lose_server(actor: ControllerActor, group: ActorGroup) -> None:
        raise ActorLost("embedding-server-0", STEPS, "killed")

    monkeypatch.setattr(ControllerActor, "_keep_files", lose_server)
    with pytest.raises(ActorLost, match="embedding-server-0"):
        fit(cluster, "ring", tmp_path)
    (model,) = tmp_path.glob("*/model.safetensors")
    expected = train(job("ring", tmp_path), KillsInForward).parameters()
    assert all(torch.equal(load_file(model)[name], value) for name, value in expected.items())
    result = json.loads(model.with_name("result.json").read_text())
    assert (result["status"], result["model"]) == ("FAILED", str(model))


def test_frozen_process_answers_after_it_resumes(cluster: InMemoryRay) -> None:
    class Idle:
        def name(self) -> str:
            return "idle"

    def work() -> None:
        cluster.spawn("idle", Idle, {})
        process = cluster.processes["idle"]
        process.freeze()
        began = time.monotonic()
        threading.Timer(2 * POLL_S, process.resume).start()
        assert cluster.call_actor("idle", "name") == "idle"
        assert time.monotonic() - began >= 2 * POLL_S

    cluster.as_driver(work)


def train_from_checkpoint(config: dict[str, int]) -> None:
    """Train from the last checkpoint."""
    task = KillsInForward()
    model = task.model()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    loader = DataLoader(task.train_data(), 3)
    model, optimizer, loader = distplat.prepare(model, optimizer, loader)
    step = 0
    if (saved := distplat.get_checkpoint()) is not None:
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        step = saved["step"]
    batches = [*loader]
    while step < STEPS:
        inputs, targets = batches[step % len(batches)]
        loss = task.loss(model(inputs), targets)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
        distplat.report({"loss": loss.item()}, None if step % 2 else state)


@pytest.mark.parametrize("strategy", STRATEGIES, ids=["ring", "ps-sync"])
def test_train_function_with_a_lost_worker_is_bit_identical(
    cluster: InMemoryRay, tmp_path: Path, strategy: object
) -> None:
    def fit_function(killed: str) -> Result:
        KillsInForward.killed = killed
        fields = {"name": "test", "strategy": strategy, "scaling": {"num_workers": 2}}
        job = {**fields, "storage_path": str(tmp_path)}
        trainer = Trainer(job, train_from_checkpoint, progress=False, log_to_driver=False)
        result: Result = cluster.as_driver(trainer.fit)
        assert [summary.step for summary in result.history] == [*range(1, STEPS + 1)]
        assert bool(result.failures) == bool(killed)
        return result

    expected, result = fit_function(""), fit_function("worker-0")
    assert expected.checkpoint is not None and result.checkpoint is not None
    assert expected.checkpoint.read_bytes() == result.checkpoint.read_bytes()


class SignalsCheckpoints(Callback):
    """Signals the workers, which are threads here, that a checkpoint is on the disk."""

    saved: dict[int, threading.Event] = {}  # noqa: RUF012

    def on_checkpoint(self, checkpoint: Saved) -> None:
        self.saved[checkpoint.step].set()


def train_with_failures(config: Mapping[str, Any]) -> None:
    """Report six epochs; the worker is killed after each of the first five checkpoints."""
    saved = distplat.get_checkpoint()
    for epoch in range(1 if saved is None else saved["epoch"] + 1, 7):
        distplat.report({"loss": 0.0}, {"epoch": epoch})
        process = process_here()
        if process is not None and epoch < 6:
            assert SignalsCheckpoints.saved[epoch].wait(60)
            KillsInForward.ray.kill_process(process.name)
            process.check()


def test_checkpoints_between_failures_restore_the_budget(
    cluster: InMemoryRay, tmp_path: Path
) -> None:
    """The run has more than three failures, with a new checkpoint after each."""
    SignalsCheckpoints.saved = {epoch: threading.Event() for epoch in range(1, 7)}
    job = {"name": "test", "strategy": "ring", "scaling": {"num_workers": 1}}
    fields = {**job, "storage_path": str(tmp_path)}
    options: Any = {"progress": False, "log_to_driver": False, "callbacks": [SignalsCheckpoints()]}
    result: Result = cluster.as_driver(Trainer(fields, train_with_failures, **options).fit)
    assert len(result.failures) == 5
