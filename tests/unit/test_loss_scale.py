"""`precision: fp16`: the scale and the skipped steps match torch's `GradScaler`."""

import threading
from typing import Any

import pytest
import torch
from hybrid_workers import StopOnLostRank
from jobs import job_of
from local_run import Attempt, LocalRun, train
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from distplat import Task
from distplat.platform.errors import NonFiniteError, SpecError
from distplat.platform.even_split import split_evenly
from distplat.platform.progress import AnyReport, StepReport
from distplat.platform.sampler import Sampler
from distplat.strategies.fakes import Fabric
from distplat.strategies.loop import losses
from distplat.strategies.loop.control import StepControl
from distplat.strategies.loop.losses import LossScale

SAMPLES, BATCH, STEPS, LR, CLIP = 40, 12, 12, 0.05, 0.7
GROWTH = 3


class Overflowing(Task):
    """Its gradients overflow in float16 at torch's initial scale, and in some later steps."""

    factor = 40.0

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))

    def train_data(self) -> TensorDataset:
        generator = torch.Generator().manual_seed(1)
        inputs = torch.randn(SAMPLES, 4, generator=generator)
        return TensorDataset(inputs, torch.randn(SAMPLES, 3, generator=generator))

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs.float() - targets).square().mean() * self.factor


class Underflowing(Overflowing):
    """Its gradients underflow in float16 without a scale."""

    factor = 1e-6


def job(strategy: Any = "ring", world: int = 1, **overrides: Any) -> Any:
    fields: dict[str, Any] = {
        "optimizer": {"name": "SGD", "lr": LR},
        "global_batch_size": BATCH,
        "steps": STEPS,
        "precision": "fp16",
        "clip_norm": CLIP,
        **overrides,
    }
    return job_of(strategy, world, **fields)


@pytest.fixture(autouse=True)
def short_growth_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "GROWTH_INTERVAL", GROWTH)


def plain_loop(task_type: type[Overflowing], parts: int) -> tuple[dict[str, Tensor], list[float]]:
    """
    Return the parameters and the scales after each step of a plain loop with `GradScaler`.

    Each batch is split into `parts`: in float16 their gradients differ from those of the batch.
    """
    torch.manual_seed(0)
    model, data = task_type().model(), task_type().train_data()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    scaler = torch.amp.GradScaler("cpu", growth_interval=GROWTH)
    sampler, scales = Sampler(SAMPLES, BATCH, 1, 0), []
    for step in range(STEPS):
        ids = [int(i) for i in sampler.batch_ids(step)]
        inputs, targets = (
            torch.stack(tensors) for tensors in zip(*(data[i] for i in ids), strict=True)
        )
        optimizer.zero_grad()
        for start, stop in split_evenly(len(ids), parts):
            with torch.autocast("cpu", torch.float16):
                loss = task_type().loss(model(inputs[start:stop]), targets[start:stop])
            torch.autograd.backward(scaler.scale(loss * (stop - start) / len(ids)))
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    return {name: value.detach() for name, value in model.state_dict().items()}, scales


def scales(run: LocalRun, rank: int = 0) -> list[float]:
    reports = [report for report in run.reports[rank] if isinstance(report, StepReport)]
    return [report.figures["loss_scale"] for report in reports]


STRATEGIES: list[tuple[Any, int, int]] = [
    ("ring", 1, 1),
    ("ring", 3, 1),
    ("ring", 2, 2),
    ({"name": "ring", "shard_optimizer": True}, 2, 1),
    ({"name": "ring", "overlap": False}, 2, 1),
    ({"name": "ps-sync", "num_servers": 2}, 1, 1),
    ({"name": "ps-sync", "num_servers": 2}, 3, 1),
    ({"name": "ps-async", "num_servers": 2}, 1, 1),
    ("ps-async", 1, 2),
]


@pytest.mark.parametrize(("strategy", "world", "parts"), STRATEGIES)
def test_matches_plain_loop_with_grad_scaler(strategy: Any, world: int, parts: int) -> None:
    expected, steps = plain_loop(Overflowing, world * parts)
    assert steps[0] < losses.FIRST_SCALE and len({*steps}) > 2, "the scale changes"
    run = train(job(strategy, world, gradient_accumulation=parts), Overflowing)
    for rank in range(world):
        assert scales(run, rank) == scales(run), "all ranks have the same scales"
    assert scales(run) == steps
    found = run.parameters()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0.02, atol=2e-3)


GRID = {"name": "hybrid", "cut": "even", "pipeline": 2}
GRIDS: list[tuple[dict[str, Any], int, int]] = [
    ({**GRID, "micro_batches": 2}, 2, 2),
    ({**GRID, "micro_batches": 1, "data": 2}, 4, 2),
    ({**GRID, "micro_batches": 1, "data": 2, "data_strategy": "ps-sync"}, 4, 2),
    ({"name": "hybrid", "pipeline": 1, "data": 3}, 3, 3),
    (
        {
            "name": "hybrid",
            "tensor": 2,
            "tensor_plan": {"0": "colwise", "2": "rowwise"},
            "data_strategy": "ps-sync",
            "num_servers": 2,
        },
        2,
        1,
    ),
]


@pytest.mark.parametrize(("strategy", "world", "parts"), GRIDS, ids=str)
def test_stages_and_slices_share_one_scale(strategy: Any, world: int, parts: int) -> None:
    expected, steps = plain_loop(Overflowing, parts)
    run = train(job(strategy, world), Overflowing)
    for rank in range(world):
        assert scales(run, rank) == steps, "all ranks have the same scales"
    found = {name: value for part in run.trained for name, value in part.items()}
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0.02, atol=2e-3)


@pytest.mark.parametrize("strategy", ["ring", "ps-sync"])
def test_small_gradients_do_not_underflow(strategy: str) -> None:
    rate = {"optimizer": {"name": "SGD", "lr": 5e4}, "clip_norm": None}
    run = train(job(strategy, 2, **rate), Underflowing)
    torch.manual_seed(0)
    initial = Underflowing().model().state_dict()
    single = train(job(strategy, 2, **rate, precision="fp32"), Underflowing).parameters()
    for name, value in single.items():
        change = value - initial[name]
        assert change.abs().max() > 0
        torch.testing.assert_close(run.parameters()[name], value, rtol=0.02, atol=2e-3)


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_overflow_on_one_rank_skips_the_step_on_all(rank: int) -> None:
    class OverflowsOnce(Overflowing):
        factor = 1.0
        seen = 0

        def __init__(self) -> None:
            self.number = OverflowsOnce.seen
            OverflowsOnce.seen += 1
            self.calls = 0

        def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
            self.calls += 1
            overflows = outputs.requires_grad and self.number == rank and self.calls == 3
            return super().loss(outputs, targets) * (1e30 if overflows else 1.0)

    run = train(job("ring", 3, clip_norm=None), OverflowsOnce)
    first = losses.FIRST_SCALE
    skipped = next(step for step, scale in enumerate(scales(run)) if scale < first)
    assert all(scales(run, other) == scales(run) for other in range(3))
    assert scales(run)[skipped] == first / 2
    params = [run.ranks[other].prepared.flat.params for other in range(3)]
    assert all(torch.equal(params[0], other) for other in params[1:])


def test_nan_at_any_scale_raises_non_finite_error() -> None:
    class NanLoss(Overflowing):
        def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
            return super().loss(outputs, targets) * float("nan")

    with pytest.raises(NonFiniteError, match="NaN or infin"):
        train(job(steps=30), NanLoss)


@pytest.mark.parametrize("strategy", ["ring", "ps-sync"])
def test_recovered_and_resumed_runs_are_bit_identical(strategy: str) -> None:
    spec = job(strategy, 3, checkpoint={"every_steps": 5})
    uninterrupted = train(spec, Overflowing)
    assert len({*scales(uninterrupted)}) > 2
    resumed = train(spec, Overflowing, saved=uninterrupted.checkpoints[5])
    assert scales(resumed) == scales(uninterrupted)[5:]
    for name, value in uninterrupted.parameters().items():
        assert torch.equal(resumed.parameters()[name], value), name
    if strategy == "ring":
        run, fabric = LocalRun(spec, Overflowing), Fabric(3)
        fabric.kill(1, after=14)
        assert not StopOnLostRank(run, fabric).make()
        run.renew(1)
        attempt = StopOnLostRank(run)
        assert attempt.make()
        assert min(attempt.starts) > 0
        run.close()
        for name, value in uninterrupted.parameters().items():
            assert torch.equal(run.parameters()[name], value), name


def test_asynchronous_run_resumes_with_its_scale() -> None:
    spec = job("ps-async", 1, checkpoint={"every_steps": 5})
    uninterrupted = train(spec, Overflowing)
    assert len({*scales(uninterrupted)}) > 2
    resumed = train(spec, Overflowing, saved=uninterrupted.checkpoints[5])
    assert scales(resumed) == scales(uninterrupted)[5:]
    for name, value in uninterrupted.parameters().items():
        assert torch.equal(resumed.parameters()[name], value), name


def test_asynchronous_workers_have_their_own_scales(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each push is decided alone: one that overflows is skipped, others are applied."""
    monkeypatch.setattr(losses, "GROWTH_INTERVAL", 10**6)
    leased, finished = threading.Event(), threading.Event()
    """Rank 0 has its first task; rank 1 has finished its own, for which rank 0 waits."""

    class OverflowsOnRank1(Underflowing):
        ranks = 0

        def __init__(self) -> None:
            self.rank = OverflowsOnRank1.ranks
            OverflowsOnRank1.ranks += 1

        def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
            if self.rank == 0:
                leased.set()
            assert (finished if self.rank == 0 else leased).wait(60)
            overflows = self.rank == 1 and outputs.requires_grad and not finished.is_set()
            return super().loss(outputs, targets) * (1e30 if overflows else 1.0)

    class SetsFinished(Attempt):
        def report(self, rank: int, report: AnyReport) -> None:
            super().report(rank, report)
            if rank == 1:
                finished.set()

    run = LocalRun(job("ps-async", 2), OverflowsOnRank1)
    initial = run.parameters()
    assert SetsFinished(run).make()
    run.close()
    first, steps = losses.FIRST_SCALE, [scales(run, rank) for rank in range(2)]
    assert {*steps[0]} == {first} and {*steps[1]} == {first / 2}
    assert len(steps[0]) + len(steps[1]) == 2 * STEPS
    for name, value in run.parameters().items():
        assert value.isfinite().all() and not torch.equal(value, initial[name]), name


@pytest.mark.sweep(3)
@pytest.mark.parametrize(
    ("data_strategy", "clip"), [("ring", CLIP), ("ps-sync", CLIP), ("ps-sync", None)]
)
@pytest.mark.parametrize(("behind", "lost"), [({0, 1}, 2), ({0, 1}, 0), ({0, 2, 3}, 1)])
def test_ranks_behind_get_the_scale_of_a_skipped_step(
    behind: set[int], lost: int, data_strategy: str, clip: float | None
) -> None:
    """Of the fourth step, whose gradients overflow; also if a rank that has the step is lost."""
    strategy = {**GRID, "micro_batches": 1, "data": 2, "data_strategy": data_strategy}
    spec = job(strategy, 4, checkpoint={"every_steps": 6}, clip_norm=clip)
    uninterrupted = train(spec, Overflowing)
    assert scales(uninterrupted)[3] < scales(uninterrupted)[2]
    run = LocalRun(spec, Overflowing)
    assert not StopOnLostRank(run, Fabric(4), behind).make()
    run.renew(lost)
    assert StopOnLostRank(run).make()
    run.close()
    resumed = train(spec, Overflowing, saved=uninterrupted.checkpoints[6])
    for other in (run, resumed):
        for rank in range(4):
            assert scales(other, rank)[-6:] == scales(uninterrupted)[-6:]
            for name, value in uninterrupted.trained[rank].items():
                assert torch.equal(other.trained[rank][name], value), name


def record(**fields: Any) -> StepControl:
    return StepControl(samples=4, weight=4, **fields)


def test_scale_follows_the_outcome_of_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    flat = LocalRun(job(), Overflowing).ranks[0].prepared.flat
    scale = LossScale(flat)
    for step in range(3):
        assert not scale.update(step, record())
    assert scale.value == 2**17
    assert scale.update(3, record(non_finite=1))
    assert scale.value == 2**16
    assert [scale.saved(3), scale.saved(4)] == [(2**17, 0), (2**16, 0)]
    scale.sync(3, None, torch.device("cpu"))  # the step is repeated
    assert scale.value == 2**17
    scale.sync(9, None, torch.device("cpu"))  # no rank knows step 9: the scale is kept
    assert scale.value == 2**17
    for step in range(9, 26):
        assert scale.update(step, record(non_finite=2)), (
            "the step is skipped while the scale can be lowered"
        )
    assert scale.value == 1.0
    assert not scale.update(26, record(non_finite=2))


@pytest.mark.parametrize(
    ("strategy", "overrides", "message"),
    [
        (
            {"name": "hybrid", "data": 2, "data_strategy": "ps-sync", "wire": "bf16"},
            {},
            "combined with `wire`",
        ),
        ({"name": "ring", "compression": "powersgd"}, {}, "gradients multiplied by a loss scale"),
        ({"name": "ps-sync", "wire": "fp16"}, {}, "nor with a `wire`"),
        ({"name": "ps-sync", "backup_workers": 1}, {}, "combined with `backup_workers`"),
        ("ring", {"failure": {"non_finite": "ignore"}}, "whose loss scale goes by it"),
    ],
)
def test_unsupported_combinations_are_refused(strategy: Any, overrides: Any, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        job(strategy, 2, **overrides)


def test_parameters_in_float16_are_refused() -> None:
    class Half(Overflowing):
        def model(self) -> nn.Module:
            return super().model().half()

    with pytest.raises(SpecError, match=r"'0.weight' is in float16"):
        train(job(), Half)
