"""
The server manager's state machine: who serves which shard, and what to do when one is lost.

    shard 0    server-0 primary  ══ every update ══▶  server-1 backup          term 2
                    ✗ lost
               server-1 promoted; the map's version grows                      term 3
               server-1 primary  ══ every update ══▶  server-2, made and filled  term 4

A `ShardAssignment` is one shard's pair of servers. Its term grows with every change of who is in
it, so that a message of an earlier pair is refused (see `ReplicaState`). Only this class decides
that a primary may go on alone: one that misses its backup waits to be told. So there is never a
moment in which the primary goes on without the backup while the backup is promoted (I4).

A manager that was lost is followed by another one, which asks the servers what they keep (`adopt`).

The class reads no clock and talks to nobody: news come in, orders go out.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from enum import Enum

from distplat.platform.errors import FencedError, NotReadyError
from distplat.platform.shard_map import Shard


class Role(Enum):
    """What a server does with a shard."""

    WAITING = "serves, but waits for its first backup before it acknowledges"
    ALONE = "serves"
    PRIMARY = "serves, and has its backup keep up"
    BACKUP = "keeps up with the primary"


class ReplicaState:
    """
    What one server is to a store that is kept twice, and in which term.

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


MAX_LOSSES = 8
"""Servers lost for one shard after which no further backup is made: something else is wrong."""
_TERMS = 1 << 20
"""Terms of one manager, far more than it will need: a later manager's are above all of them."""


@dataclass(frozen=True)
class MakeBackup:
    """Make a server for the shard that is on another node than `beside`, where there is one."""

    shard: int
    server: str
    beside: str


@dataclass(frozen=True)
class Fill:
    """Have the primary fill the backup, and send it every update from then on."""

    shard: int
    primary: str
    backup: str
    term: int


@dataclass(frozen=True)
class Promote:
    """Have a backup serve, alone for now."""

    shard: int
    server: str
    term: int


@dataclass(frozen=True)
class DropBackup:
    """Tell a primary that it has no backup any more."""

    shard: int
    server: str
    term: int


Order = MakeBackup | Fill | Promote | DropBackup


@dataclass(frozen=True)
class ServerReport:
    """What a server says of itself to a manager that was not there before."""

    server: str
    shard: int | None
    """Number of its shard, among those of all parts of the model; None: it was given none yet."""
    role: Role = Role.WAITING
    term: int = 0
    backup: str | None = None
    """Name of the backup, of a primary that has one."""
    cut: Shard | None = None
    """Which run of its part's vector the shard is."""


@dataclass
class ShardAssignment:
    """One shard and the servers that keep it."""

    shard: int
    primary: str
    backup: str | None = None
    ready: bool = False
    """The backup has all that the primary has acknowledged, and will have: it may be promoted."""
    term: int = 1
    making: str | None = None
    """A backup that is being started."""
    losses: int = 0


@dataclass(frozen=True)
class ServerGroupStatus:
    """The server group, as it is shown."""

    version: int
    """Version of the shard map; 0: no shard was given out yet."""
    cuts: tuple[Shard, ...]
    assignments: tuple[ShardAssignment, ...]
    """By shard, who keeps it; empty: the strategy has no shards."""
    replicated: bool
    """Whether each shard is kept twice."""
    tables: tuple[ShardAssignment, ...] = ()
    """By part of the embedding tables, who keeps it, where each part is kept twice."""


@dataclass
class ServerGroup:
    """
    State of a replicated server group.

    Args:
        shards: how many: shards of the parameters, or servers of embedding tables.
        prefix: of the servers' names; primaries are `server-0` and so on.
    """

    shards: int
    prefix: str = "server"
    version: int = 1
    """Version of the map of primaries: a client with an older one asks again."""
    broken: str | None = None
    """A server that was lost with all that it kept; the group cannot go on."""
    assignments: list[ShardAssignment] = field(init=False)

    def __post_init__(self) -> None:
        self._made = self.shards  # servers named so far
        self.assignments = [
            ShardAssignment(index, f"{self.prefix}-{index}") for index in range(self.shards)
        ]

    @property
    def servers(self) -> list[str]:
        """All that are to be watched."""
        found: list[str] = []
        for assignment in self.assignments:
            found += [
                name
                for name in (assignment.primary, assignment.backup, assignment.making)
                if name is not None
            ]
        return found

    def adopt(
        self, held: Sequence[ServerReport], names: Collection[str], generation: int
    ) -> list[str]:
        """
        Take over, before anything else, what a manager before has left behind.

        Every shard stays with its primary, which is to go on alone in a term of this manager: so
        whatever the one before has still on its way is refused. Backups are made anew.

        Args:
            held: what the servers say that answer.
            names: of all servers that were ever made.
            generation: number of managers before this one.

        Returns:
            Servers that are not needed any more. `broken` is set if some shard has certainly lost
            its primary; a replicated primary that does not answer may have failed over.
        """
        self._made = 1 + max(int(name.rpartition("-")[2]) for name in names)
        for assignment in self.assignments:
            reports = [one for one in held if one.shard == assignment.shard]
            fresh = [one for one in held if one.shard is None and one.server == assignment.primary]
            serving = [one for one in reports if one.role is not Role.BACKUP]
            found = max(serving, key=lambda one: one.term, default=None)
            if found is not None and _is_sure(found, reports):
                assignment.primary, assignment.term = found.server, generation * _TERMS
            elif reports or not fresh:
                self.broken = assignment.primary
        kept = {assignment.primary for assignment in self.assignments}
        return [one.server for one in held if one.server not in kept]

    def start_backups(self) -> list[Order]:
        """Give the orders that make a backup of each shard."""
        orders: list[Order] = []
        for assignment in self.assignments:
            if assignment.term > 1:
                orders.append(DropBackup(assignment.shard, assignment.primary, assignment.term))
            orders += self._make(assignment)
        return orders

    def backup_started(self, server: str) -> list[Order]:
        """A backup was started: have it filled."""
        for assignment in self.assignments:
            if assignment.making == server:
                assignment.making, assignment.backup, assignment.ready = None, server, False
                assignment.term += 1
                return [Fill(assignment.shard, assignment.primary, server, assignment.term)]
        return []

    def backup_filled(self, server: str, term: int) -> None:
        """A primary says that the backup has all it has, and gets all that comes."""
        for assignment in self.assignments:
            if (assignment.backup, assignment.term) == (server, term):
                assignment.ready = True

    def server_lost(self, server: str) -> list[Order]:
        """A server died, or does not answer any more; told twice, it does nothing."""
        for assignment in self.assignments:
            if server == assignment.primary:
                return self._lose_primary(assignment)
            if server == assignment.backup:
                assignment.backup, assignment.ready = None, False
                assignment.term += 1
                alone = DropBackup(assignment.shard, assignment.primary, assignment.term)
                return [alone, *self._make_again(assignment)]
            if server == assignment.making:
                assignment.making = None
                if assignment.losses + 1 < MAX_LOSSES:
                    return self._make_again(assignment)
                assignment.losses += 1
                assignment.term += 1
                return [DropBackup(assignment.shard, assignment.primary, assignment.term)]
        return []

    def _lose_primary(self, assignment: ShardAssignment) -> list[Order]:
        if assignment.backup is None or not assignment.ready:
            self.broken = assignment.primary
            return []
        assignment.primary, assignment.backup, assignment.ready = assignment.backup, None, False
        assignment.term += 1
        self.version += 1
        return [
            Promote(assignment.shard, assignment.primary, assignment.term),
            *self._make_again(assignment),
        ]

    def _make_again(self, assignment: ShardAssignment) -> list[Order]:
        assignment.losses += 1
        return self._make(assignment) if assignment.losses < MAX_LOSSES else []

    def _make(self, assignment: ShardAssignment) -> list[Order]:
        assignment.making = f"{self.prefix}-{self._made}"
        self._made += 1
        return [MakeBackup(assignment.shard, assignment.making, assignment.primary)]


def _is_sure(primary: ServerReport, others: Sequence[ServerReport]) -> bool:
    """Say whether no other server can have been made the primary instead."""
    if primary.role is not Role.PRIMARY:
        return True
    here = [one for one in others if one.server == primary.backup]
    return any(one.role is Role.BACKUP for one in here)
