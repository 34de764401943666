"""`Task.weights`: a loss of terms with different denominators equals that of a plain loop."""

from typing import Any

import pytest
import torch
from grouped_task import BATCH, GROUPED, SAMPLES, SCALES, STEPS, STRATEGIES, Small, assert_close
from grouped_task import job as grouped_job
from hybrid_workers import StopOnLostRank
from local_run import LocalRun, train
from torch import Tensor, nn
from verify_rows import rows

from distplat import Task
from distplat.platform.errors import SpecError
from distplat.platform.progress import EvalReport, StepReport
from distplat.platform.sampler import Sampler
from distplat.platform.spec import CheckpointConfig, Job
from distplat.strategies.fakes import Fabric
from distplat.strategies.verification.verdicts import EQUAL


class Mixture(Small):
    """A mean over marked samples and a mean over positive targets."""

    def weights(self, batch: Any) -> Any:
        inputs, targets = batch
        return {"marked": (inputs[:, 0] > 0).sum(), "high": (targets > 0).sum()}

    def terms(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        marked = (targets[:, 0] + 1) / 2 > 0  # same samples as in `weights`
        high = targets > 0
        marked_sum = ((outputs - targets) * marked[:, None]).square().sum()
        return {"marked": marked_sum, "high": (outputs * high).abs().sum()}

    def loss(self, outputs: Tensor, targets: Tensor) -> Any:
        return self.terms(outputs, targets)


class StepMixture(Mixture):
    """The same loss in `step`."""

    loss = Task.loss

    def step(self, model: nn.Module, batch: Any) -> Any:
        outputs = model(batch[0])
        return {"loss": self.terms(outputs, batch[1]), "outputs": outputs}


def job(strategy: Any = "ring", world: int = 1, **more: Any) -> Job:
    return grouped_job(strategy, world, **more)


def train_plain(cls: type[Mixture], clip_norm: float | None = None) -> tuple[Any, list[float]]:
    """Train in a plain loop on whole batches, and return the parameters and the losses."""
    task = cls()
    torch.manual_seed(5)
    model, data = task.model(), task.train_data()
    named = dict(model.named_parameters())
    first = [n for n in named if n.endswith(".bias") or "norm" in n]
    second = [n for n in named if n.startswith("head.") and n not in first]
    rest = [n for n in named if n not in (*first, *second)]
    groups: list[dict[str, Any]] = [
        {"params": [named[n] for n in first], "weight_decay": 0.0},
        {"params": [named[n] for n in second], "lr": 0.01, "betas": (0.5, 0.9)},
        {"params": [named[n] for n in rest]},
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.05, weight_decay=0.3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: [*SCALES, 0.0][step])
    sampler, losses = Sampler(SAMPLES, BATCH, 1, seed=5), []
    for step in range(STEPS):
        inputs, targets = map(
            torch.stack, zip(*(data[int(i)] for i in sampler.batch_ids(step)), strict=True)
        )
        terms, denominators = task.terms(model(inputs), targets), task.weights((inputs, targets))
        loss = sum((terms[name] / denominators[name] for name in denominators), torch.zeros(()))
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        if clip_norm is not None:
            nn.utils.clip_grad_norm_([*named.values()], clip_norm)
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
    return {name: value.detach().clone() for name, value in model.state_dict().items()}, losses


CONFIGS: list[tuple[str, int, int]] = [
    ("ring-1", 1, 1),
    ("ring-1", 1, 3),
    ("ring-2", 2, 2),
    ("ring-2", 5, 1),
    ("sharded", 3, 2),
    ("ps-sync", 2, 1),
    ("ps-sync-3-servers", 5, 1),
    ("ps-async", 1, 2),
]
"""Name, workers, micro-batches. The last batch of an epoch has four samples for five workers."""


@pytest.mark.sweep(4)
@pytest.mark.parametrize("cls", [Mixture, StepMixture])
@pytest.mark.parametrize(("name", "world", "parts"), CONFIGS)
def test_run_matches_plain_loop_on_whole_batches(
    name: str, world: int, parts: int, cls: type[Mixture]
) -> None:
    strategy, _ = STRATEGIES[name]
    run = train(job(strategy, world, gradient_accumulation=parts), cls)
    expected, losses = train_plain(cls)
    assert_close(run.parameters(), expected)
    steps = [report for rank in run.reports for report in rank if isinstance(report, StepReport)]
    for step, loss in enumerate(losses):
        means = [(report.loss, report.weight or 0.0) for report in steps if report.step == step]
        actual = sum(mean * weight for mean, weight in means) / sum(weight for _, weight in means)
        assert actual == pytest.approx(loss, rel=1e-9)


@pytest.mark.parametrize("group", ["", "term-weights"])
def test_run_with_a_lost_worker_is_bit_identical(group: str) -> None:
    spec = job("ring", 3)
    run, fabric = LocalRun(spec, Mixture), Fabric(3)
    fabric.kill(1, after=8, group=group)
    assert not StopOnLostRank(run, fabric).make()
    run.renew(1)
    attempt = StopOnLostRank(run)
    assert attempt.make()
    assert min(attempt.starts) > 0
    run.close()
    for name, value in train(spec, Mixture).parameters().items():
        assert torch.equal(run.parameters()[name], value), name


def test_clipping_matches_plain_loop() -> None:
    assert_close(
        train(job("ring", 3, clip_norm=0.5), Mixture).parameters(), train_plain(Mixture, 0.5)[0]
    )


def test_mean_of_the_workers_means_differs() -> None:
    """A task without `weights` averages the workers' means."""

    class Means(Mixture):
        weights = Small.weights

        def loss(self, outputs: Tensor, targets: Tensor) -> Any:
            marked = (targets[:, 0] + 1) / 2 > 0
            denominators = {
                "marked": marked.sum().clamp(min=1),
                "high": (targets > 0).sum().clamp(min=1),
            }
            return sum(
                term / denominators[name] for name, term in self.terms(outputs, targets).items()
            )

    expected = train_plain(Mixture)[0]["body.weight"]
    assert not torch.allclose(train(job("ring", 2), Means).parameters()["body.weight"], expected)


def test_term_with_weight_0_is_ignored() -> None:
    class NeverWeighted(Mixture):
        def weights(self, batch: Any) -> Any:
            return {**super().weights(batch), "never": 0.0}

        def loss(self, outputs: Tensor, targets: Tensor) -> Any:
            return {**self.terms(outputs, targets), "never": (outputs * 0).sum()}

    assert_close(train(job("ring", 2), NeverWeighted).parameters(), train_plain(Mixture)[0])


def test_evaluation_averages_over_its_batches() -> None:
    class WithEvalData(Mixture):
        def eval_data(self) -> Any:
            return self.train_data()

    spec = job("ring", 1, evaluation={"every_steps": STEPS})
    run = train(spec, WithEvalData)
    (report,) = [report for report in run.reports[0] if isinstance(report, EvalReport)]
    task, model = WithEvalData(), run.ranks[0].prepared.flat.model.eval()
    inputs, targets = task.train_data().tensors
    total = 0.0
    for start in range(0, SAMPLES, BATCH):
        x, y = inputs[start : start + BATCH], targets[start : start + BATCH]
        weights = task.weights((x, y))
        with torch.no_grad():
            terms = task.terms(model(x), y)
        total += sum(float(terms[name] / weights[name]) for name in terms) * len(x)
    assert report.sums["loss"] / report.counts["loss"] == pytest.approx(total / SAMPLES, rel=1e-9)


@pytest.mark.parametrize("strategy", ["ring", {"name": "ps-sync", "num_servers": 2}])
def test_verification_matches_whole_batch(strategy: Any) -> None:
    spec = job(strategy, 2, steps=8, task="a:A", lr_schedule={})
    spec = spec.model_copy(update={"checkpoint": CheckpointConfig(every_steps=1, num_to_keep=9)})
    results = rows(Mixture, spec)
    assert {row.check: row.verdict for row in results.values()} == dict.fromkeys(results, EQUAL)
    assert "whole batch" in results


@pytest.mark.parametrize(
    ("strategy", "world", "message"),
    [
        ({"name": "hybrid", "data": 2}, 2, "Mixture.weights() is called before a step's first"),
        (
            {"name": "ps-sync", "backup_workers": 1},
            2,
            "weights() cannot be combined with `backup_workers`",
        ),
    ],
)
def test_unsupported_strategies_are_rejected(strategy: Any, world: int, message: str) -> None:
    with pytest.raises(SpecError) as caught:
        train(job(strategy, world), Mixture)
    assert message in str(caught.value)


INVALID: list[tuple[Any, Any, str]] = [
    ([1.0], {"a": 1}, "weights() must return a mapping of terms to numbers; got a list"),
    (None, {"a": 1}, "weights() must return a mapping of terms to numbers; got None: is there a "),
    ({"a": -1.0}, {"a": 1}, "weights() gives the weight -1: it must be finite, 0 or more"),
    ({"a": 1.0}, {"b": 1}, "loss() must give a sum for each term that weights() names ('a') as "),
    ({"a": 1.0}, 3.0, "loss() must give a sum for each term that weights() names ('a') as its "),
    ({"a": 1.0}, {"a": "sums"}, "loss() must give a scalar tensor, the sum, as 'a'"),
]


@pytest.mark.parametrize(("weights", "loss", "message"), INVALID)
def test_invalid_weights_and_losses_are_rejected(weights: Any, loss: Any, message: str) -> None:
    class InvalidTask(Small):
        def weights(self, batch: Any) -> Any:
            return weights

        def loss(self, outputs: Tensor, targets: Tensor) -> Any:
            return loss if not isinstance(loss, dict) else {n: outputs for n in loss}

    with pytest.raises(ValueError) as caught:
        train(job(optimizer=GROUPED), InvalidTask)
    assert message in str(caught.value)
