"""
State of a loss outside of parameters and the model's buffers, such as `self.step += 1`.

Checkpoints do not have this state, and each worker has its own. So a warning names the state that
the first micro-batch changes. New attributes, such as the hidden state of a recurrent layer, may be
write-only: they count if the second micro-batch reads and replaces them. A loss that is computed
again for parts of a batch starts from the recorded state.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from typing_extensions import override

from distplat.strategies.loop.containers import tensors_in
from distplat.strategies.loop.task_settings import named_task_modules
from distplat.strategies.model.trials import MODULE_VARS, mark_of
from distplat.strategies.task import Task

_COPIED_ELEMENTS = 1 << 20
"""Tensors up to this size are copied."""
_SHOWN = 4

Holder = tuple[str, dict[str, Any]]
"""A prefix of names in messages, and a dictionary of values by name."""


class LossState:
    """
    The state of task and model before a micro-batch.

    Args:
        task: the user's task.
        model: the task's model.
    """

    def __init__(self, task: Task, model: nn.Module) -> None:
        own = [*_of_task(task, model)]
        self._own = [(held, _values(held)) for _, held in own]
        self._tensors = [*_untrained(task, model)]
        every = [*own, *_of_model(model)]
        self._marks = [(name, held, _marks(held)) for name, held in every]
        self._set = [
            (name, held, {k for k, v in held.items() if v is not None}) for name, held in every
        ]
        self._moved = [(name, tensor, mark_of(tensor)) for name, tensor in self._tensors]
        small = sum(tensor.numel() for _, tensor in self._tensors) <= _COPIED_ELEMENTS
        self._copies = [(t, t.detach().clone()) for _, t in self._tensors] if small else []

    def changed(self) -> list[str]:
        """Return the names of changed numbers and tensors."""
        names = [
            f"{name}{key}"
            for name, held, marks in self._marks
            for key, mark in marks.items()
            if key in held and _differs(mark, held[key])
        ]
        return names + [name for name, tensor, mark in self._moved if mark_of(tensor) != mark]

    def begun(self) -> NewState | None:
        """Return the attributes that have been set since; None: no new attributes."""
        attributes = {
            f"{name}{key}": (held, key)
            for name, held, before in self._set
            for key in held
            if key not in before and key not in MODULE_VARS
        }
        return NewState(attributes) if attributes else None

    def begin_again(self, twin: dict[str, Any]) -> None:
        """Restore the state in a copy of the task, and in the task's modules."""
        for held, values in [(twin, self._own[0][1]), *self._own[1:]]:
            held.update({name: _copied(value) for name, value in values.items()})
        for tensor, copied in self._copies:
            tensor.data.copy_(copied)  # keeps the version counter: backward may need the tensor

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Restore the attributes of the task's modules on exit."""
        current = [(held, {name: held[name] for name in values}) for held, values in self._own[1:]]
        try:
            yield
        finally:
            for held, values in current:
                held.update(values)


class NewState(TorchFunctionMode):
    """
    Attributes that the first micro-batch has set; while entered, records which are read.

    Args:
        attributes: dictionary and key of each attribute, by its name in messages.
    """

    def __init__(self, attributes: Mapping[str, tuple[dict[str, Any], str]]) -> None:
        super().__init__()
        values = {name: held[key] for name, (held, key) in attributes.items()}
        self._attributes = {
            name: attributes[name] for name, one in values.items() if _is_comparable(one)
        }
        self._values = {name: values[name] for name in self._attributes}
        self._names = {id(t): n for n, one in self._values.items() for t in _untrained_tensors(one)}
        self._marks = {
            n: [*map(mark_of, _untrained_tensors(v))]
            for n, v in self._values.items()
            if isinstance(v, nn.Module)
        }
        self._copies = {
            n: [t.detach().clone() for t in tensors_in(v)]
            for n, v in self._values.items()
            if n not in self._marks
        }
        self._read: set[str] = {name for name, one in self._values.items() if _is_number(one)}

    @override
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call a torch function, and record the attributes that it reads."""
        for one in tensors_in((*args, *(kwargs or {}).values())):
            if id(one) in self._names:
                self._read.add(self._names[id(one)])
        return func(*args, **(kwargs or {}))

    def carried(self) -> list[str]:
        """Return the names of attributes that were read and changed; numbers count as read."""
        return [name for name in self._attributes if name in self._read and self._has_changed(name)]

    def _has_changed(self, name: str) -> bool:
        held, key = self._attributes[name]
        now, before = held.get(key), self._values[name]
        if _is_number(before):
            return _is_number(now) and now != before
        if name in self._marks:
            return [*map(mark_of, _untrained_tensors(now))] != self._marks[name]
        tensors, copies = [*tensors_in(now)], self._copies[name]
        if not all(map(_is_plain, tensors)):
            return True
        kinds = [[(t.shape, t.dtype, t.device) for t in some] for some in (tensors, copies)]
        return kinds[0] != kinds[1] or not all(map(torch.equal, tensors, copies))


def _is_comparable(value: object) -> bool:
    """Return whether a value is a module, a number, or small tensors, such as an LSTM's state."""
    tensors = [*_untrained_tensors(value)]
    size = sum(one.numel() for one in tensors)
    if isinstance(value, nn.Module):  # such as a teacher, a copy of the model
        return size > 0
    return _is_number(value) or (all(map(_is_plain, tensors)) and 0 < size <= _COPIED_ELEMENTS)


def _untrained_tensors(value: object) -> Iterator[Tensor]:
    """Return the tensors in a value; for a module, buffers and frozen parameters."""
    if not isinstance(value, nn.Module):
        yield from tensors_in(value)
        return
    yield from value.buffers()
    yield from (one for one in value.parameters() if not one.requires_grad)


def _is_plain(tensor: Tensor) -> bool:
    return tensor.layout is torch.strided and not tensor.is_nested


def state_warning(names: Sequence[str]) -> str | None:
    """Return a warning that micro-batches change state outside of checkpoints; None: no warning."""
    if not names:
        return None
    shown = ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
    what, them = (
        ("a micro-batch changes", "it") if len(names) == 1 else ("micro-batches change", "them")
    )
    return (
        f"{what} {shown}: no checkpoint has {them}, so resumed runs and replaced workers start "
        f"without {them}, and each worker has its own values, of its own micro-batches. If the "
        "result depends on this state, make it a buffer of what model() returns"
    )


def _of_task(task: Task, model: nn.Module) -> Iterator[Holder]:
    """Return the task's attributes, then those of its modules, except metrics."""
    yield "self.", vars(task)
    for name, module in named_task_modules(task, model):
        if not (hasattr(module, "update") and hasattr(module, "compute")):
            for path, one in module.named_modules():
                yield f"self.{name}.{path}.".replace("..", "."), vars(one)


def _of_model(model: nn.Module) -> Iterator[Holder]:
    for path, one in model.named_modules():
        yield f"the model's {path}.".replace("'s .", "'s "), vars(one)


def _untrained(task: Task, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Return buffers and frozen parameters of the task's modules."""
    for start, held in [*_of_task(task, model)][1:]:
        for tensors in (held["_buffers"], held["_parameters"]):
            for name, tensor in tensors.items():
                if tensor is not None and not tensor.requires_grad:
                    yield f"{start}{name}", tensor


def _is_number(value: object) -> bool:
    return type(value) in (int, float)


def _is_tensor(value: object) -> bool:
    return isinstance(value, Tensor) and not value.requires_grad and value.is_leaf


def _watched(held: dict[str, Any]) -> dict[str, Any]:
    return {
        n: v for n, v in held.items() if n not in MODULE_VARS and (_is_number(v) or _is_tensor(v))
    }


def _values(held: dict[str, Any]) -> dict[str, Any]:
    """Return numbers, and copies of small tensors."""
    small = {
        n: v for n, v in _watched(held).items() if _is_number(v) or v.numel() <= _COPIED_ELEMENTS
    }
    return {name: _copied(value) for name, value in small.items()}


def _copied(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


def _marks(held: dict[str, Any]) -> dict[str, Any]:
    """Return numbers, and tensors with marks that change at a write."""
    watched = _watched(held)
    return {n: (v, mark_of(v)) if isinstance(v, Tensor) else v for n, v in watched.items()}


def _differs(mark: Any, now: Any) -> bool:
    if not isinstance(mark, tuple):
        return _is_number(now) and now != mark and (now == now or mark == mark)
    before, written = mark
    if not _is_tensor(now) or (now.shape, now.dtype) != (before.shape, before.dtype):
        return False  # replaced by unrelated data, such as the last batch
    return bool(mark_of(now) != written) if now is before else not torch.equal(now, before)
