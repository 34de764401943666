"""Pending operations: handles, a queue, and traffic counters."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from queue import SimpleQueue

from distplat.strategies.collective import Traffic


class Work:
    """
    A pending operation (see `Handle`).

    Args:
        finish: waits for the result, and raises the operation's error; None: it is complete.
    """

    def __init__(self, finish: Callable[[], None] | None = None) -> None:
        self._finish = finish

    def wait(self) -> None:
        """
        Wait until the operation is complete.

        Raises:
            CollectiveError: the operation failed; raised again by every later call.
        """
        if self._finish is not None:
            self._finish()
            self._finish = None  # the closure holds references to tensors


class OpQueue:
    """
    Runs operations one at a time, in the order of the calls.

    Args:
        name: of the thread, which the first `submit` starts.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._running = threading.Lock()
        self._lock = threading.Lock()
        self._unfinished = 0  #: submitted operations that are not complete
        self._queue: SimpleQueue[_QueuedOperation | None] = SimpleQueue()
        self._thread: threading.Thread | None = None

    def run(self, operation: Callable[[], None]) -> None:
        """Run an operation and wait for it: in this thread, unless submitted ones come first."""
        if self._unfinished:
            self.submit(operation).wait()
            return
        with self._running:
            operation()

    def submit(self, operation: Callable[[], None]) -> Work:
        """Queue an operation for the thread, after all earlier ones."""
        task = _QueuedOperation(operation)
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                self._thread.start()
            self._unfinished += 1
            self._queue.put(task)
        return Work(task.result)

    def close(self, timeout_s: float) -> None:
        """End the thread after its queued operations; return after `timeout_s` at the latest."""
        if self._thread is not None:
            self._queue.put(None)
            if self._thread is not threading.current_thread():
                self._thread.join(timeout_s)

    def _run(self) -> None:
        while (task := self._queue.get()) is not None:
            with self._running:
                task.run()
            with self._lock:
                self._unfinished -= 1
            task.done.set()


class _QueuedOperation:
    """An operation for the queue's thread."""

    def __init__(self, operation: Callable[[], None]) -> None:
        self._operation: Callable[[], None] | None = operation
        self._error: BaseException | None = None
        self.done = threading.Event()

    def run(self) -> None:
        """Run the operation, and store its error for `result`."""
        operation, self._operation = self._operation, None
        try:
            if operation is not None:
                operation()
        except BaseException as error:
            self._error = error
        finally:
            del self, operation  # the error's traceback would keep them, and tensors, alive

    def result(self) -> None:
        """Wait until the operation is complete, and raise its error; operations have deadlines."""
        self.done.wait()
        if self._error is not None:
            # Store a copy: the traceback of the raised error will refer to the handle's owner.
            error, self._error = self._error, copy(self._error)
            try:
                raise error
            finally:
                del error


class TrafficMeter:
    """
    Updates a group's `Traffic`; thread-safe.

    Args:
        traffic: the counters to update.
    """

    def __init__(self, traffic: Traffic) -> None:
        self._traffic = traffic
        self._lock = threading.Lock()
        self._counted_until = 0.0
        self.unfinished = 0
        """Operations that started and have not completed successfully."""

    def add(self, sent: int, received: int, waiting_s: float = 0.0, working_s: float = 0.0) -> None:
        """Add bytes and seconds to the counters."""
        with self._lock:
            self._traffic.sent_bytes += sent
            self._traffic.received_bytes += received
            self._traffic.waiting_s += waiting_s
            self._traffic.working_s += working_s

    def begin(self) -> Callable[[], None]:
        """Start to time an operation; return the function that stops its time."""
        with self._lock:
            self.unfinished += 1
        started, stopped = time.perf_counter(), False

        def stop() -> None:
            nonlocal stopped
            with self._lock:
                if stopped:
                    return
                stopped = True
                now = time.perf_counter()  # count the time of overlapping operations once
                self._traffic.working_s += max(0.0, now - max(started, self._counted_until))
                self._counted_until = now

        return stop

    def end(self, sent: int, received: int) -> None:
        """Count an operation as complete, and add its bytes."""
        self.add(sent, received)
        with self._lock:
            self.unfinished -= 1

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the block's time as waiting."""
        start = time.perf_counter()
        yield
        self.add(0, 0, waiting_s=time.perf_counter() - start)
