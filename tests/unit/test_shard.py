"""A shard matches a plain torch optimizer, and applies each step once or not at all."""

import subprocess
import sys
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from jobs import job_of
from torch import Tensor, nn

from distplat.platform.errors import FencedError, GapError, NotReadyError, ProtocolError, StaleError
from distplat.platform.ledger import PushId, Verdict
from distplat.platform.shard_map import ShardPlan
from distplat.platform.spec import Job
from distplat.platform.stop_order import StopOrder
from distplat.platform.vector_layout import Layout, Piece, Segment
from distplat.strategies.algorithms.reduce import squared_norm
from distplat.strategies.loop.control import StepControl
from distplat.strategies.server.dense_store import DenseStore
from distplat.strategies.server.store import BackupLink, Update

SIZE, WORLD, STEPS = 53, 3, 6

OPTIMIZERS: list[dict[str, Any]] = [
    {"name": "SGD", "lr": 0.1},
    {"name": "SGD", "lr": 0.1, "momentum": 0.9, "weight_decay": 0.01},
    {"name": "SGD", "lr": 0.1, "momentum": 0.9, "nesterov": True},
    {"name": "Adam", "lr": 0.01, "amsgrad": True},
    {"name": "AdamW", "lr": 0.01, "weight_decay": 0.1},
    {"name": "RMSprop", "lr": 0.01, "momentum": 0.5, "centered": True},
    {"name": "Adagrad", "lr": 0.05, "lr_decay": 0.01},
]


def job(optimizer: dict[str, Any], clip_norm: float | None = None) -> Job:
    return job_of(
        "ps-sync",
        WORLD,
        optimizer=optimizer,
        lr_schedule={"name": "linear", "final_factor": 0.5},
        steps=STEPS,
        global_batch_size=9,
        clip_norm=clip_norm,
    )


def make_shard(spec: Job | None = None, *, shards: int = 1, restored: bool = True) -> DenseStore:
    plan = ShardPlan(spec or job(OPTIMIZERS[1]), "run", 1, WORLD, STEPS, shards)
    shard = DenseStore(plan, torch.linspace(-1, 1, SIZE))
    if restored:
        shard.restore(0)
    return shard


def gradient(rank: int, step: int) -> Tensor:
    return torch.randn(SIZE, generator=torch.Generator().manual_seed(100 * step + rank))


def push(rank: int, step: int, attempt: int = 1) -> PushId:
    return PushId("run", attempt, rank, step)


def do_step(shard: DenseStore, step: int, ranks: tuple[int, ...] = (2, 0, 1)) -> None:
    for rank in ranks:
        assert shard.push(push(rank, step), gradient(rank, step)) is Verdict.NEW
    norm = None if shard.squared_norm is None else shard.squared_norm**0.5
    shard.commit(step, norm)


@pytest.mark.parametrize("clip_norm", [None, 2.0])
@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda o: "-".join(map(str, o.values())))
def test_matches_plain_optimizer(optimizer: dict[str, Any], clip_norm: float | None) -> None:
    shard = make_shard(job(optimizer, clip_norm))
    parameter = torch.nn.Parameter(torch.linspace(-1, 1, SIZE))
    arguments = {k: v for k, v in optimizer.items() if k != "name"}
    plain = getattr(torch.optim, optimizer["name"])([parameter], **arguments)
    for step in range(STEPS):
        do_step(shard, step)
        parameter.grad = gradient(0, step) + gradient(1, step) + gradient(2, step)
        if clip_norm is not None:
            assert float(parameter.grad.norm()) > clip_norm  # clipping has an effect
            torch.nn.utils.clip_grad_norm_([parameter], clip_norm)
        plain.param_groups[0]["lr"] = optimizer["lr"] * (1 - 0.5 * step / (STEPS - 1))
        plain.step()
        torch.testing.assert_close(shard.params, parameter.detach(), rtol=1e-5, atol=1e-6)
        assert shard.version == step + 1


HALVES = Layout(
    SIZE, (Segment(0, SIZE, "float32"),), (Piece(0, 0, 32), Piece(1, 32, SIZE)), 2, SIZE
)


def make_shard_of_two_parameters(spec: Job, world: int = WORLD) -> DenseStore:
    """Create a shard of two parameters."""
    plan = ShardPlan(spec, "run", 1, world, STEPS, 1, layout=HALVES)
    shard = DenseStore(plan, torch.linspace(-1, 1, SIZE))
    shard.restore(0)
    return shard


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda o: "-".join(map(str, o.values())))
def test_parameter_without_gradient_on_all_ranks_is_skipped(optimizer: dict[str, Any]) -> None:
    """The second parameter has a gradient only on rank 2, in every second step."""
    shard, spec = make_shard_of_two_parameters(job(optimizer)), job(optimizer)
    backup = make_shard_of_two_parameters(spec)
    updates: list[tuple[Update, Tensor]] = []
    shard.backup_link = cast(
        BackupLink, SimpleNamespace(send=lambda u, g: updates.append((u, g.clone())))
    )
    parameters = [nn.Parameter(part) for part in torch.linspace(-1, 1, SIZE).tensor_split([32])]
    arguments = {k: v for k, v in optimizer.items() if k != "name"}
    plain = getattr(torch.optim, optimizer["name"])(parameters, **arguments)
    for step in range(STEPS):
        total = torch.zeros(SIZE)
        for rank in range(WORLD):
            present = [True, rank == 2 and step % 2 == 1]
            local = gradient(rank, step)
            local[32:] *= present[1]
            total += local
            control = StepControl(1.0, 1.0, present=np.array(present))
            shard.push(push(rank, step), local, control)
        shard.commit(step, None)
        backup.follow(*updates[-1])
        parameters[0].grad = total[:32]
        parameters[1].grad = total[32:] if step % 2 else None
        plain.param_groups[0]["lr"] = optimizer["lr"] * (1 - 0.5 * step / (STEPS - 1))
        plain.step()
        expected = torch.cat([parameter.detach() for parameter in parameters])
        torch.testing.assert_close(shard.params, expected, rtol=1e-5, atol=1e-6)
        assert torch.equal(shard.params, backup.params)


@pytest.mark.parametrize("clip_norm", [None, 2.0])
def test_sum_is_divided_by_total_weight(clip_norm: float | None) -> None:
    spec = job(OPTIMIZERS[4], clip_norm)
    weighted, expected = make_shard_of_two_parameters(spec), make_shard_of_two_parameters(spec)
    for step in range(STEPS):
        for rank, weight in enumerate((1.0, 0.5, 2.5)):
            control = StepControl(2.0, weight, present=np.ones(2, np.bool_))
            weighted.push(push(rank, step), gradient(rank, step), control)
            expected.push(push(rank, step), gradient(rank, step) * 6.0 / 4.0)
        for shard in (weighted, expected):
            norm = None if shard.squared_norm is None else shard.squared_norm**0.5
            shard.commit(step, norm)
    torch.testing.assert_close(weighted.params, expected.params)


def test_bit_identical_for_any_order_of_arrival() -> None:
    first, second = make_shard(), make_shard()
    for step in range(STEPS):
        do_step(first, step, (0, 1, 2))
        do_step(second, step, (2, 1, 0))
    assert torch.equal(first.params, second.params)


def test_parameters_are_updated_in_place() -> None:
    shard = make_shard()
    params, before = shard.params, shard.params.clone()
    do_step(shard, 0)
    assert shard.params is params and not torch.equal(params, before)


def test_repeated_calls_have_no_effect() -> None:
    expected, shard = make_shard(), make_shard()
    for step in range(STEPS):
        do_step(expected, step)
        for rank in (0, 0, 1, 1, 0, 2, 2):
            shard.push(push(rank, step), gradient(rank, step))
        for _ in range(3):
            shard.commit(step, None)
        assert shard.push(push(1, step), gradient(1, step)) is Verdict.REPEAT_COMMITTED
    assert torch.equal(expected.params, shard.params)


def test_record_of_an_earlier_attempt_stops_no_later_one() -> None:
    """A step that one shard has applied is repeated for the others after a lost worker."""
    shard = make_shard()
    resizing = StepControl(1.0, 1.0, stop=StopOrder.RESIZE, present=np.ones(1, np.bool_))
    for rank in range(WORLD):
        shard.push(push(rank, 0), gradient(rank, 0), resizing)
    assert shard.commit(0, None)
    assert StepControl.unpack(np.array(shard.head(None))).stop is StopOrder.RESIZE
    shard.renew(2)
    assert shard.push(push(0, 0, attempt=2), gradient(0, 0)) is Verdict.REPEAT_COMMITTED
    record = StepControl.unpack(np.array(shard.head(None)))
    assert (record.samples, record.stop) == (WORLD, StopOrder.NONE)


def test_repeated_push_with_other_content_is_ignored() -> None:
    shard, expected = make_shard(), make_shard()
    do_step(expected, 0)
    shard.push(push(0, 0), gradient(0, 0))
    assert shard.push(push(0, 0), torch.full((SIZE,), 1e9)) is Verdict.REPEAT_STAGED
    do_step(shard, 0, ranks=(1, 2))
    assert torch.equal(shard.params, expected.params)


@pytest.mark.parametrize(
    ("offered", "error"),
    [
        (push(1, 4), GapError),
        (push(1, 1), StaleError),
        (push(1, 3, attempt=0), FencedError),
        (PushId("other", 1, 1, 3), FencedError),
    ],
)
def test_rejected_push_has_no_effect(offered: PushId, error: type[ProtocolError]) -> None:
    shard, expected = make_shard(), make_shard()
    for step in range(3):
        do_step(shard, step)
        do_step(expected, step)
    before = shard.params.clone()
    shard.push(push(0, 3), gradient(0, 3))
    with pytest.raises(error):
        shard.push(offered, gradient(1, 3))
    assert torch.equal(shard.params, before)
    do_step(shard, 3, ranks=(1, 2))
    do_step(expected, 3)
    assert torch.equal(shard.params, expected.params)


@pytest.mark.parametrize(("seq", "error"), [(0, GapError), (1, GapError), (-2, StaleError)])
def test_rejected_commit_has_no_effect(seq: int, error: type[ProtocolError]) -> None:
    shard = make_shard()
    before = shard.params.clone()
    shard.push(push(0, 0), gradient(0, 0))
    with pytest.raises(error):
        shard.commit(seq, None)
    assert torch.equal(shard.params, before) and shard.version == 0


def test_rejects_calls_before_restore() -> None:
    shard = make_shard(restored=False)
    for call in (lambda: shard.push(push(0, 0), gradient(0, 0)), lambda: shard.commit(0, None)):
        with pytest.raises(NotReadyError):
            call()
    shard.restore(0)
    do_step(shard, 0)
    assert shard.version == 1


def test_gradient_of_wrong_shape_is_not_recorded() -> None:
    shard = make_shard()
    with pytest.raises(ValueError, match="gradient has shape"):
        shard.push(push(0, 0), torch.zeros(SIZE + 1))
    assert shard.ledger.missing() == [0, 1, 2]


def test_squared_norm_of_sum_exists_only_if_clipping() -> None:
    clipped, unclipped = make_shard(job(OPTIMIZERS[0], clip_norm=1.0)), make_shard()
    for shard in (clipped, unclipped):
        for rank in range(WORLD):
            shard.push(push(rank, 0), gradient(rank, 0))
    total = gradient(0, 0) + gradient(1, 0) + gradient(2, 0)
    assert clipped.squared_norm == squared_norm(total)
    assert unclipped.squared_norm is None


@pytest.mark.parametrize(
    ("shards", "clip_norm", "commits_alone"),
    [(1, None, True), (1, 1.0, True), (2, None, True), (2, 1.0, False)],
)
def test_commits_alone_unless_norm_needs_other_shards(
    shards: int, clip_norm: float | None, commits_alone: bool
) -> None:
    assert make_shard(job(OPTIMIZERS[0], clip_norm), shards=shards).commits_alone is commits_alone


def test_each_of_several_shards_stores_previous_version() -> None:
    """A shard may be one version ahead: both still have the older one."""
    ahead, behind = make_shard(shards=2), make_shard(shards=2)
    for step in range(3):
        do_step(ahead, step)
        do_step(behind, step)
    version_3 = behind.params.clone()
    for rank in range(WORLD):
        ahead.push(push(rank, 3), gradient(rank, 3))
    ahead.commit(3, None)
    behind.push(push(0, 3), gradient(0, 3))  # the other ranks died before their push
    assert torch.equal(ahead.values(3), version_3) and torch.equal(behind.values(3), version_3)
    assert ahead.values(4) is ahead.params and not torch.equal(ahead.params, version_3)
    with pytest.raises(StaleError):
        ahead.values(2)
    with pytest.raises(GapError):
        behind.values(4)


def test_previous_version_is_dropped_when_all_shards_passed_it() -> None:
    shard = make_shard(shards=2)
    do_step(shard, 0)
    version_1 = shard.params.clone()
    shard.push(push(2, 1), gradient(2, 1))  # computed with version 1: every shard has it
    with pytest.raises(StaleError):
        shard.values(0)
    do_step(shard, 1, ranks=(0, 1))
    assert torch.equal(shard.values(1), version_1)


def test_empty_shard_of_tiny_model() -> None:
    plan = ShardPlan(job({"name": "AdamW", "lr": 0.1}, 1.0), "run", 1, 1, STEPS, 3)
    shard = DenseStore(plan, torch.zeros(0))
    shard.restore(0)
    shard.push(push(0, 0), torch.zeros(0))
    assert shard.squared_norm == 0.0
    shard.commit(0, 0.0)
    assert shard.version == 1


def test_optimizer_does_not_import_dynamo() -> None:
    """The import takes a second of each start: docs/decisions/quick_start_of_workers.md."""
    code = (
        "import sys, torch\n"
        "from distplat.platform.optimizers import Adam\n"
        "from distplat.strategies.model.optim import FlatOptimizer\n"
        "FlatOptimizer(Adam(name='Adam', lr=0.1), torch.ones(3), torch.ones(3)).step([0.1])\n"
        "sys.exit('torch._dynamo' in sys.modules)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=100).returncode == 0
