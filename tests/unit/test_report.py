"""Statistics of a run report."""

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distplat.platform.progress import EvalSummary, FailureEvent, Recovery, StepSummary
from distplat.platform.run_record import RunRecord
from distplat.platform.run_report import (
    axis_limit,
    binned,
    figure_rows,
    metrics,
    phase_times,
    restarts,
    samples_per_s,
    smoothed,
    staleness,
    status_of,
)

NAN = math.nan


def step_summary(
    step: int, loss: float = 1.0, compute: float = 0.1, **figures: float
) -> StepSummary:
    return StepSummary(step, 0, loss, 8, {"data": 0.1, "compute": compute}, 10, figures)


@pytest.mark.parametrize(
    ("record", "word", "detail"),
    [
        (RunRecord(Path(), result={"status": "FAILED", "error": "x"}), "FAILED", ""),
        (RunRecord(Path(), result={}), "UNKNOWN", ""),
        (RunRecord(Path(), last_sign_s=995.0), "RUNNING", "last line 5 s ago"),
        (RunRecord(Path(), last_sign_s=700.0), "UNKNOWN", "5 min ago"),
        (RunRecord(Path(), last_sign_s=-9000.0), "UNKNOWN", "3 h ago"),
        (
            RunRecord(Path(), job={"failure": {"step_timeout_s": 600}}, last_sign_s=700.0),
            "RUNNING",
            "300 s ago",
        ),
        (RunRecord(Path()), "UNKNOWN", "no metrics"),
    ],
)
def test_status_of_a_run(record: RunRecord, word: str, detail: str) -> None:
    status = status_of(record, 1000.0)
    assert status.word == word
    assert detail in status.detail
    assert status.error == ("x" if word == "FAILED" else "")


def test_phase_times_of_steps() -> None:
    data, compute = phase_times(
        [step_summary(0, compute=5.0), step_summary(1), step_summary(2, compute=0.5)]
    )
    assert (data.name, compute.name) == ("data", "compute")
    assert data.total_s == pytest.approx(0.3)
    assert compute.share == pytest.approx(5.6 / 5.9)
    assert compute.median_s == pytest.approx(0.3)  # without the first step
    assert compute.p95_s == pytest.approx(0.48)
    assert phase_times([]) == []


def test_samples_per_second() -> None:
    assert samples_per_s([step_summary(0), step_summary(1)]) == pytest.approx(16 / 0.4)
    assert samples_per_s([]) is None


def test_figure_rows_exclude_the_first_step() -> None:
    rows = figure_rows(
        [step_summary(0, sent=9.0), step_summary(1, sent=1.0), step_summary(2, sent=3.0, late=4.0)]
    )
    assert [(r.name, r.mean, r.least, r.most, r.last) for r in rows] == [
        ("sent", 2.0, 1.0, 3.0, 3.0),
        ("late", 4.0, 4.0, 4.0, 4.0),
    ]


def test_figures_without_finite_values_are_omitted() -> None:
    assert figure_rows([step_summary(0, norm=NAN), step_summary(1, norm=NAN)]) == []


def test_metrics_are_points_by_step() -> None:
    found = metrics([EvalSummary(5, 1, {"a": 1.0}), EvalSummary(9, 1, {"a": 2.0, "b": 3.0})])
    assert [(m.name, m.points) for m in found] == [("a", ((5, 1.0), (9, 2.0))), ("b", ((9, 3.0),))]


def test_restarts_have_their_recoveries() -> None:
    first, second = (FailureEvent(n, 3, "lost", (), 0.0) for n in (1, 2))
    record = RunRecord(Path(), failures=[first, second], recoveries=[Recovery(1, 2.5)])
    assert [restart.recovery and restart.recovery.seconds for restart in restarts(record)] == [
        2.5,
        None,
    ]


def test_staleness_counts() -> None:
    steps = [step_summary(n, staleness=value) for n, value in enumerate([0.0, 2.0, 2.0, NAN])]
    assert staleness(steps) == {0: 1, 2: 2}
    assert not staleness([step_summary(0)])


@given(st.lists(st.floats(-100, 100), max_size=40), st.integers(0, 5))
def test_smoothed_values_are_within_their_window(values: list[float], reach: int) -> None:
    found = smoothed(values, reach)
    assert len(found) == len(values)
    for index, mean in enumerate(found):
        window = values[max(0, index - reach) : index + reach + 1]
        assert min(window) - 1e-6 <= mean <= max(window) + 1e-6


def test_smoothing_keeps_straight_lines_and_gaps() -> None:
    assert smoothed([1.0, 2.0, 3.0, 4.0], 2) == pytest.approx([1.0, 2.0, 3.0, 4.0])
    found = smoothed([1.0, NAN, 3.0], 1)
    assert found[::2] == [1.0, 3.0] and math.isnan(found[1])


@given(st.integers(0, 50), st.integers(1, 10))
def test_bins_cover_all_steps(count: int, maximum: int) -> None:
    steps = [step_summary(n, loss=float(n)) for n in range(count)]
    bins = binned(steps, maximum, lambda step: step.loss)
    assert len(bins) <= maximum
    assert [n for first, stop, _ in bins for n in range(first, stop)] == list(range(count))
    assert all(first <= mean < stop for first, stop, mean in bins)


def test_bins_ignore_non_finite_values() -> None:
    bins = binned(
        [step_summary(0, NAN), step_summary(1, 3.0), step_summary(2, NAN)],
        2,
        lambda step: step.loss,
    )
    assert bins[0] == (0, 2, 3.0)
    assert math.isnan(bins[1][2])


@pytest.mark.parametrize(
    ("values", "maximum"),
    [
        ([], 0.0),
        ([NAN], 0.0),
        ([1.0, 2.0], 1.6),
        ([1.0, 1.1], 1.1),
        ([1.0] * 99 + [50.0], 1.6),
        ([0.0] * 99 + [50.0], 50.0),
    ],
)
def test_axis_limit_ignores_outliers(values: list[float], maximum: float) -> None:
    assert axis_limit(values) == pytest.approx(maximum)
