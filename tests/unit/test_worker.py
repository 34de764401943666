"""What Ray sees of a worker: answers that are kept back, unless something must be told at once."""

import threading
import time
from typing import Any

import pytest

from distplat.actors.connection import Connection
from distplat.actors.ray_transport import RayTransport
from distplat.actors.training import AttemptState, Session
from distplat.actors.worker import Worker
from distplat.platform.checkpoints import Delivery
from distplat.platform.errors import Abandoned
from distplat.strategies.loop.loop import Progress
from distplat.strategies.loop.pause import PauseGate


def working() -> Worker:
    """A worker in the middle of an attempt."""
    worker: Any = Worker("worker-0")
    gate = PauseGate(10)
    gate.start(2)
    gate.before(2)
    worker._session = Session(lambda report: None, lambda delivery: None)
    worker._session.standing = AttemptState(0, gate, Progress(3, 4))
    worker._session._connection = Connection(RayTransport(), 0, gate)
    result: Worker = worker
    return result


def session(worker: Worker) -> Session:
    assert worker._session is not None
    return worker._session


def test_an_answer_is_kept_back_while_there_is_nothing_to_tell() -> None:
    worker = working()
    began = time.monotonic()
    news = worker.poll(0.2)
    assert time.monotonic() - began >= 0.19
    assert (news.step, news.deliveries) == (3, [])


def test_a_part_of_a_checkpoint_is_told_at_once_and_once() -> None:
    worker, delivery = working(), Delivery(0, 0, 5)
    threading.Timer(0.05, worker._deliver, [delivery]).start()
    began = time.monotonic()
    assert worker.poll(20).deliveries == [delivery]
    assert time.monotonic() - began < 10
    assert worker.poll(0.05).deliveries == []


def test_the_end_is_told_at_once() -> None:
    worker = working()
    worker._ended.set()
    worker._news.set()
    began = time.monotonic()
    for _ in range(3):
        worker.poll(5)
    assert time.monotonic() - began < 4


def test_where_a_worker_rests_is_told_at_once() -> None:
    worker = working()
    assert worker.poll(0.0).rests_at is None
    threading.Timer(0.05, worker.rest, [0]).start()
    began = time.monotonic()
    assert worker.poll(20).rests_at == 3
    assert time.monotonic() - began < 10
    worker.rest_at(0, 4)
    gate = session(worker).standing.gate
    gate.before(3)
    with pytest.raises(Abandoned):
        gate.before(4)


def test_an_attempt_that_is_called_off_ends_before_its_next_step() -> None:
    worker = working()
    worker.abandon(0)
    with pytest.raises(Abandoned):
        session(worker).standing.gate.before(3)


def test_what_is_said_of_another_attempt_is_not_heard() -> None:
    worker = working()
    for other in (-1, 1):
        worker.rest(other)
        worker.rest_at(other, 3)
        worker.abandon(other)
    assert worker.poll(0.0).rests_at is None
    session(worker).standing.gate.before(3)


def test_before_it_has_begun_a_worker_has_no_answer() -> None:
    worker = Worker("worker-0")
    worker.rest(0)
    worker.rest_at(0, 4)
    assert worker.poll(0.0).rests_at is None
