"""One operation after the other, in the order in which they were asked for."""

import threading
import time
import traceback

import pytest

from distplat.actors.shm.order import Order


@pytest.fixture
def order() -> Order:
    return Order("test order")


def test_nothing_queued_runs_in_the_callers_thread(order: Order) -> None:
    names: list[str] = []
    order.now(lambda: names.append(threading.current_thread().name))
    assert names == [threading.current_thread().name]
    assert all(thread.name != "test order" for thread in threading.enumerate())


def test_work_for_later_runs_in_one_thread_in_order(order: Order) -> None:
    seen: list[tuple[int, str]] = []

    def work(number: int) -> None:
        time.sleep(0.01 * (3 - number))
        seen.append((number, threading.current_thread().name))

    handles = [order.later(lambda n=n: work(n)) for n in range(3)]  # type: ignore[misc]
    order.now(lambda: work(3))  # waits its turn
    assert seen == [(n, "test order") for n in range(4)]
    for handle in handles:
        handle.wait()
    order.now(lambda: work(3))
    assert seen[-1] == (3, threading.current_thread().name)
    order.close(5.0)
    assert all(thread.name != "test order" for thread in threading.enumerate())


def test_never_two_at_a_time(order: Order) -> None:
    busy = threading.Lock()

    def work() -> None:
        assert busy.acquire(blocking=False)
        time.sleep(0.002)
        busy.release()

    def caller() -> None:
        for _ in range(10):
            order.now(work)
            order.later(work).wait()

    threads = [threading.Thread(target=caller, daemon=True) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10.0)
        assert not thread.is_alive()
    order.now(work)
    order.close(5.0)


def test_an_error_comes_out_of_wait_with_its_traceback(order: Order) -> None:
    def work_that_fails() -> None:
        raise ValueError("on purpose")

    handle = order.later(work_that_fails)
    with pytest.raises(ValueError, match="on purpose") as caught:
        handle.wait()
    assert "work_that_fails" in "".join(traceback.format_tb(caught.value.__traceback__))
    with pytest.raises(ValueError, match="on purpose"):
        handle.wait()
    done: list[int] = []
    order.later(lambda: done.append(1)).wait()  # the thread goes on
    assert done == [1]
    order.close(5.0)
