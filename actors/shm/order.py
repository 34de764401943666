"""Operations of one group run one after the other: in the caller's thread, or behind its back."""

import threading
from collections.abc import Callable
from copy import copy
from queue import SimpleQueue


class Pending:
    """An operation that runs in the group's own thread."""

    def __init__(self, work: Callable[[], None]) -> None:
        self._work, self._over = work, threading.Event()
        self._error: BaseException | None = None

    def run(self) -> None:
        """Do it, and keep what it raises for `wait`."""
        try:
            self._work()
        except BaseException as error:
            self._error = error
        finally:
            del self  # the error's traceback would lead back to it, and keep tensors alive

    def finish(self) -> None:
        """Let `wait` return."""
        self._over.set()

    def wait(self) -> None:
        """
        Return when it is over; its own deadline ends it.

        Raises:
            CollectiveError: what the operation raised.
        """
        self._over.wait()
        if self._error is not None:
            # A copy stays here: the error's traceback will lead to whoever holds this handle.
            error, self._error = self._error, copy(self._error)
            try:
                raise error
            finally:
                del error


class Order:
    """
    Runs work in the order in which it was asked for, never two at a time.

    Args:
        name: of the thread, which is there from the first `later` on.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._turn = threading.Lock()
        self._lock = threading.Lock()
        self._waiting = 0  #: given to the thread and not over
        self._queue: SimpleQueue[Pending | None] = SimpleQueue()
        self._thread: threading.Thread | None = None

    def now(self, work: Callable[[], None]) -> None:
        """Run `work` and return when it is over: here, unless others must come first."""
        if self._waiting:
            self.later(work).wait()
            return
        with self._turn:
            work()

    def later(self, work: Callable[[], None]) -> Pending:
        """Run `work` in the thread, after all that was asked for before."""
        pending = Pending(work)
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                self._thread.start()
            self._waiting += 1
            self._queue.put(pending)
        return pending

    def close(self, timeout_s: float) -> None:
        """End the thread after what it was given; returns after `timeout_s` at the latest."""
        if self._thread is not None:
            self._queue.put(None)
            if self._thread is not threading.current_thread():
                self._thread.join(timeout_s)

    def _run(self) -> None:
        while (pending := self._queue.get()) is not None:
            with self._turn:
                pending.run()
            with self._lock:
                self._waiting -= 1
            pending.finish()
