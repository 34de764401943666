"""The control record of a step: packing, summing, and the decisions based on it."""

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
    return StepControl.total([r.pack() for r in records])


def test_parameter_present_on_one_rank_is_present() -> None:
    summed = total(record(0, present=(1, 0)), record(1, present=(0, 0)))
    assert summed.present.tolist() == [True, False]
    assert len(record(0).pack()) == control_size(2)


def test_scale_is_one_for_means_and_corrects_weights() -> None:
    assert total(record(0, 3), record(1, 5)).scale == 1.0
    assert total(record(0, 3, 10.0), record(1, 5, 6.0)).scale == 8 / 16


@given(st.lists(st.integers(0, 5), min_size=1, max_size=6))
def test_sum_names_the_rank_with_non_finite_values(slots: list[int]) -> None:
    """Slot 0 means finite. A sum with several such ranks names none; each rank names itself."""
    ranks = [
        record(rank).broken(slot - 1) if slot else record(rank) for rank, slot in enumerate(slots)
    ]
    summed, broken = total(*ranks), [rank for rank, slot in enumerate(slots) if slot]
    assert summed.non_finite == len(broken) and summed.finite == (not broken)
    expected = (broken[0], slots[broken[0]] - 1) if len(broken) == 1 else (-1, -1)
    assert (summed.rank, summed.slot) == expected
    for rank in broken:
        assert (summed.named(ranks[rank]).rank, summed.named(ranks[rank]).slot) == (
            rank,
            slots[rank] - 1,
        )


def test_zero_total_weight_is_not_finite() -> None:
    assert not total(record(0, 4, 0.0), record(1, 4, 0.0)).finite
    assert total(record(0, 4, 0.0), record(1, 4, 2.0)).finite
    assert total(record(0, 0, 0.0)).finite  # no rank had samples


@given(st.lists(st.sampled_from([0, 1, 2, 7, 2**32]), min_size=1, max_size=6))
def test_sum_detects_ranks_with_different_batches(batches: list[int]) -> None:
    """0 means a rank without a batch. At least one of the differing ranks raises."""
    ranks = [record(rank).of_batch(batch) for rank, batch in enumerate(batches)]
    summed, errors = total(*ranks), 0
    for control in ranks:
        try:
            summed.check_batch(control, 7)
        except ValueError as error:
            assert f"in step 8 worker-{control.rank} read another batch" in str(error)
            errors += 1
    assert (errors > 0) == (len({*batches} - {0}) > 1)


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


def test_skip_counts_steps_and_has_a_limit() -> None:
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


def test_ignore_applies_the_step() -> None:
    assert (
        not NonFiniteSteps("ignore", 0)
        .decide(total(record(0).broken(0)), 0, NAMES.__getitem__)
        .skip
    )
