"""ReportAggregator combines the reports of the ranks; Result keeps the summaries."""

import itertools
from pathlib import Path

import pytest

from distplat.actors.result import KEPT, Result
from distplat.platform.pipeline_trace import TraceReport
from distplat.platform.progress import (
    EvalReport,
    EvalSummary,
    ReportAggregator,
    StepReport,
    StepSummary,
)


def step(
    rank: int, number: int, loss: float = 1.0, samples: int = 1, compute: float = 0.0
) -> StepReport:
    seconds = {"compute": compute, "data": 1.0}
    return StepReport(rank, number, number // 10, loss, samples, seconds, of=30)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_summary_follows_the_last_ranks_report(order: tuple[int, ...]) -> None:
    parts = [step(0, 12, 2.0, 3, 0.5), step(1, 12, 4.0, 1, 0.75), step(2, 12, 0.0, 0, 0.25)]
    aggregator = ReportAggregator(3)
    results = [aggregator.add(parts[rank]) for rank in order]
    seconds = {"compute": 0.75, "data": 1.0}
    assert results == [[], [], [StepSummary(13, 1, (2.0 * 3 + 4.0) / 4, 4, seconds, 30)]]


def test_mean_does_not_depend_on_the_order_of_ranks() -> None:
    losses = [1e16, 1.0, -1e16]
    means = set()
    for order in itertools.permutations(range(3)):
        aggregator = ReportAggregator(3)
        [summary] = [aggregator.add(step(rank, 0, losses[rank])) for rank in order][-1]
        assert isinstance(summary, StepSummary)
        means.add(summary.loss)
    assert len(means) == 1


def test_rank_may_be_steps_ahead() -> None:
    aggregator = ReportAggregator(2)
    assert [aggregator.add(step(0, number)) for number in range(3)] == [[]] * 3
    assert steps(aggregator, [step(1, number) for number in range(3)]) == [0, 1, 2]


def steps(aggregator: ReportAggregator, reports: list[StepReport]) -> list[int]:
    """Return the steps of the summaries, counted from 0 as in reports; summaries count from 1."""
    return [summary.step - 1 for report in reports for summary in aggregator.add(report)]


def test_lost_report_completes_with_the_next_step() -> None:
    aggregator = ReportAggregator(2)
    assert steps(aggregator, [step(0, 0), step(1, 0), step(0, 1, loss=4.0, samples=3)]) == [0]
    # rank 1 is lost after its part of step 1; a new rank 1 joins for step 2
    assert aggregator.add(step(0, 2)) == []
    late, complete = aggregator.add(step(1, 2))
    assert isinstance(late, StepSummary)
    assert (late.step, late.loss, late.samples) == (2, 4.0, 3)
    assert isinstance(complete, StepSummary)
    assert (complete.step, complete.samples) == (3, 2)


def test_flush_returns_incomplete_steps() -> None:
    aggregator = ReportAggregator(2)
    assert steps(aggregator, [step(0, 0), step(1, 0), step(0, 1)]) == [0]
    [last] = aggregator.flush()
    assert isinstance(last, StepSummary)
    assert (last.step, last.samples) == (2, 1)
    assert aggregator.flush() == []


def test_repeated_steps_give_no_second_summary() -> None:
    aggregator = ReportAggregator(2)
    first = [step(0, 0), step(1, 0), step(0, 1), step(1, 1), step(0, 2)]
    repeated = [step(rank, number) for number in range(4) for rank in (1, 0)]
    assert steps(aggregator, first) == [0, 1]
    assert steps(aggregator, repeated) == [2, 3]


def test_evaluation_waits_for_the_steps_before_it() -> None:
    """Rank 0 may report an evaluation before rank 1's steps are polled."""
    aggregator = ReportAggregator(2)
    assert steps(aggregator, [step(0, 0), step(0, 1)]) == []
    assert [aggregator.add(EvalReport(rank, 2, 1, {})) for rank in range(2)] == [[], []]
    [first] = aggregator.add(step(1, 0))
    second, evaluation = aggregator.add(step(1, 1))
    assert isinstance(first, StepSummary) and isinstance(second, StepSummary)
    assert (first.samples, second.samples) == (2, 2)
    assert evaluation == EvalSummary(2, 2, {})
    assert aggregator.flush() == []


def test_flush_returns_an_evaluation_after_an_incomplete_step() -> None:
    aggregator = ReportAggregator(2)
    assert steps(aggregator, [step(0, 0)]) == []
    assert [aggregator.add(EvalReport(rank, 1, 1, {})) for rank in range(2)] == [[], []]
    partial, evaluation = aggregator.flush()
    assert isinstance(partial, StepSummary) and isinstance(evaluation, EvalSummary)


def test_repeated_evaluation_replaces_an_interrupted_one() -> None:
    aggregator = ReportAggregator(2)
    before, after = EvalReport(0, 5, 1, {"loss": 1.0}), EvalReport(0, 5, 1, {"loss": 2.0})
    other = EvalReport(1, 5, 1, {"loss": 4.0})
    assert aggregator.add(before) == aggregator.add(after) == []
    assert aggregator.add(other) == [EvalSummary(5, 2, {"loss": 3.0})]
    assert aggregator.add(other) == aggregator.add(after) == []


def test_evaluation_is_the_mean_over_all_samples() -> None:
    aggregator = ReportAggregator(3)
    assert aggregator.add(EvalReport(1, 8, 1, {"loss": 5.0, "accuracy": 0.0})) == []
    assert aggregator.add(EvalReport(0, 8, 3, {"loss": 3.0, "accuracy": 3.0})) == []
    assert aggregator.add(step(2, 8)) == []  # a step with the same number is independent
    last = aggregator.add(EvalReport(2, 8, 0, {}))
    assert last == [EvalSummary(8, 4, {"loss": 2.0, "accuracy": 0.75})]


def test_evaluation_without_samples_has_no_figures() -> None:
    assert ReportAggregator(1).add(EvalReport(0, 3, 0, {})) == [EvalSummary(3, 0, {})]


def test_leased_steps_are_returned_in_order() -> None:
    aggregator = ReportAggregator(2, first=3)
    assert steps(aggregator, [step(0, 4), step(1, 4), step(0, 3)]) == []
    assert steps(aggregator, [step(1, 3)]) == [3, 4]
    assert steps(aggregator, [step(1, 6), step(0, 5), step(0, 6), step(1, 5)]) == [5, 6]
    assert steps(aggregator, [step(0, 5)]) == []


def test_lost_report_does_not_block_leased_steps() -> None:
    aggregator = ReportAggregator(2, first=0)
    assert steps(aggregator, [step(0, 0), step(0, 1), step(1, 1), step(0, 2)]) == []
    aggregator.rank_lost()
    assert steps(aggregator, [step(1, 2)]) == []  # reports of other ranks may still arrive
    assert steps(aggregator, [step(0, 3), step(1, 3)]) == [0, 1, 2, 3]
    assert steps(aggregator, [step(1, 0)]) == []
    assert steps(aggregator, [step(0, 4), step(1, 4)]) == [4]


def test_flush_returns_incomplete_leased_steps() -> None:
    aggregator = ReportAggregator(2, first=0)
    assert steps(aggregator, [step(0, 0), step(0, 1), step(1, 1)]) == []
    assert [summary.step for summary in aggregator.flush()] == [1, 2]


def test_leased_evaluations_complete_in_any_order() -> None:
    """One worker has parts of both evaluations, and its reports arrive first."""

    def part(rank: int, step: int) -> EvalReport:
        return EvalReport(rank, step, 2, {"loss": 1.0})

    aggregator = ReportAggregator(2, first=0)
    reports = [(0, 25), (0, 50), (1, 50), (1, 50), (1, 25)]
    found = [aggregator.add(part(*report)) for report in reports]
    completed = [[summary.step for summary in summaries] for summaries in found]
    assert completed == [[], [], [50], [], [25]]
    assert aggregator.add(part(0, 25)) == aggregator.add(part(1, 25)) == [], (
        "each evaluation is returned once"
    )


def test_resize_changes_the_reports_per_step() -> None:
    aggregator = ReportAggregator(2)
    assert steps(aggregator, [step(0, 0), step(1, 0), step(0, 1)]) == [0]
    aggregator.resize(3, 2)
    assert steps(aggregator, [step(2, 2), step(1, 2)]) == []
    assert steps(aggregator, [step(1, 1)]) == [1], "two ranks made step 1"
    assert steps(aggregator, [step(0, 2)]) == [2]
    aggregator.resize(1, 3)
    aggregator.resize(2, 3)  # no step between the two
    assert steps(aggregator, [step(0, 3), step(1, 3)]) == [3]


def test_repeated_evaluation_after_resize_has_other_parts() -> None:
    aggregator = ReportAggregator(3)
    assert aggregator.add(EvalReport(2, 5, 1, {"loss": 9.0})) == []
    aggregator.resize(1, 5)
    assert aggregator.add(EvalReport(0, 5, 3, {"loss": 6.0})) == [EvalSummary(5, 3, {"loss": 2.0})]


def test_repeated_steps_after_a_rollback_need_all_ranks() -> None:
    aggregator = ReportAggregator(1)
    assert steps(aggregator, [step(0, 0), step(0, 1), step(0, 2)]) == [0, 1, 2]
    aggregator.resize(2, 3)
    assert steps(aggregator, [step(0, 3), step(1, 3), step(0, 4)]) == [3]
    aggregator.resize(2, 1)
    repeated = [step(rank, number) for number in range(1, 6) for rank in range(2)]
    assert steps(aggregator, repeated) == [4, 5]


def test_figure_is_the_mean_over_the_samples_that_have_it() -> None:
    aggregator = ReportAggregator(2)
    assert aggregator.add(EvalReport(0, 4, 6, {"loss": 6.0}, {"loss": 6})) == []
    last = EvalReport(1, 4, 5, {"loss": 16.0, "rare": 1.0}, {"loss": 5, "rare": 2})
    assert aggregator.add(last) == [EvalSummary(4, 11, {"loss": 2.0, "rare": 0.5})]


def test_trace_steps_count_from_1() -> None:
    (trace,) = ReportAggregator(1).add(TraceReport(0, 4, 2, "1f1b", 2, ()))
    assert trace.step == 5


def test_result_bounds_its_history_and_keeps_totals() -> None:
    """A run may have millions of steps, so the history must be bounded."""
    result, steps = Result(Path("run"), None), 3 * KEPT
    for number in range(1, steps + 1):
        figures = {"sent_bytes": float(number), **({"rare": 7.0} if number % 100 == 0 else {})}
        result.add(StepSummary(number, 0, 1.0 / number, 8, {"compute": 0.5}, steps, figures))
        result.add(EvalSummary(number, 8, {"loss": 0.5}))
    assert KEPT <= len(result.history) < 2 * KEPT
    assert [summary.step for summary in result.history[-2:]] == [steps - 1, steps]
    assert KEPT <= len(result.evaluations) < 2 * KEPT
    totals = result.totals
    assert (totals.steps, totals.samples, totals.seconds) == (
        steps,
        8 * steps,
        {"compute": steps / 2},
    )
    mean = sum(range(2, steps + 1)) / (steps - 1)
    assert totals.figures == {"sent_bytes": mean, "rare": 7.0}
    assert result.metrics == {"loss": 1.0 / steps, "eval_loss": 0.5}


def test_result_prints_a_short_table() -> None:
    result = Result(Path("runs/a<b"), Path("runs/a<b/model.safetensors"), seconds=1.25)
    assert str(Result(Path("run"), None)).splitlines()[0].split() == ["steps", "0", "reported"]
    result.add(StepSummary(1, 0, 0.5, 8, {"compute": 0.5}, 2))
    result.add(EvalSummary(1, 8, {"accuracy": 0.875}))
    lines = str(result).splitlines()
    assert [line.split("  ")[0] for line in lines] == [
        *("steps", "loss", "eval_accuracy", "took", "run directory", "model")
    ]
    assert lines[2] == "eval_accuracy  0.875"
    assert "a&lt;b" in result._repr_html_() and "StepSummary" not in repr(result)


def test_many_unordered_evaluations_are_returned_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("distplat.platform.progress._MAX_EMITTED", 5)
    aggregator = ReportAggregator(1, 0)
    emitted = [
        summary.step
        for step in (*range(0, 40, 2), *range(1, 40, 2), *range(40))
        for summary in aggregator.add(EvalReport(0, step, 1, {"loss": 1.0}))
    ]
    assert len(set(emitted)) == len(emitted) and set(range(0, 40, 2)) <= set(emitted)
