"""Replicated shards: after the primary's death the backup continues bit-identically."""

import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from control_records import full_record
from delayed import async_plan, noise
from dying_backup import MOMENTS, InMemoryBackup
from jobs import job_of
from torch import Tensor

from distplat.platform.errors import ActorLost, FencedError
from distplat.platform.ledger import PullId, PushId
from distplat.platform.shard_map import ShardPlan
from distplat.platform.spec import SYNCHRONOUS, Consistency
from distplat.platform.stop_order import StopOrder
from distplat.strategies.loop.control import StepControl
from distplat.strategies.server.server import ServerLimits, ShardServer

SIZE, WORLD, STEPS, LOST_AT = 33, 2, 6, 3
LIMITS = ServerLimits(5.0, 5.0)
OPTIMIZERS: list[dict[str, Any]] = [
    {"name": "SGD", "lr": 0.1},
    {"name": "SGD", "lr": 0.1, "momentum": 0.9},
    {"name": "AdamW", "lr": 0.01},
    {"name": "RMSprop", "lr": 0.01, "momentum": 0.5},
    {"name": "Adagrad", "lr": 0.05, "lr_decay": 0.01},
]


def plan_of(consistency: Consistency, optimizer: dict[str, Any], **more: Any) -> ShardPlan:
    job = job_of(
        "ps-sync",
        WORLD,
        optimizer=optimizer,
        lr_schedule={"name": "linear", "final_factor": 0.5},
        steps=STEPS,
        global_batch_size=8,
        clip_norm=None if consistency.asynchronous else 0.7,
        **more,
    )
    return ShardPlan(job, "run", 1, WORLD, STEPS, 1, consistency)


def make_server(plan: ShardPlan) -> ShardServer:
    return ShardServer("server", plan, LIMITS, torch.zeros(SIZE))


def restored_server(plan: ShardPlan) -> ShardServer:
    server = make_server(plan)
    server.restore(0, lambda params: params.copy_(torch.linspace(-1, 1, SIZE)))
    return server


def discard(values: Tensor, version: int) -> None:
    """Deliver nothing."""


def log_of(server: ShardServer) -> list[list[int]]:
    """Return the update log of an asynchronous shard."""
    log = server.store.log()
    assert log is not None
    rows: list[list[int]] = log.tolist()
    return rows


def push(server: ShardServer, rank: int, seq: int) -> None:
    """Push; in a synchronous step the ranks before the last push to the store, without waiting."""
    push_id, gradient = PushId("run", 1, rank, seq, seq * WORLD + rank), noise(SIZE, rank, seq)
    if not server.store.ledger.asynchronous and rank < WORLD - 1:
        server.store.push(push_id, gradient)
    else:
        server.push(push_id, gradient, full_record(), discard)


def train(server: ShardServer, first: int = 0) -> None:
    for seq in range(first, STEPS):
        for rank in range(WORLD):
            push(server, rank, seq)


def state(server: ShardServer) -> bytes:
    """Return all bits that later updates depend on."""
    snapshot = server.store.snapshot()
    tensors = [snapshot.vectors[name] for name in sorted(snapshot.vectors)]
    if server.store.staleness is not None:
        tensors += server.store.staleness.values
    return b"".join(t.float().numpy().tobytes() for t in tensors)


@pytest.mark.sweep(2)
@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda o: o["name"])
@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("filled_at", [0, 2])
def test_promoted_backup_matches_run_without_failure(
    optimizer: dict[str, Any], moment: str, filled_at: int
) -> None:
    plan = plan_of(SYNCHRONOUS, optimizer)
    reference = restored_server(plan)
    train(reference)
    primary, backup = restored_server(plan), make_server(plan)
    for seq in range(filled_at):
        for rank in range(WORLD):
            push(primary, rank, seq)
    backup_link = InMemoryBackup(primary.store, backup.store)
    primary.store.backup_link = backup_link
    backup_link.death = LOST_AT, moment
    with pytest.raises(ActorLost):
        train(primary, filled_at)
    train(backup, LOST_AT)  # every rank repeats its unacknowledged push
    assert backup.store.version == STEPS
    assert state(backup) == state(reference)


def test_backup_filled_within_a_step_takes_every_push() -> None:
    plan = plan_of(SYNCHRONOUS, OPTIMIZERS[1])
    reference = restored_server(plan)
    train(reference)
    primary, backup = restored_server(plan), make_server(plan)
    for seq in range(LOST_AT):
        for rank in range(WORLD):
            push(primary, rank, seq)
    push(primary, 0, LOST_AT)
    InMemoryBackup(primary.store, backup.store)
    train(backup, LOST_AT)  # the primary is lost now
    assert backup.store.version == STEPS
    assert state(backup) == state(reference)


@pytest.mark.parametrize("moment", MOMENTS[1:])
@pytest.mark.parametrize("non_finite", [0, 1])
def test_promoted_backup_answers_with_the_record_of_the_step(non_finite: int, moment: str) -> None:
    plan = plan_of(SYNCHRONOUS, OPTIMIZERS[0])
    primary, backup = restored_server(plan), make_server(plan)
    backup_link = primary.store.backup_link = InMemoryBackup(primary.store, backup.store)
    backup_link.death = 0, moment
    first = replace(full_record(), samples=4.0, weight=10.0, stop=StopOrder.SAVE)
    second = replace(first, weight=30.0, non_finite=non_finite, rank=1, slot=0)
    ids, grads = [PushId("run", 1, rank, 0) for rank in range(2)], noise(SIZE, 0, 0)
    primary.store.push(ids[0], grads, first)
    with pytest.raises(ActorLost):
        primary.push(ids[1], grads, second, discard)
    for push_id, record in zip(ids, (first, second), strict=True):
        reply = backup.push(push_id, grads, record, discard)
        total = StepControl.unpack(np.array(reply.total))
        assert (total.samples, total.weight, total.stop) == (8.0, 40.0, StopOrder.SAVE)
        assert (total.non_finite, total.rank) == (non_finite, 1 if non_finite else -1)


def test_promoted_backup_knows_the_norm_of_a_step_that_is_repeated() -> None:
    """A worker may be lost between the commits of two shards; then all ranks push again."""
    plan = replace(plan_of(SYNCHRONOUS, OPTIMIZERS[0]), shards=2)
    primary, backup = restored_server(plan), make_server(plan)
    primary.store.backup_link = InMemoryBackup(primary.store, backup.store)
    for rank in range(WORLD):
        primary.store.push(PushId("run", 1, rank, 0), noise(SIZE, rank, 0))
    square = primary.store.squared_norm
    assert square is not None
    primary.commit(0, 0, (square + 4.0) ** 0.5, discard)
    backup.exclusively(lambda: backup.renew(2, WORLD))
    repeated = PushId("run", 2, 0, 0), noise(SIZE, 0, 0), full_record()
    assert backup.push(*repeated, discard).squared_norm == square


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize(
    "consistency",
    [
        Consistency(asynchronous=True),
        Consistency(asynchronous=True, staleness_lr=True, delay_compensation=0.5),
    ],
)
def test_asynchronous_backup_keeps_the_update_order(consistency: Consistency, moment: str) -> None:
    plan = plan_of(consistency, OPTIMIZERS[1], ema={"decay": 0.5})
    reference = restored_server(plan)
    train(reference)
    assert "optimizer/ema" in reference.store.snapshot().vectors
    primary, backup = restored_server(plan), make_server(plan)
    backup_link = InMemoryBackup(primary.store, backup.store)
    primary.store.backup_link = backup_link
    backup_link.death = LOST_AT * WORLD, moment  # rank 0's push of step LOST_AT
    for seq in range(LOST_AT):
        for rank in range(WORLD):
            push(primary, rank, seq)
    pulled = primary.store.params.clone()  # by the last rank, after the last replicated update
    with pytest.raises(ActorLost):
        push(primary, 0, LOST_AT)
    push(backup, 0, LOST_AT)  # the other rank is still computing
    backup.store.record_pull(WORLD - 1, LOST_AT * WORLD, pulled)
    for rank in range(1, WORLD):
        push(backup, rank, LOST_AT)
    train(backup, LOST_AT + 1)
    assert state(backup) == state(reference)
    assert log_of(backup) == log_of(reference)


def test_backup_keeps_a_known_pull() -> None:
    plan = plan_of(Consistency(asynchronous=True, delay_compensation=0.5), OPTIMIZERS[0])
    backup = restored_server(plan)
    push(backup, 0, 0)
    shard = backup.store
    before = state(backup)
    shard.record_pull(0, 0, torch.full((SIZE,), 9.0))  # a partly written vector of a known pull
    assert shard.staleness is not None and shard.staleness.pulled == [1, 0]
    assert state(backup) == before


@pytest.mark.parametrize("moment", MOMENTS[1:])
def test_second_backup_receives_late_pulls(moment: str) -> None:
    """The promoted server records a pull after its snapshot was loaded into the second backup."""
    plan = plan_of(Consistency(asynchronous=True, delay_compensation=0.5), OPTIMIZERS[1])
    reference = restored_server(plan)
    train(reference)
    servers = [restored_server(plan), make_server(plan), make_server(plan)]
    servers[0].store.backup_link = InMemoryBackup(servers[0].store, servers[1].store)
    for seq in range(LOST_AT):
        for rank in range(WORLD):
            push(servers[0], rank, seq)
    pulled = servers[0].store.params.clone()
    second = InMemoryBackup(servers[1].store, servers[2].store)
    servers[1].store.backup_link = second
    servers[1].store.record_pull(WORLD - 1, LOST_AT * WORLD, pulled)
    push(servers[1], 0, LOST_AT)
    second.death = LOST_AT * WORLD + 1, moment
    with pytest.raises(ActorLost):
        push(servers[1], 1, LOST_AT)
    push(servers[2], 1, LOST_AT)
    reference_log = log_of(reference)
    assert log_of(servers[2]) == reference_log[: (LOST_AT + 1) * WORLD]
    assert torch.equal(servers[2].params, _params_after(plan, LOST_AT + 1))


def _params_after(plan: ShardPlan, steps: int) -> Tensor:
    server = restored_server(plan)
    for seq in range(steps):
        for rank in range(WORLD):
            push(server, rank, seq)
    return server.params


def test_server_stops_serving_after_failed_replication() -> None:
    """Other waiting ranks must not treat the unreplicated update as applied."""
    plan = plan_of(SYNCHRONOUS, OPTIMIZERS[0])
    primary, backup = restored_server(plan), make_server(plan)
    backup_link = InMemoryBackup(primary.store, backup.store)
    primary.store.backup_link = backup_link
    backup_link.death = 0, MOMENTS[2]
    with pytest.raises(ActorLost):
        train(primary)
    calls: list[Callable[[], object]] = [
        lambda: primary.push(PushId("run", 1, 0, 0), noise(SIZE, 0, 0), full_record(), discard),
        lambda: primary.pull(PullId(1, 0, 0), discard),
        lambda: primary.commit(0, 0, None, discard),
    ]
    for call in calls:
        with pytest.raises(FencedError, match="server no longer serves"):
            call()


def test_snapshot_can_be_pickled_and_shares_no_memory() -> None:
    plan = async_plan(WORLD, STEPS, Consistency(asynchronous=True, delay_compensation=0.5))
    first = ShardServer("a", plan, LIMITS, torch.zeros(SIZE))
    second = ShardServer("b", plan, LIMITS, torch.zeros(SIZE))
    first.restore(0, lambda params: params.fill_(1.0))
    push(first, 0, 0)
    second.store.load_snapshot(pickle.loads(pickle.dumps(first.store.snapshot())))  # noqa: S301
    assert state(second) == state(first)
    before = state(second)
    push(first, 1, 0)
    assert state(second) == before
    assert (first.store.ledger.updates, second.store.ledger.updates) == (2, 1)
