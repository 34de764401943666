"""In-place writes to parameters in forward, in a pipeline with several micro-batches."""

from typing import Any

import pytest
import torch
from comparison import distance
from hybrid_models import Classify, hybrid_job, merge_parts, train_plain
from local_run import Attempt, LocalRun, train
from torch import Tensor, nn

from distplat.platform.errors import SpecError
from distplat.platform.progress import StepReport


class Clamped(nn.Linear):
    """Clamps its weight in place in each forward."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.weight.clamp_(-0.2, 0.2)
        return super().forward(x)


class ClampedData(nn.Linear):
    """Clamps through `data`, which does not increment the version counter."""

    def forward(self, x: Tensor) -> Tensor:
        self.weight.data.clamp_(-0.2, 0.2)
        return super().forward(x)


class Shrinking(nn.Linear):
    """Changes its weight in each micro-batch."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.weight.data.mul_(0.99)
        return super().forward(x)


class Counting(nn.Linear):
    """Increments a buffer that the output depends on."""

    calls: Tensor

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.register_buffer("calls", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.calls += 1
        outputs: Tensor = super().forward(x) * self.calls
        return outputs


class WritingTask(Classify):
    """A model with a writing layer in the first stage; evaluations write, too."""

    shape = (6,)

    def __init__(self, layer: type[nn.Linear] = Clamped) -> None:
        self.layer = layer

    def model(self) -> nn.Module:
        first, writing = nn.Linear(6, 12), self.layer(12, 12)
        return nn.Sequential(first, writing, nn.Tanh(), nn.Linear(12, 12), nn.Linear(12, 4))


def task_of(layer: type[nn.Linear]) -> type[WritingTask]:
    return type("Own", (WritingTask,), {"__init__": lambda self: WritingTask.__init__(self, layer)})


def options(micro_batches: int, schedule: str = "1f1b") -> dict[str, Any]:
    return {"pipeline": 2, "cut": ["3"], "micro_batches": micro_batches, "schedule": schedule}


@pytest.mark.parametrize(
    ("layer", "name"), [(Clamped, "1.weight"), (Shrinking, "1.weight"), (Counting, "1.calls")]
)
@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1"])
def test_error_names_a_tensor_written_before_an_earlier_backward(
    layer: type[nn.Linear], name: str, schedule: str
) -> None:
    with pytest.raises(SpecError) as caught:
        train(hybrid_job(options(2, schedule), 2, steps=2), task_of(layer))
    [problem] = caught.value.problems
    assert f"a forward writes {name} in place while" in problem.message
    assert "micro_batches: 1" in str(problem.hint)


class ShrinkingLate(nn.Linear):
    """Shrinks its weight from the third step on (two micro-batches per step)."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += self.training
        if self.training and self.calls > 4:
            self.weight.data.mul_(0.99)
        return super().forward(x)


@pytest.mark.parametrize("fields", [{"steps": 5}, {"steps": 9, "checkpoint": {"every_steps": 4}}])
def test_later_write_fails_before_the_next_checkpoint(fields: dict[str, Any]) -> None:
    run = LocalRun(hybrid_job(options(2), 2, **fields), task_of(ShrinkingLate))
    with pytest.raises(SpecError, match=r"a forward writes 1\.weight in place while"):
        Attempt(run).make()
    assert not run.checkpoints
    steps = [r.step for r in run.reports[0] if isinstance(r, StepReport)]
    assert len(steps) in (3, 4), "not checked in every step"


@pytest.mark.parametrize(("layer", "micro_batches"), [(Clamped, 1), (ClampedData, 2)])
def test_harmless_writes_match_plain_loop(layer: type[nn.Linear], micro_batches: int) -> None:
    run = train(hybrid_job(options(micro_batches), 2), task_of(layer))
    assert distance(merge_parts(run), train_plain(task_of(layer))[0]) < 1e-5


def test_other_errors_of_backward_are_unchanged() -> None:
    class InvalidWrite(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            outputs = super().forward(x).exp()
            outputs.sigmoid().add_(1.0)
            return outputs.add_(1.0)

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        train(hybrid_job(options(2), 2, steps=1), task_of(InvalidWrite))
