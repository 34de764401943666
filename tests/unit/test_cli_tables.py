"""Tables on a terminal and in a pipe, with and without colors."""

import io
import re
import sys
from typing import Any

import pytest

from distplat.actors.view import View, has_colors
from distplat.cli.main import run
from distplat.cli.render import print_pairs, print_table, table_lines, terminal

ROWS = [("a", "1"), ("longer", "[red]x[/red]")]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def terminal_output(monkeypatch: pytest.MonkeyPatch, columns: int = 60, **environ: str) -> str:
    out = Terminal()
    for name in ("NO_COLOR", "FORCE_COLOR", "COLORTERM"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"TERM": "xterm-256color", "COLUMNS": f"{columns}", **environ}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "stdout", out)
    print_table(("NAME", "VALUE"), ROWS, ["", "red"])
    print_pairs([("path", "/x" * 40)])
    return out.getvalue()


def test_prints_aligned_text_without_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
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


@pytest.mark.parametrize(
    ("environ", "has_color"),
    [
        ({"FORCE_COLOR": "1"}, True),
        ({"FORCE_COLOR": ""}, False),
        ({"FORCE_COLOR": "1", "NO_COLOR": ""}, True),
        ({"FORCE_COLOR": "1", "NO_COLOR": "1"}, False),
    ],
)
def test_force_color_adds_colors_in_a_pipe_without_wrapping(
    environ: dict[str, str],
    has_color: bool,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("NO_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"COLUMNS": "20", "TERM": "xterm-256color", **environ}.items():
        monkeypatch.setenv(name, value)
    print_table(("NAME", "VALUE"), ROWS, ["", "red"])
    print_pairs([("path", "/x" * 400)])
    assert run(["schedule", "1f1b", "--stages", "2", "--micro-batches", "40"]) == 0
    text = capsys.readouterr().out
    assert ("\x1b[1mNAME" in text, "\x1b[31mlonger" in text) == (has_color, has_color)
    assert ("\x1b" in text) == has_color
    lines = text.splitlines()
    assert len([line for line in lines if "/x" * 400 in line]) == 1
    [first] = [line for line in lines if "stage 0" in line]
    assert re.sub("\x1b[^m]*m", "", first).count("F") == 40


@pytest.mark.parametrize("force_color", [None, "", "1"])
def test_terminal_has_colors_and_a_progress_bar_with_any_force_color(
    force_color: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An empty FORCE_COLOR has no effect; rich by itself would treat it as no terminal."""
    environ: dict[str, Any] = {} if force_color is None else {"FORCE_COLOR": force_color}
    assert "\x1b[1mNAME" in terminal_output(monkeypatch, **environ)
    assert has_colors(sys.stdout)
    view = View(Terminal())
    assert view._progress is not None and view._progress.console.is_terminal


def test_table_without_rows_has_headers(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(("ID", "NAME"), [])
    assert capsys.readouterr().out == "ID  NAME\n"


def test_terminal_has_bold_headers_and_colored_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    text = terminal_output(monkeypatch)
    assert "\x1b[1mNAME" in text
    assert "\x1b[31m" in text
    assert "[red]x[/red]" in text  # not interpreted as markup
    assert text.count("/x") == 40  # wrapped, not truncated
    assert max(map(len, text.replace("\x1b[1m", "").replace("\x1b[0m", "").split("\n"))) < 80


def test_no_color_disables_colors(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "\x1b[31m" not in terminal_output(monkeypatch, NO_COLOR="1")


def test_dumb_terminal_has_no_escape_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "\x1b" not in terminal_output(monkeypatch, TERM="dumb")


def test_aligns_wide_characters() -> None:
    lines = table_lines(("A", "B"), [("训练", "1"), ("ab", "2")])
    assert lines == ["A     B", "训练  1", "ab    2"]
