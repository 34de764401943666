"""A script as a train function: `task: train.py --lr 0.1`."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pytest import CaptureFixture, MonkeyPatch
from safetensors.torch import load_file

from distplat import Job, Trainer
from distplat.actors.task_check import TaskCheck
from distplat.actors.task_loading import load_train_function
from distplat.platform.errors import SpecError, UserCodeError
from distplat.platform.own_loop import script_of
from distplat.platform.torchrun import ALONE
from distplat.strategies.catalog import make_job

SCRIPT = """
import argparse, sys
import torch
from torch import nn
from beside import WIDTH

import distplat

parser = argparse.ArgumentParser()
parser.add_argument("--lr", type=float, default=1.0)
parser.add_argument("--title", default="")
parser.add_argument("--code", type=int, default=0)
args = parser.parse_args()
torch.manual_seed(0)
model = nn.Linear(WIDTH, 1, bias=False)
optimizer = torch.optim.SGD(model.parameters(), lr=args.lr)
distplat.prepare(model, optimizer)

if __name__ == "__main__":
    model(torch.ones(1, WIDTH)).sum().backward()
    optimizer.step()
    print("title:", args.title)
    sys.exit(args.code)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: MonkeyPatch) -> Iterator[Path]:
    """A script, and a module that it imports."""
    (tmp_path / "loops").mkdir()
    (tmp_path / "loops" / "train.py").write_text(SCRIPT)
    (tmp_path / "loops" / "beside.py").write_text("WIDTH = 3\n")
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield tmp_path
    sys.modules.pop("beside", None)


def job_with(task: str, **more: Any) -> dict[str, Any]:
    return {
        "name": "script",
        "task": task,
        "strategy": "ring",
        "scaling": {"num_workers": 0},
        "storage_path": "runs",
        **more,
    }


def fit(folder: Path, task: str) -> dict[str, torch.Tensor]:
    result = Trainer(job_with(task), working_dir=folder, progress=False).fit()
    assert result.checkpoint is not None
    return load_file(result.checkpoint)


def test_script_runs_with_its_arguments(folder: Path, capsys: CaptureFixture[str]) -> None:
    argv, main = [*sys.argv], sys.modules["__main__"]
    weight = fit(folder, 'loops/train.py --lr 0.5 --title "a b"')["weight"]
    torch.manual_seed(0)
    assert torch.equal(weight, torch.nn.Linear(3, 1, bias=False).weight - 0.5)
    assert "title: a b" in capsys.readouterr().out
    assert (sys.argv, sys.modules["__main__"]) == (argv, main)


def test_script_imports_modules_of_its_folder(folder: Path) -> None:
    """PYTHONPATH contains another folder with a module of this name before the script's."""
    (folder / "beside.py").write_text("WIDTH = 5\n")
    sys.path[:0] = [str(folder), str(folder / "loops")]
    assert fit(folder, "loops/train.py")["weight"].shape == (1, 3)


@pytest.mark.parametrize(
    ("arguments", "message"), [("--code 3", "SystemExit: 3"), ("--width 3", "SystemExit: 2")]
)
def test_nonzero_exit_of_script_is_an_error(arguments: str, message: str, folder: Path) -> None:
    with pytest.raises(UserCodeError, match=message):
        fit(folder, f"loops/train.py {arguments}")


def test_script_has_environment_of_torchrun(
    folder: Path, capsys: CaptureFixture[str], monkeypatch: MonkeyPatch
) -> None:
    for name in ALONE:
        monkeypatch.delenv(name, raising=False)
    print_environment = (
        f"\nimport os; print('environment:', *(os.environ[name] for name in {[*ALONE]}))\n"
    )
    (folder / "loops" / "train.py").write_text(print_environment + SCRIPT)
    fit(folder, "loops/train.py")
    [printed] = [
        line for line in capsys.readouterr().out.splitlines() if line.startswith("environment:")
    ]
    environment = dict(zip(ALONE, printed.split()[1:], strict=True))
    run_specific = {"MASTER_PORT", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_MAX_RESTARTS"}
    assert {name: environment[name] for name in {*ALONE} - run_specific} == {
        name: value for name, value in ALONE.items() if name not in run_specific
    }
    assert environment["TORCHELASTIC_MAX_RESTARTS"] == "3"
    assert "MASTER_ADDR" not in os.environ


def check_problems(folder: Path, entry: str) -> list[str]:
    check = TaskCheck(entry, str(folder), (), shown=True, function=True)
    return check.result(60.0)


def test_check_compiles_script_without_running_it(folder: Path) -> None:
    (folder / "broken.py").write_text("def train(:\n")
    (folder / "ends.py").write_text("raise SystemExit(5)\n")
    assert check_problems(folder, "ends.py") == []
    with pytest.raises(UserCodeError, match="SyntaxError"):
        check_problems(folder, "broken.py")
    with pytest.raises(SpecError, match=r"no script 'end.py'") as caught:
        check_problems(folder, "end.py")
    assert "ends.py" in caught.value.problems[0].hint


LOOP = {"steps": 1, "global_batch_size": 1, "optimizer": {"name": "SGD", "lr": 1}}


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"task": "train.py 'a"}, "No closing quotation"),
        ({"task": "train.txt"}, "'script.py --its arguments'"),
        ({"task": "-m train.py"}, "'script.py --its arguments'"),
        ({"task": "train.py", "task_args": {"lr": 1}}, "takes its arguments from `task`"),
        ({"task": "train.py", "steps": 10}, "steps: has no effect on a script, which has its own"),
        ({"task": "train.py", "ema": {"decay": 0.9}}, "ema: has no effect on a script"),
        ({"task": "train.py", "own_loop": False, **LOOP}, "own_loop: train.py is a script"),
    ],
)
def test_rejects_settings_without_effect_on_script(fields: dict[str, Any], text: str) -> None:
    with pytest.raises(SpecError, match=text):
        make_job(job_with(**fields))


def test_distinguishes_script_from_function() -> None:
    assert isinstance(make_job(job_with("a/train.py --x 'b c'")), Job)
    assert script_of("a/train.py --x 'b c'") == ["a/train.py", "--x", "b c"]
    assert script_of("train:main") == script_of(None) == []
    with pytest.raises(SpecError, match="could not import"):
        load_train_function("nowhere:train", "")
