"""
Warnings about losses and metrics that are not means over the samples of a batch.

A loss that is not a mean depends on how the batch is split, so on the number of workers and
micro-batches. The check calls the task's `loss` or `metrics` for each half of a batch, with the
model's outputs for the whole batch. A mean over the whole batch is the mean of the two results.
"""

from __future__ import annotations

import copy
import logging
import math
import random
from collections import OrderedDict, UserDict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import MethodType
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from distplat.strategies.loop.checks import has_methods
from distplat.strategies.loop.containers import items_in, rebuilt, tensors_in
from distplat.strategies.loop.loss_state import LossState, NewState, state_warning
from distplat.strategies.loop.losses import BatchResult, EvalBatch
from distplat.strategies.loop.row_check import rows_of, rows_warning
from distplat.strategies.loop.seeding import preserve_rng_state, rng_states
from distplat.strategies.loop.step_check import (
    ModelDependence,
    SumTrace,
    has_compiled,
    labels_warning,
    weight_warning,
)
from distplat.strategies.loop.task_settings import task_modules
from distplat.strategies.task import Task, has_step
from distplat.strategies.torch_compat import frames_compiled

logger = logging.getLogger(__name__)

_TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4}
"""Relative tolerance, by the coarsest dtype of outputs and loss."""
_COARSE = 3e-2
"""Relative tolerance of 16-bit dtypes."""
_FIRST_STEPS = 3
"""Number of steps whose losses are checked, and of batches whose metrics are checked."""
_MAX_COPIED_ELEMENTS = 1 << 20
"""Size limit of the task's tensors that are copied, as `loss()` may write into them."""
_CONSUMED = (Iterator, torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
"""Types whose state a second call of `loss()` would advance."""
_CONTAINERS = (list, dict, OrderedDict, set, deque)
_SCALARS = (str, bytes, int, float, complex, type(None))


class LossValue(NamedTuple):
    """The result of `loss()` for some samples."""

    sum: float
    weight: float | None
    """None: the result is a scalar, which is taken as a mean."""


class MeanCheck:
    """
    Checks the losses of a run's first steps, and its first metrics; warns once about each.

    For a task with a `step`, the loss is not computed for halves of a batch: the model would run
    again, with side effects that cannot be undone. The operations of a later step are traced
    instead.

    Args:
        task: the user's task.
        model: the task's model.
    """

    def __init__(self, task: Task, model: nn.Module) -> None:
        self._task, self._model = task, model
        self._checked_steps: set[int] = set()
        self._initial_state: LossState | None = None  #: state before the current micro-batch
        self._trace_cls: type[ModelDependence | SumTrace] | None = None  #: trace of a later step
        self._trace: ModelDependence | SumTrace | None = None  #: trace of the current step
        self._new_state: NewState | None = None  #: attributes created by the first micro-batch
        self._recording = False  #: whether a recording has started since the last `look`
        self._state_checked = False  #: whether the first micro-batch's state changes were checked
        self._checked_batches = 0  #: number of batches whose metrics were checked
        #: frames that Dynamo had compiled before the first step; -1: never record
        self._compiled_frames = -1 if has_compiled(task, model) else frames_compiled()

    def begin(self, step: int) -> None:
        """Record the state before a micro-batch of a step, for `look`."""
        if (step < _FIRST_STEPS and step not in self._checked_steps) or not self._state_checked:
            self._initial_state = LossState(self._task, self._model)

    def watching(self, step: int) -> AbstractContextManager[None]:
        """
        Return a context that records state read by a later micro-batch, and operations of a `step`.

        Nothing is recorded if code was compiled in the meantime: under a `TorchFunctionMode`
        Dynamo would recompile it, and fail with `fullgraph`.
        """
        if frames_compiled() != self._compiled_frames:
            self._trace_cls = self._new_state = None
        if self._recording:  # no `look` since: micro-batches that use all_gather are not checked
            self._new_state = self._trace = None
        if step > 0 and self._trace_cls is not None:
            self._trace, self._trace_cls = self._trace_cls(), None
        if self._new_state is None and self._trace is None:
            return nullcontext()
        self._recording = True
        return self._record()

    @contextmanager
    def _record(self) -> Iterator[None]:
        with self._new_state or nullcontext(), self._trace or nullcontext():
            yield

    def look(self, step: int, result: BatchResult, samples: int) -> None:
        """
        Check the first micro-batch of one of the first steps.

        Args:
            step: number of the step, from 0.
            result: result of the micro-batch.
            samples: number of samples in the micro-batch.
        """
        self._recording, state, self._initial_state = False, self._initial_state, None
        new_state, self._new_state = self._new_state, None
        names = [] if new_state is None else new_state.carried()
        if state is not None and not self._state_checked:
            self._state_checked, names, self._new_state = True, state.changed(), state.begun()
        if (warning := state_warning(names)) is not None:
            logger.warning("%s", warning)
        if not samples or step >= _FIRST_STEPS or step in self._checked_steps:
            return
        self._checked_steps.add(step)
        text = labels_warning(result, samples)
        if text is None and has_step(self._task):
            text = weight_warning(result, samples)
            if step == 0 and text is None:
                self._trace_cls = ModelDependence if result.term.weighted else SumTrace
            trace, self._trace = self._trace, None
            if text is None and trace is not None:
                text = trace.warning(result, samples)
        elif text is None:
            term, states = result.term, states_of(self._task, self._model)
            loss = (term.value, term.weight) if term.weighted else term.value
            call = self._task.loss, result.outputs, result.targets, loss
            text = loss_warning(*call, samples=samples, states=states, initial_state=state)
        if text is not None:
            self._checked_steps.update(range(_FIRST_STEPS))
            logger.warning("%s", text)

    def look_at_metrics(self, result: BatchResult, metrics: EvalBatch, samples: int) -> None:
        """
        Check the metrics of one of the first evaluation batches.

        Args:
            result: result of the batch.
            metrics: loss and metrics of the batch.
            samples: number of samples in the batch.
        """
        if not samples:
            return
        means = {n: total / weight for n, (total, weight) in metrics.figures.items() if n != "loss"}
        if (
            self._checked_batches >= _FIRST_STEPS
            or not means
            or metrics.kept
            or _has_stateful_metrics(self._task)
        ):
            return
        self._checked_batches += 1
        batch, states = (result.outputs, result.targets), states_of(self._task, self._model)
        text = metrics_warning(self._task, *batch, means, samples=samples, states=states)
        if text is not None:
            self._checked_batches = _FIRST_STEPS
            logger.warning("%s", text)


def _has_stateful_metrics(task: Task) -> bool:
    """Return whether a task has stateful metrics, such as those of torchmetrics."""
    values = [*vars(task).values(), *task_modules(task, nn.Module())]
    # Only builtin containers are searched: iterating over a mapping that is a file reads all of it.
    values += [
        o
        for value in values
        if isinstance(value, list | tuple | dict)
        for o in items_in(value) or ()
    ]
    return any(has_methods(value, "update", "compute") for value in values)


def states_of(task: Task, model: nn.Module) -> list[Tensor]:
    """Return buffers, and frozen parameters of the task's modules, which a loss may change."""
    modules = task_modules(task, model)
    buffers = [buffer for module in modules for buffer in module.buffers()]
    frozen = [p for module in modules for p in module.parameters() if not p.requires_grad]
    return [*model.buffers(), *buffers, *frozen]


def loss_warning(
    task_loss: Callable[[Any, Any], Any],
    outputs: Any,
    targets: Any,
    loss: Any,
    *,
    samples: int,
    states: Sequence[Tensor] = (),
    initial_state: LossState | None = None,
) -> str | None:
    """
    Compare the loss of a batch with the losses of its halves; see `_results_of_halves`.

    Args:
        task_loss: the task's `loss`.
        outputs: outputs for the whole batch, batch first: tensors, alone or in lists, tuples,
            dictionaries and dataclasses.
        targets: targets of the whole batch, in the same form.
        loss: the result of `task_loss` for the whole batch: a scalar, or (sum, weight).
        samples: size of the batch.
        states: tensors that `task_loss` may change besides the task's attributes; see `states_of`.
        initial_state: the state before the call of `task_loss`; None: the current state.

    Returns:
        None: the loss is a mean over samples, or the halves cannot be compared.
    """
    try:
        whole = _read_loss(loss)
        if whole is None or not _finite(whole):
            return None
        with nullcontext() if initial_state is None else initial_state.kept():
            batch, rows = (outputs, targets), rows_of((outputs, targets), samples)
            size = rows or samples
            a, b = _results_of_halves(task_loss, _read_loss, batch, size, states, initial_state)
        tolerance = _tolerance((outputs, loss))
        if rows is None:
            return _halves_warning(a, b, whole, samples, tolerance)
        by_row = whole.weight is None and _is_mean(whole.sum, a.sum, b.sum, rows, tolerance)
        equal = _close(a.sum, b.sum, [], tolerance)  # then the means over rows and samples agree
        return rows_warning(rows, samples) if by_row and not equal else None
    except Exception:  # user code may fail on half a batch, which must not stop the training
        return None


def metrics_warning(
    task: Task,
    outputs: Any,
    targets: Any,
    whole: Mapping[str, float],
    *,
    samples: int,
    states: Sequence[Tensor],
) -> str | None:
    """
    Compare the metrics of a batch with those of its halves; see `loss_warning`.

    Args:
        task: the user's task.
        outputs: outputs for the whole batch.
        targets: targets of the whole batch.
        whole: the results of `metrics` for the whole batch, by name.
        samples: size of the batch.
        states: see `states_of`.
    """
    try:
        a, b = _results_of_halves(task.metrics, _read_metrics, (outputs, targets), samples, states)
        tolerance = max(_tolerance(outputs), _TOLERANCES[torch.float32])
        named = [
            f"{name!r} (halves {a[name]:.6g} and {b[name]:.6g}, whole {value:.6g})"
            for name, value in whole.items()
            if all(map(math.isfinite, (value, a[name], b[name])))
            and not _is_mean(value, a[name], b[name], samples, tolerance)
        ]
    except Exception:  # see `loss_warning`
        return None
    if not named:
        return None
    return (
        "metrics() returns values that are not means over the samples of a batch: "
        f"{', '.join(named)}. The result of an evaluation depends on the number of workers and on "
        "the batch size. Return a mean, or a metric with state: an object with update(), merge() "
        "and compute()"
    )


_T = TypeVar("_T")


class _NotComparable(Exception):
    """The batch cannot be split, or the task cannot be called twice without side effects."""


def _results_of_halves(
    method: Callable[[Any, Any], Any],
    read: Callable[[Any], _T | None],
    batch: tuple[Any, Any],
    samples: int,
    states: Sequence[Tensor],
    initial_state: LossState | None = None,
) -> list[_T]:
    """
    Return the results of a task's method for each half of a batch.

    Training state does not change: the halves and the task are copies; generators and `states` are
    restored. Objects of the user's classes in the task's attributes are not copied.

    Args:
        method: method of the task, called with outputs and targets.
        read: converts the result; returns None for unknown types.
        batch: outputs and targets of the whole batch.
        samples: size of the batch.
        states: see `states_of`.
        initial_state: initial state of the task's copy; None: the current state.

    Raises:
        _NotComparable: the batch cannot be split, the method draws random numbers, or the task has
            large tensors or generators.
    """
    if samples < 2 or sum(state.numel() for state in states) > _MAX_COPIED_ELEMENTS:
        raise _NotComparable
    values = []
    with torch.no_grad(), preserve_rng_state(), _preserve(states):
        before = rng_states()
        for half in (slice(0, samples // 2), slice(samples // 2, samples)):
            outputs, targets = (_take_samples(tree, samples, half) for tree in batch)
            value = read(_method_of_copy(method, initial_state)(outputs, targets))
            if value is None or rng_states() != before:
                raise _NotComparable
            values.append(value)
    return values


def _halves_warning(
    a: LossValue, b: LossValue, whole: LossValue, samples: int, tolerance: float
) -> str | None:
    """Return a warning if the losses of halves and whole are inconsistent; None: no warning."""
    if (a.weight is None) != (whole.weight is None) or (b.weight is None) != (whole.weight is None):
        return None
    if whole.weight is not None and a.weight is not None and b.weight is not None:
        sums = _close(a.sum + b.sum, whole.sum, [a.sum, b.sum], tolerance)
        weights = a.weight + b.weight, whole.weight, [a.weight, b.weight]
        if sums and _close(*weights, tolerance):
            return None
        fault, remedy = "returns a sum and a weight that do not add up", _COMPARES_SAMPLES
    else:
        if _is_mean(whole.sum, a.sum, b.sum, samples, tolerance):
            return None
        fault, remedy = "is not a mean", _remedy(a.sum, b.sum, whole.sum, tolerance)
    return (
        f"loss() {fault} over the samples of a batch: halves give {_format_loss(a)} and "
        f"{_format_loss(b)}, the whole gives {_format_loss(whole)}; the result depends on the "
        f"number of workers and micro-batches. {remedy}"
    )


_COMPARES_SAMPLES = (
    "If it compares samples of a batch with each other (in-batch negatives, batch statistics), the "
    "results of parts cannot be combined: gather the outputs of all ranks first, or use one worker "
    "without gradient_accumulation"
)


def _remedy(a: float, b: float, whole: float, tolerance: float) -> str:
    """Return a remedy; only a weighted mean always lies between the means of the halves."""
    if _close(a + b, whole, [a, b], tolerance):
        return "It is a sum: return the mean, or (sum, number of samples)"
    margin = tolerance * max(abs(a), abs(b), abs(whole))
    if math.isfinite(a + b) and not min(a, b) - margin <= whole <= max(a, b) + margin:
        return _COMPARES_SAMPLES
    return (
        "If it is a weighted mean, or a mean over units whose number differs between samples "
        f"(tokens, pixels), return (sum, weight) instead. {_COMPARES_SAMPLES}"
    )


def _format_loss(value: LossValue) -> str:
    if value.weight is None:
        return f"{value.sum:.6g}"
    return f"({value.sum:.6g}, {value.weight:.6g})"


def _is_mean(whole: float, a: float, b: float, samples: int, tolerance: float) -> bool:
    """Return whether a value of the whole batch is the mean of its halves' values."""
    first = samples // 2
    mean = (first * a + (samples - first) * b) / samples
    return _close(mean, whole, [a, b], tolerance)


def _close(x: float, y: float, terms: list[float], tolerance: float) -> bool:
    """Return whether x and y are equal, with a tolerance relative to the largest term."""
    largest = max(abs(x), abs(y), *map(abs, terms))
    return abs(x - y) <= tolerance * largest + tolerance * 1e-2


def _finite(value: LossValue) -> bool:
    return math.isfinite(value.sum) and math.isfinite(value.weight or 0.0)


def _read_loss(loss: Any) -> LossValue | None:
    """Convert the result of `loss()`; None: neither a scalar nor (sum, weight)."""
    if isinstance(loss, Tensor):
        return LossValue(loss.item(), None) if loss.ndim == 0 else None
    if isinstance(loss, list | tuple) and len(loss) == 2 and isinstance(loss[0], Tensor):
        weight = loss[1].item() if isinstance(loss[1], Tensor) else float(loss[1])
        return LossValue(loss[0].item(), weight)
    return None


def _read_metrics(metrics: Any) -> dict[str, float] | None:
    return {name: float(value) for name, value in metrics.items()}


def _tolerance(tree: Any) -> float:
    """Return the relative tolerance for the coarsest dtype in a tree."""
    floats = [t for t in tensors_in(tree) if t.is_floating_point()]
    return max((_TOLERANCES.get(t.dtype, _COARSE) for t in floats), default=_COARSE)


def _take_samples(tree: Any, size: int, part: slice) -> Any:
    """
    Copy some samples of a batch.

    Args:
        tree: the batch.
        size: number of samples in the batch.
        part: indices of the samples.

    Raises:
        _NotComparable: a part of the batch has no batch dimension.
    """
    if isinstance(tree, Tensor | np.ndarray):
        if tree.ndim and len(tree) != size:
            raise _NotComparable
        return _detached_copy(tree[part] if tree.ndim else tree)
    if isinstance(tree, _SCALARS):
        return tree
    items = items_in(tree)
    if items is None or isinstance(tree, PackedSequence):
        raise _NotComparable
    if isinstance(tree, list | tuple) and len(tree) == size and not _is_by_tensor(tree, size):
        return type(tree)(map(_detached_copy, tree[part]))  # one entry per sample
    return _rebuild(tree, [_take_samples(item, size, part) for item in items])


def _detached_copy(tree: Any) -> Any:
    """Copy a tree, detached from the model."""
    if isinstance(tree, Tensor):
        return tree.detach().clone()
    items = items_in(tree)
    return copy.deepcopy(tree) if items is None else _rebuild(tree, [*map(_detached_copy, items)])


def _is_by_tensor(items: Any, size: int) -> bool:
    """Return whether a list as long as the batch has batched tensors, not one entry per sample."""
    lengths = {len(tensor) for tensor in tensors_in(items) if tensor.ndim}
    return lengths == {size}


def _rebuild(tree: Any, items: list[Any]) -> Any:
    if isinstance(tree, Mapping) and not isinstance(tree, dict | UserDict):
        raise _NotComparable  # a copy of a custom mapping may share its items
    return rebuilt(tree, items)


def _method_of_copy(
    method: Callable[..., Any], initial_state: LossState | None
) -> Callable[..., Any]:
    """Return the method bound to a copy of its task, as the method may write attributes."""
    task, function = getattr(method, "__self__", None), getattr(method, "__func__", None)
    if function is None or not hasattr(task, "__dict__"):
        return method
    twin = copy.copy(task)
    for name, value in vars(task).items():
        if isinstance(value, _CONSUMED):
            raise _NotComparable
        if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
            if value.numel() > _MAX_COPIED_ELEMENTS:
                raise _NotComparable
            vars(twin)[name] = value.detach().clone()
        elif type(value) in _CONTAINERS:
            vars(twin)[name] = copy.copy(value)
    if initial_state is not None:
        initial_state.begin_again(vars(twin))
    return MethodType(function, twin)


@contextmanager
def _preserve(states: Sequence[Tensor]) -> Iterator[None]:
    """Restore states on exit."""
    copies = [(state, state.detach().clone()) for state in states]
    try:
        yield
    finally:
        for state, values in copies:
            state.data.copy_(values)  # keeps the version counter: backward may need the tensor
