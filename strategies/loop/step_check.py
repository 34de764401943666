"""
Warnings about the loss of a `step`, where the model cannot run on the halves of a batch.

A weight that depends on the model's output is probably a metric:

    words    labels != -100 ── sum ──▶ a weight: depends on the batch only
    right    logits ── argmax == labels ── sum ──▶ a metric: depends on the parameters

Autograd does not track this dependence, as argmax and comparisons have no gradient. So each torch
call of one micro-batch is traced: its result depends on parameters if an argument does.
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
"""Methods that return a Python number."""
_LEAVES = {"numpy", "tolist", "__array__"}
"""Methods that convert to numpy or Python, whose computations are not traced."""
_LEFT_ELEMENTS, _LEFT_TENSORS = 1 << 16, 64
"""Limits of elements and tensors that are copied when they leave torch, and compared in pairs."""
_EXPONENTS = 1e-3, 700.0
"""Range of losses whose perplexity is distinguishable from 1 and finite."""
_ADDS = {"add", "iadd", "neg", "radd", "rsub", "sub"}
_OF_FIRST = {"to", "type_as", "expand_as", "view_as", "reshape_as"}
"""Calls whose result does not depend on the values of later arguments."""


class ModelDependence(TorchFunctionMode):
    """
    While entered, records which tensors and numbers depend on trained parameters.

    Computations in numpy and Python are not traced. For tensors that leave torch, the number of
    predictions that equal labels counts as dependent.
    """

    def __init__(self) -> None:
        super().__init__()
        self._found = WeakIdKeyDictionary()  #: dependent tensors without a gradient
        self._numbers: set[float] = set()
        self._left: dict[bool, list[Tensor]] = {
            True: [],
            False: [],
        }  #: tensors for numpy; True: dependent

    @override
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call a torch function, and record whether its result depends on parameters."""
        depends = self._depends(func, args, kwargs or {})
        result = func(*args, **(kwargs or {}))
        if depends:
            for tensor in tensors_in(result):
                if not tensor.requires_grad:
                    self._found[tensor] = True
            if getattr(func, "__name__", "") in _READ and isinstance(result, int | float):
                self._numbers.add(float(result))
        if getattr(func, "__name__", "") in _LEAVES and args and isinstance(args[0], Tensor):
            self._record_left(args[0], depends=depends)
        return result

    def _record_left(self, tensor: Tensor, *, depends: bool) -> None:
        total = sum(copy.numel() for copies in self._left.values() for copy in copies)
        fits = len(self._left[depends]) < _LEFT_TENSORS and total + tensor.numel() <= _LEFT_ELEMENTS
        if fits and tensor.layout is torch.strided:
            self._left[depends].append(tensor.detach().cpu().clone())

    def _correct_counts(self) -> Iterator[float]:
        """Count correct predictions in pairs of predictions and labels that have left torch."""
        dependent = self._left[True]
        classes = [
            left.argmax(1) for left in dependent if left.ndim > 1 and left.is_floating_point()
        ]
        for predictions, labels in itertools.product([*dependent, *classes], self._left[False]):
            if predictions.shape == labels.shape:
                yield float((predictions == labels).sum())

    def _depends(
        self, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> bool:
        name = getattr(func, "__name__", "")
        if name.endswith("_like") or name.startswith("new_"):
            return False  # depends on the shape only
        if name == "broadcast_tensors":
            return False  # each result has the values of one argument
        read = args[:1] if name in _OF_FIRST else (*args, *kwargs.values())
        return any(map(self._is_found, tensors_in(read)))

    def _is_found(self, tensor: Tensor) -> bool:
        trained = tensor.requires_grad and (not tensor.is_leaf or isinstance(tensor, nn.Parameter))
        return trained or tensor in self._found

    def has(self, weight: object, samples: int) -> bool:
        """
        Return whether a number depends on parameters: directly, as a fraction or percentage, or as
        `exp` of one of these, such as a perplexity.

        Args:
            weight: a tensor or a Python number.
            samples: number of samples in the micro-batch.
        """
        if isinstance(weight, Tensor):
            return self._is_found(weight)
        if not isinstance(weight, int | float | np.generic) or weight == samples:
            return False
        numbers = {*self._numbers, *self._correct_counts()}
        values = [n * factor for n in numbers for factor in (1, 100, 1 / samples, 100 / samples)]
        values += [math.exp(value) for value in values if _EXPONENTS[0] < value < _EXPONENTS[1]]
        return any(abs(float(weight) - value) <= 1e-6 * abs(value) for value in values)

    def warning(self, result: BatchResult, samples: int) -> str | None:
        """
        Return a warning that the weight of a `step` is probably a metric; None: no warning.

        Args:
            result: result of a micro-batch.
            samples: number of samples in the micro-batch.
        """
        outputs = result.outputs
        pair = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if not result.term.weighted or not isinstance(pair, list | tuple) or len(pair) != 2:
            return None
        if not self.has(pair[1], samples):
            return None
        weight = result.term.weight
        return (
            f"step() gives a pair, a loss and {weight:g} for {samples} samples, which is taken as "
            "(sum, weight): the loss is divided by the weight. The weight depends on the model's "
            "output, as a number of correct predictions does: if it is such a metric, return the "
            'loss alone, or {"loss": loss, "right": right}. It is a valid weight only if the loss '
            "is a sum over this number of terms, which the model selects"
        )


class SumTrace(TorchFunctionMode):
    """While entered, records which scalars are sums by a torch loss with reduction='sum'."""

    def __init__(self) -> None:
        super().__init__()
        self._rows = WeakIdKeyDictionary()  #: scalar -> number of rows in the sum

    @override
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call a torch function, and record sums; a sum of sums is a sum."""
        result = func(*args, **(kwargs or {}))
        if not isinstance(result, Tensor) or result.ndim:
            return result
        tensors, options = [arg for arg in args if isinstance(arg, Tensor)], kwargs or {}
        weighted = options.get("weight") is not None  # weights may be fractions of the batch
        if options.get("reduction") == "sum" and tensors and tensors[0].ndim and not weighted:
            self._rows[result] = len(tensors[0])
        elif getattr(func, "__name__", "").strip("_") in _ADDS:
            rows = [self._rows[tensor] for tensor in tensors if tensor in self._rows]
            if rows:
                self._rows[result] = rows[0]
        elif result in self._rows:  # in-place call, such as a division by the number of rows
            del self._rows[result]
        return result

    def warning(self, result: BatchResult, samples: int) -> str | None:
        """
        Return a warning that a loss is a sum over samples; None: no warning.

        Args:
            result: result of a micro-batch.
            samples: number of samples in the micro-batch.
        """
        loss = result.term.value
        summed = loss in self._rows and self._rows[loss] == samples > 1
        if result.term.weighted or not summed:
            return None
        return (
            f"step() gives a sum over {samples} samples, by reduction='sum', which is taken for "
            "their mean: the result depends on the number of workers and micro-batches. Return the "
            "mean, or (sum, number of samples)"
        )


def has_compiled(task: Task, model: nn.Module) -> bool:
    """
    Return whether a task may call a compiled function or module.

    Under a `TorchFunctionMode` Dynamo would recompile it, and fail with `fullgraph`.
    """
    module = sys.modules.get(type(task).__module__)
    holders = [task, *type(task).__mro__, *([] if module is None else [module])]
    values = [value for holder in holders for value in vars(holder).values()]
    return any(map(is_compiled, (*values, *model.modules())))


def weight_warning(result: BatchResult, samples: int) -> str | None:
    """
    Return a warning that the weight of a `step` is a fraction, probably a metric; None: no warning.

    Args:
        result: result of a micro-batch.
        samples: number of samples in the micro-batch.
    """
    weight = result.term.weight
    if not result.term.weighted or not 0.0 < weight < 1.0 or samples == 1:
        return None
    return (
        f"step() gives a pair, a loss and {weight:g} for {samples} samples, which is taken as "
        "(sum, weight): the loss is divided by it. If it is a metric such as an accuracy, return "
        'the loss alone, or {"loss": loss, "accuracy": accuracy}'
    )


def labels_warning(result: BatchResult, samples: int) -> str | None:
    """
    Return a warning about a model's own loss if samples have different numbers of labels.

    The loss of a Hugging Face model is a mean over the labels that are not -100.

    Args:
        result: result of a batch.
        samples: number of samples in the batch.

    Returns:
        None: all samples have the same number of labels, or the number is unknown.
    """
    labels = result.targets.get("labels") if isinstance(result.targets, Mapping) else None
    loss = result.outputs.get("loss") if isinstance(result.outputs, Mapping) else None
    if result.term.weighted or not isinstance(loss, Tensor) or loss is not result.term.value:
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
