"""
YAML text to plain values, with the place of each field, and nothing that could run or explode.

No PyYAML constructor takes part: the text is composed into nodes and this module makes the values
of them, so no tag can name code. Numbers follow YAML 1.2's core schema, for 1.1 has traps in a job
file: there `1e-3` is a text, `010` is eight, `1:30` is ninety and `2026-01-01` a date. Here they
are a number, ten, and two texts. As in 1.1, yes, no, on and off are booleans: other tools that
read the same file, PyYAML first of all, take them for that.
"""

import re
from typing import Any, NoReturn

import yaml
from yaml.composer import Composer
from yaml.error import MarkedYAMLError
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode
from yaml.parser import Parser
from yaml.reader import Reader, ReaderError
from yaml.resolver import BaseResolver
from yaml.scanner import Scanner

from distplat.platform.errors import Problem, SpecError

MAX_BYTES = 1_000_000
MAX_NODES = 10_000
"""Keys and values, an alias counted as all that it stands for: this is what stops alias bombs."""
MAX_DEPTH = 50
MAX_DIGITS = 300

FieldPath = tuple[str | int, ...]
Marks = dict[FieldPath, tuple[int, int]]
"""Line and column, from 1, of each field: of its key in a mapping, of the item in a list."""

_TAG = "tag:yaml.org,2002:"
_WORDING = {
    "'\\t'": ("a tab cannot stand here", "indent with spaces"),
    "another document": ("a second document begins here", "one file holds one document"),
    "cannot start any token": ("a text cannot begin with this character", "quote it"),
    "undefined alias": ("an alias (*name) of nothing (&name) above", "quote a text with '*'"),
}
"""What PyYAML says, by a part of it, and what a user should read instead, with a hint."""

_BREAK = re.compile(r"[\r\n\x85\u2028\u2029]")
_SURROGATE = re.compile(r"[\ud800-\udfff]")


class _Rules(BaseResolver):
    """Which plain words are not text. Reader and writer share it, so that each reads the other."""


for _kind, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"(?i:yes|no|true|false|on|off)", list("yYnNtTfFoO")),
    ("int", r"[-+]?[0-9][0-9_]*|0x[0-9a-fA-F]+|0o[0-7]+", list("-+0123456789")),
    (
        "float",
        r"[-+]?(?:\.[0-9]+|[0-9][0-9_]*(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
    ("merge", r"<<", ["<"]),
):
    _Rules.add_implicit_resolver(_TAG + _kind, re.compile(rf"(?:{_pattern})\Z"), _first)


class _Nodes(Reader, Scanner, Parser, Composer, _Rules):
    """Composes nodes within the limits."""

    def __init__(self, text: str) -> None:
        Reader.__init__(self, text)
        Scanner.__init__(self)
        Parser.__init__(self)
        Composer.__init__(self)
        _Rules.__init__(self)
        self._depth = 0
        self._count = 0
        self._sizes: dict[Node, int] = {}

    def compose_node(self, parent: Node | None, index: object) -> Node | None:
        """
        Compose one node and all below it.

        Raises:
            MarkedYAMLError: a tag, too many or too deep, or an alias to a node around itself.
        """
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if getattr(event, "tag", None) is not None:
            _refuse("tags (words that begin with '!') are not allowed", event.start_mark)
        if self._depth >= MAX_DEPTH:
            _refuse(f"nested deeper than {MAX_DEPTH}", event.start_mark)
        before = self._count
        self._depth += 1
        node: Node | None = super().compose_node(parent, index)  # type: ignore[arg-type]
        self._depth -= 1
        if node is None:
            return None
        if not isinstance(event, yaml.AliasEvent):
            self._count += 1
            self._sizes[node] = self._count - before
        elif node in self._sizes:
            self._count += self._sizes[node]
        else:
            _refuse("an alias stands inside what it names", event.start_mark)
        if self._count > MAX_NODES:
            _refuse(f"more than {MAX_NODES} values, each alias counted in full", event.start_mark)
        return node


def _refuse(message: str, mark: Any) -> NoReturn:
    raise MarkedYAMLError(problem=message, problem_mark=mark)


class _Values:
    """Makes values of nodes, each alias anew, and notes where each field stands."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.marks: Marks = {}
        self.problems: list[Problem] = []

    def make(self, node: Node, path: FieldPath) -> object:
        """Make the value of a node that stands at `path`."""
        if len(path) > MAX_DEPTH:  # aliases in aliases get here
            _refuse(f"nested deeper than {MAX_DEPTH}", node.start_mark)
        if isinstance(node, MappingNode):
            return self._mapping(node, path)
        if isinstance(node, SequenceNode):
            return [self._item(item, (*path, i)) for i, item in enumerate(node.value)]
        return self._scalar(node, path)

    def _item(self, node: Node, path: FieldPath) -> object:
        self.marks[path] = _place(node.start_mark)
        return self.make(node, path)

    def _mapping(self, node: MappingNode, path: FieldPath) -> dict[str, object]:
        found: dict[str, object] = {}
        for key_node, value_node in node.value:
            key = self._key(key_node, path)
            if key is None:
                continue
            where = (*path, key)
            if key in found:
                first, again = self.marks[where][0], _place(key_node.start_mark)[0]
                self._note(where, f"set twice: in line {first} and in line {again}", key_node)
                continue
            self.marks[where] = _place(key_node.start_mark)
            found[key] = self.make(value_node, where)
        return found

    def _key(self, node: Node, path: FieldPath) -> str | None:
        """Give the key's text; None, and a problem, where it has none."""
        kind = node.tag.removeprefix(_TAG)
        if kind == "str":
            return str(self._scalar(node, path))
        if kind == "merge":
            self._note(path, "merge keys (<<) are not read", node, "write the fields out")
        elif isinstance(node, ScalarNode):
            message = f"a key must be text, and {node.value[:40]!r} is read as {kind}"
            self._note(path, message, node, "quote it")
        else:
            self._note(path, "a key must be text, not a mapping or a list", node)
        return None

    def _scalar(self, node: Node, path: FieldPath) -> object:
        text, kind = str(node.value), node.tag.removeprefix(_TAG)
        if kind == "null":
            return None
        if kind == "bool":
            return text.casefold() in ("yes", "true", "on")
        if kind in ("int", "float") and len(text) > MAX_DIGITS:
            self._note(path, f"a number may have {MAX_DIGITS} digits, this has {len(text)}", node)
            return None
        if kind == "int":
            return int(text, 0) if text[:2] in ("0x", "0o") else int(text.replace("_", ""))
        if kind == "float":
            sign, _, special = text.lower().rpartition(".")
            is_special = special in ("inf", "nan")
            return float(sign + special if is_special else text.replace("_", ""))
        if _SURROGATE.search(text):
            self._note(path, "half of a surrogate pair is no text", node)
        return text

    def _note(self, where: FieldPath, message: str, node: Node, hint: str = "") -> None:
        line, column = _place(node.start_mark)
        self.problems.append(Problem(where, message, hint, self.file, line, column))


def parse_yaml(text: str, file: str) -> tuple[object, Marks]:
    """
    Read one YAML document.

    Args:
        text: the document; an empty one reads as None.
        file: what to call it in messages.

    Returns:
        The value, made of None, bool, int, float, str, list and dict alone, and where each field
        stands.

    Raises:
        SpecError: it is not YAML, or over a limit, or has tags, keys twice, keys that are no text.
    """
    if len(text) > MAX_BYTES:
        raise too_large(file)
    values = _Values(file)
    try:
        nodes = _Nodes(text)
        try:
            root = nodes.get_single_node()
        except (ValueError, OverflowError):  # PyYAML lets chr() and int() raise
            _refuse("an escape or a number that cannot be", nodes.get_mark())
        value = values.make(root, ()) if root is not None else None
    except ReaderError as error:
        raise _unprintable(error, text, file) from error
    except MarkedYAMLError as error:
        raise _misread(error, text, file) from error
    if values.problems:
        raise SpecError(*values.problems)
    return value, values.marks


def dump_yaml(value: object) -> str:
    """Write a value that `parse_yaml` could have made, in the order of its keys."""
    return yaml.dump(value, Dumper=_Writer, sort_keys=False, allow_unicode=True)


def too_large(file: str) -> SpecError:
    """Make the error for a document over the limit; for who would not even read it."""
    return SpecError(Problem((), f"is larger than {MAX_BYTES // 1000} kB", file=file))


class _Writer(yaml.SafeDumper):
    yaml_implicit_resolvers = _Rules.yaml_implicit_resolvers

    def ignore_aliases(self, data: object) -> bool:
        """Write a shared value twice: anchors would only puzzle the reader."""
        return True

    def text(self, data: str) -> ScalarNode:
        """Escape Unicode's line breaks: PyYAML would write them plain and read them as \\n."""
        style = '"' if _BREAK.search(data.replace("\n", "")) else None
        return self.represent_scalar(_TAG + "str", data, style=style)


_Writer.add_representer(str, _Writer.text)


def _place(mark: Any) -> tuple[int, int]:  # PyYAML has two Mark classes, of one shape
    return mark.line + 1, mark.column + 1


def _misread(error: MarkedYAMLError, text: str, file: str) -> SpecError:
    """Say what PyYAML found, where, and show the line with a caret below."""
    mark: Any = error.problem_mark or error.context_mark
    message, hint = error.problem or error.context or "is not YAML", ""
    known = next((said for found, said in _WORDING.items() if found in message), None)
    if known:
        message, hint = known
    elif error.context and error.context_mark and error.context_mark.line != mark.line:
        message += f" ({error.context} of line {error.context_mark.line + 1})"
    return _at(mark.index, mark.line, mark.column, message[:200], hint, text, file)


def _unprintable(error: ReaderError, text: str, file: str) -> SpecError:
    lines = _BREAK.split(text[: error.position].replace("\r\n", "\n"))
    message = f"the character U+{ord(text[error.position]):04X} may not stand in YAML"
    return _at(error.position, len(lines) - 1, len(lines[-1]), message, "", text, file)


def _at(
    index: int, line: int, column: int, message: str, hint: str, text: str, file: str
) -> SpecError:
    """Build the error at 0-based `line` and `column`, which is `text[index]`."""
    begin = index - min(column, 60)
    rest = _BREAK.split(text[begin : index + 40], maxsplit=1)[0]
    shown = "".join(c if c.isprintable() else " " for c in rest)
    caret = " " * (index - begin) + "^"
    return SpecError(
        Problem((), f"{message}\n    {shown}\n    {caret}", hint, file, line + 1, column + 1)
    )
