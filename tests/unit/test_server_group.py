"""What the server manager decides: tables of orders, and random losses that must lose nothing."""

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


def running(shards: int = 1) -> ServerGroup:
    """A group whose backups are all ready."""
    group = ServerGroup(shards)
    for order in group.start_backups():
        assert isinstance(order, MakeBackup)
        for fill in group.backup_started(order.server):
            assert isinstance(fill, Fill)
            group.backup_filled(fill.backup, fill.term)
    return group


def test_every_shard_gets_a_backup_on_another_node() -> None:
    group = ServerGroup(2)
    assert group.start_backups() == [
        MakeBackup(0, "server-2", "server-0"),
        MakeBackup(1, "server-3", "server-1"),
    ]
    assert group.backup_started("server-3") == [Fill(1, "server-1", "server-3", 2)]
    assert sorted(group.servers) == ["server-0", "server-1", "server-2", "server-3"]


def test_a_lost_primary_is_followed_by_its_backup() -> None:
    group = running()
    assert group.server_lost("server-0") == [
        Promote(0, "server-1", 3),
        MakeBackup(0, "server-2", "server-1"),
    ]
    assert (group.version, group.broken, group.assignments[0].primary) == (2, None, "server-1")
    assert group.server_lost("server-0") == []  # told twice
    assert group.backup_started("server-2") == [Fill(0, "server-1", "server-2", 4)]


def test_a_lost_backup_is_made_again_and_the_map_stays() -> None:
    group = running()
    assert group.server_lost("server-1") == [
        DropBackup(0, "server-0", 3),
        MakeBackup(0, "server-2", "server-0"),
    ]
    assert group.version == 1


@pytest.mark.parametrize("filled", [False, True])
def test_a_backup_is_promoted_only_once_it_is_filled(filled: bool) -> None:
    group = ServerGroup(1)
    group.start_backups()
    (fill,) = group.backup_started("server-1")
    assert isinstance(fill, Fill)
    if filled:
        group.backup_filled(fill.backup, fill.term)
    group.server_lost("server-0")
    assert group.broken == (None if filled else "server-0")


def test_word_of_an_earlier_term_makes_nothing_ready() -> None:
    group = running()
    group.server_lost("server-1")
    group.backup_filled("server-1", 2)
    group.backup_started("server-2")
    group.backup_filled("server-2", 2)
    assert not group.assignments[0].ready


def test_a_crash_loop_of_backups_ends() -> None:
    group = ServerGroup(1)
    orders = group.start_backups()
    made = 0
    while orders and isinstance(orders[-1], MakeBackup):
        orders = group.server_lost(orders[-1].server)
        made += 1
    assert made == MAX_LOSSES
    assert orders == [DropBackup(0, "server-0", 2)]  # it need not wait for its first one any more


def test_a_part_refuses_what_is_not_its_own() -> None:
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
    ("held", "primary", "useless"),
    [
        # a pair: the primary has everything, and its backup is made anew
        (
            [
                ServerReport("server-0", 0, PRIMARY, 2, "server-1"),
                ServerReport("server-1", 0, BACKUP, 2),
            ],
            "server-0",
            ["server-1"],
        ),
        # a promoted backup, and the primary before it, which was only frozen
        (
            [
                ServerReport("server-0", 0, PRIMARY, 2, "server-1"),
                ServerReport("server-1", 0, ALONE, 3),
            ],
            "server-1",
            ["server-0"],
        ),
        # a backup that was being started
        (
            [ServerReport("server-0", 0, ALONE, 5), ServerReport("server-3", None)],
            "server-0",
            ["server-3"],
        ),
        # a primary whose backup does not answer may have been replaced by it
        ([ServerReport("server-0", 0, PRIMARY, 2, "server-1")], None, ["server-0"]),
        # a backup by itself may lack what the primary did after it was given up
        ([ServerReport("server-1", 0, BACKUP, 2)], None, ["server-1"]),
        ([], None, []),
        # no worker has come yet
        (
            [ServerReport("server-0", None), ServerReport("server-1", None)],
            "server-0",
            ["server-1"],
        ),
        # another server has the shard: the first one lost it
        (
            [ServerReport("server-0", None), ServerReport("server-1", 0, BACKUP, 2)],
            None,
            ["server-1"],
        ),
    ],
)
def test_a_manager_that_follows_another_asks_the_servers(
    held: list[ServerReport], primary: str | None, useless: list[str]
) -> None:
    group = ServerGroup(1)
    dropped = group.adopt(held, ["server-0", "server-1", "server-3"], generation=2)
    if primary is None:
        assert group.broken == "server-0"
        return
    assert (group.broken, group.assignments[0].primary, dropped) == (None, primary, useless)
    term = group.assignments[0].term
    make = MakeBackup(0, "server-4", primary)  # a name that nobody had before
    if held[0].shard is None:
        assert (term, group.start_backups()) == (1, [make])
    else:
        assert term > max(one.term for one in held) + 1000
        assert group.start_backups() == [DropBackup(0, primary, term), make]


@dataclass
class Node:
    """A server with its updates; `owed` are applied and not yet acknowledged."""

    part: ReplicaState
    updates: list[int] = field(default_factory=list)
    owed: list[int] = field(default_factory=list)
    backup_link: str | None = None
    up: bool = True
    frozen: bool = False

    @property
    def answers(self) -> bool:
        return self.up and not self.frozen


class Losses(RuleBasedStateMachine):
    """
    Servers die, freeze, wake, are suspected though they live; orders come late and twice.

    Workers push to any server that would take it, also to one that was replaced.
    """

    def __init__(self) -> None:
        super().__init__()
        self.group = ServerGroup(1)
        self.nodes = {"server-0": Node(ReplicaState(Role.WAITING))}
        self.orders: list[Order] = []
        self.confirmed: list[tuple[str, int]] = []
        self.acknowledged: list[int] = []
        self.count = self.managers = 0
        self._begin(self.group.start_backups())

    def _begin(self, orders: list[Order]) -> None:
        for order in orders:
            if isinstance(order, MakeBackup):
                self.nodes[order.server] = Node(ReplicaState(Role.BACKUP))
            self.orders.append(order)

    def _update(self, node: Node) -> bool:
        """Bring the node's backup up to date; whether it may acknowledge."""
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
        if not node.answers or node.part.role is Role.BACKUP or node.owed:
            return
        if not node.part.settled:
            return
        self.count += 1
        node.updates.append(self.count)
        node.owed.append(self.count)
        self._settle(node)

    def _settle(self, node: Node) -> None:
        if node.owed and self._update(node):
            self.acknowledged += node.owed
            node.owed.clear()

    @rule(data=st.data(), what=st.sampled_from(["kill", "freeze", "wake"]))
    def happen(self, data: st.DataObject, what: str) -> None:
        node = self.nodes[data.draw(st.sampled_from(sorted(self.nodes)))]
        if what == "kill":
            node.up = False
        else:
            node.frozen = what == "freeze"
            if node.answers:
                self._settle(node)

    @rule(data=st.data())
    def suspect(self, data: st.DataObject) -> None:
        """Rightly or not: a server that is cut off may live."""
        if self.group.broken is None:
            self._begin(self.group.server_lost(data.draw(st.sampled_from(self.group.servers))))

    @rule(data=st.data(), again=st.booleans())
    def carry_out(self, data: st.DataObject, again: bool) -> None:
        if not self.orders:
            return
        order = data.draw(st.sampled_from(self.orders))
        if not again:
            self.orders.remove(order)
        self._carry_out(order)

    @rule()
    def calm(self) -> None:
        """Everything on its way arrives: later losses then meet a group that is whole again."""
        self.late, orders = self.orders[-1:], self.orders
        self.orders = []
        for order in orders:
            self._carry_out(order)
        while self.orders:
            self._carry_out(self.orders.pop(0))
        for word in self.confirmed:
            self.group.backup_filled(*word)
        self.orders = self.late  # one of them comes once more, much later

    def _carry_out(self, order: Order) -> None:
        match order:
            case MakeBackup(server=server):
                self._begin(self.group.backup_started(server))
            case Fill():
                self._fill(order)
            case Promote(server=server, term=term) | DropBackup(server=server, term=term):
                node = self.nodes[server]
                if node.answers and node.part.change(Role.ALONE, term):
                    node.backup_link = None
                    self._settle(node)

    def _fill(self, order: Fill) -> None:
        primary, backup = self.nodes[order.primary], self.nodes[order.backup]
        if not (primary.answers and backup.answers) or primary.owed:
            return  # a primary that waits for its old backup holds its lock
        if primary.part.role is Role.BACKUP or primary.part.term >= order.term:
            return
        if backup.part.change(Role.BACKUP, order.term):
            backup.updates = list(primary.updates)
            primary.part.change(Role.PRIMARY, order.term)
            primary.backup_link = order.backup
            self.confirmed.append((order.backup, order.term))

    @rule()
    def lose_the_manager(self) -> None:
        """Another one follows; what the first has sent may still come."""
        if self.group.broken is not None:
            return
        self.managers += 1
        held = [
            ServerReport(name, 0, node.part.role, node.part.term, node.backup_link)
            for name, node in self.nodes.items()
            if node.answers
        ]
        self.group = ServerGroup(1)
        for useless in self.group.adopt(held, self.nodes, self.managers):
            self.nodes[useless].up = False
        self.confirmed.clear()
        if self.group.broken is None:
            self._begin(self.group.start_backups())

    @rule(data=st.data())
    def confirm(self, data: st.DataObject) -> None:
        if self.confirmed:
            self.group.backup_filled(*data.draw(st.sampled_from(self.confirmed)))

    @invariant()
    def nothing_acknowledged_is_lost(self) -> None:
        assignment = self.group.assignments[0]
        if self.group.broken is not None:
            return
        keepers = [assignment.primary] + (
            [assignment.backup] if assignment.ready and assignment.backup else []
        )
        for name in keepers:
            kept = self.nodes[name].updates
            assert kept[: len(self.acknowledged)] == self.acknowledged

    @invariant()
    def who_has_a_ready_backup_does_not_go_on_alone(self) -> None:
        assignment = self.group.assignments[0]
        if self.group.broken is None and assignment.ready:
            assert self.nodes[assignment.primary].part.role is Role.PRIMARY

    @invariant()
    def one_at_most_can_acknowledge(self) -> None:
        able = []
        for name, node in self.nodes.items():
            backup_link = self.nodes[node.backup_link] if node.backup_link else None
            fits = backup_link is not None and (backup_link.part.role, backup_link.part.term) == (
                Role.BACKUP,
                node.part.term,
            )
            if node.up and (
                node.part.role is Role.ALONE or (node.part.role is Role.PRIMARY and fits)
            ):
                able.append(name)
        assert len(able) <= 1, able


Losses.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestLosses = Losses.TestCase
