"""The control record of a step: packed, summed, read; and what is decided by it."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distplat.platform.errors import NonFiniteError
from distplat.strategies.loop.control import NonFiniteSteps, StepControl, control_size

NAMES = ["a.weight", "a.bias"]


def record(
    rank: int, samples: float = 4, weight: float | None = None, present: tuple[int, ...] = (1, 1)
) -> StepControl:
    bits = np.array(present, np.bool_)
    return StepControl(samples, samples if weight is None else weight, 0, rank, present=bits)


def total(*records: StepControl) -> StepControl:
    return StepControl.total([one.pack() for one in records])


def test_a_parameter_used_on_one_rank_is_used() -> None:
    found = total(record(0, present=(1, 0)), record(1, present=(0, 0)))
    assert found.present.tolist() == [True, False]
    assert len(record(0).pack()) == control_size(2)


def test_means_need_no_factor_and_weights_do() -> None:
    assert total(record(0, 3), record(1, 5)).scale == 1.0
    assert total(record(0, 3, 10.0), record(1, 5, 6.0)).scale == 8 / 16


@given(st.lists(st.integers(0, 5), min_size=1, max_size=6))
def test_a_sum_tells_who_was_not_finite(slots: list[int]) -> None:
    """Slot 0 stands for: finite; a sum of several names nobody, and every rank names itself."""
    ranks = [
        record(rank).broken(slot - 1) if slot else record(rank) for rank, slot in enumerate(slots)
    ]
    found, broken = total(*ranks), [rank for rank, slot in enumerate(slots) if slot]
    assert found.non_finite == len(broken) and found.finite == (not broken)
    expected = (broken[0], slots[broken[0]] - 1) if len(broken) == 1 else (-1, -1)
    assert (found.rank, found.slot) == expected
    for rank in broken:
        assert (found.named(ranks[rank]).rank, found.named(ranks[rank]).slot) == (
            rank,
            slots[rank] - 1,
        )


def test_a_sum_of_weights_that_is_zero_is_not_finite() -> None:
    assert not total(record(0, 4, 0.0), record(1, 4, 0.0)).finite
    assert total(record(0, 4, 0.0), record(1, 4, 2.0)).finite
    assert total(record(0, 0, 0.0)).finite  # nobody had samples


@given(st.lists(st.sampled_from([0, 1, 2, 7, 2**32]), min_size=1, max_size=6))
def test_a_sum_tells_whether_ranks_read_other_batches(batches: list[int]) -> None:
    """0 stands for a rank that has read none; of others that differ one at least is told."""
    ranks = [record(rank).of_batch(batch) for rank, batch in enumerate(batches)]
    found, told = total(*ranks), 0
    for one in ranks:
        try:
            found.check_batch(one, 7)
        except ValueError as error:
            assert f"in step 8 worker-{one.rank} read another batch" in str(error)
            told += 1
    assert (told > 0) == (len({*batches} - {0}) > 1)


@dataclass
class Case:
    broken: StepControl
    text: str


@pytest.mark.parametrize(
    "case",
    [
        Case(record(0).broken(1), "step 8, rank 0: the gradient of 'a.bias' holds NaN"),
        Case(replace(record(1), non_finite=1), "step 8, rank 1: the loss is NaN or infinite"),
        Case(record(0, 4, 0.0), "the weights of the losses add up to 0"),
    ],
    ids=lambda case: case.text,
)
def test_stop_names_step_rank_and_parameter(case: Case) -> None:
    with pytest.raises(NonFiniteError, match=case.text) as caught:
        NonFiniteSteps("stop", 0).decide(total(case.broken), 7, NAMES.__getitem__)
    assert caught.value.exit_code == 1


def test_skip_has_a_budget_and_counts() -> None:
    steps, bad, good = (
        NonFiniteSteps("skip", 2),
        total(record(0).broken(0)),
        total(record(0)),
    )
    assert not steps.decide(good, 0, NAMES.__getitem__).skip and steps.figures() == {}
    assert (
        steps.decide(bad, 1, NAMES.__getitem__).skip
        and steps.decide(bad, 2, NAMES.__getitem__).skip
    )
    assert steps.figures() == {"skipped_steps": 2.0}
    with pytest.raises(NonFiniteError, match="2 steps were skipped before"):
        steps.decide(bad, 3, NAMES.__getitem__)


def test_ignore_applies_it() -> None:
    assert (
        not NonFiniteSteps("ignore", 0)
        .decide(total(record(0).broken(0)), 0, NAMES.__getitem__)
        .skip
    )
