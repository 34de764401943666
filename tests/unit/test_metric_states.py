"""Metrics with state: any number of ranks matches one process on all data."""

from collections import Counter, defaultdict
from typing import Any

import numpy as np
import pytest
import torch
from hybrid_models import grid_of, hybrid_job
from jobs import job_of
from local_run import LocalRun, evaluations, train
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from distplat import Task

SAMPLES = 23


class Auc:
    """Area under the ROC curve, which is not a mean over batches."""

    def __init__(self) -> None:
        self.squash = torch.sigmoid  # equal on all ranks, not state
        self.reset()

    def reset(self) -> None:
        self.scores: list[Tensor] = []
        self.labels: list[NDArray[Any]] = []

    def update(self, scores: Tensor, labels: Tensor) -> None:
        self.scores.append(self.squash(scores))
        self.labels.append(labels.numpy())

    def merge(self, other: "Auc") -> None:
        self.scores += other.scores
        self.labels += other.labels

    def compute(self) -> float:
        scores, labels = torch.cat(self.scores), torch.tensor(np.concatenate(self.labels)).bool()
        above = scores[labels][:, None] - scores[~labels][None, :]
        return float(((above > 0).double() + 0.5 * (above == 0).double()).mean())


class Sums:
    """Sums that reset() clears in place: earlier results must not change."""

    def __init__(self) -> None:
        self.total, self.count = torch.zeros(2), 0

    def reset(self) -> None:
        self.total.zero_()
        self.count = 0

    def update(self, values: Tensor) -> None:
        self.total += torch.stack([values.sum(), values.square().sum()]).to(self.total)
        self.count += len(values)

    def merge(self, other: "Sums") -> None:
        self.total += other.total
        self.count += other.count

    def compute(self) -> dict[str, float]:
        mean, square = (self.total / self.count).tolist()
        return {"mean": mean, "variance": square - mean**2}


class Counts:
    """Counts in dictionaries of several classes; ranks have different keys."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.signs: Counter[str] = Counter()
        self.tens: defaultdict[int, int] = defaultdict(int)
        self.nested: defaultdict[str, Counter[int]] = defaultdict(Counter)

    def update(self, values: Tensor) -> None:
        tenths = (values * 10).int().tolist()
        self.signs.update("plus" if value > 0 else "minus" for value in tenths)
        for value in tenths:
            self.tens[value] += 1
            self.nested["even" if value % 2 == 0 else "odd"][value] += 1

    def merge(self, other: "Counts") -> None:
        self.signs.update(other.signs)  # a Counter adds, a dict replaces
        for key, count in other.tens.items():
            self.tens[key] += count
        for name, counter in other.nested.items():
            self.nested[name] += counter

    def compute(self) -> dict[str, float]:
        odd = {f"odd{value}": count for value, count in self.nested["odd"].items()}
        return {**self.signs, **odd, "distinct": len(self.tens), "all": self.signs.total()}


class Scored(Task):
    """Rare labels: the parts of ranks and batches differ."""

    def __init__(self) -> None:
        self.auc: Any = Auc()
        self.several: dict[str, Any] = {"sums": Sums()}

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))

    def train_data(self) -> Dataset[Any]:
        generator = torch.Generator().manual_seed(3)
        inputs = torch.randn(SAMPLES, 3, generator=generator)
        labels = (
            inputs.sum(1, keepdim=True) + torch.randn(SAMPLES, 1, generator=generator) > 1.5
        ).float()
        return TensorDataset(inputs, labels)

    def eval_data(self) -> Dataset[Any] | None:
        return self.train_data()

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.binary_cross_entropy_with_logits(outputs, targets)

    def metrics(self, outputs: Tensor, targets: Tensor) -> Any:
        self.auc.update(outputs[:, 0], targets[:, 0])
        self.several["sums"].update(outputs[:, 0])
        accuracy = ((outputs > 0) == (targets > 0.5)).float().mean()
        return {"auc": self.auc, "score": self.several["sums"], "accuracy": accuracy}


class Counted(Scored):
    def __init__(self) -> None:
        self.counts = Counts()

    def metrics(self, outputs: Tensor, targets: Tensor) -> Any:
        self.counts.update(outputs[:, 0])
        return {"counts": self.counts}


def trained(run: LocalRun) -> nn.Module:
    """Return the trained model of a run."""
    return run.ranks[0].prepared.flat.model.eval()


def single_process_metrics(task_type: type[Task], model: nn.Module) -> dict[str, Any]:
    """Return the metrics of one process on all data."""
    task: Any = task_type()
    with torch.no_grad():
        inputs, labels = task.eval_data().tensors
        return {k: v for k, v in task.metrics(model(inputs), labels).items()}


STRATEGIES: list[tuple[Any, int]] = [
    ("ring", 1),
    ("ring", 3),
    ({"name": "ps-sync", "num_servers": 2}, 1),
    ({"name": "ps-sync", "num_servers": 2}, 3),
    ("ps-async", 2),
    ("ring", 5),
]


@pytest.mark.parametrize(("strategy", "workers"), STRATEGIES)
def test_matches_one_process_on_all_data(strategy: Any, workers: int) -> None:
    job = job_of(strategy, workers, global_batch_size=5, evaluation={"every_steps": 2})
    run = train(job, Scored)
    found = {evaluation.step: evaluation.metrics for evaluation in evaluations(run)}
    assert sorted(found) == [2, 4]  # workers of ps-async are at different steps
    plain = single_process_metrics(Scored, trained(run))
    assert found[4]["auc"] == pytest.approx(plain["auc"].compute(), abs=1e-12)
    sums = plain["score"].compute()
    assert found[4]["score_mean"] == pytest.approx(sums["mean"], abs=1e-6)
    assert found[4]["score_variance"] == pytest.approx(sums["variance"], abs=1e-6)
    assert found[4]["accuracy"] == pytest.approx(float(plain["accuracy"]))


@pytest.mark.parametrize(("strategy", "workers"), STRATEGIES)
def test_dictionaries_keep_their_classes(strategy: Any, workers: int) -> None:
    job = job_of(strategy, workers, global_batch_size=5, evaluation={"every_steps": 2})
    run = train(job, Counted)
    expected = single_process_metrics(Counted, trained(run))["counts"].compute()
    found = dict(evaluations(run)[-1].metrics)
    found.pop("loss")
    assert found == {f"counts_{name}": value for name, value in expected.items()}


def test_ranks_without_samples_are_excluded() -> None:
    class FewSamples(Scored):
        def eval_data(self) -> Dataset[Any] | None:
            return TensorDataset(*self.train_data()[:2])

    class SumOfScores(Auc):
        def compute(self) -> float:
            return float(torch.cat(self.scores).sum())

    class FewWithSum(FewSamples):
        def __init__(self) -> None:
            super().__init__()
            self.auc = SumOfScores()

    run = train(job_of("ring", 5, global_batch_size=5), FewWithSum)
    (found,) = evaluations(run)
    assert found.samples == 2
    assert found.metrics["auc"] == pytest.approx(
        single_process_metrics(FewWithSum, trained(run))["auc"].compute()
    )


@pytest.mark.parametrize("name", ["2x1x2", "1x2x1", "2x1x1"])
def test_hybrid_matches_one_process(name: str) -> None:
    pipeline, tensor, data = map(int, name.split("x"))
    plan = {"tensor_plan": {"0": "colwise", "2": "rowwise"}} if tensor > 1 else {}
    options, workers = grid_of(pipeline, tensor, data, **plan)
    fields = {"global_batch_size": 8, "evaluation": {"every_steps": 2}, "steps": 2}
    run = train(hybrid_job(options, workers, **fields), Scored)
    training_fields = {"seed": 5, "optimizer": {"name": "SGD", "lr": 0.05, "momentum": 0.9}}
    (plain,) = evaluations(train(job_of("ring", 1, **fields, **training_fields), Scored))
    for found in evaluations(run):
        assert found.metrics == pytest.approx(plain.metrics, abs=1e-6)
    assert evaluations(run)


def test_ema_weights_have_their_own_metrics() -> None:
    run = train(job_of("ring", 2, ema={"decay": 0.5}, optimizer={"name": "SGD", "lr": 3.0}), Scored)
    (found,) = evaluations(run)
    assert found.metrics["score_mean"] != found.metrics["ema_score_mean"]
    assert {"auc", "ema_auc", "ema_score_variance", "ema_accuracy"} <= found.metrics.keys()


def test_metrics_named_as_those_of_ema_weights_are_refused() -> None:
    class Named(Scored):
        def metrics(self, outputs: Tensor, targets: Tensor) -> Any:
            return {"accuracy": 1.0, "ema_accuracy": 0.5}

    with pytest.raises(ValueError, match="gives 'ema_accuracy', the name of 'accuracy' with"):
        train(job_of("ring", 2, ema={"decay": 0.5}), Named)
    (found,) = evaluations(train(job_of("ring", 2), Named))
    assert found.metrics["ema_accuracy"] == 0.5


@pytest.mark.parametrize("workers", [1, 3])
def test_metric_named_loss_replaces_the_loss(workers: int) -> None:
    class Named(Scored):
        def metrics(self, outputs: Tensor, targets: Tensor) -> Any:
            return {**super().metrics(outputs, targets), "loss": self.auc}

    (found,) = evaluations(train(job_of("ring", workers), Named))
    assert found.metrics["loss"] == found.metrics["auc"]


def test_number_named_as_a_result_with_state_is_refused() -> None:
    class Named(Scored):
        def metrics(self, outputs: Tensor, targets: Tensor) -> Any:
            return {**super().metrics(outputs, targets), "score_mean": 0.5}

    with pytest.raises(ValueError, match="gives 'score_mean' twice, as a number and as a result"):
        train(job_of("ring", 2), Named)


def test_updates_outside_of_an_evaluation_are_discarded() -> None:
    class UpdatesInLoss(Scored):
        def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
            if outputs.requires_grad:
                self.auc.update(outputs[:, 0].detach(), 1 - targets[:, 0])
            return super().loss(outputs, targets)

    reference, run = (train(job_of("ring", 2), task) for task in (Scored, UpdatesInLoss))
    assert evaluations(reference) == evaluations(run)


class NotAnAttribute(Scored):
    def metrics(self, outputs: Tensor, targets: Tensor) -> Any:
        return {"auc": Auc()}


class WithoutMerge(Scored):
    class Plain:
        def reset(self) -> None:
            self.seen = 0

        def update(self) -> None:
            self.seen += 1

        def compute(self) -> int:
            return self.seen

    def __init__(self) -> None:
        self.auc = self.Plain()

    def metrics(self, outputs: Tensor, targets: Tensor) -> Any:
        self.auc.update()
        return {"auc": self.auc}


class UnsupportedState(Scored):
    def metrics(self, outputs: Tensor, targets: Tensor) -> Any:
        self.auc.scores = {1.5: object()}
        return {"auc": self.auc}


class TextArrayState(Scored):
    def metrics(self, outputs: Tensor, targets: Tensor) -> Any:
        self.auc.scores.append(np.array(["good"]))
        return {"auc": self.auc}


class TextResult(Scored):
    class Words(Auc):
        def compute(self) -> Any:
            return "good"

    def __init__(self) -> None:
        super().__init__()
        self.auc = self.Words()


@pytest.mark.parametrize(
    ("task_type", "message"),
    [
        (
            NotAnAttribute,
            "'auc', a Auc that is not an attribute of the task: create it once, in __init__",
        ),
        (WithoutMerge, r"the metric 'auc', a Plain, needs merge\(other\)"),
        (UnsupportedState, "metric 'auc'.*may have tensors, numbers and text"),
        (TextArrayState, r"metric 'auc'\['scores'\]\[0\] is an array of <U4.*may have tensors"),
        (TextResult, r"compute\(\) of the metric 'auc' gives 'auc' as a str|gives as a str"),
    ],
)
def test_unmergeable_metrics_are_named(task_type: type[Task], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train(job_of("ring", 2), task_type)


def test_torchmetrics_are_supported() -> None:
    torchmetrics = pytest.importorskip("torchmetrics")
    classification = torchmetrics.classification

    class TorchMetricsTask(Scored):
        def __init__(self) -> None:
            self.all: Any = torchmetrics.MetricCollection(
                {
                    "f1": classification.BinaryF1Score(),
                    "roc": classification.BinaryAUROC(),
                    "p": classification.BinaryRecall(),
                }
            )
            self.binned = classification.BinaryAveragePrecision(thresholds=20)
            self.pearson = torchmetrics.PearsonCorrCoef()
            self.both = classification.BinaryF1Score() + classification.BinaryRecall()
            self.largest = torchmetrics.MaxMetric()

        def metrics(self, outputs: Tensor, targets: Tensor) -> Any:
            scores, labels = outputs[:, 0].sigmoid(), targets[:, 0].int()
            self.all.update(scores, labels)
            for metric in (self.binned, self.both):
                metric.update(scores, labels)
            self.pearson.update(scores, targets[:, 0])
            self.largest.update(scores)
            single = {"ap": self.binned, "r": self.pearson, "both": self.both, "max": self.largest}
            return {**dict(self.all.items()), **single}

    for strategy, workers in [("ring", 1), ("ring", 3), ("ps-async", 2), ("ps-sync", 2)]:
        run = train(job_of(strategy, workers, evaluation={"every_steps": 2}), TorchMetricsTask)
        *_, found = evaluations(run)
        plain = single_process_metrics(TorchMetricsTask, trained(run))
        assert len(plain) == 7
        for name, metric in plain.items():
            assert found.metrics[name] == pytest.approx(float(metric.compute()), abs=1e-6), name


def test_torchmetrics_mean_over_ranks_is_refused() -> None:
    torchmetrics = pytest.importorskip("torchmetrics")

    class Mean(torchmetrics.Metric):  # type: ignore[name-defined, misc, unused-ignore]
        def __init__(self) -> None:
            super().__init__()
            self.add_state("mean", torch.zeros(()), dist_reduce_fx="mean")

        def update(self, values: Tensor) -> None:
            self.mean = values.mean()

        def compute(self) -> Tensor:
            return self.mean

    class MeanState(Scored):
        def __init__(self) -> None:
            self.mean = Mean()

        def metrics(self, outputs: Tensor, targets: Tensor) -> Any:
            self.mean.update(outputs)
            return {"mean": self.mean}

    with pytest.raises(ValueError, match=r"has 'mean' as a mean over ranks.*use a sum"):
        train(job_of("ring", 2), MeanState)
