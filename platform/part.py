"""
A server's part in keeping a shard, as it knows it itself; the manager gives it out in terms.

              mirrored(t)                       promoted(t)
    ALONE ◀───────────────▶ MIRRORED     BACKUP ───────────▶ ALONE
              alone(t)

A primary that is mirrored acknowledges nothing that its backup has not. A backup takes updates of
its own term only: once it is promoted, or given to another primary, the old primary's are refused,
and with them whatever the old primary would have acknowledged (I6).
"""

from enum import Enum

from distplat.platform.errors import FencedError, NotReadyError


class Role(Enum):
    """What a server does with a shard."""

    WAITING = "serves, but waits for its first backup before it acknowledges"
    ALONE = "serves"
    MIRRORED = "serves, and has its backup keep up"
    BACKUP = "keeps up with the primary"


class Part:
    """
    One server's part.

    Args:
        role: the first one.
    """

    def __init__(self, role: Role) -> None:
        self.role = role
        self.term = 0

    @property
    def settled(self) -> bool:
        """Whether a primary knows what an acknowledgement needs."""
        return self.role is not Role.WAITING

    def check_serves(self) -> None:
        """
        Refuse workers' calls to a backup.

        Raises:
            NotReadyError: this server is no primary.
        """
        if self.role is Role.BACKUP:
            raise NotReadyError("this server is a backup: it does not serve before its promotion")

    def check_update(self, term: int) -> None:
        """
        Refuse a primary's updates that are not of this backup's term.

        Raises:
            FencedError: another server is the primary by now.
        """
        if self.role is not Role.BACKUP or term != self.term:
            raise FencedError(
                f"update of term {term} refused: this server is {self.role.name.lower()} "
                f"in term {self.term}"
            )

    def change(self, role: Role, term: int) -> bool:
        """Take a part; False: the message is older than the present one, or came before."""
        if term <= self.term:
            return False
        self.role, self.term = role, term
        return True
