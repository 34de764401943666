"""`precision: fp16`: the same scale and the same steps left out as with torch's `GradScaler`."""

import threading
from typing import Any

import pytest
import torch
from hybrid_workers import UntilOneIsLost
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


class Steep(Task):
    """Gradients that overflow in float16 at torch's first scale, and later now and then."""

    factor = 40.0

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))

    def train_data(self) -> TensorDataset:
        made = torch.Generator().manual_seed(1)
        inputs = torch.randn(SAMPLES, 4, generator=made)
        return TensorDataset(inputs, torch.randn(SAMPLES, 3, generator=made))

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs.float() - targets).square().mean() * self.factor


class Flat(Steep):
    """Gradients that float16 would round to zero without a scale."""

    factor = 1e-6


def job(strategy: Any = "ring", world: int = 1, **more: Any) -> Any:
    fields: dict[str, Any] = {
        "optimizer": {"name": "SGD", "lr": LR},
        "global_batch_size": BATCH,
        "steps": STEPS,
        "precision": "fp16",
        "clip_norm": CLIP,
        **more,
    }
    return job_of(strategy, world, **fields)


@pytest.fixture(autouse=True)
def quick_growth(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "GROWTH_INTERVAL", GROWTH)


def plain(kind: type[Steep], parts: int) -> tuple[dict[str, Tensor], list[float]]:
    """
    A loop by torch's documents, each batch in so many parts, whose gradients in float16 are not
    those of the whole batch; gives the scales after each step, too.
    """
    torch.manual_seed(0)
    model, data = kind().model(), kind().train_data()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    scaler = torch.amp.GradScaler("cpu", growth_interval=GROWTH)
    sampler, scales = Sampler(SAMPLES, BATCH, 1, 0), []
    for step in range(STEPS):
        ids = [int(i) for i in sampler.batch_ids(step)]
        inputs, targets = (torch.stack(one) for one in zip(*(data[i] for i in ids), strict=True))
        optimizer.zero_grad()
        for start, stop in split_evenly(len(ids), parts):
            with torch.autocast("cpu", torch.float16):
                loss = kind().loss(model(inputs[start:stop]), targets[start:stop])
            torch.autograd.backward(scaler.scale(loss * (stop - start) / len(ids)))
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    return {name: one.detach() for name, one in model.state_dict().items()}, scales


def scales(run: LocalRun, rank: int = 0) -> list[float]:
    steps = [one for one in run.reports[rank] if isinstance(one, StepReport)]
    return [one.figures["loss_scale"] for one in steps]


WAYS: list[tuple[Any, int, int]] = [
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


@pytest.mark.parametrize(("strategy", "world", "parts"), WAYS)
def test_a_run_is_a_loop_with_torchs_scaler(strategy: Any, world: int, parts: int) -> None:
    expected, steps = plain(Steep, world * parts)
    assert steps[0] < losses.FIRST_SCALE and len({*steps}) > 2, "or there is nothing to see"
    run = train(job(strategy, world, gradient_accumulation=parts), Steep)
    for rank in range(world):
        assert scales(run, rank) == scales(run), "alike on all ranks"
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
def test_stages_and_slices_have_one_scale(strategy: Any, world: int, parts: int) -> None:
    expected, steps = plain(Steep, parts)
    run = train(job(strategy, world), Steep)
    for rank in range(world):
        assert scales(run, rank) == steps, "alike on all ranks"
    found = {name: value for one in run.trained for name, value in one.items()}
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0.02, atol=2e-3)


@pytest.mark.parametrize("strategy", ["ring", "ps-sync"])
def test_small_gradients_are_not_lost(strategy: str) -> None:
    rate = {"optimizer": {"name": "SGD", "lr": 5e4}, "clip_norm": None}
    run = train(job(strategy, 2, **rate), Flat)
    torch.manual_seed(0)
    begun = Flat().model().state_dict()
    single = train(job(strategy, 2, **rate, precision="fp32"), Flat).parameters()
    for name, value in single.items():
        moved = value - begun[name]
        assert moved.abs().max() > 0
        torch.testing.assert_close(run.parameters()[name], value, rtol=0.02, atol=2e-3)


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_an_overflow_on_one_rank_leaves_the_step_out_on_all(rank: int) -> None:
    class Once(Steep):
        factor = 1.0
        seen = 0

        def __init__(self) -> None:
            self.number = Once.seen
            Once.seen += 1
            self.calls = 0

        def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
            self.calls += 1
            there = outputs.requires_grad and self.number == rank and self.calls == 3
            return super().loss(outputs, targets) * (1e30 if there else 1.0)

    run = train(job("ring", 3, clip_norm=None), Once)
    first = losses.FIRST_SCALE
    at = next(n for n, one in enumerate(scales(run)) if one < first)
    assert all(scales(run, one) == scales(run) for one in range(3))
    assert scales(run)[at] == first / 2
    states = [run.ranks[one].prepared.flat.params for one in range(3)]
    assert all(torch.equal(states[0], one) for one in states[1:])


def test_what_is_not_finite_at_any_scale_is_treated_as_ever() -> None:
    class Broken(Steep):
        def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
            return super().loss(outputs, targets) * float("nan")

    with pytest.raises(NonFiniteError, match="NaN or infin"):
        train(job(steps=30), Broken)


@pytest.mark.parametrize("strategy", ["ring", "ps-sync"])
def test_a_lost_worker_and_a_resumed_run_leave_no_trace(strategy: str) -> None:
    of = job(strategy, 3, checkpoint={"every_steps": 5})
    whole = train(of, Steep)
    assert len({*scales(whole)}) > 2
    again = train(of, Steep, saved=whole.checkpoints[5])
    assert scales(again) == scales(whole)[5:]
    for name, value in whole.parameters().items():
        assert torch.equal(again.parameters()[name], value), name
    if strategy == "ring":
        run, fabric = LocalRun(of, Steep), Fabric(3)
        fabric.kill(1, after=14)
        assert not UntilOneIsLost(run, fabric).make()
        run.renew(1)
        attempt = UntilOneIsLost(run)
        assert attempt.make()
        assert min(attempt.starts) > 0
        run.close()
        for name, value in whole.parameters().items():
            assert torch.equal(run.parameters()[name], value), name


def test_an_asynchronous_run_goes_on_with_its_scale() -> None:
    of = job("ps-async", 1, checkpoint={"every_steps": 5})
    whole = train(of, Steep)
    assert len({*scales(whole)}) > 2
    again = train(of, Steep, saved=whole.checkpoints[5])
    assert scales(again) == scales(whole)[5:]
    for name, value in whole.parameters().items():
        assert torch.equal(again.parameters()[name], value), name


def test_asynchronous_workers_have_scales_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """A push is decided by itself: one that overflows is left out, others are applied."""
    monkeypatch.setattr(losses, "GROWTH_INTERVAL", 10**6)
    leased, made = threading.Event(), threading.Event()
    """Rank 0 has its first task; rank 1 has made its first one, and rank 0 waits for that."""

    class Overflows(Flat):
        ranks = 0

        def __init__(self) -> None:
            self.rank = Overflows.ranks
            Overflows.ranks += 1

        def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
            if self.rank == 0:
                leased.set()
            assert (made if self.rank == 0 else leased).wait(60)
            broken = self.rank == 1 and outputs.requires_grad and not made.is_set()
            return super().loss(outputs, targets) * (1e30 if broken else 1.0)

    class Reporting(Attempt):
        def report(self, rank: int, report: AnyReport) -> None:
            super().report(rank, report)
            if rank == 1:
                made.set()

    run = LocalRun(job("ps-async", 2), Overflows)
    begun = run.parameters()
    assert Reporting(run).make()
    run.close()
    first, steps = losses.FIRST_SCALE, [scales(run, rank) for rank in range(2)]
    assert {*steps[0]} == {first} and {*steps[1]} == {first / 2}
    assert len(steps[0]) + len(steps[1]) == 2 * STEPS
    for name, value in run.parameters().items():
        assert value.isfinite().all() and not torch.equal(value, begun[name]), name


@pytest.mark.sweep(3)
@pytest.mark.parametrize(
    ("data_strategy", "clip"), [("ring", CLIP), ("ps-sync", CLIP), ("ps-sync", None)]
)
@pytest.mark.parametrize(("deaf", "lost"), [({0, 1}, 2), ({0, 1}, 0), ({0, 2, 3}, 1)])
def test_stages_that_had_not_heard_of_a_step_have_its_scale(
    deaf: set[int], lost: int, data_strategy: str, clip: float | None
) -> None:
    """Of the fourth one, for which the scale was too large; also where who had heard is lost."""
    chosen = {**GRID, "micro_batches": 1, "data": 2, "data_strategy": data_strategy}
    of = job(chosen, 4, checkpoint={"every_steps": 6}, clip_norm=clip)
    whole = train(of, Steep)
    assert scales(whole)[3] < scales(whole)[2]
    run = LocalRun(of, Steep)
    assert not UntilOneIsLost(run, Fabric(4), deaf).make()
    run.renew(lost)
    assert UntilOneIsLost(run).make()
    run.close()
    again = train(of, Steep, saved=whole.checkpoints[6])
    for one in (run, again):
        for rank in range(4):
            assert scales(one, rank)[-6:] == scales(whole)[-6:]
            for name, value in whole.trained[rank].items():
                assert torch.equal(one.trained[rank][name], value), name


def record(**fields: Any) -> StepControl:
    return StepControl(samples=4, weight=4, **fields)


def test_the_scale_follows_what_came_of_the_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    flat = LocalRun(job(), Steep).ranks[0].prepared.flat
    scale = LossScale(flat)
    for step in range(3):
        assert not scale.update(step, record())
    assert scale.value == 2**17
    assert scale.update(3, record(non_finite=1))
    assert scale.value == 2**16
    assert [scale.saved(3), scale.saved(4)] == [(2**17, 0), (2**16, 0)]
    scale.sync(3, None, torch.device("cpu"))  # the step is made once more
    assert scale.value == 2**17
    scale.sync(9, None, torch.device("cpu"))  # nobody knows what became of it
    assert scale.value == 2**17
    for step in range(9, 26):
        assert scale.update(step, record(non_finite=2)), "as long as it can be lowered"
    assert scale.value == 1.0
    assert not scale.update(26, record(non_finite=2))


@pytest.mark.parametrize(
    ("strategy", "more", "message"),
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
def test_where_it_has_no_scale_it_is_refused(strategy: Any, more: Any, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        job(strategy, 2, **more)


def test_parameters_in_float16_are_refused() -> None:
    class Half(Steep):
        def model(self) -> nn.Module:
            return super().model().half()

    with pytest.raises(SpecError, match=r"'0.weight' is in float16"):
        train(job(), Half)
