"""The example of adapters over a frozen base: a plain loop that begins from the base's file."""

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
    """Stands for GPT-2 where that is not installed: the same names, and the loss."""

    def __init__(self, words: int, width: int) -> None:
        super().__init__()
        self.wte, self.attn = nn.Embedding(words, width), nn.ModuleDict()
        self.attn["c_attn"] = nn.Linear(width, width)
        self.head = nn.Linear(width, words)

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.head(self.attn["c_attn"](self.wte(input_ids)).tanh())
        told, meant = logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten()
        return {"loss": nn.functional.cross_entropy(told, meant), "logits": logits}


def small(example: Any, name: str, *, gpt2: bool) -> Any:
    """Give one of the tasks with a small model."""

    class Base(example.Base):  # type: ignore[misc]
        def model(self) -> nn.Module:
            if gpt2:
                found: nn.Module = super().model()
                return found
            return Layers(example.VOCABULARY, self.width)

    class Lora(example.Lora, Base):  # type: ignore[misc]
        pass

    kind: Any = Base if name == "Base" else Lora

    class Small(kind):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__(**SMALL)

    return Small


def plain(kind: type[Task], base: dict[str, Tensor]) -> dict[str, Tensor]:
    """Train the adapters as a script would, from the base's weights."""
    torch.manual_seed(0)
    task = kind()
    model, data = task.model(), task.train_data()
    model.load_state_dict(base, strict=False)
    named = {name: one for name, one in model.named_parameters() if one.requires_grad}
    optimizer = torch.optim.SGD(named.values(), lr=0.5)
    sampler = Sampler(len(data), BATCH, 1, 0, True, False)  # type: ignore[arg-type]
    for step in range(STEPS):
        batch = torch.stack([data[int(i)] for i in sampler.batch_ids(step)])
        optimizer.zero_grad()
        torch.autograd.backward(model(input_ids=batch, labels=batch)["loss"])
        optimizer.step()
    return {name: one.detach().clone() for name, one in named.items()}


@pytest.mark.parametrize("strategy", ["ring", "ps-sync"])
@pytest.mark.parametrize("gpt2", [False, True])
def test_adapters_are_trained_over_the_bases_file(
    example: Any, strategy: str, gpt2: bool, tmp_path: Path
) -> None:
    if gpt2:
        pytest.importorskip("transformers")
    base = train(job_of(steps=2), small(example, "Base", gpt2=gpt2)).trained[0]
    torch.save(base, tmp_path / "base.pt")
    lora = small(example, "Lora", gpt2=gpt2)
    fields: dict[str, Any] = {
        "optimizer": {"name": "SGD", "lr": 0.5},
        "initial_weights": {"path": str(tmp_path / "base.pt"), "strict": False},
        "checkpoint": {"trained_only": True},
    }
    run = train(job_of(strategy, 2, global_batch_size=BATCH, steps=STEPS, **fields), lora)
    found, expected = run.trained[0], plain(lora, base)
    assert found.keys() == expected.keys()
    assert {name.rpartition(".")[2] for name in found} == {"lora_a", "lora_b"}
    moved = [one.abs().max() for name, one in found.items() if name.endswith("lora_b")]
    assert min(moved) > 0
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0.02, atol=2e-3)
    trained = run.parameters()
    for name, value in base.items():
        assert torch.equal(trained[name], value.bfloat16()), name


def test_an_adapter_is_a_product_beside_the_layer(example: Any) -> None:
    model = example.adapted(Layers(5, 4).requires_grad_(False), ["*.c_attn"], rank=2, scale=3.0)
    layer = model.attn["c_attn"]
    inputs = torch.randn(7, 4)
    before = layer(inputs)
    nn.init.normal_(layer.lora_b)
    product = 3.0 * layer.lora_a @ layer.lora_b
    torch.testing.assert_close(layer(inputs), before + inputs @ product)


def test_the_jobs_name_what_the_example_has(example: Any) -> None:
    for file, kind in (("base.yaml", example.Base), ("job.yaml", example.Lora)):
        job = Job.model_validate(yaml.safe_load((FOLDER / file).read_text()))
        assert job.task == f"lora:{kind.__name__}" and uncalled_hooks(kind) == []
        task = kind()
        data = task.train_data()
        assert len(data) + len(task.eval_data()) == task.samples > 2 * job.global_batch_size
        assert data[0].shape == (task.length,)
        assert 0 <= int(data[0].min()) and int(data[0].max()) < example.VOCABULARY
