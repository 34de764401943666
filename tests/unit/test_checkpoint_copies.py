"""What a shard keeps for checkpoints, and how it goes on from one."""

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


def plan(consistency: Consistency, every: int = 2) -> Any:
    made = async_plan(WORLD, STEPS, consistency, optimizer=ADAM)
    return replace(made, checkpoint_every=every)


def push(rank: int, seq: int) -> PushId:
    return PushId("run", 1, rank, seq, seq * WORLD + rank)


def step(shard: DenseStore, seq: int) -> None:
    for rank in range(WORLD):
        shard.push(push(rank, seq), noise(SIZE, rank, seq))
    shard.commit(seq, None)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def state(shard: DenseStore | DenseStore) -> dict[str, Tensor]:
    copies = {name: value.clone() for name, value in shard.optimizer.state().items()}
    return {"": shard.params.clone(), **copies}


def test_copies_are_of_the_two_newest_due_versions_and_given_once() -> None:
    value = torch.zeros(2)
    keeping = CheckpointCopies[dict[str, Tensor]](2, 5)
    seen = []
    for version in range(1, 6):
        value.fill_(version)
        keeping.copy_if_due(version, lambda: {"": value.clone()})
        seen.append([*keeping._copies])
    assert seen == [[], [2], [2], [2, 4], [4, 5]]
    value.fill_(9)
    late: Callable[[], dict[str, Tensor]] = lambda: pytest.fail("copied")  # noqa: E731
    assert keeping.take(2, 5, late) is None
    for version in (4, 5):
        kept = keeping.take(version, 5, late)
        assert kept is not None
        assert kept[""].tolist() == [version, version]
        assert keeping.take(version, 5, late) is None


def test_without_checkpoints_nothing_is_copied_but_where_the_run_stops() -> None:
    keeping = CheckpointCopies[dict[str, Tensor]](0, 5)
    value = {"": torch.ones(2)}
    keeping.copy_if_due(5, lambda: pytest.fail("copied"))
    assert keeping.take(4, 5, lambda: pytest.fail("copied")) is None, "it is another by now"
    assert keeping.take(5, 5, lambda: value) is value


def test_a_synchronous_shard_goes_on_to_the_same_bits() -> None:
    shard = DenseStore(plan(SYNCHRONOUS), torch.linspace(-1, 1, SIZE))
    shard.restore(0)
    for seq in range(4):
        step(shard, seq)
    at_four = state(shard)
    kept = shard.take_copies(4)
    assert kept is not None
    assert same(kept, at_four)
    step(shard, 4)
    step(shard, 5)
    assert same(kept, at_four), "copies stay as they are"
    params = kept.pop("")
    again = DenseStore(plan(SYNCHRONOUS), params)
    with pytest.raises(NotReadyError):
        again.push(push(0, 4), noise(SIZE, 0, 4))
    again.restore(4, kept)
    with pytest.raises(StaleError):
        again.push(push(0, 2), noise(SIZE, 0, 2))
    with pytest.raises(GapError):
        again.push(push(0, 5), noise(SIZE, 0, 5))
    step(again, 4)
    step(again, 5)
    assert same(state(again), state(shard))


def test_a_shard_that_waited_for_one_old_task_copies_all_the_same() -> None:
    """The slowest is at three steps at once, and a checkpoint of two is due."""
    shard = DenseStore(plan(ASYNC), torch.linspace(-1, 1, SIZE))
    shard.restore(0)
    for seq, task in enumerate([0, 2, 3, 4, 5]):
        push_now(shard, PushId("run", 1, 0, seq, task), noise(SIZE, task))
    assert (shard.steps, shard.take_copies(2)) == (0, None)
    push_now(shard, PushId("run", 1, 1, 0, 1), noise(SIZE, 1))
    kept = shard.take_copies(2)
    assert shard.steps == 3 and kept is not None
    again = DenseStore(plan(ASYNC), kept.pop(""))
    again.restore(2, kept)
    assert push_now(again, PushId("run", 1, 0, 0, 3), noise(SIZE, 3)) is Verdict.LATE
    assert push_now(again, PushId("run", 1, 0, 1, 4), noise(SIZE, 4)) is Verdict.NEW


def test_an_asynchronous_shard_copies_when_the_slowest_is_there() -> None:
    shard = DenseStore(plan(ASYNC), torch.linspace(-1, 1, SIZE))
    shard.restore(0)
    for rank, seq in [(0, 0), (0, 1), (0, 2), (1, 0)]:
        push_now(shard, push(rank, seq), noise(SIZE, rank, seq))
        assert shard.take_copies(2) is None
    push_now(shard, push(1, 1), noise(SIZE, 1, 1))
    at_two = state(shard)
    push_now(shard, push(0, 3), noise(SIZE, 0, 3))
    kept = shard.take_copies(2)
    assert kept is not None
    assert same(kept, at_two)
    params = kept.pop("")
    again = DenseStore(plan(ASYNC), params)
    again.restore(2, kept)
    assert (again.version, again.steps, again.pull(0)) == (4, 2, 4)
    assert push_now(again, push(0, 2), noise(SIZE, 0, 2)) is Verdict.NEW
    assert (again.steps, again.staleness_of(0)) == (2, 0)


def test_a_service_waits_for_ranks_that_are_behind() -> None:
    service = ShardServer("server-0", plan(SYNCHRONOUS, 1), ServerLimits(5, 5), torch.zeros(SIZE))
    service.restore(0, lambda params: params.fill_(1.0))
    assert service.take_copies(1, 0.01) == (0, None)
    found: list[tuple[int, dict[str, Tensor] | None]] = []
    waiting = threading.Thread(target=lambda: found.append(service.take_copies(1, 5)))
    waiting.start()
    threads = [
        threading.Thread(
            target=service.push,
            args=(push(r, 0), noise(SIZE, r, 0), full_record(), lambda values, version: None),
        )
        for r in range(WORLD)
    ]
    for thread in [*threads]:
        thread.start()
    for thread in [*threads, waiting]:
        thread.join(60)
    [(steps, kept)] = found
    assert steps == 1
    assert kept is not None
    assert kept[""].shape == (SIZE,)


def answers(*copies: ShardCopy) -> Any:
    left = list(copies)
    return lambda limit_s: left.pop(0) if len(left) > 1 else left[0]


HERE = ShardCopy(5, 0, (), ["x"])


@pytest.mark.parametrize(
    ("asks", "found"),
    [
        ([answers(HERE), answers(HERE)], 2),
        ([answers(ShardCopy(3), ShardCopy(4), HERE), answers(HERE)], 2),
        ([answers(HERE), answers(ShardCopy(5))], None),
        ([answers(ShardCopy(7))], None),
    ],
)
def test_all_shards_copies_or_none(asks: Any, found: int | None) -> None:
    copies = fetch_copies(asks, 5, 10.0)
    assert (copies and len(copies)) == found


def test_nobody_moves() -> None:
    began = time.monotonic()
    assert fetch_copies([answers(ShardCopy(3))], 5, 0.1) is None
    assert time.monotonic() - began < 5
