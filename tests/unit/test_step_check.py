"""Checks of `step`: weights that depend on the model, and losses that are sums."""

import math
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from jobs import job_of
from local_run import train
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.data import TensorDataset

import distplat
from distplat.strategies.loop.step_check import ModelDependence, has_compiled
from distplat.strategies.task import Task


def cross_entropy(outputs: Tensor, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(outputs, batch[1], reduction="sum")


def broadcast(*tensors: Tensor) -> Any:
    return torch.broadcast_tensors(*tensors)  # type: ignore[no-untyped-call]


FIGURES: dict[str, Callable[[Tensor, Any], Any]] = {
    "right": lambda outputs, batch: (outputs.argmax(1) == batch[1]).sum(),
    "right, a number": lambda outputs, batch: (outputs.argmax(1) == batch[1]).sum().item(),
    "percent": lambda outputs, batch: (
        100.0 * (outputs.argmax(1) == batch[1]).sum().item() / len(batch[1])
    ),
    "perplexity": lambda outputs, batch: cross_entropy(outputs, batch).exp().detach(),
    "right, by numpy": lambda outputs, batch: float(
        (outputs.detach().numpy().argmax(1) == batch[1].numpy()).sum()
    ),
    "right, of predictions": lambda outputs, batch: float(
        np.mean(outputs.argmax(1).numpy() == np.asarray(batch[1])) * 100
    ),
    "right, by Python": lambda outputs, batch: sum(
        predicted == target
        for predicted, target in zip(outputs.argmax(1).tolist(), batch[1].tolist(), strict=True)
    ),
    "perplexity, a number": lambda outputs, batch: math.exp(
        cross_entropy(outputs, batch).item() / len(outputs)
    ),
    "perplexity of a mean": lambda outputs, batch: math.exp(
        nn.functional.cross_entropy(outputs, batch[1]).item()
    ),
    "norm": lambda outputs, batch: outputs.data.norm(),
}
WEIGHTS: dict[str, Callable[[Tensor, Any], Any]] = {
    "samples": lambda outputs, batch: len(outputs),
    "elements": lambda outputs, batch: outputs.numel(),
    "labels": lambda outputs, batch: (batch[1] != 1).sum(),
    "labels, a number": lambda outputs, batch: float((batch[1] != 1).sum().item()),
    "of the type": lambda outputs, batch: (batch[1] != 1).sum().to(outputs),
    "ones": lambda outputs, batch: torch.ones_like(outputs).sum().detach(),
    "of all": lambda outputs, batch: broadcast(outputs, batch[1][:, None] != 1)[1].sum(),
    "labels, by numpy": lambda outputs, batch: int((batch[1].numpy() != 1).sum()),
    "labels, while predictions are shown": lambda outputs, batch: (
        outputs.argmax(1).tolist() and sum(label != 1 for label in batch[1].tolist())
    ),
    "one": lambda outputs, batch: max(1.0, 0.0 * (outputs[0, 0] > 99).sum().item()),
    "of samples": lambda outputs, batch: outputs.new_tensor(batch[1].tolist()).sum(),
}


@pytest.mark.parametrize("name", [*FIGURES, *WEIGHTS])
def test_warns_of_weight_that_depends_on_model(name: str, caplog: pytest.LogCaptureFixture) -> None:
    class Pair(Task):
        def model(self) -> nn.Module:
            return nn.Linear(3, 3)

        def train_data(self) -> Any:
            inputs = torch.randn(32, 3, generator=torch.Generator().manual_seed(3))
            return TensorDataset(inputs, inputs.argmax(1))

        def step(self, model: nn.Module, batch: Any) -> Any:
            outputs = model(batch[0])
            loss = cross_entropy(outputs, batch), (FIGURES | WEIGHTS)[name](outputs, batch)
            return loss if name < "o" else {"loss": loss}

    job = job_of("ring", 1, global_batch_size=16, steps=3, gradient_accumulation=2)
    train(job, Pair)
    warnings = caplog.text.count("The weight depends on the model's output")
    assert warnings == (name in FIGURES)


def test_number_of_compared_tensors_is_limited() -> None:
    """A step may convert each sample to Python separately."""
    dependence = ModelDependence()
    outputs, compared = nn.Linear(1, 1)(torch.ones(600, 1)), 0
    with dependence:
        for tensors in (outputs, torch.ones(600, 1)):
            _ = [row.tolist() for row in tensors]

    class Counts(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            nonlocal compared
            compared += 1
            return func(*args, **(kwargs or {}))

    with Counts():
        dependence.has(3.0, 600)
    assert compared < 1e5


def test_step_with_gather_is_checked_once() -> None:
    """The loss of a step with a gather is no mean over samples, so it is not checked."""
    watched: list[bool] = []

    class Gathers(Task):
        def model(self) -> nn.Module:
            return nn.Linear(3, 3)

        def train_data(self) -> Any:
            return TensorDataset(torch.ones(32, 3), torch.zeros(32, 3))

        def step(self, model: nn.Module, batch: Any) -> Any:
            watched.append(torch._C._len_torch_function_stack() > 0)
            outputs = model(batch[0])
            if len(watched) > 1:
                outputs = distplat.all_gather(outputs)
            return outputs.square().mean()

    train(job_of("ring", 1, global_batch_size=8, steps=4), Gathers)
    assert watched == [False, True, False, False]


def kl(outputs: Tensor) -> Tensor:
    return -0.5 * torch.sum(1 + outputs - outputs.exp())


SUMS: dict[str, Callable[[Tensor, Any], Any]] = {
    "a sum": cross_entropy,
    "a sum, by a module": lambda outputs, batch: nn.CrossEntropyLoss(reduction="sum")(
        outputs, batch[1]
    ),
    "an autoencoder's": lambda outputs, batch: cross_entropy(outputs, batch) + 0.1 * kl(outputs),
    "in a dict": lambda outputs, batch: {"loss": kl(outputs) + cross_entropy(outputs, batch)},
}
MEANS: dict[str, Callable[[Tensor, Any], Any]] = {
    "a mean": lambda outputs, batch: nn.functional.cross_entropy(outputs, batch[1]),
    "by samples": lambda outputs, batch: cross_entropy(outputs, batch) / len(outputs),
    "by a factor": lambda outputs, batch: cross_entropy(outputs, batch) * (1 / len(outputs)),
    "by samples, in place": lambda outputs, batch: cross_entropy(outputs, batch).div_(len(outputs)),
    "by shares": lambda outputs, batch: nn.functional.binary_cross_entropy_with_logits(
        outputs, torch.zeros_like(outputs), torch.full((1,), 1 / outputs.numel()), reduction="sum"
    ),
    "with a weight": lambda outputs, batch: (cross_entropy(outputs, batch), len(outputs)),
    "of features": lambda outputs, batch: nn.functional.mse_loss(
        outputs.mean(0), torch.ones(3), reduction="sum"
    ),
    "of shares": lambda outputs, batch: (
        outputs.square().mean(1) * torch.full((len(outputs),), 1 / len(outputs))
    ).sum(),
}


@pytest.mark.parametrize("name", [*SUMS, *MEANS])
def test_warns_of_summed_loss(name: str, caplog: pytest.LogCaptureFixture) -> None:
    class Summed(Task):
        def model(self) -> nn.Module:
            return nn.Linear(3, 3)

        def train_data(self) -> Any:
            inputs = torch.randn(32, 3, generator=torch.Generator().manual_seed(3))
            return TensorDataset(inputs, inputs.argmax(1))

        def step(self, model: nn.Module, batch: Any) -> Any:
            return (SUMS | MEANS)[name](model(batch[0]), batch)

    train(job_of("ring", 1, global_batch_size=16, steps=3, gradient_accumulation=2), Summed)
    assert caplog.text.count("by reduction='sum', which is taken for their mean") == (name in SUMS)


class StepTask(Task):
    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(1, 1))

    def train_data(self) -> Any:
        raise NotImplementedError

    def step(self, model: nn.Module, batch: Any) -> Any:
        return model(batch)


@pytest.mark.parametrize("where", ["attribute", "module", "model", "part", "nowhere"])
def test_detects_compiled_parts(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An earlier run may have compiled the part without the check."""
    compiled: Any = lambda outputs: outputs.sum()  # noqa: E731
    compiled._torchdynamo_orig_callable = compiled  # like torch.compile
    task = StepTask()
    model = task.model()
    if where == "attribute":
        monkeypatch.setattr(task, "loss_of", compiled, raising=False)
    elif where == "module":
        monkeypatch.setattr(sys.modules[__name__], "loss_of", compiled, raising=False)
    elif where == "part":
        model.get_submodule("0")._compiled_call_impl = compiled
    elif where == "model":
        inner, model = model, type("OptimizedModule", (nn.Module,), {})()
        model.add_module("_orig_mod", inner)
    assert has_compiled(task, model) == (where != "nowhere")
