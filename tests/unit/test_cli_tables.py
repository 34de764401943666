"""Tables on a terminal and in a pipe."""

import io
import sys

import pytest

from distplat.cli.render import print_pairs, print_table, table_lines, terminal

ROWS = [("a", "1"), ("longer", "[red]x[/red]")]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(monkeypatch: pytest.MonkeyPatch, columns: int = 60, **environ: str) -> str:
    out = Terminal()
    for name in ("NO_COLOR", "FORCE_COLOR", "COLORTERM"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"TERM": "xterm-256color", "COLUMNS": f"{columns}", **environ}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "stdout", out)
    print_table(("NAME", "VALUE"), ROWS, ["", "red"])
    print_pairs([("path", "/x" * 40)])
    return out.getvalue()


def test_without_a_terminal_it_is_aligned_text(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "20")
    assert terminal() is None
    print_table(("NAME", "VALUE"), [*ROWS, ("", "")], ["", "red", ""])
    print_pairs([("path", "/x" * 400), ("no", "")])
    assert capsys.readouterr().out.split("\n") == [
        "NAME    VALUE",
        "a       1",
        "longer  [red]x[/red]",
        "",
        "path  " + "/x" * 400,
        "no",
        "",
    ]


def test_a_table_without_rows_is_its_heads(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(("ID", "NAME"), [])
    assert capsys.readouterr().out == "ID  NAME\n"


def test_a_terminal_has_bold_heads_and_coloured_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    text = shown(monkeypatch)
    assert "\x1b[1mNAME" in text
    assert "\x1b[31m" in text
    assert "[red]x[/red]" in text  # text, no markup
    assert text.count("/x") == 40  # folded, nothing is cut
    assert max(map(len, text.replace("\x1b[1m", "").replace("\x1b[0m", "").split("\n"))) < 80


def test_no_color_is_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "\x1b[31m" not in shown(monkeypatch, NO_COLOR="1")


def test_a_dumb_terminal_has_no_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "\x1b" not in shown(monkeypatch, TERM="dumb")


def test_wide_letters_are_aligned() -> None:
    lines = table_lines(("A", "B"), [("训练", "1"), ("ab", "2")])
    assert lines == ["A     B", "训练  1", "ab    2"]
