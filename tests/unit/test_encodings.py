"""What a stream's encoding lacks is printed otherwise; it ends no run."""

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
"""The command, in which a script has printed a bar, and the run directory has Cyrillic letters."""
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@pytest.mark.parametrize("environ", [{"PYTHONIOENCODING": "latin-1"}, ASCII])
def test_a_command_prints_what_its_encoding_lacks_as_an_escape(environ: dict[str, str]) -> None:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHONIO")}
    done = subprocess.run(
        [sys.executable, "-c", RUN], env=kept | environ, capture_output=True, timeout=100
    )
    assert (done.returncode, done.stderr) == (0, b"")
    first, *_, last = done.stdout.decode("ascii").splitlines()
    assert first == "50%\\u2588"
    assert last.startswith("logs") and last.endswith("/runs/one")


def strict(encoding: str) -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO(), encoding=encoding, write_through=True)


def written(stream: io.TextIOWrapper) -> bytes:
    buffer = stream.buffer
    assert isinstance(buffer, io.BytesIO)
    return buffer.getvalue()


def test_a_view_in_another_program_goes_on_after_such_a_line() -> None:
    out = strict("latin-1")
    view = View(out)
    view._print("50%\u2588")
    view._print("next")
    assert written(out) == b"50%\\u2588\nnext\n"


def test_lines_of_workers_are_printed_in_another_program(monkeypatch: pytest.MonkeyPatch) -> None:
    out = strict("ascii")
    monkeypatch.setattr(sys, "stdout", out)
    batch: dict[str, Any] = {
        **{"actor_name": "lin/worker-0", "pid": 17, "lines": ["50%\u2588"], "is_err": False},
        **{"ip": "10.0.0.1", "localhost": "10.0.0.1", "task_name": None, "job": "01000000"},
    }
    ray_compat.print_batch(batch, colored=False)
    assert written(out) == b"(lin/worker-0 pid=17) 50%\\u2588\n"


def test_what_an_encoding_has_stays() -> None:
    assert encodable("é█", strict("latin-1")) == "é\\u2588"
    assert encodable("é█", io.StringIO()) == "é█"


def test_a_strategy_file_is_read_as_python_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "own.py"
    path.write_bytes("# я\n".encode())
    read = "import sys, pathlib; from distplat.strategies.catalog import load_strategy_file as load"
    code = f"{read}; print(ascii(load(pathlib.Path(sys.argv[1])).text))"
    command = [sys.executable, "-c", code, str(path)]
    done = subprocess.run(command, env=os.environ | ASCII, capture_output=True, timeout=100)
    assert (done.stdout, done.stderr) == (b"'# \\u044f\\n'\n", b"")
