"""
A whole script as a train function: `task: train.py --lr 0.1`.

It runs as `python train.py --lr 0.1` would run it, in the worker's process: as `__main__`, with its
command line, and with its folder in front of the import path.
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable
from pathlib import Path

from distplat.platform.errors import Problem, SpecError
from distplat.platform.errors import hint as hint_of
from distplat.platform.own_loop import script_of


def script_function(entry: str, search_path: str) -> Callable[[], None]:
    """
    Give a function that runs a script; one that exits with code 0 returns.

    Args:
        entry: of the job; `script_of` knows it for a script.
        search_path: folder where it lies.

    Raises:
        SpecError: there is no such file.
        SyntaxError: it is no Python.
    """
    name, *words = script_of(entry)
    path = (Path(search_path or ".") / name).resolve()
    if not path.is_file():
        there = [one.name for one in path.parent.glob("*.py")]
        text = f"there is no script {name!r} in {search_path or 'the current directory'}"
        raise SpecError(Problem(("task",), text, hint_of(path.name, there) if there else ""))
    compile(path.read_bytes(), str(path), "exec")

    def script() -> None:
        before = sys.argv
        sys.argv = [str(path), *words]
        if (folder := str(path.parent)) not in sys.path:
            sys.path.insert(0, folder)
        try:
            runpy.run_path(str(path), run_name="__main__")
        except SystemExit as ended:
            if ended.code not in (None, 0):
                raise
        finally:
            sys.argv = before

    return script
