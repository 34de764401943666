"""An in-memory link from a primary to its backup, which simulates the primary's death."""

from typing import Any

from distplat.platform.errors import ActorLost
from distplat.strategies.server.store import Change, ReplicatedStore, Update

MOMENTS = ("before it sent", "after it sent", "before it answered")
"""Moments of the death: before or after the backup applies an update, or at the confirmation."""


class InMemoryBackup:
    """
    See `BackupLink`; the backup applies each update within the call.

    Args:
        primary: sends the updates; this object becomes its `backup_link`.
        backup: an equal store; the constructor loads the primary's snapshot.
    """

    def __init__(self, primary: ReplicatedStore, backup: ReplicatedStore) -> None:
        self._backup = backup
        backup.load_snapshot(primary.snapshot())
        self.death: tuple[int, str] | None = None  #: version and moment of the primary's death
        self._version = 0

    @property
    def settled(self) -> bool:
        """See `BackupLink`."""
        return True

    def send(self, change: Change, gradient: Any = None) -> None:
        """See `BackupLink`."""
        if isinstance(change, Update):
            self._version = change.version
        self._maybe_die(MOMENTS[0])
        self._backup.follow(change, gradient)
        self._maybe_die(MOMENTS[1])

    def confirm(self) -> None:
        """See `BackupLink`."""
        self._maybe_die(MOMENTS[2])

    def _maybe_die(self, moment: str) -> None:
        if self.death == (self._version, moment):
            raise ActorLost("the primary", self._version, moment)
