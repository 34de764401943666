"""
What Ray sees of the controller: a run goes on in one of its threads, others answer meanwhile.

    driver            ── run ───▶  thread: `Controller.run` ──▶ the trained model
                      ── poll ──▶  what happened since: steps, failures, files, log records
    distplat scale    ── scale ─▶  accepted, or the reason why not, at once
    distplat status   ── scale_status

Files of the run directory are the driver's, but for checkpoints: those are large, and a thread here
writes them while training goes on. The actor is on the driver's node, so both see the same disk.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from logging.handlers import QueueHandler
from typing import Any

import ray

from distplat.actors.actor_group import ActorGroup
from distplat.actors.checkpointing import Checkpoints
from distplat.actors.controller import Controller
from distplat.actors.ray_transport import RayTransport
from distplat.actors.retrying_calls import ask
from distplat.actors.stopping import end_each
from distplat.actors.tables.saving import sources_of
from distplat.platform.apply_log import FILE_NAME, pack
from distplat.platform.errors import InfrastructureError, Interrupted, NotReadyError
from distplat.platform.progress import Summary
from distplat.platform.scale_requests import NOBODY_ASKED, ScaleRequest, ScaleStatus
from distplat.platform.tensor_slices import Bytes
from distplat.strategies.sparse.files import keep_tables

logger = logging.getLogger(__name__)

_FETCH_S = 60.0
"""How long a part of a checkpoint may take to come from its node."""
_BEGIN_S = 5.0
"""How long a question waits for the run to begin."""


@dataclass(frozen=True)
class FileToKeep:
    """A file for the run directory."""

    name: str
    content: bytes


RunEvent = Summary | FileToKeep | logging.LogRecord
"""What the driver is told."""


class ControllerActor:
    """
    See the top of the file.

    Args:
        name: of the actor.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._events: queue.SimpleQueue[RunEvent | None] = queue.SimpleQueue()
        self._controller: Controller | None = None
        self._begun, self._stopping, self._over = (threading.Event() for _ in range(3))

    def __repr__(self) -> str:
        """Name in Ray's logs."""
        return self._name

    def run(self, actor_group: ActorGroup, base: int) -> bytes:
        """
        Watch a run from its start to its end; give the trained model.

        Args:
            actor_group: the actors, which the driver has made and given their orders.
            base: steps of the checkpoint that they begin from.

        Raises:
            DistplatError: why the run failed.
        """
        _send_records(self._events)
        launch = actor_group.launch
        if launch.strategy_file is not None:
            launch.strategy_file.load()
        # Where tasks are leased rank 0 alone gives parts: the others may come and go.
        parts = 1 if actor_group.dynamic_tasks else launch.job.scaling.world
        checkpoints = Checkpoints(launch, parts, _open_box)
        checkpoints.step = base
        try:
            self._controller = Controller(
                actor_group, launch.job.failure, launch.policy, self._check, checkpoints
            )
            self._begun.set()
            model = self._controller.run(self._events.put)
            self._keep_files(actor_group)
            return model
        finally:
            # What is complete is worth keeping, however the run ends; None wakes the open `poll`.
            end = self._over.set, lambda: self._events.put(None)
            end_each([checkpoints.drain, actor_group.end, *end])

    def poll(self, hold_s: float) -> list[RunEvent]:
        """Give what happened since the last call; waits so long for there to be something."""
        found = []
        with suppress(queue.Empty):
            found.append(self._events.get(timeout=0 if self._over.is_set() else hold_s))
            while True:
                found.append(self._events.get_nowait())
        return [event for event in found if event is not None]

    def stop(self, timeout_s: float) -> None:
        """End the run and its actors; returns when they are ended, or after so long."""
        self._stopping.set()
        self._over.wait(timeout_s)

    def scale(self, workers: int) -> ScaleRequest:
        """
        Ask for another number of workers; returns before they are there.

        Raises:
            SpecError: it cannot be had; says why.
            NotReadyError: the run has not begun yet.
        """
        return self._running().scale(workers)

    def scale_status(self) -> ScaleStatus:
        """Tell what became of the last request for another number of workers."""
        return NOBODY_ASKED if self._controller is None else self._controller.scale_status()

    def _running(self) -> Controller:
        if not self._begun.wait(_BEGIN_S) or self._controller is None:
            raise NotReadyError(f"{self._name}: the run has not begun yet")
        return self._controller

    def _check(self) -> None:
        if self._stopping.is_set():
            raise Interrupted(15)

    def _keep_files(self, actor_group: ActorGroup) -> None:
        """Send the driver the embedding tables and the log of updates, of runs that have them."""
        assert self._controller is not None
        launch = actor_group.launch

        def keep(name: str, content: bytes) -> None:
            self._events.put(FileToKeep(name, content))

        if launch.roles.consistency.asynchronous and self._controller.base == 0:
            _keep_log(actor_group, keep)
        if launch.job.embeddings is not None and launch.job.checkpoint.save_final:
            keep_tables(sources_of(actor_group, launch.job), launch.job.seed, keep)


def _send_records(events: queue.SimpleQueue[Any]) -> None:
    """Have this package's log records appear in the driver, which alone knows what is shown."""
    ours = logging.getLogger("distplat")
    ours.handlers = [QueueHandler(events)]
    ours.setLevel(logging.INFO)
    ours.propagate = False


def _open_box(box: list[Any]) -> list[Bytes]:
    arrays: list[Bytes] = ray.get(box[0], timeout=_FETCH_S)
    return arrays


def _keep_log(actor_group: ActorGroup, keep: Callable[[str, bytes], None]) -> None:
    """Fetch the shards' logs; a run that has its model does not fail for want of them."""
    manager, launch = actor_group.roles["server-manager"], actor_group.launch
    limit, setting = launch.job.failure.step_timeout_s, "step_timeout_s"
    calls = [manager.logs.remote]
    try:
        logs = ask(RayTransport(), "log", calls, ["server-manager"], limit, setting)[0]
    except InfrastructureError as error:
        logger.warning("no %s: %s", FILE_NAME, error)
    else:
        keep(FILE_NAME, pack(logs, {"run": launch.run}))
