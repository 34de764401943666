"""Whether a loss is a mean over the samples of a batch: told by the losses of its halves."""

from __future__ import annotations

import copy
import dataclasses
import logging
import math
import random
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from types import MethodType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from distplat.strategies.compat import calls_compiled
from distplat.strategies.loop.losses import Made
from distplat.strategies.task import Task, has_step, own_call, step_of

logger = logging.getLogger(__name__)

_TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4}
"""Relative, by the coarsest type of outputs and loss; 16-bit types have the one below."""
_FIRST_STEPS = 3
"""Steps whose losses are looked at."""
_COARSE = 3e-2
_COPIED_ELEMENTS = 1 << 20
"""Tensors that the task keeps are copied up to this size: `loss()` may write into them."""
_CONTAINERS = (list, dict, OrderedDict, set, deque)
_ATOMS = (str, bytes, int, float, complex, type(None))


class Value(NamedTuple):
    """What `loss()` or `step()` gave for some samples."""

    sum: float
    weight: float | None
    """None: it gave a scalar, which is taken for a mean."""


class LossDoubts:
    """
    Looks at the losses of a run's first steps, and warns once.

    Args:
        task: the user's.
        model: whose buffers a loss may reach.
        runs: whether the model may be run once more.
    """

    def __init__(self, task: Task, model: nn.Module, *, runs: bool = False) -> None:
        self._task, self._model = task, model
        self._runs = runs and not calls_compiled(model)  # it would be compiled for each shape
        self._looked: set[int] = set()  #: steps

    def before(self, step: int, batch: Any, samples: int) -> None:
        """
        Look at the first micro-batch of one of the first steps, if the model must be run for it.

        It must where outputs and targets alone do not say what the loss is made of.

        Args:
            step: from 0.
            batch: as the model will get it.
            samples: of the micro-batch.
        """
        says = own_call(self._task) is not None or isinstance(batch, Mapping)
        if self._runs and says and self._due(step):
            self._tell(is_mean_of_parts(self._task, self._model, batch, samples))

    def after(self, step: int, made: Made, samples: int) -> None:
        """
        Look at the first micro-batch of one of the first steps, if nobody has.

        Args:
            step: from 0.
            made: what task and model made of it.
            samples: of the micro-batch.
        """
        if has_step(self._task) or not self._due(step):
            return
        term = made.term
        loss = (term.value, term.weight) if term.weighted else term.value
        given, buffers = (made.outputs, made.targets, loss), self._model.buffers()
        self._tell(is_mean_over_samples(self._task.loss, *given, samples=samples, buffers=buffers))

    def _due(self, step: int) -> bool:
        if step >= _FIRST_STEPS or step in self._looked:
            return False
        self._looked.add(step)
        return True

    def _tell(self, found: str | None) -> None:
        if found is not None:
            self._looked.update(range(_FIRST_STEPS))
            logger.warning("%s", found)


def is_mean_over_samples(
    task_loss: Callable[[Any, Any], Any],
    outputs: Any,
    targets: Any,
    loss: Any,
    *,
    samples: int | None = None,
    buffers: Iterable[Tensor] = (),
) -> str | None:
    """
    Compare the loss of a batch with those of its halves.

    Nothing that training goes on with is changed: halves are copies, the task is a copy, generators
    and buffers are put back.

    Args:
        task_loss: the task's `loss`.
        outputs: of the whole batch, batch first: tensors, alone or in lists, tuples, dictionaries
            and dataclasses.
        targets: in the same way.
        loss: what `task_loss` made of them: a scalar, or (sum, weight).
        samples: size of the batch; None: that of the first tensor's first dimension.
        buffers: of the model, which `task_loss` may reach.

    Returns:
        A warning, if parts of the batch cannot be put together; None: they can, or nobody can tell.
    """
    try:
        size = samples if samples is not None else _batch_size((targets, outputs))
        whole = _value(loss)
        if size is None or size < 2 or whole is None or not _finite(whole):
            return None
        cuts = (slice(0, size // 2), slice(size // 2, size))
        halves = _losses_of(task_loss, (outputs, targets), size, cuts, buffers)
        if halves is None:
            return None
        tolerance = _tolerance((outputs, loss))
        return _verdict("loss", halves, _sizes(cuts), whole, tolerance)
    except Exception:  # the user's code on a batch that may be unusual; training goes on
        return None


def is_mean_of_parts(task: Task, model: nn.Module, batch: Any, samples: int) -> str | None:
    """
    Compare the loss of a batch with those of its halves, from the model on, in evaluation mode.

    Nothing that training goes on with is changed: the batch is copied, the task is a copy, the
    model's modes, buffers and attributes and the generators are put back.

    Args:
        task: the user's.
        model: whole. One with large frozen parameters is not looked at: forwards may write them.
        batch: as the model will get it.
        samples: of the batch.

    Returns:
        A warning, if parts of the batch cannot be put together; None: they can, or nobody can tell.
    """
    frozen = [p for p in model.parameters() if not p.requires_grad]
    if samples < 2 or sum(p.numel() for p in frozen) > _COPIED_ELEMENTS:
        return None
    halves = slice(0, samples // 2), slice(samples // 2, samples)
    cuts = slice(0, samples), *halves
    kept = [*model.buffers(), *frozen]
    own = [value for value in vars(task).values() if isinstance(value, nn.Module)]
    try:
        with evaluating(model, *own):
            losses = _losses_of(step_of(task), (batch,), samples, cuts, kept, model)
        if losses is None or not _finite(losses[0]):
            return None
        whole, *parts = losses
        method = "step" if has_step(task) else "loss"
        return _verdict(method, parts, _sizes(halves), whole, _computed_to(model))
    except Exception:  # the user's code on a batch that may be unusual; training goes on
        return None


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Have models in evaluation mode; at the end all that their modules hold is what it was."""
    every = {id(module): module for model in models for module in model.modules()}.values()
    held = [(module, dict(vars(module))) for module in every]
    inside = [
        (value, copy.copy(value))
        for _, values in held
        for value in values.values()
        if type(value) in _CONTAINERS
    ]
    try:
        for module, _ in held:
            module.training = False
        yield
    finally:
        for module, values in held:
            for name in vars(module).keys() - values.keys():
                vars(module).pop(name)
            vars(module).update(values)
        for value, content in inside:
            _refill(value, content)


def _computed_to(model: nn.Module) -> float:
    """Give the tolerance for what a model computes; losses are often made in float32."""
    devices = {parameter.device.type for parameter in model.parameters()}
    if any(torch.is_autocast_enabled(device) for device in devices):
        return _COARSE
    return max(_TOLERANCES[torch.float32], _tolerance([*model.parameters()]))


def _refill(value: Any, content: Any) -> None:
    value.clear()
    if isinstance(value, list | deque):
        value.extend(content)
    else:
        value.update(content)


def _sizes(cuts: Iterable[slice]) -> list[int]:
    return [cut.stop - cut.start for cut in cuts]


def _losses_of(
    method: Callable[..., Any],
    given: Iterable[Any],
    size: int,
    cuts: Iterable[slice],
    buffers: Iterable[Tensor],
    *whole: nn.Module,
) -> list[Value] | None:
    """Give the loss of each part; None: it is none, or hangs on random numbers."""
    found = []
    with torch.no_grad(), _kept(_states_of(method, buffers)):
        before = _generators()
        for cut in cuts:
            parts = [_part(one, size, cut) for one in given]
            value = _value(_on_a_copy(method)(*whole, *parts))
            if value is None or not _same(before, _generators()):
                return None
            found.append(value)
    return found


def _verdict(
    method: str, halves: list[Value], sizes: list[int], whole: Value, tolerance: float
) -> str | None:
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
        f"{method}() {what} over the samples of a batch: halves give {_shown(a)} and {_shown(b)}, "
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
    """Read what `loss()` or `step()` gave; None: neither a scalar nor (sum, weight)."""
    if isinstance(loss, Mapping):
        loss = loss.get("loss")
    if isinstance(loss, Tensor):
        return Value(loss.item(), None) if loss.ndim == 0 else None
    if isinstance(loss, list | tuple) and len(loss) == 2 and isinstance(loss[0], Tensor):
        weight = loss[1].item() if isinstance(loss[1], Tensor) else float(loss[1])
        return Value(loss[0].item(), weight)
    return None


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


def _batch_size(tree: Any) -> int | None:
    """Give the first dimension of the first tensor that has one."""
    return next((len(tensor) for tensor in _tensors(tree) if tensor.ndim), None)


class _CannotTell(Exception):
    """The batch is not one that we know how to cut."""


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
        if not isinstance(tree, MutableMapping):
            raise _CannotTell
        made: Any = copy.copy(tree)
        for key, item in zip(tree, items, strict=True):
            made[key] = item
        return made
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*items)
    if isinstance(tree, list | tuple):
        return type(tree)(items)
    made = copy.copy(tree)
    for field, item in zip(dataclasses.fields(tree), items, strict=True):
        object.__setattr__(made, field.name, item)
    return made


def _on_a_copy(task_loss: Callable[..., Any]) -> Callable[..., Any]:
    """Give the same method of a copy of its task, for it may keep figures there."""
    task, function = getattr(task_loss, "__self__", None), getattr(task_loss, "__func__", None)
    if function is None or not hasattr(task, "__dict__"):
        return task_loss
    twin = copy.copy(task)
    for name, value in vars(task).items():
        if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
            if value.numel() <= _COPIED_ELEMENTS:
                vars(twin)[name] = value.detach().clone()
        elif type(value) in (list, dict, set, deque):
            vars(twin)[name] = copy.copy(value)
    return MethodType(function, twin)


def _states_of(task_loss: Callable[..., Any], buffers: Iterable[Tensor]) -> list[Tensor]:
    """Give the model's buffers and those of modules that the task keeps."""
    kept = list(vars(getattr(task_loss, "__self__", None) or object).values())
    modules = [value for value in kept if isinstance(value, nn.Module)]
    return [*buffers, *(buffer for module in modules for buffer in module.buffers())]


@contextmanager
def _kept(buffers: list[Tensor]) -> Iterator[None]:
    """Put generators and buffers back at the end."""
    copies = [(buffer, buffer.detach().clone()) for buffer in buffers]
    before = _generators()
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])
        for device, state in enumerate(before[3]):
            torch.cuda.set_rng_state(state, device)
        for buffer, values in copies:
            buffer.data.copy_(values)  # not by autograd's count: backward may have it saved


def _generators() -> tuple[Any, Any, Tensor, list[Tensor]]:
    """Give the states of python's, numpy's and torch's generators, and those of the cards."""
    cards = _card_states()
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), cards


def _card_states() -> list[Tensor]:
    started = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return torch.cuda.get_rng_state_all() if started else []


def _same(one: Any, other: Any) -> bool:
    """Compare states of generators."""
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, np.ndarray):
        return bool(np.array_equal(one, other))
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    return bool(one == other)
