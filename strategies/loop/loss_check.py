"""
Whether losses and metrics are means over the samples of a batch: told by those of its halves.

What is no mean depends on how a batch is cut: on the number of workers and micro-batches.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
import math
import random
from collections import OrderedDict, UserDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from types import MethodType
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from distplat.strategies.loop.collate import with_fields
from distplat.strategies.loop.loss_state import LossState, remark_on_state
from distplat.strategies.loop.losses import Judged, Made
from distplat.strategies.loop.seeding import generators_kept, state_of_generators
from distplat.strategies.loop.task_settings import task_modules
from distplat.strategies.task import Task, has_step

logger = logging.getLogger(__name__)

_TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4}
"""Relative, by the coarsest type of outputs and loss; 16-bit types have the one below."""
_FIRST_STEPS = 3
"""Steps whose losses are looked at."""
_COARSE = 3e-2
_LEFT_OUT = -100
"""A label that is none: of torch's cross entropy, and Hugging Face's models."""
_COPIED_ELEMENTS = 1 << 20
"""What the task keeps is copied up to this size, for `loss()` may write into it."""
_CONSUMED = (Iterator, torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
_CONTAINERS = (list, dict, OrderedDict, set, deque)
_ATOMS = (str, bytes, int, float, complex, type(None))


class Value(NamedTuple):
    """What `loss()` gave for some samples."""

    sum: float
    weight: float | None
    """None: it gave a scalar, which is taken for a mean."""


class MeanDoubts:
    """
    Looks at the losses of a run's first steps, and its first metrics; warns once of each.

    Args:
        task: the user's. Halves of a batch are not looked at with a `step` of its own: the model
            would have to run once more, and what a forward changes is not all in reach.
        model: its own.
    """

    def __init__(self, task: Task, model: nn.Module) -> None:
        self._task, self._model = task, model
        self._looked: set[int] = set()  #: steps
        self._state: LossState | None = None  #: before the micro-batch that is looked at
        self._told = False  #: the first one's state was compared
        self._evaluated = 0  #: batches whose metrics were looked at

    def begin(self, step: int) -> None:
        """Be told that a micro-batch of a step begins: `look` may come."""
        if (step < _FIRST_STEPS and step not in self._looked) or not self._told:
            self._state = LossState(self._task, self._model)

    def look(self, step: int, made: Made, samples: int) -> None:
        """
        Look at the first micro-batch of one of the first steps.

        Args:
            step: from 0.
            made: what task and model made of it.
            samples: of the micro-batch.
        """
        state, self._state = self._state, None
        if state is not None and not self._told:
            self._told = True
            if (remark := remark_on_state(state)) is not None:
                logger.warning("%s", remark)
        if step >= _FIRST_STEPS or step in self._looked:
            return
        self._looked.add(step)
        text = models_mean_over_labels(made, samples)
        if text is not None:
            self._looked.update(range(_FIRST_STEPS))
            logger.warning("%s", text)
        if text is not None or has_step(self._task):
            return
        term = made.term
        loss = (term.value, term.weight) if term.weighted else term.value
        given, states = (made.outputs, made.targets, loss), states_of(self._task, self._model)
        found = is_mean_over_samples(
            self._task.loss, *given, samples=samples, states=states, begun=state
        )
        if found is not None:
            self._looked.update(range(_FIRST_STEPS))
            logger.warning("%s", found)

    def look_at_metrics(self, made: Made, found: Judged, samples: int) -> None:
        """
        Look at one of the first batches of evaluations.

        Args:
            made: what task and model made of it.
            found: its figures.
            samples: of the batch.
        """
        means = {n: total / weight for n, (total, weight) in found.figures.items() if n != "loss"}
        if self._evaluated >= _FIRST_STEPS or not means or found.kept or _keeps_metrics(self._task):
            return
        self._evaluated += 1
        given, states = (made.outputs, made.targets), states_of(self._task, self._model)
        text = metrics_that_are_no_means(self._task, *given, means, samples=samples, states=states)
        if text is not None:
            self._evaluated = _FIRST_STEPS
            logger.warning("%s", text)


def models_mean_over_labels(made: Made, samples: int) -> str | None:
    """
    See whether a loss is the model's own where samples have labels to leave out.

    Those of Hugging Face's models are means over the labels that are not -100.

    Args:
        made: what task and model made of a batch.
        samples: of it.

    Returns:
        A warning, if samples have different numbers of labels; None: they have not, or who knows.
    """
    labels = made.targets.get("labels") if isinstance(made.targets, Mapping) else None
    own = made.outputs.get("loss") if isinstance(made.outputs, Mapping) else None
    if made.term.weighted or not isinstance(own, Tensor) or own is not made.term.value:
        return None
    if not isinstance(labels, Tensor) or labels.ndim < 2 or len(labels) != samples:
        return None
    counts = (labels != _LEFT_OUT).flatten(1).sum(1)
    least, most = int(counts.min()), int(counts.max())
    if least == most:
        return None
    return (
        f"the loss is the model's own, and samples of a batch have {least} to {most} labels that "
        "are not -100: a mean over labels depends on the number of workers and micro-batches. "
        "Return (sum, weight) instead: the loss times the number of labels that it is a mean over, "
        "and that number"
    )


def _keeps_metrics(task: Task) -> bool:
    """Whether a task keeps objects that count what they are shown, as torchmetrics has them."""
    kept = [*vars(task).values(), *task_modules(task, nn.Module())]
    kept += [one for items in map(_items, kept) for one in items or ()]
    return any(hasattr(one, "update") and hasattr(one, "compute") for one in kept)


def states_of(task: Task, model: nn.Module) -> list[Tensor]:
    """Give buffers, and what is frozen in modules that the task keeps: a loss may move them."""
    own = task_modules(task, model)
    frozen = [p for module in own for p in module.parameters() if not p.requires_grad]
    return [*model.buffers(), *(buffer for module in own for buffer in module.buffers()), *frozen]


def is_mean_over_samples(
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
    Compare the loss of a batch with those of its halves.

    Nothing that training goes on with is changed: halves are copies, the task is a copy, generators
    and `states` are put back. A task that keeps large tensors or generators of its own is passed
    over. Objects of the user's classes that it keeps are not copied.

    Args:
        task_loss: the task's `loss`.
        outputs: of the whole batch, batch first: tensors, alone or in lists, tuples, dictionaries
            and dataclasses.
        targets: in the same way.
        loss: what `task_loss` made of them: a scalar, or (sum, weight).
        samples: size of the batch.
        states: what `task_loss` may reach beside the task's attributes, see `states_of`.
        begun: what it began with; None: that has not changed since.

    Returns:
        A warning, if parts of the batch cannot be put together; None: they can, or nobody can tell.
    """
    try:
        whole = _value(loss)
        if samples < 2 or whole is None or not _finite(whole):
            return None
        cuts = slice(0, samples // 2), slice(samples // 2, samples)
        with nullcontext() if begun is None else begun.kept():
            halves = _of_parts(task_loss, _value, (outputs, targets), samples, cuts, states, begun)
        if halves is None:
            return None
        sizes = [cut.stop - cut.start for cut in cuts]
        return _verdict(halves, sizes, whole, _tolerance((outputs, loss)))
    except Exception:  # the user's code on a batch that may be unusual; training goes on
        return None


def metrics_that_are_no_means(
    task: Task,
    outputs: Any,
    targets: Any,
    whole: Mapping[str, float],
    *,
    samples: int,
    states: Sequence[Tensor] = (),
) -> str | None:
    """
    Compare the metrics of a batch with those of its halves; see `is_mean_over_samples`.

    Args:
        task: has `metrics`.
        outputs: of the whole batch, batch first.
        targets: in the same way.
        whole: what `metrics` made of them, by name.
        samples: size of the batch.
        states: see `is_mean_over_samples`.

    Returns:
        A warning that names those that are no means; None: there are none, or nobody can tell.
    """
    cut = samples // 2
    try:
        if samples < 2:
            return None
        cuts = slice(0, cut), slice(cut, samples)
        halves = _of_parts(task.metrics, _numbers, (outputs, targets), samples, cuts, states)
        if halves is None:
            return None
        a, b = halves
        tolerance = max(_tolerance(outputs), _TOLERANCES[torch.float32])
        named = []
        for name, value in whole.items():
            ends = [a[name], b[name]]
            mean = (cut * ends[0] + (samples - cut) * ends[1]) / samples
            if all(map(math.isfinite, [value, *ends])) and not _close(mean, value, ends, tolerance):
                named.append(f"{name!r} ({ends[0]:.6g} and {ends[1]:.6g}, the whole {value:.6g})")
    except Exception:  # see above
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


def _of_parts(
    method: Callable[[Any, Any], Any],
    read: Callable[[Any], _T | None],
    given: tuple[Any, Any],
    size: int,
    cuts: Iterable[slice],
    states: Sequence[Tensor],
    begun: LossState | None = None,
) -> list[_T] | None:
    """Give what a method of the task makes of each part; None: it hangs on random numbers."""
    found = []
    if sum(state.numel() for state in states) > _COPIED_ELEMENTS:
        raise _CannotTell
    with torch.no_grad(), generators_kept(), _kept(states):
        before = state_of_generators()
        for cut in cuts:
            outputs, targets = (_part(one, size, cut) for one in given)
            value = read(_on_a_copy(method, begun)(outputs, targets))
            if value is None or state_of_generators() != before:
                return None
            found.append(value)
    return found


def _verdict(halves: list[Value], sizes: list[int], whole: Value, tolerance: float) -> str | None:
    """Give the warning for these losses, if there is one to give."""
    a, b = halves
    if (a.weight is None) != (whole.weight is None) or (b.weight is None) != (whole.weight is None):
        return None
    if whole.weight is not None and a.weight is not None and b.weight is not None:
        sums = _close(a.sum + b.sum, whole.sum, [a.sum, b.sum], tolerance)
        weights = a.weight + b.weight, whole.weight, [a.weight, b.weight]
        if sums and _close(*weights, tolerance):
            return None
        what, remedy = "gives a sum and a weight that do not add up", _COMPARED
    else:
        mean = (sizes[0] * a.sum + sizes[1] * b.sum) / sum(sizes)
        if _close(mean, whole.sum, [a.sum, b.sum], tolerance):
            return None
        what, remedy = "is no mean", _remedy(a.sum, b.sum, whole.sum, tolerance)
    return (
        f"loss() {what} over the samples of a batch: halves give {_shown(a)} and {_shown(b)}, "
        f"the whole gives {_shown(whole)}; the result depends on the number of workers and "
        f"micro-batches. {remedy}"
    )


_COMPARED = (
    "Where samples of a batch are compared with each other (negatives, statistics of the batch), "
    "no weights put parts together: gather the outputs of all ranks first, or use one worker "
    "without gradient_accumulation"
)


def _remedy(a: float, b: float, whole: float, tolerance: float) -> str:
    """Say what helps; a mean with weights lies between those of the halves, others need not."""
    if _close(a + b, whole, [a, b], tolerance):
        return "It is a sum: give the mean, or return (sum, number of samples)"
    room = tolerance * max(abs(a), abs(b), abs(whole))
    if math.isfinite(a + b) and not min(a, b) - room <= whole <= max(a, b) + room:
        return _COMPARED
    return (
        "Where it is a mean over tokens, pixels or weights, of which samples have more or less, "
        f"return (sum, weight) instead. {_COMPARED}"
    )


def _shown(value: Value) -> str:
    if value.weight is None:
        return f"{value.sum:.6g}"
    return f"({value.sum:.6g}, {value.weight:.6g})"


def _close(one: float, other: float, ends: list[float], tolerance: float) -> bool:
    largest = max(abs(one), abs(other), *map(abs, ends))
    return abs(one - other) <= tolerance * largest + tolerance * 1e-2


def _finite(value: Value) -> bool:
    return math.isfinite(value.sum) and math.isfinite(value.weight or 0.0)


def _value(loss: Any) -> Value | None:
    """Read what `loss()` gave; None: neither a scalar nor (sum, weight)."""
    if isinstance(loss, Tensor):
        return Value(loss.item(), None) if loss.ndim == 0 else None
    if isinstance(loss, list | tuple) and len(loss) == 2 and isinstance(loss[0], Tensor):
        weight = loss[1].item() if isinstance(loss[1], Tensor) else float(loss[1])
        return Value(loss[0].item(), weight)
    return None


def _numbers(metrics: Any) -> dict[str, float] | None:
    return {name: float(value) for name, value in metrics.items()}


def _tolerance(tree: Any) -> float:
    """Give the relative tolerance for the coarsest type in a tree."""
    found = [t for t in _tensors(tree) if t.is_floating_point()]
    return max((_TOLERANCES.get(t.dtype, _COARSE) for t in found), default=_COARSE)


def _tensors(tree: Any) -> Iterator[Tensor]:
    """Give the tensors of a tree, in order."""
    if isinstance(tree, Tensor):
        yield tree
    else:
        for item in _items(tree) or ():
            yield from _tensors(item)


def _items(tree: Any) -> list[Any] | None:
    """Give what a node holds; None: it is no node that we know."""
    if isinstance(tree, Mapping):
        return list(tree.values())
    if isinstance(tree, list | tuple) and not isinstance(tree, PackedSequence):
        return list(tree)
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        return [getattr(tree, field.name) for field in dataclasses.fields(tree)]
    return None


class _CannotTell(Exception):
    """The batch is not one that we know how to cut, or the task keeps what cannot be copied."""


def _part(tree: Any, size: int, cut: slice) -> Any:
    """
    Copy some samples of a batch.

    Args:
        tree: the batch.
        size: of the batch.
        cut: which samples.

    Raises:
        _CannotTell: something in it is not by sample.
    """
    if isinstance(tree, Tensor | np.ndarray):
        if tree.ndim and len(tree) != size:
            raise _CannotTell
        return _copied(tree[cut] if tree.ndim else tree)
    if isinstance(tree, _ATOMS):
        return tree
    items = _items(tree)
    if items is None:
        raise _CannotTell
    if isinstance(tree, list | tuple) and len(tree) == size and not _is_by_tensor(tree, size):
        return type(tree)(map(_copied, tree[cut]))  # an entry for each sample
    return _rebuilt(tree, [_part(item, size, cut) for item in items])


def _copied(tree: Any) -> Any:
    """Copy all of a tree, without the way back to the model."""
    if isinstance(tree, Tensor):
        return tree.detach().clone()
    items = _items(tree)
    return copy.deepcopy(tree) if items is None else _rebuilt(tree, [*map(_copied, items)])


def _is_by_tensor(items: Any, size: int) -> bool:
    """Say whether a list as long as the batch has tensors of the batch, not one entry a sample."""
    lengths = {len(tensor) for tensor in _tensors(items) if tensor.ndim}
    return lengths == {size}


def _rebuilt(tree: Any, items: list[Any]) -> Any:
    """Make a node of the same type that holds other items."""
    if isinstance(tree, Mapping):
        if dataclasses.is_dataclass(tree):  # such as the outputs of Hugging Face's models
            return type(tree)(**dict(zip(tree, items, strict=True)))
        if not isinstance(tree, dict | UserDict):  # a copy of another may share what it holds
            raise _CannotTell
        made: Any = copy.copy(tree)
        for key, item in zip(tree, items, strict=True):
            made[key] = item
        return made
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*items)
    if isinstance(tree, list | tuple):
        return type(tree)(items)
    names = [field.name for field in dataclasses.fields(tree)]
    return with_fields(tree, dict(zip(names, items, strict=True)))


def _on_a_copy(task_loss: Callable[..., Any], begun: LossState | None) -> Callable[..., Any]:
    """Give the same method of a copy of its task as it was, for it may keep figures there."""
    task, function = getattr(task_loss, "__self__", None), getattr(task_loss, "__func__", None)
    if function is None or not hasattr(task, "__dict__"):
        return task_loss
    twin = copy.copy(task)
    for name, value in vars(task).items():
        if isinstance(value, _CONSUMED):
            raise _CannotTell
        if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
            if value.numel() > _COPIED_ELEMENTS:
                raise _CannotTell
            vars(twin)[name] = value.detach().clone()
        elif type(value) in _CONTAINERS:
            vars(twin)[name] = copy.copy(value)
    if begun is not None:
        begun.begin_again(vars(twin))
    return MethodType(function, twin)


@contextmanager
def _kept(states: Sequence[Tensor]) -> Iterator[None]:
    """Put states back at the end."""
    copies = [(state, state.detach().clone()) for state in states]
    try:
        yield
    finally:
        for state, values in copies:
            state.data.copy_(values)  # not by autograd's count: backward may have it saved
