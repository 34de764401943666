"""
A rank is lost at each operation of a step in turn; the recovered run is bit-identical.

Ranks are threads. Survivors keep their strategy object; the lost rank returns with a new one. The
sweep covers the operation at which the rank is lost: in the peers' exchange, in the agreement of
all ranks, and between the two.
"""

from functools import cache
from typing import Any, ClassVar

import pytest
from hybrid_models import BATCH, CLASSES, SAMPLES, Mlp, Normed
from hybrid_workers import WORLD, Workers, same_tensors, samples_per_step
from marks import slow
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from distplat.platform.errors import CollectiveError, StateLost
from distplat.platform.sampler import Sampler
from distplat.strategies.fakes import Fabric


@pytest.fixture(scope="module")
def uninterrupted() -> dict[str, Tensor]:
    model = Workers().attempt()
    assert model is not None
    return model


@pytest.mark.sweep(6)
@pytest.mark.parametrize("victim", [0, slow(1), slow(2), 3])  # of each stage, of each replica
@pytest.mark.parametrize(
    ("group", "after"),
    [
        ("dp-", 6),  # in the exchange of gradients, of one stage or the other
        ("dp-", 8),
        ("replica", 3),  # between the exchange and the agreement: the norm over the stages
        ("world", 4),  # in the agreement that all have their sums
        ("world", 5),  # in the sum of the control records
        ("world", 10),
        ("world", 13),
        ("world", 14),  # of the last step
        ("world", 16),  # in the last evaluation
    ],
)
def test_rank_lost_at_any_operation(
    group: str, after: int, victim: int, uninterrupted: dict[str, Tensor]
) -> None:
    workers = Workers()
    fabric = Fabric(WORLD)
    fabric.kill(victim, after=after, group=group)
    assert workers.attempt(fabric) is None
    workers.renew(victim)
    model = workers.attempt()
    assert model is not None and same_tensors(model, uninterrupted)
    assert min(workers.starts) == max(workers.starts) > 0, "survivors keep their state"
    assert samples_per_step(workers, workers.job) == [16, 16, 13] * 2


@pytest.mark.sweep(4)
@pytest.mark.parametrize("behind", [{0}, {1, 2}, {0, 1, 3}, {2, 3}, {0, 2, 3}])
@pytest.mark.parametrize("victim", [0, 3])
def test_ranks_behind_apply_the_missing_update(
    victim: int, behind: set[int], uninterrupted: dict[str, Tensor]
) -> None:
    """The ranks behind apply the update on restart, and report its samples then."""
    workers = Workers()
    assert workers.attempt(Fabric(WORLD), behind) is None
    versions = [workers.ranks[rank].prepared.flat.version for rank in range(WORLD)]
    assert versions == [3 if rank in behind else 4 for rank in range(WORLD)]
    workers.renew(victim)
    model = workers.attempt()
    assert model is not None and same_tensors(model, uninterrupted)
    assert workers.starts == [4] * WORLD
    lost = 0 if victim % 2 == 0 or victim not in behind else 8  # the report is lost with the rank
    assert samples_per_step(workers, workers.job)[3] == 16 - lost


class NonFinite(Normed):
    """A sample of the fourth batch, and of an earlier one, makes loss and statistics NaN."""

    def train_data(self) -> TensorDataset:
        inputs, targets = super().train_data().tensors
        inputs[int(Sampler(SAMPLES, BATCH, 1, seed=5).batch_ids(3)[0])] = float("nan")
        return TensorDataset(inputs, targets)


@pytest.mark.sweep(4)
@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("options", [{}, {"data_strategy": "ps-sync"}], ids=str)
@pytest.mark.parametrize("behind", [{0, 1}, {0, 2, 3}])
def test_step_skipped_by_some_ranks_is_skipped_by_the_others(
    behind: set[int], options: dict[str, Any], clip: float | None
) -> None:
    policy = {"non_finite": "skip", "max_skipped_steps": 2}
    overrides: dict[str, Any] = {"options": options, "failure": policy, "clip_norm": clip}
    expected = Workers(NonFinite, **overrides).attempt()
    assert expected is not None and all(value.isfinite().all() for value in expected.values())
    workers = Workers(NonFinite, **overrides)
    assert workers.attempt(Fabric(WORLD), behind) is None
    model = workers.attempt()
    assert model is not None and same_tensors(model, expected)
    assert min(workers.starts) == max(workers.starts) > 2


def test_losing_both_peers_of_a_stage_loses_the_state() -> None:
    """Both peers of a stage are lost, so that no rank has its part of the model."""
    workers = Workers()
    fabric = Fabric(WORLD)
    fabric.kill(1, after=6, group="world")
    assert workers.attempt(fabric) is None
    for rank in (1, 3):
        workers.renew(rank)
    with pytest.raises(StateLost):
        workers.attempt(Fabric(WORLD))


class FailingTask(Mlp):
    """Two stages, one of which is lost at a given forward or backward."""

    at: ClassVar[tuple[str, int, int] | None] = None
    """`forward` or `backward`, stage, and its number in the training of that stage."""

    def model(self) -> nn.Module:
        return nn.Sequential(
            nn.Linear(6, 12), FailingBlock(0), FailingBlock(1), nn.Linear(12, CLASSES)
        )


class FailingBlock(nn.Module):
    def __init__(self, stage: int) -> None:
        super().__init__()
        self.stage, self.forwards = stage, 0
        self.inner = nn.Sequential(nn.Linear(12, 12), nn.BatchNorm1d(12), nn.Tanh())

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.inner(inputs)
        if self.training:
            number, self.forwards = self.forwards, self.forwards + 1
            self._die("forward", number)
            outputs.register_hook(  # type: ignore[no-untyped-call]
                lambda _: self._die("backward", number)
            )
        return outputs

    def _die(self, phase: str, number: int) -> None:
        if FailingTask.at == (phase, self.stage, number):
            FailingTask.at = None
            raise CollectiveError("test", phase, number, (self.stage,), "this stage was killed")


def single_replica(strategy: str) -> Workers:
    """Create workers of one replica: no stage has a peer."""
    options: dict[str, Any] = {"data": 1, "data_strategy": strategy}
    return Workers(FailingTask, options=options, checkpoint={"every_steps": 2})


@cache
def uninterrupted_single_replica() -> dict[str, Tensor]:
    model = single_replica("ring").attempt(Fabric(2))
    assert model is not None
    return model


@pytest.mark.sweep(16)
@pytest.mark.parametrize("number", range(5, 10))
@pytest.mark.parametrize("stage", [0, 1])
@pytest.mark.parametrize("phase", ["forward", "backward"])
@pytest.mark.parametrize("strategy", ["ring", "ps-sync"])
def test_single_replica_restarts_from_the_checkpoint(
    strategy: str, phase: str, stage: int, number: int
) -> None:
    """In any micro-batch of steps 2 to 4, including a step that ends with a checkpoint."""
    expected = uninterrupted_single_replica()
    workers = single_replica(strategy)
    FailingTask.at = phase, stage, number
    assert workers.attempt(Fabric(2)) is None
    newest = max(workers.checkpoints, default=0)
    # The other stage may be a step behind, its part of the newest checkpoint missing.
    assert newest in {5: {0, 2}, 6: {2}, 7: {2}, 8: {2, 4}, 9: {2, 4}}[number]
    workers.start_over()
    model = workers.attempt(Fabric(2), saved=workers.checkpoints.get(newest))
    assert model is not None and same_tensors(model, expected)
    assert workers.starts == [newest] * 2
