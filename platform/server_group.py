"""
The server manager's state machine: which server keeps which shard, and how a loss is repaired.

    shard 0    server-0 primary  ══ every update ══▶  server-1 backup          term 2
                    ✗ lost
               server-1 promoted; the version of the shard map grows           term 3
               server-1 primary  ══ every update ══▶  server-2, new and filled  term 4

A `ShardAssignment` is one shard's pair of servers. Its term grows with every change of the pair, so
that messages of an earlier pair are refused (see `ReplicaState`). Only this class decides that a
primary may continue without a backup: a primary that loses its backup waits for that decision. So a
primary never continues alone while its backup is being promoted (I4).

A lost manager is followed by a new one, which asks the servers for their state (`adopt`).

The class reads no clock and does no I/O: it takes events and returns orders.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from enum import Enum

from distplat.platform.errors import FencedError, NotReadyError
from distplat.platform.shard_map import Shard


class Role(Enum):
    """Role of a server for one shard."""

    WAITING = "serves, but waits for its first backup before it acknowledges"
    ALONE = "serves"
    PRIMARY = "serves, and replicates every update to its backup"
    BACKUP = "applies the primary's updates"


class ReplicaState:
    """Role and term of one replica of a store."""

    def __init__(self, role: Role) -> None:
        self.role = role
        self.term = 0

    @property
    def settled(self) -> bool:
        """Whether a primary knows if acknowledgements need a backup."""
        return self.role is not Role.WAITING

    def check_serves(self) -> None:
        """
        Refuse workers' calls to a backup.

        Raises:
            NotReadyError: this server is a backup.
        """
        if self.role is Role.BACKUP:
            raise NotReadyError("this server is a backup: it does not serve before its promotion")

    def check_update(self, term: int) -> None:
        """
        Refuse updates of a primary from another term.

        Raises:
            FencedError: this server is no backup, or of another term.
        """
        if self.role is not Role.BACKUP or term != self.term:
            raise FencedError(
                f"update of term {term} refused: this server is {self.role.name.lower()} "
                f"in term {self.term}"
            )

    def change(self, role: Role, term: int) -> bool:
        """Change role and term; False: the message is older than the present term, or a repeat."""
        if term <= self.term:
            return False
        self.role, self.term = role, term
        return True


MAX_LOSSES = 8
"""Servers lost for one shard after which no more backups are started: the cause is systematic."""
_TERMS_PER_MANAGER = 1 << 20
"""Terms reserved for one manager; terms of a later manager start above them."""


@dataclass(frozen=True)
class MakeBackup:
    """Start a server for the shard, if possible on another node than `beside`."""

    shard: int
    server: str
    beside: str


@dataclass(frozen=True)
class Fill:
    """Copy the primary's state to the backup, and replicate every later update."""

    shard: int
    primary: str
    backup: str
    term: int


@dataclass(frozen=True)
class Promote:
    """Make a backup the primary, without a backup of its own for now."""

    shard: int
    server: str
    term: int


@dataclass(frozen=True)
class DropBackup:
    """Notify a primary that it no longer has a backup."""

    shard: int
    server: str
    term: int


Order = MakeBackup | Fill | Promote | DropBackup


@dataclass(frozen=True)
class ServerReport:
    """A server's state, as reported to a new manager."""

    server: str
    shard: int | None
    """Number of its shard among those of all parts of the model; None: none assigned yet."""
    role: Role = Role.WAITING
    term: int = 0
    backup: str | None = None
    """Name of a primary's backup, if any."""
    cut: Shard | None = None
    """Elements of the shard within the vector of its part."""


@dataclass
class ShardAssignment:
    """One shard and its servers."""

    shard: int
    primary: str
    backup: str | None = None
    ready: bool = False
    """Whether the backup has every acknowledged update, and may be promoted."""
    term: int = 1
    starting: str | None = None
    """Name of a backup that is being started."""
    losses: int = 0


@dataclass(frozen=True)
class ServerGroupStatus:
    """State of the server group, for display."""

    version: int
    """Version of the shard map; 0: no shard is assigned yet."""
    cuts: tuple[Shard, ...]
    assignments: tuple[ShardAssignment, ...]
    """Servers by shard; empty: the strategy has no shards."""
    replicated: bool
    """Whether each shard has a backup."""
    tables: tuple[ShardAssignment, ...] = ()
    """Servers by part of the embedding tables, where tables are replicated."""


@dataclass
class ServerGroup:
    """
    State of a replicated server group.

    Args:
        shards: number of shards of the parameters, or of servers of embedding tables.
        prefix: of the servers' names; the first primaries are `server-0` and so on.
    """

    shards: int
    prefix: str = "server"
    version: int = 1
    """Version of the map of primaries; a client with an older map asks again."""
    broken: str | None = None
    """Name of a server whose state is lost; the group cannot continue."""
    assignments: list[ShardAssignment] = field(init=False)

    def __post_init__(self) -> None:
        self._next_number = self.shards  # number of the next server
        self.assignments = [
            ShardAssignment(index, f"{self.prefix}-{index}") for index in range(self.shards)
        ]

    @property
    def servers(self) -> list[str]:
        """Names of all servers to watch."""
        found: list[str] = []
        for assignment in self.assignments:
            found += [
                name
                for name in (assignment.primary, assignment.backup, assignment.starting)
                if name is not None
            ]
        return found

    def adopt(
        self, reports: Sequence[ServerReport], names: Collection[str], generation: int
    ) -> list[str]:
        """
        Take over the servers of a lost manager, before any other call.

        Every shard keeps its primary, which continues without a backup in a term of this manager,
        so that late orders of the lost manager are refused. New backups are started.

        Args:
            reports: of the servers that answered.
            names: names of all servers that were ever started.
            generation: number of managers before this one.

        Returns:
            Names of servers that are no longer needed. `broken` is set if some shard has certainly
            lost its primary; a replicated primary that does not answer may have been replaced by
            its backup.
        """
        self._next_number = 1 + max(int(name.rpartition("-")[2]) for name in names)
        for assignment in self.assignments:
            of_shard = [report for report in reports if report.shard == assignment.shard]
            unassigned = any(
                report.shard is None and report.server == assignment.primary for report in reports
            )
            serving = [report for report in of_shard if report.role is not Role.BACKUP]
            found = max(serving, key=lambda report: report.term, default=None)
            if found is not None and _is_certain(found, of_shard):
                assignment.primary, assignment.term = found.server, generation * _TERMS_PER_MANAGER
            elif of_shard or not unassigned:
                self.broken = assignment.primary
        primaries = {assignment.primary for assignment in self.assignments}
        return [report.server for report in reports if report.server not in primaries]

    def start_backups(self) -> list[Order]:
        """Return the orders that start a backup for each shard."""
        orders: list[Order] = []
        for assignment in self.assignments:
            if assignment.term > 1:
                orders.append(DropBackup(assignment.shard, assignment.primary, assignment.term))
            orders += self._start_backup(assignment)
        return orders

    def backup_started(self, server: str) -> list[Order]:
        """Return the order that fills a backup which was started."""
        for assignment in self.assignments:
            if assignment.starting == server:
                assignment.starting, assignment.backup, assignment.ready = None, server, False
                assignment.term += 1
                return [Fill(assignment.shard, assignment.primary, server, assignment.term)]
        return []

    def backup_filled(self, server: str, term: int) -> None:
        """Record that the backup has all of the primary's state, and receives every update."""
        for assignment in self.assignments:
            if (assignment.backup, assignment.term) == (server, term):
                assignment.ready = True

    def server_lost(self, server: str) -> list[Order]:
        """Return the orders after a server died or stopped answering; a repeat returns none."""
        for assignment in self.assignments:
            if server == assignment.primary:
                return self._lose_primary(assignment)
            if server == assignment.backup:
                assignment.backup, assignment.ready = None, False
                assignment.term += 1
                alone = DropBackup(assignment.shard, assignment.primary, assignment.term)
                return [alone, *self._restart_backup(assignment)]
            if server == assignment.starting:
                assignment.starting = None
                if assignment.losses + 1 < MAX_LOSSES:
                    return self._restart_backup(assignment)
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
            *self._restart_backup(assignment),
        ]

    def _restart_backup(self, assignment: ShardAssignment) -> list[Order]:
        assignment.losses += 1
        return self._start_backup(assignment) if assignment.losses < MAX_LOSSES else []

    def _start_backup(self, assignment: ShardAssignment) -> list[Order]:
        assignment.starting = f"{self.prefix}-{self._next_number}"
        self._next_number += 1
        return [MakeBackup(assignment.shard, assignment.starting, assignment.primary)]


def _is_certain(primary: ServerReport, others: Sequence[ServerReport]) -> bool:
    """Return whether no other server can have been promoted instead."""
    if primary.role is not Role.PRIMARY:
        return True
    return any(report.server == primary.backup and report.role is Role.BACKUP for report in others)
