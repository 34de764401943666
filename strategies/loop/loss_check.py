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
"""Number of steps whose losses are checked, and of batches whose metrics are."""
_COPIED_ELEMENTS = 1 << 20
"""Size limit of the task's tensors that are copied, as `loss()` may write into them."""
_CONSUMED = (Iterator, torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
"""Types whose state a second call of `loss()` would advance."""
_CONTAINERS = (list, dict, OrderedDict, set, deque)
_ATOMS = (str, bytes, int, float, complex, type(None))


class LossValue(NamedTuple):
    """The result of `loss()` for some samples."""

    sum: float
    weight: float | None
    """None: the result is a scalar, which is taken as a mean."""


class MeanCheck:
    """
    Looks at the losses of a run's first steps, and at its first metrics; warns once of each.

    Args:
        task: the user's. With a `step` of its own the halves of a batch are not looked at: the
            model would have to run once more, and that may change more than can be put back.
        model: its own.
    """

    def __init__(self, task: Task, model: nn.Module) -> None:
        self._task, self._model = task, model
        self._looked: set[int] = set()  #: steps
        self._state: LossState | None = None  #: before the micro-batch that is looked at
        #: of a task with a step of its own: how a later one is looked at, once
        self._next: type[ModelDependence | SumTrace] | None = None
        self._trace: ModelDependence | SumTrace | None = None  #: of the one that is looked at
        self._begun: NewState | None = None  #: what the first micro-batch has put where nothing was
        self._watching = False  #: since the last `look`
        self._compared = False  #: the state after the first micro-batch with that before it
        self._evaluated = 0  #: batches whose metrics were looked at
        self._compiled = -1 if has_compiled(task, model) else frames_compiled()

    def begin(self, step: int) -> None:
        """Note the state before a micro-batch of a step, which `look` may be called with."""
        if (step < _FIRST_STEPS and step not in self._looked) or not self._compared:
            self._state = LossState(self._task, self._model)

    def watching(self, step: int) -> AbstractContextManager[None]:
        """
        Note what the second micro-batch reads, and what a `step` computes in a later one.

        Not where the first one has compiled calls: torch compiles none while somebody looks at
        them, and fails with `fullgraph`.
        """
        if frames_compiled() != self._compiled:
            self._next = self._begun = None
        if self._watching:  # nobody looked: that one has gathered, and so may all that follow
            self._begun = self._trace = None
        if step > 0 and self._next is not None:
            self._trace, self._next = self._next(), None
        if self._begun is None and self._trace is None:
            return nullcontext()
        self._watching = True
        return self._watched()

    @contextmanager
    def _watched(self) -> Iterator[None]:
        with self._begun or nullcontext(), self._trace or nullcontext():
            yield

    def look(self, step: int, made: BatchResult, samples: int) -> None:
        """
        Look at the first micro-batch of one of the first steps.

        Args:
            step: from 0.
            made: what task and model made of it.
            samples: of the micro-batch.
        """
        self._watching, state, self._state = False, self._state, None
        begun, self._begun = self._begun, None
        names = [] if begun is None else begun.carried()
        if state is not None and not self._compared:
            self._compared, names, self._begun = True, state.changed(), state.begun()
        if (warning := state_warning(names)) is not None:
            logger.warning("%s", warning)
        if step >= _FIRST_STEPS or step in self._looked:
            return
        self._looked.add(step)
        text = labels_warning(made, samples)
        if text is None and has_step(self._task):
            text = weight_warning(made, samples)
            if step == 0 and text is None:
                self._next = ModelDependence if made.term.weighted else SumTrace
            trace, self._trace = self._trace, None
            if text is None and trace is not None:
                text = trace.warning(made, samples)
        elif text is None:
            term, states = made.term, states_of(self._task, self._model)
            loss = (term.value, term.weight) if term.weighted else term.value
            compared = self._task.loss, made.outputs, made.targets, loss
            text = loss_warning(*compared, samples=samples, states=states, begun=state)
        if text is not None:
            self._looked.update(range(_FIRST_STEPS))
            logger.warning("%s", text)

    def look_at_metrics(self, made: BatchResult, figures: EvalBatch, samples: int) -> None:
        """
        Look at one of the first batches of evaluations.

        Args:
            made: what task and model made of it.
            figures: loss and metrics of the batch.
            samples: of the batch.
        """
        means = {n: total / weight for n, (total, weight) in figures.figures.items() if n != "loss"}
        if (
            self._evaluated >= _FIRST_STEPS
            or not means
            or figures.kept
            or _keeps_metrics(self._task)
        ):
            return
        self._evaluated += 1
        given, states = (made.outputs, made.targets), states_of(self._task, self._model)
        text = metrics_warning(self._task, *given, means, samples=samples, states=states)
        if text is not None:
            self._evaluated = _FIRST_STEPS
            logger.warning("%s", text)


def _keeps_metrics(task: Task) -> bool:
    """Return whether a task has stateful metrics, such as those of torchmetrics."""
    kept = [*vars(task).values(), *task_modules(task, nn.Module())]
    # Not in any mapping: to go through one that is a file reads all of it.
    kept += [
        o for some in kept if isinstance(some, list | tuple | dict) for o in items_in(some) or ()
    ]
    return any(has_methods(one, "update", "compute") for one in kept)


def states_of(task: Task, model: nn.Module) -> list[Tensor]:
    """Return buffers, and frozen parameters of the task's modules, which a loss may change."""
    own = task_modules(task, model)
    frozen = [p for module in own for p in module.parameters() if not p.requires_grad]
    return [*model.buffers(), *(buffer for module in own for buffer in module.buffers()), *frozen]


def loss_warning(
    task_loss: Callable[[Any, Any], Any],
    outputs: Any,
    targets: Any,
    loss: Any,
    *,
    samples: int,
    states: Sequence[Tensor] = (),
    begun: LossState | None = None,
) -> str | None:
    """
    Compare the loss of a batch with those of its halves; see `_on_halves`.

    Args:
        task_loss: the task's `loss`.
        outputs: of the whole batch, batch first: tensors, alone or in lists, tuples, dictionaries
            and dataclasses.
        targets: in the same way.
        loss: what `task_loss` made of them: a scalar, or (sum, weight).
        samples: size of the batch.
        states: what `task_loss` may reach beside the task's attributes, see `states_of`.
        begun: the state before `task_loss` was called; None: the present one.

    Returns:
        None: the losses of the halves give that of the whole, or nobody can tell.
    """
    try:
        whole = _read_loss(loss)
        if whole is None or not _finite(whole):
            return None
        with nullcontext() if begun is None else begun.kept():
            given, rows = (outputs, targets), rows_of((outputs, targets), samples)
            a, b = _on_halves(task_loss, _read_loss, given, rows or samples, states, begun)
        tolerance = _tolerance((outputs, loss))
        if rows is None:
            return _compared(a, b, whole, samples, tolerance)
        ends = a.sum, b.sum  # where they are equal any mean of them is
        by_row = whole.weight is None and _is_mean(whole.sum, *ends, rows, tolerance)
        equal = _close(*ends, [], tolerance)
        return rows_warning(rows, samples) if by_row and not equal else None
    except Exception:  # the user's code on a batch that may be unusual; training goes on
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
        task: has `metrics`.
        outputs: of the whole batch.
        targets: of the whole batch.
        whole: what `metrics` made of them, by name.
        samples: size of the batch.
        states: see `states_of`.
    """
    try:
        a, b = _on_halves(task.metrics, _read_metrics, (outputs, targets), samples, states)
        tolerance = max(_tolerance(outputs), _TOLERANCES[torch.float32])
        named = [
            f"{name!r} ({a[name]:.6g} and {b[name]:.6g}, the whole {value:.6g})"
            for name, value in whole.items()
            if all(map(math.isfinite, (value, a[name], b[name])))
            and not _is_mean(value, a[name], b[name], samples, tolerance)
        ]
    except Exception:  # see `loss_warning`
        return None
    if not named:
        return None
    return (
        f"metrics() gives what is no mean over the samples of a batch: of its halves "
        f"{', '.join(named)}. What an evaluation tells depends on the number of workers and on the "
        "size of batches. Give a mean, or a metric with state: an object with update(), merge() "
        "and compute()"
    )


_T = TypeVar("_T")


class _NotComparable(Exception):
    """The batch cannot be split, or the task cannot be called twice without side effects."""


def _on_halves(
    method: Callable[[Any, Any], Any],
    read: Callable[[Any], _T | None],
    batch: tuple[Any, Any],
    samples: int,
    states: Sequence[Tensor],
    begun: LossState | None = None,
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
        begun: initial state of the task's copy; None: the current state.

    Raises:
        _NotComparable: the batch cannot be split, the method draws random numbers, or the task has
            large tensors or generators.
    """
    if samples < 2 or sum(state.numel() for state in states) > _COPIED_ELEMENTS:
        raise _NotComparable
    values = []
    with torch.no_grad(), preserve_rng_state(), _kept(states):
        before = rng_states()
        for half in (slice(0, samples // 2), slice(samples // 2, samples)):
            outputs, targets = (_take_samples(one, samples, half) for one in batch)
            value = read(_method_of_copy(method, begun)(outputs, targets))
            if value is None or rng_states() != before:
                raise _NotComparable
            values.append(value)
    return values


def _compared(
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
        what, remedy = "gives a sum and a weight that do not add up", _COMPARES_SAMPLES
    else:
        if _is_mean(whole.sum, a.sum, b.sum, samples, tolerance):
            return None
        what, remedy = "is no mean", _remedy(a.sum, b.sum, whole.sum, tolerance)
    return (
        f"loss() {what} over the samples of a batch: halves give {_shown(a)} and {_shown(b)}, "
        f"the whole gives {_shown(whole)}; the result depends on the number of workers and "
        f"micro-batches. {remedy}"
    )


_COMPARES_SAMPLES = (
    "Where samples of a batch are compared with each other (negatives, statistics of the batch), "
    "no weights put parts together: gather the outputs of all ranks first, or use one worker "
    "without gradient_accumulation"
)


def _remedy(a: float, b: float, whole: float, tolerance: float) -> str:
    """Return a remedy; only a weighted mean always lies between the means of the halves."""
    if _close(a + b, whole, [a, b], tolerance):
        return "It is a sum: give the mean, or return (sum, number of samples)"
    room = tolerance * max(abs(a), abs(b), abs(whole))
    if math.isfinite(a + b) and not min(a, b) - room <= whole <= max(a, b) + room:
        return _COMPARES_SAMPLES
    return (
        "Where it is a mean over tokens, pixels or weights, of which samples have more or less, "
        f"return (sum, weight) instead. {_COMPARES_SAMPLES}"
    )


def _shown(value: LossValue) -> str:
    if value.weight is None:
        return f"{value.sum:.6g}"
    return f"({value.sum:.6g}, {value.weight:.6g})"


def _is_mean(whole: float, a: float, b: float, samples: int, tolerance: float) -> bool:
    """Return whether a value of the whole batch is the mean of its halves' values."""
    first = samples // 2
    mean = (first * a + (samples - first) * b) / samples
    return _close(mean, whole, [a, b], tolerance)


def _close(one: float, other: float, ends: list[float], tolerance: float) -> bool:
    largest = max(abs(one), abs(other), *map(abs, ends))
    return abs(one - other) <= tolerance * largest + tolerance * 1e-2


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


def _take_samples(tree: Any, size: int, cut: slice) -> Any:
    """
    Copy some samples of a batch.

    Args:
        tree: the batch.
        size: of the batch.
        cut: which samples.

    Raises:
        _NotComparable: something in it is not by sample.
    """
    if isinstance(tree, Tensor | np.ndarray):
        if tree.ndim and len(tree) != size:
            raise _NotComparable
        return _copied(tree[cut] if tree.ndim else tree)
    if isinstance(tree, _ATOMS):
        return tree
    items = items_in(tree)
    if items is None or isinstance(tree, PackedSequence):
        raise _NotComparable
    if isinstance(tree, list | tuple) and len(tree) == size and not _is_by_tensor(tree, size):
        return type(tree)(map(_copied, tree[cut]))  # an entry for each sample
    return _rebuild(tree, [_take_samples(item, size, cut) for item in items])


def _copied(tree: Any) -> Any:
    """Copy a tree, detached from the model."""
    if isinstance(tree, Tensor):
        return tree.detach().clone()
    items = items_in(tree)
    return copy.deepcopy(tree) if items is None else _rebuild(tree, [*map(_copied, items)])


def _is_by_tensor(items: Any, size: int) -> bool:
    """Return whether a list as long as the batch has batched tensors, not one entry per sample."""
    lengths = {len(tensor) for tensor in tensors_in(items) if tensor.ndim}
    return lengths == {size}


def _rebuild(tree: Any, items: list[Any]) -> Any:
    if isinstance(tree, Mapping) and not isinstance(tree, dict | UserDict):
        raise _NotComparable  # a copy of another may share what it holds
    return rebuilt(tree, items)


def _method_of_copy(task_loss: Callable[..., Any], begun: LossState | None) -> Callable[..., Any]:
    """Return the method bound to a copy of its task, as the method may write attributes."""
    task, function = getattr(task_loss, "__self__", None), getattr(task_loss, "__func__", None)
    if function is None or not hasattr(task, "__dict__"):
        return task_loss
    copied = copy.copy(task)
    for name, value in vars(task).items():
        if isinstance(value, _CONSUMED):
            raise _NotComparable
        if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
            if value.numel() > _COPIED_ELEMENTS:
                raise _NotComparable
            vars(copied)[name] = value.detach().clone()
        elif type(value) in _CONTAINERS:
            vars(copied)[name] = copy.copy(value)
    if begun is not None:
        begun.begin_again(vars(copied))
    return MethodType(function, copied)


@contextmanager
def _kept(states: Sequence[Tensor]) -> Iterator[None]:
    """Restore states on exit."""
    copies = [(state, state.detach().clone()) for state in states]
    try:
        yield
    finally:
        for state, values in copies:
            state.data.copy_(values)  # not by autograd's count: backward may have it saved
