"""Weights that a forward writes, in a pipeline whose micro-batches wait for their backward."""

from typing import Any

import pytest
import torch
from comparison import distance
from hybrid_models import Classify, hybrid_job, plain, whole
from local_run import Attempt, LocalRun, train
from torch import Tensor, nn

from distplat.platform.errors import SpecError
from distplat.platform.progress import StepReport


class Clamped(nn.Linear):
    """Clips its weight in place before each use."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.weight.clamp_(-0.2, 0.2)
        return super().forward(x)


class ClampedData(nn.Linear):
    """Clips it so that no counter tells."""

    def forward(self, x: Tensor) -> Tensor:
        self.weight.data.clamp_(-0.2, 0.2)
        return super().forward(x)


class Shrinking(nn.Linear):
    """Has another weight in each micro-batch."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.weight.data.mul_(0.99)
        return super().forward(x)


class Counting(nn.Linear):
    """Computes with a buffer that it counts in."""

    calls: Tensor

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.register_buffer("calls", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.calls += 1
        made: Tensor = super().forward(x) * self.calls
        return made


class Writing(Classify):
    """Has such a layer in the first stage; evaluations write, too."""

    shape = (6,)

    def __init__(self, layer: type[nn.Linear] = Clamped) -> None:
        self.layer = layer

    def model(self) -> nn.Module:
        first, own = nn.Linear(6, 12), self.layer(12, 12)
        return nn.Sequential(first, own, nn.Tanh(), nn.Linear(12, 12), nn.Linear(12, 4))


def of(layer: type[nn.Linear]) -> type[Writing]:
    return type("Own", (Writing,), {"__init__": lambda self: Writing.__init__(self, layer)})


def options(micro_batches: int, schedule: str = "1f1b") -> dict[str, Any]:
    return {"pipeline": 2, "cut": ["3"], "micro_batches": micro_batches, "schedule": schedule}


@pytest.mark.parametrize(
    ("layer", "name"), [(Clamped, "1.weight"), (Shrinking, "1.weight"), (Counting, "1.calls")]
)
@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1"])
def test_a_write_before_an_earlier_backward_is_told_by_name(
    layer: type[nn.Linear], name: str, schedule: str
) -> None:
    with pytest.raises(SpecError) as caught:
        train(hybrid_job(options(2, schedule), 2, steps=2), of(layer))
    [problem] = caught.value.problems
    assert f"a forward writes {name} in place while" in problem.message
    assert "micro_batches: 1" in str(problem.hint)


class ShrinkingLate(nn.Linear):
    """Begins with it after two steps of two micro-batches."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += self.training
        if self.training and self.calls > 4:
            self.weight.data.mul_(0.99)
        return super().forward(x)


@pytest.mark.parametrize("more", [{"steps": 5}, {"steps": 9, "checkpoint": {"every_steps": 4}}])
def test_a_write_that_begins_later_ends_the_run_before_it_is_kept(more: dict[str, Any]) -> None:
    run = LocalRun(hybrid_job(options(2), 2, **more), of(ShrinkingLate))
    with pytest.raises(SpecError, match=r"a forward writes 1\.weight in place while"):
        Attempt(run).make()
    assert not run.checkpoints
    steps = [one.step for one in run.reports[0] if isinstance(one, StepReport)]
    assert len(steps) in (3, 4), "not in each step, which would cost"


@pytest.mark.parametrize(("layer", "micro_batches"), [(Clamped, 1), (ClampedData, 2)])
def test_what_no_backward_misses_is_trained_as_by_one_process(
    layer: type[nn.Linear], micro_batches: int
) -> None:
    run = train(hybrid_job(options(micro_batches), 2), of(layer))
    assert distance(whole(run), plain(of(layer))[0]) < 1e-5


def test_an_error_of_backward_with_another_reason_is_left_as_it_is() -> None:
    class Spoiling(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            made = super().forward(x).exp()
            made.sigmoid().add_(1.0)
            return made.add_(1.0)

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        train(hybrid_job(options(2), 2, steps=1), of(Spoiling))
