"""An asynchronous shard applies each gradient once, with corrections for staleness."""

import os
from typing import Any

import pytest
import torch
from delayed import async_plan, noise, push_now, run_schedule
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from torch import Tensor

from distplat.platform.apply_log import Applied, log_flaws
from distplat.platform.errors import FencedError, NotReadyError, ProtocolError, StaleError
from distplat.platform.ledger import PushId, Verdict
from distplat.platform.spec import Consistency
from distplat.strategies.server.dense_store import DenseStore
from distplat.strategies.server.staleness import Staleness

RUNS = int(os.environ.get("DISTPLAT_DRAWN_RUNS", "100"))
"""Number of examples; more in `make test-all`."""
SIZE, WORLD = 37, 3
ASYNC = Consistency(asynchronous=True)
MOMENTUM = {"name": "SGD", "lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}
ADAM = {"name": "Adam", "lr": 0.01}


def make_shard(consistency: Consistency = ASYNC, **job: Any) -> DenseStore:
    shard = DenseStore(async_plan(WORLD, 4, consistency, **job), torch.linspace(-1, 1, SIZE))
    shard.restore(0)
    return shard


def staleness(shard: DenseStore) -> Staleness:
    assert shard.staleness is not None
    return shard.staleness


def push(rank: int, seq: int, attempt: int = 1, run: str = "run") -> PushId:
    """Return the id of the push of a rank's own task of a step."""
    return PushId(run, attempt, rank, seq, seq * WORLD + rank)


@pytest.mark.parametrize("optimizer", [MOMENTUM, ADAM], ids=["sgd", "adam"])
def test_each_gradient_is_one_update_of_a_plain_optimizer(optimizer: dict[str, Any]) -> None:
    schedule = {"name": "linear", "final_factor": 0.5}
    shard = make_shard(optimizer=optimizer, lr_schedule=schedule)
    parameter = torch.nn.Parameter(torch.linspace(-1, 1, SIZE))
    arguments = {key: value for key, value in optimizer.items() if key != "name"}
    plain = getattr(torch.optim, optimizer["name"])([parameter], **arguments)
    seqs = [0] * WORLD
    for version, rank in enumerate([0, 0, 2, 1, 0, 2, 2, 1, 0, 2, 1, 1]):
        assert push_now(shard, push(rank, seqs[rank]), noise(SIZE, rank, seqs[rank])) is Verdict.NEW
        parameter.grad = noise(SIZE, rank, seqs[rank])
        # Three updates (one per worker) are one of the schedule's four steps.
        plain.param_groups[0]["lr"] = optimizer["lr"] * (1 - 0.5 * (version // WORLD) / 3)
        plain.step()
        seqs[rank] += 1
        torch.testing.assert_close(shard.params, parameter.detach(), rtol=1e-5, atol=1e-6)
        assert shard.version == version + 1


def test_staleness_counts_updates_between_pull_and_push() -> None:
    shard = make_shard()
    shard.pull(0)
    shard.pull(1)
    push_now(shard, push(1, 0), noise(SIZE, 1))
    shard.pull(1)
    push_now(shard, push(1, 1), noise(SIZE, 2))
    push_now(shard, push(0, 0), noise(SIZE, 3))
    assert (staleness(shard).of[1], staleness(shard).of[0]) == (0, 2)
    assert list(staleness(shard).log) == [Applied(1, 1, 0), Applied(1, 4, 1), Applied(0, 0, 0)]


def test_divides_learning_rate_by_staleness() -> None:
    shard = make_shard(Consistency(asynchronous=True, staleness_lr=True))
    before = shard.params.clone()
    gradients = [noise(SIZE, number) for number in range(4)]
    expected = before - 0.1 * gradients[0]  # staleness 0: not divided
    expected -= 0.1 * gradients[1]  # staleness 1: not divided
    expected -= 0.1 / 2 * gradients[2]
    expected -= 0.1 / 3 * gradients[3]
    for rank, number in ((0, 0), (1, 0), (2, 0)):
        push_now(shard, push(rank, number), gradients[rank])
    push_now(shard, push(0, 1), gradients[3])  # rank 0 pulled only version 0
    assert staleness(shard).of == [3, 1, 2]
    torch.testing.assert_close(shard.params, expected)


def test_delay_compensation_corrects_stale_gradients() -> None:
    shard = make_shard(Consistency(asynchronous=True, delay_compensation=0.5))
    for rank in range(WORLD):
        shard.pull(rank)
    pulled = shard.params.clone()
    first, second = noise(SIZE, 1), noise(SIZE, 2)
    push_now(shard, push(0, 0), first)
    current = shard.params.clone()
    torch.testing.assert_close(current, pulled - 0.1 * first)  # staleness 0
    push_now(shard, push(1, 0), second)
    corrected = second + 0.5 * second * second * (current - pulled)
    torch.testing.assert_close(shard.params, current - 0.1 * corrected)


def test_does_not_modify_the_workers_gradient() -> None:
    for optimizer in (MOMENTUM, ADAM, {"name": "RMSprop", "lr": 0.1, "weight_decay": 0.1}):
        shard = make_shard(
            Consistency(asynchronous=True, delay_compensation=0.5), optimizer=optimizer
        )
        gradient = noise(SIZE, 1)
        push_now(shard, push(0, 0), gradient)
        push_now(shard, push(1, 0), gradient)
        assert torch.equal(gradient, noise(SIZE, 1))


@pytest.mark.parametrize(
    ("push_id", "error"),
    [
        (push(1, -1), StaleError),
        (push(0, 0), StaleError),
        (push(1, 1, attempt=0), FencedError),
        (push(1, 1, attempt=2), FencedError),
        (push(1, 1, run="other"), FencedError),
        (push(-1, 0), FencedError),
        (PushId("run", 1, 1, 1), FencedError),
    ],
)
def test_rejected_push_changes_nothing(push_id: PushId, error: type[ProtocolError]) -> None:
    shard = make_shard()
    for rank, seq in ((0, 0), (1, 0), (0, 1)):
        push_now(shard, push(rank, seq), noise(SIZE, rank, seq))
    before = shard.params.clone()
    with pytest.raises(error):
        push_now(shard, push_id, noise(SIZE, 5))
    assert torch.equal(shard.params, before)
    assert (shard.version, len(staleness(shard).log), shard.steps) == (3, 3, 0)


def test_rejects_push_before_restore() -> None:
    shard = DenseStore(async_plan(WORLD, 4, ASYNC), torch.zeros(SIZE))
    with pytest.raises(NotReadyError):
        push_now(shard, push(0, 0), noise(SIZE, 1))
    assert len(staleness(shard).log) == 0


def test_rejects_wrong_shape_before_recording_the_push() -> None:
    shard = make_shard()
    with pytest.raises(ValueError, match="gradient has shape"):
        push_now(shard, push(0, 0), torch.zeros(SIZE + 1))
    assert push_now(shard, push(0, 0), torch.zeros(SIZE)) is Verdict.NEW


CORRECTED = Consistency(asynchronous=True, delay_compensation=0.5)


def leased_push(rank: int, seq: int, task: int) -> PushId:
    return PushId("run", 1, rank, seq, task)


def test_leased_task_is_applied_once_from_any_rank() -> None:
    shard = make_shard(CORRECTED)
    shard.pull(0)
    shard.pull(7)  # a worker that joined later
    assert push_now(shard, leased_push(7, 0, 1), noise(SIZE, 1)) is Verdict.NEW
    before = shard.params.clone()
    assert push_now(shard, leased_push(0, 0, 1), torch.full((SIZE,), 1e9)) is Verdict.LATE
    assert torch.equal(shard.params, before)
    assert (list(staleness(shard).log), shard.steps) == ([Applied(7, 1, 0)], 0)
    for seq, task in enumerate((0, 2), start=1):
        push_now(shard, leased_push(7, seq, task), noise(SIZE, task))
    assert (shard.version, shard.steps) == (3, 1)


def test_backup_follows_workers_that_join() -> None:
    shard, backup = make_shard(CORRECTED), make_shard(CORRECTED)
    shard.pull(4)
    push_now(shard, leased_push(4, 0, 0), noise(SIZE, 1))
    backup.load_snapshot(shard.snapshot())
    assert len(staleness(backup).values) == 5
    for copy in (shard, backup):  # a backup receives no dropped pushes
        push_now(copy, leased_push(4, 1 + (copy is backup), 1), noise(SIZE, 2))
    assert torch.equal(shard.params, backup.params)
    assert list(staleness(shard).log) == list(staleness(backup).log)


class Histories(RuleBasedStateMachine):
    """
    Pushes and pulls that are late, repeated, out of order, of a completed task, or of an earlier
    attempt.

    The serial model is a list of the applied gradients, with plain SGD over the list: parameters,
    versions, log and staleness of the shard must equal those of the model.
    """

    def __init__(self) -> None:
        super().__init__()
        self.shard = DenseStore(async_plan(WORLD, 1000, ASYNC), torch.linspace(-1, 1, 4))
        self.shard.restore(0)
        self.params = torch.linspace(-1, 1, 4)
        self.next = [0] * WORLD
        self.pulled = [0] * WORLD
        self.dropped = [0] * WORLD
        self.log: list[Applied] = []

    @rule(
        rank=st.integers(0, WORLD - 1),
        task=st.integers(0, 12),
        offset=st.sampled_from([0, 0, 0, 0, -1, -2, 1, 3]),
        attempt=st.sampled_from([1, 1, 1, 1, 0, 2]),
        is_repeated=st.booleans(),
    )
    def push(self, rank: int, task: int, offset: int, attempt: int, is_repeated: bool) -> None:
        seq = max(0, self.next[rank] + offset)
        for _ in range(1 + is_repeated):
            self._push(PushId("run", attempt, rank, seq, task), task)

    def _push(self, push_id: PushId, task: int) -> None:
        expected, rank = self.next[push_id.rank], push_id.rank
        if push_id.attempt != 1:
            self._assert_rejected(FencedError, push_id)
        elif push_id.seq == expected - 1:
            assert push_now(self.shard, push_id, torch.full((4,), 1e9)) is Verdict.REPEAT_COMMITTED
        elif push_id.seq < expected:
            self._assert_rejected(StaleError, push_id)
        elif task in {applied.task for applied in self.log}:
            assert push_now(self.shard, push_id, torch.full((4,), 1e9)) is Verdict.LATE
            self.dropped[rank] += 1
            self.next[rank] = push_id.seq + 1
        else:
            gradient = noise(4, rank, task)
            assert push_now(self.shard, push_id, gradient) is Verdict.NEW
            self.params = self.params - 0.1 * gradient
            self.log.append(Applied(rank, task, self.pulled[rank]))
            self.next[rank] = push_id.seq + 1

    def _assert_rejected(self, error: type[ProtocolError], push_id: PushId) -> None:
        with pytest.raises(error):
            push_now(self.shard, push_id, torch.full((4,), 1e9))

    @rule(rank=st.integers(0, WORLD - 1))
    def pull(self, rank: int) -> None:
        assert self.shard.pull(rank) == len(self.log)
        self.pulled[rank] = len(self.log)

    @invariant()
    def equals_the_serial_model(self) -> None:
        torch.testing.assert_close(self.shard.params, self.params)
        assert self.shard.version == len(self.log)
        assert list(staleness(self.shard).log) == self.log
        tasks = {applied.task for applied in self.log}
        assert self.shard.steps == min(set(range(20)) - tasks) // WORLD
        assert [self.shard.ledger.dropped.get(rank, 0) for rank in range(WORLD)] == self.dropped


TestHistories = Histories.TestCase
TestHistories.settings = settings(max_examples=RUNS, stateful_step_count=20, deadline=None)


# Convergence with stale gradients, with and without corrections: eight workers take turns, so
# every gradient but the first few has a staleness of seven. The loss is quadratic, the gradients
# are noisy.

CURVATURE = torch.linspace(0.2, 1.0, 10)
ROUNDS, WORKERS = 40, 8


def final_loss(lr: float, **corrections: Any) -> float:
    consistency = Consistency(asynchronous=True, **corrections)
    plan = async_plan(WORKERS, ROUNDS, consistency, optimizer={"name": "SGD", "lr": lr})

    def gradient(params: Tensor, rank: int, step: int) -> Tensor:
        return CURVATURE * params + 0.01 * noise(10, rank, step)

    shard = run_schedule(plan, torch.ones(10), gradient, [*range(WORKERS)] * ROUNDS)
    assert log_flaws(staleness(shard).log, WORKERS, ROUNDS) == []
    assert set(staleness(shard).of) == {WORKERS - 1}
    return float((CURVATURE * shard.params**2).sum())


def test_staleness_lr_prevents_divergence_at_high_lr() -> None:
    assert final_loss(0.25) > 100 * float(CURVATURE.sum())
    assert final_loss(0.25, staleness_lr=True) < 0.01


def test_staleness_lr_slows_down_convergence_at_low_lr() -> None:
    assert final_loss(0.05, staleness_lr=True) > 10 * final_loss(0.05)


def test_delay_compensation_reduces_loss_at_medium_lr() -> None:
    plain = final_loss(0.2)
    assert final_loss(0.2, delay_compensation=1.0) < 0.25 * plain
