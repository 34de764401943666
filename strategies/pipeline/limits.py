"""
What a pipeline cannot do, found and named: nothing that a stage leaves out goes unsaid.

    before the run     SyncBatchNorm, inputs of other forms; what layers compute: `trial.py`
    in the first step  parameters that a backward reaches and no optimizer of this rank has
    in every step      parameters that were frozen when the model was cut, and no longer are
"""

import weakref
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from distplat.platform.errors import Problem, SpecError
from distplat.strategies.pipeline.trial import leaves
from distplat.strategies.task import Task

_DEPTH = 3
"""Containers within containers of a task in which parameters are looked for."""


def entering(inputs: Any) -> Tensor:
    """
    Check what the data gives as inputs of a model that is cut.

    Raises:
        SpecError: it is not one tensor.
    """
    if isinstance(inputs, Tensor):
        return inputs
    text = f"a pipeline takes one tensor as inputs, train_data gives {type(inputs).__name__}"
    raise _refused(text, "put them into one tensor, or set `pipeline: 1`")


def refuse(model: nn.Module) -> None:
    """
    Refuse modules that need all replicas' samples at once.

    Raises:
        SpecError: names each.
    """
    found = [n or "the model" for n, m in model.named_modules() if isinstance(m, nn.SyncBatchNorm)]
    if found:
        text = f"SyncBatchNorm is not computed over replicas under `hybrid`: {', '.join(found)}"
        hint = "use BatchNorm, or `strategy: ring`"
        raise SpecError(Problem(("strategy", "name"), text, hint))


class Reached:
    """
    Watches that backward reaches the rank's own parameters, and all that it is to train.

    Args:
        modules: of this rank.
        task: whose loss may use parameters of its own.
        names: of the whole model's parameters; see `names_of`.
    """

    def __init__(
        self, modules: Iterable[nn.Module], task: Task, names: "Mapping[int, Named]"
    ) -> None:
        own = {n: p for module in modules for n, p in module.named_parameters()}
        self._own = {id(p) for p in own.values()}
        self._frozen = [(n, p) for n, p in own.items() if not p.requires_grad]
        self._task, self._names = task, names
        self._looks = True

    def look(self, outputs: Tensor) -> None:
        """
        Look at what a place gives, before it is differentiated; in the first step only.

        Parameters that neither the model nor the task has are left as they are, as in plain torch.

        Raises:
            SpecError: it depends on a parameter that this rank does not train.
        """
        if not self._looks:
            return
        of_task = dict(_tensors_in(vars(self._task), "", _DEPTH))
        for leaf in leaves(outputs):
            if id(leaf) in self._own:
                continue
            if id(leaf) in of_task:
                text = f"the loss uses a parameter that the task keeps: `self.{of_task[id(leaf)]}`"
                hint = "make it a part of the model's last layer, or use `ring` or `ps-sync`"
                raise _refused(text, hint)
            known = self._names.get(id(leaf))
            if known is not None and known.ref() is leaf:
                text = f"a stage uses {known.name}, which is in none of its layers"
                raise _refused(text, "hold it in the layer that uses it, or set `pipeline: 1`")

    def stepped(self) -> None:
        """
        Be told that a step's gradients are there.

        Raises:
            SpecError: a parameter that was frozen now asks for gradients.
        """
        self._looks = False
        thawed = [name for name, parameter in self._frozen if parameter.requires_grad]
        if thawed:
            text = f"parameters were thawed during the run: {', '.join(thawed)}"
            hint = "`hybrid` cannot take them in: thaw them in `model()`, or use `ring`"
            raise SpecError(Problem(("strategy", "name"), text, hint))


class Named:
    """A parameter's name, as long as the parameter is there."""

    def __init__(self, name: str, parameter: nn.Parameter) -> None:
        self.name, self.ref = name, weakref.ref(parameter)


def names_of(model: nn.Module) -> dict[int, Named]:
    """Give the names of a model's parameters, by `id`; keeps none of them alive."""
    return {id(p): Named(name, p) for name, p in model.named_parameters()}


def _tensors_in(value: Any, name: str, depth: int) -> Iterator[tuple[int, str]]:
    """Give tensors by `id`, with their names, in what a task holds."""
    if isinstance(value, Tensor):
        yield id(value), name
    elif isinstance(value, nn.Module):
        yield from ((id(p), f"{name}.{own}") for own, p in value.named_parameters())
    elif depth and isinstance(value, dict | list | tuple):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in items:
            yield from _tensors_in(item, f"{name}.{key}" if name else str(key), depth - 1)


def _refused(message: str, hint: str) -> SpecError:
    return SpecError(Problem(("strategy", "pipeline"), message, hint))
