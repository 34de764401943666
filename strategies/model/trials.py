"""
Snapshots of a model's state around trial calls, to restore the state or to report changes.

    attributes           of every module: a counter, a list of losses, references to buffers
    untrained tensors    buffers, frozen parameters, tensors in attributes: by their values
    trained parameters   whether they are frozen; optionally whether they were written

A trial call leaves the model unchanged (`preserve_state`). A trace runs forward only once, so
changes by that forward are refused by name (`layers.py`).
"""

from __future__ import annotations

import copy
from collections import OrderedDict, defaultdict, deque
from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.overrides import TorchFunctionMode
from typing_extensions import override

from distplat.strategies.model.parameter_layout import bits_of, fill

_CONTAINERS = (list, dict, set, deque, OrderedDict, defaultdict)
_PLAIN = (bool, int, float, str)
MODULE_VARS = frozenset(vars(nn.Module()))
"""Attributes of every `nn.Module`."""
_OWN = ("_parameters", "_buffers", "_modules")
"""Attributes of `nn.Module` whose keys are user-visible names."""

Attributes = Mapping[str, tuple[Any, Any]]
"""By name: the value, and a copy if the value is a container."""


_DROPOUTS: Mapping[Any, tuple[int, str]] = {
    **dict.fromkeys((F.dropout, F.dropout1d, F.dropout2d, F.dropout3d), (1, "p")),
    **dict.fromkeys((F.alpha_dropout, F.feature_alpha_dropout, torch.dropout), (1, "p")),
    F.scaled_dot_product_attention: (4, "dropout_p"),
}
"""Dropout functions, with position and name of their probability argument."""


class WithoutDropout(TorchFunctionMode):
    """Disables dropout in torch's functions, so that they draw no random numbers."""

    @override
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call a function with a dropout probability of 0."""
        named = dict(kwargs or {})
        position, name = _DROPOUTS.get(func, (0, ""))
        if name and len(args) > position:
            args = (*args[:position], 0.0, *args[position + 1 :])
        elif name:
            named[name] = 0.0
        return func(*args, **named)


def disable_dropout(module: nn.Module) -> None:
    """Disable dropout in all modules; `preserve_state` restores it."""
    for child in module.modules():
        if isinstance(child, _DropoutNd):
            child.training = False
        elif isinstance(child, nn.MultiheadAttention | nn.RNNBase):
            child.dropout = 0.0


class Runner(nn.Module):
    """A module of distplat that runs modules which are not all registered as its children."""

    in_order: tuple[nn.Module, ...] = ()
    """Modules that it runs, in order; some are not its children."""

    def external_objects(self) -> tuple[object, ...]:
        """Return objects outside the module whose attributes a forward may change."""
        return ()


def _all_modules(*modules: nn.Module) -> list[nn.Module]:
    """Return all submodules, including those that runners run, without duplicates."""
    modules_by_id: dict[int, nn.Module] = {}
    for child in (child for module in modules for child in module.modules()):
        run = child.in_order if isinstance(child, Runner) else ()
        modules_by_id |= {id(part): part for top in (child, *run) for part in top.modules()}
    return [*modules_by_id.values()]


def external_objects(*modules: nn.Module) -> list[object]:
    """Return the external objects of all runners among modules, without duplicates."""
    runners = (module for module in _all_modules(*modules) if isinstance(module, Runner))
    objects = (obj for runner in runners for obj in runner.external_objects())
    return [*{id(obj): obj for obj in objects}.values()]


class ModuleSnapshot:
    """
    The state of modules at one moment.

    Args:
        modules: with the names that `changed` reports.
        trained: whether `changed` also reports written trained parameters.
    """

    def __init__(self, modules: Iterable[tuple[str, nn.Module]], *, trained: bool = False) -> None:
        self._modules = {id(m): (name, m, _attributes(m)) for name, m in modules}
        self._copies: dict[int, tuple[Tensor, Tensor]] = {}
        self._requires_grad: dict[int, tuple[Tensor, bool]] = {}
        self._marks: dict[int, tuple[Tensor, object]] = {}
        for tensor in self._tensors():
            if tensor.is_meta or tensor.layout is not torch.strided or not tensor.is_leaf:
                continue
            self._requires_grad[id(tensor)] = tensor, tensor.requires_grad
            if not (isinstance(tensor, nn.Parameter) and tensor.requires_grad):
                self._copies[id(tensor)] = tensor, tensor.detach().clone()
            elif trained:
                self._marks[id(tensor)] = tensor, mark_of(tensor)

    def changed(self) -> list[str]:
        """Return the names of changed attributes and tensors, in the order of the modules."""
        written = {key for key, (t, copied) in self._copies.items() if not _equal(t, copied)}
        written |= {key for key, (t, old) in self._requires_grad.items() if _freeze_changed(t, old)}
        written |= {key for key, (t, mark) in self._marks.items() if mark_of(t) != mark}
        return [
            f"{path}.{name}".lstrip(".")
            for path, module, attributes in self._modules.values()
            for name in _changed_names(attributes, vars(module), written)
        ]

    @torch.no_grad()
    def restore(self) -> None:
        """Restore the modules' state, except the values of trained parameters."""
        for _, module, attributes in self._modules.values():
            now = vars(module)
            for name in now.keys() - attributes.keys() - {"training"}:
                del now[name]
            _restore_attributes(module, attributes)
        for tensor, requires_grad in self._requires_grad.values():
            if _freeze_changed(tensor, requires_grad):
                tensor.requires_grad_(requires_grad)
        for tensor, copied in self._copies.values():
            if not _equal(tensor, copied):
                fill(tensor, copied)

    def _tensors(self) -> Iterator[Tensor]:
        for _, _, attributes in self._modules.values():
            for value, content in attributes.values():
                values = [value] if content is None else _items(content).values()
                yield from (item for item in values if isinstance(item, Tensor))


def _attributes(holder: object, excluded: Container[str] = ("training",)) -> Attributes:
    return {
        name: (value, copy.copy(value) if type(value) in _CONTAINERS else None)
        for name, value in vars(holder).items()
        if name not in excluded
    }


def _changed_names(old: Attributes, now: Mapping[str, Any], written: set[int]) -> Iterator[str]:
    """Yield the names of changed attributes; for `_OWN` attributes, of their changed entries."""
    yield from sorted(now.keys() - old.keys() - {"training"})
    for name, (value, content) in old.items():
        if name not in now or not _unchanged(value, now[name]) or id(value) in written:
            yield name
        elif content is not None:
            items, new = _items(content), _items(now[name])
            keys = [key for key in {**items, **new} if _item_changed(items, new, key, written)]
            yield from map(str, keys) if name in _OWN else [name][: len(keys)]


def _items(content: Any) -> dict[Any, Any]:
    """Return a container's items by key or index."""
    return dict(content) if isinstance(content, dict) else dict(enumerate(content))


def _item_changed(
    old: Mapping[Any, Any], new: Mapping[Any, Any], key: Any, written: set[int]
) -> bool:
    in_both = key in old and key in new
    return not in_both or not _unchanged(old[key], new[key]) or id(new[key]) in written


def _equal_content(first: Any, second: Any) -> bool:
    old, new = _items(first), _items(second)
    return [*old] == [*new] and all(map(_unchanged, old.values(), new.values()))


def _unchanged(old: Any, new: Any) -> bool:
    """Return whether two values are the same object, or equal numbers or strings."""
    if old is new:
        return True
    return type(old) is type(new) and type(old) in _PLAIN and bool(old == new)


def _restore_attributes(holder: object, attributes: Attributes) -> None:
    """Restore an object's attributes; new ones are not removed."""
    for name, (value, content) in attributes.items():
        vars(holder)[name] = value
        if content is not None and not _equal_content(content, value):
            _set_content(value, content)


def _set_content(container: Any, content: Any) -> None:
    """Replace a container's content in place, since it may be referenced elsewhere."""
    container.clear()
    if isinstance(container, dict | set):
        container.update(content)
    else:
        container.extend(content)


def _freeze_changed(tensor: Tensor, requires_grad: bool) -> bool:
    """Return whether a leaf tensor was frozen or unfrozen."""
    return tensor.is_leaf and tensor.requires_grad != requires_grad


def mark_of(tensor: Tensor) -> object:
    """Return a value that changes with a write: the version, and the sum for `.data` writes."""
    if tensor.is_meta or tensor.layout is not torch.strided:
        return tensor._version
    return tensor._version, str(tensor.detach().sum().item())


def _equal(tensor: Tensor, copied: Tensor) -> bool:
    """Compare a tensor with its copy, bit for bit."""
    if (tensor.shape, tensor.dtype) != (copied.shape, copied.dtype):
        return False
    return torch.equal(bits_of(tensor), bits_of(copied))


class AttributeReplay:
    """
    Lets a recomputing forward read the first forward's attributes, and discards its changes.

    Otherwise a counter would be one step ahead, and count twice; this includes the external objects
    of a `Runner`. The context is entered once for each recomputation.

    Args:
        module: before the first forward.
    """

    def __init__(self, module: nn.Module) -> None:
        self._holders = [*_all_modules(module), *external_objects(module)]
        self._before = self._snapshot()

    def __enter__(self) -> None:
        self._after = self._snapshot()
        self._restore_attributes(self._before)

    def __exit__(self, *error: object) -> None:
        self._restore_attributes(self._after)

    def _snapshot(self) -> list[Attributes]:
        return [_attributes(holder, MODULE_VARS) for holder in self._holders]

    def _restore_attributes(self, values: list[Attributes]) -> None:
        for holder, attributes in zip(self._holders, values, strict=True):
            _restore_attributes(holder, attributes)


@contextmanager
def preserve_attributes(*holders: object) -> Iterator[None]:
    """Restore objects' attributes, and the content of containers among them, at the end."""
    before = [(holder, _attributes(holder, ())) for holder in holders]
    try:
        yield
    finally:
        for holder, attributes in before:
            for name in vars(holder).keys() - attributes.keys():
                del vars(holder)[name]
            _restore_attributes(holder, attributes)


@contextmanager
def preserve_state(*modules: nn.Module) -> Iterator[None]:
    """
    Put modules into evaluation mode; restore modes, state and torch's generators at the end.

    This includes the modules that a `Runner` runs, and its external objects.
    """
    all_modules = _all_modules(*modules)
    modes = [(module, module.training) for module in all_modules]
    snapshot = ModuleSnapshot(("", module) for module in all_modules)
    tensors = (t for module in all_modules for t in (*module.parameters(), *module.buffers()))
    devices = sorted({t.device.index for t in tensors if t.is_cuda})
    with torch.random.fork_rng(devices=devices), preserve_attributes(*external_objects(*modules)):
        for module in all_modules:
            module.training = False
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training
            snapshot.restore()
