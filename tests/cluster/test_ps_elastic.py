"""Lost workers of parameter servers are replaced; survivors keep their processes."""

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from control_records import record_of
from numpy.typing import NDArray
from server_losses import unfailed_weights
from small_runs import HERE, FailureRecorder, job, train, weights
from tasks_for_tests import Misbehaving, OfTerms, WithOptimizers
from torch import nn

from distplat import Task
from distplat.actors.messages import WorkOrder
from distplat.actors.ray_transport import RayTransport
from distplat.actors.servers.shards import RemoteShards
from distplat.actors.spawn import spawn
from distplat.cli.main import run as command
from distplat.platform.apply_log import FILE_NAME, log_flaws, read_logs
from distplat.platform.errors import Abandoned
from distplat.platform.ledger import PushId
from distplat.platform.spec import Job
from distplat.strategies.model.flat import FlatModel
from distplat.strategies.strategy_spec import Roles

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("local_ray"), pytest.mark.timeout(180)]

STEPS = 40


def losing_job(strategy: Any, fault: str, tmp_path: Path, **more: Any) -> dict[str, Any]:
    """Return a job of two ranks; one of them gets `fault` in its sixth step."""
    args = {"fault": fault, "marker": str(tmp_path / "done"), "at": 6}
    fields = {"task": "tasks_for_tests:Misbehaving", "evaluation": {"every_epochs": 0}, **more}
    return job(strategy, 2, task_args=args, epochs=None, steps=STEPS, **fields)


SERVERS = {"name": "ps-sync", "num_servers": 2}
PLATEAU = {"name": "ReduceLROnPlateau", "factor": 0.5, "patience": 0, "threshold": 0.5}
BY_EVALUATIONS = {"lr_schedule": PLATEAU, "evaluation": {"every_steps": 3}}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "task", "more"),
    [
        ({**SERVERS, "replication": 2}, Misbehaving, {"clip_norm": 0.5}),
        (SERVERS, Misbehaving, {"precision": "fp16"}),
        (SERVERS, Misbehaving, BY_EVALUATIONS),
        (SERVERS, OfTerms, {"optimizer": {"name": "Adafactor", "lr": 0.05}}),
        ("ring", WithOptimizers, {"optimizer": {"name": "task"}}),
    ],
    ids=["clipped", "fp16", "plateau", "terms, Adafactor", "terms, optimizers of the task"],
)
def test_killed_worker_does_not_change_the_model(
    strategy: Any, task: type[Task], more: dict[str, Any], tmp_path: Path
) -> None:
    recorder = FailureRecorder()
    spec = losing_job(strategy, "kill", tmp_path, task=f"tasks_for_tests:{task.__name__}", **more)
    result = train(spec, tmp_path, callbacks=(recorder,))
    assert [len(failure.replaced) for failure in recorder.failures] == [1]
    assert [summary.step for summary in result.history] == list(range(1, STEPS + 1))
    assert weights(result).tobytes() == unfailed_weights(spec, task)


@pytest.mark.slow
def test_asynchronous_run_continues_after_frozen_worker(tmp_path: Path) -> None:
    """With a bound other ranks wait for it at the servers. The run replays from its log."""
    recorder = FailureRecorder()
    strategy = {"name": "ps-async", "staleness": 2, "delay_compensation": 0.5}
    failure = {"step_timeout_s": 3, "heartbeat_timeout_s": 4}
    result = train(
        losing_job(strategy, "stop", tmp_path, failure=failure), tmp_path, callbacks=(recorder,)
    )
    (lost,) = recorder.failures
    (replaced,) = lost.replaced
    assert replaced in lost.cause
    (log,) = read_logs(str(result.path / FILE_NAME))[0]
    assert log_flaws(log, 2, STEPS) == []
    assert command(["replay", str(result.path), "--working-dir", str(HERE)]) == 0


class Rank:
    """A rank without a step loop: the gradient is 1 on rank 0, 2 on rank 1."""

    def __init__(self) -> None:
        self.flat = FlatModel(nn.Linear(64, 1))
        self.flat.params.fill_(1.0)

    def connect(self, order: WorkOrder) -> int:
        self.abandoned = threading.Event()
        self.shards = RemoteShards(RayTransport(), order, 100, 0, self.abandoned)
        self.shards.connect(self.flat)
        self.flat.grads.fill_(1.0 + order.rank)
        return self.flat.version

    def push(self, step: int) -> None:
        self.shards.push(step, record_of(self.flat))

    def record(self) -> NDArray[np.float64]:
        return record_of(self.flat).pack()

    def abandon(self) -> None:
        self.abandoned.set()

    def values(self) -> list[float]:
        return sorted(set(self.flat.params.tolist()))


@pytest.mark.slow
def test_shards_reach_a_common_version_after_a_loss() -> None:
    """Shard 0 has applied step 1, shard 1 has not: ranks repeat it, shard 0 applies it once."""
    spec = job({"name": "ps-sync", "num_servers": 2}, 2, optimizer={"name": "SGD", "lr": 0.125})
    validated, run = Job.model_validate(spec), "shards"
    actor_group = spawn(validated, Roles(servers=2), run, 0)
    actor = ray.remote(Rank).options(num_cpus=0, max_concurrency=2)
    ranks = [actor.remote() for _ in range(2)]

    def connect(attempt: int) -> list[int]:
        orders = [
            WorkOrder(validated, run, attempt, rank, "", "", None, actor_group.manager, None)
            for rank in range(2)
        ]
        calls = [rank.connect.remote(order) for rank, order in zip(ranks, orders, strict=True)]
        versions: list[int] = ray.get(calls, timeout=60)
        return versions

    def push(step: int) -> list[list[float]]:
        ray.get([rank.push.remote(step) for rank in ranks], timeout=60)
        values: list[list[float]] = ray.get([rank.values.remote() for rank in ranks], timeout=60)
        return values

    try:
        assert connect(0) == [0, 0]
        assert push(0) == [[0.625], [0.625]]  # 1 - (1 + 2) / 8
        waiting = ranks[0].push.remote(1)
        record = ray.get(ranks[1].record.remote(), timeout=60)
        reply = actor_group.servers["server-0"].push.remote(PushId(run, 0, 1, 1), None, record)
        ray.get(reply, timeout=60)
        ray.kill(ranks[1])
        ray.get(ranks[0].abandon.remote(), timeout=60)
        with pytest.raises(Abandoned):
            ray.get(waiting, timeout=60)
        ranks[1] = actor.remote()
        assert connect(1) == [1, 1]
        assert ray.get([rank.values.remote() for rank in ranks], timeout=60) == [[0.625]] * 2
        assert push(1) == [[0.25], [0.25]]
        assert push(2) == [[-0.125], [-0.125]]
    finally:
        actor_group.end()
        for rank in ranks:
            ray.kill(rank)
