"""
A buffer that each rank computes of its own samples is warned of, and nothing else is.

Code of this module calls `all_gather`, so ranks without samples take part in each step. In memory
an operation is over when it returns, so it must not begin in a backward: `overlap` is off.
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
TOLD = "each worker's forward writes other values into 'centre', by its own samples"


class Centred(nn.Module):
    """Subtracts a moving mean, as DINO does; `way` says of what, `every` in which steps."""

    centre: Tensor
    calls: Tensor

    def __init__(self, way: str, every: int = 1) -> None:
        super().__init__()
        self.way, self.every, self.out = way, every, nn.Linear(6, 3, dtype=WIDE)
        self.register_buffer("centre", torch.zeros(3, dtype=WIDE))
        self.register_buffer("calls", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.out(x)
        if self.training and self.calls % self.every == 0:
            self.centre.mul_(0.9).add_(self._seen(outputs.detach()), alpha=0.1)
        if self.training:
            self.calls += 1
        return outputs - self.centre

    def _seen(self, outputs: Tensor) -> Tensor:
        if self.way == "weights":
            return self.out.weight.detach().mean(1)
        if self.way == "forwards":
            return torch.ones(3, dtype=WIDE)
        return (distplat.all_gather(outputs) if self.way == "all samples" else outputs).mean(0)


class Centring(distplat.Task):
    way, rule, samples, every = "own samples", None, SAMPLES, 1

    def model(self) -> nn.Module:
        return Centred(self.way, self.every)

    def train_data(self) -> TensorDataset:
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(self.samples, 6, generator=generator, dtype=WIDE)
        return TensorDataset(x, x[:, :3].square())

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs - targets).square().mean()

    def buffers(self, name: str) -> str | None:
        return self.rule


def job(strategy: Any, world: int, **more: Any) -> Job:
    return job_of(strategy, world, steps=STEPS, global_batch_size=BATCH, **more)


def check_plain(run: LocalRun, task: Centring) -> None:
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
def test_a_buffer_of_a_ranks_own_samples_is_warned_of_once(
    strategy: Any, caplog: pytest.LogCaptureFixture
) -> None:
    train(job(strategy, 3), Centring)
    assert caplog.text.count(TOLD) == 1


@pytest.mark.parametrize("every", [4, 100])
def test_one_that_few_steps_write_is_warned_of_too(
    every: int, caplog: pytest.LogCaptureFixture
) -> None:
    """As a codebook that the first batch begins, or that is renewed now and then."""
    train(job(RING, 2), type("Seldom", (Centring,), {"every": every}))
    assert caplog.text.count(TOLD) == 1


@pytest.mark.parametrize(
    ("own", "others", "told"),
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
def test_what_differs_by_more_than_roundings_is_told_once(
    own: Tensor, others: Tensor | None, told: bool
) -> None:
    module = nn.Module()
    module.register_buffer("centre", own)
    (one,) = watch_tensors(module, lambda name: None, {})
    comparison = RankComparison()
    for expected in (told, False):
        one.slot.take(own)
        comparison.note([one])
        one.slot.take(others)
        assert (comparison.mismatch_warning() is not None) == expected


@pytest.mark.parametrize("rule", ["rank0", "mean", "local"])
def test_one_with_a_rule_of_the_task_is_not(rule: str, caplog: pytest.LogCaptureFixture) -> None:
    """Which is for all buffers; that of whole numbers is no mean, of a rank without samples too."""
    run = train(job(RING, 2), type("Ruled", (Centring,), {"rule": rule}))
    assert TOLD not in caplog.text
    calls = [int(one.prepared.flat.model.get_buffer("calls")) for one in run.ranks]
    assert calls == ([STEPS, STEPS - 2] if rule == "local" else [STEPS, STEPS])


@pytest.mark.parametrize("strategy", [RING, "ps-sync"])
@pytest.mark.parametrize("way", ["all samples", "weights", "forwards"])
def test_one_that_is_that_of_one_process_is_not(
    strategy: Any, way: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The epoch's last batch is of one sample: two ranks have none."""
    kind = type("Other", (Centring,), {"way": way})
    check_plain(train(job(strategy, 3), kind), kind())
    assert TOLD not in caplog.text


def test_ranks_with_other_numbers_of_micro_batches_are_not_compared(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Of three samples one rank has two micro-batches, and one has one."""
    kind = type("Counting", (Centring,), {"way": "forwards", "samples": 3})
    train(job(RING, 2, gradient_accumulation=2), kind)
    assert TOLD not in caplog.text
