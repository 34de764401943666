"""Training with overlapped buckets is bit-identical to training without overlap."""

import random
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import cache
from threading import get_ident
from typing import Any

import pytest
import torch
from classifiers import Classify, Conv, recipe_job
from comparison import distance, same_bits
from control_records import record_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from local_run import LocalRun, train
from rank_threads import UNSHRUNK, on_ranks
from torch import Tensor, nn

from distplat.platform.errors import CollectiveError
from distplat.platform.progress import StepReport
from distplat.platform.spec import Job
from distplat.strategies.collective import Handle, ReduceOp
from distplat.strategies.fakes import Fabric, InMemoryCollective
from distplat.strategies.loop.control import control_size
from distplat.strategies.model.flat import FlatModel
from distplat.strategies.reduction.bucket_reducer import BucketReducer

ONE_PER_PARAMETER = 1e-6
RECIPE = "conv-adamw-accumulated-clipped"


@pytest.fixture(params=[0, 2**18], ids=["copied", "added"], autouse=True, scope="module")
def copied_bytes(request: pytest.FixtureRequest) -> Iterator[None]:
    """Patch the size above which gradients are copied into the vector, not added to zeros."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("distplat.strategies.model.flat._COPIED_BYTES", request.param)
        yield


class Background(Handle):
    """An operation on a thread of the rank."""

    def __init__(self, future: Future[None]) -> None:
        self._future = future

    def wait(self) -> None:
        self._future.result(timeout=30)


reported_s: float | None = None
"""Time that an operation of `background` reports; None: the measured time."""
PENDING: dict[int, list[Future[None]]] = {}
"""All operations of `background`, by the thread that started them."""


@pytest.fixture
def background(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """
    Run operations of the fake group in the background, on one thread for each rank.

    Return the sizes of all operations of all ranks.
    """
    threads: dict[int, ThreadPoolExecutor] = {}
    sizes: list[int] = []

    def start(group: InMemoryCollective, tensor: Tensor, op: ReduceOp = ReduceOp.SUM) -> Handle:
        def work() -> None:
            began = time.perf_counter()
            time.sleep(random.random() * 2e-3)
            group.all_reduce(tensor, op)
            took_s = time.perf_counter() - began
            group.traffic.working_s += took_s if reported_s is None else reported_s

        sizes.append(tensor.numel())
        thread = threads.setdefault(id(group), ThreadPoolExecutor(1))
        future = thread.submit(work)
        PENDING.setdefault(get_ident(), []).append(future)
        return Background(future)

    monkeypatch.setattr(InMemoryCollective, "start_all_reduce", start)
    yield sizes
    PENDING.clear()
    for thread in threads.values():
        thread.shutdown()


class Branches(Classify):
    """Each batch goes through one or two branches, so ranks use different parameters."""

    shape = (5,)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.out = nn.Linear(6, 3)
            self.branches = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
            self.into = nn.Linear(5, 6)

        def forward(self, inputs: Tensor) -> Tensor:
            hidden = self.into(inputs)
            chosen = int(inputs.sum().item() * 10) % 3
            for branch in self.branches[chosen : chosen + 2]:
                hidden = branch(hidden).tanh()
            outputs: Tensor = self.out(hidden)
            return outputs

    def model(self) -> nn.Module:
        return self.Model()


class WaitsInBackward(Conv):
    """Backward ends after all operations that it has started."""

    def model(self) -> nn.Module:
        model = super().model()
        next(model.parameters()).register_hook(self.await_operations)  # type: ignore[no-untyped-call]
        return model

    @staticmethod
    def await_operations(gradient: Tensor) -> None:
        wait(PENDING.get(get_ident(), []), timeout=30)


def job(recipe: str = RECIPE, workers: int = 3, **options: Any) -> Job:
    # Some recipes have more micro-batches than samples in a batch, which a job file rejects.
    plain = recipe_job(recipe, "ring", 1, 0).with_workers(workers)
    strategy = plain.strategy.model_copy(update={"options": options})
    return plain.model_copy(update={"strategy": strategy})


@cache
def without_overlap(workers: int, branches: bool = False) -> LocalRun:
    task = Branches if branches else Conv
    return train(job(workers=workers, overlap=False, bucket_mb=1024), task)


@pytest.mark.sweep(2)
@pytest.mark.parametrize("workers", [2, 3])
def test_overlap_is_bit_identical(background: list[int], workers: int) -> None:
    """The recipe has accumulation, uneven parts of a batch, and batches of one sample."""
    run = train(job(workers=workers, bucket_mb=ONE_PER_PARAMETER), Conv)
    assert len(background) == 15 * (4 + 1) * workers  # steps; parameters and a control record
    for rank in range(workers):
        assert distance(run.parameters(rank), without_overlap(workers).parameters()) == 0


def test_overlap_is_bit_identical_if_ranks_use_different_parameters(background: list[int]) -> None:
    run = train(job(bucket_mb=ONE_PER_PARAMETER), Branches)
    assert same_bits(run, without_overlap(3, True))
    assert len(set(background)) > 2


@pytest.mark.sweep(2)
@settings(
    max_examples=12,
    deadline=None,
    phases=UNSHRUNK,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(bucket_mb=st.floats(1e-6, 1e-3), workers=st.integers(1, 3))
def test_overlap_is_bit_identical_for_any_bucket_size(
    background: list[int], bucket_mb: float, workers: int
) -> None:
    run = train(job(workers=workers, bucket_mb=bucket_mb), Conv)
    assert same_bits(run, without_overlap(workers))


@pytest.mark.sweep(3)
@pytest.mark.parametrize(("name", "tolerance"), [("fp16", 2e-3), ("bf16", 2e-2)])
@pytest.mark.parametrize("overlap", [True, False])
def test_half_precision_compression_is_close_to_exact(
    background: list[int], name: str, tolerance: float, overlap: bool
) -> None:
    options: dict[str, Any] = {
        "compression": name,
        "overlap": overlap,
        "bucket_mb": ONE_PER_PARAMETER,
    }
    run = train(job("conv-sgd-clipped", **options), Conv)
    exact = train(job("conv-sgd-clipped"), Conv)
    assert 0 < distance(run.parameters(), exact.parameters()) < tolerance
    first, *others = [run.parameters(rank) for rank in range(3)]
    assert all(distance(first, other) == 0 for other in others)


def test_every_step_reports_figures(background: list[int]) -> None:
    run = train(job(bucket_mb=ONE_PER_PARAMETER), Conv)
    steps = [report for report in run.reports[0] if isinstance(report, StepReport)]
    assert len(steps) == 15
    for report in steps:
        figures = report.figures
        busy = figures["waiting_s"] + figures["working_s"]
        assert busy > 0
        assert 0 <= figures["hidden_s"] <= busy
        assert figures["exposed_s"] <= report.seconds["exchange"]
        assert busy <= figures["hidden_s"] + figures["exposed_s"] + 1e-3
    assert steps[0].figures["hidden_s"] == 0  # the first step does not overlap
    elements = 48 + 16 + 112 + 3  # with padding: a convolution and a linear layer, bias by bias
    order_bytes = 2 * 2 * 4 * 8  # two words for each of four buckets, to two ranks
    for report in steps:  # bytes sent during setup do not count
        sent = 2 * 2 / 3 * (4 * elements + 8 * control_size(4))
        sent += order_bytes if report.step == 0 else 0
        assert report.figures["sent_bytes"] == pytest.approx(sent, rel=0.02)


def test_operations_that_end_before_backward_are_hidden(
    background: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Operations report a minute each, longer than any delay of a loaded machine."""
    monkeypatch.setattr(sys.modules[__name__], "reported_s", 60.0)
    run = train(job(bucket_mb=ONE_PER_PARAMETER), WaitsInBackward)
    hidden = [r.figures["hidden_fraction"] for r in run.reports[0] if isinstance(r, StepReport)]
    assert hidden[0] == 0
    assert all(fraction > 0 for fraction in hidden[1:])


@pytest.mark.parametrize("name", ["0.weight", "1.bias", "3.weight"])
def test_non_finite_gradient_is_detected_and_named(name: str) -> None:
    """Copied gradients are checked in their hooks, others bucket by bucket."""
    fabric, step_of_nan = Fabric(2), 3

    def net() -> nn.Module:
        return nn.Sequential(*(nn.Linear(3, 3) for _ in range(4)))

    def body(rank: int) -> list[tuple[int, int, int]]:
        model = net()
        flat = FlatModel(model)
        reducer = BucketReducer(flat, fabric.collective(rank), 4)
        records: list[tuple[int, int, int]] = []

        def spoil(gradient: Tensor) -> None:
            if rank == 1 and len(records) == step_of_nan:
                gradient[-1] = torch.nan

        model.get_parameter(name).register_hook(spoil)  # type: ignore[no-untyped-call]
        for _ in range(5):
            flat.begin_step()
            reducer.last_backward()
            loss = model(torch.ones(2, 3)).sum()
            flat.before_backward()
            torch.autograd.backward(loss)
            flat.collect()
            total = reducer.finish(record_of(flat, rank))
            records.append((total.non_finite, total.rank, total.slot))
        reducer.close()
        return records

    slot = [n for n, _ in net().named_parameters()].index(name)
    finite = (0, -1, -1)
    expected = [finite] * step_of_nan + [(1, 1, slot)] + [finite]
    assert on_ranks(2, body) == [expected] * 2


def test_dead_rank_is_named_to_ranks_in_backward() -> None:
    """The rank dies before each of several operations, each in a world of two ranks of its own."""
    deaths = range(3, 9)
    fabrics = [Fabric(2, timeout_s=2) for _ in deaths]
    models = [nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)) for _ in range(2 * len(fabrics))]
    for fabric, death in zip(fabrics, deaths, strict=True):
        fabric.kill(1, after=death)

    def body(place: int) -> tuple[int, ...]:
        world, rank = divmod(place, 2)
        flat = FlatModel(models[place])
        reducer = BucketReducer(flat, fabrics[world].collective(rank), 4)
        with pytest.raises(CollectiveError) as caught:
            for _ in range(9):
                reducer.last_backward()
                torch.autograd.backward(models[place](torch.ones(1, 3)).sum())
                reducer.finish(record_of(flat))
        reducer.close()
        return caught.value.missing

    assert on_ranks(len(models), body) == [(1,)] * len(models)
