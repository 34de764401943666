"""
Warnings of what a `step` gives as its loss: the model may not run on the halves of a batch.

A weight that depends on what the model gave may be a figure:

    words    labels != -100 ── sum ──▶ a weight: of the batch alone
    right    logits ── argmax == labels ── sum ──▶ of the parameters: a number of right answers

Gradients do not tell, as argmax and comparisons have none. So each call of torch in one micro-batch
is looked at: what it gives depends on parameters if something that it is given does.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary
from typing_extensions import override

from distplat.strategies.loop.containers import tensors_in
from distplat.strategies.loop.losses import BatchResult
from distplat.strategies.task import Task
from distplat.strategies.torch_compat import is_compiled

_IGNORED_LABEL = -100
"""`ignore_index` of torch's cross entropy, and of Hugging Face's models."""
_READ = {"item", "__float__", "__int__", "__index__"}
"""Methods that give a number of Python's."""
_LEAVES = {"numpy", "tolist", "__array__"}
"""Methods that give values to numpy or Python, where nobody sees what is made of them."""
_LEFT_ELEMENTS, _LEFT_TENSORS = 1 << 16, 64
"""Of all tensors of which copies are kept for that; each that depends is compared with the rest."""
_EXPONENTS = 1e-3, 700.0
"""Losses of which a perplexity can be told from 1, and is finite."""
_ADDS = {"add", "iadd", "neg", "radd", "rsub", "sub"}
_OF_FIRST = {"to", "type_as", "expand_as", "view_as", "reshape_as"}
"""Calls that take no values of their later arguments."""


class ModelDependence(TorchFunctionMode):
    """
    While entered, notes which tensors and numbers depend on trained parameters.

    Numpy and Python are not looked into. Of what leaves torch for them, the number of predictions
    that are as the labels is compared.
    """

    def __init__(self) -> None:
        super().__init__()
        self._found = WeakIdKeyDictionary()  #: such tensors that have no gradient
        self._numbers: set[float] = set()
        self._left: dict[bool, list[Tensor]] = {True: [], False: []}  #: for numpy; which depend

    @override
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Make a call of torch, and note what it gives."""
        depends = self._depends(func, args, kwargs or {})
        result = func(*args, **(kwargs or {}))
        if depends:
            for one in tensors_in(result):
                if not one.requires_grad:
                    self._found[one] = True
            if getattr(func, "__name__", "") in _READ and isinstance(result, int | float):
                self._numbers.add(float(result))
        if getattr(func, "__name__", "") in _LEAVES and args and isinstance(args[0], Tensor):
            self._leaves(args[0], depends=depends)
        return result

    def _leaves(self, tensor: Tensor, *, depends: bool) -> None:
        kept = sum(one.numel() for some in self._left.values() for one in some)
        few = len(self._left[depends]) < _LEFT_TENSORS and kept + tensor.numel() <= _LEFT_ELEMENTS
        if few and tensor.layout is torch.strided:
            self._left[depends].append(tensor.detach().cpu().clone())

    def _right(self) -> Iterator[float]:
        """Count the predictions that are as labels, of which both have left torch."""
        dependent = self._left[True]
        chosen = [one.argmax(1) for one in dependent if one.ndim > 1 and one.is_floating_point()]
        for one, other in itertools.product([*dependent, *chosen], self._left[False]):
            if one.shape == other.shape:
                yield float((one == other).sum())

    def _depends(
        self, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> bool:
        name = getattr(func, "__name__", "")
        if name.endswith("_like") or name.startswith("new_"):
            return False  # of the shape alone
        if name == "broadcast_tensors":
            return False  # each is of one of them, and by the shapes of the others
        read = args[:1] if name in _OF_FIRST else (*args, *kwargs.values())
        return any(map(self._is_found, tensors_in(read)))

    def _is_found(self, tensor: Tensor) -> bool:
        trained = tensor.requires_grad and (not tensor.is_leaf or isinstance(tensor, nn.Parameter))
        return trained or tensor in self._found

    def has(self, weight: object, samples: int) -> bool:
        """
        Say whether a number depends on parameters: itself, as a share or a percentage, or as `exp`
        of one, which a perplexity is.

        Args:
            weight: a tensor, or a number of Python's.
            samples: of the micro-batch.
        """
        if isinstance(weight, Tensor):
            return self._is_found(weight)
        if not isinstance(weight, int | float | np.generic) or weight == samples:
            return False
        numbers = {*self._numbers, *self._right()}
        figures = [one * by for one in numbers for by in (1, 100, 1 / samples, 100 / samples)]
        figures += [math.exp(one) for one in figures if _EXPONENTS[0] < one < _EXPONENTS[1]]
        return any(abs(float(weight) - one) <= 1e-6 * abs(one) for one in figures)

    def warning(self, made: BatchResult, samples: int) -> str | None:
        """
        Say that what a `step` gives beside its loss seems to be a figure, no weight; None: no.

        Args:
            made: what task and model made of a micro-batch.
            samples: of it.
        """
        outputs = made.outputs
        pair = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if not made.term.weighted or not isinstance(pair, list | tuple) or len(pair) != 2:
            return None
        if not self.has(pair[1], samples):
            return None
        return (
            f"step() gives a pair, a loss and {made.term.weight:g} for {samples} samples, which is "
            "taken as (sum, weight): the loss is divided by it. It depends on what the model gave, "
            "as a number of right answers does: if it is such a figure, return the loss alone, or "
            '{"loss": loss, "right": right}. It is a weight only where the loss is a sum of so '
            "many terms, which the model has chosen"
        )


class SumTrace(TorchFunctionMode):
    """While entered, notes which scalars are sums that a loss function of torch was asked for."""

    def __init__(self) -> None:
        super().__init__()
        self._rows = WeakIdKeyDictionary()  #: of each the rows of what was summed up

    @override
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Make a call of torch, and note a sum; with another one added it still is one."""
        result = func(*args, **(kwargs or {}))
        if not isinstance(result, Tensor) or result.ndim:
            return result
        tensors, asked = [one for one in args if isinstance(one, Tensor)], kwargs or {}
        weighted = asked.get("weight") is not None  # by shares of the batch, maybe
        if asked.get("reduction") == "sum" and tensors and tensors[0].ndim and not weighted:
            self._rows[result] = len(tensors[0])
        elif getattr(func, "__name__", "").strip("_") in _ADDS:
            known = [self._rows[one] for one in tensors if one in self._rows]
            if known:
                self._rows[result] = known[0]
        elif result in self._rows:  # by a call in place: a division by their number
            del self._rows[result]
        return result

    def warning(self, made: BatchResult, samples: int) -> str | None:
        """
        Say that a loss is a sum over samples; None: nobody can tell.

        Args:
            made: what task and model made of a micro-batch.
            samples: of it.
        """
        loss = made.term.value
        summed = loss in self._rows and self._rows[loss] == samples > 1
        if made.term.weighted or not summed:
            return None
        return (
            f"step() gives a sum over {samples} samples, by reduction='sum', which is taken for "
            "their mean: the result depends on the number of workers and micro-batches. Give the "
            "mean, or return (sum, number of samples)"
        )


def has_compiled(task: Task, model: nn.Module) -> bool:
    """
    Say whether a task calls what was compiled, maybe by a run before it in this process.

    Dynamo compiles it anew while somebody looks at the calls, and fails with `fullgraph`.
    """
    module = sys.modules.get(type(task).__module__)
    holders = [task, *type(task).__mro__, *([] if module is None else [module])]
    values = [one for holder in holders for one in vars(holder).values()]
    return any(map(is_compiled, (*values, *model.modules())))


def weight_warning(made: BatchResult, samples: int) -> str | None:
    """
    Say that what a `step` gives beside its loss seems to be a figure and no weight; None: no.

    Args:
        made: what task and model made of a micro-batch.
        samples: of it.
    """
    weight = made.term.weight
    if not made.term.weighted or not 0.0 < weight < 1.0 or samples == 1:
        return None
    return (
        f"step() gives a pair, a loss and {weight:g} for {samples} samples, which is taken as "
        "(sum, weight): the loss is divided by it. If it is a figure such as an accuracy, return "
        'the loss alone, or {"loss": loss, "accuracy": accuracy}'
    )


def labels_warning(made: BatchResult, samples: int) -> str | None:
    """
    Warn of a loss of the model's own where samples have different numbers of labels.

    The loss of a Hugging Face model is a mean over the labels that are not -100.

    Args:
        made: what task and model made of a batch.
        samples: of it.

    Returns:
        None: samples have as many labels each, or nobody can tell.
    """
    labels = made.targets.get("labels") if isinstance(made.targets, Mapping) else None
    own = made.outputs.get("loss") if isinstance(made.outputs, Mapping) else None
    if made.term.weighted or not isinstance(own, Tensor) or own is not made.term.value:
        return None
    if not isinstance(labels, Tensor) or labels.ndim < 2 or len(labels) != samples:
        return None
    counts = (labels != _IGNORED_LABEL).flatten(1).sum(1)
    least, most = int(counts.min()), int(counts.max())
    if least == most:
        return None
    return (
        f"the loss is the model's own, and samples of a batch have {least} to {most} labels that "
        "are not -100: a mean over labels depends on the number of workers and micro-batches. "
        "Return (sum, weight) instead: the loss times the number of labels that it is a mean over, "
        "and that number"
    )
