"""Compiled and wrapped models train as plain ones, and what is kept of them has the plain names."""

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


def plain() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2))


def compiled() -> Any:
    return torch.compile(plain(), backend="eager")


def parts_wrapped() -> nn.Module:
    model = plain()
    model[0] = torch.compile(model[0], backend="eager")  # type: ignore[assignment]
    model[3] = nn.DataParallel(model[3])
    return model


class Base(Task):
    built: Callable[[], nn.Module] = staticmethod(plain)

    def model(self) -> nn.Module:
        return type(self).built()

    def train_data(self) -> Dataset[Any]:
        return TensorDataset(torch.randn(16, 3), torch.randint(0, 2, (16,)))

    def loss(self, outputs: Any, targets: Any) -> Tensor:
        return F.cross_entropy(outputs, targets)


WRAPPED = {
    "compiled": compiled,
    "data-parallel": lambda: nn.DataParallel(plain()),
    "both": lambda: torch.compile(nn.DataParallel(plain()), backend="eager"),
    "parts": parts_wrapped,
}


def fit(built: Callable[[], nn.Module], folder: Path, strategy: str, **more: Any) -> Result:
    kind = type("Wrapped", (Base,), {"built": staticmethod(built)})
    fields = {
        "optimizer": {"name": "Adam", "lr": 0.01},
        "epochs": 2,
        "checkpoint": {"every_steps": 2},
        **more.pop("job", {}),
    }
    return Trainer(fields_of(strategy, 0, **fields), kind, working_dir=folder, **more).fit()


def saved(result: Result) -> dict[str, Tensor]:
    assert result.checkpoint is not None
    return load_file(result.checkpoint)


@pytest.mark.sweep(3)
@pytest.mark.parametrize("strategy", ["ring", "ps-sync"])
@pytest.mark.parametrize("wrapped", WRAPPED)
def test_a_wrapped_model_is_kept_by_the_plain_ones_names(
    wrapped: str, strategy: str, tmp_path: Path
) -> None:
    wanted = saved(fit(plain, tmp_path, strategy))
    result = fit(WRAPPED[wrapped], tmp_path, strategy)
    found = saved(result)
    assert list(found) == list(wanted)
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value)
    # Checkpoints go from wrapped to plain and back.
    on = {"job": {"epochs": 3}}
    further = saved(fit(plain, tmp_path, strategy, resume=result.path, **on))
    back = saved(fit(WRAPPED[wrapped], tmp_path, strategy, resume=result.path, **on))
    for name, value in further.items():
        torch.testing.assert_close(back[name], value)


def test_a_compiled_model_stays_compiled() -> None:
    calls: list[object] = []

    def backend(graph: Any, inputs: Any) -> Any:
        calls.append(graph)
        return graph.forward

    inner = plain()
    model = unwrap(torch.compile(inner, backend=backend))  # type: ignore[arg-type]
    assert model is inner
    model(torch.zeros(4, 3))
    assert len(calls) == 1


def test_code_that_reaches_through_a_wrapper_goes_on_to_work() -> None:
    model = unwrap(nn.DataParallel(plain()))
    assert model.module is model
    assert list(model.state_dict()) == list(plain().state_dict())
    assert [name for name, _ in model.named_modules()] == [n for n, _ in plain().named_modules()]


def test_a_model_of_ones_own_with_such_names_is_left_alone() -> None:
    class Mine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = nn.Linear(2, 2)
            self._orig_mod = nn.Linear(2, 2)

    model = Mine()
    assert unwrap(model) is model
    assert [*model.state_dict()][::2] == ["module.weight", "_orig_mod.weight"]
