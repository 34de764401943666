"""
Ctrl-C, SIGTERM and SIGHUP as an orderly end, and an end that nothing keeps from its end.

The first signal is noted, and the driver sees it at its tick. The second one ends what the driver
waits for, at once; what is to be ended is ended all the same. When the actors are gone, an upload
may go on for long: then signals count anew.
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
    While entered, signals are noted; `check` raises them as `Interrupted`.

    A second signal raises `KeyboardInterrupt`, for who cannot wait, and the next ones get the
    handlers that were there before. A signal that was ignored, as under `nohup`, stays so. Outside
    the main thread, where Python takes no signals, it does nothing.
    """

    def __init__(self) -> None:
        self._seen: int | None = None
        self._before: dict[int, Any] = {}
        self._again = False  #: there was a second one
        self._at_once = False

    def __enter__(self) -> Self:
        """Put the handlers in place."""
        if threading.current_thread() is threading.main_thread():
            before = {number: signal.getsignal(number) for number in _SIGNALS}
            # None: a program that Python runs in has set one, and could not get it back.
            kept = (signal.SIG_IGN, None)
            self._before = {n: one for n, one in before.items() if one not in kept}
            for number in self._before:
                signal.signal(number, self._note)
        return self

    def __exit__(self, *raised: object) -> None:
        """Put the former handlers back."""
        self._put_back()

    def check(self) -> None:
        """
        Return if no signal came.

        Raises:
            Interrupted: somebody did.
        """
        if self._seen is not None:
            raise Interrupted(self._seen)

    @property
    def asked(self) -> bool:
        """Whether a signal came."""
        return self._seen is not None

    def count_anew(self) -> None:
        """
        Take the next signal for a first one: what the last one ended has ended.

        After a second one nothing is waited for any more, and this does nothing.
        """
        if not self._again:
            self._seen = None

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """
        Have the first signal break into what runs, as Ctrl-C does: nobody calls `check` there.

        Raises:
            Interrupted: it came.
        """
        self._at_once = True
        try:
            self.check()
            yield
        except KeyboardInterrupt:
            self.check()
            raise
        finally:
            self._at_once = False

    @contextmanager
    def not_at_once(self) -> Iterator[None]:
        """
        Let a part of an `at_once` block come to its end before the first signal breaks in.

        Raises:
            Interrupted: it came meanwhile.
        """
        before, self._at_once = self._at_once, False
        try:
            yield
        finally:
            self._at_once = before
        self.check()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._seen is None:
            self._seen = number
            if self._at_once:
                raise KeyboardInterrupt
            return
        self._again = True
        self._put_back()
        raise KeyboardInterrupt

    def _put_back(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def end_each(endings: Iterable[Callable[[], object]]) -> None:
    """
    End everything: what one of them raises keeps none of the others from its end.

    Raises:
        KeyboardInterrupt: there was one meanwhile; raised when all are ended.
    """
    interrupt: KeyboardInterrupt | None = None
    for ending in endings:
        try:
            ending()
        except KeyboardInterrupt as raised:
            interrupt = raised
        except Exception as error:
            logger.warning("while the run was ended: %s", error or type(error).__name__)
    if interrupt is not None:
        raise interrupt
