"""A shard kept twice: whenever the primary dies, its backup goes on with the same bits."""

import pickle
from collections.abc import Callable
from typing import Any

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


def plan(consistency: Consistency, optimizer: dict[str, Any], **more: Any) -> ShardPlan:
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


def service(of: ShardPlan) -> ShardServer:
    return ShardServer("server", of, LIMITS, torch.zeros(SIZE))


def opened(of: ShardPlan) -> ShardServer:
    made = service(of)
    made.restore(0, lambda params: params.copy_(torch.linspace(-1, 1, SIZE)))
    return made


def nowhere(values: Tensor, version: int) -> None:
    """Deliver nothing."""


def order(of: ShardServer) -> list[list[int]]:
    """Give the order of updates of an asynchronous shard."""
    log = of.store.log()
    assert log is not None
    found: list[list[int]] = log.tolist()
    return found


def push(to: ShardServer, rank: int, seq: int) -> None:
    """Push; of a synchronous step only the last rank's call may be made from one thread."""
    name, gradient = PushId("run", 1, rank, seq, seq * WORLD + rank), noise(SIZE, rank, seq)
    if not to.store.ledger.asynchronous and rank < WORLD - 1:
        to.store.push(name, gradient)
    else:
        to.push(name, gradient, full_record(), nowhere)


def train(to: ShardServer, first: int = 0) -> None:
    for seq in range(first, STEPS):
        for rank in range(WORLD):
            push(to, rank, seq)


def state(of: ShardServer) -> bytes:
    """Give all bits that matter later."""
    snapshot = of.store.snapshot()
    tensors = [snapshot.vectors[name] for name in sorted(snapshot.vectors)]
    if of.store.staleness is not None:
        tensors += of.store.staleness.values
    return b"".join(t.float().numpy().tobytes() for t in tensors)


@pytest.mark.sweep(2)
@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda o: o["name"])
@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("filled_at", [0, 2])
def test_a_promoted_backup_has_the_bits_of_a_run_without_a_loss(
    optimizer: dict[str, Any], moment: str, filled_at: int
) -> None:
    facts = plan(SYNCHRONOUS, optimizer)
    whole = opened(facts)
    train(whole)
    primary, backup = opened(facts), service(facts)
    for seq in range(filled_at):
        for rank in range(WORLD):
            push(primary, rank, seq)
    backup_link = InMemoryBackup(primary.store, backup.store)
    primary.store.backup_link = backup_link
    backup_link.dies = LOST_AT, moment
    with pytest.raises(ActorLost):
        train(primary, filled_at)
    train(backup, LOST_AT)  # every rank makes the push again that nobody has acknowledged
    assert backup.store.version == STEPS
    assert state(backup) == state(whole)


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize(
    "how",
    [
        Consistency(asynchronous=True),
        Consistency(asynchronous=True, staleness_lr=True, delay_compensation=0.5),
    ],
)
def test_an_asynchronous_backup_has_the_order_too(how: Consistency, moment: str) -> None:
    facts = plan(how, OPTIMIZERS[1], ema={"decay": 0.5})
    whole = opened(facts)
    train(whole)
    assert "optimizer/ema" in whole.store.snapshot().vectors
    primary, backup = opened(facts), service(facts)
    backup_link = InMemoryBackup(primary.store, backup.store)
    primary.store.backup_link = backup_link
    backup_link.dies = LOST_AT * WORLD, moment  # rank 0's push of step LOST_AT
    for seq in range(LOST_AT):
        for rank in range(WORLD):
            push(primary, rank, seq)
    held = primary.store.params.clone()  # what the last rank pulled: no update told of it
    with pytest.raises(ActorLost):
        push(primary, 0, LOST_AT)
    push(backup, 0, LOST_AT)  # a rank that is quicker: the other one is still computing
    backup.store.record_pull(WORLD - 1, LOST_AT * WORLD, held)
    for rank in range(1, WORLD):
        push(backup, rank, LOST_AT)
    train(backup, LOST_AT + 1)
    assert state(backup) == state(whole)
    assert order(backup) == order(whole)


def test_a_pull_that_the_backup_knows_of_stays_as_it_is() -> None:
    facts = plan(Consistency(asynchronous=True, delay_compensation=0.5), OPTIMIZERS[0])
    backup = opened(facts)
    push(backup, 0, 0)
    shard = backup.store
    before = state(backup)
    shard.record_pull(0, 0, torch.full((SIZE,), 9.0))  # a torn vector, of a push that counts
    assert shard.staleness is not None and shard.staleness.pulled == [1, 0]
    assert state(backup) == before


@pytest.mark.parametrize("moment", MOMENTS[1:])
def test_a_backup_of_a_backup_has_late_pulls_too(moment: str) -> None:
    """The promoted server is told of a pull after it has filled the next backup."""
    facts = plan(Consistency(asynchronous=True, delay_compensation=0.5), OPTIMIZERS[1])
    whole = opened(facts)
    train(whole)
    services = [opened(facts), service(facts), service(facts)]
    services[0].store.backup_link = InMemoryBackup(services[0].store, services[1].store)
    for seq in range(LOST_AT):
        for rank in range(WORLD):
            push(services[0], rank, seq)
    held = services[0].store.params.clone()
    second = InMemoryBackup(services[1].store, services[2].store)
    services[1].store.backup_link = second
    services[1].store.record_pull(WORLD - 1, LOST_AT * WORLD, held)
    push(services[1], 0, LOST_AT)
    second.dies = LOST_AT * WORLD + 1, moment
    with pytest.raises(ActorLost):
        push(services[1], 1, LOST_AT)
    push(services[2], 1, LOST_AT)
    whole_log = order(whole)
    assert order(services[2]) == whole_log[: (LOST_AT + 1) * WORLD]
    assert torch.equal(services[2].params, _params_after(facts, LOST_AT + 1))


def _params_after(facts: ShardPlan, steps: int) -> Tensor:
    made = opened(facts)
    for seq in range(steps):
        for rank in range(WORLD):
            push(made, rank, seq)
    return made.params


def test_a_server_that_may_not_acknowledge_serves_no_more() -> None:
    """The ranks that wait beside the one whose call failed must not take the update for made."""
    facts = plan(SYNCHRONOUS, OPTIMIZERS[0])
    primary, backup = opened(facts), service(facts)
    backup_link = InMemoryBackup(primary.store, backup.store)
    primary.store.backup_link = backup_link
    backup_link.dies = 0, MOMENTS[2]
    with pytest.raises(ActorLost):
        train(primary)
    calls: list[Callable[[], object]] = [
        lambda: primary.push(PushId("run", 1, 0, 0), noise(SIZE, 0, 0), full_record(), nowhere),
        lambda: primary.pull(PullId(1, 0, 0), nowhere),
        lambda: primary.commit(0, 0, None, nowhere),
    ]
    for call in calls:
        with pytest.raises(FencedError, match="server no longer serves"):
            call()


def test_a_twin_travels_and_shares_nothing() -> None:
    facts = async_plan(WORLD, STEPS, Consistency(asynchronous=True, delay_compensation=0.5))
    first = ShardServer("a", facts, LIMITS, torch.zeros(SIZE))
    second = ShardServer("b", facts, LIMITS, torch.zeros(SIZE))
    first.restore(0, lambda params: params.fill_(1.0))
    push(first, 0, 0)
    second.store.load_snapshot(pickle.loads(pickle.dumps(first.store.snapshot())))  # noqa: S301
    assert state(second) == state(first)
    before = state(second)
    push(first, 1, 0)
    assert state(second) == before
    assert (first.store.ledger.updates, second.store.ledger.updates) == (2, 1)
