"""
Which attributes the code of some objects reads: what is only written is nobody's state.

    self.last = loss.item()         writes `last`
    self.steps += 1                 reads `steps`, and writes it
    print(self.total)               reads `total`

Attributes go by their names, whoever has them. A text that is such a name counts as a read, too:
`getattr(self, "last")`.
"""

from __future__ import annotations

import dis
import functools
import inspect
import re
import sys
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from types import CodeType, FunctionType, MappingProxyType, MethodType, ModuleType
from typing import Any

from torch import nn

_LOADS = ("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR")
_OF_ALL = {"__dict__", "__getattribute__", "attrgetter", "vars"}
"""Who names these may read any attribute."""
_INSTALLED = {"site-packages", "dist-packages"}
"""Directories of libraries, whose code reads no attribute of the user's by its name."""
_HELD = 64
"""Entries of a list or a dict of an object that are looked at: hooks, for example."""
_BY_TEXT = re.compile("la*t[lt]?c")
"""`getattr(one.two, "name", default)`, by the kinds of `_kind_of`."""
_PARTS: dict[type, tuple[str, ...]] = {
    MethodType: ("__func__",),
    classmethod: ("__func__",),
    staticmethod: ("__func__",),
    property: ("fget", "fset", "fdel"),
    functools.cached_property: ("func",),
    functools.partial: ("func",),
    functools.partialmethod: ("func",),
}
"""What calls functions, and in which attributes it has them."""


class AttributeReads:
    """
    Looks through the methods of objects' classes, and the functions and classes that those name.

    Args:
        objects: the ones.
    """

    def __init__(self, objects: Iterable[object]) -> None:
        self._names: set[str] = set()
        self._all = False
        for code in _code_of(one for holder in objects for one in (holder, *_held(holder))):
            steps = [*dis.get_instructions(code)]
            self._names.update(i.argval for i in steps if i.opname in _LOADS)
            self._names.update(_texts(code))
            self._all |= not _OF_ALL.isdisjoint(code.co_names) or _computes_a_name(steps)
        self._all |= not _OF_ALL.isdisjoint(self._names)

    def may_read(self, holder: object, name: str) -> bool:
        """Say whether an object's attribute of that name is read by the code, or by a library's."""
        return self._all or name in self._names or _is_library(type(holder))


def _texts(code: CodeType) -> Iterator[str]:
    """Give the texts in code: of a tuple that a loop goes through, too; not of a class's slots."""
    left: list[object] = [*code.co_consts]
    while left:
        one = left.pop()
        if isinstance(one, str):
            yield one
        elif isinstance(one, tuple | frozenset) and code.co_flags & inspect.CO_OPTIMIZED:
            left += one


def _computes_a_name(steps: list[dis.Instruction]) -> bool:
    """Say whether code has a `getattr` of another name than a text."""
    kinds = [_kind_of(step) for step in steps]
    after = (kinds[n + 1 : n + 16] for n, one in enumerate(steps) if one.argval == "getattr")
    return not all(_BY_TEXT.match("".join(some)) for some in after)


def _kind_of(step: dis.Instruction) -> str:
    name = step.opname
    if name in ("EXTENDED_ARG", "PRECALL", "PUSH_NULL"):
        return ""
    if name in ("LOAD_ATTR", "CALL"):
        return "a" if name == "LOAD_ATTR" else "c"
    if name == "LOAD_CONST" and isinstance(step.argval, str):
        return "t"
    return "l" if name.startswith("LOAD_") else "-"


def _code_of(values: Iterable[object]) -> Iterator[CodeType]:
    """Give the code that calls of these values may run, as far as it is the user's."""
    left, seen = [*values], dict[int, object]()  # by identity: not all have a hash
    while left:
        value = left.pop()
        if id(value) in seen:
            continue
        seen[id(value)] = value
        left += _parts(value)
        if type(value) is not FunctionType:
            continue
        module = str(value.__globals__.get("__name__"))
        if _is_without(module):
            continue
        for code in _nested(value.__code__):
            yield code
            if not _is_installed(module):
                left += _named_in(code, value.__globals__)


def _parts(value: Any) -> Iterator[object]:
    """Give what a call of a value may call: a class's methods, or what a decorator has wrapped."""
    kind = type(value)
    yield _attributes(value).get("__wrapped__")
    if issubclass(kind, type):
        yield from _members_of(value)
    elif kind in _PARTS:
        yield from (getattr(value, name) for name in _PARTS[kind])
    elif kind is not FunctionType:
        yield kind
    else:
        for cell in value.__closure__ or ():
            with suppress(ValueError):  # it is not assigned yet
                yield cell.cell_contents


def _members_of(kind: type) -> Iterator[object]:
    """
    Give what a class of the user's and its bases have: methods, properties, objects.

    Of bases that are a library's, too, which read their own attributes, such as `p` of a Dropout.
    """
    for one in () if _is_library(kind) else kind.__mro__:
        if one is not nn.Module and not _is_without(str(one.__module__)):
            yield from [*vars(one).values()]


def _named_in(code: CodeType, names: dict[str, Any]) -> Iterator[object]:
    """Give what code names and may call: of other modules, too, and of those that it imports."""
    package = names.get("__package__") or ""
    imported = [n for name in code.co_names for n in (name, f"{package}.{name}")]
    found = [names[name] for name in code.co_names if name in names]
    found += [sys.modules[name] for name in imported if name in sys.modules]
    modules = [one for one in found if issubclass(type(one), ModuleType)]
    found += [vars(one)[name] for one in modules for name in code.co_names if name in vars(one)]
    for one in found:
        if type(one) is not FunctionType or not _is_library(one):
            yield one


def _held(holder: object) -> Iterator[object]:
    """Give what an object keeps, such as a function, or hooks in a dictionary."""
    for value in [*_attributes(holder).values()]:
        yield value
        if type(value) in (dict, OrderedDict, list, tuple) and len(value) <= _HELD:
            yield from value.values() if isinstance(value, dict) else value


def _attributes(value: object) -> Mapping[str, Any]:
    """Give what an object has itself, whatever it answers who asks for an attribute."""
    try:
        found = object.__getattribute__(value, "__dict__")
    except Exception:  # it has none, or a proxy asks for what it stands for
        return {}
    return found if isinstance(found, dict | MappingProxyType) else {}


def _is_library(one: type | FunctionType) -> bool:
    module = str(one.__module__)
    return _is_without(module) or _is_installed(module)


def _is_without(module: str) -> bool:
    """Whether a module is Python's or ours, of which none reads what a user's class has."""
    top = module.partition(".")[0]
    return top == "distplat" or top in sys.stdlib_module_names


def _is_installed(module: str) -> bool:
    file = getattr(sys.modules.get(module), "__file__", None) or ""
    return module.partition(".")[0] == "torch" or not _INSTALLED.isdisjoint(Path(file).parts)


def _nested(code: CodeType) -> Iterator[CodeType]:
    """Give code, and that of functions in it; not of annotations, which name what they are of."""
    if code.co_name == "__annotate__":
        return
    yield code
    for one in code.co_consts:
        if isinstance(one, CodeType):
            yield from _nested(one)
