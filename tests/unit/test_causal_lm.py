"""The example `causal_lm`: training on padded batches matches a plain loop."""

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hybrid_models import merge_parts
from jobs import job_of
from local_run import train
from torch import Tensor, nn

from distplat.platform.sampler import Sampler
from distplat.platform.spec import Job
from distplat.strategies.task import Task
from distplat.strategies.task_methods import uncalled_hooks

FOLDER = Path(__file__).parents[2] / "examples" / "causal_lm"
SMALL = {"longest": 24, "layers": 2, "width": 16, "heads": 2, "lines": 60}
BATCH, STEPS = 8, 5
SGD = {"name": "SGD", "lr": 0.3, "momentum": 0.9}


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module("causal_lm")


def with_small_model(task: Any) -> type[Task]:
    """Return the task with a small model in float64."""

    class Small(task):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__(**SMALL)

        def model(self) -> nn.Module:
            model: nn.Module = super().model()
            return model.double()

    return Small


def train_plain(task_type: type[Task]) -> dict[str, Tensor]:
    """Train in one process with the model's own loss, a mean over words."""
    torch.manual_seed(0)
    task: Any = task_type()
    model, data = task.model(), task.train_data()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    sampler = Sampler(len(data), BATCH, 1, 0, True, False)
    for step in range(STEPS):
        batch = task.collate([data[int(i)] for i in sampler.batch_ids(step)])
        optimizer.zero_grad()
        torch.autograd.backward(model(**batch)["loss"])
        optimizer.step()
    return {name: value.detach() for name, value in model.state_dict().items()}


def assert_close(
    params: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-8
) -> None:
    assert params.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(params[name], value, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("strategy", "parts"),
    [
        ("ring", 1),
        ("ring", 2),
        ("ps-sync", 1),
        ("ps-sync", 2),
        ({"name": "hybrid", "pipeline": 2, "micro_batches": 4}, 1),
    ],
    ids=str,
)
def test_matches_plain_loop(
    example: Any, strategy: Any, parts: int, caplog: pytest.LogCaptureFixture
) -> None:
    task = with_small_model(example.CausalLM)
    fields = {"optimizer": SGD, "steps": STEPS, "gradient_accumulation": parts}
    job = job_of(strategy, 2, global_batch_size=BATCH, **fields)
    assert_close(merge_parts(train(job, task)), train_plain(task))
    assert not [r for r in caplog.records if "not a mean" in r.getMessage()]


def test_gpt2_matches_plain_loop(example: Any) -> None:
    transformers = pytest.importorskip("transformers")

    class GPT2(with_small_model(example.CausalLM)):  # type: ignore[misc]
        def model(self) -> nn.Module:
            dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
            size = {"vocab_size": example.VOCABULARY, "n_embd": 16, "n_layer": 2, "n_head": 2}
            ends = {"bos_token_id": example.END, "eos_token_id": example.END}
            config = transformers.GPT2Config(**size, **dropout, **ends, n_positions=24)
            model: nn.Module = transformers.GPT2LMHeadModel(config)
            return model.double()

    for strategy in ("ring", {"name": "hybrid", "pipeline": 2, "micro_batches": 4}):
        job = job_of(strategy, 2, optimizer=SGD, steps=STEPS, global_batch_size=BATCH)
        # GPT2LMHeadModel computes its loss in float32 for every dtype.
        assert_close(merge_parts(train(job, GPT2)), train_plain(GPT2), 1e-6)


def test_job_file_matches_the_example(example: Any) -> None:
    job = Job.model_validate(yaml.safe_load((FOLDER / "job.yaml").read_text()))
    assert job.task == "causal_lm:CausalLM" and uncalled_hooks(example.CausalLM) == []
    task = example.CausalLM()
    lines = task.train_data()
    assert len(lines) + len(task.eval_data()) == task.lines > 2 * job.global_batch_size
    batch = task.collate([lines[0], lines[1]])
    assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape
    assert (batch["labels"] == example.END).sum() == 2
    assert batch["input_ids"].max() < example.VOCABULARY
