"""Replicated embedding tables: after the loss of a server no step is lost, bit-identical."""

import pickle
import threading
import time
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import numpy as np
import pytest
from call_faults import Call, Fault, add_rule, inject
from dying_backup import MOMENTS, InMemoryBackup
from jobs import job_of
from local_run import Attempt, LocalRun, train, with_timeouts
from local_servers import ELSEWHERE, TableServers
from rank_threads import on_ranks
from table_rows import table_rows
from words import Words

from distplat.actors import retrying_calls
from distplat.actors.local_actors import HERE
from distplat.actors.servers.tables import RemoteTables
from distplat.platform.errors import ActorLost, ProtocolError
from distplat.platform.ledger import PushId
from distplat.platform.shard_map import TablePlan, TableSpec, plan_of
from distplat.platform.spec import Job
from distplat.platform.stop_order import StopOrder
from distplat.strategies.server.table_store import RowControl, TableServer
from distplat.strategies.sparse.routing import route
from distplat.strategies.sparse.table import RowGradients

ROWS, WIDTH, STEPS, LOST_AT, WORLD = 40, 3, 6, 3, 2
SPECS = (TableSpec("a", ROWS, WIDTH, 1.0), TableSpec("b", None, WIDTH, 1.0))
NODES = [pytest.param(HERE, id="near"), pytest.param(ELSEWHERE, id="far")]
RULES = ["SGD", "Adagrad", "RowWiseAdagrad", "SparseAdam"]


def job(
    world: int = WORLD, rule: str = "SparseAdam", strategy: Any = "ring", **embeddings: Any
) -> Job:
    fields = {"optimizer": {"name": rule, "lr": 0.1}, "replication": 2, **embeddings}
    schedule = {"name": "linear", "final_factor": 0.5}
    more = {"embeddings": fields, "steps": STEPS, "lr_schedule": schedule}
    more["failure"] = {"heartbeat_timeout_s": 1}
    return job_of(strategy, world, global_batch_size=12, **more)


def plan(attempt: int = 0, **fields: Any) -> TablePlan:
    return plan_of(job(**fields), "run", attempt, SPECS, STEPS, rewinds=True, checkpoint_every=2)


def gradients(rank: int, step: int) -> list[RowGradients]:
    """Return gradients of some rows; the second table has some in every second step."""
    rng = np.random.default_rng([rank, step])
    gradients_ = []
    for table in range(1 + step % 2):
        ids = np.sort(rng.choice(ROWS, 7, replace=False))
        gradients_.append(RowGradients(table, ids, rng.standard_normal((7, WIDTH)).astype("f4")))
    return gradients_


def push(server: TableServer, rank: int, step: int, attempt: int = 0) -> None:
    """Push; a synchronous step may complete only in the call of the last rank."""
    push_id = PushId("run", attempt, rank, step)
    if server.store.ledger.asynchronous or rank == WORLD - 1:
        server.add(push_id, gradients(rank, step))
    else:
        server.store.push(push_id, gradients(rank, step), RowControl(skip=False))


def run_steps(server: TableServer, first: int, last: int, attempt: int = 0) -> None:
    for step in range(first, last):
        for rank in range(WORLD):
            push(server, rank, step, attempt)


def open_server(spec: TablePlan) -> TableServer:
    server = TableServer("primary", 0)
    server.open(spec)
    server.begin(0, 0)
    return server


def add_backup(primary: TableServer) -> tuple[TableServer, InMemoryBackup]:
    """Create a backup with the current state of the primary."""
    backup = TableServer("backup", 7)
    backup_link = InMemoryBackup(primary.store, backup.store)
    primary.store.backup_link = backup_link
    return backup, backup_link


def state_of(server: TableServer) -> bytes:
    """Return the contents of all tables as bytes."""
    contents = []
    for table in server.store.tables:
        columns = table.copy()
        order = np.argsort(columns.pop("ids"))
        contents += [columns[name][order].tobytes() for name in sorted(columns)]
        contents += [table.ids().tobytes(), bytes([table.updates])]
    return b"".join(contents)


@pytest.mark.sweep(3)
@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("filled_at", [0, 2])
@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("rule", RULES)
def test_promoted_backup_is_bit_identical(
    rule: str, moment: str, filled_at: int, asynchronous: bool
) -> None:
    table_plan = plan(rule=rule, asynchronous=asynchronous)
    expected, primary = open_server(table_plan), open_server(table_plan)
    run_steps(expected, 0, STEPS)
    run_steps(primary, 0, filled_at)
    backup, backup_link = add_backup(primary)
    backup_link.death = LOST_AT * (WORLD if asynchronous else 1), moment
    with pytest.raises(ActorLost):
        run_steps(primary, filled_at, STEPS)
    backup.open(table_plan)
    run_steps(backup, LOST_AT, STEPS)  # each rank repeats its unacknowledged push
    assert state_of(backup) == state_of(expected)
    assert backup.take_copies(STEPS, 0.0)[0] == STEPS


def test_backup_filled_within_a_step_takes_every_push() -> None:
    expected, primary = open_server(plan()), open_server(plan())
    run_steps(expected, 0, STEPS)
    run_steps(primary, 0, LOST_AT)
    push(primary, 0, LOST_AT)
    backup, _ = add_backup(primary)
    backup.open(plan())  # the primary is lost now
    run_steps(backup, LOST_AT, STEPS)
    assert state_of(backup) == state_of(expected)


@pytest.mark.parametrize("loss", ["before the new attempt", "after its first step"])
@pytest.mark.parametrize("filled", ["before the step", "after the step"])
def test_backup_rewinds_step_of_new_attempt(filled: str, loss: str) -> None:
    expected, primary = open_server(plan()), open_server(plan())
    run_steps(expected, 0, STEPS)
    run_steps(primary, 0, LOST_AT)
    if filled == "before the step":
        backup, _ = add_backup(primary)
        run_steps(primary, LOST_AT, LOST_AT + 1)
    else:
        run_steps(primary, LOST_AT, LOST_AT + 1)
        backup, _ = add_backup(primary)
    primary.open(plan(1))
    if loss != "before the new attempt":
        primary.begin(1, LOST_AT)
        run_steps(primary, LOST_AT, LOST_AT + 1, attempt=1)
    assert backup.open(plan(1)) == LOST_AT + 1
    backup.begin(1, LOST_AT + (loss != "before the new attempt"))
    run_steps(backup, backup.store.ledger.steps, STEPS, attempt=1)
    assert state_of(backup) == state_of(expected)


def test_backup_receives_new_world() -> None:
    """Completed steps of asynchronous tables are converted to parts of the new world."""
    primary = open_server(plan(asynchronous=True))
    backup, _ = add_backup(primary)
    run_steps(primary, 0, 2)
    primary.open(plan(1, world=3, asynchronous=True))
    ledger = backup.store.ledger
    assert (ledger.attempt, ledger.steps, ledger.updates, ledger.world) == (1, 2, 6, 3)


def test_snapshot_is_picklable_and_independent() -> None:
    first, second = open_server(plan()), TableServer("second", 1)
    run_steps(first, 0, 2)
    second.store.load_snapshot(pickle.loads(pickle.dumps(first.store.snapshot())))  # noqa: S301
    assert state_of(second) == state_of(first) and second.store.index == 0
    before = state_of(second)
    run_steps(first, 2, 3)
    assert state_of(second) == before


def test_primary_without_acknowledgement_stops_serving() -> None:
    primary = open_server(plan())
    _, backup_link = add_backup(primary)
    backup_link.death = 0, MOMENTS[2]
    with pytest.raises(ActorLost):
        run_steps(primary, 0, 1)
    calls: list[Callable[[], object]] = [
        lambda: primary.open(plan(1)),
        lambda: primary.begin(0, 1),
        lambda: primary.add(PushId("run", 0, 0, 1), gradients(0, 1)),
    ]
    for call in calls:
        with pytest.raises(ProtocolError, match="primary no longer serves"):
            call()


@pytest.fixture
def make_table_servers() -> Iterator[Callable[..., TableServers]]:
    """Return a factory of servers, which are closed after the test."""
    all_servers = []

    def make_servers(**fields: Any) -> TableServers:
        all_servers.append(TableServers(with_timeouts(job(**fields), 10.0), rewinds=True))
        return all_servers[-1]

    yield make_servers
    for servers in all_servers:
        servers.close()


def wait_for_backups(servers: TableServers) -> None:
    deadline = time.monotonic() + 10
    manager = servers.manager
    while manager is not None and not all(
        assignment.ready for assignment in manager.body.table_assignments()
    ):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def pull_and_push(tables: RemoteTables, table_plan: TablePlan, rank: int) -> list[bytes]:
    """Pull rows and push their gradients in each step; return the pulled rows."""
    pulled = []
    for step in range(STEPS):
        routed = []
        for row_gradients in gradients(rank, step):
            ids, order = route(table_plan, SPECS[row_gradients.table], row_gradients.ids)
            values = row_gradients.values if order is None else row_gradients.values[order]
            pulled.append(tables.pull(row_gradients.table, ids, keep=True).tobytes())
            routed.append((ids, RowGradients(row_gradients.table, ids.ids, values)))
        tables.push(step, routed).wait()
    return pulled


@pytest.mark.sweep(8)
@pytest.mark.parametrize("method", ["update", "pull", "push", "begin"])
@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("node", NODES)
def test_workers_use_promoted_backup(
    make_table_servers: Callable[..., TableServers],
    monkeypatch: pytest.MonkeyPatch,
    node: str,
    asynchronous: bool,
    moment: Any,
    method: str,
) -> None:
    """A primary dies during a call, or during the update of its backup."""
    monkeypatch.setattr(retrying_calls, "RETRY_PAUSE_S", 0.0)
    world = 1 if asynchronous else WORLD
    servers = make_table_servers(world=world, servers=2, asynchronous=asynchronous)
    if method == "begin":
        inject(servers.cluster, method, Fault(kill=moment), actor="embedding-server-0")

    def before(rank: int) -> None:
        if method != "begin" and rank == 0:
            add_rule(servers.cluster, kill_at_second_call(servers, method, moment))

    assert run_ranks(servers, world, node, before) == expected_results(world, asynchronous)
    assert servers.nodes[0].died


def test_orders_do_not_overtake_promotion(
    make_table_servers: Callable[..., TableServers], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next backup is ready to be filled while the promotion is delayed."""
    monkeypatch.setattr(retrying_calls, "RETRY_PAUSE_S", 0.0)
    servers = make_table_servers(world=WORLD, servers=2)
    inject(servers.cluster, "promote", Fault(delay_s=1.0))

    def before(rank: int) -> None:
        if rank == 0:
            add_rule(servers.cluster, kill_at_second_call(servers, "push", "before"))

    assert run_ranks(servers, WORLD, HERE, before) == expected_results(WORLD, False)
    wait_for_backups(servers)
    assert servers.manager is not None
    assignments = [
        (assignment.primary, assignment.backup)
        for assignment in servers.manager.body.table_assignments()
    ]
    assert assignments == [  # only one server was lost
        ("embedding-server-2", "embedding-server-4"),
        ("embedding-server-1", "embedding-server-3"),
    ]


@cache
def expected_results(world: int, asynchronous: bool) -> list[Any]:
    servers = TableServers(job(world, servers=2, asynchronous=asynchronous, replication=1))
    try:
        return run_ranks(servers, world, HERE)
    finally:
        servers.close()


def run_ranks(
    servers: TableServers,
    world: int,
    node: str,
    before: Callable[[int], object] = lambda rank: None,
) -> list[Any]:
    """Run all steps; return the pulled rows of each rank, and the final tables."""

    def body(rank: int) -> list[bytes]:
        tables = servers.tables(rank, node=node)
        table_plan, _ = tables.connect(SPECS, STEPS)
        wait_for_backups(servers)
        tables.begin(0)
        before(rank)
        return pull_and_push(tables, table_plan, rank)

    pulled = on_ranks(world, body)
    return [*pulled, *(table_rows(servers, number, ROWS).tobytes() for number in range(2))]


def kill_at_second_call(
    servers: TableServers, method: str, moment: str
) -> Callable[[Call], Fault | None]:
    """Return a rule that kills the first server in the second call of a method."""
    primary, calls = servers.nodes[0], []

    def rule(call: Call) -> Fault | None:
        name = call.process if method == "update" else call.actor
        if (name, call.method) != (primary.name, method):
            return None
        calls.append(call)
        if len(calls) != 2:
            return None
        if method != "update":
            return Fault(kill=moment)  # type: ignore[arg-type]
        if moment == "before":
            primary.die("before the update is sent")
            return Fault(lose="request")
        threading.Timer(0.05, primary.die, ["the backup has applied the update"]).start()
        return Fault(reply_delay_s=0.2)

    return rule


class AttemptWithLostServer(Attempt):
    """Attempt in which a primary of the tables is killed."""

    def __init__(self, run: LocalRun) -> None:
        super().__init__(run)
        self.filled = threading.Event()

    def meanwhile(self) -> None:
        wait_for_backups(self.run.tables)
        self.filled.set()

    def before(self, rank: int, step: int) -> StopOrder:
        if step == LOST_AT and rank == 0:
            self.run.tables.nodes[0].die("killed by the test")
        if step == 1:
            assert self.filled.wait(60)
        return StopOrder.NONE


@pytest.mark.parametrize(
    ("strategy", "embeddings"),
    [
        ("ring", {}),
        ("ps-sync", {"servers": 2}),
        ({"name": "ps-sync", "replication": 2}, {}),
        ("ring", {"asynchronous": True}),
    ],
    ids=str,
)
def test_lost_table_server_repeats_no_step(strategy: Any, embeddings: dict[str, Any]) -> None:
    world = 1 if embeddings.get("asynchronous") else WORLD
    spec = job(world, strategy=strategy, **embeddings)
    expected = train(spec, Words)
    run = LocalRun(spec, Words)
    attempt = AttemptWithLostServer(run)
    assert attempt.make() and run.tables.nodes[0].died
    run.close()
    for name, value in expected.parameters().items():
        assert np.array_equal(value.numpy(), run.parameters()[name].numpy()), name
    for number in range(2):
        actual_rows, expected_rows = (
            table_rows(local_run.tables, number, 40) for local_run in (run, expected)
        )
        assert np.array_equal(actual_rows, expected_rows, equal_nan=True)


def test_frozen_server_is_replaced(make_table_servers: Callable[..., TableServers]) -> None:
    servers = make_table_servers(world=1, servers=2)

    def freeze(rank: int) -> None:
        assert servers.manager is not None
        heartbeats, deadline = servers.manager.body._tables._heartbeats, time.monotonic() + 10
        # Servers have more time until their first reply.
        while not heartbeats.has_answered("embedding-server-0"):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        for method in ("poll", "pull", "push"):
            inject(servers.cluster, method, Fault(delay_s=1e6), actor="embedding-server-0")

    assert run_ranks(servers, 1, HERE, freeze) == expected_results(1, False)
    assert servers.nodes[0].died, "a frozen server may wake up"


def test_new_manager_adopts_table_servers(
    make_table_servers: Callable[..., TableServers],
) -> None:
    servers = make_table_servers(world=1, servers=2)
    tables = servers.tables(0)
    table_plan, _ = tables.connect(SPECS, STEPS)
    wait_for_backups(servers)
    tables.begin(0)
    pull_and_push(tables, table_plan, 0)
    assert servers.manager is not None
    servers.nodes[0].die("killed by the test")
    before = servers.manager.body.table_servers(1, 10.0)
    servers.manager.die("killed by the test")
    with pytest.raises(ActorLost, match="server-manager was lost"):
        pull_and_push(tables, table_plan, 0)
    servers.make_manager(adopts=True)
    wait_for_backups(servers)
    assert servers.manager.body.table_servers(0, 0.0).names == before.names
    new_tables = servers.tables(0, attempt=1)
    assert new_tables.connect(SPECS, STEPS)[1] == STEPS


def test_loss_without_backup_is_raised(make_table_servers: Callable[..., TableServers]) -> None:
    servers = make_table_servers(world=1, replication=1)
    tables = servers.tables(0)
    table_plan, _ = tables.connect(SPECS, STEPS)
    tables.begin(0)
    servers.nodes[0].die("killed by the test")
    with pytest.raises(ActorLost, match="embedding-server-0 was lost"):
        pull_and_push(tables, table_plan, 0)
