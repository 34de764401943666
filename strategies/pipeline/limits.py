"""
Checks for what a pipeline does not support; each raises an error.

    before the run     losses with `weights`, unsupported batches and inputs
    in the first step  parameters that backward reaches but this rank does not train
    in every step      parameters that were frozen when the model was cut, and are now trained
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
"""By `id` of a parameter: its name, and a weak reference, since an `id` may be reused."""


def split_batch(task: Task, batch: Any) -> tuple[Any, Any]:
    """
    Split a batch into inputs for the first stage and targets for the last one.

    A dict, or a batch that the task passes to the model itself, is used as both.

    Raises:
        SpecError: the task does not define how the model is called with the batch.
    """
    if model_call_method(task) is not None:
        return Batch(batch), batch
    if isinstance(batch, Mapping):
        return Batch(batch if type(batch) is dict else dict(batch)), batch
    if isinstance(batch, list | tuple) and len(batch) == 2:
        return batch[0], batch[1]
    text = (
        f"a batch is {describe_value(batch)}, and the task does not say how the model is called "
        "with it"
    )
    hint = (
        "give a pair (inputs, targets) or a dict of the model's arguments, or write "
        "forward(model, batch)"
    )
    raise SpecError(Problem(("task",), text, hint))


def check_inputs(inputs: Any) -> Any:
    """
    Check the inputs of a model that is cut, and return them.

    Raises:
        SpecError: the inputs are not a tree of tensors and constants.
    """
    if isinstance(inputs, Tensor) or is_value(inputs):
        return inputs
    value = inputs.batch if isinstance(inputs, Batch) else inputs
    text = f"a pipeline takes tensors as inputs, train_data gives {describe_value(value)}"
    hint = "give a tensor, or tensors in lists, tuples and dicts, or set `pipeline: 1`"
    raise pipeline_error(text, hint)


def refuse_weights(task: Task) -> None:
    """
    Check that the loss has no `weights`, which all ranks need before the first forward.

    Raises:
        SpecError: the task has `weights`.
    """
    if overrides(type(task), "weights"):
        text = f"{type(task).__name__}.weights() is called before a step's first forward, and "
        text += "`hybrid` loads micro-batches one by one during the step"
        raise SpecError(Problem(("task",), text, "use `strategy: ring` or `strategy: ps-sync`"))


class GradientReach:
    """
    Checks that backward reaches no trainable parameter that this rank does not train.

    Args:
        module: this rank's part of the model.
        task: the loss may use parameters of the task.
        names: of the whole model's parameters; see `names_of`.
    """

    def __init__(self, module: nn.Module, task: Task, names: NamesById) -> None:
        self._own = {id(p) for p in module.parameters()}
        self._frozen = [(n, p) for n, p in module.named_parameters() if not p.requires_grad]
        self._task, self._names = task, names
        self._is_first_step = True

    def check(self, outputs: Sequence[Tensor]) -> None:
        """
        Check a virtual stage's outputs before backward; in the first step only.

        Parameters of neither the model nor the task are ignored, as in plain torch.

        Raises:
            SpecError: the outputs depend on a parameter that this rank does not train.
        """
        if not self._is_first_step:
            return
        of_task = {id(p): n for n, p in task_parameters(self._task, nn.Module()).items()}
        for leaf in leaves(outputs):
            if id(leaf) in self._own:
                continue
            if id(leaf) in of_task:
                text = f"the loss uses a parameter of the task: `self.{of_task[id(leaf)]}`"
                hint = "make it a part of the model's last layer, or use `ring` or `ps-sync`"
                raise pipeline_error(text, hint)
            name, parameter = self._names.get(id(leaf), ("", lambda: None))
            if parameter() is leaf:
                text = f"a stage uses {name}, which is in none of its layers"
                raise pipeline_error(
                    text, "hold it in the layer that uses it, or set `pipeline: 1`"
                )

    def finish_step(self) -> None:
        """
        Check for unfrozen parameters; called after a step's backwards.

        Raises:
            SpecError: a parameter that was frozen now requires gradients.
        """
        self._is_first_step = False
        unfrozen = [name for name, parameter in self._frozen if parameter.requires_grad]
        if unfrozen:
            text = f"parameters were unfrozen during the run: {', '.join(unfrozen)}"
            hint = "`hybrid` cannot train them: unfreeze them in `model()`, or use `ring`"
            raise SpecError(Problem(("strategy", "name"), text, hint))


def names_of(model: nn.Module) -> NamesById:
    """Return the names of a model's parameters, without references that keep them alive."""
    return {id(p): (name, weakref.ref(p)) for name, p in model.named_parameters()}


def leaves(outputs: Sequence[Tensor]) -> Iterator[Tensor]:
    """Yield the tensors whose gradients a backward from all outputs would accumulate."""
    nodes, visited = [output.grad_fn for output in outputs], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in visited:
            continue
        visited.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            yield leaf
        nodes += [following for following, _ in node.next_functions]


def pipeline_error(message: str, hint: str) -> SpecError:
    """Return an error for the option `pipeline`."""
    return SpecError(Problem(("strategy", "pipeline"), message, hint))
