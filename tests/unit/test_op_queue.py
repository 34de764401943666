"""OpQueue runs one operation at a time, in the order of submission."""

import threading
import time
import traceback

import pytest

from distplat.actors.collectives.work import OpQueue


@pytest.fixture
def queue() -> OpQueue:
    return OpQueue("test queue")


def test_run_uses_the_callers_thread_if_the_queue_is_empty(queue: OpQueue) -> None:
    names: list[str] = []
    queue.run(lambda: names.append(threading.current_thread().name))
    assert names == [threading.current_thread().name]
    assert all(thread.name != "test queue" for thread in threading.enumerate())


def test_submitted_work_runs_in_one_thread_in_order(queue: OpQueue) -> None:
    seen: list[tuple[int, str]] = []

    def work(number: int) -> None:
        time.sleep(0.01 * (3 - number))
        seen.append((number, threading.current_thread().name))

    handles = [queue.submit(lambda n=n: work(n)) for n in range(3)]  # type: ignore[misc]
    queue.run(lambda: work(3))  # waits its turn
    assert seen == [(n, "test queue") for n in range(4)]
    for handle in handles:
        handle.wait()
    queue.run(lambda: work(3))
    assert seen[-1] == (3, threading.current_thread().name)
    queue.close(5.0)
    assert all(thread.name != "test queue" for thread in threading.enumerate())


def test_operations_never_overlap(queue: OpQueue) -> None:
    busy = threading.Lock()

    def work() -> None:
        assert busy.acquire(blocking=False)
        time.sleep(0.002)
        busy.release()

    def caller() -> None:
        for _ in range(10):
            queue.run(work)
            queue.submit(work).wait()

    threads = [threading.Thread(target=caller, daemon=True) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    queue.run(work)
    queue.close(5.0)


def test_wait_raises_the_error_with_its_traceback(queue: OpQueue) -> None:
    def failing_work() -> None:
        raise ValueError("on purpose")

    handle = queue.submit(failing_work)
    with pytest.raises(ValueError, match="on purpose") as caught:
        handle.wait()
    assert "failing_work" in "".join(traceback.format_tb(caught.value.__traceback__))
    with pytest.raises(ValueError, match="on purpose"):
        handle.wait()
    done: list[int] = []
    queue.submit(lambda: done.append(1)).wait()  # the thread still runs
    assert done == [1]
    queue.close(5.0)
