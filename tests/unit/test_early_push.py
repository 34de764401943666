"""Pushing shards' parts behind backward: when they leave, and that no bit of the result changes."""

import time
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import pytest
import torch
from in_memory_run import Run, train
from test_equivalence import Classify, Conv, same_bits
from test_overlap import Branches
from test_ps_async import again, logs_of
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from distplat.platform.apply_log import flaws
from distplat.platform.errors import ActorLost, SpecError
from distplat.platform.progress import StepReport
from distplat.platform.spec import Job
from distplat.strategies.catalog import make_job
from distplat.strategies.fakes import InMemoryShards
from distplat.strategies.task import Task
from distplat.strategies.training.early import EarlyPush
from distplat.strategies.training.flat import FlatModel

WAIT_S = 0.1


class Tied(Classify):
    """The first layer's weight is the last one's, too."""

    shape = (5,)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.into = nn.Linear(5, 5)
            self.middle = nn.Linear(5, 9)
            self.out = nn.Linear(9, 3)

        def forward(self, inputs: Tensor) -> Tensor:
            hidden = self.into(self.into(inputs).tanh())
            outputs: Tensor = self.out(self.middle(hidden @ self.into.weight.T).relu())
            return outputs

    def model(self) -> nn.Module:
        return self.Model()


class Wait(torch.autograd.Function):
    """Stands still in backward until something is so, or for a while."""

    until: Callable[[], bool] = staticmethod(lambda: True)
    seen: ClassVar[list[bool]] = []

    @staticmethod
    def forward(ctx: Any, inputs: Tensor) -> Tensor:
        return inputs.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        until = time.monotonic() + WAIT_S
        while not (there := Wait.until()) and time.monotonic() < until:
            time.sleep(1e-3)
        Wait.seen.append(there)
        return grads[0]


class Detached(Classify):
    """Backward reads a value of the last layer when that one's gradient is done already."""

    shape = (8,)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.into = nn.Linear(8, 8, bias=False)
            self.out = nn.Linear(8, 8, bias=False)

        def forward(self, inputs: Tensor) -> Tensor:
            hidden = self.into(inputs) @ self.out.weight.detach()
            outputs: Tensor = self.out(Wait.apply(hidden))  # type: ignore[no-untyped-call]
            return outputs

    def model(self) -> nn.Module:
        return self.Model()


TASKS: dict[str, type[Task]] = {
    "conv": Conv,
    "unused": Branches,
    "tied": Tied,
}


FIELDS: dict[str, Any] = {
    "name": "early",
    "optimizer": {"name": "AdamW", "lr": 0.01},
    "epochs": 2,
    "global_batch_size": 9,
    "seed": 5,
}


def job(strategy: str, workers: int, servers: int = 3, *, overlap: bool, **more: Any) -> Job:
    fields = {
        **FIELDS,
        "strategy": {"name": strategy, "num_servers": servers, "overlap": overlap},
        "scaling": {"num_workers": workers},
    }
    return Job.model_validate({**fields, **more})


@pytest.fixture
def early(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Give the (shard, step) that left while a backward went on."""
    left: list[tuple[int, int]] = []
    push_part = InMemoryShards.push_part

    def noted(self: InMemoryShards, shard: int, step: int, task: int | None = None) -> None:
        left.append((shard, step))
        push_part(self, shard, step, task)

    monkeypatch.setattr(InMemoryShards, "push_part", noted)
    return left


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize(
    ("strategy", "workers", "clip_norm"),
    [
        ("ps-sync", 1, None),
        ("ps-sync", 3, None),
        ("ps-sync", 3, 0.3),
        ("ps-async", 1, None),
    ],
)
def test_the_same_bits_with_overlap(
    early: list[tuple[int, int]],
    task: str,
    strategy: str,
    workers: int,
    clip_norm: float | None,
    accumulation: int,
) -> None:
    """Batches cut unevenly, one of a single sample, so that some ranks have nothing to do."""
    how: dict[str, Any] = {"clip_norm": clip_norm, "gradient_accumulation": accumulation}
    plain = train(job(strategy, workers, overlap=False, **how), TASKS[task], apart=True)
    assert not early
    run = train(job(strategy, workers, overlap=True, **how), TASKS[task], apart=True)
    assert early and min(step for _, step in early) > 0, "the first step is watched only"
    assert same_bits(plain, run)


def figures(run: Run, name: str) -> list[float]:
    return [r.figures[name] for rank in run.reports for r in rank if isinstance(r, StepReport)]


def watch(monkeypatch: pytest.MonkeyPatch, of: Job, apart: bool) -> tuple[Run, list[bool]]:
    """Train; say of each backward whether in its middle the last shard was updated."""
    Wait.seen = []

    def before(self: EarlyPush, push: int, task: int | None = None) -> None:
        service = self._shards._group.service(1)  # type: ignore[attr-defined]
        monkeypatch.setattr(Wait, "until", staticmethod(lambda: service.served.version > push))
        last_backward(self, push, task)

    last_backward = EarlyPush.last_backward
    monkeypatch.setattr(EarlyPush, "last_backward", before)
    try:
        return train(of, Detached, apart=apart), Wait.seen
    finally:
        monkeypatch.setattr(EarlyPush, "last_backward", last_backward)


@pytest.mark.parametrize("strategy", ["ps-sync", "ps-async"])
def test_a_shard_is_updated_while_backward_goes_on(
    monkeypatch: pytest.MonkeyPatch, strategy: str
) -> None:
    """And a worker that computes on a copy does not see it: the bits stay."""
    run, seen = watch(monkeypatch, job(strategy, 1, 2, overlap=True, epochs=1), True)
    assert seen == [False] + [True] * 4
    assert min(figures(run, "hidden_s")[1:]) > 0
    assert figures(run, "hidden_s")[0] == 0
    assert max(figures(run, "hidden_fraction")) <= 1
    plain, seen = watch(monkeypatch, job(strategy, 1, 2, overlap=False, epochs=1), True)
    assert seen == [False] * 5
    assert same_bits(plain, run)


@pytest.mark.parametrize(
    ("strategy", "clip_norm"),
    [
        pytest.param("ps-sync", None, id="one-vector-of-all"),
        pytest.param("ps-sync", 0.3, id="one-vector-of-all-and-commits"),
        pytest.param("ps-async", None, id="servers-write-into-the-worker's"),
    ],
)
def test_servers_write_nowhere_while_somebody_computes_there(
    monkeypatch: pytest.MonkeyPatch,
    early: list[tuple[int, int]],
    strategy: str,
    clip_norm: float | None,
) -> None:
    of = partial(job, strategy, 1, 2, epochs=1, clip_norm=clip_norm)
    run, seen = watch(monkeypatch, of(overlap=True), False)
    assert not early
    assert seen == [False] * 5
    assert same_bits(watch(monkeypatch, of(overlap=False), False)[0], run)


def test_asynchronous_parts_make_runs_that_can_be_made_again(early: list[tuple[int, int]]) -> None:
    of = job("ps-async", 3, overlap=True, epochs=3)
    run = train(of, Conv, apart=True)
    assert early
    assert [flaws(log, 3, 15) for log in logs_of(run)] == [[]] * 3
    model = again(run, of, Conv)
    for name, value in model.state_dict().items():
        assert torch.equal(value, run.parameters()[name]), name


def test_a_server_that_is_lost_meanwhile_is_heard_of_in_the_push() -> None:
    class Lost(Conv):
        def loss(self, outputs: Any, targets: Any) -> Tensor:
            self.calls = getattr(self, "calls", 0) + 1
            if self.calls == 3:
                groups[0].lost = "for a test"
            return super().loss(outputs, targets)

    groups: list[Any] = []
    connect = InMemoryShards.connect

    def noted(self: InMemoryShards, *args: Any) -> None:
        groups.append(self._group)
        connect(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InMemoryShards, "connect", noted)
        with pytest.raises(ActorLost, match="for a test"):
            train(job("ps-sync", 1, overlap=True), Lost, apart=True)


class Parts:
    """The port, as far as a backward needs it: one shard for each run, and what left."""

    def __init__(self, *bounds: tuple[int, int]) -> None:
        self.of, self.open = bounds, True
        self.left: list[int] = []

    def bounds(self) -> Any:
        return self.of

    def may_leave(self, shard: int) -> bool:
        return self.open

    def push_part(self, shard: int, step: int, task: int | None = None) -> None:
        self.left.append(shard)


class Rig:
    """Three layers of a shard each, and backwards through them."""

    def __init__(self, **options: Any) -> None:
        self.layers = [nn.Linear(4, 4, bias=False) for _ in range(3)]
        self.flat = FlatModel(nn.ModuleList(self.layers))
        self.parts = Parts((0, 16), (16, 32), (32, 48))
        self.prepared: list[int] = []
        self.push = EarlyPush(
            self.flat,
            self.parts,  # type: ignore[arg-type]
            overlap=True,
            prepare=lambda part: self.prepared.append(part.storage_offset() // 16),
            **options,
        )

    def backward(self, *layers: int, nested: bool = False, last: bool = True) -> list[int]:
        """Go through some layers, in this order; give what left meanwhile."""
        self.parts.left = []
        values = torch.ones(2, 4)
        for place, number in enumerate(layers):
            layer = self.layers[number]
            inner = nested and place > 0
            values = checkpoint(layer, values, use_reentrant=True) if inner else layer(values)
        if last:
            self.push.last_backward(0)
        torch.autograd.backward(values.sum())
        return self.parts.left


def test_only_the_last_backward_counts() -> None:
    rig = Rig()
    rig.backward(0, 1, 2)
    rig.push.finish()
    assert rig.backward(0, 1, 2, last=False) == []
    assert rig.backward(0, 1, 2) == [2, 1]


def test_each_part_is_prepared_once_and_before_it_leaves() -> None:
    rig = Rig()
    for _ in range(2):
        rig.prepared.clear()
        rig.backward(0, 1, 2)
        rig.push.finish()
    assert rig.prepared == [2, 1, 0]
    rig.prepared.clear()
    rig.push.finish()  # a step without samples
    assert rig.prepared == [0, 1, 2]


def test_what_may_not_leave_stays_and_may_change() -> None:
    rig = Rig()
    rig.backward(0, 1, 2)
    rig.push.finish()
    rig.parts.open = False
    assert rig.backward(0, 1, 2) == []
    rig.push.finish()
    assert rig.backward(0, 1, 1, nested=True) == []


def test_a_gradient_that_comes_again_is_held_from_the_next_step_on() -> None:
    rig = Rig()
    for _ in range(2):
        left = rig.backward(2, 1, 1, nested=True)
        rig.push.finish()
    assert left == [2]
    assert rig.backward(2, 1, 0) == [0, 2]


def test_a_gradient_that_was_sent_too_early_is_an_error_not_a_wrong_sum() -> None:
    rig = Rig()
    rig.backward(0, 1, 2)
    rig.push.finish()
    with pytest.raises(SpecError, match=r"'1\.weight' came again after it was sent"):
        rig.backward(0, 1, 1, nested=True)


def test_nothing_is_heard_after_the_end() -> None:
    rig = Rig()
    rig.backward(0, 1, 2)
    rig.push.finish()
    rig.push.close()
    assert rig.backward(0, 1, 2) == []


@pytest.mark.parametrize(
    ("strategy", "servers", "clip_norm", "said"),
    [
        ("ps-sync", 1, None, "overlap: has no effect with one server"),
        ("ps-async", 1, None, "overlap: has no effect with one server"),
        ("ps-async", 2, 1.0, "overlap: has no effect with `clip_norm`"),
    ],
)
def test_an_overlap_that_does_nothing_is_refused(
    strategy: str, servers: int, clip_norm: float | None, said: str
) -> None:
    def make(**overlap: bool) -> None:
        of = {"name": strategy, "num_servers": servers, **overlap}
        make_job({**FIELDS, "strategy": of, "clip_norm": clip_norm})

    with pytest.raises(SpecError, match=said):
        make(overlap=True)
    make()
    make(overlap=False)
