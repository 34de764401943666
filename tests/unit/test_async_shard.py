"""An asynchronous shard: each gradient once, corrected for its age as the papers say."""

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

RUNS = int(os.environ.get("DISTPLAT_DRAWN_RUNS", "200"))
"""`make test-all` draws more."""
SIZE, WORLD = 37, 3
ASYNC = Consistency(asynchronous=True)
MOMENTUM = {"name": "SGD", "lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}
ADAM = {"name": "Adam", "lr": 0.01}


def make(consistency: Consistency = ASYNC, **job: Any) -> DenseStore:
    shard = DenseStore(async_plan(WORLD, 4, consistency, **job), torch.linspace(-1, 1, SIZE))
    shard.restore(0)
    return shard


def staleness(shard: DenseStore) -> Staleness:
    assert shard.staleness is not None
    return shard.staleness


def push(rank: int, seq: int, attempt: int = 1, run: str = "run") -> PushId:
    """Name a rank's push of its own part of a step."""
    return PushId(run, attempt, rank, seq, seq * WORLD + rank)


@pytest.mark.parametrize("optimizer", [MOMENTUM, ADAM], ids=["sgd", "adam"])
def test_each_gradient_is_an_update_of_a_plain_optimizer(optimizer: dict[str, Any]) -> None:
    schedule = {"name": "linear", "final_factor": 0.5}
    shard = make(optimizer=optimizer, lr_schedule=schedule)
    parameter = torch.nn.Parameter(torch.linspace(-1, 1, SIZE))
    arguments = {key: value for key, value in optimizer.items() if key != "name"}
    plain = getattr(torch.optim, optimizer["name"])([parameter], **arguments)
    seqs = [0] * WORLD
    for version, rank in enumerate([0, 0, 2, 1, 0, 2, 2, 1, 0, 2, 1, 1]):
        assert push_now(shard, push(rank, seqs[rank]), noise(SIZE, rank, seqs[rank])) is Verdict.NEW
        parameter.grad = noise(SIZE, rank, seqs[rank])
        # Three updates, one of each worker, are a step of the schedule, which has four.
        plain.param_groups[0]["lr"] = optimizer["lr"] * (1 - 0.5 * (version // WORLD) / 3)
        plain.step()
        seqs[rank] += 1
        torch.testing.assert_close(shard.params, parameter.detach(), rtol=1e-5, atol=1e-6)
        assert shard.version == version + 1


def test_staleness_is_what_came_between_pull_and_push() -> None:
    shard = make()
    shard.pull(0)
    shard.pull(1)
    push_now(shard, push(1, 0), noise(SIZE, 1))
    shard.pull(1)
    push_now(shard, push(1, 1), noise(SIZE, 2))
    push_now(shard, push(0, 0), noise(SIZE, 3))
    assert (staleness(shard).of[1], staleness(shard).of[0]) == (0, 2)
    assert list(staleness(shard).log) == [Applied(1, 1, 0), Applied(1, 4, 1), Applied(0, 0, 0)]


def test_the_learning_rate_is_divided_by_the_staleness() -> None:
    shard = make(Consistency(asynchronous=True, staleness_lr=True))
    before = shard.params.clone()
    gradients = [noise(SIZE, number) for number in range(4)]
    expected = before - 0.1 * gradients[0]  # staleness 0: as it is
    expected -= 0.1 * gradients[1]  # 1: as it is
    expected -= 0.1 / 2 * gradients[2]
    expected -= 0.1 / 3 * gradients[3]
    for rank, number in ((0, 0), (1, 0), (2, 0)):
        push_now(shard, push(rank, number), gradients[rank])
    push_now(shard, push(0, 1), gradients[3])  # it pulled version 0 and never again
    assert staleness(shard).of == [3, 1, 2]
    torch.testing.assert_close(shard.params, expected)


def test_the_gradient_is_moved_to_where_the_parameters_are() -> None:
    shard = make(Consistency(asynchronous=True, delay_compensation=0.5))
    for rank in range(WORLD):
        shard.pull(rank)
    pulled = shard.params.clone()
    first, second = noise(SIZE, 1), noise(SIZE, 2)
    push_now(shard, push(0, 0), first)
    now = shard.params.clone()
    torch.testing.assert_close(now, pulled - 0.1 * first)  # nothing came between
    push_now(shard, push(1, 0), second)
    moved = second + 0.5 * second * second * (now - pulled)
    torch.testing.assert_close(shard.params, now - 0.1 * moved)


def test_a_workers_gradient_is_left_as_it_is() -> None:
    for optimizer in (MOMENTUM, ADAM, {"name": "RMSprop", "lr": 0.1, "weight_decay": 0.1}):
        shard = make(Consistency(asynchronous=True, delay_compensation=0.5), optimizer=optimizer)
        gradient = noise(SIZE, 1)
        push_now(shard, push(0, 0), gradient)
        push_now(shard, push(1, 0), gradient)
        assert torch.equal(gradient, noise(SIZE, 1))


@pytest.mark.parametrize(
    ("offered", "error"),
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
def test_a_refused_push_changes_nothing(offered: PushId, error: type[ProtocolError]) -> None:
    shard = make()
    for rank, seq in ((0, 0), (1, 0), (0, 1)):
        push_now(shard, push(rank, seq), noise(SIZE, rank, seq))
    before = shard.params.clone()
    with pytest.raises(error):
        push_now(shard, offered, noise(SIZE, 5))
    assert torch.equal(shard.params, before)
    assert (shard.version, len(staleness(shard).log), shard.steps) == (3, 3, 0)


def test_without_parameters_it_takes_nothing() -> None:
    shard = DenseStore(async_plan(WORLD, 4, ASYNC), torch.zeros(SIZE))
    with pytest.raises(NotReadyError):
        push_now(shard, push(0, 0), noise(SIZE, 1))
    assert len(staleness(shard).log) == 0


def test_a_gradient_of_another_shape_is_refused_before_it_is_booked() -> None:
    shard = make()
    with pytest.raises(ValueError, match="gradient has shape"):
        push_now(shard, push(0, 0), torch.zeros(SIZE + 1))
    assert push_now(shard, push(0, 0), torch.zeros(SIZE)) is Verdict.NEW


CORRECTED = Consistency(asynchronous=True, delay_compensation=0.5)


def leased(rank: int, seq: int, task: int) -> PushId:
    return PushId("run", 1, rank, seq, task)


def test_of_a_leased_task_one_gradient_is_applied_whoever_brings_it() -> None:
    shard = make(CORRECTED)
    shard.pull(0)
    shard.pull(7)  # it has joined
    assert push_now(shard, leased(7, 0, 1), noise(SIZE, 1)) is Verdict.NEW
    before = shard.params.clone()
    assert push_now(shard, leased(0, 0, 1), torch.full((SIZE,), 1e9)) is Verdict.LATE
    assert torch.equal(shard.params, before)
    assert (list(staleness(shard).log), shard.steps) == ([Applied(7, 1, 0)], 0)
    for seq, task in enumerate((0, 2), start=1):
        push_now(shard, leased(7, seq, task), noise(SIZE, task))
    assert (shard.version, shard.steps) == (3, 1)


def test_a_backup_follows_workers_that_joined() -> None:
    shard, backup = make(CORRECTED), make(CORRECTED)
    shard.pull(4)
    push_now(shard, leased(4, 0, 0), noise(SIZE, 1))
    backup.load_snapshot(shard.snapshot())
    assert len(staleness(backup).values) == 5
    for one in (shard, backup):  # of a push that was dropped a backup hears nothing
        push_now(one, leased(4, 1 + (one is backup), 1), noise(SIZE, 2))
    assert torch.equal(shard.params, backup.params)
    assert list(staleness(shard).log) == list(staleness(backup).log)


class Histories(RuleBasedStateMachine):
    """
    Pushes and pulls that come late, twice, out of turn, of a task that another rank has made, or
    of an attempt that is over.

    The serial model is a list of the gradients that count, and plain SGD over them: parameters,
    versions, log and staleness must be those of the list, whatever was sent.
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
        ahead=st.sampled_from([0, 0, 0, 0, -1, -2, 1, 3]),
        attempt=st.sampled_from([1, 1, 1, 1, 0, 2]),
        twice=st.booleans(),
    )
    def push_comes(self, rank: int, task: int, ahead: int, attempt: int, twice: bool) -> None:
        seq = max(0, self.next[rank] + ahead)
        for _ in range(1 + twice):
            self._offer(PushId("run", attempt, rank, seq, task), task)

    def _offer(self, offered: PushId, task: int) -> None:
        expected, rank = self.next[offered.rank], offered.rank
        if offered.attempt != 1:
            self._refused(FencedError, offered)
        elif offered.seq == expected - 1:
            assert push_now(self.shard, offered, torch.full((4,), 1e9)) is Verdict.REPEAT_COMMITTED
        elif offered.seq < expected:
            self._refused(StaleError, offered)
        elif task in {applied.task for applied in self.log}:
            assert push_now(self.shard, offered, torch.full((4,), 1e9)) is Verdict.LATE
            self.dropped[rank] += 1
            self.next[rank] = offered.seq + 1
        else:
            gradient = noise(4, rank, task)
            assert push_now(self.shard, offered, gradient) is Verdict.NEW
            self.params = self.params - 0.1 * gradient
            self.log.append(Applied(rank, task, self.pulled[rank]))
            self.next[rank] = offered.seq + 1

    def _refused(self, error: type[ProtocolError], offered: PushId) -> None:
        with pytest.raises(error):
            push_now(self.shard, offered, torch.full((4,), 1e9))

    @rule(rank=st.integers(0, WORLD - 1))
    def pull_comes(self, rank: int) -> None:
        assert self.shard.pull(rank) == len(self.log)
        self.pulled[rank] = len(self.log)

    @invariant()
    def it_is_the_serial_model(self) -> None:
        torch.testing.assert_close(self.shard.params, self.params)
        assert self.shard.version == len(self.log)
        assert list(staleness(self.shard).log) == self.log
        tasks = {applied.task for applied in self.log}
        assert self.shard.steps == min(set(range(20)) - tasks) // WORLD
        assert [self.shard.ledger.dropped.get(rank, 0) for rank in range(WORLD)] == self.dropped


TestHistories = Histories.TestCase
TestHistories.settings = settings(max_examples=RUNS, stateful_step_count=20, deadline=None)


# Where old gradients hurt, and what helps: eight workers in turn, so that every gradient but the
# first few has a staleness of seven, on a quadratic bowl whose gradients are drawn with noise.

BOWL = torch.linspace(0.2, 1.0, 10)
TURNS, OLD = 40, 8


def loss_after(rate: float, **corrections: Any) -> float:
    consistency = Consistency(asynchronous=True, **corrections)
    plan = async_plan(OLD, TURNS, consistency, optimizer={"name": "SGD", "lr": rate})

    def gradient(params: Tensor, rank: int, step: int) -> Tensor:
        return BOWL * params + 0.01 * noise(10, rank, step)

    shard = run_schedule(plan, torch.ones(10), gradient, [*range(OLD)] * TURNS)
    assert log_flaws(staleness(shard).log, OLD, TURNS) == []
    assert set(staleness(shard).of) == {OLD - 1}
    return float((BOWL * shard.params**2).sum())


def test_old_gradients_make_a_high_rate_diverge_and_dividing_it_helps() -> None:
    assert loss_after(0.25) > 100 * float(BOWL.sum())
    assert loss_after(0.25, staleness_lr=True) < 0.01


def test_at_a_low_rate_dividing_it_only_slows_down() -> None:
    assert loss_after(0.05, staleness_lr=True) > 10 * loss_after(0.05)


def test_delay_compensation_helps_where_old_gradients_make_it_swing() -> None:
    plain = loss_after(0.2)
    assert loss_after(0.2, delay_compensation=1.0) < 0.25 * plain
