"""What Ray sees of a worker: answers that are kept back, unless something must be told at once."""

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


def working() -> Worker:
    """A worker in the middle of an attempt."""
    worker: Any = Worker("worker-0")
    worker._session = Session(lambda report: None, lambda delivery: None)
    worker._session.state = AttemptState(0, Progress(3, 4))
    worker._session._connection = Connection(RayTransport(), 0)
    result: Worker = worker
    return result


def session(worker: Worker) -> Session:
    assert worker._session is not None
    return worker._session


def test_an_answer_is_kept_back_while_there_is_nothing_to_tell() -> None:
    worker = working()
    began = time.monotonic()
    result = worker.poll(1, 0.2)
    assert time.monotonic() - began >= 0.19
    assert (result.step, result.deliveries) == (3, [])


def test_a_part_of_a_checkpoint_is_told_at_once_and_once() -> None:
    worker, delivery = working(), Delivery(0, 0, 5)
    threading.Timer(0.05, worker._deliver, [delivery]).start()
    began = time.monotonic()
    assert worker.poll(1, 20).deliveries == [delivery]
    assert time.monotonic() - began < 10
    assert worker.poll(2, 0.05).deliveries == []


def test_the_end_is_told_at_once() -> None:
    worker = working()
    worker._ended.set()
    worker._urgent.set()
    began = time.monotonic()
    for _ in range(3):
        worker.poll(1, 60)
    assert time.monotonic() - began < 60


@pytest.mark.timeout(60)
@pytest.mark.parametrize("first", ["start", "prepare"])
def test_a_worker_without_torch_says_so(first: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a node whose Python lacks a package: the run waited for `start_timeout_s` in vain."""
    monkeypatch.setitem(sys.modules, "distplat.actors.training", None)
    worker = Worker("digits/worker-1")
    limits = SimpleNamespace(failure=SimpleNamespace(start_timeout_s=600.0))
    order: Any = SimpleNamespace(attempt=2, job=limits)
    says = r"worker-1 cannot start on .*: ModuleNotFoundError: .*; every node needs the packages"
    for _ in range(2) if first == "prepare" else ():
        with pytest.raises(InfrastructureError, match=says):
            worker.prepare(order)
    worker.start(order)
    found = [worker.poll(number, 600.0) for number in (1, 1, 2)]
    assert [one.attempt for one in found] == [2, 2, 2]
    with pytest.raises(InfrastructureError, match=says):
        worker.import_task(order)
    for one in found:
        assert isinstance(one.error, InfrastructureError) and "worker-1" in str(one.error)


def told(worker: Worker) -> StopOrder:
    return session(worker)._connection.stop_order


@pytest.mark.parametrize(
    ("orders", "last"),
    [
        ([], NONE),
        ([RESIZE], RESIZE),
        ([END], END),
        ([ABANDON], ABANDON),
        ([RESIZE, ABANDON], ABANDON),
        ([END, RESIZE, NONE], END),  # one that came late
        ([ABANDON, RESIZE], ABANDON),
    ],
)
def test_the_order_that_goes_furthest_stands(orders: list[StopOrder], last: StopOrder) -> None:
    worker = working()
    for one in orders:
        worker.stop(0, one)
    assert told(worker) is last
    assert session(worker)._connection._abandoned.is_set() is (last is ABANDON)


def test_what_is_said_of_another_attempt_is_not_heard() -> None:
    worker = working()
    for other in (-1, 1):
        for one in (RESIZE, END, ABANDON):
            worker.stop(other, one)
    assert told(worker) is NONE


def test_an_attempt_that_was_abandoned_before_it_began_is_known() -> None:
    worker = Worker("worker-0")
    worker.stop(1, RESIZE)
    assert worker._abandoned == -1
    worker.stop(1, ABANDON)
    assert worker._abandoned == 1


def test_reports_are_told_again_where_the_answer_was_lost() -> None:
    worker, delivery = working(), Delivery(0, 0, 5)
    worker._deliver(delivery)
    report = StepReport(0, 4, 0, 0.5, 8, {})
    worker._outbox.put(report)
    for _ in range(2):
        result = worker.poll(1, 0.0)
        assert (result.reports, result.deliveries) == ([report], [delivery])
    result = worker.poll(2, 0.0)
    assert (result.reports, result.deliveries) == ([], [])


def test_an_attempt_has_not_ended_before_its_last_report_is_told() -> None:
    """The question before was lost, and is asked again after the end."""
    worker, last = working(), StepReport(0, 4, 0, 0.5, 8, {})
    ended = AttemptState(0, Progress(4, 5, left=True), b"model", Abandoned("over"))
    worker.poll(1, 0.0)
    worker._outbox.put(last)
    session(worker).state = ended
    result = worker.poll(1, 0.0)
    assert (result.reports, result.finished, result.left, result.error) == ([], False, False, None)
    result = worker.poll(2, 0.0)
    assert (result.reports, result.finished, result.left) == ([last], True, True)
    assert result.error is ended.error


def test_an_order_that_comes_twice_is_begun_once() -> None:
    """Its reply was lost, or it was slow and then given again."""
    worker: Any = Worker("worker-0")
    worker._thread = threading.current_thread()  # nobody takes the orders from the queue
    orders = [SimpleNamespace(attempt=attempt) for attempt in (0, 0, 1, 0, 1)]
    for order in orders:
        worker.start(order)
    begun = [worker._orders.get_nowait().args[0].attempt for _ in range(worker._orders.qsize())]
    assert begun == [0, 1]


def test_a_newcomer_makes_itself_ready_once_however_often_it_is_asked() -> None:
    worker: Any = Worker("worker-2")
    worker._thread = threading.current_thread()
    order = SimpleNamespace(
        attempt=1, job=SimpleNamespace(failure=SimpleNamespace(start_timeout_s=20))
    )
    askers = [threading.Thread(target=worker.prepare, args=(order,)) for _ in range(2)]
    for asker in askers:
        asker.start()
    worker._orders.get(timeout=60).keywords["ready"].set_result(None)
    for asker in askers:
        asker.join(60)
        assert not asker.is_alive()
    assert worker._orders.empty()
    worker.prepare(order)  # once more, after the end
    worker.start(order)
    assert worker._orders.get_nowait().args == (order,)


def test_a_spare_imports_once_and_becomes_the_worker_that_it_is_told_to_be(
    capfd: pytest.CaptureFixture[str],
) -> None:
    worker: Any = Worker("job/spare-0")
    worker._thread = threading.current_thread()
    job = SimpleNamespace(failure=SimpleNamespace(start_timeout_s=20))
    asker = threading.Thread(target=worker.import_task, args=(SimpleNamespace(attempt=0, job=job),))
    asker.start()
    session = SimpleNamespace(import_task=lambda order, ready: ready.set_result(None))
    worker._orders.get(timeout=60)(session)
    asker.join(60)
    assert not asker.is_alive()
    assert worker._orders.empty()
    worker.start(SimpleNamespace(attempt=2, job=job, actor_name="job/worker-1/attempt-2"))
    worker.import_task(
        SimpleNamespace(attempt=0, job=job)
    )  # its answer was lost, and it comes late
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
def test_whose_fault_an_attempt_ends_with(
    raised: Exception, exit_code: int, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> bytes:
        raise raised

    monkeypatch.setattr(Session, "_attempt", fail)
    one = Session(lambda report: None, lambda delivery: None)
    job = SimpleNamespace(failure=SimpleNamespace(step_timeout_s=1.0), own_loop=False)
    order: Any = SimpleNamespace(attempt=0, rank=0, job=job)
    one.work(order)
    assert one.state.error is not None
    assert one.state.error.exit_code == exit_code
    assert text in str(one.state.error)


class KillsItsLoader(Dataset[Any]):
    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> Any:
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_loader_process_that_the_system_killed_is_no_fault_of_the_task(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In a thread, as on Ray: there torch does not say what it says in the main thread."""

    def read(*args: object) -> bytes:
        batches: Any = iter(DataLoader(KillsItsLoader(), num_workers=1, timeout=0.01))
        batches._workers[0].join(30)
        return bytes(next(batches))

    monkeypatch.setattr(Session, "_attempt", read)
    one = Session(lambda report: None, lambda delivery: None)
    failure = SimpleNamespace(step_timeout_s=1.0)
    job = SimpleNamespace(failure=failure, own_loop=False)
    order: Any = SimpleNamespace(attempt=0, rank=0, job=job)
    thread = threading.Thread(target=one.work, args=(order,))
    thread.start()
    thread.join(30)
    assert one.state.error is not None
    assert one.state.error.exit_code == 4
    assert "a loader process was killed, most likely because memory ran out" in str(one.state.error)


def test_tensors_of_a_checkpoint_that_do_not_come_are_no_fault_of_the_task(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    failure = SimpleNamespace(start_timeout_s=3.0)
    saved = SimpleNamespace(state={"step": 3}, files={"model": ["reference"]})
    order: Any = SimpleNamespace(saved=saved, job=SimpleNamespace(failure=failure))
    state = training._saved(order)
    assert state is not None
    for raised, kind in ((AnswerPending(), DeadlineExceeded), (ActorDied("its owner"), StateLost)):
        monkeypatch.setattr(RayTransport, "get", mock.Mock(side_effect=raised))
        with pytest.raises(kind, match="the checkpoint's model"):
            state._load("model")


def test_a_version_is_packed_once_however_many_ask_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of gigabytes, in the process that trains it."""
    put: list[bytes] = []

    def note(value: bytes) -> str:
        put.append(value)
        return f"reference {len(put)}"

    monkeypatch.setattr(ray, "put", note)
    one = session(working())
    state = {"weight": torch.ones(3)}
    assert one.show(3) == Reply(3), "it is copied at the next step's end"
    one._snapshots.offer(4, lambda: state)
    replies = [one.show(3) for _ in range(5)]
    assert [reply.model for reply in replies] == [["reference 1"]] * 5
    assert len(put) == 1 and load(put[0])["weight"].tolist() == [1.0, 1.0, 1.0]


def test_who_reads_weights_takes_no_thread_of_the_controllers() -> None:
    """Ten readers of a large model: `poll` would wait its turn behind them."""
    assert "poll" in dir(Worker)
    assert Worker.weights.__ray_concurrency_group__ == spawn._READERS  # type: ignore[attr-defined]
    assert not hasattr(Worker.poll, "__ray_concurrency_group__")
