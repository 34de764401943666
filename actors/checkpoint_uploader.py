"""
A rank's parts of checkpoints on their way: copied between two steps, sent off by another thread.

    training thread   step 119 | copy | step 120 ...................... step 139 | wait? copy |
    uploader                   | into Ray's store, servers' copies | tell
    controller                                                       poll: here it is

Training stands still for the copy alone. Should the part before not have left when the next is
due, a rank waits for it, which is a matter of memory, not of the disk: what the disk cannot keep up
with, the controller skips. A rank under an asynchronous strategy waits for nobody, and skips at
once.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from distplat.platform.checkpoints import Delivery
from distplat.platform.errors import Abandoned, ActorLost, DeadlineExceeded
from distplat.platform.tensor_slices import Bytes
from distplat.strategies.checkpoint.checkpoint_types import CheckpointPart
from distplat.strategies.checkpoint.parts import Staging

logger = logging.getLogger(__name__)


class CheckpointUploader:
    """
    Takes one rank's parts.

    Args:
        rank: whose.
        attempt: of the run.
        put: puts arrays where the controller can have them, copied; gives a reference.
        send: takes the deliveries; called by another thread.
        limit_s: how long a part may take to leave.
    """

    def __init__(
        self,
        rank: int,
        attempt: int,
        put: Callable[[list[Bytes]], Any],
        send: Callable[[Delivery], object],
        limit_s: float,
    ) -> None:
        self._rank, self._attempt = rank, attempt
        self._put, self._send, self._limit_s = put, send, limit_s
        self._staging = Staging()
        self._thread: threading.Thread | None = None
        self._began = 0.0  #: when it did
        self._version = -1  #: of the last part that was taken

    def take(self, version: int, part: CheckpointPart, facts: Mapping[str, Any]) -> None:
        """
        Copy a part and go on; a version that was taken before is passed over.

        Raises:
            DeadlineExceeded: the part before does not leave.
        """
        if version == self._version:
            return
        if self._busy and part.may_skip:
            late = "" if time.monotonic() - self._began < self._limit_s else str(self._late())
            skipped = Delivery(self._rank, self._attempt, version, skipped=True, failure=late)
            self._send(skipped)
            return
        self.flush()
        self._version = version
        arrays, self._began = self._staging.copy(part.tensors), time.monotonic()
        self._thread = threading.Thread(
            target=self._deliver, args=(version, part, arrays, dict(facts)), daemon=True
        )
        self._thread.start()

    def flush(self) -> None:
        """
        Wait until the last part has left.

        Raises:
            DeadlineExceeded: it does not.
        """
        if self._thread is not None:
            self._thread.join(self._limit_s)
        if self._busy:
            raise self._late()

    def _late(self) -> DeadlineExceeded:
        what, late = "a part of a checkpoint", ("Ray's object store",)
        return DeadlineExceeded(what, late, self._limit_s, "failure.step_timeout_s")

    @property
    def _busy(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def _deliver(
        self, version: int, part: CheckpointPart, arrays: list[Bytes], facts: dict[str, Any]
    ) -> None:
        where = (self._rank, self._attempt, version)
        try:
            kept = part.fetch() if part.fetch is not None else []
            if kept is None:
                self._send(Delivery(*where, skipped=True))
                return
            refs = [(self._put(arrays), part.entries), *kept] if part.entries else kept
        except Exception as error:  # for example a lost server: of that the training hears itself
            logger.warning("no checkpoint of step %d: %s", version, error)
            why, lost = str(error) or repr(error), isinstance(error, (ActorLost, Abandoned))
            self._send(Delivery(*where, skipped=True, failure=why, lost=lost))
            return
        found, entries = (tuple(column) for column in zip(*refs, strict=True)) if refs else ((), ())
        self._send(Delivery(*where, found, entries, facts))
