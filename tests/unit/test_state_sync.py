"""After a failure all ranks continue from the newest state of a rank, bit-identical."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from jobs import job_of
from rank_threads import on_ranks
from torch import Tensor, nn

from distplat.platform.errors import CollectiveError, StateLost
from distplat.strategies.checkpoint.state_sync import take_over_newest
from distplat.strategies.fakes import Fabric, InMemoryCollective
from distplat.strategies.model.flat import TORN, FlatModel
from distplat.strategies.model.model_state import ModelState, Shares
from distplat.strategies.model.optim import LocalOptimizer

OPTIMIZERS: list[dict[str, Any]] = [
    {"name": "SGD", "lr": 0.1},
    {"name": "SGD", "lr": 0.1, "momentum": 0.9},
    {"name": "Adam", "lr": 0.1},
    {"name": "AdamW", "lr": 0.1},
    {"name": "RMSprop", "lr": 0.1},
    {"name": "Adagrad", "lr": 0.1},
]


class Replica:
    """Model and optimizer of a rank after some steps with equal gradients on all ranks."""

    def __init__(self, seed: int, steps: int, optimizer: dict[str, Any]) -> None:
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
        self.flat = FlatModel(self.model)
        self.optimizer = LocalOptimizer(self.flat, job_of(optimizer=optimizer, steps=9), 9)
        for step in range(steps):
            self.step(step)

    def step(self, step: int) -> None:
        generator = torch.Generator().manual_seed(step)
        self.flat.grads.copy_(torch.randn(self.flat.size, generator=generator))
        self.optimizer.step(step)
        self.flat.version = step + 1
        self.model(torch.randn(5, 3, generator=generator))  # changes the running statistics

    def bits(self) -> list[Tensor]:
        state = self.optimizer.state()
        buffers = [b.clone() for b in self.model.buffers()]
        return [self.flat.params.clone(), *buffers, *(state[k].clone() for k in sorted(state))]


def replicas(steps: list[int], optimizer: dict[str, Any]) -> list[Replica]:
    """Create one replica per rank; a rank with 0 steps is a new worker with another seed."""
    return [Replica(0 if count else 7 + rank, count, optimizer) for rank, count in enumerate(steps)]


def take_over(ranks: list[Replica], fabric: Fabric | None = None) -> list[int]:
    fabric = fabric or Fabric(len(ranks))

    def body(rank: int) -> int:
        replica = ranks[rank]
        return take_over_newest(replica.flat, replica.optimizer, fabric.collective(rank))

    return on_ranks(len(ranks), body)


def is_equal(first: Replica, second: Replica) -> bool:
    pairs = list(zip(first.bits(), second.bits(), strict=True))
    return all(torch.equal(left, right) for left, right in pairs)


@pytest.mark.sweep(2)
@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda o: "-".join(map(str, o.values())))
@pytest.mark.parametrize("steps", [[3, 4, 0], [0, 4, 4], [4, 0, 3], [4, 4]])
def test_all_ranks_continue_from_the_newest_state(
    steps: list[int], optimizer: dict[str, Any]
) -> None:
    ranks = replicas(steps, optimizer)
    assert take_over(ranks) == [4] * len(steps)
    assert [r.flat.version for r in ranks] == [4] * len(steps)
    unfailed = Replica(0, 4, optimizer)
    assert all(is_equal(rank, unfailed) for rank in ranks)
    for replica in [*ranks, unfailed]:
        replica.step(4)
    assert all(is_equal(rank, unfailed) for rank in ranks)


def test_new_run_starts_from_rank_0() -> None:
    ranks = replicas([0, 0, 0], OPTIMIZERS[2])
    expected = ranks[0].flat.params.clone()
    assert take_over(ranks) == [0, 0, 0]
    assert all(torch.equal(rank.flat.params, expected) for rank in ranks)


def test_torn_parameters_are_not_a_source() -> None:
    ranks = replicas([5, 0, 0], OPTIMIZERS[2])
    ranks[0].flat.version = TORN
    initial = ranks[1].flat.params.clone()
    assert take_over(ranks) == [0, 0, 0]
    assert torch.equal(ranks[0].flat.params, initial)


def test_state_older_than_checkpoint_is_lost() -> None:
    """The newest state is torn and a new worker has initial parameters: restore the checkpoint."""
    ranks = replicas([5, 0], OPTIMIZERS[2])
    ranks[0].flat.version = TORN
    fabric = Fabric(2)

    def body(rank: int) -> bool:
        replica = ranks[rank]
        with pytest.raises(StateLost, match="after step 3"):
            take_over_newest(
                replica.flat, replica.optimizer, fabric.collective(rank), checkpoint_step=3
            )
        return True

    assert on_ranks(2, body) == [True, True]


class FailingCollective(InMemoryCollective):
    """Collective that fails in broadcast number `after`."""

    after = 0

    def broadcast(self, tensor: Tensor, source: int = 0) -> None:
        if self.after == 0:
            raise CollectiveError("g", "broadcast", 0, (source,), "cut")
        self.after -= 1
        super().broadcast(tensor, source)


@pytest.mark.parametrize("after", range(4))
def test_interrupted_synchronization_can_be_repeated(after: int) -> None:
    """The receiver loses the group; the source is lost too, or not."""
    for source_lives in (True, False):
        ranks = replicas([3, 4], OPTIMIZERS[3])
        fabric = Fabric(2, timeout_s=0.2)

        def run_rank(rank: int, ranks: list[Replica] = ranks, fabric: Fabric = fabric) -> None:
            group = FailingCollective(fabric, "world", [0, 1], rank)
            group.after = after
            with pytest.raises(CollectiveError):
                take_over_newest(ranks[rank].flat, ranks[rank].optimizer, group)

        on_ranks(2, run_rank)
        assert [r.flat.version for r in ranks] == [TORN, 4]
        if not source_lives:
            ranks[1] = Replica(11, 0, OPTIMIZERS[3])
        ranks[0].optimizer = new_optimizer(ranks[0])
        assert take_over(ranks) == ([4, 4] if source_lives else [0, 0])
        assert is_equal(ranks[0], ranks[1])


def new_optimizer(replica: Replica) -> LocalOptimizer:
    """Create an optimizer, as `ring` does in each attempt."""
    return LocalOptimizer(replica.flat, job_of(optimizer=OPTIMIZERS[3], steps=9), 9)


def run_with_model_state(body: Callable[[nn.BatchNorm1d, ModelState, int], None]) -> None:
    fabric = Fabric(3)
    layers = [nn.BatchNorm1d(2) for _ in range(3)]

    def on_rank(rank: int) -> None:
        model = nn.Sequential(layers[rank])
        model.register_buffer("constant", torch.tensor([0.1]))
        state = ModelState(FlatModel(model), Shares(lambda step: [2, 2, 2], lambda step: [1, 1, 1]))
        state.connect(fabric.collective(rank))
        state.keep(0)
        body(layers[rank], state, rank)
        constant = model.get_buffer("constant")
        assert torch.equal(constant, torch.tensor([0.1])), "constants must not be rounded"

    on_ranks(3, on_rank)


def test_running_statistics_are_means_over_ranks() -> None:
    def body(layer: nn.BatchNorm1d, state: ModelState, rank: int) -> None:
        assert layer.running_mean is not None and layer.running_var is not None
        layer.running_mean.fill_(float(rank))
        layer.running_var.fill_(float(rank * 10))
        state.synchronize(0)
        assert layer.running_mean.tolist() == pytest.approx([1.0, 1.0])
        assert layer.running_var.tolist() == pytest.approx([10.0, 10.0])

    run_with_model_state(body)


def test_restore_resets_buffers() -> None:
    def body(layer: nn.BatchNorm1d, state: ModelState, rank: int) -> None:
        layer(torch.randn(4, 2))
        state.keep(1)
        snapshot = [b.clone() for b in layer.buffers()]
        layer(torch.randn(4, 2))
        assert not all(torch.equal(a, b) for a, b in zip(snapshot, layer.buffers(), strict=True))
        state.restore()
        assert all(torch.equal(a, b) for a, b in zip(snapshot, layer.buffers(), strict=True))

    run_with_model_state(body)
