"""uncalled_hooks: warnings about methods of a task that distplat never calls."""

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
    ("name", "advice"),
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
def test_uncalled_hook_is_reported_with_its_location(name: str, advice: str) -> None:
    (warning,) = uncalled_hooks(with_method(name))
    line = with_method.__code__.co_firstlineno + 1
    assert warning.startswith(f"test_task_methods.py:{line}: Bert.{name}() is never called: ")
    assert advice in warning


@pytest.mark.parametrize(
    "name",
    (
        "__init__ _collate_fn _metric loss_weight model_config train_data_path unigram_entropy "
        "tokenizer augment windows log data vocabulary mask"
    ).split(),
)
def test_helper_method_has_no_warning(name: str) -> None:
    assert uncalled_hooks(with_method(name)) == []


def test_task_hooks_have_no_warning() -> None:
    class Full(Good):
        def eval_data(self) -> Any: ...
        def metrics(self, outputs: Any, targets: Any) -> Any: ...
        def stages(self, model: Any) -> Any: ...

    assert uncalled_hooks(Full) == []


def test_method_called_by_the_class_has_no_warning() -> None:
    class CallsHelper(Good):
        def loss(self, outputs: Any, targets: Any) -> Any:
            return sum(self.criterion(o, t) for o, t in zip(outputs, targets, strict=True))

        def criterion(self, output: Any, target: Any) -> Any: ...

    assert uncalled_hooks(CallsHelper) == []


class WithoutLoss(Task):
    def model(self) -> Any: ...
    def train_data(self) -> Any: ...


class WithStep(WithoutLoss):
    def step(self, model: Any, batch: Any) -> Any: ...


class WithForward(Good):
    def forward(self, model: Any, batch: Any, scale: float = 1.0) -> Any: ...


class WithStaticStep(WithoutLoss):
    step = staticmethod(lambda model, batch: None)


@pytest.mark.parametrize("cls", [Good, WithStep, WithForward, WithStaticStep])
def test_task_may_define_loss_or_step(cls: type[Task]) -> None:
    assert uncalled_hooks(cls) == []


def problem_of(cls: type[Task]) -> Problem:
    with pytest.raises(SpecError) as caught:
        uncalled_hooks(cls)
    (problem,) = caught.value.problems
    return problem


def test_task_with_loss_and_step_is_rejected() -> None:
    class Both(Good):
        def step(self, model: Any, batch: Any) -> Any: ...

    problem, line = problem_of(Both), Both.step.__code__.co_firstlineno
    location = f"test_task_methods.py:{line}: Both"
    assert problem.message == f"{location}: step() and loss() both define the loss"
    assert "keep it, and rename loss()" in problem.hint


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("", "write loss(outputs, targets), or step(model, batch)"),
        ("losses", "did you mean losses()?"),
        ("steps", "did you mean steps()?"),
        ("training_step", "training_step() is never called: write step(model, batch)"),
    ],
)
def test_task_without_loss_and_step_is_rejected(name: str, advice: str) -> None:
    problem = problem_of(
        type("Bert", (WithoutLoss,), {name: lambda self, batch: None} if name else {})
    )
    assert problem.message == "Bert has no loss() and no step()"
    assert advice in problem.hint


@pytest.mark.parametrize("name", ["forward", "step"])
def test_hook_without_batch_argument_is_rejected(name: str) -> None:
    class Lightning(Good if name == "forward" else WithoutLoss):  # type: ignore[misc]
        pass

    def method(self: Any, batch: Any) -> Any: ...

    setattr(Lightning, name, method)
    problem = problem_of(Lightning)
    assert f"Lightning: {name}() must take (model, batch)" in problem.message
    assert problem.message.startswith("test_task_methods.py:")


def test_forward_is_uncalled_if_step_does_not_call_it() -> None:
    class UnusedForward(WithStep):
        def forward(self, model: Any, batch: Any) -> Any: ...

    class UsedForward(UnusedForward):
        def step(self, model: Any, batch: Any) -> Any:
            return self.forward(model, batch)

    (warning,) = uncalled_hooks(UnusedForward)
    assert "UnusedForward.forward() is never called: call it in step(model, batch)" in warning
    assert uncalled_hooks(UsedForward) == []


def test_inherited_and_assigned_hooks_are_reported_once() -> None:
    class Base(Good):
        def collate_fn(self, samples: Any) -> Any: ...

    class Derived(Base):
        predict_step = staticmethod(lambda inputs: inputs)

    warnings = sorted(uncalled_hooks(Derived))
    assert len(warnings) == 2
    assert "Derived.collate_fn()" in warnings[0]
    assert "Derived.predict_step()" in warnings[1]


EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize("file", ["digits/digits.py", "charlm/charlm.py", "recsys/recsys.py"])
def test_examples_have_no_warning(file: str) -> None:
    spec = importlib.util.spec_from_file_location("example", EXAMPLES / file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    classes = [v for v in vars(module).values() if isinstance(v, type) and issubclass(v, Task)]
    tasks = [cls for cls in classes if cls is not Task]
    assert tasks
    for cls in tasks:
        assert uncalled_hooks(cls) == []


def test_attributes_named_like_hooks_have_no_warning() -> None:
    """For example `weights`, the class weights of a cross entropy."""

    class Weighted(Task):
        def model(self) -> nn.Module:
            return nn.Linear(3, 2)

        def train_data(self) -> Dataset[Any]:
            return TensorDataset(torch.ones(8, 3), torch.tensor([0, 1] * 4))

        def loss(self: Any, outputs: Any, targets: Any) -> Any:
            return nn.functional.cross_entropy(outputs, targets, self.weights) * self.lr

    attributes = {
        "lr": 0.1,
        "weights": torch.tensor([1.0, 2.0]),
        "optimizer": "Adam",
        "sampler": None,
    }
    cls: Any = type("WithAttributes", (Weighted,), attributes)
    assert uncalled_hooks(cls) == []
    run = train(job_of("ring", 2, steps=2), cls)
    assert all(value.isfinite().all() for value in run.trained[0].values())
