"""Ctrl-C and SIGTERM as an orderly end: note the signal, let the controller see it at its tick."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self

from distplat.platform.errors import Interrupted

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopping:
    """
    While entered, SIGINT and SIGTERM are noted; `check` raises them as `Interrupted`.

    Ray's own handlers abort the process inside a call to Ray. A second signal of the same kind
    gets the handler that was there before, for who cannot wait. Outside the main thread, where
    Python takes no signals, it does nothing.
    """

    def __init__(self) -> None:
        self._seen: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        """Put the handlers in place."""
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in _SIGNALS}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Put the former handlers back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def check(self) -> None:
        """
        Return if nobody asked to stop.

        Raises:
            Interrupted: somebody did.
        """
        if self._seen is not None:
            raise Interrupted(self._seen)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._seen = number
        signal.signal(number, self._before[number])
