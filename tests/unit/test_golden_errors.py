"""
Exact errors and exit codes for invalid input, in `golden_errors.txt`.

    PYTHONPATH=tests/support python tests/unit/test_golden_errors.py

rewrites the file; review the diff.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path

import pytest
from lin_task import TASK

from distplat.cli.main import run

GOLDEN = Path(__file__).with_name("golden_errors.txt")
JOB = """\
name: lin
task: lin:Lin
strategy: ring
scaling: {num_workers: 2}
optimizer: {name: SGD, lr: 0.1}
steps: 10
global_batch_size: 16
"""


def job(old: str = "", new: str = "", *, more: str = "") -> dict[str, str]:
    """Return a job file with a replaced and an appended text."""
    assert old in JOB
    return {"job.yaml": JOB.replace(old, new) + more}


VALIDATE = "validate job.yaml"
CASES: Mapping[str, tuple[str, Mapping[str, str]]] = {
    "a command that is misspelt": ("submti job.yaml", {}),
    "an option that is misspelt": ("validate job.yaml --strateg ring", job()),
    "no job file is named": ("validate", {}),
    "there is no such file": ("validate jobs.yaml", job()),
    "a directory": ("validate .", {}),
    "empty": (VALIDATE, {"job.yaml": ""}),
    "a list": (VALIDATE, {"job.yaml": "- name: lin\n"}),
    "binary": (VALIDATE, {"job.yaml": "\0\1\2"}),
    "a tab": (VALIDATE, {"job.yaml": "name: lin\nscaling:\n\tnum_workers: 2\n"}),
    "a colon too many": (VALIDATE, {"job.yaml": "name: lin: lin\n"}),
    "a field twice": (VALIDATE, job(more="steps: 20\n")),
    "a YAML tag": (VALIDATE, job("lin:Lin", "!!python/object/apply:os.system [true]")),
    "an unknown field": (VALIDATE, job("optimizer", "optimiser")),
    "an unknown field inside": (VALIDATE, job("lr: 0.1", "lr: 0.1, momentun: 0.9")),
    "an unknown strategy": ("validate job.yaml --strategy rnig", job()),
    "an unknown optimizer": (VALIDATE, job("SGD", "AdmaW")),
    "YAML reads no as false": (VALIDATE, job("ring", "no")),
    "a number that is text": (VALIDATE, job("steps: 10", "steps: ten")),
    "too small": (VALIDATE, job("num_workers: 2", "num_workers: -1")),
    "too large": (VALIDATE, job("num_workers: 2", "num_workers: 1.0e+9")),
    "not finite": (VALIDATE, job("lr: 0.1", "lr: .nan")),
    "negative": (VALIDATE, job("lr: 0.1", "lr: -1")),
    "neither steps nor epochs": (VALIDATE, job("steps: 10\n")),
    "steps and epochs": (VALIDATE, job(more="epochs: 2\n")),
    "an option of another strategy": (VALIDATE, job("ring", "{name: ring, staleness: 2}")),
    "fewer samples than workers": (VALIDATE, job("size: 16", "size: 1")),
    "several at once": (VALIDATE, job("lr: 0.1", "lr: .inf", more="epoch: 1\nseeed: 2\n")),
    "a name with a slash": (VALIDATE, job("name: lin", "name: ../lin")),
    "no function": (VALIDATE, job("lin:Lin", "lin")),
    "no such module": (VALIDATE, job("lin:Lin", "lim:Lin")),
    "no such class": (VALIDATE, job("lin:Lin", "lin:Line")),
    "--set without a value": ("validate job.yaml --set steps", job()),
    "--set of an unknown field": ("validate job.yaml --set stepps=3", job()),
    "no such run": ("report runs/none", {}),
    "no checkpoint to resume from": ("submit job.yaml --address local --resume runs/none", job()),
    "an address without a port": ("status lin --address http://127.0.0.1:x", {}),
}


def output_of(name: str) -> str:
    """Run a command in the current folder; return its output in the format of the golden file."""
    command, files = CASES[name]
    for path, text in {"lin.py": TASK, **files}.items():
        Path(path).write_text(text)
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run(command.split())
    output = (out.getvalue() + err.getvalue()).replace(str(Path.cwd()), "HERE")
    return f"$ distplat {command}    # {name}\n{output.rstrip()}\nexit code {code}\n"


def golden() -> dict[str, str]:
    """Return the blocks of the golden file by case."""
    blocks = re.split(r"\n\n(?=\$ distplat )", GOLDEN.read_text().rstrip())
    return {block.splitlines()[0].split("    # ")[1]: block + "\n" for block in blocks}


@pytest.mark.parametrize("name", CASES)
def test_output_matches_the_golden_file(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for variable in [*os.environ]:
        if variable.startswith(("DISTPLAT_", "RAY_")):
            monkeypatch.delenv(variable)
    monkeypatch.setenv("NO_COLOR", "1")
    assert output_of(name) == golden()[name]


def test_golden_file_has_all_cases() -> None:
    assert [*golden()] == [*CASES]


def write() -> None:
    """Write the golden file."""
    blocks = []
    os.environ["NO_COLOR"] = "1"
    for name in CASES:
        with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
            blocks.append(output_of(name))
    GOLDEN.write_text("\n".join(blocks))


if __name__ == "__main__":
    write()
