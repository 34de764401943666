"""A step with NaN or infinity: stopped, skipped or applied, on all ranks and servers alike."""

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


@pytest.mark.parametrize("loss_too", [False, True])
@pytest.mark.parametrize(("strategy", "workers"), WORLDS, ids=name_of)
def test_stop_ends_the_run_before_the_step_is_applied(
    strategy: dict[str, Any], workers: int, loss_too: bool
) -> None:
    """Sample 14 is in the third batch, and in its first half: rank 0 has it."""
    with pytest.raises(NonFiniteError) as caught:
        train(spoiled_job(strategy, workers, "stop", bad=(14,), loss_too=loss_too), Spoiled)
    error = caught.value
    assert (error.step, error.exit_code) == (2, 1)
    assert "step 3" in str(error)
    assert "loss" in error.what or "gradient" in error.what
    if strategy["name"] != "hybrid":
        assert error.rank == 0
        assert loss_too or "'0.weight'" in error.what


def batches_with(bad: tuple[int, ...]) -> list[bool]:
    """Say of each step whether its batch has a bad sample."""
    sampler = Sampler(SAMPLES, BATCH, 1, 0, False, False)
    return [bool({int(i) for i in sampler.batch_ids(s)} & {*bad}) for s in range(STEPS)]


@cache
def plain(bad: tuple[int, ...], norm: bool) -> dict[str, Tensor]:
    """Train in one process, leaving the bad batches out: for model, buffers and the average."""
    task = Spoiled(bad, norm=norm)
    torch.manual_seed(0)
    model, data = task.model(), task.train_data()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.1)
    by: Any = get_ema_multi_avg_fn
    average = AveragedModel(model, multi_avg_fn=by(DECAY))
    sampler = Sampler(SAMPLES, BATCH, 1, 0, False, False)
    for step, spoiled in enumerate(batches_with(bad)):
        if not spoiled:
            inputs, targets = default_collate([data[int(i)] for i in sampler.batch_ids(step)])
            optimizer.zero_grad()
            torch.autograd.backward(task.loss(model(inputs), targets))
            optimizer.step()
            average.update_parameters(model)
    averaged = {EMA_PREFIX + name: value for name, value in average.module.named_parameters()}
    return {k: v.detach() for k, v in (model.state_dict() | averaged).items()}


BAD = [(14,), (1, 8), tuple(range(SAMPLES))]


@pytest.mark.parametrize("bad", BAD[:2], ids=str)
@pytest.mark.parametrize(("strategy", "workers"), WORLDS, ids=name_of)
def test_a_skipped_step_leaves_nothing_behind(
    strategy: dict[str, Any], workers: int, bad: tuple[int, ...]
) -> None:
    """
    Parameters, their average, Adam's step and, on one rank, batch norm are as if the batch had not
    been.
    """
    norm = workers == 1
    job = spoiled_job(strategy, workers, "skip", bad=bad, norm=norm)
    run = train(job.model_copy(update={"ema": EMA(decay=DECAY)}), Spoiled)
    found = {name: value for part in run.trained for name, value in part.items()}
    for name, value in plain(bad, norm).items():
        assert torch.allclose(found[name].double(), value.double(), rtol=0, atol=1e-12), name
    assert skipped(run) == sum(batches_with(bad))


@pytest.mark.parametrize("strategy", ["ring", "ps-sync"])
def test_buffers_of_a_skipped_step_are_put_back_on_every_rank(strategy: str) -> None:
    """Only rank 0's part of the batch is bad; rank 1's batch norm has seen a good one."""
    run = train(spoiled_job({"name": strategy}, 2, "skip", bad=(14,)), Spoiled)
    tracked = [rank.prepared.flat.model.state_dict()["1.num_batches_tracked"] for rank in run.ranks]
    assert [int(one) for one in tracked] == [STEPS - 2] * 2


@pytest.mark.parametrize("compression", ["topk", "powersgd"])
def test_residuals_of_a_skipped_step_stay(compression: str) -> None:
    """What compression still owes is what it owed before the step: the runs go on alike."""
    chosen = {"name": "ring", "compression": compression}
    spoiled = train(spoiled_job(chosen, 2, "skip", bad=(14,), norm=False), Spoiled)
    assert skipped(spoiled) == 2
    assert all(torch.isfinite(value).all() for value in spoiled.trained[0].values())


def test_the_budget_of_skipped_steps_is_a_limit() -> None:
    with pytest.raises(NonFiniteError, match="5 steps were skipped before"):
        train(spoiled_job({"name": "ring"}, 2, "skip", bad=BAD[2], norm=False), Spoiled)


@pytest.mark.parametrize("strategy", ["ring", "ps-sync"])
def test_ignore_applies_what_comes(strategy: str) -> None:
    run = train(spoiled_job({"name": strategy}, 2, "ignore", bad=(14,), norm=False), Spoiled)
    assert any(value.isnan().any() for value in run.trained[0].values())


def test_an_asynchronous_push_is_skipped_by_itself() -> None:
    run = train(spoiled_job({"name": "ps-async"}, 2, "skip", bad=(14,), norm=False), Spoiled)
    assert all(torch.isfinite(value).all() for value in run.trained[0].values())
    assert sum(skipped(run, rank) for rank in range(2)) == 2


def test_an_asynchronous_push_stops_the_run() -> None:
    with pytest.raises(NonFiniteError, match="step 3"):
        train(spoiled_job({"name": "ps-async"}, 2, "stop", bad=(14,), norm=False), Spoiled)


def test_what_overflows_in_halves_on_the_way_is_found() -> None:
    """Each rank's gradient is finite; as float16 it is not, and all ranks see the same sum."""
    job = spoiled_job({"name": "ring", "compression": "fp16"}, 2, "stop", norm=False, large=1e6)
    with pytest.raises(NonFiniteError, match="several ranks"):
        train(job, Spoiled)


def skipped(run: LocalRun, rank: int = 0) -> float:
    steps = [r for r in run.reports[rank] if isinstance(r, StepReport)]
    return max((r.figures.get("skipped_steps", 0.0) for r in steps), default=0.0)


@pytest.mark.parametrize("strategy", ["ring", "ps-sync", "ps-async"])
def test_a_checkpoint_tells_that_its_parameters_are_not_finite(
    strategy: str, caplog: pytest.LogCaptureFixture
) -> None:
    job = spoiled_job({"name": strategy}, 2, "ignore", bad=(14,), norm=False)
    job = job.model_copy(update={"checkpoint": CheckpointConfig(every_steps=1)})
    run = train(job, Spoiled)
    told = {version: NOT_FINITE in saved.state for version, saved in run.checkpoints.items()}
    assert told[STEPS] is True
    # Under ps-async one rank may be at the bad sample before another has made the first step.
    assert strategy == "ps-async" or told.get(1, False) is False
    assert caplog.text.count("the trained model holds NaN or infinity, in '0.weight'") == 1


@pytest.mark.parametrize("large", [1.0, 1e300])
def test_a_last_step_that_overflows_is_told(large: float, caplog: pytest.LogCaptureFixture) -> None:
    """Loss and gradient are finite, and no step follows that would find the parameters."""
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
def test_a_reported_checkpoint_tells_that_parameters_are_not_finite(
    strategy: str, overflows: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """
    A gradient that is infinite and ignored, or a step that overflows, with no backward after it.

    What is reported besides may be infinite: a mask, a figure that nothing was better than.
    """
    kept = {
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
            distplat.report({"loss": 0.0}, {**kept, "model": model.state_dict()})
            if overflows and step == 1:
                return

    failure = {"non_finite": "stop" if overflows else "ignore"}
    run = call_on_ranks(train, job=function_job(1, strategy={"name": strategy}, failure=failure))
    told = {version: NOT_FINITE in saved.state for version, saved in run.checkpoints.items()}
    assert told == {1: False, 2: True, **({} if overflows else {3: True})}
    assert caplog.text.count("the trained model holds NaN or infinity, in 'weight'") == 1
