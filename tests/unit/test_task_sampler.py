"""`Task.sampler`: the order of samples for any number of workers and after a resume."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from jobs import job_of
from local_run import LocalRun, train
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from distplat.platform.errors import SpecError
from distplat.platform.spec import Job
from distplat.strategies.loop.batches import make_sampler
from distplat.strategies.loop.seeding import rng_states
from distplat.strategies.loop.task_settings import TaskOrder
from distplat.strategies.task import Task
from distplat.strategies.task_methods import uncalled_hooks
from distplat.strategies.verification.references import references
from distplat.strategies.verification.switched import switched

DTYPE = torch.float64
SAMPLES, EPOCH, BATCH, EPOCHS, ACCUMULATION = 11, 19, 6, 3, 2
STEPS = 12
"""Batches of 6, 6, 6 and 1 samples in each of three epochs."""
DATA = TensorDataset(
    torch.randn(SAMPLES, 4, dtype=DTYPE, generator=torch.Generator().manual_seed(1)),
    torch.randn(SAMPLES, 3, dtype=DTYPE, generator=torch.Generator().manual_seed(2)),
)


class Weighted(Task):
    """An epoch has more samples than the data set, some of them repeatedly."""

    def model(self) -> nn.Module:
        layers = nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)
        return nn.Sequential(*layers).to(DTYPE)

    def train_data(self) -> TensorDataset:
        return DATA

    def sampler(self, data: Any, epoch: int) -> WeightedRandomSampler:
        # The ranks are threads and share the global generators, so the sampler has its own.
        weights = [1.0 + n % 3 for n in range(len(data))]
        generator = torch.Generator().manual_seed(epoch)
        return WeightedRandomSampler(weights, EPOCH, generator=generator)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.mse_loss(outputs, targets)


def job(strategy: Any, workers: int, **fields: Any) -> Job:
    length = {} if "steps" in fields else {"epochs": EPOCHS}
    fields = {**length, "gradient_accumulation": ACCUMULATION, **fields}
    optimizer = {"name": "SGD", "lr": 0.1, "momentum": 0.9}
    return job_of(strategy, workers, optimizer=optimizer, global_batch_size=BATCH, **fields)


def train_plain() -> dict[str, Tensor]:
    torch.manual_seed(0)
    task = Weighted()
    model = task.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for epoch in range(EPOCHS):
        order = list(task.sampler(DATA, epoch))
        for start in range(0, EPOCH, BATCH):
            inputs, targets = DATA[order[start : start + BATCH]]
            optimizer.zero_grad()
            torch.autograd.backward(task.loss(model(inputs), targets))
            optimizer.step()
    return {name: value.detach() for name, value in model.state_dict().items()}


PIPELINE = {"name": "hybrid", "pipeline": 2, "cut": "even"}
WORLDS = [(s, n) for s in ("ring", "ps-sync") for n in (1, 2, 3)] + [(PIPELINE, 2)]


@pytest.mark.parametrize(("strategy", "workers"), WORLDS)
def test_run_matches_plain_loop_for_any_number_of_workers(strategy: Any, workers: int) -> None:
    run = train(job(strategy, workers), Weighted)
    assert run.ranks[0].prepared.total_steps == STEPS
    actual = {name: value for part in run.trained for name, value in part.items()}
    for name, value in train_plain().items():
        assert torch.allclose(actual[name], value, rtol=0, atol=1e-10), name


def test_ps_async_with_one_worker_matches_plain_loop() -> None:
    actual = train(job("ps-async", 1, gradient_accumulation=1), Weighted).parameters()
    for name, value in train_plain().items():
        assert torch.allclose(actual[name], value, rtol=0, atol=1e-10), name


def test_run_resumes_in_the_middle_of_an_epoch() -> None:
    reference = train(job("ring", 2, checkpoint={"every_steps": 6}), Weighted)
    resumed = train(job("ring", 2), Weighted, saved=reference.checkpoints[6])
    for name, value in reference.trained[0].items():
        assert torch.equal(resumed.trained[0][name], value), name


SamplerFunction = Callable[[Any, int], Any]


def task_of(make_order: SamplerFunction) -> Task:
    class OrderedTask(Weighted):
        def sampler(self, data: Any, epoch: int) -> Any:
            return make_order(data, epoch)

    return OrderedTask()


def shuffled(data: Any, epoch: int) -> Tensor:
    return torch.randperm(len(data))


FORMS: list[tuple[SamplerFunction, list[int] | None]] = [
    (lambda data, epoch: [3, 1, 3], [3, 1, 3]),
    (lambda data, epoch: range(2), [0, 1]),
    (lambda data, epoch: torch.tensor([4, 2]), [4, 2]),
    (lambda data, epoch: np.array([4, 2], np.uint8), [4, 2]),
    (lambda data, epoch: (n for n in (5, 0)), [5, 0]),
    (lambda data, epoch: [torch.tensor(1), np.int32(2)], [1, 2]),
    (lambda data, epoch: SequentialSampler(data), [*range(SAMPLES)]),
    (lambda data, epoch: RandomSampler(data), None),
    (lambda data, epoch: SubsetRandomSampler(range(4)), None),
    (lambda data, epoch: WeightedRandomSampler([1.0, 2.0], 9), None),
    (shuffled, None),
    (lambda data, epoch: np.random.permutation(5), None),
]


@pytest.mark.parametrize(("make_order", "expected"), FORMS)
def test_sampler_may_return_any_form_of_indices(
    make_order: SamplerFunction, expected: list[int] | None
) -> None:
    """Random orders depend on seed and epoch only, and do not consume the training's generators."""
    before = rng_states()
    order, repeated, other = (TaskOrder(task_of(make_order), DATA, seed) for seed in (3, 3, 4))
    assert rng_states() == before
    for epoch in (1, 0, 2, 0):
        assert order(epoch).tolist() == repeated(epoch).tolist()
        assert expected is None or order(epoch).tolist() == expected
    if expected is None:
        assert str([order(n).tolist() for n in range(6)]) != str(
            [other(n).tolist() for n in range(6)]
        )
        assert len({str(order(n).tolist()) for n in range(6)}) > 1


SHARED_GENERATOR = torch.Generator().manual_seed(1)
INVALID: list[tuple[SamplerFunction, str]] = [
    (lambda data, epoch: None, r"must return indices of samples, got a NoneType: is there a `ret"),
    (lambda data, epoch: 3, "must return indices of samples, got a int"),
    (lambda data, epoch: [], "gave no samples for epoch 0"),
    (lambda data, epoch: [0, SAMPLES], "gave the sample 11 for epoch 0, and the data has 11: 0 to"),
    (lambda data, epoch: [0, -1], "gave the sample -1 for epoch 0"),
    (lambda data, epoch: [0.5], "must return whole numbers, got 0.5"),
    (lambda data, epoch: ["a"], "must return whole numbers, got 'a'"),
    (
        lambda data, epoch: BatchSampler(SequentialSampler(data), 3, drop_last=False),
        "must return single samples, not batches",
    ),
    (lambda data, epoch: [[0, 1], [2, 3]], "must return single samples, not batches"),
    (
        lambda data, epoch: torch.randperm(9, generator=SHARED_GENERATOR),
        "gave two orders when it was called twice for epoch 0.*seeded with `epoch`",
    ),
    (lambda data, epoch: range(4 - epoch), "gave 3 samples for epoch 1, 4 for epoch 0"),
]


@pytest.mark.parametrize(("make_order", "text"), INVALID)
def test_invalid_orders_are_rejected(make_order: SamplerFunction, text: str) -> None:
    with pytest.raises(ValueError, match=rf"test_task_sampler.py:\d+: sampler\(\) {text}"):
        TaskOrder(task_of(make_order), DATA, 0)(1)


def test_batch_larger_than_an_epoch_is_rejected() -> None:
    order = TaskOrder(task_of(lambda data, epoch: [0, 1]), DATA, 0)
    with pytest.raises(ValueError, match="has 2 samples: no batch of 6 fits"):
        make_sampler(job("ring", 1, data={"drop_last": True}), DATA, 1, order)


def test_orders_that_differ_between_ranks_are_rejected() -> None:
    class RankDependent(Weighted):
        instances = 0

        def __init__(self) -> None:
            RankDependent.instances += 1
            self.rank = RankDependent.instances

        def sampler(self, data: Any, epoch: int) -> Any:
            return [self.rank, 2, 0]

    run = LocalRun(job("ring", 2), RankDependent)
    facts = [rank.prepared.facts for rank in run.ranks]
    assert all(facts) and facts[0] != facts[1]
    run.close()
    with pytest.raises(SpecError, match=r"sampler\(\) gives worker-\d another order of samples"):
        train(job("ring", 2), RankDependent)


def test_sampler_method_of_another_library_is_reported() -> None:
    class HuggingFaceName(Weighted):
        def get_train_sampler(self) -> None: ...

    (line,) = uncalled_hooks(HuggingFaceName)
    assert "get_train_sampler() is never called: write sampler(data, epoch)" in line


def test_verification_uses_the_sampler() -> None:
    spec = job("ring", 2, steps=STEPS)
    actual = references(spec, lambda switches: switched(Weighted, switches)())
    assert actual.whole is not None
    assert not actual.whole.differs
    for name, value in train_plain().items():
        assert torch.allclose(actual.plain.states[STEPS][name], value, rtol=0, atol=1e-10), name
