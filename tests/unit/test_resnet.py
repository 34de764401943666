"""The ResNet example: augmentation, and equal models with one and two workers."""

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from jobs import job_of
from local_run import train

from distplat.platform.spec import Job
from distplat.strategies.task_methods import uncalled_hooks

FOLDER = Path(__file__).parents[2] / "examples" / "resnet"


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module("resnet")


def test_augmentation_changes_images_and_keeps_their_range(example: Any) -> None:
    plain = example.Images(held_out=False, augment=False)
    augmented = example.Images(held_out=False, augment=True)
    torch.manual_seed(0)
    first, second = augmented[3][0], augmented[3][0]
    assert first.shape == plain[3][0].shape == (1, 8, 8)
    assert 0.0 <= float(first.min()) and float(first.max()) <= 1.0 + 1e-6
    assert not torch.equal(first, plain[3][0]) and not torch.equal(first, second)
    assert len(plain) + len(example.Images(held_out=True, augment=False)) == 1797


def test_two_workers_match_one(example: Any) -> None:
    """Without augmentation, because ranks in memory are threads with one generator."""

    class Small(example.ResNetDigits):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__(width=2, blocks=1, augment=False)

        def model(self) -> Any:
            return super().model().double()

        def forward(self, model: Any, batch: Any) -> Any:
            return model(batch[0].double())

        def loss(self, outputs: Any, batch: Any) -> Any:
            return super().loss(outputs, batch[1])

        def eval_data(self) -> Any:
            return None

    fields: dict[str, Any] = {"steps": 3, "global_batch_size": 16}
    single, double = (train(job_of("ring", n, **fields), Small).parameters() for n in (1, 2))
    for name, value in single.items():
        torch.testing.assert_close(double[name], value, rtol=1e-6, atol=1e-8)


def test_job_file_matches_the_example(example: Any) -> None:
    job = Job.model_validate(yaml.safe_load((FOLDER / "job.yaml").read_text()))
    assert job.task == "resnet:ResNetDigits" and uncalled_hooks(example.ResNetDigits) == []
    model = example.ResNetDigits(**job.task_args).model()
    (group,) = job.optimizer.groups
    norms = [module for module in model.modules() if isinstance(module, torch.nn.SyncBatchNorm)]
    named = [name for name, _ in model.named_parameters() if "norm" in name]
    assert group.match == "*norm*" and len(named) == 2 * len(norms) > 0
