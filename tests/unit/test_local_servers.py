"""
Real parameter servers and clients in threads, on one node and on two, with every fault.

Each gradient counts once, even if calls are lost, late or duplicated. Errors name missing workers
and lost servers.
"""

import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from call_faults import Call, Fault, add_rule, drain, inject
from control_records import full_record
from jobs import job_of
from local_run import with_timeouts
from local_servers import ELSEWHERE, Servers, wait_for_backups
from rank_threads import on_ranks
from torch import nn

from distplat.actors import retrying_calls
from distplat.actors.local_actors import HERE
from distplat.actors.local_transport import LocalCluster, LocalTransport
from distplat.actors.servers import fan_out
from distplat.actors.servers.shards import RemoteShards
from distplat.actors.transport import ActorDied
from distplat.platform.errors import Abandoned, ActorLost, DeadlineExceeded, ProtocolError
from distplat.platform.spec import Job
from distplat.strategies.catalog import make_strategy
from distplat.strategies.model.flat import FlatModel
from distplat.strategies.server.server import ServerLimits

SHORT_S = 1.0
"""Deadline that should expire, in seconds, after the other ranks have pushed."""
STEPS = 3
NODES = [pytest.param(HERE, id="near"), pytest.param(ELSEWHERE, id="far")]
ServersFactory = Callable[..., Servers]


def job(
    world: int, servers: int, strategy: str = "ps-sync", replication: int = 1, **fields: Any
) -> Job:
    options = {"num_servers": servers, "replication": replication}
    fields = {
        "optimizer": {"name": "SGD", "lr": 0.5, "momentum": 0.9},
        "steps": STEPS,
        "clip_norm": 1000.0,
        **fields,
    }
    return job_of({"name": strategy, **options}, world, **fields)


@pytest.fixture
def make_servers() -> Iterator[ServersFactory]:
    """Return a factory of servers, which are closed after the test."""
    created = []

    def create(
        world: int, servers: int, limit_s: float = 10.0, backups: str = HERE, **fields: Any
    ) -> Servers:
        spec = job(world, servers, **fields)
        roles = make_strategy(spec).roles(spec)
        created.append(Servers(with_timeouts(spec, limit_s), roles, backups=backups))
        return created[-1]

    yield create
    for servers in created:
        servers.close()


def connect(
    servers: Servers, rank: int, node: str = HERE, *, value: float = 1.0, **options: Any
) -> tuple[RemoteShards, FlatModel]:
    model = nn.Linear(10, 7, bias=False)
    nn.init.constant_(model.weight, value)
    flat, shards = FlatModel(model), servers.shards(rank, STEPS, node=node, **options)
    shards.connect(flat)
    return shards, flat


def connect_all(
    servers: Servers, world: int, node: str = HERE
) -> list[tuple[RemoteShards, FlatModel]]:
    return [connect(servers, rank, node) for rank in range(world)]


def run_steps(client: tuple[RemoteShards, FlatModel], rank: int) -> float | None:
    """Run all steps; return the norm of the last one."""
    shards, flat = client
    norm = None
    for step in range(STEPS):
        flat.grads.fill_(rank + 1.0)
        pushed = shards.push(step, full_record(), task=step)
        assert pushed.total is not None and pushed.total.samples > 0
        norm = pushed.norm
        if norm is not None:
            shards.commit(step, norm)
    return norm


def expected_params(world: int) -> torch.Tensor:
    """Return the parameters after torch's updates with the summed gradients of all ranks."""
    weight = nn.Parameter(torch.ones(70))
    optimizer = torch.optim.SGD([weight], lr=0.5, momentum=0.9)
    for _ in range(STEPS):
        weight.grad = torch.full((70,), sum(rank + 1.0 for rank in range(world)))
        optimizer.step()
    return weight.detach()


@pytest.mark.parametrize("node", NODES)
@pytest.mark.parametrize("servers", [1, 2, 3])
def test_shards_sum_and_update(make_servers: ServersFactory, servers: int, node: str) -> None:
    clients = connect_all(make_servers(2, servers), 2, node)
    norms = on_ranks(2, lambda rank: run_steps(clients[rank], rank))
    if servers > 1:  # a single server computes the norm itself
        assert norms == [pytest.approx(3.0 * 70**0.5)] * 2
    else:
        assert norms == [None, None]
    for _, flat in clients:
        torch.testing.assert_close(flat.params, expected_params(2))


@pytest.mark.parametrize("node", NODES)
def test_all_ranks_start_from_rank_0s_parameters(make_servers: ServersFactory, node: str) -> None:
    servers = make_servers(2, 2)
    flats = on_ranks(2, lambda rank: connect(servers, rank, node, value=1.0 + 4 * rank)[1])
    for flat in flats:
        assert torch.equal(flat.params, torch.ones(70))


def test_worker_shares_the_vector_of_local_synchronous_servers(
    make_servers: ServersFactory,
) -> None:
    """A worker shares the vector of synchronous servers on its node, and no other."""
    for strategy, node, is_shared in [
        ("ps-sync", HERE, True),
        ("ps-sync", ELSEWHERE, False),
        ("ps-async", HERE, False),
    ]:
        servers = make_servers(1, 1, strategy=strategy, clip_norm=None)
        _, flat = connect(servers, 0, node)
        servers.shard_server(0).params.fill_(5.0)
        assert (float(flat.params[0]) == 5.0) is is_shared


@pytest.mark.parametrize("node", NODES)
def test_missing_push_names_the_worker(make_servers: ServersFactory, node: str) -> None:
    servers = make_servers(3, 2)
    clients = connect_all(servers, 3, node)
    for server in servers.shard_servers():
        server._limits = ServerLimits(SHORT_S, SHORT_S)

    def body(rank: int) -> Exception | None:
        try:
            clients[rank][0].push(0, full_record()) if rank != 1 else None
        except Exception as error:
            return error
        return None

    errors = on_ranks(3, body)
    assert errors[1] is None
    for error in (errors[0], errors[2]):
        assert isinstance(error, DeadlineExceeded)
        assert error.what.startswith("push 0 to server-")
        assert error.missing == ("worker-1",)
        assert error.setting == "failure.start_timeout_s", (
            "the start timeout applies to the first step"
        )


@pytest.mark.parametrize("node", NODES)
def test_push_waits_for_a_late_worker(make_servers: ServersFactory, node: str) -> None:
    clients = connect_all(make_servers(2, 1), 2, node)
    pushed = threading.Event()

    def body(rank: int) -> None:
        if rank == 1:
            time.sleep(0.2)
            pushed.set()
        clients[rank][0].push(0, full_record())
        assert pushed.is_set()

    on_ranks(2, body)


@pytest.mark.sweep(3)
@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(Fault(lose="reply"), id="reply"),
        pytest.param(Fault(lose="request"), id="request"),
        pytest.param(Fault(twice=True), id="twice"),
        pytest.param(Fault(delay_s=0.1), id="late"),
    ],
)
@pytest.mark.parametrize(
    ("strategy", "method"),
    [
        (strategy, method)
        for strategy in ("ps-sync", "ps-async")
        for method in ("push", "commit", "pull", "attach", "restore", "join")
        if (strategy, method) != ("ps-async", "commit")  # pushes are applied at once
    ],
)
def test_every_gradient_counts_once(
    make_servers: ServersFactory,
    monkeypatch: pytest.MonkeyPatch,
    strategy: str,
    method: str,
    fault: Fault,
) -> None:
    """The fault affects the first calls of the method, three at most."""
    monkeypatch.setattr(retrying_calls, "RETRY_PAUSE_S", 0.0)
    servers = make_servers(1, 2, strategy=strategy)
    calls: list[Call] = []
    add_rule(servers.cluster, calls.append)
    inject(servers.cluster, method, fault, times=3)
    shards, flat = connect(servers, 0, ELSEWHERE)
    run_steps((shards, flat), 0)
    torch.testing.assert_close(flat.params, expected_params(1))
    assert [service.store.version for service in servers.shard_servers()] == [STEPS, STEPS]
    assert method in {call.method for call in calls}, "the fault was not injected"


def test_lost_listen_call_is_repeated(make_servers: ServersFactory) -> None:
    servers = make_servers(1, 2)
    inject(servers.cluster, "listen", Fault(lose="request"), times=2)
    clients = connect_all(servers, 1)
    run_steps(clients[0], 0)
    torch.testing.assert_close(clients[0][1].params, expected_params(1))


def test_frozen_server_is_named_with_the_setting(
    make_servers: ServersFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    servers = make_servers(1, 2, 60.0)
    shards, flat = connect(servers, 0, ELSEWHERE)
    monkeypatch.setattr(fan_out, "ANSWER_GRACE_S", SHORT_S - 60.0)
    inject(servers.cluster, "push", Fault(delay_s=1e6), actor="server-1")
    with pytest.raises(DeadlineExceeded) as caught:
        run_steps((shards, flat), 0)
    assert (caught.value.what, caught.value.missing) == ("push 0", ("server-1",))
    assert caught.value.setting == "failure.start_timeout_s"


@pytest.mark.parametrize("node", NODES)
@pytest.mark.parametrize("call", ["push", "commit"])
def test_lost_server_is_named(make_servers: ServersFactory, call: str, node: str) -> None:
    servers = make_servers(1, 2)
    shards, _ = connect(servers, 0, node)
    norm = shards.push(0, full_record()).norm
    assert norm is not None
    if call == "push":
        shards.commit(0, norm)
    servers.nodes["server-1"].die("killed by the test")
    calls: dict[str, Callable[[], object]] = {
        "push": lambda: shards.push(1, full_record()),
        "commit": lambda: shards.commit(0, 1.0),
    }
    with pytest.raises(ActorLost, match=r"server-1 was lost.*killed by the test"):
        calls[call]()


@pytest.mark.parametrize("point", ["before", "after"])
def test_server_that_dies_in_a_push_is_named(make_servers: ServersFactory, point: Any) -> None:
    servers = make_servers(1, 2)
    shards, _ = connect(servers, 0, ELSEWHERE)
    inject(servers.cluster, "push", Fault(kill=point), actor="server-0")
    with pytest.raises(ActorLost, match=f"server-0 was lost.*{point} push"):
        shards.push(0, full_record())


def test_different_model_is_refused(make_servers: ServersFactory) -> None:
    servers = make_servers(2, 1)
    connect(servers, 0)
    flat, shards = FlatModel(nn.Linear(3, 3)), servers.shards(1, STEPS)
    with pytest.raises(ProtocolError, match="rank 1 built another model"):
        shards.connect(flat)
    shards.close()  # as the worker does after any error


@pytest.mark.parametrize("node", NODES)
def test_push_ends_when_the_attempt_is_abandoned(make_servers: ServersFactory, node: str) -> None:
    servers, abandoned = make_servers(2, 1), threading.Event()
    shards, _ = connect(servers, 0, node, abandoned=abandoned)
    threading.Timer(0.2, abandoned.set).start()
    with pytest.raises(Abandoned):
        shards.push(0, full_record())


def test_listen_call_ends_when_the_worker_closes(make_servers: ServersFactory) -> None:
    servers = make_servers(1, 2)
    shards, flat = connect(servers, 0)
    run_steps((shards, flat), 0)
    shards.close()
    assert drain(servers.cluster, 5.0)


def test_closed_manager_stops_the_follower_thread(make_servers: ServersFactory) -> None:
    """A thread that still waits for the manager would keep its memory for ten seconds."""
    earlier = threading.enumerate()  # may include threads of other tests
    servers = make_servers(1, 2, replication=2)
    connect(servers, 0)
    manager = servers.manager.body
    followers = [thread for thread in threading.enumerate() if thread.name == "follow"]
    [follower] = [thread for thread in followers if thread not in earlier]
    manager.close()
    follower.join(5.0)  # less than the ten seconds
    assert not follower.is_alive()


DEATH_POINTS = ["before the update is sent", "after the backup has applied it"]


@pytest.mark.sweep(3)
@pytest.mark.parametrize("clip_norm", [1000.0, None], ids=["clips", "commits-at-once"])
@pytest.mark.parametrize("backups", NODES)
@pytest.mark.parametrize("point", DEATH_POINTS)
@pytest.mark.parametrize("node", NODES)
@pytest.mark.parametrize("strategy", ["ps-sync", "ps-async"])
def test_promoted_backup_has_every_update_once(
    make_servers: ServersFactory,
    monkeypatch: pytest.MonkeyPatch,
    strategy: str,
    node: str,
    point: str,
    backups: str,
    clip_norm: float | None,
) -> None:
    """The primary of one shard dies during a step; the worker switches to its backup."""
    options: dict[str, Any] = {"replication": 2, "backups": backups, "clip_norm": clip_norm}
    servers = make_servers(1, 2, strategy=strategy, **options)
    shards, flat = connect(servers, 0, node)
    wait_for_backups(servers)
    primary, updates = servers.nodes["server-0"], []

    def kill_primary(call: Call) -> Fault | None:
        if (call.process, call.method) != ("server-0", "update"):
            return None
        updates.append(call)
        if len(updates) != 2:
            return None
        if point == DEATH_POINTS[0]:
            primary.die(point)
            return Fault(lose="request")
        return Fault(then=partial(primary.die, point))

    add_rule(servers.cluster, kill_primary)
    run_steps((shards, flat), 0)
    assert len(updates) >= 2 and primary.died
    torch.testing.assert_close(flat.params, expected_params(1))


def test_dead_process_cannot_call_though_its_name_is_reused() -> None:
    cluster = LocalCluster()
    transports: list[LocalTransport] = []

    def create(transport: LocalTransport) -> str:
        transports.append(transport)
        return "body"

    first = cluster.spawn("manager", HERE, create)
    first.die("killed by the test")
    second = cluster.spawn("manager", HERE, create)
    with pytest.raises(ActorDied, match="killed by the test"):
        transports[0].get(transports[0].call(second, "upper"), 5.0)
    assert transports[1].get(transports[1].call(second, "upper"), 5.0) == "BODY"
    cluster.close()
