"""Parameters that are frozen at first and unfrozen in a later step."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from control_records import record_of
from jobs import job_of
from numpy.typing import NDArray
from torch import Tensor, nn

from distplat.platform.errors import SpecError
from distplat.platform.ledger import PushId
from distplat.platform.shard_map import ShardPlan, cut_shards
from distplat.platform.spec import Job
from distplat.strategies.model.flat import FlatModel
from distplat.strategies.model.optim import LocalOptimizer
from distplat.strategies.server.dense_store import DenseStore

STEPS, UNFREEZE_STEP = 6, 3
X = torch.randn(12, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


class Net(nn.Module):
    """The first layer is frozen."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.a, self.b = nn.Linear(4, 4).double(), nn.Linear(4, 1).double()
        self.a.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.b(torch.tanh(self.a(x)))
        return result


def job(**more: Any) -> Job:
    fields: dict[str, Any] = {
        "optimizer": {"name": "Adam", "lr": 0.1, "weight_decay": 0.1},
        "steps": STEPS,
        "global_batch_size": len(X),
        **more,
    }
    return job_of(**fields)


def parts_of(step: int, world: int) -> list[Tensor]:
    """Split the samples; in UNFREEZE_STEP the last of several ranks has none."""
    if world > 1 and step == UNFREEZE_STEP:
        return [*X.chunk(world - 1), X[:0]]
    return [*X.chunk(world)]


def loss_of(net: nn.Module, x: Tensor) -> Tensor:
    loss: Tensor = (net(x) - 1.0).square().sum() / len(X)
    return loss


def train_plain(spec: Job) -> dict[str, Tensor]:
    net = Net()
    cls = getattr(torch.optim, spec.optimizer.name)
    optimizer = cls(net.parameters(), **spec.optimizer.arguments())
    for step in range(STEPS):
        if step == UNFREEZE_STEP:
            net.a.requires_grad_(True)
        optimizer.zero_grad()
        torch.autograd.backward(loss_of(net, X))
        if spec.clip_norm is not None:
            nn.utils.clip_grad_norm_(net.parameters(), spec.clip_norm)
        optimizer.step()
    return net.state_dict()


def compute(flats: Sequence[FlatModel], step: int) -> NDArray[np.bool_]:
    """Run forward and backward on each rank; return the mask of parameters with a gradient."""
    for flat, part in zip(flats, parts_of(step, len(flats)), strict=True):
        flat.begin_step()
        if len(part):
            if step == UNFREEZE_STEP:
                flat.model.get_submodule("a").requires_grad_(True)
            loss = loss_of(flat.model, part)
            flat.before_backward()
            torch.autograd.backward(loss)
            flat.collect()
        flat.check_layout(step)
    present: NDArray[np.bool_] = np.logical_or.reduce([flat.present for flat in flats])
    return present


def assert_matches_plain(flats: Sequence[FlatModel], spec: Job) -> None:
    expected = train_plain(spec)
    for flat in flats:
        for name, value in flat.state_dict().items():
            torch.testing.assert_close(value, expected[name], rtol=1e-10, atol=1e-10, msg=name)


@pytest.mark.parametrize("clip_norm", [None, 0.5])
@pytest.mark.parametrize("world", [1, 3])
def test_local_optimizers_match_plain_loop(world: int, clip_norm: float | None) -> None:
    spec = job(clip_norm=clip_norm)
    flats = [FlatModel(Net(), unfreezes=True) for _ in range(world)]
    optimizers = [LocalOptimizer(flat, spec, STEPS) for flat in flats]
    for step in range(STEPS):
        present = compute(flats, step)
        for flat in flats:
            flat.activate_tail(present, step)
        total = torch.stack([flat.grads for flat in flats]).sum(0)
        for flat, optimizer in zip(flats, optimizers, strict=True):
            flat.grads.copy_(total)
            optimizer.step(step, present)
    assert all(flat.active.all() for flat in flats)
    assert_matches_plain(flats, spec)


@pytest.mark.parametrize("clip_norm", [None, 0.5])
@pytest.mark.parametrize("servers", [1, 2])
@pytest.mark.parametrize("world", [1, 3])
def test_servers_match_plain_loop(world: int, servers: int, clip_norm: float | None) -> None:
    spec = job(clip_norm=clip_norm)
    flats = [FlatModel(Net(), unfreezes=True) for _ in range(world)]
    layout, shared = flats[0].layout, flats[0].params.clone()
    shards = []
    cuts = cut_shards(layout.size, servers, tail=layout.tail_size).shards
    for cut in cuts:
        own = layout.cut(cut.start, cut.stop)
        plan = ShardPlan(spec, "run", 1, world, STEPS, servers, layout=own)
        shards.append(DenseStore(plan, shared[cut.start : cut.stop]))
        shards[-1].restore(0)
    for flat in flats:
        flat.move(shared, flat.grads)
    for step in range(STEPS):
        compute(flats, step)
        for rank, flat in enumerate(flats):
            for cut, shard in zip(cuts, shards, strict=True):
                push = PushId("run", 1, rank, step)
                shard.push(push, flat.grads[cut.start : cut.stop], record_of(flat))
        norm = sum(shard.squared_norm or 0.0 for shard in shards) ** 0.5
        for shard in shards:
            shard.commit(step, norm if clip_norm else None)
        for flat in flats:
            flat.activate_tail(shards[0].seen, step)
    assert_matches_plain(flats, spec)


def test_frozen_parameters_are_not_updated() -> None:
    flat = FlatModel(Net(), unfreezes=True)
    assert flat.layout.tail_size and flat.segments[-1].stop == flat.layout.tail
    frozen = flat.model.get_parameter("a.weight")
    frozen.fill_(2.0)  # a forward may write to it
    assert flat.slots[-2].view(flat.params).ne(2.0).all()
    optimizer = LocalOptimizer(flat, job(), STEPS)
    before = flat.params[flat.layout.tail :].clone()
    flat.grads.fill_(1.0)
    optimizer.step(0)
    assert torch.equal(flat.params[flat.layout.tail :], before)
    assert frozen.eq(2.0).all()


def unfreeze_on_one_rank(flats: Sequence[FlatModel]) -> None:
    flats[0].model.get_submodule("a").requires_grad_(True)


def test_rank_that_stays_frozen_is_an_error() -> None:
    flats = [FlatModel(Net(), unfreezes=True) for _ in range(2)]
    unfreeze_on_one_rank(flats)
    present = compute(flats, 0)
    flats[0].activate_tail(present, 0)
    with pytest.raises(SpecError, match=r"step 1: 'a\.weight' is frozen on this worker"):
        flats[1].activate_tail(present, 0)


def test_strategy_without_unfreezing_rejects_it() -> None:
    flat = FlatModel(Net(), unfreezes=True)
    unfreeze_on_one_rank([flat])
    compute([flat], 0)
    with pytest.raises(SpecError, match=r"'a\.weight' cannot be unfrozen under this strategy"):
        flat.begin_step()


def test_parameter_changed_while_frozen_is_rejected() -> None:
    flat = FlatModel(Net(), unfreezes=True)
    flat.model.get_parameter("a.bias").fill_(1.0)
    flat.model.get_submodule("a").requires_grad_(True)
    with pytest.raises(SpecError, match=r"step 1: 'a\.bias' was changed while it was frozen"):
        compute([flat], 0)


def test_backbone_much_larger_than_the_head_cannot_be_unfrozen() -> None:
    class Large(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Parameter(torch.zeros(5000, 4000), requires_grad=False)
            self.b = nn.Parameter(torch.zeros(4))

    flat = FlatModel(Large(), unfreezes=True)
    assert flat.size == 4
    flat.model.get_parameter("a").requires_grad_(True)
    with pytest.raises(SpecError, match="step 1: 'a' has requires_grad=True; it was frozen"):
        flat.check_layout(0)


def test_parameter_frozen_during_the_run_is_not_updated() -> None:
    flat = FlatModel(Net())
    optimizer = LocalOptimizer(flat, job(), STEPS)
    for step in range(2):
        compute([flat], 0)
        optimizer.step(step, flat.present)
    flat.model.get_parameter("b.bias").requires_grad_(False)
    before = flat.model.get_parameter("b.bias").clone()
    compute([flat], 0)
    assert flat.present.tolist() == [True, False]
    optimizer.step(2, flat.present)
    assert torch.equal(flat.model.get_parameter("b.bias"), before)
