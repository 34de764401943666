"""The LoRA example matches a plain loop that starts from the file of the base model."""

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from jobs import job_of
from local_run import train
from torch import Tensor, nn

from distplat.platform.sampler import Sampler
from distplat.platform.spec import Job
from distplat.strategies.task import Task
from distplat.strategies.task_methods import uncalled_hooks

FOLDER = Path(__file__).parents[2] / "examples" / "lora"
SMALL = {"length": 12, "layers": 1, "width": 8, "heads": 2, "samples": 40}
BATCH, STEPS = 8, 4


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module("lora")


class Layers(nn.Module):
    """Replaces GPT-2 if transformers is not installed: same names, same loss."""

    def __init__(self, words: int, width: int) -> None:
        super().__init__()
        self.wte, self.attn = nn.Embedding(words, width), nn.ModuleDict()
        self.attn["c_attn"] = nn.Linear(width, width)
        self.head = nn.Linear(width, words)

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.head(self.attn["c_attn"](self.wte(input_ids)).tanh())
        predictions, targets = logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten()
        return {"loss": nn.functional.cross_entropy(predictions, targets), "logits": logits}


def small_task(example: Any, name: str, *, gpt2: bool) -> Any:
    """Return a task of the example with a small model."""

    class Base(example.Base):  # type: ignore[misc]
        def model(self) -> nn.Module:
            if gpt2:
                model: nn.Module = super().model()
                return model
            return Layers(example.VOCABULARY, self.width)

    class Lora(example.Lora, Base):  # type: ignore[misc]
        pass

    task_type: Any = Base if name == "Base" else Lora

    class Small(task_type):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__(**SMALL)

    return Small


def plain_loop(task_type: type[Task], base: dict[str, Tensor]) -> dict[str, Tensor]:
    """Train the adapters in a plain loop from the weights of the base."""
    torch.manual_seed(0)
    task = task_type()
    model, data = task.model(), task.train_data()
    model.load_state_dict(base, strict=False)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(trainable.values(), lr=0.5)
    sampler = Sampler(len(data), BATCH, 1, 0, True, False)  # type: ignore[arg-type]
    for step in range(STEPS):
        batch = torch.stack([data[int(i)] for i in sampler.batch_ids(step)])
        optimizer.zero_grad()
        torch.autograd.backward(model(input_ids=batch, labels=batch)["loss"])
        optimizer.step()
    return {name: p.detach().clone() for name, p in trainable.items()}


@pytest.mark.sweep(2)
@pytest.mark.parametrize("strategy", ["ring", "ps-sync"])
@pytest.mark.parametrize("gpt2", [False, True])
def test_adapters_match_plain_loop_from_the_base_file(
    example: Any, strategy: str, gpt2: bool, tmp_path: Path
) -> None:
    if gpt2:
        pytest.importorskip("transformers")
    base = train(job_of(steps=2), small_task(example, "Base", gpt2=gpt2)).trained[0]
    torch.save(base, tmp_path / "base.pt")
    lora = small_task(example, "Lora", gpt2=gpt2)
    fields: dict[str, Any] = {
        "optimizer": {"name": "SGD", "lr": 0.5},
        "initial_weights": {"path": str(tmp_path / "base.pt"), "strict": False},
        "checkpoint": {"trained_only": True},
    }
    run = train(job_of(strategy, 2, global_batch_size=BATCH, steps=STEPS, **fields), lora)
    found, expected = run.trained[0], plain_loop(lora, base)
    assert found.keys() == expected.keys()
    assert {name.rpartition(".")[2] for name in found} == {"lora_a", "lora_b"}
    largest = [value.abs().max() for name, value in found.items() if name.endswith("lora_b")]
    assert min(largest) > 0
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0.02, atol=2e-3)
    trained = run.parameters()
    for name, value in base.items():
        assert torch.equal(trained[name], value.bfloat16()), name


def test_adapter_adds_a_low_rank_product(example: Any) -> None:
    model = example.adapted(Layers(5, 4).requires_grad_(False), ["*.c_attn"], rank=2, scale=3.0)
    layer = model.attn["c_attn"]
    inputs = torch.randn(7, 4)
    base_outputs = layer(inputs)
    nn.init.normal_(layer.lora_b)
    product = 3.0 * layer.lora_a @ layer.lora_b
    torch.testing.assert_close(layer(inputs), base_outputs + inputs @ product)


def test_job_files_match_the_tasks(example: Any) -> None:
    for file, task_type in (("base.yaml", example.Base), ("job.yaml", example.Lora)):
        job = Job.model_validate(yaml.safe_load((FOLDER / file).read_text()))
        assert job.task == f"lora:{task_type.__name__}" and uncalled_hooks(task_type) == []
        task = task_type()
        data = task.train_data()
        assert len(data) + len(task.eval_data()) == task.samples > 2 * job.global_batch_size
        assert data[0].shape == (task.length,)
        assert 0 <= int(data[0].min()) and int(data[0].max()) < example.VOCABULARY
