"""The promise, for every grid: what one process gives, to 1e-5 after 20 steps."""

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
    plain,
    whole,
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
    """Give the mean loss of each step, over the ranks that know it."""
    found = []
    for step in range(STEPS):
        parts = [
            r for rank in run.reports for r in rank if isinstance(r, StepReport) and r.step == step
        ]
        samples = sum(part.samples for part in parts)
        assert samples == (BATCH if (step + 1) % 3 else SAMPLES % BATCH), "each is counted once"
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


KINDS: list[type[Task]] = [Mlp, Conv, Gpt]
EACH_WITH_EACH = [
    pytest.param(name, kind, marks=[pytest.mark.slow] if (place + number) % len(KINDS) else [])
    for place, name in enumerate(GRIDS)
    for number, kind in enumerate(KINDS)
]
"""Every grid with one of the models is quick, and every model with some of the grids."""


@pytest.mark.sweep(4)
@pytest.mark.parametrize(("name", "kind"), EACH_WITH_EACH)
def test_every_grid_gives_what_one_process_gives(name: str, kind: type[Task]) -> None:
    options, workers = GRIDS[name]
    run = train(hybrid_job(options, workers), kind)
    expected, plain_losses = plain(kind)
    assert distance(whole(run), expected) < 1e-5
    assert losses(run) == pytest.approx(plain_losses, rel=1e-4)


@pytest.mark.parametrize("batch", [2, 3])
def test_a_batch_may_have_less_samples_than_there_are_workers(batch: int) -> None:
    options, workers = grid_of(2, 1, 2, micro_batches=1)
    run = train(hybrid_job(options, workers, global_batch_size=batch), Mlp)
    one = train(hybrid_job({"pipeline": 1}, 1, global_batch_size=batch), Mlp)
    assert distance(whole(run), whole(one)) < 1e-5


@pytest.mark.sweep(3)
@pytest.mark.parametrize(
    ("kind", "plan", "pipeline", "data"),
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
def test_slices_give_what_one_process_gives(
    kind: type[Task], plan: dict[str, str], pipeline: int, data: int, clip: float | None
) -> None:
    options, workers = grid_of(pipeline, 2, data, tensor_plan=plan)
    run = train(hybrid_job(options, workers, clip_norm=clip), kind)
    expected, plain_losses = plain(kind, clip)
    assert distance(whole(run), expected) < 1e-5
    assert losses(run) == pytest.approx(plain_losses, rel=1e-4)


@pytest.mark.parametrize("pipeline", [1, 2])
def test_checkpointed_activations_are_those_of_whole_stages(pipeline: int) -> None:
    """The pattern names no module of the last stage, whose forwards are counted."""
    calls: list[str] = []

    class Counted(Mlp):
        def model(self) -> nn.Module:
            model = super().model()
            count = lambda *_: calls.append("head") if torch.is_grad_enabled() else None  # noqa: E731
            model.get_submodule("5").register_forward_pre_hook(count)
            return model

    options, workers = grid_of(pipeline, 1, 1)
    expected = whole(train(hybrid_job(options, workers, steps=3), Counted))
    once = len(calls)
    found = whole(
        train(hybrid_job(options, workers, steps=3, activation_checkpointing="1, 2.*"), Counted)
    )
    assert len(calls) - once > once
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_a_pattern_that_no_module_matches_is_refused() -> None:
    options, workers = grid_of(2, 1, 1)
    with pytest.raises(SpecError, match=r"activation_checkpointing.*'9' matches no module"):
        train(hybrid_job(options, workers, activation_checkpointing="9"), Mlp)


@pytest.mark.parametrize("name", ["2x1x2", "3x1x1", "2x1x2-interleaved"])
def test_clipping_takes_the_norm_of_the_whole_model(name: str) -> None:
    options, workers = GRIDS[name]
    run = train(hybrid_job(options, workers, clip_norm=0.3), Mlp)
    assert distance(whole(run), plain(Mlp, 0.3)[0]) < 1e-5
    assert distance(whole(run), plain(Mlp)[0]) > 1e-4, "the limit matters"


def evaluation(run: LocalRun) -> dict[str, float]:
    """Put the ranks' parts of the last evaluation together."""
    reports = [r for r in run.reports[0] if isinstance(r, EvalReport)]  # each has all ranks'
    assert sum(report.samples for report in reports) == SAMPLES
    names = next(report.sums for report in reports if report.samples)
    return {name: sum(r.sums.get(name, 0.0) for r in reports) / SAMPLES for name in names}


@pytest.mark.sweep(2)
@pytest.mark.parametrize(
    "more",
    [
        {"global_batch_size": 22},  # the last batch has one sample: a replica has nothing to do
        {"precision": "bf16"},
        {"data": {"drop_last": True, "num_workers": 0}, "optimizer": {"name": "AdamW", "lr": 0.01}},
    ],
    ids=["short", "bf16", "dropped"],
)
@pytest.mark.parametrize("schedule", ["1f1b", "interleaved"])
def test_two_stages_and_replicas_do_what_one_rank_does(schedule: str, more: dict[str, Any]) -> None:
    options, workers = grid_of(2, 1, 2, schedule=schedule)
    many, one = (
        train(hybrid_job(options, workers, **more), Mlp),
        train(hybrid_job({}, 1, **more), Mlp),
    )
    loose = 1e-2 if "precision" in more else 1e-5
    assert distance(whole(many), whole(one)) < loose
    assert evaluation(many) == pytest.approx(evaluation(one), rel=10 * loose)


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved", "zb-h1"])
def test_buckets_leave_while_the_pipeline_drains(
    schedule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each as soon as its last micro-batch has made it; only the first step sends nothing early."""
    started: list[int] = []
    finish = BucketReducer.finish

    def counting(self: BucketReducer, local: StepControl) -> StepControl:
        started.append(len(self._handles))
        return finish(self, local)

    monkeypatch.setattr(BucketReducer, "finish", counting)
    options, workers = grid_of(2, 1, 2, schedule=schedule, bucket_mb=0.0001)
    train(hybrid_job(options, workers, steps=2), Mlp)
    assert started[:workers] == [0] * workers
    assert min(started[workers:]) > 2, "layers of both chunks"
