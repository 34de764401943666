"""WebDataset streams as documented in docs/streams.md."""

import random
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from function_ranks import call_on_ranks
from jobs import job_of
from local_run import train
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

import distplat
from distplat.platform.errors import SpecError
from distplat.strategies.fakes import Fabric
from distplat.strategies.function.sharded_loader import DataShard
from distplat.strategies.function.stream_loader import StreamLoader
from distplat.strategies.task import Task

wds: Any = pytest.importorskip("webdataset")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

SHARDS, SAMPLES_PER_SHARD = 5, 6
SAMPLES = SHARDS * SAMPLES_PER_SHARD


@pytest.fixture(scope="module")
def urls(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder: Path = tmp_path_factory.mktemp("shards")
    names = [str(folder / f"{shard}.tar") for shard in range(SHARDS)]
    for shard, name in enumerate(names):
        with wds.TarWriter(name) as writer:
            for number in range(SAMPLES_PER_SHARD * shard, SAMPLES_PER_SHARD * (shard + 1)):
                writer.write({"__key__": f"{number:03}", "cls": str(number)})
    return names


@pytest.fixture(autouse=True)
def torchrun_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """WebDataset reads these variables, which a train function has."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")


class ShuffledStream(IterableDataset[Any]):
    """The example of docs/streams.md."""

    def __init__(self, urls: list[str]) -> None:
        self.urls = urls

    def __iter__(self) -> Iterator[Any]:
        first, second = random.randrange(2**32), random.randrange(2**32)
        data = wds.WebDataset(self.urls, nodesplitter=None, shardshuffle=100, seed=first)
        return iter(data.shuffle(8, seed=second))


def make_dataset(urls: list[str]) -> Any:
    return wds.WebDataset(urls, nodesplitter=None, shardshuffle=False)


def sample_numbers(rows: list[dict[str, Any]]) -> Tensor:
    return torch.tensor([int(row["cls"]) for row in rows])


@pytest.mark.parametrize(("make", "is_shuffled"), [(make_dataset, False), (ShuffledStream, True)])
def test_ranks_of_a_train_function_read_each_sample_once(
    make: Callable[[list[str]], Any], is_shuffled: bool, urls: list[str]
) -> None:
    """The ranks read one after the other, because they share the process's generators."""
    passes: list[list[list[int]]] = []
    for rank in range(2):
        data_loader = DataLoader(make(urls), 3, collate_fn=sample_numbers)
        group, ignore = Fabric(1).collective(0), lambda *_: None
        loader = StreamLoader(
            data_loader, DataShard(rank, 2, 5), torch.device("cpu"), ignore, group
        )
        passes.append([torch.cat([*loader]).tolist() for _ in range(2)])
    for number in range(2):
        assert sorted(n for rank in passes for n in rank[number]) == [*range(SAMPLES)]
    assert (passes[0][0] != passes[0][1]) == is_shuffled


class RecordingTask(Task):
    """Records its training samples."""

    def __init__(self, make: Callable[[], Any], samples: list[int]) -> None:
        self.make, self.samples = make, samples

    def model(self) -> nn.Module:
        return nn.Linear(1, 1)

    def train_data(self) -> Any:
        return self.make()

    def collate(self, rows: Any) -> Any:
        return sample_numbers(rows)

    def step(self, model: nn.Module, batch: Any) -> Tensor:
        self.samples += batch.tolist()
        loss: Tensor = model(batch[:, None] / SAMPLES).square().mean()
        return loss


@pytest.mark.parametrize(("make", "workers"), [(make_dataset, 2), (ShuffledStream, 1)])
def test_task_trains_on_each_sample_in_each_pass(
    make: Callable[[list[str]], Any], workers: int, urls: list[str]
) -> None:
    samples: list[int] = []
    job = job_of("ring", workers, epochs=2, global_batch_size=6)
    train(job, partial(RecordingTask, partial(make, urls), samples))  # type: ignore[arg-type]
    assert sorted(samples) == sorted([*range(SAMPLES)] * 2)
    assert samples[:SAMPLES] != samples[SAMPLES:] or make is make_dataset


OWN_GENERATOR: dict[str, Callable[[list[str]], Any]] = {
    "shuffle": lambda urls: make_dataset(urls).shuffle(8),
    "detshuffle": lambda urls: wds.WebDataset(
        urls, nodesplitter=None, shardshuffle=100, detshuffle=True, seed=3
    ),
}


@pytest.mark.parametrize("name", OWN_GENERATOR)
def test_shuffle_with_its_own_generator_is_rejected(name: str, urls: list[str]) -> None:
    def function(config: Mapping[str, Any]) -> None:
        data = OWN_GENERATOR[name](urls)
        list(distplat.prepare(DataLoader(data, 3, collate_fn=sample_numbers)))

    with pytest.raises(
        ValueError, match=r"(?s)gave another sample \d+ when.*a seed that __iter__ draws"
    ):
        call_on_ranks(function)


def test_nodesplitter_by_rank_is_rejected(urls: list[str]) -> None:
    """WebDataset's error message suggests `split_by_node`, which splits in this way."""

    def function(config: Mapping[str, Any]) -> None:
        rank = distplat.get_context().rank
        split_by_rank = lambda shards: islice(shards, rank, None, 2)  # noqa: E731
        data = wds.WebDataset(urls, nodesplitter=split_by_rank, shardshuffle=False)
        distplat.prepare(DataLoader(data, 3, collate_fn=sample_numbers))

    with pytest.raises(SpecError, match=r"(?s)worker-1 other samples.*nodesplitter=None"):
        call_on_ranks(function, 2)
