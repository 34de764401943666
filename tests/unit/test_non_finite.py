"""A step with NaN or infinity is stopped, skipped or applied on all ranks and servers."""

from collections.abc import Mapping
from functools import cache
from typing import Any

import pytest
import torch
from function_ranks import call_on_ranks, function_job
from jobs import job_of
from local_run import LocalRun, train
from spoiled_task import BATCH, SAMPLES, STEPS, Spoiled, spoiled_job
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import default_collate

import distplat
from distplat.platform.errors import NonFiniteError
from distplat.platform.model_options import EMA
from distplat.platform.progress import StepReport
from distplat.platform.resume import NOT_FINITE
from distplat.platform.sampler import Sampler
from distplat.platform.spec import CheckpointConfig
from distplat.platform.tensor_file import EMA_PREFIX

DECAY = 0.8


WORLDS: list[tuple[dict[str, Any], int]] = [
    ({"name": "ring"}, 1),
    ({"name": "ring"}, 2),
    ({"name": "ring", "shard_optimizer": True}, 2),
    ({"name": "ps-sync"}, 2),
    ({"name": "ps-sync", "num_servers": 3}, 2),
    ({"name": "hybrid", "pipeline": 2, "micro_batches": 2, "cut": "even"}, 2),
    (
        {
            "name": "hybrid",
            "pipeline": 2,
            "micro_batches": 2,
            "cut": "even",
            "data_strategy": "ps-sync",
        },
        2,
    ),
]


def name_of(world: Any) -> str:
    return "-".join(str(value) for value in world.values()) if isinstance(world, dict) else ""


@pytest.mark.sweep(2)
@pytest.mark.parametrize("spoil_loss", [False, True])
@pytest.mark.parametrize(("strategy", "workers"), WORLDS, ids=name_of)
def test_stop_ends_the_run_before_the_step_is_applied(
    strategy: dict[str, Any], workers: int, spoil_loss: bool
) -> None:
    """Sample 14 is in the first half of the third batch, on rank 0."""
    with pytest.raises(NonFiniteError) as caught:
        train(spoiled_job(strategy, workers, "stop", bad=(14,), loss_too=spoil_loss), Spoiled)
    error = caught.value
    assert (error.step, error.exit_code) == (2, 1)
    assert "step 3" in str(error)
    assert "loss" in error.what or "gradient" in error.what
    if strategy["name"] != "hybrid":
        assert error.rank == 0
        assert spoil_loss or "'0.weight'" in error.what


def bad_steps(bad: tuple[int, ...]) -> list[bool]:
    """Return for each step whether its batch has a bad sample."""
    sampler = Sampler(SAMPLES, BATCH, 1, 0, False, False)
    return [bool({int(i) for i in sampler.batch_ids(s)} & {*bad}) for s in range(STEPS)]


@cache
def plain_loop(bad: tuple[int, ...], norm: bool) -> dict[str, Tensor]:
    """Train in one process without the bad batches; return parameters, buffers and the EMA."""
    task = Spoiled(bad, norm=norm)
    torch.manual_seed(0)
    model, data = task.model(), task.train_data()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.1)
    multi_avg_fn: Any = get_ema_multi_avg_fn
    average = AveragedModel(model, multi_avg_fn=multi_avg_fn(DECAY))
    sampler = Sampler(SAMPLES, BATCH, 1, 0, False, False)
    for step, is_bad in enumerate(bad_steps(bad)):
        if not is_bad:
            inputs, targets = default_collate([data[int(i)] for i in sampler.batch_ids(step)])
            optimizer.zero_grad()
            torch.autograd.backward(task.loss(model(inputs), targets))
            optimizer.step()
            average.update_parameters(model)
    averaged = {EMA_PREFIX + name: value for name, value in average.module.named_parameters()}
    return {k: v.detach() for k, v in (model.state_dict() | averaged).items()}


BAD = [(14,), (1, 8), tuple(range(SAMPLES))]


@pytest.mark.sweep(2)
@pytest.mark.parametrize("bad", BAD[:2], ids=str)
@pytest.mark.parametrize(("strategy", "workers"), WORLDS, ids=name_of)
def test_skipped_step_matches_a_loop_without_the_batch(
    strategy: dict[str, Any], workers: int, bad: tuple[int, ...]
) -> None:
    """The parameters, the EMA, Adam's step and, on one rank, batch norm are not affected."""
    norm = workers == 1
    job = spoiled_job(strategy, workers, "skip", bad=bad, norm=norm)
    run = train(job.model_copy(update={"ema": EMA(decay=DECAY)}), Spoiled)
    found = {name: value for part in run.trained for name, value in part.items()}
    for name, value in plain_loop(bad, norm).items():
        assert torch.allclose(found[name].double(), value.double(), rtol=0, atol=1e-12), name
    assert skipped_steps(run) == sum(bad_steps(bad))


@pytest.mark.parametrize("strategy", ["ring", "ps-sync"])
def test_skipped_step_restores_buffers_on_every_rank(strategy: str) -> None:
    """Only rank 0's part of the batch is bad; rank 1's batch norm has already updated."""
    run = train(spoiled_job({"name": strategy}, 2, "skip", bad=(14,)), Spoiled)
    tracked = [rank.prepared.flat.model.state_dict()["1.num_batches_tracked"] for rank in run.ranks]
    assert [int(count) for count in tracked] == [STEPS - 2] * 2


@pytest.mark.parametrize("compression", ["topk", "powersgd"])
def test_skipped_step_keeps_the_residuals(compression: str) -> None:
    """NaN in a residual would spoil all later steps."""
    strategy = {"name": "ring", "compression": compression}
    run = train(spoiled_job(strategy, 2, "skip", bad=(14,), norm=False), Spoiled)
    assert skipped_steps(run) == 2
    assert all(torch.isfinite(value).all() for value in run.trained[0].values())


def test_too_many_skipped_steps_end_the_run() -> None:
    with pytest.raises(NonFiniteError, match="5 steps were skipped before"):
        train(spoiled_job({"name": "ring"}, 2, "skip", bad=BAD[2], norm=False), Spoiled)


@pytest.mark.parametrize("strategy", ["ring", "ps-sync"])
def test_ignore_applies_non_finite_gradients(strategy: str) -> None:
    run = train(spoiled_job({"name": strategy}, 2, "ignore", bad=(14,), norm=False), Spoiled)
    assert any(value.isnan().any() for value in run.trained[0].values())


def test_asynchronous_push_is_skipped_alone() -> None:
    run = train(spoiled_job({"name": "ps-async"}, 2, "skip", bad=(14,), norm=False), Spoiled)
    assert all(torch.isfinite(value).all() for value in run.trained[0].values())
    assert sum(skipped_steps(run, rank) for rank in range(2)) == 2


def test_asynchronous_push_stops_the_run() -> None:
    with pytest.raises(NonFiniteError, match="step 3"):
        train(spoiled_job({"name": "ps-async"}, 2, "stop", bad=(14,), norm=False), Spoiled)


def test_overflow_of_fp16_compression_is_detected() -> None:
    """Each rank's gradient is finite in float32, not in float16. All ranks see the same sum."""
    job = spoiled_job({"name": "ring", "compression": "fp16"}, 2, "stop", norm=False, large=1e6)
    with pytest.raises(NonFiniteError, match="several ranks"):
        train(job, Spoiled)


def skipped_steps(run: LocalRun, rank: int = 0) -> float:
    steps = [r for r in run.reports[rank] if isinstance(r, StepReport)]
    return max((r.figures.get("skipped_steps", 0.0) for r in steps), default=0.0)


@pytest.mark.parametrize("strategy", ["ring", "ps-sync", "ps-async"])
def test_checkpoint_marks_non_finite_parameters(
    strategy: str, caplog: pytest.LogCaptureFixture
) -> None:
    job = spoiled_job({"name": strategy}, 2, "ignore", bad=(14,), norm=False)
    job = job.model_copy(update={"checkpoint": CheckpointConfig(every_steps=1)})
    run = train(job, Spoiled)
    marked = {version: NOT_FINITE in saved.state for version, saved in run.checkpoints.items()}
    assert marked[STEPS] is True
    # Under ps-async one rank may reach the bad sample before another completes the first step.
    assert strategy == "ps-async" or marked.get(1, False) is False
    assert caplog.text.count("the trained model holds NaN or infinity, in '0.weight'") == 1


@pytest.mark.parametrize("large", [1.0, 1e300])
def test_overflow_in_the_last_step_gives_a_warning(
    large: float, caplog: pytest.LogCaptureFixture
) -> None:
    """Loss and gradient are finite, and no later step would detect the parameters."""
    job = job_of(
        "ring",
        2,
        task_args={"norm": False, "large": large},
        optimizer={"name": "SGD", "lr": 1e9},
        steps=1,
        global_batch_size=BATCH,
    )
    train(job, Spoiled)
    assert ("the trained model holds NaN or infinity" in caplog.text) is (large > 1.0)


@pytest.mark.parametrize("strategy", ["ring", "ps-sync", "ps-async"])
@pytest.mark.parametrize("overflows", [False, True])
def test_reported_checkpoint_marks_non_finite_parameters(
    strategy: str, overflows: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """
    An infinite gradient is ignored, or a step overflows without a later backward.

    Other entries of a checkpoint may be infinite, e.g. a mask or the best loss so far.
    """
    extra = {
        "mask": torch.full((2,), -torch.inf),
        "best": torch.inf,
        "bias": torch.tensor(torch.nan),
    }

    def train(config: Mapping[str, Any]) -> None:
        model = nn.Linear(3, 1)
        model, optimizer = distplat.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
        for step in range(3):
            loss = model(torch.ones(2, 3)).square().mean()
            if step == 1 and overflows:
                optimizer.param_groups[0]["lr"] = 1e39
            torch.autograd.backward(loss * (torch.inf if step == 1 and not overflows else 1.0))
            optimizer.step()
            optimizer.zero_grad()
            distplat.report({"loss": 0.0}, {**extra, "model": model.state_dict()})
            if overflows and step == 1:
                return

    failure = {"non_finite": "stop" if overflows else "ignore"}
    run = call_on_ranks(train, job=function_job(1, strategy={"name": strategy}, failure=failure))
    marked = {version: NOT_FINITE in saved.state for version, saved in run.checkpoints.items()}
    assert marked == {1: False, 2: True, **({} if overflows else {3: True})}
    assert caplog.text.count("the trained model holds NaN or infinity, in 'weight'") == 1
