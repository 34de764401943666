"""Buffers and frozen parameters are bit-identical after the loss of a worker."""

from functools import cache
from typing import Any

import pytest
import torch
from hybrid_workers import StopOnLostRank
from local_run import Attempt, LocalRun, train
from spoiled_task import Spoiled, spoiled_job
from teacher_task import WIDE, Data, Teacher, job
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from distplat.platform.errors import Abandoned
from distplat.platform.progress import StepReport
from distplat.strategies.fakes import Fabric
from distplat.strategies.loop.control import StepControl

WORLD = 3


class NormAndTeacher(Data):
    """A batch norm before a student and its teacher."""

    def model(self) -> nn.Module:
        return nn.Sequential(nn.BatchNorm1d(6, dtype=WIDE), Teacher("data assigned"))

    def train_data(self) -> TensorDataset:
        """Return 24 samples, so that no rank has a batch of one."""
        return TensorDataset(*(tensor[:24] for tensor in super().train_data().tensors))


HALVES = {"name": "ring", "compression": "bf16"}
FACTORS = {"name": "ring", "compression": "powersgd", "powersgd_rank": 1}


@cache
def train_without_loss(strategy: str) -> dict[str, Tensor]:
    return train(job(strategy, WORLD), NormAndTeacher).parameters()


def train_with_loss(strategy: str | dict[str, Any], after: int, victim: int) -> LocalRun:
    """Train; rank `victim` is lost in its operation number `after`."""
    run, fabric = LocalRun(job(strategy, WORLD), NormAndTeacher), Fabric(WORLD)
    fabric.kill(victim, after=after)
    if not StopOnLostRank(run, fabric).make():
        run.renew(victim)
        attempt = StopOnLostRank(run)
        assert attempt.make()
        assert len({*attempt.starts}) == 1
    run.close()
    return run


@pytest.mark.sweep(8)
@pytest.mark.parametrize("victim", [0, 2])
@pytest.mark.parametrize("after", range(11, 41, 5))
@pytest.mark.parametrize("strategy", ["ring", "ps-sync"])
def test_bit_identical_after_loss_at_any_operation(strategy: str, after: int, victim: int) -> None:
    run = train_with_loss(strategy, after, victim)
    for rank in range(WORLD):
        parameters = run.parameters(rank)
        for name, value in train_without_loss(strategy).items():
            assert torch.equal(parameters[name], value), (name, rank)


class CutOff(Attempt):
    """Attempt in which each rank raises `Abandoned` independently."""

    ends = (Abandoned,)

    def meanwhile(self) -> None:
        assert all(event.wait(self.run.timeout_s) for event in self.ended)
        self.give_up()


def test_step_is_reported_if_all_ranks_are_abandoned_after_it() -> None:
    run = LocalRun(job("ps-sync", WORLD), NormAndTeacher)
    last_step = 2
    for rank in run.ranks:
        exchange: Any = rank.strategy.exchange

        def stop(step: int, local: StepControl, exchange: Any = exchange) -> Any:
            total = exchange(step, local)
            if step == last_step:
                raise Abandoned("another worker was lost")
            return total

        rank.strategy.exchange = stop  # type: ignore[method-assign]
    assert not CutOff(run).make()
    last_step = -1
    second = Attempt(run)
    assert second.make()
    assert {*second.starts} == {3}
    for reports in run.reports:
        steps = [report.step for report in reports if isinstance(report, StepReport)]
        assert steps == [*range(run.job.steps or 0)]
    run.close()


REPLICAS = {"name": "hybrid", "pipeline": 1}
CUT_OFF_STRATEGIES: list[dict[str, Any]] = [
    {"name": "ring"},
    {"name": "ps-sync"},
    {"name": "ps-sync", "num_servers": 2, "replication": 2},
    REPLICAS,
    {**REPLICAS, "data_strategy": "ps-sync"},
]


@pytest.mark.sweep(4)
@pytest.mark.parametrize("informed", [None, 1])
@pytest.mark.parametrize("strategy", CUT_OFF_STRATEGIES, ids=str)
def test_buffers_of_skipped_step_are_restored_if_a_rank_is_abandoned(
    strategy: dict[str, Any], informed: int | None
) -> None:
    """The attempt ends in the skipped step; one rank knows its result, or none."""
    spec = spoiled_job(strategy, 2, "skip", bad=(14,))
    run, last_step = LocalRun(spec, Spoiled), 2
    for number, rank in enumerate(run.ranks):
        strategy_of: Any = rank.strategy
        exchange, update = strategy_of.exchange, strategy_of.update

        def stop(
            step: int, local: StepControl, number: int = number, exchange: Any = exchange
        ) -> Any:
            total = exchange(step, local)
            if step == last_step and number != informed:
                raise Abandoned("another worker was lost")
            return total

        def stop_later(step: int, total: StepControl, update: Any = update) -> None:
            update(step, total)
            if step == last_step:
                raise Abandoned("another worker was lost")

        strategy_of.exchange, strategy_of.update = stop, stop_later
    assert not CutOff(run).make()
    last_step = -1
    assert Attempt(run).make()
    run.close()
    expected = train(spec, Spoiled)
    for rank_number in range(2):
        parameters = run.parameters(rank_number)
        for name, value in expected.parameters(rank_number).items():
            assert torch.equal(parameters[name], value), (name, rank_number)


@pytest.mark.parametrize("after", [15, 25])
def test_bit_identical_after_loss_with_bf16_compression(after: int) -> None:
    expected = train(job(HALVES, WORLD), NormAndTeacher).parameters()
    actual = train_with_loss(HALVES, after, 1).parameters()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_loss_of_worker_drops_powersgd_residuals() -> None:
    """The result is not bit-identical, but close."""
    expected = train(job(FACTORS, WORLD), NormAndTeacher).parameters()
    actual = train_with_loss(FACTORS, 40, 1).parameters()
    actual_vector, expected_vector = (
        torch.cat([t.double().ravel() for t in p.values()]) for p in (actual, expected)
    )
    assert 0 < (actual_vector - expected_vector).norm() < 0.2 * expected_vector.norm()
