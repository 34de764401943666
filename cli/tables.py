"""
Tables on stdout, by rich: bold and coloured on a terminal, aligned text elsewhere.

rich hears NO_COLOR and TERM. What is piped has no ANSI codes, whatever FORCE_COLOR says, and no
line of it is wrapped: a program may read it.
"""

import sys
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from distplat.platform.errors import printable

_UNWRAPPED = 1_000_000
"""Columns of a line that is not for a terminal."""


def terminal() -> Console | None:
    """Give the terminal behind stdout; None: it is a file or a pipe."""
    return Console() if sys.stdout.isatty() else None


def print_pairs(rows: Sequence[tuple[str, str]]) -> None:
    """Print names and values."""
    table = _table((), rows)
    table.columns[0].style = "bold"
    _print(table)


def print_table(
    heads: Sequence[str], rows: Sequence[Sequence[str]], styles: Sequence[str] = ()
) -> None:
    """
    Print a table.

    Args:
        heads: of the columns.
        rows: their cells.
        styles: of each row, as rich names them; empty: none.
    """
    _print(_table(heads, rows, styles))


def table_lines(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Give a table as plain lines, without spaces at their ends."""
    return _lines(_table(heads, rows))


def _table(
    heads: Sequence[str], rows: Sequence[Sequence[str]], styles: Sequence[str] = ()
) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=bool(heads), header_style="bold")
    for head in heads or ("",) * len(rows[0]):
        table.add_column(Text(printable(head)), overflow="fold")
    for number, row in enumerate(rows):
        table.add_row(
            *(Text(printable(cell)) for cell in row), style=styles[number] if styles else None
        )
    return table


def _print(table: Table) -> None:
    console = terminal()
    if console is not None:
        console.print(table)
    else:
        print(printable("\n".join(_lines(table))))


def _lines(table: Table) -> list[str]:
    console = Console(width=_UNWRAPPED, color_system=None, force_terminal=False)
    with console.capture() as shown:
        console.print(table)
    return [line.rstrip() for line in shown.get().rstrip("\n").split("\n")]
