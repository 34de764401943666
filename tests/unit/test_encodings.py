"""Characters that a stream's encoding lacks are escaped when printed."""

import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from distplat.actors import ray_compat
from distplat.actors.view import View
from distplat.platform.errors import encodable

RUN = """
import sys
from contextlib import nullcontext
from pathlib import Path
from unittest import mock
from distplat.actors import script_run
from distplat.cli import main, script

def train(job, lines):
    lines.line(0, "50%\\u2588")
    return mock.Mock(restarts=0, seconds=1.0, path=Path("/home/\\u044f\\u043d\\u0430/runs/one"))

sys.argv = ["distplat", "submit", "--", "python", "train.py"]
with (
    mock.patch.object(script, "_ray", lambda *args, **options: nullcontext()),
    mock.patch.object(script_run, "train_script", train),
):
    main.main()
"""
"""A command whose script prints a block character, with Cyrillic letters in the run directory."""
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@pytest.mark.parametrize("environ", [{"PYTHONIOENCODING": "latin-1"}, ASCII])
def test_command_escapes_unencodable_characters(environ: dict[str, str]) -> None:
    inherited = {
        name: value for name, value in os.environ.items() if not name.startswith("PYTHONIO")
    }
    process = subprocess.run(
        [sys.executable, "-c", RUN], env=inherited | environ, capture_output=True, timeout=100
    )
    assert (process.returncode, process.stderr) == (0, b"")
    first, *_, last = process.stdout.decode("ascii").splitlines()
    assert first == "50%\\u2588"
    assert last.startswith("logs") and last.endswith("/runs/one")


def strict_stream(encoding: str) -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO(), encoding=encoding, write_through=True)


def contents(stream: io.TextIOWrapper) -> bytes:
    buffer = stream.buffer
    assert isinstance(buffer, io.BytesIO)
    return buffer.getvalue()


def test_view_escapes_unencodable_characters() -> None:
    out = strict_stream("latin-1")
    view = View(out)
    view._print("50%\u2588")
    view._print("next")
    assert contents(out) == b"50%\\u2588\nnext\n"


def test_print_batch_escapes_unencodable_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    out = strict_stream("ascii")
    monkeypatch.setattr(sys, "stdout", out)
    batch: dict[str, Any] = {
        **{"actor_name": "lin/worker-0", "pid": 17, "lines": ["50%\u2588"], "is_err": False},
        **{"ip": "10.0.0.1", "localhost": "10.0.0.1", "task_name": None, "job": "01000000"},
    }
    ray_compat.print_batch(batch, colored=False)
    assert contents(out) == b"(lin/worker-0 pid=17) 50%\\u2588\n"


def test_encodable_characters_are_unchanged() -> None:
    assert encodable("é█", strict_stream("latin-1")) == "é\\u2588"
    assert encodable("é█", io.StringIO()) == "é█"


def test_strategy_file_is_read_as_utf8(tmp_path: Path) -> None:
    path = tmp_path / "own.py"
    path.write_bytes("# я\n".encode())
    read = "import sys, pathlib; from distplat.strategies.catalog import load_strategy_file as load"
    code = f"{read}; print(ascii(load(pathlib.Path(sys.argv[1])).text))"
    command = [sys.executable, "-c", code, str(path)]
    process = subprocess.run(command, env=os.environ | ASCII, capture_output=True, timeout=100)
    assert (process.stdout, process.stderr) == (b"'# \\u044f\\n'\n", b"")
