"""Load of shards: figures in step reports, queues of pushes, rows of the final table."""

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from control_records import full_record
from delayed import async_plan, noise
from jobs import job_of
from local_run import train
from rank_threads import on_ranks
from words import Words

from distplat.actors.servers.shard_serving import elements_per_s
from distplat.cli.figures import figure_rows
from distplat.platform import load
from distplat.platform.ledger import PushId, ServerReply
from distplat.platform.load import MAX_SHOWN_SHARDS, PushQueue, ShardLoad, load_figures
from distplat.platform.progress import StepReport
from distplat.platform.spec import SYNCHRONOUS, Consistency
from distplat.strategies.server import server
from distplat.strategies.server.server import ServerLimits, ShardServer

SIZE, DELAY_S = 9, 0.25

RECORD = full_record()


def test_load_figures_of_the_slowest_and_of_each_shard() -> None:
    figures = load_figures([ShardLoad(8, 4, 0.1, 0.5, 3), ShardLoad(16, 0, 0.2, 0.25, 1)])
    assert figures == {
        "apply_s": 0.2,
        "queue_s": 0.5,
        "queue_depth": 3,
        "in_bytes": 24,
        "out_bytes": 4,
        **{"shard_0_in_bytes": 8, "shard_0_out_bytes": 4, "shard_0_apply_s": 0.1},
        **{"shard_0_queue_s": 0.5, "shard_0_queue_depth": 3},
        **{"shard_1_in_bytes": 16, "shard_1_out_bytes": 0, "shard_1_apply_s": 0.2},
        **{"shard_1_queue_s": 0.25, "shard_1_queue_depth": 1},
    }
    assert load_figures([]) == {}


@pytest.mark.parametrize(("shards", "lines"), [(1, 5), (2, 15), (MAX_SHOWN_SHARDS + 1, 5)])
def test_figures_of_one_or_many_shards_are_combined(shards: int, lines: int) -> None:
    assert len(load_figures([ShardLoad()] * shards)) == lines


def test_queue_counts_waiting_pushes() -> None:
    queue = PushQueue()
    with queue.enter() as first, queue.enter() as second:
        assert (first.depth, second.depth) == (1, 2)
        first.leave()
        first.leave()
        with queue.enter() as third:
            assert third.depth == 2
    with pytest.raises(KeyError), queue.enter():
        raise KeyError
    with queue.enter() as last:
        assert last.depth == 1


class Clock:
    """Advances slightly at each reading, and as a test sets it."""

    def __init__(self) -> None:
        self.now, self.monotonic = 100.0, time.monotonic

    def perf_counter(self) -> float:
        self.now += 1e-6
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    fake = Clock()
    for module in (load, server):
        monkeypatch.setattr(module, "time", fake)
    return fake


def wait_for_queued_push(service: ShardServer) -> None:
    """Wait until a push is queued."""
    deadline = time.monotonic() + 10
    while not service._queue.count(0):
        assert time.monotonic() < deadline
        time.sleep(0.001)


def make_server(consistency: Consistency, world: int = 2) -> ShardServer:
    plan = async_plan(world, 4, consistency)
    service = ShardServer("server-0", plan, ServerLimits(10.0, 10.0), torch.zeros(SIZE))
    service.restore(0, lambda params: params.fill_(1.0))
    return service


def discard(values: Any, version: int) -> None:
    """Ignore the delivery."""


def test_synchronous_push_waits_for_the_last_gradient(clock: Clock) -> None:
    service = make_server(SYNCHRONOUS)

    def body(rank: int) -> ServerReply:
        if rank:
            wait_for_queued_push(service)
            clock.now += DELAY_S
        return service.push(PushId("run", 1, rank, 0), noise(SIZE, rank, 0), RECORD, discard)

    first, last = on_ranks(2, body)
    assert first.queue_s == pytest.approx(DELAY_S, abs=1e-3)
    assert last.queue_s == pytest.approx(0.0, abs=1e-3)
    assert (first.queue_depth, last.queue_depth) == (1, 2)
    assert first.apply_s == last.apply_s > 0.0


def test_asynchronous_push_waits_for_the_one_before(clock: Clock) -> None:
    service = make_server(Consistency(asynchronous=True))
    inside = threading.Event()

    def deliver_slowly(values: Any, version: int) -> None:
        inside.set()
        wait_for_queued_push(service)
        clock.now += DELAY_S  # while the lock is held

    def body(rank: int) -> ServerReply:
        if rank:
            assert inside.wait(60)
        deliver: Callable[[Any, int], None] = discard if rank else deliver_slowly
        return service.push(PushId("run", 1, rank, 0, rank), noise(SIZE, rank, 0), RECORD, deliver)

    first, second = on_ranks(2, body)
    assert first.queue_s == pytest.approx(0.0, abs=1e-3)
    assert second.queue_s == pytest.approx(DELAY_S, abs=1e-3)
    assert (first.queue_depth, second.queue_depth) == (1, 1)  # the first was applied by then


@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("strategy", ["ps-sync", "ps-async"])
def test_step_reports_have_figures_of_each_shard(strategy: str, clip: float | None) -> None:
    class Dense(Words):
        def model(self) -> torch.nn.Module:
            embedding = torch.nn.Embedding(40, 6)
            return torch.nn.Sequential(embedding, torch.nn.Flatten(), torch.nn.Linear(36, 3))

    servers = {"name": strategy, "num_servers": 2}
    job = job_of(servers, 2, global_batch_size=9, steps=3, clip_norm=clip)
    run = train(job, Dense)
    size = 4 * run.ranks[0].prepared.flat.size
    reports = [r for reports in run.reports for r in reports if isinstance(r, StepReport)]
    assert len(reports) == 2 * 3
    for figures in (report.figures for report in reports):
        assert figures["in_bytes"] == size
        assert figures["out_bytes"] == (size if strategy == "ps-async" else 0)
        assert figures["shard_0_in_bytes"] + figures["shard_1_in_bytes"] == size
        assert min(figures["shard_0_apply_s"], figures["shard_1_apply_s"]) > 0.0
        assert 1 <= figures["queue_depth"] <= 2


def test_server_speed_is_the_median_of_its_rounds() -> None:
    seconds = iter([0, 90, 100, 101, 200, 202, 300, 303, 400, 401, 500, 502, 600, 609])
    strategy = {"name": "ps-sync", "num_servers": 2, "split": "load"}
    optimizer = {"name": "Adam", "lr": 0.1}
    job = job_of(strategy, optimizer=optimizer, global_batch_size=9, steps=3)
    assert elements_per_s(job, 2, "float32", lambda: float(next(seconds))) == (1 << 18) / 2
    assert elements_per_s(job, 300, "float32") > 0.0


def rows_of(shards: int) -> list[tuple[str, str]]:
    loads = [ShardLoad(4_000_000, 0, 0.001 * (i + 1), 0.0005, 2) for i in range(shards)]
    return figure_rows(load_figures(loads))


def test_table_has_a_row_for_each_shard() -> None:
    assert rows_of(1) == [
        ("servers", "1 ms applying, 0.5 ms queue, 2 deep; 4 MB in, 0 B out per worker and step")
    ]
    assert [name for name, _ in rows_of(3)] == ["shard 0", "shard 1", "shard 2"]
    assert [name for name, _ in rows_of(6)] == ["shard 2", "shard 3", "shard 4", "shard 5", ""]
    assert rows_of(6)[-1][1] == "and 2 shards that had less to do"
