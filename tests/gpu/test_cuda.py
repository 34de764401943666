"""Training on a CUDA device matches the CPU; several workers share one GPU."""

from collections.abc import Iterator
from functools import partial
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
from distplat.actors.memory.device_copy import cuda_transfer
from distplat.actors.memory.memfd import MemorySegment

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


def train(
    strategy: object,
    workers: int,
    storage: Path,
    *,
    gpu: bool,
    clip_norm: float | None = 1.0,
    precision: str = "fp32",
) -> NDArray[np.float32]:
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
        "clip_norm": clip_norm,
        "precision": precision,
        "storage_path": str(storage),
    }
    result = Trainer(job, Net).fit()
    assert result.checkpoint is not None
    state = load_file(result.checkpoint)
    return np.concatenate([state[name].ravel() for name in sorted(state)])


@pytest.mark.parametrize("strategy", ["ring", {"name": "ps-sync", "num_servers": 2}])
@pytest.mark.parametrize("workers", [1, 2])
def test_matches_the_cpu(strategy: object, workers: int, tmp_path: Path) -> None:
    on_cpu = train("ring", 0, tmp_path, gpu=False)
    on_gpu = train(strategy, workers, tmp_path, gpu=True)
    # Matrix products of CUDA and CPU round differently.
    assert np.linalg.norm(on_gpu - on_cpu) < 1e-4 * np.linalg.norm(on_cpu)


@pytest.mark.parametrize("strategy", ["ring", "ps-sync"])
def test_fp16_with_loss_scale_is_close_to_fp32(strategy: object, tmp_path: Path) -> None:
    on_cpu = train("ring", 0, tmp_path, gpu=False)
    on_gpu = train(strategy, 2, tmp_path, gpu=True, precision="fp16")
    assert 0 < np.linalg.norm(on_gpu - on_cpu) < 0.02 * np.linalg.norm(on_cpu)


@pytest.mark.parametrize("clip_norm", [None, 1.0])
def test_overlap_does_not_change_the_model(clip_norm: float | None, tmp_path: Path) -> None:
    models = set()
    for overlap in (False, True):
        strategy = {"name": "ring", "overlap": overlap}
        models.add(train(strategy, 2, tmp_path, gpu=True, clip_norm=clip_norm).tobytes())
    assert len(models) == 1


def test_transfer_through_pinned_memory_is_ordered_with_compute() -> None:
    """A part contains the results of all kernels that were queued before `to_host`."""
    gradients, parameters = (torch.zeros(1 << 20, device="cuda") for _ in range(2))
    shared = [MemorySegment.create("here", 1 << 20, "float32") for _ in range(2)]
    memory = [segment.tensor for segment in shared]
    transfer = cuda_transfer(gradients, parameters, memory)
    assert all(tensor.is_pinned() for tensor in memory)
    extremes: list[float] = []

    def record(part: Tensor) -> None:
        extremes.extend((part.min().item(), part.max().item()))

    half = 1 << 19
    for start in (half, 0):
        busy = torch.randn(2048, 2048, device="cuda")
        for _ in range(20):
            busy = busy @ busy / 2048
        gradients[start : start + half] += 1 + start
        part = memory[0][start : start + half]
        transfer.to_host(part, start, partial(record, part))
    transfer.wait(30.0)
    assert extremes == [1 + half, 1 + half, 1, 1]
    memory[1].fill_(3.0)
    transfer.to_device(memory[1], 0)
    transfer.join()
    assert parameters.eq(3.0).all()
    transfer.close()
    assert not memory[0].is_pinned()
    for segment in shared:
        segment.seal()
