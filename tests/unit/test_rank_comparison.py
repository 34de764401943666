"""
A buffer that each rank computes from its own samples gives a warning; other buffers do not.

Tasks of this module call `all_gather`, so ranks without samples take part in each step. In memory
an operation ends before it returns, so it must not start in backward: `overlap` is off.
"""

from typing import Any

import pytest
import torch
from jobs import job_of
from local_run import LocalRun, train
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import distplat
from distplat.platform.sampler import Sampler
from distplat.platform.spec import Job
from distplat.strategies.model.written_tensors import RankComparison, watch_tensors

SAMPLES, BATCH, STEPS = 17, 8, 6
WIDE = torch.float64
RING = {"name": "ring", "overlap": False}
WARNING = "each worker's forward writes other values into 'centre', by its own samples"


class Centred(nn.Module):
    """Subtracts a moving mean of `source`, as DINO does; updates it every `every` steps."""

    centre: Tensor
    calls: Tensor

    def __init__(self, source: str, every: int = 1) -> None:
        super().__init__()
        self.source, self.every, self.out = source, every, nn.Linear(6, 3, dtype=WIDE)
        self.register_buffer("centre", torch.zeros(3, dtype=WIDE))
        self.register_buffer("calls", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.out(x)
        if self.training and self.calls % self.every == 0:
            self.centre.mul_(0.9).add_(self._mean(outputs.detach()), alpha=0.1)
        if self.training:
            self.calls += 1
        return outputs - self.centre

    def _mean(self, outputs: Tensor) -> Tensor:
        if self.source == "weights":
            return self.out.weight.detach().mean(1)
        if self.source == "forwards":
            return torch.ones(3, dtype=WIDE)
        return (distplat.all_gather(outputs) if self.source == "all samples" else outputs).mean(0)


class Centring(distplat.Task):
    source, rule, samples, every = "own samples", None, SAMPLES, 1

    def model(self) -> nn.Module:
        return Centred(self.source, self.every)

    def train_data(self) -> TensorDataset:
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(self.samples, 6, generator=generator, dtype=WIDE)
        return TensorDataset(x, x[:, :3].square())

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs - targets).square().mean()

    def buffers(self, name: str) -> str | None:
        return self.rule


def job(strategy: Any, world: int, **overrides: Any) -> Job:
    return job_of(strategy, world, steps=STEPS, global_batch_size=BATCH, **overrides)


def assert_matches_plain_loop(run: LocalRun, task: Centring) -> None:
    """Compare all ranks with a plain loop over whole batches."""
    torch.manual_seed(0)
    model, data = task.model(), task.train_data()
    sampler = Sampler(len(data), BATCH, 1, 0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(STEPS):
        inputs, targets = data[sampler.batch_ids(step).tolist()]
        optimizer.zero_grad()
        torch.autograd.backward(task.loss(model(inputs), targets))
        optimizer.step()
    for rank in range(len(run.ranks)):
        for name, value in run.parameters(rank).items():
            torch.testing.assert_close(value, model.state_dict()[name], rtol=0, atol=1e-10)


@pytest.mark.parametrize("strategy", [RING, "ps-sync"])
def test_buffer_of_a_ranks_own_samples_gives_one_warning(
    strategy: Any, caplog: pytest.LogCaptureFixture
) -> None:
    train(job(strategy, 3), Centring)
    assert caplog.text.count(WARNING) == 1


@pytest.mark.parametrize("every", [4, 100])
def test_buffer_written_in_few_steps_gives_a_warning(
    every: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Example: a codebook initialized from the first batch, or renewed at times."""
    train(job(RING, 2), type("Seldom", (Centring,), {"every": every}))
    assert caplog.text.count(WARNING) == 1


@pytest.mark.parametrize(
    ("own", "other", "differs"),
    [
        (torch.ones(3), torch.ones(3) + 1e-6, False),
        (torch.ones(3), torch.ones(3) + 1e-3, True),
        (torch.ones(3), torch.ones(4), True),
        (torch.ones(3), None, True),
        (torch.arange(3), torch.arange(3), False),
        (torch.arange(3), torch.zeros(3, dtype=torch.int64), True),
        (torch.ones(3).to(torch.float8_e4m3fn), torch.ones(3).to(torch.float8_e4m3fn), False),
        (torch.ones(3).to(torch.float8_e4m3fn), torch.zeros(3).to(torch.float8_e4m3fn), True),
        (torch.zeros(0), torch.zeros(0), False),
        (torch.ones(3, dtype=torch.complex64), torch.ones(3, dtype=torch.complex64) * 1j, True),
    ],
    ids=str,
)
def test_difference_beyond_rounding_gives_one_warning(
    own: Tensor, other: Tensor | None, differs: bool
) -> None:
    module = nn.Module()
    module.register_buffer("centre", own)
    (watched,) = watch_tensors(module, lambda name: None, {})
    comparison = RankComparison()
    for expected in (differs, False):
        watched.slot.take(own)
        comparison.note([watched])
        watched.slot.take(other)
        assert (comparison.mismatch_warning() is not None) == expected


@pytest.mark.parametrize("rule", ["rank0", "mean", "local"])
def test_buffer_with_a_rule_gives_no_warning(rule: str, caplog: pytest.LogCaptureFixture) -> None:
    """The rule is for all buffers; `mean` takes integer buffers from rank 0."""
    run = train(job(RING, 2), type("Ruled", (Centring,), {"rule": rule}))
    assert WARNING not in caplog.text
    calls = [int(rank.prepared.flat.model.get_buffer("calls")) for rank in run.ranks]
    assert calls == ([STEPS, STEPS - 2] if rule == "local" else [STEPS, STEPS])


@pytest.mark.parametrize("strategy", [RING, "ps-sync"])
@pytest.mark.parametrize("source", ["all samples", "weights", "forwards"])
def test_buffer_equal_to_that_of_one_process_gives_no_warning(
    strategy: Any, source: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The last batch of an epoch has one sample, so two ranks have none."""
    task_class = type("Other", (Centring,), {"source": source})
    assert_matches_plain_loop(train(job(strategy, 3), task_class), task_class())
    assert WARNING not in caplog.text


def test_ranks_with_unequal_micro_batches_are_not_compared(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Three samples give one rank two micro-batches, the other rank one."""
    task_class = type("Counting", (Centring,), {"source": "forwards", "samples": 3})
    train(job(RING, 2, gradient_accumulation=2), task_class)
    assert WARNING not in caplog.text
