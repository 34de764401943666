"""
Graceful shutdown on SIGINT, SIGTERM and SIGHUP.

The first signal is recorded, and the driver checks for it at every tick. The second signal
interrupts the driver's wait immediately; the clean-up still runs to its end. Once all actors have
exited, a long upload may remain: from then on signals are counted from zero.
"""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Self

from distplat.platform.errors import Interrupted

logger = logging.getLogger(__name__)

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stopping:
    """
    Context manager that records signals; `check` raises the first one as `Interrupted`.

    A second signal raises `KeyboardInterrupt` and restores the previous handlers. A signal that was
    ignored before, as under `nohup`, stays ignored. Outside the main thread, where Python delivers
    no signals, the context manager does nothing.
    """

    def __init__(self) -> None:
        self._seen: int | None = None
        self._before: dict[int, Any] = {}
        self._forced = False  #: a second signal arrived
        self._immediate = False

    def __enter__(self) -> Self:
        """Install the signal handlers."""
        if threading.current_thread() is threading.main_thread():
            before = {number: signal.getsignal(number) for number in _SIGNALS}
            # None: a handler that an embedding program installed, which Python cannot restore.
            untouched = (signal.SIG_IGN, None)
            self._before = {n: handler for n, handler in before.items() if handler not in untouched}
            for number in self._before:
                signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *raised: object) -> None:
        """Restore the previous handlers."""
        self._restore()

    def check(self) -> None:
        """
        Return if no signal arrived.

        Raises:
            Interrupted: a signal arrived.
        """
        if self._seen is not None:
            raise Interrupted(self._seen)

    @property
    def is_requested(self) -> bool:
        """Whether a signal arrived."""
        return self._seen is not None

    def reset(self) -> None:
        """
        Treat the next signal as the first one: the work that the last signal stopped has ended.

        After a second signal this method does nothing: the driver does not wait any more.
        """
        if not self._forced:
            self._seen = None

    @contextmanager
    def immediate(self) -> Iterator[None]:
        """
        Interrupt the block at the first signal, for code that never calls `check`.

        Raises:
            Interrupted: a signal arrived.
        """
        self._immediate = True
        try:
            self.check()
            yield
        except KeyboardInterrupt:
            self.check()
            raise
        finally:
            self._immediate = False

    @contextmanager
    def not_immediate(self) -> Iterator[None]:
        """
        Complete this part of an `immediate` block before a first signal interrupts it.

        Raises:
            Interrupted: a signal arrived during the block.
        """
        before, self._immediate = self._immediate, False
        try:
            yield
        finally:
            self._immediate = before
        self.check()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._seen is None:
            self._seen = number
            if self._immediate:
                raise KeyboardInterrupt
            return
        self._forced = True
        self._restore()
        raise KeyboardInterrupt

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def call_all(shutdowns: Iterable[Callable[[], object]]) -> None:
    """
    Call all functions, even if some of them raise; exceptions are logged.

    Raises:
        KeyboardInterrupt: one was raised; re-raised after all functions were called.
    """
    interrupt: KeyboardInterrupt | None = None
    for shut_down in shutdowns:
        try:
            shut_down()
        except KeyboardInterrupt as raised:
            interrupt = raised
        except Exception as error:
            logger.warning("while the run was ended: %s", error or type(error).__name__)
    if interrupt is not None:
        raise interrupt
