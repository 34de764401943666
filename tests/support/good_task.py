"""A correct task, and a check of the errors of its subclasses."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from jobs import fields_of
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from distplat import Result, Task, Trainer
from distplat.platform.errors import UserCodeError

_ROOT = Path(__file__).parents[2]
FIELDS = fields_of("ring", 0, epochs=1)


def samples(count: int = 8) -> TensorDataset:
    torch.manual_seed(3)
    return TensorDataset(torch.randn(count, 3), torch.randint(0, 2, (count,)))


class Good(Task):
    def model(self) -> nn.Module:
        return nn.Linear(3, 2)

    def train_data(self) -> Dataset[Any]:
        return samples()

    def loss(self, outputs: Any, targets: Any) -> Tensor:
        return F.cross_entropy(outputs, targets)


def fit(task: type[Task], tmp_path: Path, **fields: Any) -> Result:
    return Trainer({**FIELDS, **fields}, task, working_dir=tmp_path).fit()


def training_error(task: type[Task], tmp_path: Path, **fields: Any) -> UserCodeError:
    """Train, and return the error; check that its traceback has no frame of distplat."""
    with pytest.raises(UserCodeError) as caught:
        fit(task, tmp_path, **fields)
    ours = [str(_ROOT / part) for part in ("platform", "strategies", "actors", "cli")]
    for line in caught.value.traceback.splitlines():
        if line.startswith('  File "'):
            assert not any(part in line for part in (*ours, "/distplat/")), line
    assert caught.value.exit_code == 1
    return caught.value
