"""
What a model holds, before it is called for a look at it: found changed, or put back.

    attributes           of every module: a counter, a list of losses, which buffer it has
    untrained tensors    buffers, frozen parameters, tensors in attributes: by their values
    trained parameters   whether they are frozen; on request whether they were written

A trial leaves the model as it was (`untouched`). A trace runs forward once for all steps: what that
changes is refused by name (`layers.py`).
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

from distplat.strategies.model.parameter_layout import bits_of, fill

_CONTAINERS = (list, dict, set, deque, OrderedDict, defaultdict)
_PLAIN = (bool, int, float, str)
MODULE_VARS = frozenset(vars(nn.Module()))
"""Attributes that every module has."""
_OWN = ("_parameters", "_buffers", "_modules")
"""Attributes of `nn.Module` whose keys are the names that users know."""

Attributes = Mapping[str, tuple[Any, Any]]
"""By name the value, and a copy of it where it is a container."""


_DROPOUTS: Mapping[Any, tuple[int, str]] = {
    **dict.fromkeys((F.dropout, F.dropout1d, F.dropout2d, F.dropout3d), (1, "p")),
    **dict.fromkeys((F.alpha_dropout, F.feature_alpha_dropout, torch.dropout), (1, "p")),
    F.scaled_dot_product_attention: (4, "dropout_p"),
}
"""Functions that draw what they drop, and where the share of it is among their arguments."""


class WithoutDropout(TorchFunctionMode):
    """Has torch's functions drop nothing: neither do they draw random numbers."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call a function with 0 as the share that it drops."""
        named = dict(kwargs or {})
        position, name = _DROPOUTS.get(func, (0, ""))
        if name and len(args) > position:
            args = (*args[:position], 0.0, *args[position + 1 :])
        elif name:
            named[name] = 0.0
        return func(*args, **named)


def stop_dropping(module: nn.Module) -> None:
    """Have all parts of a module drop nothing; `untouched` puts that back."""
    for one in module.modules():
        if isinstance(one, _DropoutNd):
            one.training = False
        elif isinstance(one, nn.MultiheadAttention | nn.RNNBase):
            one.dropout = 0.0


class Runner(nn.Module):
    """A module of ours that runs what it need not have."""

    in_order: tuple[nn.Module, ...] = ()
    """Modules that it runs, some of which are not its own."""

    def beside(self) -> tuple[object, ...]:
        """Give objects whose attributes it may change."""
        return ()


def _every(*modules: nn.Module) -> list[nn.Module]:
    """Give all modules in these, and those that they run, each once."""
    modules_by_id: dict[int, nn.Module] = {}
    for one in (part for module in modules for part in module.modules()):
        run = one.in_order if isinstance(one, Runner) else ()
        modules_by_id |= {id(part): part for top in (one, *run) for part in top.modules()}
    return [*modules_by_id.values()]


def beside(*modules: nn.Module) -> list[object]:
    """Give the objects, each once, whose attributes the runners among modules may change."""
    runners = (one for one in _every(*modules) if isinstance(one, Runner))
    return [*{id(holder): holder for one in runners for holder in one.beside()}.values()]


class ModuleSnapshot:
    """
    What modules hold now.

    Args:
        modules: with the names that `changed` is to give.
        trained: whether `changed` is to tell of trained parameters that were written.
    """

    def __init__(self, modules: Iterable[tuple[str, nn.Module]], *, trained: bool = False) -> None:
        self._modules = {id(one): (name, one, _attributes(one)) for name, one in modules}
        self._copies: dict[int, tuple[Tensor, Tensor]] = {}
        self._wanted: dict[int, tuple[Tensor, bool]] = {}
        self._marks: dict[int, tuple[Tensor, object]] = {}
        for tensor in self._tensors():
            if tensor.is_meta or tensor.layout is not torch.strided or not tensor.is_leaf:
                continue
            self._wanted[id(tensor)] = tensor, tensor.requires_grad
            if not (isinstance(tensor, nn.Parameter) and tensor.requires_grad):
                self._copies[id(tensor)] = tensor, tensor.detach().clone()
            elif trained:
                self._marks[id(tensor)] = tensor, mark_of(tensor)

    def changed(self) -> list[str]:
        """Give the names of what is another than it was, in the order of the modules."""
        written = {key for key, (one, copied) in self._copies.items() if not _equal(one, copied)}
        written |= {
            key for key, (one, wanted) in self._wanted.items() if _freeze_changed(one, wanted)
        }
        written |= {key for key, (one, mark) in self._marks.items() if mark_of(one) != mark}
        return [
            f"{path}.{name}".lstrip(".")
            for path, module, held in self._modules.values()
            for name in _differing(held, vars(module), written)
        ]

    @torch.no_grad()
    def put_back(self) -> None:
        """Have modules hold what they held; trained parameters keep their values."""
        for _, module, held in self._modules.values():
            now = vars(module)
            for name in now.keys() - held.keys() - {"training"}:
                del now[name]
            _restore_attributes(module, held)
        for tensor, wanted in self._wanted.values():
            if _freeze_changed(tensor, wanted):
                tensor.requires_grad_(wanted)
        for tensor, copied in self._copies.values():
            if not _equal(tensor, copied):
                fill(tensor, copied)

    def _tensors(self) -> Iterator[Tensor]:
        for _, _, held in self._modules.values():
            for value, content in held.values():
                every = [value] if content is None else _parts(content).values()
                yield from (one for one in every if isinstance(one, Tensor))


def _attributes(holder: object, left_out: Container[str] = ("training",)) -> Attributes:
    return {
        name: (value, copy.copy(value) if type(value) in _CONTAINERS else None)
        for name, value in vars(holder).items()
        if name not in left_out
    }


def _differing(held: Attributes, now: Mapping[str, Any], written: set[int]) -> Iterator[str]:
    """Give the names of attributes that differ, of parameters, buffers and modules their own."""
    yield from sorted(now.keys() - held.keys() - {"training"})
    for name, (value, content) in held.items():
        if name not in now or not _same(value, now[name]) or id(value) in written:
            yield name
        elif content is not None:
            old, new = _parts(content), _parts(now[name])
            keys = [key for key in {**old, **new} if _differs(old, new, key, written)]
            yield from map(str, keys) if name in _OWN else [name][: len(keys)]


def _parts(content: Any) -> dict[Any, Any]:
    """Give what a container holds by key or index."""
    return dict(content) if isinstance(content, dict) else dict(enumerate(content))


def _differs(old: Mapping[Any, Any], new: Mapping[Any, Any], key: Any, written: set[int]) -> bool:
    both = key in old and key in new
    return not both or not _same(old[key], new[key]) or id(new[key]) in written


def _same_content(one: Any, other: Any) -> bool:
    old, new = _parts(one), _parts(other)
    return [*old] == [*new] and all(map(_same, old.values(), new.values()))


def _same(one: Any, other: Any) -> bool:
    """Whether two are one object, or equal numbers or strings."""
    if one is other:
        return True
    return type(one) is type(other) and type(one) in _PLAIN and bool(one == other)


def _restore_attributes(holder: object, held: Attributes) -> None:
    """Have an object's attributes be these; it may have others, too."""
    for name, (value, content) in held.items():
        vars(holder)[name] = value
        if content is not None and not _same_content(content, value):
            _refill(value, content)


def _refill(container: Any, content: Any) -> None:
    """Have a container, which others may hold as well, contain this."""
    container.clear()
    if isinstance(container, dict | set):
        container.update(content)
    else:
        container.extend(content)


def _freeze_changed(tensor: Tensor, wanted: bool) -> bool:
    """Whether a tensor was frozen or unfrozen; one that was computed is none of the model's."""
    return tensor.is_leaf and tensor.requires_grad != wanted


def mark_of(tensor: Tensor) -> object:
    """Give what tells of a write: the counter, and for one through `.data` the sum."""
    if tensor.is_meta or tensor.layout is not torch.strided:
        return tensor._version
    return tensor._version, str(tensor.detach().sum().item())


def _equal(tensor: Tensor, copied: Tensor) -> bool:
    """Compare a tensor with its copy, bit for bit."""
    if (tensor.shape, tensor.dtype) != (copied.shape, copied.dtype):
        return False
    return torch.equal(bits_of(tensor), bits_of(copied))


class ReadAgain:
    """
    Has a second forward find the attributes that the first one found, and leave no trace in them.

    A counter would be a step ahead, and count twice. So would one of what a `Runner` has beside. A
    context, to be entered once for each time
    that activations are computed again.

    Args:
        module: before the first forward.
    """

    def __init__(self, module: nn.Module) -> None:
        self._holders = [*_every(module), *beside(module)]
        self._found = self._values()

    def __enter__(self) -> None:
        self._after = self._values()
        self._restore_attributes(self._found)

    def __exit__(self, *error: object) -> None:
        self._restore_attributes(self._after)

    def _values(self) -> list[Attributes]:
        return [_attributes(one, MODULE_VARS) for one in self._holders]

    def _restore_attributes(self, values: list[Attributes]) -> None:
        for holder, held in zip(self._holders, values, strict=True):
            _restore_attributes(holder, held)


@contextmanager
def preserve_attributes(*holders: object) -> Iterator[None]:
    """Have objects' attributes, and what containers among them contain, be as before at the end."""
    before = [(one, _attributes(one, ())) for one in holders]
    try:
        yield
    finally:
        for one, held in before:
            for name in vars(one).keys() - held.keys():
                del vars(one)[name]
            _restore_attributes(one, held)


@contextmanager
def untouched(*modules: nn.Module) -> Iterator[None]:
    """
    Try modules in evaluation mode; modes, what they hold and torch's generators stay.

    So does what a `Runner` among them runs, and has beside.
    """
    every = _every(*modules)
    modes = [(one, one.training) for one in every]
    held = ModuleSnapshot(("", one) for one in every)
    tensors = (t for one in every for t in (*one.parameters(), *one.buffers()))
    devices = sorted({t.device.index for t in tensors if t.is_cuda})
    with torch.random.fork_rng(devices=devices), preserve_attributes(*beside(*modules)):
        for one in every:
            one.training = False
        try:
            yield
        finally:
            for one, training in modes:
                one.training = training
            held.put_back()
