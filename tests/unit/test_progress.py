"""Reports of the ranks put together: means by samples, the slowest part, each step once."""

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
def test_a_step_is_given_out_with_its_last_rank(order: tuple[int, ...]) -> None:
    parts = [step(0, 12, 2.0, 3, 0.5), step(1, 12, 4.0, 1, 0.75), step(2, 12, 0.0, 0, 0.25)]
    gathering = ReportAggregator(3)
    results = [gathering.add(parts[rank]) for rank in order]
    seconds = {"compute": 0.75, "data": 1.0}
    assert results == [[], [], [StepSummary(13, 1, (2.0 * 3 + 4.0) / 4, 4, seconds, 30)]]


def test_the_sum_does_not_depend_on_who_came_first() -> None:
    losses = [1e16, 1.0, -1e16]
    means = set()
    for order in itertools.permutations(range(3)):
        gathering = ReportAggregator(3)
        [summary] = [gathering.add(step(rank, 0, losses[rank])) for rank in order][-1]
        assert isinstance(summary, StepSummary)
        means.add(summary.loss)
    assert len(means) == 1


def test_a_rank_may_be_steps_ahead() -> None:
    gathering = ReportAggregator(2)
    assert [gathering.add(step(0, number)) for number in range(3)] == [[]] * 3
    assert steps(gathering, [step(1, number) for number in range(3)]) == [0, 1, 2]


def steps(gathering: ReportAggregator, reports: list[StepReport]) -> list[int]:
    """Give the reports' numbers of what is given out: summaries count from 1."""
    return [summary.step - 1 for report in reports for summary in gathering.add(report)]


def test_a_step_whose_report_was_lost_comes_with_the_next() -> None:
    gathering = ReportAggregator(2)
    assert steps(gathering, [step(0, 0), step(1, 0), step(0, 1, loss=4.0, samples=3)]) == [0]
    # rank 1 is lost after its part of step 1; a new one joins for step 2
    assert gathering.add(step(0, 2)) == []
    late, complete = gathering.add(step(1, 2))
    assert isinstance(late, StepSummary)
    assert (late.step, late.loss, late.samples) == (2, 4.0, 3)
    assert isinstance(complete, StepSummary)
    assert (complete.step, complete.samples) == (3, 2)


def test_the_end_brings_what_is_left() -> None:
    gathering = ReportAggregator(2)
    assert steps(gathering, [step(0, 0), step(1, 0), step(0, 1)]) == [0]
    [last] = gathering.flush()
    assert isinstance(last, StepSummary)
    assert (last.step, last.samples) == (2, 1)
    assert gathering.flush() == []


def test_what_is_done_again_is_not_given_out_again() -> None:
    gathering = ReportAggregator(2)
    first = [step(0, 0), step(1, 0), step(0, 1), step(1, 1), step(0, 2)]
    again = [step(rank, number) for number in range(4) for rank in (1, 0)]
    assert steps(gathering, first) == [0, 1]
    assert steps(gathering, again) == [2, 3]


def test_an_evaluation_comes_after_the_steps_before_it_and_hurries_none() -> None:
    """Rank 0 may report the evaluation of all before rank 1's steps were asked for."""
    gathering = ReportAggregator(2)
    assert steps(gathering, [step(0, 0), step(0, 1)]) == []
    assert [gathering.add(EvalReport(rank, 2, 1, {})) for rank in range(2)] == [[], []]
    [first] = gathering.add(step(1, 0))
    second, evaluation = gathering.add(step(1, 1))
    assert isinstance(first, StepSummary) and isinstance(second, StepSummary)
    assert (first.samples, second.samples) == (2, 2)
    assert evaluation == EvalSummary(2, 2, {})
    assert gathering.flush() == []


def test_an_evaluation_comes_at_the_end_where_a_step_before_it_stays_incomplete() -> None:
    gathering = ReportAggregator(2)
    assert steps(gathering, [step(0, 0)]) == []
    assert [gathering.add(EvalReport(rank, 1, 1, {})) for rank in range(2)] == [[], []]
    partial, evaluation = gathering.flush()
    assert isinstance(partial, StepSummary) and isinstance(evaluation, EvalSummary)


def test_an_evaluation_that_was_cut_off_is_made_again() -> None:
    gathering = ReportAggregator(2)
    before, after = EvalReport(0, 5, 1, {"loss": 1.0}), EvalReport(0, 5, 1, {"loss": 2.0})
    other = EvalReport(1, 5, 1, {"loss": 4.0})
    assert gathering.add(before) == gathering.add(after) == []
    assert gathering.add(other) == [EvalSummary(5, 2, {"loss": 3.0})]
    assert gathering.add(other) == gathering.add(after) == []


def test_evaluations_are_means_over_all_samples() -> None:
    gathering = ReportAggregator(3)
    assert gathering.add(EvalReport(1, 8, 1, {"loss": 5.0, "accuracy": 0.0})) == []
    assert gathering.add(EvalReport(0, 8, 3, {"loss": 3.0, "accuracy": 3.0})) == []
    assert gathering.add(step(2, 8)) == []  # a step of the same number is another thing
    last = gathering.add(EvalReport(2, 8, 0, {}))
    assert last == [EvalSummary(8, 4, {"loss": 2.0, "accuracy": 0.75})]


def test_an_evaluation_without_samples_has_no_figures() -> None:
    assert ReportAggregator(1).add(EvalReport(0, 3, 0, {})) == [EvalSummary(3, 0, {})]


def test_leased_steps_wait_their_turn() -> None:
    gathering = ReportAggregator(2, first=3)
    assert steps(gathering, [step(0, 4), step(1, 4), step(0, 3)]) == []
    assert steps(gathering, [step(1, 3)]) == [3, 4]
    assert steps(gathering, [step(1, 6), step(0, 5), step(0, 6), step(1, 5)]) == [5, 6]
    assert steps(gathering, [step(0, 5)]) == []


def test_a_report_that_was_lost_with_a_worker_holds_nothing_up() -> None:
    gathering = ReportAggregator(2, first=0)
    assert steps(gathering, [step(0, 0), step(0, 1), step(1, 1), step(0, 2)]) == []
    gathering.rank_lost()
    assert steps(gathering, [step(1, 2)]) == []  # the others' reports of these may still come
    assert steps(gathering, [step(0, 3), step(1, 3)]) == [0, 1, 2, 3]
    assert steps(gathering, [step(1, 0)]) == []
    assert steps(gathering, [step(0, 4), step(1, 4)]) == [4]


def test_what_was_never_complete_comes_at_the_end() -> None:
    gathering = ReportAggregator(2, first=0)
    assert steps(gathering, [step(0, 0), step(0, 1), step(1, 1)]) == []
    assert [summary.step for summary in gathering.flush()] == [1, 2]


def test_leased_evaluations_may_end_in_any_order() -> None:
    """One worker made parts of the first and all of the second, and is heard of first."""

    def part(rank: int, step: int) -> EvalReport:
        return EvalReport(rank, step, 2, {"loss": 1.0})

    gathering = ReportAggregator(2, first=0)
    found = [gathering.add(part(*one)) for one in [(0, 25), (0, 50), (1, 50), (1, 50), (1, 25)]]
    told = [[summary.step for summary in some] for some in found]
    assert told == [[], [], [50], [], [25]]
    assert gathering.add(part(0, 25)) == gathering.add(part(1, 25)) == [], "told once"


def test_with_more_ranks_a_step_is_complete_with_more_reports() -> None:
    gathering = ReportAggregator(2)
    assert steps(gathering, [step(0, 0), step(1, 0), step(0, 1)]) == [0]
    gathering.resize(3, 2)
    assert steps(gathering, [step(2, 2), step(1, 2)]) == []
    assert steps(gathering, [step(1, 1)]) == [1], "it was made by two"
    assert steps(gathering, [step(0, 2)]) == [2]
    gathering.resize(1, 3)
    gathering.resize(2, 3)  # nothing was made between
    assert steps(gathering, [step(0, 3), step(1, 3)]) == [3]


def test_an_evaluation_that_was_cut_off_is_made_again_in_other_parts() -> None:
    gathering = ReportAggregator(3)
    assert gathering.add(EvalReport(2, 5, 1, {"loss": 9.0})) == []
    gathering.resize(1, 5)
    assert gathering.add(EvalReport(0, 5, 3, {"loss": 6.0})) == [EvalSummary(5, 3, {"loss": 2.0})]


def test_after_going_back_all_that_is_made_again_is_made_by_as_many_as_there_are() -> None:
    gathering = ReportAggregator(1)
    assert steps(gathering, [step(0, 0), step(0, 1), step(0, 2)]) == [0, 1, 2]
    gathering.resize(2, 3)
    assert steps(gathering, [step(0, 3), step(1, 3), step(0, 4)]) == [3]
    gathering.resize(2, 1)
    again = [step(rank, number) for number in range(1, 6) for rank in range(2)]
    assert steps(gathering, again) == [4, 5]


def test_a_figure_is_a_mean_over_the_samples_of_those_that_gave_it() -> None:
    gathering = ReportAggregator(2)
    assert gathering.add(EvalReport(0, 4, 6, {"loss": 6.0}, {"loss": 6})) == []
    last = EvalReport(1, 4, 5, {"loss": 16.0, "rare": 1.0}, {"loss": 5, "rare": 2})
    assert gathering.add(last) == [EvalSummary(4, 11, {"loss": 2.0, "rare": 0.5})]


def test_a_trace_counts_as_summaries_do() -> None:
    (trace,) = ReportAggregator(1).add(TraceReport(0, 4, 2, "1f1b", 2, ()))
    assert trace.step == 5


def test_a_result_of_many_steps_keeps_the_last_and_the_sums_of_all() -> None:
    """Ten million would be a few hundred times as many: what is kept is bounded."""
    result, steps = Result(Path("run"), None), 3 * KEPT
    for number in range(1, steps + 1):
        figures = {"sent_bytes": float(number), **({"rare": 7.0} if number % 100 == 0 else {})}
        result.add(StepSummary(number, 0, 1.0 / number, 8, {"compute": 0.5}, steps, figures))
        result.add(EvalSummary(number, 8, {"loss": 0.5}))
    assert KEPT <= len(result.history) < 2 * KEPT
    assert [one.step for one in result.history[-2:]] == [steps - 1, steps]
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


def test_a_result_prints_as_a_short_table() -> None:
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


def test_evaluations_that_come_in_any_order_are_told_once_however_many(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("distplat.platform.progress._MAX_EMITTED", 5)
    aggregator = ReportAggregator(1, 0)
    told = [
        one.step
        for step in (*range(0, 40, 2), *range(1, 40, 2), *range(40))
        for one in aggregator.add(EvalReport(0, step, 1, {"loss": 1.0}))
    ]
    assert len(set(told)) == len(told) and set(range(0, 40, 2)) <= set(told)
