"""A job from a file or from Python: exact error messages with location and hint."""

import os
from pathlib import Path
from typing import Any

import pytest

from distplat.platform.errors import SpecError
from distplat.platform.job_file import job_of, read_job
from distplat.platform.spec import Job

LINES = """\
name: digits
task: model:Digits
strategy:
  name: ring
  timeout_s: 5
optimizer:
  name: SGD
  lr: 1e-1
  momentum: 0.9
steps: 10
global_batch_size: 64
scaling: {num_workers: 2}
"""
OPTIMIZERS = "Adadelta, Adafactor, Adagrad, Adam, AdamW, Adamax, LAMB, Muon, "
OPTIMIZERS += "NAdam, RAdam, RMSprop, SGD, task"
ENTRY = "must be 'module:Class', 'module:function' or 'script.py --its arguments'"
QUOTE = "hint: YAML reads no, off, yes and on as true or false: quote it"


@pytest.fixture(autouse=True)
def _in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def read(text: str) -> Job:
    Path("job.yaml").write_text(text)
    return read_job(Path("job.yaml"))


def refusal(text: str) -> str:
    with pytest.raises(SpecError) as caught:
        read(text)
    return str(caught.value)


def test_read_job() -> None:
    job = read(LINES)
    assert (job.name, job.strategy.name, job.strategy.options) == (
        "digits",
        "ring",
        {"timeout_s": 5},
    )
    assert (job.optimizer.name, job.optimizer.lr, job.scaling.num_workers) == ("SGD", 0.1, 2)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "momentum: 0.9",
            "momentun: 0.9",
            "job.yaml:9:3: optimizer.momentun: unknown field (value 0.9)\n  hint: did you mean "
            "'momentum'? allowed: dampening, groups, lr, maximize, momentum, name, nesterov, "
            "weight_decay",
        ),
        (
            "{num_workers: 2}",
            "{num_worker: 2}",
            "job.yaml:12:11: scaling.num_worker: unknown field (value 2)\n  hint: did you mean "
            "'num_workers'? allowed: num_workers, resources_per_worker, use_gpu",
        ),
        ("lr: 1e-1", "lr: -1", "job.yaml:8:3: optimizer.lr: must be > 0 (got -1)"),
        ("lr: 1e-1", "lr: .inf", "job.yaml:8:3: optimizer.lr: must be a finite number (got inf)"),
        ("lr: 1e-1", "lr: 1e999", "job.yaml:8:3: optimizer.lr: must be a finite number (got inf)"),
        ("lr: 1e-1", "lr: fast", "job.yaml:8:3: optimizer.lr: must be a number (got 'fast')"),
        (
            "lr: 1e-1",
            "lr: yes",
            "job.yaml:8:3: optimizer.lr: must be a number (got true)\n"
            "  hint: YAML reads no, off, yes and on as true or false",
        ),
        ("  lr: 1e-1\n", "", "job.yaml:6:1: optimizer.lr: required, but missing"),
        ("name: digits\n", "", "job.yaml: name: required, but missing"),
        (
            "name: SGD",
            "name: sdg",
            "job.yaml:7:3: optimizer.name: unknown optimizer 'sdg'\n"
            f"  hint: did you mean 'SGD'? allowed: {OPTIMIZERS}",
        ),
        (
            "name: SGD",
            "name: LBFGS",
            "job.yaml:7:3: optimizer.name: unknown optimizer 'LBFGS'\n"
            f"  hint: it evaluates the loss several times per step; allowed: {OPTIMIZERS}",
        ),
        (
            "name: SGD",
            "name: no",
            f"job.yaml:7:3: optimizer.name: must be text (got false)\n  {QUOTE}",
        ),
        (
            "  name: SGD\n",
            "",
            f"job.yaml:6:1: optimizer.name: required, but missing\n  hint: allowed: {OPTIMIZERS}",
        ),
        (
            "name: digits",
            "name: 5",
            "job.yaml:1:1: name: must be text (got 5)\n  hint: quote it",
        ),
        (
            "name: digits",
            "name: ../etc",
            "job.yaml:1:1: name: must be 1 to 63 of a-z, 0-9 and '-', with no '-' at either end "
            "(got '../etc')",
        ),
        (
            "model:Digits",
            "foo",
            f"job.yaml:2:1: task: {ENTRY} (got 'foo')",
        ),
        ("model:Digits", "':Digits'", f"job.yaml:2:1: task: {ENTRY} (got ':Digits')"),
        (
            "  name: ring\n",
            "  name: off\n",
            f"job.yaml:4:3: strategy.name: must be text (got false)\n  {QUOTE}",
        ),
        ("  name: ring\n", "", "job.yaml:3:1: strategy.name: required, but missing"),
        ("steps: 10", "steps: 2.5", "job.yaml:10:1: steps: must be a whole number (got 2.5)"),
        ("steps: 10", "steps: '10'", "job.yaml:10:1: steps: must be a whole number (got '10')"),
        ("steps: 10", "steps: 0", "job.yaml:10:1: steps: must be >= 1 (got 0)"),
        (
            "steps: 10",
            "seed: 1",
            "job.yaml: epochs: give `epochs`, `steps` or `max_time_s`, got none",
        ),
        (
            "steps: 10",
            "steps: 10\nprecision: fp23",
            "job.yaml:11:1: precision: must be 'fp32', 'bf16' or 'fp16' (got 'fp23')\n"
            "  hint: did you mean 'fp32'?",
        ),
        (
            "num_workers: 2",
            "num_workers: 5000",
            "job.yaml:12:11: scaling.num_workers: must be <= 1024 (got 5000)",
        ),
        (
            "num_workers: 2",
            "use_gpu: 1",
            "job.yaml:12:11: scaling.use_gpu: must be true or false (got 1)",
        ),
        (
            "{num_workers: 2}",
            "[2]",
            "job.yaml:12:1: scaling: must be a mapping (got [2])",
        ),
        (
            "momentum: 0.9",
            "momentum: 0.9\n  nesterov: true\n  dampening: 0.5",
            "job.yaml:10:3: optimizer.nesterov: needs momentum > 0 and dampening 0 "
            "(got 0.9 and 0.5)",
        ),
        (
            "digits\n",
            f'"\\e[31m{"x" * 90}"\n',
            "job.yaml:1:1: name: must be 1 to 63 of a-z, 0-9 and '-', with no '-' at either end "
            "(got '\\x1b[31mxxxxxxxxxxxxxxxxxxx...xxxxxxxxxxxxxxxxxxxxxxxxxxxx')",
        ),
    ],
)
def test_error_messages(old: str, new: str, message: str) -> None:
    assert LINES.count(old) == 1
    assert refusal(LINES.replace(old, new)) == message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"strategy": False},
            f"strategy: must be a name, or a mapping with `name` (got false)\n  {QUOTE}",
        ),
        ({"strategy": {"name": "x", "options": 4}}, "strategy.options: must be a mapping (got 4)"),
        ({"strategy": ""}, "strategy.name: must have at least 1 character (got 0)"),
        (
            {"optimizer": "SGD"},
            "optimizer: must be a mapping (got 'SGD')\n  hint: write {name: ..., lr: ...}",
        ),
        ({"optimizer": None}, "optimizer: must be a mapping (got null)"),
        (
            {"seed": 10**5000},
            "seed: must be <= 1099511627776 (got a number of thousands of digits)",
        ),
        ({"task_args": {1: 2}}, "task_args.1: a key must be text (got 1)\n  hint: quote it"),
        ({"data": {1: 2}}, "data.1: a key must be text (got 1)\n  hint: quote it"),
        (
            {"storage_path": ""},
            "storage_path: must be a path: not empty, no control characters (got '')",
        ),
        ({"task": "m:" + "C" * 3000}, "task: must have at most 2000 characters (got 3002)"),
        (
            {"optimizer": {"name": "Adam", "lr": 1, "betas": [0.9]}},
            "optimizer.betas.1: required, but missing",
        ),
        (
            {"optimizer": {"name": "Adam", "lr": 1, "betas": [0.9] * 3}},
            "optimizer.betas: must have at most 2 items (got 3)",
        ),
        (
            {"optimizer": {"name": "Adam", "lr": 1, "betas": 0.9}},
            "optimizer.betas: must be a list (got 0.9)",
        ),
        (
            {"optimizer": {"name": "Adam", "lr": 1, "betas": [0.9, 1]}},
            "optimizer.betas.1: must be < 1 (got 1)",
        ),
    ],
)
def test_error_messages_for_mappings_have_no_location(change: dict[str, Any], message: str) -> None:
    good = {
        "name": "a",
        "strategy": "ring",
        "optimizer": {"name": "SGD", "lr": 1},
        "steps": 1,
        "global_batch_size": 1,
    }
    assert job_of(good).task is None
    with pytest.raises(SpecError) as caught:
        job_of(good | change)
    assert str(caught.value) == message


def test_only_the_first_problems_are_listed() -> None:
    message = refusal(LINES + "".join(f"x{i}: 1\n" for i in range(900)))
    assert message.count("unknown field") == 50
    assert "and 850 more problems" in message


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "job.yaml: is empty; a job needs at least name, strategy and optimizer"),
        (b"# later\n", "job.yaml: is empty; a job needs at least name, strategy and optimizer"),
        (b"- a\n", "job.yaml: must be a mapping of fields (got ['a'])"),
        (b"\x89PNG\r\n", "job.yaml: is not UTF-8 text (byte 0x89 at 0)"),
        (b"a: 1\0", "job.yaml: is not a text file (byte 0x00 at 4)"),
        (b"a: " + b"x" * 2_000_000, "job.yaml: is larger than 1000 kB"),
        ("a: é".encode() * 400_000, "job.yaml: is larger than 1000 kB"),
    ],
)
def test_unreadable_contents_are_refused(raw: bytes, message: str) -> None:
    path = Path("job.yaml")
    path.write_bytes(raw)
    with pytest.raises(SpecError) as caught:
        read_job(path)
    assert str(caught.value) == message


def test_invalid_paths_are_refused() -> None:
    Path("folder").mkdir()
    os.mkfifo("pipe")
    for name, message in {
        "nowhere.yaml": "nowhere.yaml: there is no such file",
        "folder": "folder: is a directory, not a file",
        "pipe": "pipe: is not a regular file",
        "x" * 300: "x" * 300 + ": cannot be read: File name too long",
    }.items():
        with pytest.raises(SpecError) as caught:
            read_job(Path(name))
        assert str(caught.value) == message


def test_file_without_permission_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:  # root ignores file modes
        raise PermissionError(13, "Permission denied")

    Path("job.yaml").write_text(LINES)
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(SpecError, match="cannot be read: Permission denied"):
        read_job(Path("job.yaml"))


@pytest.mark.parametrize(
    ("data", "got"), [([1], "[1]"), ("job.yaml", "'job.yaml'"), (None, "null")]
)
def test_job_of_refuses_other_types(data: Any, got: str) -> None:
    with pytest.raises(SpecError) as caught:
        job_of(data)
    assert str(caught.value) == f"a job must be a mapping of fields (got {got})"


def test_job_of_does_not_change_its_argument() -> None:
    data: dict[str, object] = {"name": "a", "strategy": "ring", "steps": 1, "global_batch_size": 1}
    before = dict(data)
    with pytest.raises(SpecError, match="optimizer: required"):
        job_of(data)
    assert data == before
