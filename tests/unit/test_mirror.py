"""A shard kept twice: whenever the primary dies, its backup goes on with the same bits."""

import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from control_records import full_record
from delayed import async_plan, noise
from dying_mirror import MOMENTS, InMemoryMirror
from jobs import job_of
from torch import Tensor

from distplat.platform.errors import ActorLost, FencedError
from distplat.platform.ledger import PushId
from distplat.platform.shard_map import ShardPlan
from distplat.platform.spec import SYNCHRONOUS, Consistency
from distplat.strategies.training.async_service import AsyncService
from distplat.strategies.training.async_shard import AsyncShard
from distplat.strategies.training.client import make_service
from distplat.strategies.training.mirror import become, twin_of
from distplat.strategies.training.service import Limits, Service
from distplat.strategies.training.shard import ParameterShard

SIZE, WORLD, STEPS, LOST_AT = 33, 2, 6, 3
LIMITS = Limits(5.0, 5.0)
OPTIMIZERS: list[dict[str, Any]] = [
    {"name": "SGD", "lr": 0.1},
    {"name": "SGD", "lr": 0.1, "momentum": 0.9},
    {"name": "AdamW", "lr": 0.01},
    {"name": "RMSprop", "lr": 0.01, "momentum": 0.5},
    {"name": "Adagrad", "lr": 0.05, "lr_decay": 0.01},
]


def plan(consistency: Consistency, optimizer: dict[str, Any]) -> ShardPlan:
    job = job_of(
        "ps-sync",
        WORLD,
        optimizer=optimizer,
        lr_schedule={"name": "linear", "final_factor": 0.5},
        steps=STEPS,
        global_batch_size=8,
        clip_norm=None if consistency.asynchronous else 0.7,
    )
    return ShardPlan(job, "run", 1, WORLD, STEPS, 1, consistency)


def service(of: ShardPlan) -> Service:
    return make_service("server", of, LIMITS, torch.zeros(SIZE))


def opened(of: ShardPlan) -> Service:
    made = service(of)
    made.restore(0, lambda params: params.copy_(torch.linspace(-1, 1, SIZE)))
    return made


def nowhere(values: Tensor, version: int) -> None:
    """Deliver nothing."""


def push(to: Service, rank: int, seq: int) -> None:
    """Push; of a synchronous step only the last rank's call may be made from one thread."""
    name, gradient = PushId("run", 1, rank, seq, seq * WORLD + rank), noise(SIZE, rank, seq)
    if isinstance(to.served, ParameterShard) and rank < WORLD - 1:
        to.served.push(name, gradient)
    else:
        to.push(name, gradient, full_record(), nowhere)


def train(to: Service, first: int = 0) -> None:
    for seq in range(first, STEPS):
        for rank in range(WORLD):
            push(to, rank, seq)


def state(of: Service) -> bytes:
    """Give all bits that matter later."""
    twin = twin_of(of.served)
    tensors = [t for vectors in twin.vectors for t in vectors]
    tensors += [twin.optimizer[name] for name in sorted(twin.optimizer)]
    return b"".join(t.float().numpy().tobytes() for t in tensors)


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
    mirror = InMemoryMirror(primary.served, backup.served)
    primary.served.mirror = mirror
    mirror.dies = LOST_AT, moment
    with pytest.raises(ActorLost):
        train(primary, filled_at)
    train(backup, LOST_AT)  # every rank makes the push again that nobody has acknowledged
    assert backup.served.version == STEPS
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
    facts = plan(how, OPTIMIZERS[1])
    whole = opened(facts)
    train(whole)
    primary, backup = opened(facts), service(facts)
    mirror = InMemoryMirror(primary.served, backup.served)
    primary.served.mirror = mirror
    mirror.dies = LOST_AT * WORLD, moment  # rank 0's push of step LOST_AT
    for seq in range(LOST_AT):
        for rank in range(WORLD):
            push(primary, rank, seq)
    held = primary.served.params.clone()  # what the last rank pulled: no update told of it
    with pytest.raises(ActorLost):
        push(primary, 0, LOST_AT)
    assert isinstance(backup.served, AsyncShard)
    push(backup, 0, LOST_AT)  # a rank that is quicker: the other one is still computing
    backup.served.pulled_elsewhere(WORLD - 1, LOST_AT * WORLD, held)
    for rank in range(1, WORLD):
        push(backup, rank, LOST_AT)
    train(backup, LOST_AT + 1)
    assert state(backup) == state(whole)
    assert list(backup.served.log) == list(whole.served.log)  # type: ignore[union-attr]


def test_a_pull_that_the_backup_knows_of_stays_as_it_is() -> None:
    facts = plan(Consistency(asynchronous=True, delay_compensation=0.5), OPTIMIZERS[0])
    backup = opened(facts)
    push(backup, 0, 0)
    shard = backup.served
    assert isinstance(shard, AsyncShard)
    before = state(backup)
    shard.pulled_elsewhere(0, 0, torch.full((SIZE,), 9.0))  # a torn vector, of a push that counts
    assert shard.pulled == [1, 0]
    assert state(backup) == before


@pytest.mark.parametrize("moment", MOMENTS[1:])
def test_a_backup_of_a_backup_has_late_pulls_too(moment: str) -> None:
    """The promoted server is told of a pull after it has filled the next backup."""
    facts = plan(Consistency(asynchronous=True, delay_compensation=0.5), OPTIMIZERS[1])
    whole = opened(facts)
    train(whole)
    services = [opened(facts), service(facts), service(facts)]
    services[0].served.mirror = InMemoryMirror(services[0].served, services[1].served)
    for seq in range(LOST_AT):
        for rank in range(WORLD):
            push(services[0], rank, seq)
    held = services[0].served.params.clone()
    second = InMemoryMirror(services[1].served, services[2].served)
    services[1].served.mirror = second
    assert isinstance(services[1].served, AsyncShard)
    assert isinstance(services[2].served, AsyncShard)
    services[1].served.pulled_elsewhere(WORLD - 1, LOST_AT * WORLD, held)
    push(services[1], 0, LOST_AT)
    second.dies = LOST_AT * WORLD + 1, moment
    with pytest.raises(ActorLost):
        push(services[1], 1, LOST_AT)
    push(services[2], 1, LOST_AT)
    whole_log = list(whole.served.log)  # type: ignore[union-attr]
    assert list(services[2].served.log) == whole_log[: (LOST_AT + 1) * WORLD]
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
    mirror = InMemoryMirror(primary.served, backup.served)
    primary.served.mirror = mirror
    mirror.dies = 0, MOMENTS[2]
    with pytest.raises(ActorLost):
        train(primary)
    calls: list[Callable[[], object]] = [
        lambda: primary.push(PushId("run", 1, 0, 0), noise(SIZE, 0, 0), full_record(), nowhere),
        lambda: primary.pull(0, (1, 0), nowhere),
        lambda: primary.commit(0, 0, None, nowhere),
    ]
    for call in calls:
        with pytest.raises(FencedError, match="server serves no more"):
            call()


def test_a_twin_travels_and_shares_nothing() -> None:
    facts = async_plan(WORLD, STEPS, Consistency(asynchronous=True, delay_compensation=0.5))
    first = AsyncService("a", facts, LIMITS, torch.zeros(SIZE))
    second = AsyncService("b", facts, LIMITS, torch.zeros(SIZE))
    first.restore(0, lambda params: params.fill_(1.0))
    push(first, 0, 0)
    become(second.served, pickle.loads(pickle.dumps(twin_of(first.served))))  # noqa: S301
    assert state(second) == state(first)
    before = state(second)
    push(first, 1, 0)
    assert state(second) == before
    assert (first.shard.ledger.made.low, second.shard.ledger.made.low) == (2, 1)
