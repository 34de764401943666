"""Methods of a task that nobody calls are told; helpers of the user's own are not."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import job_of
from local_run import train
from torch import nn
from torch.utils.data import Dataset, TensorDataset

from distplat import Task
from distplat.platform.errors import Problem, SpecError
from distplat.strategies.task_methods import uncalled_hooks


class Good(Task):
    def model(self) -> Any: ...
    def train_data(self) -> Any: ...
    def loss(self, outputs: Any, targets: Any) -> Any: ...


def with_method(name: str) -> type[Task]:
    def method(self: Task, *args: Any) -> None: ...

    return type("Bert", (Good,), {name: method})


@pytest.mark.parametrize(
    ("name", "instead"),
    [
        ("collate_fn", "did you mean collate()? Write collate(samples)"),
        ("training_step", "write step(model, batch)"),
        ("loss_fn", "write loss(outputs, targets)"),
        ("steps", "did you mean step()?"),
        ("configure_optimizers", "job file's `optimizer`"),
        ("lr_scheduler_step", "job file's `lr_schedule`"),
        ("forwards", "did you mean forward()?"),
        ("build_model", "the module's forward()"),
        ("validation_step", "metrics(outputs, targets)"),
        ("train_dataloader", "train_data()"),
        ("compute_metrics", "metrics(outputs, targets)"),
        ("on_train_end", "distplat.Callback"),
        ("metric", "did you mean metrics()?"),
        ("losses", "did you mean loss()?"),
        ("eval_dataset", "did you mean eval_data()? Return a data set from eval_data()"),
        ("train_dat", "did you mean train_data()?"),
        ("val_data", "did you mean eval_data()?"),
        ("stage", "did you mean stages()?"),
        ("Model", "did you mean model()?"),
    ],
)
def test_a_hook_that_is_none_is_told_with_its_place(name: str, instead: str) -> None:
    (told,) = uncalled_hooks(with_method(name))
    line = with_method.__code__.co_firstlineno + 1
    assert told.startswith(f"test_task_methods.py:{line}: Bert.{name}() is never called: ")
    assert instead in told


@pytest.mark.parametrize(
    "name",
    (
        "__init__ _collate_fn _metric loss_weight model_config train_data_path unigram_entropy "
        "tokenizer augment windows log data vocabulary mask"
    ).split(),
)
def test_a_helper_is_silent(name: str) -> None:
    assert uncalled_hooks(with_method(name)) == []


def test_our_own_hooks_are_silent() -> None:
    class Full(Good):
        def eval_data(self) -> Any: ...
        def metrics(self, outputs: Any, targets: Any) -> Any: ...
        def stages(self, model: Any) -> Any: ...

    assert uncalled_hooks(Full) == []


def test_a_method_that_the_class_uses_is_a_helper() -> None:
    class Uses(Good):
        def loss(self, outputs: Any, targets: Any) -> Any:
            return sum(self.criterion(o, t) for o, t in zip(outputs, targets, strict=True))

        def criterion(self, output: Any, target: Any) -> Any: ...

    assert uncalled_hooks(Uses) == []


class Bare(Task):
    def model(self) -> Any: ...
    def train_data(self) -> Any: ...


class Stepping(Bare):
    def step(self, model: Any, batch: Any) -> Any: ...


class Calling(Good):
    def forward(self, model: Any, batch: Any, scale: float = 1.0) -> Any: ...


class Static(Bare):
    step = staticmethod(lambda model, batch: None)


@pytest.mark.parametrize("kind", [Good, Stepping, Calling, Static])
def test_a_task_has_a_loss_or_a_step(kind: type[Task]) -> None:
    assert uncalled_hooks(kind) == []


def refused(kind: type[Task]) -> Problem:
    with pytest.raises(SpecError) as caught:
        uncalled_hooks(kind)
    (problem,) = caught.value.problems
    return problem


def test_a_task_that_has_both_is_told_where() -> None:
    class Both(Good):
        def step(self, model: Any, batch: Any) -> Any: ...

    problem, line = refused(Both), Both.step.__code__.co_firstlineno
    place = f"test_task_methods.py:{line}: Both"
    assert problem.message == f"{place}: step() and loss() both define the loss"
    assert "keep it, and rename loss()" in problem.hint


@pytest.mark.parametrize(
    ("name", "way_out"),
    [
        ("", "write loss(outputs, targets), or step(model, batch)"),
        ("losses", "did you mean losses()?"),
        ("steps", "did you mean steps()?"),
        ("training_step", "training_step() is never called: write step(model, batch)"),
    ],
)
def test_a_task_that_has_neither_is_told_what_to_write(name: str, way_out: str) -> None:
    problem = refused(type("Bert", (Bare,), {name: lambda self, batch: None} if name else {}))
    assert problem.message == "Bert has no loss() and no step()"
    assert way_out in problem.hint


@pytest.mark.parametrize("name", ["forward", "step"])
def test_a_method_that_takes_no_batch_is_told(name: str) -> None:
    class Lightning(Good if name == "forward" else Bare):  # type: ignore[misc]
        pass

    def method(self: Any, batch: Any) -> Any: ...

    setattr(Lightning, name, method)
    problem = refused(Lightning)
    assert f"Lightning: {name}() must take (model, batch)" in problem.message
    assert problem.message.startswith("test_task_methods.py:")


def test_a_forward_beside_a_step_is_called_by_it_or_by_nobody() -> None:
    class Idle(Stepping):
        def forward(self, model: Any, batch: Any) -> Any: ...

    class Used(Idle):
        def step(self, model: Any, batch: Any) -> Any:
            return self.forward(model, batch)

    (told,) = uncalled_hooks(Idle)
    assert "Idle.forward() is never called: call it in step(model, batch)" in told
    assert uncalled_hooks(Used) == []


def test_what_is_inherited_or_assigned_is_told_once() -> None:
    class Base(Good):
        def collate_fn(self, samples: Any) -> Any: ...

    class Derived(Base):
        predict_step = staticmethod(lambda inputs: inputs)

    told = sorted(uncalled_hooks(Derived))
    assert len(told) == 2
    assert "Derived.collate_fn()" in told[0]
    assert "Derived.predict_step()" in told[1]


EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize("file", ["digits/digits.py", "charlm/charlm.py", "recsys/recsys.py"])
def test_the_examples_are_silent(file: str) -> None:
    spec = importlib.util.spec_from_file_location("example", EXAMPLES / file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    kinds = [v for v in vars(module).values() if isinstance(v, type) and issubclass(v, Task)]
    tasks = [kind for kind in kinds if kind is not Task]
    assert tasks
    for kind in tasks:
        assert uncalled_hooks(kind) == []


def test_what_a_class_keeps_under_the_name_of_a_method_is_its_own() -> None:
    """Class weights of a cross entropy, for example: the loss below reads them."""

    class Weighted(Task):
        def model(self) -> nn.Module:
            return nn.Linear(3, 2)

        def train_data(self) -> Dataset[Any]:
            return TensorDataset(torch.ones(8, 3), torch.tensor([0, 1] * 4))

        def loss(self: Any, outputs: Any, targets: Any) -> Any:
            return nn.functional.cross_entropy(outputs, targets, self.weights) * self.lr

    own = {"lr": 0.1, "weights": torch.tensor([1.0, 2.0]), "optimizer": "Adam", "sampler": None}
    kind: Any = type("Keeps", (Weighted,), own)
    assert uncalled_hooks(kind) == []
    run = train(job_of("ring", 2, steps=2), kind)
    assert all(value.isfinite().all() for value in run.trained[0].values())
