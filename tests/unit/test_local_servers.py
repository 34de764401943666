"""
Parameter servers and their clients, the real ones, between threads: both roads, and every fault.

Each gradient counts once, whatever gets lost, is late or comes twice. Who is missing is named, and
a server that is gone is, too.
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
from local_run import impatient
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

SOON = 1.0
"""Deadline where one is meant to pass, seconds; until then the others make their part."""
STEPS = 3
ROADS = [pytest.param(HERE, id="near"), pytest.param(ELSEWHERE, id="far")]
Made = Callable[..., Servers]


def job(
    world: int, servers: int, strategy: str = "ps-sync", replication: int = 1, **more: Any
) -> Job:
    options = {"num_servers": servers, "replication": replication}
    fields = {
        "optimizer": {"name": "SGD", "lr": 0.5, "momentum": 0.9},
        "steps": STEPS,
        "clip_norm": 1000.0,
        **more,
    }
    return job_of({"name": strategy, **options}, world, **fields)


@pytest.fixture
def make() -> Iterator[Made]:
    """Make servers, which end with the test."""
    made = []

    def new(
        world: int, servers: int, limit_s: float = 10.0, backups: str = HERE, **more: Any
    ) -> Servers:
        of = job(world, servers, **more)
        roles = make_strategy(of).roles(of)
        made.append(Servers(impatient(of, limit_s), roles, backups=backups))
        return made[-1]

    yield new
    for servers in made:
        servers.close()


def connected(
    servers: Servers, rank: int, node: str = HERE, *, value: float = 1.0, **more: Any
) -> tuple[RemoteShards, FlatModel]:
    model = nn.Linear(10, 7, bias=False)
    nn.init.constant_(model.weight, value)
    flat, shards = FlatModel(model), servers.shards(rank, STEPS, node=node, **more)
    shards.connect(flat)
    return shards, flat


def all_connected(
    servers: Servers, world: int, node: str = HERE
) -> list[tuple[RemoteShards, FlatModel]]:
    return [connected(servers, rank, node) for rank in range(world)]


def steps_of(end: tuple[RemoteShards, FlatModel], rank: int) -> float | None:
    """Make all steps; give the norm of the last one."""
    shards, flat = end
    norm = None
    for step in range(STEPS):
        flat.grads.fill_(rank + 1.0)
        norm = shards.push(step, full_record(), task=step).norm
        if norm is not None:
            shards.commit(step, norm)
    return norm


def expected(world: int) -> torch.Tensor:
    """What torch makes of the sum of all ranks' gradients."""
    weight = nn.Parameter(torch.ones(70))
    optimizer = torch.optim.SGD([weight], lr=0.5, momentum=0.9)
    for _ in range(STEPS):
        weight.grad = torch.full((70,), sum(rank + 1.0 for rank in range(world)))
        optimizer.step()
    return weight.detach()


@pytest.mark.parametrize("node", ROADS)
@pytest.mark.parametrize("servers", [1, 2, 3])
def test_shards_sum_and_update(make: Made, servers: int, node: str) -> None:
    ends = all_connected(make(2, servers), 2, node)
    norms = on_ranks(2, lambda rank: steps_of(ends[rank], rank))
    if servers > 1:  # a single one knows the norm by itself
        assert norms == [pytest.approx(3.0 * 70**0.5)] * 2
    else:
        assert norms == [None, None]
    for _, flat in ends:
        torch.testing.assert_close(flat.params, expected(2))


@pytest.mark.parametrize("node", ROADS)
def test_all_ranks_start_from_rank_0s_parameters(make: Made, node: str) -> None:
    servers = make(2, 2)
    flats = on_ranks(2, lambda rank: connected(servers, rank, node, value=1.0 + 4 * rank)[1])
    for flat in flats:
        assert torch.equal(flat.params, torch.ones(70))


def test_where_a_worker_computes(make: Made) -> None:
    """Near servers' vector is the worker's own; far ones' is not, nor that of asynchronous ones."""
    for strategy, node, same in [
        ("ps-sync", HERE, True),
        ("ps-sync", ELSEWHERE, False),
        ("ps-async", HERE, False),
    ]:
        servers = make(1, 1, strategy=strategy, clip_norm=None)
        _, flat = connected(servers, 0, node)
        servers.shard_server(0).params.fill_(5.0)
        assert (float(flat.params[0]) == 5.0) is same


@pytest.mark.parametrize("node", ROADS)
def test_a_missing_pusher_is_named(make: Made, node: str) -> None:
    servers = make(3, 2)
    ends = all_connected(servers, 3, node)
    for server in servers.shard_servers():
        server._limits = ServerLimits(SOON, SOON)

    def body(rank: int) -> Exception | None:
        try:
            ends[rank][0].push(0, full_record()) if rank != 1 else None
        except Exception as error:
            return error
        return None

    errors = on_ranks(3, body)
    assert errors[1] is None
    for error in (errors[0], errors[2]):
        assert isinstance(error, DeadlineExceeded)
        assert error.what.startswith("push 0 to server-")
        assert error.missing == ("worker-1",)
        assert error.setting == "failure.start_timeout_s", "the first step belongs to the start"


@pytest.mark.parametrize("node", ROADS)
def test_a_late_pusher_is_waited_for(make: Made, node: str) -> None:
    ends = all_connected(make(2, 1), 2, node)
    pushed = threading.Event()

    def body(rank: int) -> None:
        if rank == 1:
            time.sleep(0.2)
            pushed.set()
        ends[rank][0].push(0, full_record())
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
@pytest.mark.parametrize("method", ["push", "commit", "pull", "attach", "restore", "join"])
@pytest.mark.parametrize("strategy", ["ps-sync", "ps-async"])
def test_every_gradient_counts_once(
    make: Made, monkeypatch: pytest.MonkeyPatch, strategy: str, method: str, fault: Fault
) -> None:
    """Whatever is lost, late or doubled; three of each call are hit."""
    monkeypatch.setattr(retrying_calls, "RETRY_PAUSE_S", 0.0)
    servers = make(1, 2, strategy=strategy)
    inject(servers.cluster, method, fault, times=3)
    shards, flat = connected(servers, 0, ELSEWHERE)
    steps_of((shards, flat), 0)
    torch.testing.assert_close(flat.params, expected(1))
    assert [service.store.version for service in servers.shard_servers()] == [STEPS, STEPS]


def test_a_lost_standing_call_is_made_again(make: Made) -> None:
    servers = make(1, 2)
    inject(servers.cluster, "listen", Fault(lose="request"), times=2)
    ends = all_connected(servers, 1)
    steps_of(ends[0], 0)
    torch.testing.assert_close(ends[0][1].params, expected(1))


def test_a_frozen_server_is_named_with_the_setting(
    make: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    servers = make(1, 2, 60.0)
    shards, flat = connected(servers, 0, ELSEWHERE)
    monkeypatch.setattr(fan_out, "ANSWER_GRACE_S", SOON - 60.0)
    inject(servers.cluster, "push", Fault(delay_s=1e6), actor="server-1")
    with pytest.raises(DeadlineExceeded) as caught:
        steps_of((shards, flat), 0)
    assert (caught.value.what, caught.value.missing) == ("push 0", ("server-1",))
    assert caught.value.setting == "failure.start_timeout_s"


@pytest.mark.parametrize("node", ROADS)
@pytest.mark.parametrize("call", ["push", "commit"])
def test_a_lost_server_is_named(make: Made, call: str, node: str) -> None:
    servers = make(1, 2)
    shards, _ = connected(servers, 0, node)
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


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_server_that_dies_in_a_push_is_named(make: Made, moment: Any) -> None:
    servers = make(1, 2)
    shards, _ = connected(servers, 0, ELSEWHERE)
    inject(servers.cluster, "push", Fault(kill=moment), actor="server-0")
    with pytest.raises(ActorLost, match=f"server-0 was lost.*{moment} push"):
        shards.push(0, full_record())


def test_another_model_is_refused(make: Made) -> None:
    servers = make(2, 1)
    connected(servers, 0)
    flat, shards = FlatModel(nn.Linear(3, 3)), servers.shards(1, STEPS)
    with pytest.raises(ProtocolError, match="rank 1 built another model"):
        shards.connect(flat)
    shards.close()  # as the worker does, whatever happened before


@pytest.mark.parametrize("node", ROADS)
def test_a_wait_ends_when_the_attempt_is_given_up(make: Made, node: str) -> None:
    servers, abandoned = make(2, 1), threading.Event()
    shards, _ = connected(servers, 0, node, abandoned=abandoned)
    threading.Timer(0.2, abandoned.set).start()
    with pytest.raises(Abandoned):
        shards.push(0, full_record())


def test_listening_ends_when_the_worker_leaves(make: Made) -> None:
    servers = make(1, 2)
    shards, flat = connected(servers, 0)
    steps_of((shards, flat), 0)
    shards.close()
    assert drain(servers.cluster, 5.0)


def test_nobody_waits_for_news_of_servers_that_have_ended(make: Made) -> None:
    """Such a wait would keep their memory, ten seconds long."""
    earlier = threading.enumerate()  # other tests' may be among them still
    servers = make(1, 2, replication=2)
    connected(servers, 0)
    manager = servers.manager.body
    follow = [one for one in threading.enumerate() if one.name == "follow"]
    [held] = [one for one in follow if one not in earlier]
    manager.close()
    held.join(5.0)  # less than the ten
    assert not held.is_alive()


UPDATE_MOMENTS = ["before the update is sent", "after the backup has made it"]


@pytest.mark.parametrize("backups", ROADS)
@pytest.mark.parametrize("moment", UPDATE_MOMENTS)
@pytest.mark.parametrize("node", ROADS)
@pytest.mark.parametrize("strategy", ["ps-sync", "ps-async"])
def test_a_promoted_backup_has_every_update_once(
    make: Made, monkeypatch: pytest.MonkeyPatch, strategy: str, node: str, moment: str, backups: str
) -> None:
    """The primary of one shard dies in the middle of a step, and the worker follows its backup."""
    servers = make(1, 2, strategy=strategy, replication=2, backups=backups)
    shards, flat = connected(servers, 0, node)
    wait_for_backups(servers)
    primary, counted = servers.nodes["server-0"], []

    def dies(call: Call) -> Fault | None:
        if (call.process, call.method) != ("server-0", "update"):
            return None
        counted.append(call)
        if len(counted) != 2:
            return None
        if moment == UPDATE_MOMENTS[0]:
            primary.die(moment)
            return Fault(lose="request")
        return Fault(then=partial(primary.die, moment))

    add_rule(servers.cluster, dies)
    steps_of((shards, flat), 0)
    assert len(counted) >= 2 and primary.died
    torch.testing.assert_close(flat.params, expected(1))


def test_a_dead_process_reaches_nobody_though_another_has_its_name() -> None:
    cluster = LocalCluster()
    ways: list[LocalTransport] = []

    def make(transport: LocalTransport) -> str:
        ways.append(transport)
        return "body"

    first = cluster.spawn("manager", HERE, make)
    first.die("killed by the test")
    second = cluster.spawn("manager", HERE, make)
    with pytest.raises(ActorDied, match="killed by the test"):
        ways[0].get(ways[0].call(second, "upper"), 5.0)
    assert ways[1].get(ways[1].call(second, "upper"), 5.0) == "BODY"
    cluster.close()
