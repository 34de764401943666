"""`before_first`: one evaluation of the initial weights, without an effect on training."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hybrid_workers import StopOnLostRank
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

DTYPE = torch.float64
EVERY, STEPS = 2, 4


def random_tensor(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=DTYPE, generator=torch.Generator().manual_seed(seed))


class WithSyncBatchNorm(Task):
    """A model with buffers, which training writes and evaluation reads."""

    def model(self) -> nn.Module:
        layers = nn.Linear(3, 5), nn.SyncBatchNorm(5), nn.Tanh(), nn.Linear(5, 2)
        return nn.Sequential(*layers).to(DTYPE)

    def train_data(self) -> Dataset[Any]:
        return TensorDataset(random_tensor(16, 3, seed=1), random_tensor(16, 2, seed=2))

    def eval_data(self) -> Dataset[Any] | None:
        return TensorDataset(random_tensor(6, 3, seed=3), random_tensor(6, 2, seed=4))

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.mse_loss(outputs, targets)


class WithDropout(WithSyncBatchNorm):
    """Draws random numbers in training; for one rank only, as rank threads share the generator."""

    def model(self) -> nn.Module:
        layers = nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Dropout(0.2), nn.Linear(5, 2)
        return nn.Sequential(*layers).to(DTYPE)


class Plain(WithSyncBatchNorm):
    """Without batch norm, which strategies without common steps reject."""

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).to(DTYPE)


def initial_loss(task_type: type[Task]) -> float:
    """Return the evaluation loss of the initial weights, computed in this process."""
    torch.manual_seed(3)
    task = task_type()
    model = task.model().eval()
    data: Any = task.eval_data()
    inputs, targets = data[:]
    with torch.no_grad():
        return float(nn.functional.mse_loss(model(inputs), targets))


CUT = {"name": "hybrid", "pipeline": 2, "data": 1, "cut": "even", "micro_batches": 2}
SHARDED = {"name": "ring", "shard_optimizer": True}
REPLICATED = {"name": "ps-sync", "num_servers": 2, "replication": 2}
STRATEGIES: list[tuple[Any, type[Task], dict[str, Any]]] = [
    ("ring", WithDropout, {"scaling": {"num_workers": 1}}),
    ("ring", WithSyncBatchNorm, {"ema": {"decay": 0.5}}),
    (SHARDED, WithSyncBatchNorm, {"ema": {"decay": 0.5}}),
    ("ps-sync", WithSyncBatchNorm, {}),
    (REPLICATED, Plain, {"ema": {"decay": 0.5}}),
    (CUT, Plain, {}),
    ("ps-async", Plain, {}),
]


def job(strategy: Any, before_first: bool = True, **more: Any) -> Job:
    evaluation = {"every_steps": EVERY, "before_first": before_first}
    optimizer = {"name": "Adam", "lr": 0.1}
    fields = {"steps": STEPS, "seed": 3, "optimizer": optimizer, "evaluation": evaluation, **more}
    return job_of(strategy, 2, **fields)


@pytest.mark.parametrize(("strategy", "task_type", "more"), STRATEGIES)
def test_evaluates_initial_weights_without_side_effects(
    strategy: Any, task_type: type[Task], more: dict[str, Any]
) -> None:
    run = train(job(strategy, **more), task_type)
    reports = evaluations(run)
    assert [report.step for report in reports] == [0, 2, 4]
    assert reports[0].samples == 6
    assert reports[0].metrics["loss"] == pytest.approx(initial_loss(task_type), rel=1e-12)
    if "ema" in more:
        assert reports[0].metrics["ema_loss"] == pytest.approx(initial_loss(task_type), rel=1e-12)
    if strategy == "ps-async":
        return  # not deterministic
    without = train(job(strategy, before_first=False, **more), task_type)
    assert evaluations(without) == reports[1:]
    for params, expected in zip(run.trained, without.trained, strict=True):
        assert params.keys() == expected.keys()
        assert all(torch.equal(params[name], expected[name]) for name in params)


@pytest.mark.parametrize("strategy", ["ring", "ps-sync", "ps-async", CUT])
def test_resumed_run_has_no_baseline(strategy: Any) -> None:
    saved = train(job(strategy, checkpoint={"every_steps": 2}), Plain).checkpoints[2]
    run = train(job(strategy), Plain, saved=saved)
    assert [report.step for report in evaluations(run)] == [2, 4]


class LosesRank1(StopOnLostRank):
    """Rank 1 is lost before a step; the other ranks abort when they wait for it."""

    def __init__(self, run: LocalRun, step: int) -> None:
        super().__init__(run)
        self.step = step

    def before(self, rank: int, step: int) -> StopOrder:
        if (rank, step) == (1, self.step):
            raise Abandoned("lost")
        return StopOrder.NONE


@pytest.mark.parametrize("step", [0, 3])
@pytest.mark.parametrize("strategy", ["ring", "ps-sync"])
def test_replaced_worker_does_not_repeat_the_baseline(strategy: str, step: int) -> None:
    run = LocalRun(job(strategy), Plain)
    assert not LosesRank1(run, step).make()
    before = [[*reports] for reports in run.reports]
    run.renew(1)
    assert StopOnLostRank(run).make()
    run.close()
    repeated = {
        report.step
        for reports, old in zip(run.reports, before, strict=True)
        for report in reports[len(old) :]
        if isinstance(report, EvalReport)
    }
    assert (0 in repeated) is (step == 0)
    assert [report.step for report in evaluations(run)] == [0, 2, 4], "each is reported once"


@pytest.mark.parametrize(
    ("losses", "patience", "reason"),
    [
        ([1.0, 2.0, 3.0], 2, "loss got no better since step 0, in 2 evaluations"),
        ([1.0, 2.0, 0.5], 2, None),
    ],
)
def test_early_stopping_compares_with_the_baseline(
    losses: list[float], patience: int, reason: str | None
) -> None:
    rule = EarlyStop(metric="loss", mode="min", patience=patience)
    stopping = EarlyStopping(rule)
    reasons = [stopping.evaluated(2 * n, {"loss": loss}) for n, loss in enumerate(losses)]
    assert reasons == [None, None, reason]
    resumed = EarlyStopping(rule, json.loads(json.dumps(stopping.state_dict(2, 2))))
    repeated = [resumed.evaluated(2 * n, {"loss": loss}) for n, loss in enumerate(losses)]
    assert repeated == reasons, "the state includes the baseline"


class EventRecorder(Callback):
    def __init__(self) -> None:
        self.events: list[tuple[str, int]] = []

    def on_step(self, step: StepSummary) -> None:
        self.events.append(("step", step.step))

    def on_evaluation(self, evaluation: EvalSummary) -> None:
        self.events.append(("evaluation", evaluation.step))


def fields(tmp_path: Path, **more: Any) -> dict[str, Any]:
    evaluation = {"every_steps": EVERY, "before_first": True}
    settings = {"steps": 2, "evaluation": evaluation, "storage_path": str(tmp_path), **more}
    return fields_of(settings.pop("strategy", "ring"), 0, **settings)


@pytest.mark.parametrize("strategy", ["ring", "ps-sync", "ps-async", "hybrid"])
def test_is_reported_before_the_first_step(
    strategy: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recorder = EventRecorder()
    keep_best = {"every_steps": EVERY, "keep_best": {"metric": "loss", "mode": "min"}}
    settings = fields(tmp_path, strategy=strategy, checkpoint=keep_best)
    result = Trainer(settings, Plain, callbacks=[recorder, View(sys.stdout)]).fit()
    assert recorder.events[0] == ("evaluation", 0)
    assert recorder.events.count(("evaluation", 0)) == 1
    lines = (result.path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(lines[0])[key] for key in ("kind", "step")] == ["evaluation", 0]
    assert "evaluation before the first step  loss " in capsys.readouterr().out
    record = read_run(result.path)
    assert [evaluation.step for evaluation in record.evaluations] == [0, 2]
    assert result.best_checkpoint is not None, "step 0 has no checkpoint"
    assert result.best_checkpoint.name == "step-000002"


class StopsAtOnce(Callback):
    def should_stop(self) -> bool:
        return True


@pytest.mark.parametrize("strategy", ["ring", "ps-sync", "ps-async", "hybrid"])
def test_result_names_callback_that_stops_at_the_baseline(strategy: str, tmp_path: Path) -> None:
    settings = fields(tmp_path, strategy=strategy, steps=40)
    result = Trainer(settings, Plain, callbacks=[StopsAtOnce()]).fit()
    assert result.totals.steps < 40
    assert result.stopped == "StopsAtOnce.should_stop()"
    stopped = json.loads((result.path / "result.json").read_text())["stopped"]
    assert stopped == "StopsAtOnce.should_stop()"


class WithoutEvalData(Plain):
    def eval_data(self) -> Dataset[Any] | None:
        return None


def test_rejects_task_without_evaluation_data(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"evaluation.before_first: needs evaluations, and the"):
        Trainer(fields(tmp_path), WithoutEvalData).fit()


class BrokenMetrics(Plain):
    def metrics(self, outputs: Tensor, targets: Tensor) -> dict[str, float]:
        raise RuntimeError("no figures")


def test_error_names_the_baseline_evaluation(tmp_path: Path) -> None:
    with pytest.raises(UserCodeError, match="in the evaluation before the first step: Runtime"):
        Trainer(fields(tmp_path), BrokenMetrics).fit()
