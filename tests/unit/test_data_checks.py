"""Errors in the data sets of tasks, and their messages."""

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import local_run
import pytest
import torch
import torch.nn.functional as F
from good_task import Good, fit, samples, training_error
from jobs import job_of
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from distplat import Task
from distplat.strategies.loop.task_warnings import size_warning


class NoLength(Dataset[Any]):
    def __getitem__(self, index: int) -> Any:
        return torch.zeros(3), 0


class Table(NoLength):
    """Like a pandas DataFrame: a length, and indexing by column name."""

    iloc = NoLength()

    def __len__(self) -> int:
        return 8


@pytest.mark.parametrize("method", ["train_data", "eval_data"])
@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: DataLoader(samples()), "got a DataLoader: return its data set"),
        (lambda: (samples()[i] for i in range(8)), "got a generator"),
        (lambda: iter([1]), "got a list_iterator"),
        (lambda: TensorDataset, "got the class TensorDataset: call it"),
        (lambda: samples().tensors, "got a tuple of tensors: TensorDataset(...)"),
        (lambda: {"x": samples(), "y": samples()}, "got a dict of 'x', 'y', without data[0]: "),
        (lambda: [samples(), samples()], "got a list of data sets: ConcatDataset(...) combines"),
        (lambda: Table(), "got a Table of pandas, whose data[i] is a column"),
        (NoLength, "a NoLength has no length"),
        (lambda: 3, "an int has no __getitem__"),
    ],
)
def test_rejects_data_that_is_not_map_style(
    build: Callable[[], Any], message: str, method: str, tmp_path: Path
) -> None:
    bad = type("Bad", (Good,), {method: lambda self: build()})
    summary = training_error(bad, tmp_path).summary
    assert f"{method}() must return a map-style data set" in summary or "__getitem__" in summary
    assert message in summary


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("train_data", "the training data has 0 samples: no batch of 4 fits"),
        ("eval_data", "eval_data() has no samples: return None for no evaluation"),
    ],
)
def test_rejects_data_without_samples(method: str, message: str, tmp_path: Path) -> None:
    bad = type("Bad", (Good,), {method: lambda self: samples(0)})
    assert message in training_error(bad, tmp_path).summary


def test_rejects_missing_training_data(tmp_path: Path) -> None:
    bad = type("Bad", (Good,), {"train_data": lambda self: None})
    assert "got None: is there a `return`?" in training_error(bad, tmp_path).summary


def test_samples_of_different_shapes_suggest_collate(tmp_path: Path) -> None:
    class Ragged(Good):
        def train_data(self) -> Any:
            return [(torch.zeros(1 + number % 3), 0) for number in range(8)]

    error = training_error(Ragged, tmp_path)
    assert "stack expects each tensor to be equal size" in error.summary
    assert "in the task's `collate(samples)`" in error.remedy
    assert 'File "' not in error.traceback, "no frame of user code"


def test_getitems_may_pad_the_samples_of_a_batch(tmp_path: Path) -> None:
    """The remedy of the error suggests it."""

    class Padding(Dataset[Any]):
        def __len__(self) -> int:
            return 8

        def __getitems__(self, ids: list[int]) -> list[Any]:
            longest = max(1 + number % 3 for number in ids)
            return [(F.pad(torch.ones(1 + i % 3), (0, longest - 1 - i % 3)), 0) for i in ids]

        def __getitem__(self, index: int) -> Any:
            return self.__getitems__([index])[0]

    class Sums(nn.Linear):
        def forward(self, inputs: Tensor) -> Tensor:
            return super().forward(inputs.sum(1, keepdim=True))

    class Ragged(Good):
        def model(self) -> nn.Module:
            return Sums(1, 2)

        def train_data(self) -> Dataset[Any]:
            return Padding()

    assert fit(Ragged, tmp_path).checkpoint is not None


@pytest.mark.parametrize(
    ("count", "warning"),
    [(3, "has 3 samples, fewer than global_batch_size 4: every step has all"), (4, "")],
)
def test_warns_of_data_smaller_than_a_batch(
    count: int, warning: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    small = type("Small", (Good,), {"train_data": lambda self: samples(count)})
    assert fit(small, tmp_path).checkpoint is not None
    assert warning in caplog.text
    assert ("training data" in caplog.text) == bool(warning)


def test_trains_with_fewer_samples_than_workers_and_warns() -> None:
    small = type("Small", (Good,), {"train_data": lambda self: samples(1)})
    job = job_of("ring", 3, epochs=1)
    run = local_run.train(job, small)
    assert "1 samples for 3 parts of a batch: 2 of them" in size_warning(
        job, run.ranks[0].prepared.sampler
    )
    for name, value in run.trained[0].items():
        torch.testing.assert_close(run.trained[2][name], value)


class ExitsOrRaises(Dataset[Any]):
    """A data set that exits or raises; at module level, as loader processes unpickle it."""

    def __init__(self, raises: bool = False) -> None:
        self._raises = raises

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Any:
        if self._raises:
            raise KeyError(f"no sample {index}")
        sys.exit(0)


@pytest.mark.parametrize("where", ["__init__", "model", "train_data", "loss", "data"])
def test_sys_exit_in_a_task_is_an_error(where: str, tmp_path: Path) -> None:
    def exit_with_0(self: Task, *args: Any) -> Any:
        sys.exit(0)

    members: Mapping[str, Any] = (
        {"train_data": lambda self: ExitsOrRaises()} if where == "data" else {where: exit_with_0}
    )
    error = training_error(type("Bad", (Good,), dict(members)), tmp_path)
    assert error.summary == "SystemExit: 0"
    assert error.remedy.startswith("sys.exit() was called")


@pytest.mark.usefixtures("loader_server")
def test_sys_exit_in_a_loader_is_an_error(tmp_path: Path) -> None:
    bad = type("Bad", (Good,), {"train_data": lambda self: ExitsOrRaises()})
    error = training_error(bad, tmp_path, data={"num_workers": 1})
    assert "a loader process ended: sys.exit() in the data set" in error.remedy


@pytest.mark.usefixtures("loader_server")
def test_error_in_a_loader_has_the_original_traceback(tmp_path: Path) -> None:
    bad = type("Bad", (Good,), {"train_data": lambda self: ExitsOrRaises(raises=True)})
    error = training_error(bad, tmp_path, data={"num_workers": 1})
    assert error.summary.startswith("KeyError: 'no sample ")
    frames = [line for line in error.traceback.splitlines() if line.startswith('  File "')]
    assert len(frames) == 1
    assert "test_data_checks.py" in frames[0]
