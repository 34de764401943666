"""
What a pipeline cannot do, found and named: nothing that a stage leaves out goes unsaid.

    before the run     losses with `weights`, batches and inputs of other forms
    in the first step  parameters that a backward reaches and no optimizer of this rank has
    in every step      parameters that were frozen when the model was cut, and no longer are
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from distplat.platform.errors import Problem, SpecError
from distplat.strategies.loop.task_settings import task_parameters
from distplat.strategies.model.model_call import Batch
from distplat.strategies.pipeline.values import is_value
from distplat.strategies.task import Task, describe_value, model_call_method, overrides

NamesById = Mapping[int, tuple[str, Callable[[], Tensor | None]]]
"""By `id` of a parameter: its name, and a weak reference, for an `id` may be given out again."""


def as_pair(task: Task, batch: Any) -> tuple[Any, Any]:
    """
    Take a batch apart: the first stage gets the inputs, the last one the targets.

    A batch that is no pair, or that the task hands to the model itself, is both.

    Raises:
        SpecError: nobody says how the model is called with it.
    """
    if model_call_method(task) is not None:
        return Batch(batch), batch
    if isinstance(batch, Mapping):
        return Batch(batch if type(batch) is dict else dict(batch)), batch
    if isinstance(batch, list | tuple) and len(batch) == 2:
        return batch[0], batch[1]
    text = f"a batch is {describe_value(batch)}, and nobody says how the model is called with it"
    hint = (
        "give a pair (inputs, targets) or a dict of the model's arguments, or write "
        "forward(model, batch)"
    )
    raise SpecError(Problem(("task",), text, hint))


def check_inputs(inputs: Any) -> Any:
    """
    Check what the data gives as inputs of a model that is cut.

    Raises:
        SpecError: it is no tree of tensors and constants.
    """
    if isinstance(inputs, Tensor) or is_value(inputs):
        return inputs
    given = inputs.batch if isinstance(inputs, Batch) else inputs
    text = f"a pipeline takes tensors as inputs, train_data gives {describe_value(given)}"
    hint = "give a tensor, or tensors in lists, tuples and dicts, or set `pipeline: 1`"
    raise refused(text, hint)


def refuse_weights(task: Task) -> None:
    """
    Refuse a loss whose weights all ranks are to know before the first forward.

    Raises:
        SpecError: the task has `weights`.
    """
    if overrides(type(task), "weights"):
        text = f"{type(task).__name__}.weights() is asked before a step's first forward, and "
        text += "`hybrid` reads a micro-batch when its turn comes"
        raise SpecError(Problem(("task",), text, "use `strategy: ring` or `strategy: ps-sync`"))


class GradientReach:
    """
    Watches that backward reaches the rank's own parameters, and all that it is to train.

    Args:
        module: this rank's part of the model.
        task: whose loss may use parameters of its own.
        names: of the whole model's parameters; see `names_of`.
    """

    def __init__(self, module: nn.Module, task: Task, names: NamesById) -> None:
        self._own = {id(p) for p in module.parameters()}
        self._frozen = [(n, p) for n, p in module.named_parameters() if not p.requires_grad]
        self._task, self._names = task, names
        self._looks = True

    def look(self, outputs: Sequence[Tensor]) -> None:
        """
        Look at what a virtual stage gives, before it is differentiated; in the first step only.

        Parameters that neither the model nor the task has are left as they are, as in plain torch.

        Raises:
            SpecError: it depends on a parameter that this rank does not train.
        """
        if not self._looks:
            return
        of_task = {id(p): n for n, p in task_parameters(self._task, nn.Module()).items()}
        for leaf in leaves(outputs):
            if id(leaf) in self._own:
                continue
            if id(leaf) in of_task:
                text = f"the loss uses a parameter that the task keeps: `self.{of_task[id(leaf)]}`"
                hint = "make it a part of the model's last layer, or use `ring` or `ps-sync`"
                raise refused(text, hint)
            name, parameter = self._names.get(id(leaf), ("", lambda: None))
            if parameter() is leaf:
                text = f"a stage uses {name}, which is in none of its layers"
                raise refused(text, "hold it in the layer that uses it, or set `pipeline: 1`")

    def stepped(self) -> None:
        """
        Called when a step's gradients are there.

        Raises:
            SpecError: a parameter that was frozen now asks for gradients.
        """
        self._looks = False
        unfrozen = [name for name, parameter in self._frozen if parameter.requires_grad]
        if unfrozen:
            text = f"parameters were unfrozen during the run: {', '.join(unfrozen)}"
            hint = "`hybrid` cannot take them in: unfreeze them in `model()`, or use `ring`"
            raise SpecError(Problem(("strategy", "name"), text, hint))


def names_of(model: nn.Module) -> NamesById:
    """Give the names of a model's parameters; keeps none of them alive."""
    return {id(p): (name, weakref.ref(p)) for name, p in model.named_parameters()}


def leaves(outputs: Sequence[Tensor]) -> Iterator[Tensor]:
    """Give the tensors to which a backward from all outputs would add gradients."""
    waiting, seen = [one.grad_fn for one in outputs], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            yield leaf
        waiting += [following for following, _ in node.next_functions]


def refused(message: str, hint: str) -> SpecError:
    """Give the error that names the field `pipeline`."""
    return SpecError(Problem(("strategy", "pipeline"), message, hint))
