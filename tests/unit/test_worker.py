"""Worker: long polls, stop orders, and the errors of attempts."""

import os
import signal
import sys
import threading
import time
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import ray
import torch
from safetensors.torch import load
from torch.utils.data import DataLoader, Dataset

from distplat.actors import spawn, training
from distplat.actors.connection import Connection
from distplat.actors.ray_transport import RayTransport
from distplat.actors.training import AttemptState, Session
from distplat.actors.transport import ActorDied, AnswerPending
from distplat.actors.weights import Reply
from distplat.actors.worker import Worker
from distplat.platform.checkpoints import Delivery
from distplat.platform.errors import (
    Abandoned,
    DeadlineExceeded,
    InfrastructureError,
    StateLost,
)
from distplat.platform.progress import StepReport
from distplat.platform.stop_order import StopOrder
from distplat.strategies.loop.loop import Progress

NONE, RESIZE, END, SAVE, ABANDON = StopOrder


def running_worker() -> Worker:
    """Return a worker in the middle of an attempt."""
    worker: Any = Worker("worker-0")
    worker._session = Session(lambda report: None, lambda delivery: None)
    worker._session.state = AttemptState(0, Progress(3, 4))
    worker._session._connection = Connection(RayTransport(), 0)
    result: Worker = worker
    return result


def session(worker: Worker) -> Session:
    assert worker._session is not None
    return worker._session


def test_poll_waits_if_there_is_nothing_to_report() -> None:
    worker = running_worker()
    start = time.monotonic()
    result = worker.poll(1, 0.2)
    assert time.monotonic() - start >= 0.19
    assert (result.step, result.deliveries) == (3, [])


def test_checkpoint_part_is_delivered_at_once_and_once() -> None:
    worker, delivery = running_worker(), Delivery(0, 0, 5)
    threading.Timer(0.05, worker._deliver, [delivery]).start()
    start = time.monotonic()
    assert worker.poll(1, 20).deliveries == [delivery]
    assert time.monotonic() - start < 10
    assert worker.poll(2, 0.05).deliveries == []


def test_end_of_an_attempt_is_reported_at_once() -> None:
    worker = running_worker()
    worker._ended.set()
    worker._urgent.set()
    start = time.monotonic()
    for _ in range(3):
        worker.poll(1, 60)
    assert time.monotonic() - start < 60


@pytest.mark.timeout(60)
@pytest.mark.parametrize("first", ["start", "prepare"])
def test_worker_without_torch_reports_an_infrastructure_error(
    first: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A package is missing on the node. The run used to wait until `start_timeout_s`."""
    monkeypatch.setitem(sys.modules, "distplat.actors.training", None)
    worker = Worker("digits/worker-1")
    job = SimpleNamespace(failure=SimpleNamespace(start_timeout_s=600.0))
    order: Any = SimpleNamespace(attempt=2, job=job)
    message = r"worker-1 cannot start on .*: ModuleNotFoundError: .*; every node needs the packages"
    for _ in range(2) if first == "prepare" else ():
        with pytest.raises(InfrastructureError, match=message):
            worker.prepare(order)
    worker.start(order)
    results = [worker.poll(number, 600.0) for number in (1, 1, 2)]
    assert [result.attempt for result in results] == [2, 2, 2]
    with pytest.raises(InfrastructureError, match=message):
        worker.import_task(order)
    for result in results:
        assert isinstance(result.error, InfrastructureError) and "worker-1" in str(result.error)


def stop_order_of(worker: Worker) -> StopOrder:
    return session(worker)._connection.stop_order


@pytest.mark.parametrize(
    ("orders", "last"),
    [
        ([], NONE),
        ([RESIZE], RESIZE),
        ([END], END),
        ([ABANDON], ABANDON),
        ([RESIZE, ABANDON], ABANDON),
        ([END, RESIZE, NONE], END),  # a late message
        ([ABANDON, RESIZE], ABANDON),
    ],
)
def test_strongest_stop_order_wins(orders: list[StopOrder], last: StopOrder) -> None:
    worker = running_worker()
    for order in orders:
        worker.stop(0, order)
    assert stop_order_of(worker) is last
    assert session(worker)._connection._abandoned.is_set() is (last is ABANDON)


def test_stop_order_of_another_attempt_is_ignored() -> None:
    worker = running_worker()
    for other in (-1, 1):
        for order in (RESIZE, END, ABANDON):
            worker.stop(other, order)
    assert stop_order_of(worker) is NONE


def test_abandon_before_the_start_of_an_attempt_is_recorded() -> None:
    worker = Worker("worker-0")
    worker.stop(1, RESIZE)
    assert worker._abandoned == -1
    worker.stop(1, ABANDON)
    assert worker._abandoned == 1


def test_repeated_poll_repeats_the_reports() -> None:
    worker, delivery = running_worker(), Delivery(0, 0, 5)
    worker._deliver(delivery)
    report = StepReport(0, 4, 0, 0.5, 8, {})
    worker._outbox.put(report)
    for _ in range(2):
        result = worker.poll(1, 0.0)
        assert (result.reports, result.deliveries) == ([report], [delivery])
    result = worker.poll(2, 0.0)
    assert (result.reports, result.deliveries) == ([], [])


def test_end_is_reported_with_the_last_report() -> None:
    """The reply of the first poll is lost, and the controller repeats it after the end."""
    worker, last = running_worker(), StepReport(0, 4, 0, 0.5, 8, {})
    ended = AttemptState(0, Progress(4, 5, left=True), b"model", Abandoned("over"))
    worker.poll(1, 0.0)
    worker._outbox.put(last)
    session(worker).state = ended
    result = worker.poll(1, 0.0)
    assert (result.reports, result.finished, result.left, result.error) == ([], False, False, None)
    result = worker.poll(2, 0.0)
    assert (result.reports, result.finished, result.left) == ([last], True, True)
    assert result.error is ended.error


def test_repeated_start_is_executed_once() -> None:
    """The reply of `start` was lost or late."""
    worker: Any = Worker("worker-0")
    worker._thread = threading.current_thread()  # no thread takes the orders from the queue
    orders = [SimpleNamespace(attempt=attempt) for attempt in (0, 0, 1, 0, 1)]
    for order in orders:
        worker.start(order)
    started = [worker._orders.get_nowait().args[0].attempt for _ in range(worker._orders.qsize())]
    assert started == [0, 1]


def test_concurrent_prepare_calls_prepare_once() -> None:
    worker: Any = Worker("worker-2")
    worker._thread = threading.current_thread()
    order = SimpleNamespace(
        attempt=1, job=SimpleNamespace(failure=SimpleNamespace(start_timeout_s=20))
    )
    callers = [threading.Thread(target=worker.prepare, args=(order,)) for _ in range(2)]
    for caller in callers:
        caller.start()
    worker._orders.get(timeout=60).keywords["ready"].set_result(None)
    for caller in callers:
        caller.join(60)
        assert not caller.is_alive()
    assert worker._orders.empty()
    worker.prepare(order)  # a repeated call after the end
    worker.start(order)
    assert worker._orders.get_nowait().args == (order,)


def test_spare_imports_once_and_takes_the_name_of_the_worker(
    capfd: pytest.CaptureFixture[str],
) -> None:
    worker: Any = Worker("job/spare-0")
    worker._thread = threading.current_thread()
    job = SimpleNamespace(failure=SimpleNamespace(start_timeout_s=20))
    caller = threading.Thread(
        target=worker.import_task, args=(SimpleNamespace(attempt=0, job=job),)
    )
    caller.start()
    session = SimpleNamespace(import_task=lambda order, ready: ready.set_result(None))
    worker._orders.get(timeout=60)(session)
    caller.join(60)
    assert not caller.is_alive()
    assert worker._orders.empty()
    worker.start(SimpleNamespace(attempt=2, job=job, actor_name="job/worker-1/attempt-2"))
    worker.import_task(SimpleNamespace(attempt=0, job=job))  # a late repetition
    worker.start(SimpleNamespace(attempt=3, job=job, actor_name="job/worker-1/attempt-3"))
    assert repr(worker) == "job/worker-1/attempt-2"
    assert worker._orders.qsize() == 2
    assert capfd.readouterr().out.splitlines() == [":actor_name:job/worker-1/attempt-2"]


@pytest.mark.parametrize(
    ("raised", "exit_code", "text"),
    [
        (ray.exceptions.OutOfMemoryError("threshold 0.95"), 4, "Ray's memory monitor"),
        (ray.exceptions.ObjectStoreFullError("full"), 4, "object_store_memory"),
        (RuntimeError("DataLoader worker (pid 17) is killed by signal: Killed. "), 4, "a loader"),
        (RuntimeError("DataLoader worker (pid 17) exited unexpectedly"), 1, "your task failed"),
        (ray.exceptions.UserCodeException("in ray.data"), 1, "your task failed"),
        (KeyError("the user's"), 1, "your task failed"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_error_of_an_attempt_has_its_exit_code(
    raised: Exception, exit_code: int, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> bytes:
        raise raised

    monkeypatch.setattr(Session, "_attempt", fail)
    failed_session = Session(lambda report: None, lambda delivery: None)
    job = SimpleNamespace(failure=SimpleNamespace(step_timeout_s=1.0), own_loop=False)
    order: Any = SimpleNamespace(attempt=0, rank=0, job=job)
    failed_session.work(order)
    assert failed_session.state.error is not None
    assert failed_session.state.error.exit_code == exit_code
    assert text in str(failed_session.state.error)


class KillsLoader(Dataset[Any]):
    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> Any:
        os.kill(os.getpid(), signal.SIGKILL)


def test_killed_loader_process_is_no_user_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In a thread, as on Ray, torch raises another error than in the main thread."""

    def read(*args: object) -> bytes:
        batches: Any = iter(DataLoader(KillsLoader(), num_workers=1, timeout=0.01))
        batches._workers[0].join(30)
        return bytes(next(batches))

    monkeypatch.setattr(Session, "_attempt", read)
    failed_session = Session(lambda report: None, lambda delivery: None)
    failure = SimpleNamespace(step_timeout_s=1.0)
    job = SimpleNamespace(failure=failure, own_loop=False)
    order: Any = SimpleNamespace(attempt=0, rank=0, job=job)
    thread = threading.Thread(target=failed_session.work, args=(order,))
    thread.start()
    thread.join(30)
    assert failed_session.state.error is not None
    assert failed_session.state.error.exit_code == 4
    assert "a loader process was killed, most likely because memory ran out" in str(
        failed_session.state.error
    )


def test_missing_checkpoint_tensors_are_no_user_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    failure = SimpleNamespace(start_timeout_s=3.0)
    saved = SimpleNamespace(state={"step": 3}, files={"model": ["reference"]})
    order: Any = SimpleNamespace(saved=saved, job=SimpleNamespace(failure=failure))
    state = training._saved(order)
    assert state is not None
    for raised, error_type in (
        (AnswerPending(), DeadlineExceeded),
        (ActorDied("its owner"), StateLost),
    ):
        monkeypatch.setattr(RayTransport, "get", mock.Mock(side_effect=raised))
        with pytest.raises(error_type, match="the checkpoint's model"):
            state._load("model")


def test_weights_of_a_version_are_stored_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model may have gigabytes, and the training process packs it."""
    stored: list[bytes] = []

    def put(value: bytes) -> str:
        stored.append(value)
        return f"reference {len(stored)}"

    monkeypatch.setattr(ray, "put", put)
    current = session(running_worker())
    state = {"weight": torch.ones(3)}
    assert current.show(3) == Reply(3), "the copy is made at the end of the next step"
    current._snapshots.offer(4, lambda: state)
    replies = [current.show(3) for _ in range(5)]
    assert [reply.model for reply in replies] == [["reference 1"]] * 5
    assert len(stored) == 1 and load(stored[0])["weight"].tolist() == [1.0, 1.0, 1.0]


def test_weights_and_poll_have_different_concurrency_groups() -> None:
    """With a shared group `poll` would wait for the readers of a large model."""
    assert "poll" in dir(Worker)
    assert Worker.weights.__ray_concurrency_group__ == spawn._READERS  # type: ignore[attr-defined]
    assert not hasattr(Worker.poll, "__ray_concurrency_group__")
