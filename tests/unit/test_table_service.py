"""TableServer under concurrent ranks: waits, exactly-once pushes, fencing, rewind by one step."""

import threading
import time
from collections.abc import Callable
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


def open_server(**more: Any) -> TableServer:
    service = TableServer("embedding-server-0", 0)
    service.open(plan(**more))
    service.begin(0, 0)
    return service


def push(service: TableServer, rank: int, seq: int, attempt: int = 0) -> int:
    return service.add(PushId("run", attempt, rank, seq), ones(3, rank)).version


def push_all(service: TableServer, seq: int, attempt: int = 0) -> None:
    on_ranks(2, lambda rank: push(service, rank, seq, attempt))


def test_step_commits_once_after_all_ranks_push() -> None:
    service = open_server()
    push_all(service, 0)
    assert value(service, 0) == -2.0
    assert [push(service, rank, 0) for rank in range(2)] == [1, 1]  # repeated
    assert value(service, 1) == -2.0
    with pytest.raises(GapError):
        push(service, 0, 2)
    push_all(service, 1)
    with pytest.raises(StaleError):
        push(service, 0, 0)
    assert value(service, 2) == -4.0


def test_gradients_are_summed_in_rank_order() -> None:
    """1e8 + 1 - 1e8 is 0 in float32 in this order only."""
    service = open_server(world=3)
    values = [1e8, 1.0, -1e8]

    def push_delayed(rank: int) -> None:
        time.sleep(0.05 * (2 - rank))  # the last rank first
        gradient = RowGradients(0, np.array([3]), np.full((1, 4), values[rank], np.float32))
        service.add(PushId("run", 0, rank, 0), [gradient])

    on_ranks(3, push_delayed)
    assert value(service, 0) == 0.0


def test_lr_schedule_scales_the_update() -> None:
    schedule = {"name": "step", "every_steps": 1, "gamma": 0.5}
    service = open_server(world=1, lr_schedule=schedule)
    for step in range(3):
        service.add(PushId("run", 0, 0, step), ones(3))
    assert value(service, 0) == -1.75


def test_asynchronous_pushes_apply_immediately_and_once() -> None:
    optimizer = {"name": "SGD", "lr": 1.0}
    service = open_server(embeddings={"optimizer": optimizer, "asynchronous": True}, rewinds=False)
    assert [push(service, 0, 0), push(service, 0, 1), push(service, 1, 0)] == [1, 2, 3]
    assert value(service, 0) == -3.0
    assert push(service, 1, 0) == 3  # repeated
    assert value(service, 1) == -3.0
    with pytest.raises(StaleError):
        push(service, 0, 0)


def test_push_timeout_names_the_missing_rank() -> None:
    with pytest.raises(DeadlineExceeded, match=r"missing: worker-1; `failure.step_timeout_s`"):
        push(open_server(), 0, 0)


def test_repeated_or_stale_pull_writes_nothing() -> None:
    service, out = open_server(), np.full((1, 4), 7.0, np.float32)
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
def test_new_attempt_rewinds_one_step(behind: int) -> None:
    """The surviving workers are at step `2 - behind`, the tables at step 2."""
    service = open_server()
    push_all(service, 0)
    push_all(service, 1)
    for _ in range(2):
        service.open(plan(attempt=1))
        service.begin(1, 2 - behind)  # once per rank
    assert value(service, 0, attempt=1) == -4.0 + 2 * behind
    for seq in range(2 - behind, 3):
        push_all(service, seq, attempt=1)
    assert value(service, 1, attempt=1) == -6.0
    with pytest.raises(FencedError):
        push(service, 0, 3, attempt=0)
    with pytest.raises(FencedError):
        service.open(plan(attempt=0))
    with pytest.raises(FencedError):
        service.begin(0, 2)


@pytest.mark.parametrize(("rewinds", "version"), [(True, 0), (True, 3), (False, 1)])
def test_attempt_is_rejected_if_tables_cannot_reach_its_step(rewinds: bool, version: int) -> None:
    service = open_server(rewinds=rewinds)
    push_all(service, 0)
    push_all(service, 1)
    service.open(plan(attempt=1, rewinds=rewinds))
    with pytest.raises(ProtocolError, match=f"is at step 2, the workers at {version}"):
        service.begin(1, version)


def test_next_attempt_interrupts_a_waiting_push(monkeypatch: pytest.MonkeyPatch) -> None:
    service = open_server(failure={"step_timeout_s": 600})
    is_waiting, wait_for = threading.Event(), service._changed.wait_for

    def notify_and_wait(predicate: Callable[[], bool], timeout: float | None = None) -> bool:
        is_waiting.set()  # the lock is held until the wait
        return wait_for(predicate, timeout)

    monkeypatch.setattr(service._changed, "wait_for", notify_and_wait)
    errors: list[BaseException] = []

    def wait() -> None:
        try:
            push(service, 0, 0)
        except FencedError as error:
            errors.append(error)

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    assert is_waiting.wait(60)
    service.open(plan(attempt=1))
    thread.join(20)
    assert len(errors) == 1
    push_all(service, 0, attempt=1)
    assert value(service, 0, attempt=1) == -2.0  # without the interrupted push


def test_open_rejects_different_tables() -> None:
    service = open_server()
    other = plan_of(job(), "run", 0, (TableSpec("t", 99, 4, 0.0),), 10, rewinds=False)
    with pytest.raises(ProtocolError, match="differ from those of the first rank"):
        service.open(other)


@pytest.mark.parametrize("servers", [1, 3])
def test_open_creates_all_rows_of_whole_tables(servers: int) -> None:
    spec = TableSpec("t", 100, 4, 1.0, whole=True)
    services = [TableServer(f"embedding-server-{i}", i) for i in range(servers)]
    for service in services:
        service.open(plan_of(job(2, servers), "run", 0, (spec,), 10, rewinds=False))
    assert sum(count for service in services for _, count in service.sizes()) == 100


def rows_after_three_steps(servers: int) -> bytes:
    group = TableServers(job(1, servers))
    tables = group.tables(0)
    table_plan, _ = tables.connect((TableSpec("t", 1000, 4, 1.0),), 10)
    tables.begin(0)
    random = np.random.default_rng(0)
    for step in range(3):
        routed, _ = route(table_plan, table_plan.tables[0], random.choice(1000, 300, replace=False))
        gradients = np.sin(routed.ids[:, None] * np.arange(1, 5)).astype(np.float32)
        tables.push(step, [(routed, RowGradients(0, routed.ids, gradients))]).wait()
    routed, _ = route(table_plan, table_plan.tables[0], np.arange(1000))
    rows = tables.pull(0, routed, keep=True)[np.argsort(routed.ids)].tobytes()
    group.close()
    return rows


@pytest.mark.parametrize("servers", [2, 5])
def test_number_of_servers_changes_no_bit(servers: int) -> None:
    assert rows_after_three_steps(servers) == rows_after_three_steps(1)


def test_pull_error_names_the_lost_server() -> None:
    group = TableServers(job(1))
    tables = group.tables(0)
    table_plan, _ = tables.connect((SPEC,), 10)
    group.nodes[0].die("its node is gone")
    with pytest.raises(ActorLost, match=r"embedding-server-0 was lost.*its node is gone"):
        tables.pull(0, route(table_plan, SPEC, np.array([1]))[0], keep=True)
