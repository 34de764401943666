"""
Upload of a rank's checkpoint parts: copied between two steps, sent by another thread.

    training thread   step 119 | copy | step 120 ...................... step 139 | wait? copy |
    uploader                   | into Ray's store, servers' copies | deliver
    controller                                                       poll: receives the part

Training pauses only for the copy. If the previous part is still being sent when the next one is
due, the rank waits for it; this depends on the object store and not on the disk, because the
controller skips checkpoints that the disk is too slow for. Under an asynchronous strategy the rank
skips the new part instead of waiting.
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
    Sends the checkpoint parts of one rank.

    Args:
        rank: the rank.
        attempt: attempt of the run.
        put: copies arrays to where the controller can fetch them; returns a reference.
        send: called with the deliveries, from another thread.
        limit_s: timeout for sending a part.
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
        self._sent_at = 0.0  #: start time of `_thread`
        self._version = -1  #: version of the last part

    def take(self, version: int, part: CheckpointPart, facts: Mapping[str, Any]) -> None:
        """
        Copy a part and start to send it; a repeated version is ignored.

        Raises:
            DeadlineExceeded: the previous part is still being sent after the timeout.
        """
        if version == self._version:
            return
        if self._busy and part.may_skip:
            late = "" if time.monotonic() - self._sent_at < self._limit_s else str(self._late())
            skipped = Delivery(self._rank, self._attempt, version, skipped=True, failure=late)
            self._send(skipped)
            return
        self.flush()
        self._version = version
        arrays, self._sent_at = self._staging.copy(part.tensors), time.monotonic()
        self._thread = threading.Thread(
            target=self._deliver, args=(version, part, arrays, dict(facts)), daemon=True
        )
        self._thread.start()

    def flush(self) -> None:
        """
        Wait until the last part has been sent.

        Raises:
            DeadlineExceeded: it is still being sent after the timeout.
        """
        if self._thread is not None:
            self._thread.join(self._limit_s)
        if self._busy:
            raise self._late()

    def _late(self) -> DeadlineExceeded:
        what, missing = "a part of a checkpoint", ("Ray's object store",)
        return DeadlineExceeded(what, missing, self._limit_s, "failure.step_timeout_s")

    @property
    def _busy(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def _deliver(
        self, version: int, part: CheckpointPart, arrays: list[Bytes], facts: dict[str, Any]
    ) -> None:
        key = (self._rank, self._attempt, version)
        try:
            fetched = part.fetch() if part.fetch is not None else []
            if fetched is None:
                self._send(Delivery(*key, skipped=True))
                return
            items = [(self._put(arrays), part.entries), *fetched] if part.entries else fetched
        except Exception as error:  # for example a lost server, which the training detects, too
            logger.warning("no checkpoint of step %d: %s", version, error)
            why, lost = str(error) or repr(error), isinstance(error, (ActorLost, Abandoned))
            self._send(Delivery(*key, skipped=True, failure=why, lost=lost))
            return
        pairs = (tuple(column) for column in zip(*items, strict=True)) if items else ((), ())
        refs, entries = pairs
        self._send(Delivery(*key, refs, entries, facts))
