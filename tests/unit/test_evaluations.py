"""After which steps `eval_data` is run through the model."""

from typing import Any

import pytest
from jobs import job_of
from local_run import train
from test_equivalence import Mlp

from distplat.platform.errors import SpecError
from distplat.platform.progress import EvalReport

STEPS = 12


class Evaluated(Mlp):
    def eval_data(self) -> Any:
        return self.train_data()


@pytest.mark.parametrize("strategy", ["ring", "ps-sync", "ps-async"])
@pytest.mark.parametrize(
    ("evaluation", "times"),
    [
        ({"every_steps": 4}, [4, 8, 12]),
        ({"every_steps": 5}, [5, 10, 12]),
        ({"every_steps": 100}, [12]),
        ({"every_epochs": 0}, [12]),
    ],
)
def test_times(strategy: str, evaluation: dict[str, int], times: list[int]) -> None:
    job = job_of(strategy, 2, steps=STEPS, global_batch_size=8, evaluation=evaluation)
    run = train(job, Evaluated)
    found = [one for reports in run.reports for one in reports if isinstance(one, EvalReport)]
    assert sorted({report.step for report in found}) == times
    parts = {(report.step, report.rank): report.samples for report in found}
    whole = len(Mlp().train_data())
    for time in times:
        assert sum(samples for (step, _), samples in parts.items() if step == time) == whole


def test_epochs_by_default() -> None:
    evaluation = job_of("ring", 2).evaluation
    assert evaluation.period(7) == 7


def test_both_are_refused() -> None:
    with pytest.raises(SpecError, match="evaluation: give `every_steps` or `every_epochs`"):
        job_of("ring", 2, evaluation={"every_steps": 4, "every_epochs": 1})
