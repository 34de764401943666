"""
What Ray sees of a worker: a thread that trains, and an ear for the controller.

The actor's own thread stays free to answer `poll`, so a worker in a long forward still says that
it lives. Torch and the user's code are imported by the training thread, in this process only.
"""

from __future__ import annotations

import threading
from collections import deque
from typing import TYPE_CHECKING

from distplat.actors.importing import quick_imports
from distplat.actors.messages import News, WorkOrder
from distplat.platform.errors import DistplatError
from distplat.platform.progress import EvalReport, StepReport

if TYPE_CHECKING:
    from distplat.strategies.training.loop import Progress


class Worker:
    """One rank of a run."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._reports: deque[StepReport | EvalReport] = deque()
        self._progress: Progress | None = None
        self._model: bytes | None = None
        self._error: DistplatError | None = None

    def __repr__(self) -> str:
        """Name in Ray's logs."""
        return self._name

    def start(self, order: WorkOrder) -> None:
        """Begin to train, and return at once."""
        threading.Thread(target=self._train, args=(order,), name="train", daemon=True).start()

    def poll(self) -> News:
        """Tell how things stand, and what was reported since the last call."""
        error, model = self._error, self._model  # before the reports: what came first is told first
        reports = [self._reports.popleft() for _ in range(len(self._reports))]
        beats, step = (self._progress.beats, self._progress.step) if self._progress else (0, 0)
        return News(reports, beats, step, finished=model is not None, error=error)

    def result(self) -> bytes:
        """Give the trained model, as safetensors; only once `finished`."""
        assert self._model is not None, "the controller asks only a worker that has finished"
        return self._model

    def _train(self, order: WorkOrder) -> None:
        with quick_imports():
            from distplat.actors.training import Session  # torch comes with it

        session = Session(order, self._reports.append)
        self._progress = session.progress
        try:
            self._model = session.run()
        except DistplatError as error:
            self._error = error
