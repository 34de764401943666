"""
How a model is called on a batch: `model(inputs)` for a pair, else by a method of the task.

The task's `forward`, or its `step`, gets the model and a whole batch. If the model is split into
stages, the first and the last stage each run this method in their own process. Up to the model's
call both must compute the same.
"""

from __future__ import annotations

import inspect
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import nn
from typing_extensions import override

from distplat.platform.errors import Problem, SpecError
from distplat.strategies.task import Task, method_of, model_call_method
from distplat.strategies.torch_compat import RandomOpWatch


class Batch(NamedTuple):
    """A whole batch as a model's input, instead of the inputs of a pair."""

    batch: Any


class ModelCall:
    """
    Calls a model, or a stage that replaces it.

    Args:
        task: its method defines the call; None: a model is called with inputs only.
    """

    def __init__(self, task: Task | None = None) -> None:
        self._task = task
        self._method = "forward" if task is None else model_call_method(task) or "forward"

    def __call__(self, model: nn.Module, inputs: Any) -> Any:
        """Call a model with inputs, or with a `Batch` by the task's method."""
        if not isinstance(inputs, Batch):
            return model(inputs)
        assert self._task is not None, "a batch comes from a task's data"
        return method_of(self._task, self._method)(model, inputs.batch)

    @property
    def holders(self) -> tuple[object, ...]:
        """The task, if its own method calls the model: the call may change its attributes."""
        return () if self._task is None or model_call_method(self._task) is None else (self._task,)

    def of_part(self, model: nn.Module, inputs: Any) -> Any:
        """
        Call a stage of a split model.

        Raises:
            SpecError: the task draws random numbers before the model's call, and another stage
                would draw different ones.
        """
        if (
            self._task is None
            or model_call_method(self._task) is None
            or not isinstance(inputs, Batch)
        ):
            return self(model, inputs)
        watch = ExitStack()
        watch.enter_context(RandomOpWatch(self._refuse_draws))
        handle = model.register_forward_pre_hook(lambda *_: watch.close())
        try:
            return self(model, inputs)
        finally:
            handle.remove()
            watch.close()

    def _refuse_draws(self) -> None:
        name = f"{type(self._task).__name__}.{self._method}()"
        text = f"{name} draws random numbers before it calls the model, and runs on two stages"
        hint = "draw them in collate(), or in the model's parts, or set `pipeline: 1`"
        raise SpecError(Problem(("task",), text, hint))

    def __deepcopy__(self, memo: object) -> ModelCall:
        """Return itself: profiling copies layers, and a task may hold its data."""
        return self


class BatchInput(nn.Module):
    """
    The model's first layer, which also accepts a batch that is a mapping.

    Args:
        module: of the layer.
        model: its only argument is taken from the mapping; None: the layer gets the mapping.
    """

    def __init__(self, module: nn.Module, model: nn.Module | None) -> None:
        super().__init__()
        self.module = module
        names = [] if model is None else [*inspect.signature(model.forward).parameters]
        self._argument = next(iter(names), None)

    @override
    def forward(self, inputs: Any) -> Any:
        """
        Return the layer's outputs.

        Raises:
            SpecError: the mapping has other keys than the model's one argument.
        """
        if isinstance(inputs, Batch):
            name, inputs = self._argument, inputs.batch
            if name is not None and [*inputs] != [name]:
                text = f"the model takes `{name}`, and a batch is a dict of {', '.join(inputs)}"
                hint = "give pairs (inputs, targets), or a `stages(model)` whose first takes a dict"
                raise SpecError(Problem(("strategy", "pipeline"), text, hint))
            inputs = inputs if name is None else inputs[name]
        return self.module(inputs)


def torch_modes() -> dict[str, object]:
    """Return the state of torch's context managers: gradients, inference mode, autocast."""
    return {
        "torch.no_grad or its like": torch.is_grad_enabled(),
        "torch.inference_mode": torch.is_inference_mode_enabled(),
        "torch.autocast": [
            (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
            for device in ("cpu", "cuda")
        ],
    }


def changed_modes(before: dict[str, object]) -> str:
    """Return the names of contexts entered since `torch_modes()`, joined; empty: none."""
    return " and ".join(name for name, mode in torch_modes().items() if mode != before[name])
