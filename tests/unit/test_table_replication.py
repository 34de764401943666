"""Embedding tables that are kept twice: a lost server costs no step, and no bit."""

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
from local_run import Attempt, LocalRun, impatient, train
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
ROADS = [pytest.param(HERE, id="near"), pytest.param(ELSEWHERE, id="far")]
RULES = ["SGD", "Adagrad", "RowWiseAdagrad", "SparseAdam"]


def job(
    world: int = WORLD, rule: str = "SparseAdam", strategy: Any = "ring", **embeddings: Any
) -> Job:
    fields = {"optimizer": {"name": rule, "lr": 0.1}, "replication": 2, **embeddings}
    schedule = {"name": "linear", "final_factor": 0.5}
    more = {"embeddings": fields, "steps": STEPS, "lr_schedule": schedule}
    more["failure"] = {"heartbeat_timeout_s": 1}
    return job_of(strategy, world, global_batch_size=12, **more)


def plan(attempt: int = 0, **how: Any) -> TablePlan:
    return plan_of(job(**how), "run", attempt, SPECS, STEPS, rewinds=True, checkpoint_every=2)


def gradients(rank: int, step: int) -> list[RowGradients]:
    """Some rows of both tables; of the second one not in every step."""
    random = np.random.default_rng([rank, step])
    found = []
    for table in range(1 + step % 2):
        ids = np.sort(random.choice(ROWS, 7, replace=False))
        found.append(RowGradients(table, ids, random.standard_normal((7, WIDTH)).astype("f4")))
    return found


def push(to: TableServer, rank: int, step: int, attempt: int = 0) -> None:
    """Push; of a synchronous step only the last rank's call may be made from one thread."""
    name = PushId("run", attempt, rank, step)
    if to.store.ledger.asynchronous or rank == WORLD - 1:
        to.add(name, gradients(rank, step))
    else:
        to.store.push(name, gradients(rank, step), RowControl(skip=False))


def steps(of: TableServer, first: int, last: int, attempt: int = 0) -> None:
    for step in range(first, last):
        for rank in range(WORLD):
            push(of, rank, step, attempt)


def opened(of: TablePlan) -> TableServer:
    made = TableServer("primary", 0)
    made.open(of)
    made.begin(0, 0)
    return made


def backed(primary: TableServer) -> tuple[TableServer, InMemoryBackup]:
    """Give it a backup, as it is now."""
    backup = TableServer("backup", 7)
    backup_link = InMemoryBackup(primary.store, backup.store)
    primary.store.backup_link = backup_link
    return backup, backup_link


def bits(of: TableServer) -> bytes:
    """Give all that matters later."""
    found = []
    for table in of.store.tables:
        columns = table.copy()
        order = np.argsort(columns.pop("ids"))
        found += [columns[name][order].tobytes() for name in sorted(columns)]
        found += [table.ids().tobytes(), bytes([table.updates])]
    return b"".join(found)


@pytest.mark.sweep(3)
@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("filled_at", [0, 2])
@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("rule", RULES)
def test_a_promoted_backup_has_the_bits_of_a_run_without_a_loss(
    rule: str, moment: str, filled_at: int, asynchronous: bool
) -> None:
    of = plan(rule=rule, asynchronous=asynchronous)
    whole, primary = opened(of), opened(of)
    steps(whole, 0, STEPS)
    steps(primary, 0, filled_at)
    backup, backup_link = backed(primary)
    backup_link.dies = LOST_AT * (WORLD if asynchronous else 1), moment
    with pytest.raises(ActorLost):
        steps(primary, filled_at, STEPS)
    backup.open(of)
    steps(backup, LOST_AT, STEPS)  # every rank makes the push again that nobody has acknowledged
    assert bits(backup) == bits(whole)
    assert backup.take_copies(STEPS, 0.0)[0] == STEPS


@pytest.mark.parametrize("loss", ["before the new attempt", "after its first step"])
@pytest.mark.parametrize("filled", ["before the step", "after the step"])
def test_a_step_is_taken_back_at_the_backup_too(filled: str, loss: str) -> None:
    whole, primary = opened(plan()), opened(plan())
    steps(whole, 0, STEPS)
    steps(primary, 0, LOST_AT)
    if filled == "before the step":
        backup, _ = backed(primary)
        steps(primary, LOST_AT, LOST_AT + 1)
    else:
        steps(primary, LOST_AT, LOST_AT + 1)
        backup, _ = backed(primary)
    primary.open(plan(1))
    if loss != "before the new attempt":
        primary.begin(1, LOST_AT)
        steps(primary, LOST_AT, LOST_AT + 1, attempt=1)
    assert backup.open(plan(1)) == LOST_AT + 1
    backup.begin(1, LOST_AT + (loss != "before the new attempt"))
    steps(backup, backup.store.ledger.steps, STEPS, attempt=1)
    assert bits(backup) == bits(whole)


def test_a_backup_hears_of_another_number_of_ranks() -> None:
    """Whole steps of asynchronous tables are counted in the parts of the new world."""
    primary = opened(plan(asynchronous=True))
    backup, _ = backed(primary)
    steps(primary, 0, 2)
    primary.open(plan(1, world=3, asynchronous=True))
    ledger = backup.store.ledger
    assert (ledger.attempt, ledger.steps, ledger.updates, ledger.world) == (1, 2, 6, 3)


def test_a_snapshot_travels_and_shares_nothing() -> None:
    first, second = opened(plan()), TableServer("second", 1)
    steps(first, 0, 2)
    second.store.load_snapshot(pickle.loads(pickle.dumps(first.store.snapshot())))  # noqa: S301
    assert bits(second) == bits(first) and second.store.index == 0
    before = bits(second)
    steps(first, 2, 3)
    assert bits(second) == before


def test_who_may_not_acknowledge_serves_no_more() -> None:
    primary = opened(plan())
    _, backup_link = backed(primary)
    backup_link.dies = 0, MOMENTS[2]
    with pytest.raises(ActorLost):
        steps(primary, 0, 1)
    calls: list[Callable[[], object]] = [
        lambda: primary.open(plan(1)),
        lambda: primary.begin(0, 1),
        lambda: primary.add(PushId("run", 0, 0, 1), gradients(0, 1)),
    ]
    for call in calls:
        with pytest.raises(ProtocolError, match="primary no longer serves"):
            call()


@pytest.fixture
def make() -> Iterator[Callable[..., TableServers]]:
    """Make servers, which end with the test."""
    made = []

    def new(**how: Any) -> TableServers:
        made.append(TableServers(impatient(job(**how), 10.0), rewinds=True))
        return made[-1]

    yield new
    for servers in made:
        servers.close()


def wait_for_backups(servers: TableServers) -> None:
    until = time.monotonic() + 10
    manager = servers.manager
    while manager is not None and not all(
        assignment.ready for assignment in manager.body.table_assignments()
    ):
        assert time.monotonic() < until
        time.sleep(0.01)


def make_steps(tables: RemoteTables, told: TablePlan, rank: int) -> list[bytes]:
    """Look rows up and push gradients of them; give what was looked up."""
    seen = []
    for step in range(STEPS):
        routed = []
        for one in gradients(rank, step):
            ids, order = route(told, SPECS[one.table], one.ids)
            values = one.values if order is None else one.values[order]
            seen.append(tables.pull(one.table, ids, keep=True).tobytes())
            routed.append((ids, RowGradients(one.table, ids.ids, values)))
        tables.push(step, routed).wait()
    return seen


@pytest.mark.sweep(4)
@pytest.mark.parametrize("method", ["update", "pull", "push", "begin"])
@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("node", ROADS)
def test_workers_follow_a_promoted_backup(
    make: Callable[..., TableServers],
    monkeypatch: pytest.MonkeyPatch,
    node: str,
    asynchronous: bool,
    moment: Any,
    method: str,
) -> None:
    """A primary dies in the middle of a call, or of an update that it has its backup make."""
    monkeypatch.setattr(retrying_calls, "RETRY_PAUSE_S", 0.0)
    world = 1 if asynchronous else WORLD
    servers = make(world=world, servers=2, asynchronous=asynchronous)
    if method == "begin":
        inject(servers.cluster, method, Fault(kill=moment), actor="embedding-server-0")

    def before(rank: int) -> None:
        if method != "begin" and rank == 0:
            add_rule(servers.cluster, dying(servers, method, moment))

    assert run(servers, world, node, before) == undisturbed(world, asynchronous)
    assert servers.nodes[0].died


def test_no_order_overtakes_a_promotion(
    make: Callable[..., TableServers], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next backup is there, and to be filled, while the promotion is still on its way."""
    monkeypatch.setattr(retrying_calls, "RETRY_PAUSE_S", 0.0)
    servers = make(world=WORLD, servers=2)
    inject(servers.cluster, "promote", Fault(delay_s=1.0))

    def before(rank: int) -> None:
        if rank == 0:
            add_rule(servers.cluster, dying(servers, "push", "before"))

    assert run(servers, WORLD, HERE, before) == undisturbed(WORLD, False)
    wait_for_backups(servers)
    assert servers.manager is not None
    assignments = [
        (assignment.primary, assignment.backup)
        for assignment in servers.manager.body.table_assignments()
    ]
    assert assignments == [  # one server was lost, and not the promoted one after it
        ("embedding-server-2", "embedding-server-4"),
        ("embedding-server-1", "embedding-server-3"),
    ]


@cache
def undisturbed(world: int, asynchronous: bool) -> list[Any]:
    servers = TableServers(job(world, servers=2, asynchronous=asynchronous, replication=1))
    try:
        return run(servers, world, HERE)
    finally:
        servers.close()


def run(
    servers: TableServers,
    world: int,
    node: str,
    before: Callable[[int], object] = lambda rank: None,
) -> list[Any]:
    """Make all steps; give what each rank has looked up, and the tables at the end."""

    def body(rank: int) -> list[bytes]:
        tables = servers.tables(rank, node=node)
        told, _ = tables.connect(SPECS, STEPS)
        wait_for_backups(servers)
        tables.begin(0)
        before(rank)
        return make_steps(tables, told, rank)

    seen = on_ranks(world, body)
    return [*seen, *(table_rows(servers, number, ROWS).tobytes() for number in range(2))]


def dying(servers: TableServers, method: str, moment: str) -> Callable[[Call], Fault | None]:
    """Have the first server die in the second such call."""
    primary, counted = servers.nodes[0], []

    def rule(call: Call) -> Fault | None:
        who = call.process if method == "update" else call.actor
        if (who, call.method) != (primary.name, method):
            return None
        counted.append(call)
        if len(counted) != 2:
            return None
        if method != "update":
            return Fault(kill=moment)  # type: ignore[arg-type]
        if moment == "before":
            primary.die("before the update is sent")
            return Fault(lose="request")
        threading.Timer(0.05, primary.die, ["the backup has made it"]).start()
        return Fault(reply_delay_s=0.2)

    return rule


class _WithALoss(Attempt):
    """A primary of the tables is killed in the middle of the run."""

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
def test_a_lost_server_of_tables_costs_no_step(strategy: Any, embeddings: dict[str, Any]) -> None:
    world = 1 if embeddings.get("asynchronous") else WORLD
    spec = job(world, strategy=strategy, **embeddings)
    whole = train(spec, Words)
    run = LocalRun(spec, Words)
    attempt = _WithALoss(run)
    assert attempt.make() and run.tables.nodes[0].died
    run.close()
    for name, value in whole.parameters().items():
        assert np.array_equal(value.numpy(), run.parameters()[name].numpy()), name
    for number in range(2):
        mine, theirs = (table_rows(one.tables, number, 40) for one in (run, whole))
        assert np.array_equal(mine, theirs, equal_nan=True)


def test_a_frozen_server_is_replaced(make: Callable[..., TableServers]) -> None:
    servers = make(world=1, servers=2)

    def freeze(rank: int) -> None:
        assert servers.manager is not None
        heartbeats, until = servers.manager.body._tables._heartbeats, time.monotonic() + 10
        while not heartbeats.has_answered("embedding-server-0"):  # who starts is given time
            assert time.monotonic() < until
            time.sleep(0.01)
        for method in ("poll", "pull", "push"):
            inject(servers.cluster, method, Fault(delay_s=1e6), actor="embedding-server-0")

    assert run(servers, 1, HERE, freeze) == undisturbed(1, False)
    assert servers.nodes[0].died, "it may wake up"


def test_a_manager_that_follows_a_lost_one_knows_who_keeps_what(
    make: Callable[..., TableServers],
) -> None:
    servers = make(world=1, servers=2)
    tables = servers.tables(0)
    told, _ = tables.connect(SPECS, STEPS)
    wait_for_backups(servers)
    tables.begin(0)
    make_steps(tables, told, 0)
    assert servers.manager is not None
    servers.nodes[0].die("killed by the test")
    before = servers.manager.body.table_servers(1, 10.0)
    servers.manager.die("killed by the test")
    with pytest.raises(ActorLost, match="server-manager was lost"):
        make_steps(tables, told, 0)
    servers.make_manager(adopts=True)
    wait_for_backups(servers)
    assert servers.manager.body.table_servers(0, 0.0).names == before.names
    again = servers.tables(0, attempt=1)
    assert again.connect(SPECS, STEPS)[1] == STEPS


def test_without_a_backup_a_loss_is_raised(make: Callable[..., TableServers]) -> None:
    servers = make(world=1, replication=1)
    tables = servers.tables(0)
    told, _ = tables.connect(SPECS, STEPS)
    tables.begin(0)
    servers.nodes[0].die("killed by the test")
    with pytest.raises(ActorLost, match="embedding-server-0 was lost"):
        make_steps(tables, told, 0)
