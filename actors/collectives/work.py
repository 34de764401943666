"""Operations under way: their handle, their order, and what they have cost."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from queue import SimpleQueue

from distplat.strategies.collective import Traffic


class Work:
    """
    An operation under way (see `Handle`).

    Args:
        finish: waits for the result, and raises what went wrong; None: it is there.
    """

    def __init__(self, finish: Callable[[], None] | None = None) -> None:
        self._finish = finish

    def wait(self) -> None:
        """
        Return when the result is there.

        Raises:
            CollectiveError: the operation failed; also when this is called once more.
        """
        if self._finish is not None:
            self._finish()
            self._finish = None  # it holds tensors


class OpQueue:
    """
    Runs operations in the order in which they were asked for, never two at a time.

    Args:
        name: of the thread, which is there from the first `submit` on.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._turn = threading.Lock()
        self._lock = threading.Lock()
        self._waiting = 0  #: given to the thread and not over
        self._queue: SimpleQueue[_QueuedOperation | None] = SimpleQueue()
        self._thread: threading.Thread | None = None

    def run(self, operation: Callable[[], None]) -> None:
        """Run an operation and return when it is over: here, unless others must come first."""
        if self._waiting:
            self.submit(operation).wait()
            return
        with self._turn:
            operation()

    def submit(self, operation: Callable[[], None]) -> Work:
        """Run an operation in the thread, after all that was asked for before."""
        task = _QueuedOperation(operation)
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name=self._name, daemon=True)
                self._thread.start()
            self._waiting += 1
            self._queue.put(task)
        return Work(task.result)

    def close(self, timeout_s: float) -> None:
        """End the thread after what it was given; returns after `timeout_s` at the latest."""
        if self._thread is not None:
            self._queue.put(None)
            if self._thread is not threading.current_thread():
                self._thread.join(timeout_s)

    def _work(self) -> None:
        while (task := self._queue.get()) is not None:
            with self._turn:
                task.run()
            with self._lock:
                self._waiting -= 1
            task.over.set()


class _QueuedOperation:
    """An operation for the queue's thread."""

    def __init__(self, operation: Callable[[], None]) -> None:
        self._operation: Callable[[], None] | None = operation
        self._error: BaseException | None = None
        self.over = threading.Event()

    def run(self) -> None:
        """Do it, and keep what it raises for `result`."""
        operation, self._operation = self._operation, None
        try:
            if operation is not None:
                operation()
        except BaseException as error:
            self._error = error
        finally:
            del self, operation  # the error's traceback would lead back to them, and to tensors

    def result(self) -> None:
        """Return when it is over; its own deadline ends it."""
        self.over.wait()
        if self._error is not None:
            # A copy stays here: the error's traceback will lead to whoever holds the handle.
            error, self._error = self._error, copy(self._error)
            try:
                raise error
            finally:
                del error


class TrafficMeter:
    """
    Keeps a group's `Traffic`; threads may end operations at the same time.

    Args:
        traffic: where figures go.
    """

    def __init__(self, traffic: Traffic) -> None:
        self._traffic = traffic
        self._lock = threading.Lock()
        self._counted_until = 0.0
        self.under_way = 0
        """Operations that began and did not end well."""

    def add(self, sent: int, received: int, waiting_s: float = 0.0, working_s: float = 0.0) -> None:
        """Count bytes and seconds."""
        with self._lock:
            self._traffic.sent_bytes += sent
            self._traffic.received_bytes += received
            self._traffic.waiting_s += waiting_s
            self._traffic.working_s += working_s

    def begin(self) -> Callable[[], None]:
        """Another operation is under way; gives a function to call when its time is over."""
        with self._lock:
            self.under_way += 1
        started, stopped = time.perf_counter(), False

        def stop() -> None:
            nonlocal stopped
            with self._lock:
                if stopped:
                    return
                stopped = True
                now = time.perf_counter()  # time counts once, where operations overlap
                self._traffic.working_s += max(0.0, now - max(started, self._counted_until))
                self._counted_until = now

        return stop

    def end(self, sent: int, received: int) -> None:
        """Count an operation as over, and its bytes."""
        self.add(sent, received)
        with self._lock:
            self.under_way -= 1

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the block's time as waiting."""
        began = time.perf_counter()
        yield
        self.add(0, 0, waiting_s=time.perf_counter() - began)
