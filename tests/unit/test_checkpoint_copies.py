"""A shard's copies for checkpoints, and restoring a shard from them."""

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from control_records import full_record
from delayed import async_plan, noise, push_now
from torch import Tensor

from distplat.platform.errors import GapError, NotReadyError, StaleError
from distplat.platform.ledger import PushId, Verdict
from distplat.platform.spec import SYNCHRONOUS, Consistency
from distplat.strategies.ports import ShardCopy
from distplat.strategies.server.answers import fetch_copies
from distplat.strategies.server.dense_store import DenseStore
from distplat.strategies.server.server import ServerLimits, ShardServer
from distplat.strategies.server.store import CheckpointCopies

SIZE, WORLD, STEPS = 21, 2, 6
ADAM = {"name": "AdamW", "lr": 0.1}
ASYNC = Consistency(asynchronous=True)


def plan_of(consistency: Consistency, every: int = 2) -> Any:
    plan = async_plan(WORLD, STEPS, consistency, optimizer=ADAM)
    return replace(plan, checkpoint_every=every)


def push(rank: int, seq: int) -> PushId:
    return PushId("run", 1, rank, seq, seq * WORLD + rank)


def step(shard: DenseStore, seq: int) -> None:
    for rank in range(WORLD):
        shard.push(push(rank, seq), noise(SIZE, rank, seq))
    shard.commit(seq, None)


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def state(shard: DenseStore | DenseStore) -> dict[str, Tensor]:
    copies = {name: value.clone() for name, value in shard.optimizer.state().items()}
    return {"": shard.params.clone(), **copies}


def test_keeps_the_two_newest_due_versions_until_taken() -> None:
    value = torch.zeros(2)
    copies = CheckpointCopies[dict[str, Tensor]](2, 5)
    versions = []
    for version in range(1, 6):
        value.fill_(version)
        copies.copy_if_due(version, lambda: {"": value.clone()})
        versions.append([*copies._copies])
    assert versions == [[], [2], [2], [2, 4], [4, 5]]
    value.fill_(9)
    no_copy: Callable[[], dict[str, Tensor]] = lambda: pytest.fail("copied")  # noqa: E731
    assert copies.take(2, 5, no_copy) is None
    for version in (4, 5):
        taken = copies.take(version, 5, no_copy)
        assert taken is not None
        assert taken[""].tolist() == [version, version]
        assert copies.take(version, 5, no_copy) is None


def test_copies_only_the_last_version_without_checkpoints() -> None:
    copies = CheckpointCopies[dict[str, Tensor]](0, 5)
    value = {"": torch.ones(2)}
    copies.copy_if_due(5, lambda: pytest.fail("copied"))
    assert copies.take(4, 5, lambda: pytest.fail("copied")) is None, (
        "the shard is at another version"
    )
    assert copies.take(5, 5, lambda: value) is value


def test_synchronous_shard_resumes_bit_identically() -> None:
    shard = DenseStore(plan_of(SYNCHRONOUS), torch.linspace(-1, 1, SIZE))
    shard.restore(0)
    for seq in range(4):
        step(shard, seq)
    at_four = state(shard)
    saved = shard.take_copies(4)
    assert saved is not None
    assert equal(saved, at_four)
    step(shard, 4)
    step(shard, 5)
    assert equal(saved, at_four), "later steps do not change copies"
    params = saved.pop("")
    resumed = DenseStore(plan_of(SYNCHRONOUS), params)
    with pytest.raises(NotReadyError):
        resumed.push(push(0, 4), noise(SIZE, 0, 4))
    resumed.restore(4, saved)
    with pytest.raises(StaleError):
        resumed.push(push(0, 2), noise(SIZE, 0, 2))
    with pytest.raises(GapError):
        resumed.push(push(0, 5), noise(SIZE, 0, 5))
    step(resumed, 4)
    step(resumed, 5)
    assert equal(state(resumed), state(shard))


def test_copies_a_due_version_that_is_passed_by_several_steps() -> None:
    """The missing task completes three steps at once, and a checkpoint of step 2 is due."""
    shard = DenseStore(plan_of(ASYNC), torch.linspace(-1, 1, SIZE))
    shard.restore(0)
    for seq, task in enumerate([0, 2, 3, 4, 5]):
        push_now(shard, PushId("run", 1, 0, seq, task), noise(SIZE, task))
    assert (shard.steps, shard.take_copies(2)) == (0, None)
    push_now(shard, PushId("run", 1, 1, 0, 1), noise(SIZE, 1))
    saved = shard.take_copies(2)
    assert shard.steps == 3 and saved is not None
    resumed = DenseStore(plan_of(ASYNC), saved.pop(""))
    resumed.restore(2, saved)
    assert push_now(resumed, PushId("run", 1, 0, 0, 3), noise(SIZE, 3)) is Verdict.LATE
    assert push_now(resumed, PushId("run", 1, 0, 1, 4), noise(SIZE, 4)) is Verdict.NEW


def test_asynchronous_shard_copies_when_the_slowest_rank_reaches_the_step() -> None:
    shard = DenseStore(plan_of(ASYNC), torch.linspace(-1, 1, SIZE))
    shard.restore(0)
    for rank, seq in [(0, 0), (0, 1), (0, 2), (1, 0)]:
        push_now(shard, push(rank, seq), noise(SIZE, rank, seq))
        assert shard.take_copies(2) is None
    push_now(shard, push(1, 1), noise(SIZE, 1, 1))
    at_two = state(shard)
    push_now(shard, push(0, 3), noise(SIZE, 0, 3))
    saved = shard.take_copies(2)
    assert saved is not None
    assert equal(saved, at_two)
    params = saved.pop("")
    resumed = DenseStore(plan_of(ASYNC), params)
    resumed.restore(2, saved)
    assert (resumed.version, resumed.steps, resumed.pull(0)) == (4, 2, 4)
    assert push_now(resumed, push(0, 2), noise(SIZE, 0, 2)) is Verdict.NEW
    assert (resumed.steps, resumed.staleness_of(0)) == (2, 0)


def test_take_copies_waits_for_slow_ranks() -> None:
    server = ShardServer("server-0", plan_of(SYNCHRONOUS, 1), ServerLimits(5, 5), torch.zeros(SIZE))
    server.restore(0, lambda params: params.fill_(1.0))
    assert server.take_copies(1, 0.01) == (0, None)
    results: list[tuple[int, dict[str, Tensor] | None]] = []
    waiting = threading.Thread(target=lambda: results.append(server.take_copies(1, 5)))
    waiting.start()
    threads = [
        threading.Thread(
            target=server.push,
            args=(push(r, 0), noise(SIZE, r, 0), full_record(), lambda values, version: None),
        )
        for r in range(WORLD)
    ]
    for thread in [*threads]:
        thread.start()
    for thread in [*threads, waiting]:
        thread.join(60)
    [(steps, saved)] = results
    assert steps == 1
    assert saved is not None
    assert saved[""].shape == (SIZE,)


def replies(*copies: ShardCopy) -> Any:
    """Return a call that returns the copies in turn, and then the last one again."""
    remaining = list(copies)
    return lambda limit_s: remaining.pop(0) if len(remaining) > 1 else remaining[0]


COMPLETE = ShardCopy(5, 0, (), ["x"])


@pytest.mark.parametrize(
    ("calls", "count"),
    [
        ([replies(COMPLETE), replies(COMPLETE)], 2),
        ([replies(ShardCopy(3), ShardCopy(4), COMPLETE), replies(COMPLETE)], 2),
        ([replies(COMPLETE), replies(ShardCopy(5))], None),
        ([replies(ShardCopy(7))], None),
    ],
)
def test_fetch_copies_returns_all_shards_or_none(calls: Any, count: int | None) -> None:
    copies = fetch_copies(calls, 5, 10.0)
    assert (copies and len(copies)) == count


def test_fetch_copies_has_a_deadline() -> None:
    started = time.monotonic()
    assert fetch_copies([replies(ShardCopy(3))], 5, 0.1) is None
    assert time.monotonic() - started < 5
