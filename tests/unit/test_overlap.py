"""Training with overlapped buckets gives the bits of training without, whatever ranks do."""

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
    """From which size on gradients are copied into the vector, and not added to zeros."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("distplat.strategies.model.flat._COPIED_BYTES", request.param)
        yield


class Background(Handle):
    """An operation on the rank's own thread."""

    def __init__(self, future: Future[None]) -> None:
        self._future = future

    def wait(self) -> None:
        self._future.result(timeout=30)


counted_s: float | None = None
"""What an operation of `background` is said to have taken; None: what it took."""
PENDING: dict[int, list[Future[None]]] = {}
"""By the thread that started them: operations of `background`, old ones too."""


@pytest.fixture
def background(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """
    Let operations of the fake take their time, each rank's one after another on a thread.

    Gives the sizes of what was started, of all ranks.
    """
    threads: dict[int, ThreadPoolExecutor] = {}
    sizes: list[int] = []

    def start(group: InMemoryCollective, tensor: Tensor, op: ReduceOp = ReduceOp.SUM) -> Handle:
        def work() -> None:
            began = time.perf_counter()
            time.sleep(random.random() * 2e-3)
            group.all_reduce(tensor, op)
            took_s = time.perf_counter() - began
            group.traffic.working_s += took_s if counted_s is None else counted_s

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
    """Each batch goes through one of two branches, or through both: so do the ranks."""

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


class Patient(Conv):
    """Backward comes to its end only once the operations that it has started are over."""

    def model(self) -> nn.Module:
        model = super().model()
        next(model.parameters()).register_hook(self.await_operations)  # type: ignore[no-untyped-call]
        return model

    @staticmethod
    def await_operations(gradient: Tensor) -> None:
        wait(PENDING.get(get_ident(), []), timeout=30)


def job(recipe: str = RECIPE, workers: int = 3, **options: Any) -> Job:
    # Some have more micro-batches than the batch has samples, which a job file may not.
    plain = recipe_job(recipe, "ring", 1, 0).with_workers(workers)
    strategy = plain.strategy.model_copy(update={"options": options})
    return plain.model_copy(update={"strategy": strategy})


@cache
def without_overlap(workers: int, branches: bool = False) -> LocalRun:
    task = Branches if branches else Conv
    return train(job(workers=workers, overlap=False, bucket_mb=1024), task)


@pytest.mark.sweep(2)
@pytest.mark.parametrize("workers", [2, 3])
def test_the_same_bits_with_overlap(background: list[int], workers: int) -> None:
    """With accumulation, uneven parts of a batch, and batches of one sample."""
    run = train(job(workers=workers, bucket_mb=ONE_PER_PARAMETER), Conv)
    assert len(background) == 15 * (4 + 1) * workers  # steps; parameters and a control record
    for rank in range(workers):
        assert distance(run.parameters(rank), without_overlap(workers).parameters()) == 0


def test_the_same_bits_where_ranks_use_different_parameters(background: list[int]) -> None:
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
def test_the_same_bits_whatever_the_buckets(
    background: list[int], bucket_mb: float, workers: int
) -> None:
    run = train(job(workers=workers, bucket_mb=bucket_mb), Conv)
    assert same_bits(run, without_overlap(workers))


@pytest.mark.sweep(3)
@pytest.mark.parametrize(("name", "within"), [("fp16", 2e-3), ("bf16", 2e-2)])
@pytest.mark.parametrize("overlap", [True, False])
def test_halves_train_nearly_the_same(
    background: list[int], name: str, within: float, overlap: bool
) -> None:
    options: dict[str, Any] = {
        "compression": name,
        "overlap": overlap,
        "bucket_mb": ONE_PER_PARAMETER,
    }
    run = train(job("conv-sgd-clipped", **options), Conv)
    exact = train(job("conv-sgd-clipped"), Conv)
    assert 0 < distance(run.parameters(), exact.parameters()) < within
    first, *others = [run.parameters(rank) for rank in range(3)]
    assert all(distance(first, other) == 0 for other in others)


def test_figures_of_every_step(background: list[int]) -> None:
    run = train(job(bucket_mb=ONE_PER_PARAMETER), Conv)
    steps = [report for report in run.reports[0] if isinstance(report, StepReport)]
    assert len(steps) == 15
    for report in steps:
        found = report.figures
        busy = found["waiting_s"] + found["working_s"]
        assert busy > 0
        assert 0 <= found["hidden_s"] <= busy
        assert found["exposed_s"] <= report.seconds["exchange"]
        assert busy <= found["hidden_s"] + found["exposed_s"] + 1e-3
    assert steps[0].figures["hidden_s"] == 0  # nothing leaves early there
    elements = 48 + 16 + 112 + 3  # with padding: a convolution and a linear layer, bias by bias
    order_bytes = 2 * 2 * 4 * 8  # two words for each of four buckets, to two ranks
    for report in steps:  # what setting up has sent is in no step
        sent = 2 * 2 / 3 * (4 * elements + 8 * control_size(4))
        sent += order_bytes if report.step == 0 else 0
        assert report.figures["sent_bytes"] == pytest.approx(sent, rel=0.02)


def test_what_ends_before_backward_does_is_hidden(
    background: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Operations count a minute each, so that no delay of this machine is longer than they are."""
    monkeypatch.setattr(sys.modules[__name__], "counted_s", 60.0)
    run = train(job(bucket_mb=ONE_PER_PARAMETER), Patient)
    hidden = [r.figures["hidden_fraction"] for r in run.reports[0] if isinstance(r, StepReport)]
    assert hidden[0] == 0
    assert all(fraction > 0 for fraction in hidden[1:])


@pytest.mark.parametrize("name", ["0.weight", "1.bias", "3.weight"])
def test_a_gradient_that_is_not_finite_is_found_and_named(name: str) -> None:
    """Gradients that were copied are looked at in their hooks, others bucket by bucket."""
    fabric, step_of_nan = Fabric(2), 3

    def net() -> nn.Module:
        return nn.Sequential(*(nn.Linear(3, 3) for _ in range(4)))

    def body(rank: int) -> list[tuple[int, int, int]]:
        model = net()
        flat = FlatModel(model)
        reducer = BucketReducer(flat, fabric.collective(rank), 4)
        found: list[tuple[int, int, int]] = []

        def spoil(gradient: Tensor) -> None:
            if rank == 1 and len(found) == step_of_nan:
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
            found.append((total.non_finite, total.rank, total.slot))
        reducer.close()
        return found

    slot = [n for n, _ in net().named_parameters()].index(name)
    finite = (0, -1, -1)
    expected = [finite] * step_of_nan + [(1, 1, slot)] + [finite]
    assert on_ranks(2, body) == [expected] * 2


def test_a_rank_that_dies_is_named_to_those_in_the_middle_of_backward() -> None:
    """Whichever operation it does not come to; the worlds, of two ranks each, run side by side."""
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
