"""The same model on a CUDA device: several workers share one card by fractions of it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from distplat import Task, Trainer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.fixture(scope="module", autouse=True)
def local_ray() -> Iterator[None]:
    ray.init(address="local", include_dashboard=False, num_cpus=8, logging_level="warning")
    yield
    ray.shutdown()


class Net(Task):
    """A small classifier on seeded noise."""

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))

    def train_data(self) -> Dataset[Any]:
        generator = torch.Generator().manual_seed(1)
        inputs = torch.randn(100, 64, generator=generator)
        return TensorDataset(inputs, torch.randint(0, 10, (100,), generator=generator))

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(outputs, targets)


def train(strategy: object, workers: int, storage: Path, *, gpu: bool) -> NDArray[np.float32]:
    share = {"GPU": 0.9 / max(1, workers)} if gpu else {}
    job = {
        "name": "cuda",
        "strategy": strategy,
        "scaling": {
            "num_workers": workers,
            "use_gpu": gpu,
            "resources_per_worker": {"CPU": 1, **share},
        },
        "optimizer": {"name": "AdamW", "lr": 1e-3},
        "global_batch_size": 24,
        "epochs": 3,
        "clip_norm": 1.0,
        "storage_path": str(storage),
    }
    result = Trainer(job, Net).fit()
    assert result.checkpoint is not None
    state = load_file(result.checkpoint)
    return np.concatenate([state[name].ravel() for name in sorted(state)])


@pytest.mark.parametrize("strategy", ["ring", {"name": "ps-sync", "num_servers": 2}])
@pytest.mark.parametrize("workers", [1, 2])
def test_equals_the_cpu(strategy: object, workers: int, tmp_path: Path) -> None:
    alone = train("ring", 0, tmp_path, gpu=False)
    on_card = train(strategy, workers, tmp_path, gpu=True)
    # CUDA's matrix products round otherwise than the CPU's: float32, not bits.
    assert np.linalg.norm(on_card - alone) < 1e-4 * np.linalg.norm(alone)
