"""The tasks and job files of the examples in one process, without trainer and Ray."""

from __future__ import annotations

import ast
import importlib
import math
import re
import sys
import sysconfig
import tomllib
from collections import Counter
from collections.abc import Callable, Iterator
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from plain_loss import mean_loss
from torch import Tensor, nn
from torch.utils.data import DataLoader, default_collate

from distplat.platform.lr_schedules import Schedule
from distplat.platform.spec import Job
from distplat.strategies.task import Task

EXAMPLES = Path(__file__).parents[2] / "examples"
TINY = {"block": 16, "layers": 2, "width": 32, "heads": 2}
TASKS: dict[str, tuple[str, dict[str, Any]]] = {
    "mlp": ("digits:Digits", {"model": "mlp"}),
    "cnn": ("digits:Digits", {"model": "cnn", "hidden": 16}),
    "gpt": ("charlm:CharLM", TINY),
    "gpt-tied": ("charlm:CharLM", TINY | {"tied_embeddings": True}),
}
JOBS = ("digits/job.yaml", "digits/cnn.yaml", "charlm/job.yaml", "charlm/hybrid.yaml")

Build = Callable[[str, dict[str, Any]], Any]


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch) -> Build:
    """Return a function that creates a task from its entry point and arguments."""
    for folder in ("digits", "charlm"):
        monkeypatch.syspath_prepend(EXAMPLES / folder)

    def build(entry_point: str, arguments: dict[str, Any]) -> Any:
        module, name = entry_point.split(":")
        return getattr(importlib.import_module(module), name)(**arguments)

    return build


@pytest.fixture(params=TASKS)
def task(request: pytest.FixtureRequest, build: Build) -> Task:
    task: Task = build(*TASKS[request.param])
    return task


def batch(data: Any, size: int) -> tuple[Tensor, Tensor]:
    inputs, targets = default_collate([data[index] for index in range(size)])
    return inputs, targets


def seeded_model(task: Task, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return task.model()


@pytest.mark.parametrize(
    ("name", "inputs_like", "targets_like", "outputs_shape"),
    [
        ("mlp", ((5, 1, 8, 8), torch.float32), ((5,), torch.int64), (5, 10)),
        ("cnn", ((5, 1, 8, 8), torch.float32), ((5,), torch.int64), (5, 10)),
        ("gpt", ((5, 16), torch.int64), ((5, 16), torch.int64), (5, 16, 97)),
        ("gpt-tied", ((5, 16), torch.int64), ((5, 16), torch.int64), (5, 16, 97)),
    ],
)
def test_shapes_of_a_batch(
    build: Build, name: str, inputs_like: Any, targets_like: Any, outputs_shape: tuple[int, ...]
) -> None:
    task = build(*TASKS[name])
    inputs, targets = batch(task.train_data(), 5)
    assert (inputs.shape, inputs.dtype) == inputs_like
    assert (targets.shape, targets.dtype) == targets_like
    assert task.model()(inputs).shape == outputs_shape


def test_loss_and_metrics_are_means_over_the_batch(task: Task) -> None:
    inputs, targets = batch(task.train_data(), 8)
    outputs = seeded_model(task)(inputs).detach()

    def means(rows: slice) -> Tensor:
        parts = [mean_loss(task, outputs[rows], targets[rows])]
        parts += map(torch.as_tensor, task.metrics(outputs[rows], targets[rows]).values())
        assert all(part.shape == () for part in parts)
        return torch.stack(parts)

    whole, head, tail = means(slice(8)), means(slice(3)), means(slice(3, 8))
    assert len(whole) == 2
    torch.testing.assert_close(whole, (3 * head + 5 * tail) / 8)


def test_seed_determines_the_initial_parameters(task: Task) -> None:
    first, same, other = (seeded_model(task, seed).state_dict() for seed in (7, 7, 8))
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_every_parameter_receives_a_gradient(task: Task) -> None:
    model = seeded_model(task)
    inputs, targets = batch(task.train_data(), 16)
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = torch.autograd.grad(
        mean_loss(task, model(inputs), targets),
        parameters,
        allow_unused=True,
        materialize_grads=True,
    )
    assert [name for name, g in zip(names, gradients, strict=True) if not g.any()] == []


def test_data_does_not_depend_on_the_seed(task: Task) -> None:
    def samples(seed: int) -> list[tuple[Tensor, Tensor]]:
        torch.manual_seed(seed)
        return [batch(data, 50) for data in (task.train_data(), task.eval_data())]

    for first, second in zip(samples(1), samples(2), strict=True):
        assert torch.equal(first[0], second[0])
        assert torch.equal(first[1], second[1])


@pytest.mark.parametrize(
    ("entry_point", "arguments", "message"),
    [
        ("digits:Digits", {"model": "rnn"}, "'rnn', allowed: 'mlp', 'cnn'"),
        ("charlm:CharLM", {"width": 10, "heads": 3}, "width 10 .* 3 heads"),
    ],
)
def test_invalid_arguments(
    build: Build, entry_point: str, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        build(entry_point, arguments)


@pytest.mark.parametrize("path", JOBS)
def test_job_files_are_valid(build: Build, path: str) -> None:
    job = Job.model_validate(yaml.safe_load((EXAMPLES / path).read_text(encoding="utf-8")))
    assert job.problems() == []
    assert job.task is not None
    task = build(job.task, job.task_args)
    inputs, targets = batch(task.train_data(), 4)
    loss = task.loss(seeded_model(task, job.seed)(inputs), targets)
    classes = 97 if path.startswith("charlm") else 10
    # The loss of a uniform prediction.
    assert loss.item() == pytest.approx(math.log(classes), rel=0.1)


def test_digits_are_split_80_to_20_in_each_class(build: Build) -> None:
    task = build(*TASKS["mlp"])
    (train, train_labels), (test, test_labels) = task.train_data().tensors, task.eval_data().tensors
    assert (len(train), len(test)) == (1437, 360)
    assert (train.min(), train.max()) == (0, 1)
    share = test_labels.bincount() / (train_labels.bincount() + test_labels.bincount())
    torch.testing.assert_close(share, torch.full((10,), 0.2), atol=0.005, rtol=0)
    train_images = {image.numpy().tobytes() for image in train}
    assert not train_images & {image.numpy().tobytes() for image in test}


def test_plain_loop_learns_digits(build: Build) -> None:
    task = build(*TASKS["mlp"])
    model = seeded_model(task)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    epochs, loader = 5, DataLoader(task.train_data(), batch_size=64, shuffle=True)
    schedule = Schedule(name="cosine")
    for step, (inputs, targets) in enumerate(b for _ in range(epochs) for b in loader):
        optimizer.param_groups[0]["lr"] = schedule.rate(0.1, step, epochs * len(loader))
        optimizer.zero_grad()
        task.loss(model(inputs), targets).backward()
        optimizer.step()
    inputs, targets = task.eval_data().tensors
    assert task.metrics(model(inputs), targets)["accuracy"] > 0.9


def source_text() -> str:
    folder = Path(sysconfig.get_paths()["stdlib"])
    names = importlib.import_module("charlm").MODULES
    assert names == sorted(names)
    return "".join((folder / f"{name}.py").read_text(encoding="utf-8") for name in names)


def decoded(numbers: Tensor) -> str:
    table = "".join(map(chr, range(32, 127))) + "\n" + "\0"
    return "".join(table[number] for number in numbers.tolist())


def test_charlm_holds_out_the_tail_of_the_text(build: Build) -> None:
    task = build(*TASKS["gpt"])
    text = source_text()
    plain = "".join(c if c == "\n" or " " <= c <= "~" else "\0" for c in text)
    train, held_out = task.train_data(), task.eval_data()
    assert decoded(train.text) + decoded(held_out.text) == plain
    assert len(held_out.text) == pytest.approx(0.1 * len(text), abs=1)
    assert 1_000_000 < len(text) < 3_000_000


def test_charlm_windows_predict_each_character_once(build: Build) -> None:
    data = build(*TASKS["gpt"]).eval_data()
    inputs, targets = batch(data, len(data))
    covered = len(data) * 16
    assert len(data.text) - 16 <= covered < len(data.text)
    assert torch.equal(inputs.flatten(), data.text[:covered])
    assert torch.equal(targets.flatten(), data.text[1 : covered + 1])
    for index in (len(data), -1):
        with pytest.raises(IndexError):
            data[index]


def test_unigram_entropy_of_the_training_text(build: Build) -> None:
    task = build(*TASKS["gpt"])
    text = task.train_data().text.tolist()
    shares = [count / len(text) for count in Counter(text).values()]
    assert task.unigram_entropy() == pytest.approx(-sum(p * math.log(p) for p in shares))
    assert 2.9 < task.unigram_entropy() < 3.3


def test_charlm_bits_per_char(build: Build) -> None:
    logits, targets = torch.zeros(2, 16, 97), torch.zeros(2, 16, dtype=torch.int64)
    bits = build(*TASKS["gpt"]).metrics(logits, targets)["bits_per_char"]
    assert bits.item() == pytest.approx(math.log2(97))


def test_charlm_attention_is_causal(build: Build) -> None:
    task = build(*TASKS["gpt"])
    model = seeded_model(task).eval()
    inputs, _ = batch(task.train_data(), 2)
    changed = inputs.clone()
    changed[:, 9] = (changed[:, 9] + 1) % 97
    before, after = model(inputs), model(changed)
    torch.testing.assert_close(before[:, :9], after[:, :9])
    assert (before[:, 9:] - after[:, 9:]).abs().amax(dim=(0, 2)).gt(1e-6).all()


def test_charlm_dropout_in_training_only(build: Build) -> None:
    task = build("charlm:CharLM", TINY | {"dropout": 0.5})
    model = seeded_model(task)
    inputs, _ = batch(task.train_data(), 2)
    assert not torch.equal(model(inputs), model(inputs))
    model.eval()
    assert torch.equal(model(inputs), model(inputs))


def test_charlm_stages_match_the_model(build: Build) -> None:
    task = build(*TASKS["gpt"])
    model = seeded_model(task)
    stages = task.stages(model)
    inputs, _ = batch(task.train_data(), 2)
    assert len(stages) == 5  # embedding, two blocks, norm, head
    assert torch.equal(nn.Sequential(*stages)(inputs), model(inputs))


def test_charlm_with_tied_embeddings_has_no_stages(build: Build) -> None:
    tied, untied = build(*TASKS["gpt-tied"]), build(*TASKS["gpt"])
    sizes = [sum(p.numel() for p in task.model().parameters()) for task in (tied, untied)]
    assert sizes[1] - sizes[0] == 97 * TINY["width"]
    with pytest.raises(NotImplementedError, match="tied"):
        tied.stages(tied.model())


def test_charlm_overfits_a_batch(build: Build) -> None:
    task = build(*TASKS["gpt"])
    model = seeded_model(task)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    inputs, targets = batch(task.train_data(), 16)
    losses = []
    for _ in range(31):
        optimizer.zero_grad()
        loss = task.loss(model(inputs), targets)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 1.5


def imported_packages(path: Path) -> Iterator[str]:
    """Yield the packages that a file imports, at any level."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        yield from (name.partition(".")[0] for name in names)


def test_imports_of_examples_are_in_their_extra() -> None:
    project = tomllib.loads((EXAMPLES.parent / "pyproject.toml").read_text())["project"]
    requirements = [*project["dependencies"], *project["optional-dependencies"]["examples"]]
    declared = {re.split(r"[\[>=]", line)[0] for line in requirements} | {"distplat"}
    imports = {name for path in EXAMPLES.rglob("*.py") for name in imported_packages(path)}
    own = {path.stem for path in EXAMPLES.rglob("*.py")} | sys.stdlib_module_names
    distributions = packages_distributions()
    missing = [n for n in imports - own if declared.isdisjoint(distributions.get(n, [n]))]
    assert not missing, "add their packages to the extra `examples` of pyproject.toml"
