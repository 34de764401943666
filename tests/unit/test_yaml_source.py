"""parse_yaml: values, positions and errors."""

import math
from itertools import pairwise

import pytest

from distplat.platform.errors import SpecError
from distplat.platform.yaml_source import (
    MAX_BYTES,
    MAX_DEPTH,
    MAX_DIGITS,
    MAX_NODES,
    dump_yaml,
    parse_yaml,
)


def error_of(text: str) -> str:
    with pytest.raises(SpecError) as caught:
        parse_yaml(text, "job.yaml")
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("1E5", 100000.0),
        ("-2.5e+3", -2500.0),
        (".5", 0.5),
        ("1.", 1.0),
        ("010", 10),
        ("-007", -7),
        ("0x1F", 31),
        ("0o17", 15),
        ("1_000", 1000),
        ("1_000.5", 1000.5),
        ("1:30", "1:30"),
        ("2026-01-01", "2026-01-01"),
        ("1.2.3", "1.2.3"),
        ("'1'", "1"),
        ("yes", True),
        ("Off", False),
        ("'no'", "no"),
        ("~", None),
        ("''", ""),
        (".inf", math.inf),
        ("-.Inf", -math.inf),
        ("=", "="),
        ("", None),
        ("# nothing", None),
        ("[1, [a]]", [1, ["a"]]),
        ("a:\nb: {c: 1}", {"a": None, "b": {"c": 1}}),
        ("a: &x [1]\nb: *x", {"a": [1], "b": [1]}),
        ("a: |\n  1\n  2\n", {"a": "1\n2\n"}),
        ("\ufeffa: 1\r\nb: 2\r\n", {"a": 1, "b": 2}),
    ],
)
def test_parses_values(text: str, value: object) -> None:
    parsed, _ = parse_yaml(text, "job.yaml")
    assert parsed == value
    assert type(parsed) is type(value)


def test_parses_nan() -> None:
    parsed, _ = parse_yaml("[.nan]", "job.yaml")
    assert isinstance(parsed, list)
    assert math.isnan(parsed[0])


def test_marks_are_the_positions_of_keys_and_items() -> None:
    _, marks = parse_yaml("a: 1\nb:\n  c: {d: 2}\n  e:\n  - x\n  - f: 3\n", "job.yaml")
    assert marks == {
        ("a",): (1, 1),
        ("b",): (2, 1),
        ("b", "c"): (3, 3),
        ("b", "c", "d"): (3, 7),
        ("b", "e"): (4, 3),
        ("b", "e", 0): (5, 5),
        ("b", "e", 1): (6, 5),
        ("b", "e", 1, "f"): (6, 5),
    }


def test_alias_is_marked_below_both_paths_and_copied() -> None:
    value, marks = parse_yaml("a: &x {c: 1}\nb: *x", "job.yaml")
    assert marks["a", "c"] == marks["b", "c"] == (1, 8)
    assert isinstance(value, dict)
    assert value["a"] is not value["b"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "a: b: c",
            "job.yaml:1:5: mapping values are not allowed here\n    a: b: c\n        ^",
        ),
        (
            "a:\n\tb: 1",
            "job.yaml:2:1: a tab cannot stand here\n     b: 1\n    ^\n  hint: indent with spaces",
        ),
        (
            "x: 1\na: [1,\n2\nb: 3",
            "job.yaml:4:2: expected ',' or ']', but got ':' "
            "(while parsing a flow sequence of line 2)\n    b: 3\n     ^",
        ),
        (
            "a: @x",
            "job.yaml:1:4: a text cannot begin with this character\n"
            "    a: @x\n       ^\n  hint: quote it",
        ),
        ("a: 'x", "job.yaml:1:6: found unexpected end of stream\n    a: 'x\n         ^"),
        (
            "a: *b",
            "job.yaml:1:4: an alias (*name) of nothing (&name) above\n"
            "    a: *b\n       ^\n  hint: quote a text with '*'",
        ),
        (
            "--- a\n--- b",
            "job.yaml:2:1: a second document begins here\n"
            "    --- b\n    ^\n  hint: one file holds one document",
        ),
        (
            "a: 1\nb: \x07",
            "job.yaml:2:4: the character U+0007 may not stand in YAML\n    b:  \n       ^",
        ),
        (
            'x: "\\U99999999"',
            'job.yaml:1:7: an escape or a number that cannot be\n    x: "\\U99999999"\n          ^',
        ),
        (
            "!!python/object/apply:os.system [x]",
            "job.yaml:1:1: tags (words that begin with '!') are not allowed\n"
            "    !!python/object/apply:os.system [x]\n    ^",
        ),
        (
            "a: !!str 1",
            "job.yaml:1:4: tags (words that begin with '!') are not allowed\n"
            "    a: !!str 1\n       ^",
        ),
        (
            "a: &a [*a]",
            "job.yaml:1:8: an alias stands inside what it names\n    a: &a [*a]\n           ^",
        ),
        ("a:\n  b: 1\n  b: 2", "job.yaml:3:3: a.b: set twice: in line 2 and in line 3"),
        ("<<: 1", "job.yaml:1:1: merge keys (<<) are not read\n  hint: write the fields out"),
        (
            "on: 1",
            "job.yaml:1:1: a key must be text, and 'on' is read as bool\n  hint: quote it",
        ),
        (
            "a: {1: 2}",
            "job.yaml:1:5: a: a key must be text, and '1' is read as int\n  hint: quote it",
        ),
        ("? [a]\n: 1", "job.yaml:1:3: a key must be text, not a mapping or a list"),
        ('a: "\\ud800"', "job.yaml:1:4: a: half of a surrogate pair is no text"),
    ],
)
def test_errors_have_position_and_hint(text: str, message: str) -> None:
    assert error_of(text) == message


def test_all_duplicate_keys_are_reported() -> None:
    assert error_of("a: 1\na: 2\nb: 3\nb: 4").count("set twice") == 2


def test_the_caret_follows_a_long_line() -> None:
    _, shown, caret = error_of("k: " + "x" * 500 + "y: 1").split("\n")
    assert shown[len(caret) - 1] == ":"
    assert len(shown) < 120


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("#" * (MAX_BYTES + 1), "is larger than 1000 kB"),
        ("- a\n" * MAX_NODES, f"more than {MAX_NODES} values"),
        ("[" * (MAX_DEPTH + 1), f"nested deeper than {MAX_DEPTH}"),
        ("- " * (MAX_DEPTH + 1), f"nested deeper than {MAX_DEPTH}"),
        ("a: " + "9" * (MAX_DIGITS + 1), f"a number may have {MAX_DIGITS} digits, this has 301"),
    ],
)
def test_texts_beyond_the_limits_are_rejected(text: str, message: str) -> None:
    assert message in error_of(text)


def test_texts_at_the_limits_are_parsed() -> None:
    deep, _ = parse_yaml("[" * MAX_DEPTH + "]" * MAX_DEPTH, "job.yaml")
    wide, _ = parse_yaml("- a\n" * (MAX_NODES - 1), "job.yaml")
    assert isinstance(deep, list)
    assert isinstance(wide, list)
    assert len(wide) == MAX_NODES - 1


def test_aliases_count_as_their_values() -> None:
    names = "abcdefghij"
    bomb = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n" for before, name in pairwise(names)
    )
    assert "each alias counted in full" in error_of(bomb)


def test_aliases_count_for_the_nesting_depth() -> None:
    chain = "a0: &a0 []\n" + "".join(f"a{i}: &a{i} [*a{i - 1}]\n" for i in range(1, MAX_DEPTH + 1))
    assert f"nested deeper than {MAX_DEPTH}" in error_of(chain)


@pytest.mark.parametrize(
    "text",
    [
        "1e-3",
        "010",
        "no",
        "null",
        "~",
        "",
        "<<",
        "!x",
        "2026-01-01",
        "1_0",
        "a: b",
        "é\u2028",
        "\0",
    ],
)
def test_ambiguous_texts_are_quoted(text: str) -> None:
    assert parse_yaml(dump_yaml({"a": [text]}), "")[0] == {"a": [text]}
