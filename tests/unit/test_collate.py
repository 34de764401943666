"""Tasks with their own `collate`: padded sequences under every strategy."""

from functools import cache
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from jobs import job_of
from local_run import train
from sentences import WORDS, Sentences
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset, TensorDataset

from distplat import Task
from distplat.platform.sampler import Sampler
from distplat.strategies.loop.batches import EvalLoader, collate_of

pytestmark = pytest.mark.usefixtures("loader_server")

SAMPLES, BATCH, STEPS = 24, 6, 6


class LabeledSentences(Sentences):
    """Sentences whose label is the class of their first word."""

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        words, classes = super().__getitem__(index)
        return words, int(classes[0])


class Encoder(nn.Module):
    """The mean of the embeddings of a sentence's words."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(WORDS, 8, dtype=torch.float64)

    def forward(self, words: Tensor) -> Tensor:
        mask = (words > 0).unsqueeze(-1).double()
        mean: Tensor = (self.table(words) * mask).sum(1) / mask.sum(1)
        return mean


class Padded(Task):
    """Pads to the longest sentence of the micro-batch."""

    def model(self) -> nn.Module:
        return nn.Sequential(Encoder(), nn.Linear(8, 3, dtype=torch.float64))

    def train_data(self) -> Dataset[Any]:
        return LabeledSentences(SAMPLES)

    def eval_data(self) -> Dataset[Any]:
        return LabeledSentences(SAMPLES)

    def collate(self, samples: list[Any]) -> Any:
        words, classes = zip(*samples, strict=True)
        return pad_sequence(list(words), batch_first=True), torch.tensor(classes)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs, targets)


@cache
def train_plain() -> dict[str, Tensor]:
    """Train in a plain loop."""
    torch.manual_seed(0)
    task, data = Padded(), LabeledSentences(SAMPLES)
    model = task.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    sampler = Sampler(SAMPLES, BATCH, 1, 0, True, False)
    for step in range(STEPS):
        inputs, classes = task.collate([data[int(i)] for i in sampler.batch_ids(step)])
        optimizer.zero_grad()
        torch.autograd.backward(task.loss(model(inputs), classes))
        optimizer.step()
    return {name: value.detach() for name, value in model.state_dict().items()}


WORLDS: list[tuple[dict[str, Any], int, dict[str, Any]]] = [
    ({"name": "ring"}, 1, {}),
    ({"name": "ring"}, 2, {}),
    ({"name": "ring"}, 2, {"gradient_accumulation": 2}),
    ({"name": "ring"}, 2, {"data": {"num_workers": 1}}),
    ({"name": "ps-sync"}, 3, {}),
    ({"name": "hybrid", "pipeline": 2, "micro_batches": 3, "cut": "even"}, 2, {}),
    ({"name": "hybrid", "pipeline": 2, "data": 2, "micro_batches": 2, "cut": "even"}, 4, {}),
]


@pytest.mark.parametrize(("strategy", "workers", "fields"), WORLDS)
def test_padded_batches_match_a_plain_loop(
    strategy: dict[str, Any], workers: int, fields: dict[str, Any]
) -> None:
    job = job_of(
        strategy,
        workers,
        optimizer={"name": "SGD", "lr": 0.1, "momentum": 0.9},
        steps=STEPS,
        global_batch_size=BATCH,
        **fields,
    )
    params: dict[str, Tensor] = {}
    for part in train(job, Padded).trained:
        params |= part
    expected = train_plain()
    assert params.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(params[name], value, rtol=1e-9, atol=1e-12)


def test_asynchronous_strategy_trains_padded_batches() -> None:
    job = job_of("ps-async", 2, steps=STEPS, global_batch_size=BATCH)
    run = train(job, Padded, remote_servers=True)
    assert len(run.trained) == 2


class RandomBatch(NamedTuple):
    """The size of a batch, and the random numbers drawn by `collate`."""

    size: int
    numbers: tuple[float, float]


class RandomCollate(Padded):
    """Draws random numbers in `collate`, as masked language models do."""

    def collate(self, samples: list[Any]) -> Any:
        return RandomBatch(len(samples), (float(torch.rand(())), float(np.random.rand())))


def random_batches(samples: Dataset[Any], loaders: int) -> list[RandomBatch]:
    job = job_of("ring", 1, data={"num_workers": loaders})
    loader = EvalLoader(job, RandomCollate())
    return [batch for batch, _ in loader.batches(samples, range(SAMPLES), 5)]


@pytest.mark.parametrize(
    "samples", [LabeledSentences(SAMPLES), TensorDataset(torch.zeros(SAMPLES))]
)
def test_random_collate_is_reproducible_and_restores_generators(samples: Dataset[Any]) -> None:
    """Also with a data set that draws nothing, and so needs no seeding for its samples."""
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first = random_batches(samples, 0)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(4)
    assert random_batches(samples, 0) == first == random_batches(samples, 2)
    assert len({batch.numbers for batch in first}) == len(first) == 5
    assert [batch.size for batch in first] == [5, 5, 5, 5, 4]


class WithoutTargets(Padded):
    """Returns inputs without targets."""

    def collate(self, samples: list[Any]) -> Any:
        return super().collate(samples)[0]


def test_rejects_batches_that_are_not_pairs() -> None:
    with pytest.raises(ValueError, match=r"a batch must be a pair .* or what collate\(\) gives"):
        train(job_of("ring", 1, global_batch_size=BATCH), WithoutTargets)


def test_default_collate_stacks_samples() -> None:
    class Plain(Padded):
        collate = Task.collate

    assert collate_of(Plain()) is None
    pairs = [(torch.ones(2), 1), (torch.zeros(2), 0)]
    inputs, targets = Plain().collate(pairs)
    assert inputs.shape == (2, 2) and targets.tolist() == [1, 0]
