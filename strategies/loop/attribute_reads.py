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
import inspect
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

_LOADS = ("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR")
_OF_ALL = {"__dict__", "vars"}
"""Who names these may read any attribute."""
_INSTALLED = {"site-packages", "dist-packages"}
"""Directories of libraries, whose code reads no attribute of the user's by its name."""


class AttributeReads:
    """
    Looks through the methods of objects' classes, and the functions and classes that those name.

    Args:
        objects: the ones.
    """

    def __init__(self, objects: Iterable[object]) -> None:
        self._names: set[str] = set()
        for code in _code_of({type(one) for one in objects}):
            self._names |= _OF_ALL & {*code.co_names}
            self._names.update(one for one in code.co_consts if isinstance(one, str))
            self._names.update(i.argval for i in dis.get_instructions(code) if i.opname in _LOADS)
        self._all = bool(_OF_ALL & self._names)

    def may_read(self, holder: object, name: str) -> bool:
        """Say whether an object's attribute of that name is read by the code, or by a library's."""
        return self._all or name in self._names or _is_library(type(holder))


def _code_of(kinds: Iterable[type]) -> Iterator[CodeType]:
    left = [one for kind in kinds for one in _methods_of(kind)]
    seen: set[CodeType] = set()
    while left:
        function = left.pop()
        for code in _nested(function.__code__):
            if code not in seen:
                seen.add(code)
                yield code
                left += _named_in(code, function.__globals__)


def _named_in(code: CodeType, names: dict[str, Any]) -> Iterator[FunctionType]:
    """Give the functions, and the methods of classes, that code names: of other modules, too."""
    found = [names[name] for name in code.co_names if name in names]
    modules = [one for one in found if isinstance(one, ModuleType)]
    found += [vars(one)[name] for one in modules for name in code.co_names if name in vars(one)]
    for one in found:
        if inspect.isclass(one):
            yield from _methods_of(one)
        elif isinstance(one, FunctionType) and not _is_library(one):
            yield one


def _methods_of(kind: type) -> Iterator[FunctionType]:
    """Give the methods of a class and its bases, static ones and properties, too."""
    for one in kind.__mro__:
        for value in () if _is_library(one) else [*vars(one).values()]:
            for part in (value, *(getattr(value, n, None) for n in ("__func__", "fget"))):
                if isinstance(part, FunctionType):
                    yield part


def _is_library(one: type | FunctionType) -> bool:
    module = one.__module__ or ""
    top, file = module.partition(".")[0], getattr(sys.modules.get(module), "__file__", None) or ""
    known = top in ("torch", "distplat") or top in sys.stdlib_module_names
    return known or not _INSTALLED.isdisjoint(Path(file).parts)


def _nested(code: CodeType) -> Iterator[CodeType]:
    """Give code, and that of functions in it."""
    yield code
    for one in code.co_consts:
        if isinstance(one, CodeType):
            yield from _nested(one)
