"""
A rank is lost at every moment of a step in turn; the others go on, to the same bits.

Ranks are threads here, which come back with the strategy object that they had; the lost one comes
with a new one. What is swept is the number of the operation to which it does not come any more: in
the twins' exchange, in the agreement of all, and between the two.
"""

import pytest
from hybrid_workers import WORLD, Workers, same, samples
from torch import Tensor

from distplat.platform.errors import StateLost
from distplat.strategies.fakes import Fabric


@pytest.fixture(scope="module")
def unfailed() -> dict[str, Tensor]:
    model = Workers().attempt(Fabric(WORLD))
    assert model is not None
    return model


@pytest.mark.parametrize("victim", range(WORLD))
@pytest.mark.parametrize(
    ("group", "after"),
    [
        ("twins", 6),  # in the exchange of gradients, of one stage or the other
        ("twins", 8),
        ("replica", 3),  # between the exchange and the agreement: the norm over the stages
        ("world", 3),  # in the agreement
        ("world", 6),
        ("world", 7),  # of the last step
        ("world", 8),  # in the last evaluation
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
    workers.starts.clear()
    model = workers.attempt(Fabric(WORLD))
    assert model is not None and same(model, unfailed)
    assert min(workers.starts) == max(workers.starts) > 0, "survivors keep what they have"
    assert samples(workers.reports, workers.job) == [16, 16, 13] * 2


@pytest.mark.parametrize("deaf", [{0}, {1, 2}, {0, 1, 3}, {2, 3}, {0, 2, 3}])
@pytest.mark.parametrize("victim", [0, 3])
def test_some_have_made_the_update_and_some_not(
    victim: int, deaf: set[int], unfailed: dict[str, Tensor]
) -> None:
    """They make it by themselves; what they had not reported is reported then."""
    workers = Workers()
    assert workers.attempt(Fabric(WORLD), deaf) is None
    versions = [workers.prepared[rank].flat.version for rank in range(WORLD)]
    assert versions == [3 if rank in deaf else 4 for rank in range(WORLD)]
    workers.renew(victim)
    workers.starts.clear()
    model = workers.attempt(Fabric(WORLD))
    assert model is not None and same(model, unfailed)
    assert workers.starts == [4] * WORLD
    lost = 0 if victim % 2 == 0 or victim not in deaf else 8  # with the rank its report is lost
    assert samples(workers.reports, workers.job)[3] == 16 - lost


def test_a_part_without_a_holder_is_lost() -> None:
    """Both twins of a stage are gone: the others' state is worth nothing without it."""
    workers = Workers()
    fabric = Fabric(WORLD)
    fabric.kill(1, after=6, group="world")
    assert workers.attempt(fabric) is None
    for rank in (1, 3):
        workers.renew(rank)
    with pytest.raises(StateLost):
        workers.attempt(Fabric(WORLD))
