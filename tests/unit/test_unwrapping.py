"""Compiled and wrapped models train as plain models, and are saved with the plain names."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from jobs import fields_of
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from distplat import Result, Task, Trainer
from distplat.strategies.model.module_hooks import unwrap


def make_model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2))


def make_compiled() -> Any:
    return torch.compile(make_model(), backend="eager")


def make_partly_wrapped() -> nn.Module:
    model = make_model()
    model[0] = torch.compile(model[0], backend="eager")  # type: ignore[assignment]
    model[3] = nn.DataParallel(model[3])
    return model


class Base(Task):
    build: Callable[[], nn.Module] = staticmethod(make_model)

    def model(self) -> nn.Module:
        return type(self).build()

    def train_data(self) -> Dataset[Any]:
        return TensorDataset(torch.randn(16, 3), torch.randint(0, 2, (16,)))

    def loss(self, outputs: Any, targets: Any) -> Tensor:
        return F.cross_entropy(outputs, targets)


WRAPPED = {
    "compiled": make_compiled,
    "data-parallel": lambda: nn.DataParallel(make_model()),
    "both": lambda: torch.compile(nn.DataParallel(make_model()), backend="eager"),
    "parts": make_partly_wrapped,
}


def fit(build: Callable[[], nn.Module], folder: Path, strategy: str, **more: Any) -> Result:
    cls = type("Wrapped", (Base,), {"build": staticmethod(build)})
    fields = {
        "optimizer": {"name": "Adam", "lr": 0.01},
        "epochs": 2,
        "checkpoint": {"every_steps": 2},
        **more.pop("job", {}),
    }
    return Trainer(fields_of(strategy, 0, **fields), cls, working_dir=folder, **more).fit()


def checkpoint_of(result: Result) -> dict[str, Tensor]:
    assert result.checkpoint is not None
    return load_file(result.checkpoint)


@pytest.mark.sweep(3)
@pytest.mark.parametrize("strategy", ["ring", "ps-sync"])
@pytest.mark.parametrize("wrapped", WRAPPED)
def test_wrapped_model_is_saved_with_plain_names(
    wrapped: str, strategy: str, tmp_path: Path
) -> None:
    expected = checkpoint_of(fit(make_model, tmp_path, strategy))
    result = fit(WRAPPED[wrapped], tmp_path, strategy)
    actual = checkpoint_of(result)
    assert list(actual) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value)
    # A plain and a wrapped model resume from the wrapped model's checkpoint.
    longer = {"job": {"epochs": 3}}
    plain = checkpoint_of(fit(make_model, tmp_path, strategy, resume=result.path, **longer))
    wrapped_again = checkpoint_of(
        fit(WRAPPED[wrapped], tmp_path, strategy, resume=result.path, **longer)
    )
    for name, value in plain.items():
        torch.testing.assert_close(wrapped_again[name], value)


def test_unwrapped_model_stays_compiled() -> None:
    calls: list[object] = []

    def backend(graph: Any, inputs: Any) -> Any:
        calls.append(graph)
        return graph.forward

    inner = make_model()
    model = unwrap(torch.compile(inner, backend=backend))  # type: ignore[arg-type]
    assert model is inner
    model(torch.zeros(4, 3))
    assert len(calls) == 1


def test_unwrapped_model_keeps_the_module_attribute() -> None:
    model = unwrap(nn.DataParallel(make_model()))
    assert model.module is model
    assert list(model.state_dict()) == list(make_model().state_dict())
    assert [name for name, _ in model.named_modules()] == [
        n for n, _ in make_model().named_modules()
    ]


def test_user_model_with_wrapper_names_is_not_unwrapped() -> None:
    class WrapperNames(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = nn.Linear(2, 2)
            self._orig_mod = nn.Linear(2, 2)

    model = WrapperNames()
    assert unwrap(model) is model
    assert [*model.state_dict()][::2] == ["module.weight", "_orig_mod.weight"]
