"""
Parses YAML text to plain values with positions, safely: no code execution, bounded size.

PyYAML composes nodes with their marks, and this module converts them to values: no constructor of
PyYAML is used, so no tag can name code. Numbers follow YAML 1.2's core schema, because 1.1 has
pitfalls: `1e-3` is a string, `010` is eight, `1:30` is ninety and `2026-01-01` a date. Here these
are a number, ten, and two strings. As in 1.1, yes, no, on and off are booleans, because other
tools, PyYAML first of all, read them so.
"""

import re
from typing import Any, NoReturn

import yaml
from typing_extensions import override
from yaml.error import Mark, MarkedYAMLError
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode
from yaml.reader import ReaderError

from distplat.platform.errors import Problem, SpecError

MAX_BYTES = 1_000_000
MAX_NODES = 10_000
"""Most keys and values, with aliases expanded: stops alias bombs."""
MAX_DEPTH = 50
MAX_DIGITS = 300

FieldPath = tuple[str | int, ...]
Positions = dict[FieldPath, tuple[int, int]]
"""Line and column, from 1, of each field: of its key in a mapping, of the item in a list."""

_TAG = "tag:yaml.org,2002:"
_WORDING = {
    "'\\t'": ("a tab cannot stand here", "indent with spaces"),
    "another document": ("a second document begins here", "one file holds one document"),
    "cannot start any token": ("a text cannot begin with this character", "quote it"),
    "undefined alias": ("an alias (*name) of nothing (&name) above", "quote a text with '*'"),
}
"""Replacements for PyYAML's messages, by a part of them: (message, hint)."""

_BREAK = re.compile(r"\r\n|[\r\n\x85\u2028\u2029]")
_SURROGATE = re.compile(r"[\ud800-\udfff]")


class _Reader(yaml.SafeLoader):
    """Composes nodes within the limits, and converts them to values; aliases are expanded."""

    yaml_implicit_resolvers = {}  # noqa: RUF012 - filled below, shared with the writer

    def __init__(self, text: str, file: str) -> None:
        super().__init__(text)
        self._file = file
        self._depth = self._count = 0
        self._sizes: dict[Node, int] = {}
        self.positions: Positions = {}
        self.problems: list[Problem] = []

    @override
    def compose_node(self, parent: Node | None, index: int) -> Node | None:
        """
        Compose a node and its children.

        Raises:
            MarkedYAMLError: a tag, too many nodes or levels, or an alias to a parent node.
        """
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if getattr(event, "tag", None) is not None:
            _refuse("tags (words that begin with '!') are not allowed", event.start_mark)
        if self._depth >= MAX_DEPTH:
            _refuse(f"nested deeper than {MAX_DEPTH}", event.start_mark)
        before = self._count
        self._depth += 1
        node: Node | None = super().compose_node(parent, index)
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

    def read(self) -> object:
        """Return the value of the only document; None: it is empty."""
        try:
            root = self.get_single_node()
        except (ValueError, OverflowError):  # PyYAML does not catch errors of chr() and int()
            _refuse("an escape or a number that cannot be", self.get_mark())
        return None if root is None else self._value(root, ())

    def _value(self, node: Node, path: FieldPath) -> object:
        if len(path) > MAX_DEPTH:  # nested aliases
            _refuse(f"nested deeper than {MAX_DEPTH}", node.start_mark)
        if isinstance(node, MappingNode):
            return self._mapping(node, path)
        if isinstance(node, SequenceNode):
            items = []
            for i, item in enumerate(node.value):
                self.positions[*path, i] = _position(item)
                items.append(self._value(item, (*path, i)))
            return items
        return self._scalar(node, path)

    def _mapping(self, node: MappingNode, path: FieldPath) -> dict[str, object]:
        fields: dict[str, object] = {}
        for key_node, value_node in node.value:
            key = self._key(key_node, path)
            if key is None:
                continue
            where = (*path, key)
            if key in fields:
                first, second = self.positions[where][0], _position(key_node)[0]
                self._add_problem(
                    where, f"set twice: in line {first} and in line {second}", key_node
                )
                continue
            self.positions[where] = _position(key_node)
            fields[key] = self._value(value_node, where)
        return fields

    def _key(self, node: Node, path: FieldPath) -> str | None:
        """Return the key's text; None, with a problem, if it is not text."""
        kind = node.tag.removeprefix(_TAG)
        if kind == "str":
            return str(self._scalar(node, path))
        if kind == "merge":
            self._add_problem(path, "merge keys (<<) are not read", node, "write the fields out")
        elif isinstance(node, ScalarNode):
            message = f"a key must be text, and {node.value[:40]!r} is read as {kind}"
            self._add_problem(path, message, node, "quote it")
        else:
            self._add_problem(path, "a key must be text, not a mapping or a list", node)
        return None

    def _scalar(self, node: Node, path: FieldPath) -> object:
        text, kind = str(node.value), node.tag.removeprefix(_TAG)
        if kind == "null":
            return None
        if kind == "bool":
            return text.casefold() in ("yes", "true", "on")
        if kind in ("int", "float") and len(text) > MAX_DIGITS:
            self._add_problem(
                path, f"a number may have {MAX_DIGITS} digits, this has {len(text)}", node
            )
            return None
        if kind == "int":
            return int(text, 0) if text[:2] in ("0x", "0o") else int(text.replace("_", ""))
        if kind == "float":
            return float(re.sub(r"_|\.(?=[in])", "", text.lower()))
        if _SURROGATE.search(text):
            self._add_problem(path, "half of a surrogate pair is no text", node)
        return text

    def _add_problem(self, where: FieldPath, message: str, node: Node, hint: str = "") -> None:
        line, column = _position(node)
        self.problems.append(Problem(where, message, hint, self._file, line, column))


class _Writer(yaml.SafeDumper):
    """Writes YAML that `_Reader` reads."""

    yaml_implicit_resolvers = _Reader.yaml_implicit_resolvers

    @override
    def ignore_aliases(self, data: object) -> bool:
        """Write shared values twice, without anchors."""
        return True

    def text(self, data: str) -> ScalarNode:
        """Escape Unicode's line breaks: PyYAML would write them plain and read them as \\n."""
        style = '"' if _BREAK.search(data.replace("\n", "")) else None
        return self.represent_scalar(_TAG + "str", data, style=style)


_Writer.add_representer(str, _Writer.text)

for _kind, _pattern, _first in (  # plain scalars that are not text
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
    _Reader.add_implicit_resolver(_TAG + _kind, re.compile(rf"(?:{_pattern})\Z"), _first)


def parse_yaml(text: str, file: str) -> tuple[object, Positions]:
    """
    Parse one YAML document.

    Args:
        text: the document; None if it is empty.
        file: its name in messages.

    Returns:
        The value, of None, bool, int, float, str, list and dict only, and the position of each
        field.

    Raises:
        SpecError: it is not YAML, exceeds a limit, or has tags, duplicate keys or non-text keys.
    """
    if len(text) > MAX_BYTES:
        raise too_large(file)
    try:
        reader = _Reader(text, file)
        value = reader.read()
    except ReaderError as error:
        raise _unprintable(error, text, file) from error
    except MarkedYAMLError as error:
        raise _misread(error, file) from error
    if reader.problems:
        raise SpecError(*reader.problems)
    return value, reader.positions


def dump_yaml(value: object) -> str:
    """Serialize a value that `parse_yaml` could return, in the order of its keys."""
    return yaml.dump(value, Dumper=_Writer, sort_keys=False, allow_unicode=True)


def too_large(file: str) -> SpecError:
    """Build the error for a document over the size limit."""
    return SpecError(Problem((), f"is larger than {MAX_BYTES // 1000} kB", file=file))


def _refuse(message: str, mark: Any) -> NoReturn:
    raise MarkedYAMLError(problem=message, problem_mark=mark)


def _position(node: Node) -> tuple[int, int]:
    return node.start_mark.line + 1, node.start_mark.column + 1


def _misread(error: MarkedYAMLError, file: str) -> SpecError:
    """Convert PyYAML's error, with its position."""
    mark: Any = error.problem_mark or error.context_mark
    message, hint = error.problem or error.context or "is not YAML", ""
    wording = next((text for part, text in _WORDING.items() if part in message), None)
    if wording:
        message, hint = wording
    elif error.context and error.context_mark and error.context_mark.line != mark.line:
        message += f" ({error.context} of line {error.context_mark.line + 1})"
    return _at(mark, message[:200], hint, file)


def _unprintable(error: ReaderError, text: str, file: str) -> SpecError:
    lines = _BREAK.split(text[: error.position])
    message = f"the character U+{ord(text[error.position]):04X} may not stand in YAML"
    line, column = len(lines) - 1, len(lines[-1])
    mark = Mark(file, error.position, line, column, f"{text}\0", error.position)
    return _at(mark, message, "", file)


def _at(mark: Mark, message: str, hint: str, file: str) -> SpecError:
    """Build an error with the line of a mark and a caret below."""
    snippet = mark.get_snippet(indent=4, max_length=100) or ""
    printable_snippet = "".join(c if c.isprintable() or c == "\n" else " " for c in snippet)
    where = (file, mark.line + 1, mark.column + 1)
    return SpecError(Problem((), f"{message}\n{printable_snippet}", hint, *where))
