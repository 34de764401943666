"""A lost worker leaves no trace in buffers and frozen parameters: the same bits at the end."""

from functools import cache
from typing import Any

import pytest
import torch
from hybrid_workers import UntilOneIsLost
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


class Both(Data):
    """A batch norm before a student and its teacher."""

    def model(self) -> nn.Module:
        return nn.Sequential(nn.BatchNorm1d(6, dtype=WIDE), Teacher("data assigned"))

    def train_data(self) -> TensorDataset:
        """No rank has a batch of one."""
        return TensorDataset(*(tensor[:24] for tensor in super().train_data().tensors))


HALVES = {"name": "ring", "compression": "bf16"}
FACTORS = {"name": "ring", "compression": "powersgd", "powersgd_rank": 1}


@cache
def unfailed(strategy: str) -> dict[str, Tensor]:
    return train(job(strategy, WORLD), Both).parameters()


def lost_at(strategy: str | dict[str, Any], after: int, victim: int) -> LocalRun:
    """Train with one loss, at a rank's operation of that number."""
    run, fabric = LocalRun(job(strategy, WORLD), Both), Fabric(WORLD)
    fabric.kill(victim, after=after)
    if not UntilOneIsLost(run, fabric).make():
        run.renew(victim)
        attempt = UntilOneIsLost(run)
        assert attempt.make()
        assert len({*attempt.starts}) == 1
    run.close()
    return run


@pytest.mark.sweep(4)
@pytest.mark.parametrize("victim", [0, 2])
@pytest.mark.parametrize("after", range(11, 41, 5))
@pytest.mark.parametrize("strategy", ["ring", "ps-sync"])
def test_one_is_lost_at_any_operation(strategy: str, after: int, victim: int) -> None:
    run = lost_at(strategy, after, victim)
    for rank in range(WORLD):
        found = run.parameters(rank)
        for name, value in unfailed(strategy).items():
            assert torch.equal(found[name], value), (name, rank)


class CutOff(Attempt):
    """All ranks come out of a step, each by itself."""

    ends = (Abandoned,)

    def meanwhile(self) -> None:
        assert all(ended.wait(self.run.timeout_s) for ended in self.ended)
        self.give_up()


def test_a_step_that_was_made_when_all_were_told_to_stop_is_reported() -> None:
    run = LocalRun(job("ps-sync", WORLD), Both)
    cut = 2
    for rank in run.ranks:
        exchange: Any = rank.strategy.exchange

        def stop(step: int, local: StepControl, exchange: Any = exchange) -> Any:
            total = exchange(step, local)
            if step == cut:
                raise Abandoned("another worker was lost")
            return total

        rank.strategy.exchange = stop  # type: ignore[method-assign]
    assert not CutOff(run).make()
    cut = -1
    after = Attempt(run)
    assert after.make()
    assert {*after.starts} == {3}
    for reports in run.reports:
        steps = [one.step for one in reports if isinstance(one, StepReport)]
        assert steps == [*range(run.job.steps or 0)]
    run.close()


REPLICAS = {"name": "hybrid", "pipeline": 1}
CUT_OFF: list[dict[str, Any]] = [
    {"name": "ring"},
    {"name": "ps-sync"},
    {"name": "ps-sync", "num_servers": 2, "replication": 2},
    REPLICAS,
    {**REPLICAS, "data_strategy": "ps-sync"},
]


@pytest.mark.sweep(2)
@pytest.mark.parametrize("told", [None, 1])
@pytest.mark.parametrize("strategy", CUT_OFF, ids=str)
def test_buffers_of_a_skipped_step_are_put_back_where_a_rank_does_not_hear_of_it(
    strategy: dict[str, Any], told: int | None
) -> None:
    """The attempt ends in the step that is left out; one rank knows what became of it, or none."""
    of = spoiled_job(strategy, 2, "skip", bad=(14,))
    run, cut = LocalRun(of, Spoiled), 2
    for number, rank in enumerate(run.ranks):
        strategy_of: Any = rank.strategy
        exchange, update = strategy_of.exchange, strategy_of.update

        def stop(
            step: int, local: StepControl, number: int = number, exchange: Any = exchange
        ) -> Any:
            total = exchange(step, local)
            if step == cut and number != told:
                raise Abandoned("another worker was lost")
            return total

        def stop_later(step: int, total: StepControl, update: Any = update) -> None:
            update(step, total)
            if step == cut:
                raise Abandoned("another worker was lost")

        strategy_of.exchange, strategy_of.update = stop, stop_later
    assert not CutOff(run).make()
    cut = -1
    assert Attempt(run).make()
    run.close()
    whole = train(of, Spoiled)
    for rank_number in range(2):
        found = run.parameters(rank_number)
        for name, value in whole.parameters(rank_number).items():
            assert torch.equal(found[name], value), (name, rank_number)


@pytest.mark.parametrize("after", [15, 25])
def test_compressed_gradients(after: int) -> None:
    expected = train(job(HALVES, WORLD), Both).parameters()
    found = lost_at(HALVES, after, 1).parameters()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_residuals_are_lost_with_a_worker() -> None:
    """So the bits differ; but training goes on from where it was."""
    expected = train(job(FACTORS, WORLD), Both).parameters()
    found = lost_at(FACTORS, 40, 1).parameters()
    ours, theirs = (torch.cat([t.double().ravel() for t in p.values()]) for p in (found, expected))
    assert 0 < (ours - theirs).norm() < 0.2 * theirs.norm()
