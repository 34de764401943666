"""Every grid matches one process to 1e-5 after 20 steps."""

from typing import Any

import pytest
import torch
from comparison import distance
from hybrid_models import (
    BATCH,
    CONV_PLAN,
    GPT_PLAN,
    INCEPTION_PLAN,
    MLP_PLAN,
    SAMPLES,
    STEPS,
    Conv,
    Gpt,
    Inception,
    Mlp,
    grid_of,
    hybrid_job,
    merge_parts,
    train_plain,
)
from local_run import LocalRun, train
from marks import slow
from torch import nn

from distplat.platform.errors import SpecError
from distplat.platform.progress import EvalReport, StepReport
from distplat.strategies.loop.control import StepControl
from distplat.strategies.reduction.bucket_reducer import BucketReducer
from distplat.strategies.task import Task


def losses(run: LocalRun) -> list[float]:
    """Return the mean loss of each step over the ranks that report it."""
    found = []
    for step in range(STEPS):
        parts = [
            r for rank in run.reports for r in rank if isinstance(r, StepReport) and r.step == step
        ]
        samples = sum(part.samples for part in parts)
        assert samples == (BATCH if (step + 1) % 3 else SAMPLES % BATCH), (
            "each sample is counted once"
        )
        found.append(sum(part.loss * part.samples for part in parts) / samples)
    return found


GRIDS = {
    "2x1x2": grid_of(2, 1, 2),
    "3x1x1": grid_of(3, 1, 1),
    "1x1x3": grid_of(1, 1, 3),
    "2x1x1-gpipe": grid_of(2, 1, 1, schedule="gpipe"),
    "2x1x2-interleaved": grid_of(2, 1, 2, schedule="interleaved"),
    "2x1x2-buckets": grid_of(2, 1, 2, schedule="interleaved", bucket_mb=0.0005),
    "2x1x2-zb-buckets": grid_of(2, 1, 2, schedule="zb-h1", bucket_mb=0.0005),
    "2x1x1-zb": grid_of(2, 1, 1, schedule="zb-h1"),
    "3x1x2-zb": grid_of(3, 1, 2, schedule="zb-h1"),
    "2x1x2-recompute": grid_of(2, 1, 2, recompute=True),
    "2x1x2-auto": grid_of(2, 1, 2, cut="auto"),
}


TASK_TYPES: list[type[Task]] = [Mlp, Conv, Gpt]
GRIDS_AND_TASK_TYPES = [
    pytest.param(
        name,
        task_type,
        marks=[pytest.mark.slow] if (grid_index + type_index) % len(TASK_TYPES) else [],
    )
    for grid_index, name in enumerate(GRIDS)
    for type_index, task_type in enumerate(TASK_TYPES)
]
"""Each grid runs with one model in `make test`, with the others in `make test-all`."""


@pytest.mark.sweep(4)
@pytest.mark.parametrize(("name", "task_type"), GRIDS_AND_TASK_TYPES)
def test_grid_matches_one_process(name: str, task_type: type[Task]) -> None:
    options, workers = GRIDS[name]
    run = train(hybrid_job(options, workers), task_type)
    expected, plain_losses = train_plain(task_type)
    assert distance(merge_parts(run), expected) < 1e-5
    assert losses(run) == pytest.approx(plain_losses, rel=1e-4)


@pytest.mark.parametrize("batch", [2, 3])
def test_batch_may_have_fewer_samples_than_workers(batch: int) -> None:
    options, workers = grid_of(2, 1, 2, micro_batches=1)
    run = train(hybrid_job(options, workers, global_batch_size=batch), Mlp)
    single = train(hybrid_job({"pipeline": 1}, 1, global_batch_size=batch), Mlp)
    assert distance(merge_parts(run), merge_parts(single)) < 1e-5


@pytest.mark.sweep(3)
@pytest.mark.parametrize(
    ("task_type", "plan", "pipeline", "data"),
    [
        (Mlp, MLP_PLAN, 1, 2),
        (Mlp, MLP_PLAN, 2, 1),
        (Mlp, MLP_PLAN, 2, 2),
        (Gpt, GPT_PLAN, 1, 2),
        (Gpt, GPT_PLAN, 2, 1),
        (Conv, CONV_PLAN, 1, 2),
        (Conv, CONV_PLAN, 2, 1),
        (Inception, INCEPTION_PLAN, 1, 2),
        (Inception, INCEPTION_PLAN, 2, 1),
    ],
)
@pytest.mark.parametrize("clip", [slow(None), 0.3])
def test_tensor_slices_match_one_process(
    task_type: type[Task], plan: dict[str, str], pipeline: int, data: int, clip: float | None
) -> None:
    options, workers = grid_of(pipeline, 2, data, tensor_plan=plan)
    run = train(hybrid_job(options, workers, clip_norm=clip), task_type)
    expected, plain_losses = train_plain(task_type, clip)
    assert distance(merge_parts(run), expected) < 1e-5
    assert losses(run) == pytest.approx(plain_losses, rel=1e-4)


@pytest.mark.parametrize("pipeline", [1, 2])
def test_activation_checkpointing_recomputes_whole_stages(pipeline: int) -> None:
    """Counts forwards of the last stage: the pattern matches none of its modules."""
    calls: list[str] = []

    class Counted(Mlp):
        def model(self) -> nn.Module:
            model = super().model()
            count = lambda *_: calls.append("head") if torch.is_grad_enabled() else None  # noqa: E731
            model.get_submodule("5").register_forward_pre_hook(count)
            return model

    options, workers = grid_of(pipeline, 1, 1)
    expected = merge_parts(train(hybrid_job(options, workers, steps=3), Counted))
    forwards = len(calls)
    found = merge_parts(
        train(hybrid_job(options, workers, steps=3, activation_checkpointing="1, 2.*"), Counted)
    )
    assert len(calls) - forwards > forwards
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_checkpointing_pattern_without_a_match_is_refused() -> None:
    options, workers = grid_of(2, 1, 1)
    with pytest.raises(SpecError, match=r"activation_checkpointing.*'9' matches no module"):
        train(hybrid_job(options, workers, activation_checkpointing="9"), Mlp)


@pytest.mark.parametrize("name", ["2x1x2", "3x1x1", "2x1x2-interleaved"])
def test_clipping_uses_the_norm_of_the_whole_model(name: str) -> None:
    options, workers = GRIDS[name]
    run = train(hybrid_job(options, workers, clip_norm=0.3), Mlp)
    assert distance(merge_parts(run), train_plain(Mlp, 0.3)[0]) < 1e-5
    assert distance(merge_parts(run), train_plain(Mlp)[0]) > 1e-4, "clipping changes the model"


def evaluation(run: LocalRun) -> dict[str, float]:
    """Return the metrics of the last evaluation over all ranks."""
    reports = [r for r in run.reports[0] if isinstance(r, EvalReport)]  # the sums of all ranks
    assert sum(report.samples for report in reports) == SAMPLES
    names = next(report.sums for report in reports if report.samples)
    return {name: sum(r.sums.get(name, 0.0) for r in reports) / SAMPLES for name in names}


@pytest.mark.sweep(2)
@pytest.mark.parametrize(
    "overrides",
    [
        {"global_batch_size": 22},  # the last batch has one sample: one replica gets none
        {"precision": "bf16"},
        {"data": {"drop_last": True, "num_workers": 0}, "optimizer": {"name": "AdamW", "lr": 0.01}},
    ],
    ids=["short", "bf16", "dropped"],
)
@pytest.mark.parametrize("schedule", ["1f1b", "interleaved"])
def test_stages_and_replicas_match_one_rank(schedule: str, overrides: dict[str, Any]) -> None:
    options, workers = grid_of(2, 1, 2, schedule=schedule)
    hybrid_run, single = (
        train(hybrid_job(options, workers, **overrides), Mlp),
        train(hybrid_job({}, 1, **overrides), Mlp),
    )
    tolerance = 1e-2 if "precision" in overrides else 1e-5
    assert distance(merge_parts(hybrid_run), merge_parts(single)) < tolerance
    assert evaluation(hybrid_run) == pytest.approx(evaluation(single), rel=10 * tolerance)


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved", "zb-h1"])
def test_buckets_are_sent_while_the_pipeline_drains(
    schedule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bucket is sent after the backward of its last micro-batch, except in the first step."""
    started: list[int] = []
    finish = BucketReducer.finish

    def record_started(self: BucketReducer, local: StepControl) -> StepControl:
        started.append(len(self._handles))
        return finish(self, local)

    monkeypatch.setattr(BucketReducer, "finish", record_started)
    options, workers = grid_of(2, 1, 2, schedule=schedule, bucket_mb=0.0001)
    train(hybrid_job(options, workers, steps=2), Mlp)
    assert started[:workers] == [0] * workers
    assert min(started[workers:]) > 2, "layers of both chunks"
