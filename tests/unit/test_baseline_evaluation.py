"""An evaluation before the first step: of the initial weights, told once, and without a trace."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hybrid_workers import UntilOneIsLost
from jobs import fields_of, job_of
from local_run import LocalRun, evaluations, train
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from distplat import Callback, Task, Trainer
from distplat.actors.view import View
from distplat.platform.errors import Abandoned, SpecError, UserCodeError
from distplat.platform.evaluations import EarlyStop, EarlyStopping
from distplat.platform.progress import EvalReport, EvalSummary, StepSummary
from distplat.platform.run_record import read_run
from distplat.platform.spec import Job
from distplat.platform.stop_order import StopOrder

WIDE = torch.float64
EVERY, STEPS = 2, 4


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=WIDE, generator=torch.Generator().manual_seed(seed))


class Normed(Task):
    """Has buffers, which an evaluation reads and training writes."""

    def model(self) -> nn.Module:
        layers = nn.Linear(3, 5), nn.SyncBatchNorm(5), nn.Tanh(), nn.Linear(5, 2)
        return nn.Sequential(*layers).to(WIDE)

    def train_data(self) -> Dataset[Any]:
        return TensorDataset(drawn(16, 3, seed=1), drawn(16, 2, seed=2))

    def eval_data(self) -> Dataset[Any] | None:
        return TensorDataset(drawn(6, 3, seed=3), drawn(6, 2, seed=4))

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.mse_loss(outputs, targets)


class Dropping(Normed):
    """Draws random numbers in training; with one rank, for threads share a generator."""

    def model(self) -> nn.Module:
        layers = nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Dropout(0.2), nn.Linear(5, 2)
        return nn.Sequential(*layers).to(WIDE)


class Plain(Normed):
    """Without the norm, which is refused where workers are not in one step."""

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).to(WIDE)


def baseline(kind: type[Task]) -> float:
    """Give the loss of the initial weights on all evaluation data, in this process."""
    torch.manual_seed(3)
    task = kind()
    model = task.model().eval()
    data: Any = task.eval_data()
    inputs, targets = data[:]
    with torch.no_grad():
        return float(nn.functional.mse_loss(model(inputs), targets))


CUT = {"name": "hybrid", "pipeline": 2, "data": 1, "cut": "even", "micro_batches": 2}
SHARDED = {"name": "ring", "shard_optimizer": True}
KEPT_TWICE = {"name": "ps-sync", "num_servers": 2, "replication": 2}
STRATEGIES: list[tuple[Any, type[Task], dict[str, Any]]] = [
    ("ring", Dropping, {"scaling": {"num_workers": 1}}),
    ("ring", Normed, {"ema": {"decay": 0.5}}),
    (SHARDED, Normed, {"ema": {"decay": 0.5}}),
    ("ps-sync", Normed, {}),
    (KEPT_TWICE, Plain, {"ema": {"decay": 0.5}}),
    (CUT, Plain, {}),
    ("ps-async", Plain, {}),
]


def job(strategy: Any, before_first: bool = True, **more: Any) -> Job:
    evaluation = {"every_steps": EVERY, "before_first": before_first}
    optimizer = {"name": "Adam", "lr": 0.1}
    given = {"steps": STEPS, "seed": 3, "optimizer": optimizer, "evaluation": evaluation, **more}
    return job_of(strategy, 2, **given)


@pytest.mark.parametrize(("strategy", "kind", "more"), STRATEGIES)
def test_it_is_of_the_initial_weights_and_changes_nothing(
    strategy: Any, kind: type[Task], more: dict[str, Any]
) -> None:
    run = train(job(strategy, **more), kind)
    told = evaluations(run)
    assert [one.step for one in told] == [0, 2, 4]
    assert told[0].samples == 6
    assert told[0].metrics["loss"] == pytest.approx(baseline(kind), rel=1e-12)
    if "ema" in more:
        assert told[0].metrics["ema_loss"] == pytest.approx(baseline(kind), rel=1e-12)
    if strategy == "ps-async":
        return  # its runs do not repeat bit for bit
    without = train(job(strategy, before_first=False, **more), kind)
    assert evaluations(without) == told[1:]
    for mine, others in zip(run.trained, without.trained, strict=True):
        assert mine.keys() == others.keys()
        assert all(torch.equal(mine[name], others[name]) for name in mine)


@pytest.mark.parametrize("strategy", ["ring", "ps-sync", "ps-async", CUT])
def test_a_run_that_goes_on_from_a_checkpoint_has_none(strategy: Any) -> None:
    saved = train(job(strategy, checkpoint={"every_steps": 2}), Plain).checkpoints[2]
    run = train(job(strategy), Plain, saved=saved)
    assert [one.step for one in evaluations(run)] == [2, 4]


class LosesRank1(UntilOneIsLost):
    """Rank 1 is lost before a step; the others come out when they wait for it."""

    def __init__(self, run: LocalRun, step: int) -> None:
        super().__init__(run)
        self.step = step

    def before(self, rank: int, step: int) -> StopOrder:
        if (rank, step) == (1, self.step):
            raise Abandoned("lost")
        return StopOrder.NONE


@pytest.mark.parametrize("step", [0, 3])
@pytest.mark.parametrize("strategy", ["ring", "ps-sync"])
def test_a_replaced_worker_does_not_make_it_once_more(strategy: str, step: int) -> None:
    run = LocalRun(job(strategy), Plain)
    assert not LosesRank1(run, step).make()
    before = [[*reports] for reports in run.reports]
    run.renew(1)
    assert UntilOneIsLost(run).make()
    run.close()
    again = {
        one.step
        for reports, old in zip(run.reports, before, strict=True)
        for one in reports[len(old) :]
        if isinstance(one, EvalReport)
    }
    assert (0 in again) is (step == 0)
    assert [one.step for one in evaluations(run)] == [0, 2, 4], "each is told once"


@pytest.mark.parametrize(
    ("figures", "patience", "reason"),
    [
        ([1.0, 2.0, 3.0], 2, "loss got no better since step 0, in 2 evaluations"),
        ([1.0, 2.0, 0.5], 2, None),
    ],
)
def test_a_fine_tune_that_is_no_better_than_its_base_stops(
    figures: list[float], patience: int, reason: str | None
) -> None:
    rule = EarlyStop(metric="loss", mode="min", patience=patience)
    stopping = EarlyStopping(rule)
    told = [stopping.evaluated(2 * n, {"loss": one}) for n, one in enumerate(figures)]
    assert told == [None, None, reason]
    resumed = EarlyStopping(rule, json.loads(json.dumps(stopping.state_dict(2, 2))))
    again = [resumed.evaluated(2 * n, {"loss": one}) for n, one in enumerate(figures)]
    assert again == told, "a checkpoint has what came before it, the baseline too"


class Order(Callback):
    def __init__(self) -> None:
        self.told: list[tuple[str, int]] = []

    def on_step(self, step: StepSummary) -> None:
        self.told.append(("step", step.step))

    def on_evaluation(self, evaluation: EvalSummary) -> None:
        self.told.append(("evaluation", evaluation.step))


def fields(tmp_path: Path, **more: Any) -> dict[str, Any]:
    evaluation = {"every_steps": EVERY, "before_first": True}
    given = {"steps": 2, "evaluation": evaluation, "storage_path": str(tmp_path), **more}
    return fields_of(given.pop("strategy", "ring"), 0, **given)


@pytest.mark.parametrize("strategy", ["ring", "ps-sync", "ps-async", "hybrid"])
def test_it_is_told_before_the_first_step(
    strategy: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    order = Order()
    keep_best = {"every_steps": EVERY, "keep_best": {"metric": "loss", "mode": "min"}}
    given = fields(tmp_path, strategy=strategy, checkpoint=keep_best)
    result = Trainer(given, Plain, callbacks=[order, View(sys.stdout)]).fit()
    assert order.told[0] == ("evaluation", 0)
    assert order.told.count(("evaluation", 0)) == 1
    lines = (result.path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(lines[0])[key] for key in ("kind", "step")] == ["evaluation", 0]
    assert "evaluation before the first step  loss " in capsys.readouterr().out
    record = read_run(result.path)
    assert [one.step for one in record.evaluations] == [0, 2]
    assert result.best_checkpoint is not None, "there is no checkpoint of step 0 to be better"
    assert result.best_checkpoint.name == "step-000002"


class Satisfied(Callback):
    def should_stop(self) -> bool:
        return True


@pytest.mark.parametrize("strategy", ["ring", "ps-sync", "ps-async", "hybrid"])
def test_a_run_that_ends_at_it_says_so(strategy: str, tmp_path: Path) -> None:
    given = fields(tmp_path, strategy=strategy, steps=40)
    result = Trainer(given, Plain, callbacks=[Satisfied()]).fit()
    assert result.totals.steps < 40
    assert result.stopped == "Satisfied.should_stop()"
    stopped = json.loads((result.path / "result.json").read_text())["stopped"]
    assert stopped == "Satisfied.should_stop()"


class Blind(Plain):
    def eval_data(self) -> Dataset[Any] | None:
        return None


def test_a_task_without_evaluation_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"evaluation.before_first: needs evaluations, and the"):
        Trainer(fields(tmp_path), Blind).fit()


class Breaks(Plain):
    def metrics(self, outputs: Tensor, targets: Tensor) -> dict[str, float]:
        raise RuntimeError("no figures")


def test_an_error_in_it_says_where(tmp_path: Path) -> None:
    with pytest.raises(UserCodeError, match="in the evaluation before the first step: Runtime"):
        Trainer(fields(tmp_path), Breaks).fit()
