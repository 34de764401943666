"""
A rank is lost at every moment of a step in turn; the others go on, to the same bits.

Ranks are threads here, which come back with the strategy object that they had; the lost one comes
with a new one. What is swept is the number of the operation to which it does not come any more: in
the twins' exchange, in the agreement of all, and between the two.
"""

from collections.abc import Set
from typing import Any

import pytest
import torch
from hybrid_models import Mlp, job_of
from rank_threads import on_ranks
from torch import Tensor

from distplat.platform.errors import CollectiveError, StateLost
from distplat.platform.progress import AnyReport, StepReport
from distplat.platform.spec import Job
from distplat.strategies.base import Collective, Strategy
from distplat.strategies.catalog import make_strategy
from distplat.strategies.fakes import Fabric
from distplat.strategies.pipeline.rebound import Rebound
from distplat.strategies.training.loop import Progress
from distplat.strategies.training.session import Prepared, join, prepare

STEPS = 6
WORLD = 4


class Workers:
    """Ranks that live through several attempts."""

    def __init__(self, **options: Any) -> None:
        grid = {"pipeline": 2, "data": 2, "cut": "even", "micro_batches": 2, **options}
        self.job: Job = job_of(grid, WORLD, steps=STEPS, clip_norm=0.5)
        self.strategies: dict[int, Strategy[Any]] = {}
        self.prepared: dict[int, Prepared] = {}
        self.reports: list[AnyReport] = []
        self.starts: list[int] = []
        for rank in range(WORLD):
            self.renew(rank)

    def renew(self, rank: int) -> None:
        """Put a new process in the place of one that was lost."""
        self.strategies[rank] = make_strategy(self.job)
        self.prepared[rank] = prepare(self.job, Mlp(), strategy=self.strategies[rank])

    def attempt(self, fabric: Fabric, deaf: Set[int] = frozenset()) -> dict[str, Tensor] | None:
        """
        Give the trained model, or None where ranks stopped because one was missing.

        Args:
            fabric: connects the ranks.
            deaf: ranks that do not hear of the agreement on step 3.
        """
        stopped = []

        def body(rank: int) -> dict[str, Tensor]:
            try:
                loop = join(
                    self.prepared[rank],
                    self.strategies[rank],
                    rank,
                    collective=Torn(fabric.collective(rank), 3 if rank in deaf else STEPS),
                    shards=None,
                    report=self.reports.append,
                    progress=Progress(),
                )
                self.starts.append(loop.start)
                loop.run()
                state = self.strategies[rank].trained(self.prepared[rank].flat)
            except CollectiveError as error:
                stopped.append(error)
                fabric.give_up()  # as the controller has all stop
                return {}
            return {name: tensor.clone() for name, tensor in state.items()}

        parts = on_ranks(WORLD, body)
        return None if stopped else {k: v for part in parts for k, v in part.items()}


@pytest.fixture(scope="module")
def unfailed() -> dict[str, Tensor]:
    model = Workers().attempt(Fabric(WORLD))
    assert model is not None
    return model


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


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
    assert samples(workers.reports) == [16, 16, 13] * 2


class Torn(Rebound):
    """The agreement `at` is reached, but this rank does not hear of it: it was told to stop."""

    def __init__(self, group: Collective, at: int) -> None:
        super().__init__(group)
        self._left = at

    def barrier(self) -> None:
        super().barrier()
        self._left -= 1
        if self._left < 0:
            raise CollectiveError("world", "barrier", 0, (), "this rank was told to give up")


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
    assert samples(workers.reports)[3] == 16 - lost


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


def samples(reports: list[AnyReport]) -> list[int]:
    """Count the samples of each step; what a rank reports again replaces what it reported."""
    found = {(r.step, r.rank): r.samples for r in reports if isinstance(r, StepReport)}
    return [sum(found.get((s, rank), 0) for rank in range(WORLD)) for s in range(STEPS)]
