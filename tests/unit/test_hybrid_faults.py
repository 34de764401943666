"""
A rank is lost at every moment of a step in turn; the others go on, to the same bits.

Ranks are threads here, which come back with the strategy object that they had; the lost one comes
with a new one. What is swept is the number of the operation to which it does not come any more: in
the peers' exchange, in the agreement of all, and between the two.
"""

from functools import cache
from typing import Any, ClassVar

import pytest
from hybrid_models import BATCH, CLASSES, SAMPLES, Mlp, Normed
from hybrid_workers import WORLD, Workers, same, samples
from marks import slow
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from distplat.platform.errors import CollectiveError, StateLost
from distplat.platform.sampler import Sampler
from distplat.strategies.fakes import Fabric


@pytest.fixture(scope="module")
def unfailed() -> dict[str, Tensor]:
    model = Workers().attempt()
    assert model is not None
    return model


@pytest.mark.sweep(3)
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
def test_one_is_lost_at_any_operation(
    group: str, after: int, victim: int, unfailed: dict[str, Tensor]
) -> None:
    workers = Workers()
    fabric = Fabric(WORLD)
    fabric.kill(victim, after=after, group=group)
    assert workers.attempt(fabric) is None
    workers.renew(victim)
    model = workers.attempt()
    assert model is not None and same(model, unfailed)
    assert min(workers.starts) == max(workers.starts) > 0, "survivors keep what they have"
    assert samples(workers, workers.job) == [16, 16, 13] * 2


@pytest.mark.sweep(2)
@pytest.mark.parametrize("deaf", [{0}, {1, 2}, {0, 1, 3}, {2, 3}, {0, 2, 3}])
@pytest.mark.parametrize("victim", [0, 3])
def test_some_have_made_the_update_and_some_not(
    victim: int, deaf: set[int], unfailed: dict[str, Tensor]
) -> None:
    """They make it by themselves; what they had not reported is reported then."""
    workers = Workers()
    assert workers.attempt(Fabric(WORLD), deaf) is None
    versions = [workers.ranks[rank].prepared.flat.version for rank in range(WORLD)]
    assert versions == [3 if rank in deaf else 4 for rank in range(WORLD)]
    workers.renew(victim)
    model = workers.attempt()
    assert model is not None and same(model, unfailed)
    assert workers.starts == [4] * WORLD
    lost = 0 if victim % 2 == 0 or victim not in deaf else 8  # with the rank its report is lost
    assert samples(workers, workers.job)[3] == 16 - lost


class Spoiled(Normed):
    """A sample of the fourth batch, and of one before, makes NaN of loss and statistics."""

    def train_data(self) -> TensorDataset:
        inputs, targets = super().train_data().tensors
        inputs[int(Sampler(SAMPLES, BATCH, 1, seed=5).batch_ids(3)[0])] = float("nan")
        return TensorDataset(inputs, targets)


@pytest.mark.sweep(2)
@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("options", [{}, {"data_strategy": "ps-sync"}], ids=str)
@pytest.mark.parametrize("deaf", [{0, 1}, {0, 2, 3}])
def test_a_step_that_some_have_left_out_the_others_leave_out_too(
    deaf: set[int], options: dict[str, Any], clip: float | None
) -> None:
    policy = {"non_finite": "skip", "max_skipped_steps": 2}
    more: dict[str, Any] = {"options": options, "failure": policy, "clip_norm": clip}
    expected = Workers(Spoiled, **more).attempt()
    assert expected is not None and all(one.isfinite().all() for one in expected.values())
    workers = Workers(Spoiled, **more)
    assert workers.attempt(Fabric(WORLD), deaf) is None
    model = workers.attempt()
    assert model is not None and same(model, expected)
    assert min(workers.starts) == max(workers.starts) > 2


def test_a_part_without_a_holder_is_lost() -> None:
    """Both peers of a stage are gone: the others' state is worth nothing without it."""
    workers = Workers()
    fabric = Fabric(WORLD)
    fabric.kill(1, after=6, group="world")
    assert workers.attempt(fabric) is None
    for rank in (1, 3):
        workers.renew(rank)
    with pytest.raises(StateLost):
        workers.attempt(Fabric(WORLD))


class Doomed(Mlp):
    """Two stages of two blocks, one of which is lost at a given forward or backward."""

    at: ClassVar[tuple[str, int, int] | None] = None
    """Forward or backward, stage, and its number among those of that stage in training."""

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(6, 12), Fatal(0), Fatal(1), nn.Linear(12, CLASSES))


class Fatal(nn.Module):
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

    def _die(self, moment: str, number: int) -> None:
        if Doomed.at == (moment, self.stage, number):
            Doomed.at = None
            raise CollectiveError("test", moment, number, (self.stage,), "this stage was killed")


def alone(strategy: str) -> Workers:
    """No stage has a peer."""
    options: dict[str, Any] = {"data": 1, "data_strategy": strategy}
    return Workers(Doomed, options=options, checkpoint={"every_steps": 2})


@cache
def unfailed_alone() -> dict[str, Tensor]:
    model = alone("ring").attempt(Fabric(2))
    assert model is not None
    return model


@pytest.mark.sweep(8)
@pytest.mark.parametrize("number", range(5, 10))
@pytest.mark.parametrize("stage", [0, 1])
@pytest.mark.parametrize("moment", ["forward", "backward"])
@pytest.mark.parametrize("strategy", ["ring", "ps-sync"])
def test_without_a_twin_all_go_back_to_the_checkpoint(
    strategy: str, moment: str, stage: int, number: int
) -> None:
    """In any micro-batch of steps 2 to 4; of a step that ends with a checkpoint, too."""
    expected = unfailed_alone()
    workers = alone(strategy)
    Doomed.at = moment, stage, number
    assert workers.attempt(Fabric(2)) is None
    newest = max(workers.checkpoints, default=0)
    # The other stage may be a step behind, and not have given its part of the newest.
    assert newest in {5: {0, 2}, 6: {2}, 7: {2}, 8: {2, 4}, 9: {2, 4}}[number]
    workers.start_over()
    model = workers.attempt(Fabric(2), saved=workers.checkpoints.get(newest))
    assert model is not None and same(model, expected)
    assert workers.starts == [newest] * 2
