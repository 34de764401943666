"""
What becomes of an attribute in the source of its class: is it shown only, or computed with?

    self.steps += 1                                 nothing: it goes into itself
    if self.steps % 100 == 0:                       nothing, for this only shows:
        mean = self.total / self.steps              goes on into `mean`
        print(f"{mean:.3f}")                        shows it
    return loss * min(1, self.steps / 1000)         computes with it

A value is followed through the assignments of the files of its classes, where variables of one name
are taken for one. Anything that is not known to show a value counts as computing.
"""

from __future__ import annotations

import ast
import inspect
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

_PASSES = (
    *(ast.BinOp, ast.UnaryOp, ast.Compare, ast.Tuple, ast.List),
    *(ast.JoinedStr, ast.FormattedValue, ast.keyword, ast.Subscript, ast.Slice),
)
"""Expressions that give a value made of their parts, and do nothing else."""
_FUNCTIONS = {
    *("abs", "float", "format", "int", "len", "list", "max", "min", "round", "sorted", "str"),
    "sum",
}
_METHODS = {
    *("cat", "clone", "cpu", "detach", "exp", "format", "item", "mean", "median", "norm", "numpy"),
    *("sqrt", "stack", "std", "sum", "tolist"),
}
"""Calls that do so."""
_KEEPS = {"append", "appendleft", "clear", "extend"}
"""Methods that put values into a list, as an assignment does into a variable."""
_SHOWS = {
    *("critical", "debug", "error", "info", "log", "print", "warning", "write"),
    *("add_scalar", "set_description", "set_postfix"),
}
"""Functions, and methods of loggers, tqdm and TensorBoard, that show what they are given."""
_LIBRARIES = {"torch", "distplat", "typing", "typing_extensions", "builtins", "abc", "collections"}
"""Top packages whose classes compute with no attribute of the user's."""
_PARSER = threading.Lock()
"""One thread at a time: Python 3.11 counts the depth of what it parses for all threads together."""


class AttributeUse:
    """
    Reads the files of some objects' classes, once it is asked.

    Args:
        objects: whose methods may read each other's attributes.
    """

    def __init__(self, objects: Iterable[object]) -> None:
        self._kinds = {type(one) for one in objects}
        self._sources: dict[str, _Source] = {}  #: by path

    def is_shown_only(self, holder: object, name: str) -> bool:
        """
        Say whether nothing is computed with an attribute, as far as sources tell.

        Args:
            holder: has it; one of the objects.
            name: of the attribute.

        Returns:
            False: it is, or it may be.
        """
        try:
            own, every = self._read([type(holder)]), self._read(self._kinds)
        except (OSError, SyntaxError, ValueError, RecursionError, SystemError):
            return False
        if not own or any(one.lends_itself() for one in own):
            return False
        found, left = {f".{name}"}, [f".{name}"]
        while left:
            variable = left.pop()
            for source in every:
                goes_to = source.followed(variable)
                if goes_to is None:
                    return False
                left += goes_to - found
                found |= goes_to
        return True

    def _read(self, kinds: Iterable[type]) -> list[_Source]:
        """
        Read the files of classes.

        Raises:
            OSError: there is none, or none any more; see `_Source` for others.
        """
        paths = {path for kind in kinds for path in _files_of(kind)}
        for path in paths - self._sources.keys():
            self._sources[path] = _Source(path)
        return [self._sources[path] for path in sorted(paths)]


def _files_of(kind: type) -> set[str]:
    """
    Give the files in which a class and its bases have their methods.

    Raises:
        OSError: they are in none: in a cell of a notebook, or in text that was executed.
    """
    found: set[str] = set()
    for one in kind.__mro__:
        if one.__module__.partition(".")[0] in _LIBRARIES:
            continue
        functions = [inspect.unwrap(f) for f in map(_function, vars(one).values()) if f is not None]
        names = {f.__code__.co_filename for f in functions if f.__module__ == one.__module__}
        files = {name for name in names if not name.startswith("<")}
        if names and not files:
            raise OSError(f"{one.__qualname__} is in no file")
        found |= files
    return found


def _function(value: Any) -> Any:
    """Give the function of a method, None for what is none."""
    found = getattr(value, "__func__", getattr(value, "fget", value))
    return found if inspect.isfunction(found) else None


class _Source:
    """
    A file.

    Args:
        path: of it.

    Raises:
        OSError: it is not there.
        SyntaxError: it is not Python's.
        ValueError: neither.
        RecursionError: it is nested too deep.
        SystemError: another thread, not of ours, parsed at the same time.
    """

    def __init__(self, path: str) -> None:
        text = Path(path).read_text(encoding="utf-8")
        with _PARSER:
            tree = ast.parse(text)
        self._nodes = [*ast.walk(tree)]
        self._above = {below: one for one in self._nodes for below in ast.iter_child_nodes(one)}

    def lends_itself(self) -> bool:
        """Say whether a method hands its object on as a whole: others may read any attribute."""
        first = {
            below.args.args[0].arg
            for one in self._nodes
            if isinstance(one, ast.ClassDef)
            for below in one.body
            if isinstance(below, ast.FunctionDef) and below.args.args
        }
        return any(
            (isinstance(one, ast.Attribute) and one.attr == "__dict__")
            or (isinstance(one, ast.Name) and one.id in first and self._is_lent(one))
            for one in self._nodes
        )

    def _is_lent(self, one: ast.Name) -> bool:
        above = self._above[one]
        if isinstance(above, ast.Attribute):
            return False
        return not (isinstance(above, ast.Call) and _called(above) == "super")

    def followed(self, variable: str) -> set[str] | None:
        """
        Say what is made of a variable: of a name, or of an attribute as ".name".

        Returns:
            The variables that it goes into; None: it is computed with.
        """
        found: set[str] = set()
        for one in self._nodes:
            goes_to: set[str] | None = set()
            if isinstance(one, ast.Attribute) and f".{one.attr}" == variable:
                goes_to = self._goes_to(one)
            elif isinstance(one, ast.Name) and one.id == variable:
                goes_to = self._goes_to(one)
            elif isinstance(one, ast.Constant) and one.value == variable[1:]:
                return None  # getattr
            elif isinstance(one, ast.Global) and variable in one.names:
                return None  # another file may read it
            if goes_to is None:
                return None
            found |= goes_to
        return found

    def _goes_to(self, one: ast.Attribute | ast.Name) -> set[str] | None:
        if not isinstance(one.ctx, ast.Load):
            return set()
        node: ast.AST = one
        above = self._above[node]
        while not isinstance(above, ast.stmt):
            if not self._passes(above):
                return None
            node, above = above, self._above[above]
        if isinstance(above, ast.If) and node is above.test:
            return _under_a_condition([*above.body, *above.orelse])
        return _made_by(above)

    def _passes(self, one: ast.AST) -> bool:
        """Say whether an expression does no more than to give a value, or to show it."""
        above = self._above[one]
        if isinstance(one, ast.Attribute):
            known = _METHODS | _KEEPS
            return isinstance(above, ast.Call) and above.func is one and one.attr in known
        if isinstance(one, ast.Call) and isinstance(above, ast.Expr):
            return _shows(one) or bool(_kept_by(one))
        if isinstance(one, ast.BoolOp | ast.IfExp):  # it may leave a call out
            return _is_plain(one)
        return isinstance(one, _PASSES) or _is_plain_call(one)


def _under_a_condition(body: Iterable[ast.stmt]) -> set[str] | None:
    """Say what statements make that depend on a condition; None: more than values to look at."""
    found: set[str] = set()
    for one in body:
        if isinstance(one, ast.If):
            targets = _under_a_condition([*one.body, *one.orelse])
            parts = [one.test]
        else:
            targets = _made_by(one)
            parts = [*_values_of(one)]
        if targets is None or not all(map(_is_plain, parts)):
            return None
        found |= targets
    return found


def _made_by(one: ast.stmt) -> set[str] | None:
    """Give the variables that a statement makes; None: it does something else."""
    if isinstance(one, ast.Pass):
        return set()
    if isinstance(one, ast.Expr):
        shown = _shows(one.value) or isinstance(one.value, ast.Constant)
        return _kept_by(one.value) or (set() if shown else None)
    if isinstance(one, ast.AugAssign):  # of a name it may write into a tensor of another's
        return {f".{one.target.attr}"} if isinstance(one.target, ast.Attribute) else None
    targets = one.targets if isinstance(one, ast.Assign) else []
    if isinstance(one, ast.AnnAssign):
        targets = [one.target]
    names = {_variable(target) for target in targets}
    return None if not names or "" in names else names


def _variable(target: ast.expr) -> str:
    if isinstance(target, ast.Attribute):
        return f".{target.attr}"
    return target.id if isinstance(target, ast.Name) else ""


def _values_of(one: ast.stmt) -> Iterator[ast.expr]:
    """Give the expressions of a statement that `_made_by` knows."""
    if isinstance(one, ast.Expr) and isinstance(one.value, ast.Call):
        yield from (*one.value.args, *(keyword.value for keyword in one.value.keywords))
    elif isinstance(one, ast.Assign | ast.AugAssign | ast.AnnAssign) and one.value is not None:
        yield one.value


def _shows(one: ast.expr) -> bool:
    """Say whether something is printed or logged, and not by a method of the user's own."""
    return isinstance(one, ast.Call) and _called(one) in _SHOWS and not _is_own(one)


def _is_own(one: ast.Call) -> bool:
    """Say whether a method of the user's own is called, whatever its name."""
    method = one.func
    return (
        isinstance(method, ast.Attribute)
        and isinstance(method.value, ast.Name)
        and method.value.id == "self"
    )


def _kept_by(one: ast.expr) -> set[str]:
    """Give the variable, a list, into which a call puts its arguments; empty: into none."""
    if not isinstance(one, ast.Call) or not isinstance(one.func, ast.Attribute):
        return set()
    return {_variable(one.func.value)} - {""} if one.func.attr in _KEEPS else set()


def _is_plain(value: ast.expr) -> bool:
    """Say whether an expression calls nothing that may do more than give a value."""
    acts = ast.NamedExpr, ast.Await, ast.Yield, ast.YieldFrom
    return all(
        not isinstance(one, acts) and (not isinstance(one, ast.Call) or _is_plain_call(one))
        for one in ast.walk(value)
    )


def _is_plain_call(one: ast.AST) -> bool:
    if not isinstance(one, ast.Call) or _is_own(one):
        return False
    known = _FUNCTIONS if isinstance(one.func, ast.Name) else _METHODS
    return _called(one) in known


def _called(one: ast.Call) -> str:
    """Give the name of the function or method that is called."""
    if isinstance(one.func, ast.Attribute):
        return one.func.attr
    return one.func.id if isinstance(one.func, ast.Name) else ""
