"""A way from a primary to its backup without servers, and moments at which the primary may die."""

from typing import Any

from distplat.platform.errors import ActorLost
from distplat.strategies.server.store import Change, ReplicatedStore, Update

MOMENTS = ("before it sent", "after it sent", "before it answered")
"""When a primary may die in an update: the backup has not made it yet, has made it, has told so."""


class InMemoryBackup:
    """
    See `BackupLink`; the backup makes each update within the call.

    Args:
        primary: whose updates they are; this becomes its `backup_link`.
        backup: an equal store, filled here.
    """

    def __init__(self, primary: ReplicatedStore, backup: ReplicatedStore) -> None:
        self._backup = backup
        backup.load_snapshot(primary.snapshot())
        self.dies: tuple[int, str] | None = None  #: version and moment of the primary's death
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
        if self.dies == (self._version, moment):
            raise ActorLost("the primary", self._version, moment)
