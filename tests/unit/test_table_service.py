"""Tables that several ranks call at once: waits, exactly once, fences, the way back by a step."""

import threading
import time
from typing import Any

import numpy as np
import pytest
from local_servers import TableServers
from rank_threads import on_ranks
from table_plans import SPEC, job, plan

from distplat.platform.errors import (
    ActorLost,
    DeadlineExceeded,
    FencedError,
    GapError,
    ProtocolError,
    StaleError,
)
from distplat.platform.ledger import PullId, PushId
from distplat.platform.shard_map import TableSpec, plan_of
from distplat.strategies.server.table_store import TableServer
from distplat.strategies.sparse.routing import route
from distplat.strategies.sparse.table import RowGradients


def ones(*ids: int) -> list[RowGradients]:
    return [RowGradients(0, np.array(ids), np.ones((len(ids), 4), np.float32))]


def value(service: TableServer, number: int, attempt: int = 0, row: int = 3) -> float:
    out = np.empty((1, 4), np.float32)
    service.read(PullId(attempt, 0, number), 0, np.array([row]), out)
    assert (out == out[0, 0]).all()
    return float(out[0, 0])


def opened(**more: Any) -> TableServer:
    service = TableServer("embedding-server-0", 0)
    service.open(plan(**more))
    service.begin(0, 0)
    return service


def push(service: TableServer, rank: int, seq: int, attempt: int = 0) -> int:
    return service.add(PushId("run", attempt, rank, seq), ones(3, rank)).version


def both(service: TableServer, seq: int, attempt: int = 0) -> None:
    on_ranks(2, lambda rank: push(service, rank, seq, attempt))


def test_a_step_is_made_when_all_have_pushed_and_once() -> None:
    service = opened()
    both(service, 0)
    assert value(service, 0) == -2.0
    assert [push(service, rank, 0) for rank in range(2)] == [1, 1]  # asked again
    assert value(service, 1) == -2.0
    with pytest.raises(GapError):
        push(service, 0, 2)
    both(service, 1)
    with pytest.raises(StaleError):
        push(service, 0, 0)
    assert value(service, 2) == -4.0


def test_ranks_are_added_in_order_whoever_comes_first() -> None:
    """1e8 + 1 - 1e8 is 0 in float32 in this order only."""
    service = opened(world=3)
    values = [1e8, 1.0, -1e8]

    def come(rank: int) -> None:
        time.sleep(0.05 * (2 - rank))  # the last rank first
        gradient = RowGradients(0, np.array([3]), np.full((1, 4), values[rank], np.float32))
        service.add(PushId("run", 0, rank, 0), [gradient])

    on_ranks(3, come)
    assert value(service, 0) == 0.0


def test_the_schedule_scales_the_rate() -> None:
    schedule = {"name": "step", "every_steps": 1, "gamma": 0.5}
    service = opened(world=1, lr_schedule=schedule)
    for step in range(3):
        service.add(PushId("run", 0, 0, step), ones(3))
    assert value(service, 0) == -1.75


def test_asynchronous_pushes_wait_for_nobody_and_count_once() -> None:
    optimizer = {"name": "SGD", "lr": 1.0}
    service = opened(embeddings={"optimizer": optimizer, "asynchronous": True}, rewinds=False)
    assert [push(service, 0, 0), push(service, 0, 1), push(service, 1, 0)] == [1, 2, 3]
    assert value(service, 0) == -3.0
    assert push(service, 1, 0) == 3  # asked again
    assert value(service, 1) == -3.0
    with pytest.raises(StaleError):
        push(service, 0, 0)


def test_who_does_not_come_is_named() -> None:
    with pytest.raises(DeadlineExceeded, match=r"missing: worker-1; `failure.step_timeout_s`"):
        push(opened(), 0, 0)


def test_a_pull_that_comes_again_or_late_writes_nothing() -> None:
    service, out = opened(), np.full((1, 4), 7.0, np.float32)
    service.read(PullId(0, 0, 0), 0, np.array([3]), out)
    assert (out == 0).all()
    out[:] = 7.0
    service.read(PullId(0, 0, 0), 0, np.array([3]), out)
    assert (out == 7).all()
    service.read(PullId(0, 0, 1), 0, np.array([3]), out)
    with pytest.raises(StaleError):
        service.read(PullId(0, 0, 0), 0, np.array([3]), out)
    with pytest.raises(FencedError):
        service.read(PullId(1, 0, 2), 0, np.array([3]), out)


@pytest.mark.parametrize("behind", [0, 1])
def test_an_attempt_takes_one_step_back(behind: int) -> None:
    """The survivors are at step 2 - behind, the tables at 2."""
    service = opened()
    both(service, 0)
    both(service, 1)
    for _ in range(2):
        service.open(plan(attempt=1))
        service.begin(1, 2 - behind)  # of every rank
    assert value(service, 0, attempt=1) == -4.0 + 2 * behind
    for seq in range(2 - behind, 3):
        both(service, seq, attempt=1)
    assert value(service, 1, attempt=1) == -6.0
    with pytest.raises(FencedError):
        push(service, 0, 3, attempt=0)
    with pytest.raises(FencedError):
        service.open(plan(attempt=0))
    with pytest.raises(FencedError):
        service.begin(0, 2)


@pytest.mark.parametrize(("rewinds", "version"), [(True, 0), (True, 3), (False, 1)])
def test_an_attempt_that_tables_cannot_follow_is_refused(rewinds: bool, version: int) -> None:
    service = opened(rewinds=rewinds)
    both(service, 0)
    both(service, 1)
    service.open(plan(attempt=1, rewinds=rewinds))
    with pytest.raises(ProtocolError, match=f"is at step 2, the workers at {version}"):
        service.begin(1, version)


def test_who_waits_when_the_next_attempt_begins_comes_out() -> None:
    service = opened(failure={"step_timeout_s": 30})
    errors: list[BaseException] = []

    def wait() -> None:
        try:
            push(service, 0, 0)
        except FencedError as error:
            errors.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    time.sleep(0.05)
    service.open(plan(attempt=1))
    thread.join(60)
    assert len(errors) == 1
    both(service, 0, attempt=1)
    assert value(service, 0, attempt=1) == -2.0  # what was staged before is not in it


def test_another_model_is_refused() -> None:
    service = opened()
    other = plan_of(job(), "run", 0, (TableSpec("t", 99, 4, 0.0),), 10, rewinds=False)
    with pytest.raises(ProtocolError, match="differ from those of the first rank"):
        service.open(other)


@pytest.mark.parametrize("servers", [1, 3])
def test_whole_tables_are_there_from_the_start(servers: int) -> None:
    spec = TableSpec("t", 100, 4, 1.0, whole=True)
    services = [TableServer(f"embedding-server-{i}", i) for i in range(servers)]
    for service in services:
        service.open(plan_of(job(2, servers), "run", 0, (spec,), 10, rewinds=False))
    assert sum(rows for service in services for _, rows in service.sizes()) == 100


def rows_after_three_steps(servers: int) -> bytes:
    group = TableServers(job(1, servers))
    tables = group.tables(0)
    told, _ = tables.connect((TableSpec("t", 1000, 4, 1.0),), 10)
    tables.begin(0)
    random = np.random.default_rng(0)
    for step in range(3):
        routed, _ = route(told, told.tables[0], random.choice(1000, 300, replace=False))
        slope = np.sin(routed.ids[:, None] * np.arange(1, 5)).astype(np.float32)
        tables.push(step, [(routed, RowGradients(0, routed.ids, slope))]).wait()
    routed, _ = route(told, told.tables[0], np.arange(1000))
    found = tables.pull(0, routed, keep=True)[np.argsort(routed.ids)].tobytes()
    group.close()
    return found


@pytest.mark.parametrize("servers", [2, 5])
def test_the_number_of_servers_changes_no_bit(servers: int) -> None:
    assert rows_after_three_steps(servers) == rows_after_three_steps(1)


def test_a_lost_server_is_named() -> None:
    group = TableServers(job(1))
    tables = group.tables(0)
    told, _ = tables.connect((SPEC,), 10)
    group.nodes[0].die("its node is gone")
    with pytest.raises(ActorLost, match=r"embedding-server-0 was lost.*its node is gone"):
        tables.pull(0, route(told, SPEC, np.array([1]))[0], keep=True)
