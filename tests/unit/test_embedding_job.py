"""The job's field `embeddings`, and the arguments of the embedding modules: error messages."""

from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import fields_of, job_of
from torch import nn

import distplat
from distplat import Task, Trainer
from distplat.actors.verifying import replay_run
from distplat.nn import ShardedEmbedding, ShardedEmbeddingBag, connect
from distplat.platform.errors import SpecError, StorageError, UserCodeError
from distplat.platform.job_file import render_job

SGD = {"name": "SGD", "lr": 0.1}


def problems(**fields: Any) -> str:
    tables = {"optimizer": SGD}
    defaults = {"workers": 2, "optimizer": SGD, "embeddings": tables, "steps": 1}
    try:
        job_of(**{**defaults, **fields})
    except SpecError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, ""),
        ({"strategy": "ps-sync"}, ""),
        ({"embeddings": {}}, "embeddings.optimizer: required"),
        ({"embeddings": {"optimizer": SGD, "server": 2}}, "did you mean 'servers'?"),
        ({"embeddings": {"optimizer": SGD, "servers": 0}}, "embeddings.servers: must be"),
        ({"embeddings": {"optimizer": SGD, "partition": "hsah"}}, "did you mean 'hash'?"),
        ({"embeddings": {"optimizer": {"name": "Adagrda", "lr": 1}}}, "did you mean 'Adagrad'?"),
        ({"embeddings": {"optimizer": {**SGD, "momentum": 0.9}}}, "embeddings.optimizer.momentum"),
        ({"embeddings": {"optimizer": {"name": "SGD"}}}, "embeddings.optimizer.lr: required"),
        ({"clip_norm": 1.0}, "clip_norm: cannot be combined with `embeddings`"),
        ({"strategy": "ps-async"}, "embeddings.asynchronous: must be true under ps-async"),
        ({"strategy": "ps-async", "embeddings": {"optimizer": SGD, "asynchronous": True}}, ""),
        ({"strategy": {"name": "ps-sync", "backup_workers": 1}}, "with `backup_workers`"),
    ],
    ids=str,
)
def test_job_problems(fields: dict[str, Any], message: str) -> None:
    text = problems(**fields)
    assert message in text
    assert bool(message) == bool(text)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 4), "num_embeddings must be at least 1, or None, got 0"),
        ((10, 0), "embedding_dim must be at least 1"),
        ((10, 4, 10), "padding_idx must be from -10 to 9, got 10"),
        ((None, 4, -1), "padding_idx must be from 0"),
    ],
)
def test_invalid_arguments(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ShardedEmbedding(*arguments)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [({"init_std": -1.0}, "init_std"), ({"whole": True}, "whole=True needs num_embeddings")],
)
def test_invalid_keyword_arguments(kwargs: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ShardedEmbedding(None, 4, **kwargs)
    with pytest.raises(ValueError, match="mode must be 'sum', 'mean' or 'max', got 'avg'"):
        ShardedEmbeddingBag(10, 4, "avg")


def test_invalid_ids() -> None:
    model = nn.ModuleDict({"a": ShardedEmbedding(10, 4, -1), "b": ShardedEmbedding(None, 4)})
    with pytest.raises(RuntimeError, match=r"add|call distplat.nn.connect"):
        model["a"](torch.tensor([1]))
    connect(model)
    with pytest.raises(IndexError, match="id 10 is out of range: allowed are 0 to 9"):
        model["a"](torch.tensor([1, 10]))
    with pytest.raises(IndexError, match="id -1 is out of range: allowed are 0 and more"):
        model["b"](torch.tensor([-1]))
    with pytest.raises(TypeError, match=r"ids must be int64 or int32, got torch\.float32"):
        model["a"](torch.tensor([1.0]))
    assert model["a"](torch.tensor([[9, 8]])).shape == (1, 2, 4)
    assert (model["a"](torch.tensor([9])) == 0).all()  # padding_idx -1: the last row
    assert model["a"](torch.empty(0, 3, dtype=torch.int64)).shape == (0, 3, 4)


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("padding", [None, 3])
def test_bag_matches_torch(mode: str, padding: int | None) -> None:
    bags = nn.ModuleDict({"t": ShardedEmbeddingBag(20, 4, mode, padding_idx=padding)})
    rows = nn.ModuleDict({"t": ShardedEmbedding(20, 4, padding)})
    connect(bags, seed=3)
    connect(rows, seed=3)
    weight = rows["t"](torch.arange(20))
    reference = nn.EmbeddingBag(20, 4, mode=mode, padding_idx=padding, _weight=weight)
    ids = torch.randint(0, 20, (5, 6), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(bags["t"](ids), reference(ids))
    offsets = torch.tensor([0, 4, 4, 9])
    torch.testing.assert_close(bags["t"](ids.view(-1), offsets), reference(ids.view(-1), offsets))
    if mode == "sum":
        weights = torch.rand(5, 6)
        torch.testing.assert_close(
            bags["t"](ids, per_sample_weights=weights), reference(ids, per_sample_weights=weights)
        )


def test_connect_to_a_directory_without_a_run(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="no embedding tables in"):
        connect(nn.ModuleDict({"a": ShardedEmbedding(10, 4)}), tmp_path)


class SmallTask(Task):
    """A model with a sharded embedding."""

    def model(self) -> nn.Module:
        return nn.Sequential(ShardedEmbedding(10, 4), nn.Linear(4, 2))

    def train_data(self) -> Any:
        return torch.utils.data.TensorDataset(torch.arange(8), torch.zeros(8, dtype=torch.int64))

    def loss(self, outputs: Any, targets: Any) -> Any:
        return nn.functional.cross_entropy(outputs, targets)


def test_model_with_tables_needs_the_field_embeddings(tmp_path: Path) -> None:
    job = fields_of("ring", 0, optimizer=SGD, steps=1, storage_path=str(tmp_path))
    with pytest.raises(UserCodeError, match=r"rows on servers \(0\).*add the field `embeddings`"):
        Trainer(job, SmallTask).fit()


def test_modules_are_exported_in_distplat_nn() -> None:
    assert distplat.nn.ShardedEmbedding is ShardedEmbedding


def test_run_with_tables_cannot_be_replayed(tmp_path: Path) -> None:
    embeddings = {"optimizer": SGD, "asynchronous": True}
    job = job_of("ps-async", task="words:Words", optimizer=SGD, embeddings=embeddings, steps=1)
    (tmp_path / "job.yaml").write_text(render_job(job))
    with pytest.raises(SpecError, match="embeddings: the log does not say"):
        replay_run(tmp_path, tmp_path)
