"""Decisions of the server manager: tables of orders, and a state machine of random losses."""

from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from distplat.platform.errors import FencedError, NotReadyError
from distplat.platform.server_group import (
    MAX_LOSSES,
    DropBackup,
    Fill,
    MakeBackup,
    Order,
    Promote,
    ReplicaState,
    Role,
    ServerGroup,
    ServerReport,
)


def running_group(shards: int = 1) -> ServerGroup:
    """Return a group whose backups are all ready."""
    group = ServerGroup(shards)
    for order in group.start_backups():
        assert isinstance(order, MakeBackup)
        for fill in group.backup_started(order.server):
            assert isinstance(fill, Fill)
            group.backup_filled(fill.backup, fill.term)
    return group


def test_each_shard_gets_backup_on_another_node() -> None:
    group = ServerGroup(2)
    assert group.start_backups() == [
        MakeBackup(0, "server-2", "server-0"),
        MakeBackup(1, "server-3", "server-1"),
    ]
    assert group.backup_started("server-3") == [Fill(1, "server-1", "server-3", 2)]
    assert sorted(group.servers) == ["server-0", "server-1", "server-2", "server-3"]


def test_lost_primary_is_replaced_by_its_backup() -> None:
    group = running_group()
    assert group.server_lost("server-0") == [
        Promote(0, "server-1", 3),
        MakeBackup(0, "server-2", "server-1"),
    ]
    assert (group.version, group.broken, group.assignments[0].primary) == (2, None, "server-1")
    assert group.server_lost("server-0") == []  # reported twice
    assert group.backup_started("server-2") == [Fill(0, "server-1", "server-2", 4)]


def test_lost_backup_is_replaced_and_map_is_unchanged() -> None:
    group = running_group()
    assert group.server_lost("server-1") == [
        DropBackup(0, "server-0", 3),
        MakeBackup(0, "server-2", "server-0"),
    ]
    assert group.version == 1


@pytest.mark.parametrize("filled", [False, True])
def test_only_filled_backup_is_promoted(filled: bool) -> None:
    group = ServerGroup(1)
    group.start_backups()
    (fill,) = group.backup_started("server-1")
    assert isinstance(fill, Fill)
    if filled:
        group.backup_filled(fill.backup, fill.term)
    group.server_lost("server-0")
    assert group.broken == (None if filled else "server-0")


def test_confirmation_of_earlier_term_is_ignored() -> None:
    group = running_group()
    group.server_lost("server-1")
    group.backup_filled("server-1", 2)
    group.backup_started("server-2")
    group.backup_filled("server-2", 2)
    assert not group.assignments[0].ready


def test_crash_loop_of_backups_ends() -> None:
    group = ServerGroup(1)
    orders = group.start_backups()
    losses = 0
    while orders and isinstance(orders[-1], MakeBackup):
        orders = group.server_lost(orders[-1].server)
        losses += 1
    assert losses == MAX_LOSSES
    assert orders == [DropBackup(0, "server-0", 2)]  # the primary no longer waits for a backup


def test_replica_rejects_updates_of_other_terms() -> None:
    part = ReplicaState(Role.BACKUP)
    assert part.change(Role.BACKUP, 2)
    part.check_update(2)
    with pytest.raises(FencedError, match=r"update of term 1 refused: this server is backup"):
        part.check_update(1)
    with pytest.raises(NotReadyError):
        part.check_serves()
    assert part.change(Role.ALONE, 3)
    assert not part.change(Role.BACKUP, 2)
    part.check_serves()
    with pytest.raises(FencedError, match="this server is alone in term 3"):
        part.check_update(2)


ALONE, PRIMARY, BACKUP, WAITING = Role.ALONE, Role.PRIMARY, Role.BACKUP, Role.WAITING


@pytest.mark.parametrize(
    ("reports", "primary", "useless"),
    [
        # primary and backup: the primary is complete, the backup is replaced
        (
            [
                ServerReport("server-0", 0, PRIMARY, 2, "server-1"),
                ServerReport("server-1", 0, BACKUP, 2),
            ],
            "server-0",
            ["server-1"],
        ),
        # a promoted backup and the earlier primary, which was frozen
        (
            [
                ServerReport("server-0", 0, PRIMARY, 2, "server-1"),
                ServerReport("server-1", 0, ALONE, 3),
            ],
            "server-1",
            ["server-0"],
        ),
        # a backup during its start
        (
            [ServerReport("server-0", 0, ALONE, 5), ServerReport("server-3", None)],
            "server-0",
            ["server-3"],
        ),
        # the backup does not answer and may have replaced the primary
        ([ServerReport("server-0", 0, PRIMARY, 2, "server-1")], None, ["server-0"]),
        # a lone backup may lack updates that the primary applied after dropping it
        ([ServerReport("server-1", 0, BACKUP, 2)], None, ["server-1"]),
        ([], None, []),
        # no worker has connected yet
        (
            [ServerReport("server-0", None), ServerReport("server-1", None)],
            "server-0",
            ["server-1"],
        ),
        # server-0 lost the shard that server-1 has
        (
            [ServerReport("server-0", None), ServerReport("server-1", 0, BACKUP, 2)],
            None,
            ["server-1"],
        ),
    ],
)
def test_new_manager_adopts_state_from_server_reports(
    reports: list[ServerReport], primary: str | None, useless: list[str]
) -> None:
    group = ServerGroup(1)
    dropped = group.adopt(reports, ["server-0", "server-1", "server-3"], generation=2)
    if primary is None:
        assert group.broken == "server-0"
        return
    assert (group.broken, group.assignments[0].primary, dropped) == (None, primary, useless)
    term = group.assignments[0].term
    make_backup = MakeBackup(0, "server-4", primary)  # an unused name
    if reports[0].shard is None:
        assert (term, group.start_backups()) == (1, [make_backup])
    else:
        assert term > max(report.term for report in reports) + 1000
        assert group.start_backups() == [DropBackup(0, primary, term), make_backup]


@dataclass
class Node:
    """A server with its updates; `unacknowledged` ones are applied but not acknowledged."""

    part: ReplicaState
    updates: list[int] = field(default_factory=list)
    unacknowledged: list[int] = field(default_factory=list)
    backup_link: str | None = None
    up: bool = True
    frozen: bool = False

    @property
    def answers(self) -> bool:
        return self.up and not self.frozen


class Losses(RuleBasedStateMachine):
    """
    Servers die, freeze, wake and are wrongly suspected; orders arrive late and twice.

    Workers push to any server that accepts the push, also to a replaced one.
    """

    def __init__(self) -> None:
        super().__init__()
        self.group = ServerGroup(1)
        self.nodes = {"server-0": Node(ReplicaState(Role.WAITING))}
        self.orders: list[Order] = []
        self.confirmed: list[tuple[str, int]] = []
        self.acknowledged: list[int] = []
        self.count = self.managers = 0
        self._enqueue(self.group.start_backups())

    def _enqueue(self, orders: list[Order]) -> None:
        for order in orders:
            if isinstance(order, MakeBackup):
                self.nodes[order.server] = Node(ReplicaState(Role.BACKUP))
            self.orders.append(order)

    def _update(self, node: Node) -> bool:
        """Update the node's backup; return whether the node may acknowledge."""
        role = node.part.role
        if role is Role.ALONE:
            return True
        if role is not Role.PRIMARY or node.backup_link is None:
            return False
        backup = self.nodes[node.backup_link]
        if not backup.answers:
            return False
        try:
            backup.part.check_update(node.part.term)
        except FencedError:
            return False
        backup.updates = list(node.updates)
        return True

    @rule(data=st.data())
    def push(self, data: st.DataObject) -> None:
        node = self.nodes[data.draw(st.sampled_from(sorted(self.nodes)))]
        if not node.answers or node.part.role is Role.BACKUP or node.unacknowledged:
            return
        if not node.part.settled:
            return
        self.count += 1
        node.updates.append(self.count)
        node.unacknowledged.append(self.count)
        self._acknowledge(node)

    def _acknowledge(self, node: Node) -> None:
        if node.unacknowledged and self._update(node):
            self.acknowledged += node.unacknowledged
            node.unacknowledged.clear()

    @rule(data=st.data(), fault=st.sampled_from(["kill", "freeze", "wake"]))
    def inject_fault(self, data: st.DataObject, fault: str) -> None:
        node = self.nodes[data.draw(st.sampled_from(sorted(self.nodes)))]
        if fault == "kill":
            node.up = False
        else:
            node.frozen = fault == "freeze"
            if node.answers:
                self._acknowledge(node)

    @rule(data=st.data())
    def suspect(self, data: st.DataObject) -> None:
        """Report a server as lost, although it may live."""
        if self.group.broken is None:
            self._enqueue(self.group.server_lost(data.draw(st.sampled_from(self.group.servers))))

    @rule(data=st.data(), duplicate=st.booleans())
    def carry_out(self, data: st.DataObject, duplicate: bool) -> None:
        if not self.orders:
            return
        order = data.draw(st.sampled_from(self.orders))
        if not duplicate:
            self.orders.remove(order)
        self._carry_out(order)

    @rule()
    def deliver_everything(self) -> None:
        """Deliver all messages, so that later losses happen to a complete group."""
        self.late, orders = self.orders[-1:], self.orders
        self.orders = []
        for order in orders:
            self._carry_out(order)
        while self.orders:
            self._carry_out(self.orders.pop(0))
        for confirmation in self.confirmed:
            self.group.backup_filled(*confirmation)
        self.orders = self.late  # one order is delivered again later

    def _carry_out(self, order: Order) -> None:
        match order:
            case MakeBackup(server=server):
                self._enqueue(self.group.backup_started(server))
            case Fill():
                self._fill(order)
            case Promote(server=server, term=term) | DropBackup(server=server, term=term):
                node = self.nodes[server]
                if node.answers and node.part.change(Role.ALONE, term):
                    node.backup_link = None
                    self._acknowledge(node)

    def _fill(self, order: Fill) -> None:
        primary, backup = self.nodes[order.primary], self.nodes[order.backup]
        if not (primary.answers and backup.answers) or primary.unacknowledged:
            return  # a primary that waits for its old backup has the lock
        if primary.part.role is Role.BACKUP or primary.part.term >= order.term:
            return
        if backup.part.change(Role.BACKUP, order.term):
            backup.updates = list(primary.updates)
            primary.part.change(Role.PRIMARY, order.term)
            primary.backup_link = order.backup
            self.confirmed.append((order.backup, order.term))

    @rule()
    def replace_manager(self) -> None:
        """Replace the manager; orders of the earlier one may still arrive."""
        if self.group.broken is not None:
            return
        self.managers += 1
        reports = [
            ServerReport(name, 0, node.part.role, node.part.term, node.backup_link)
            for name, node in self.nodes.items()
            if node.answers
        ]
        self.group = ServerGroup(1)
        for useless in self.group.adopt(reports, self.nodes, self.managers):
            self.nodes[useless].up = False
        self.confirmed.clear()
        if self.group.broken is None:
            self._enqueue(self.group.start_backups())

    @rule(data=st.data())
    def confirm(self, data: st.DataObject) -> None:
        if self.confirmed:
            self.group.backup_filled(*data.draw(st.sampled_from(self.confirmed)))

    @invariant()
    def no_acknowledged_update_is_lost(self) -> None:
        assignment = self.group.assignments[0]
        if self.group.broken is not None:
            return
        replicas = [assignment.primary] + (
            [assignment.backup] if assignment.ready and assignment.backup else []
        )
        for name in replicas:
            updates = self.nodes[name].updates
            assert updates[: len(self.acknowledged)] == self.acknowledged

    @invariant()
    def primary_with_ready_backup_is_not_alone(self) -> None:
        assignment = self.group.assignments[0]
        if self.group.broken is None and assignment.ready:
            assert self.nodes[assignment.primary].part.role is Role.PRIMARY

    @invariant()
    def at_most_one_server_can_acknowledge(self) -> None:
        candidates = []
        for name, node in self.nodes.items():
            backup_link = self.nodes[node.backup_link] if node.backup_link else None
            fits = backup_link is not None and (backup_link.part.role, backup_link.part.term) == (
                Role.BACKUP,
                node.part.term,
            )
            if node.up and (
                node.part.role is Role.ALONE or (node.part.role is Role.PRIMARY and fits)
            ):
                candidates.append(name)
        assert len(candidates) <= 1, candidates


Losses.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestLosses = Losses.TestCase
