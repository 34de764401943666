"""What Ray sees of a worker: answers that are kept back, unless something must be told at once."""

import threading
import time
from types import SimpleNamespace
from typing import Any

from distplat.actors.worker import Worker
from distplat.platform.collecting import Delivery
from distplat.strategies.training.loop import Progress


def working() -> Worker:
    """A worker in the middle of an attempt."""
    worker: Any = Worker("worker-0")
    standing = SimpleNamespace(attempt=0, progress=Progress(3, 4), model=None, error=None)
    worker._session = SimpleNamespace(standing=standing)
    result: Worker = worker
    return result


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
