"""A task is looked at before anything starts, in a process of its own."""

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from jobs import fields_of

from distplat import Task, Trainer
from distplat.actors import launch as launching
from distplat.actors import task_check
from distplat.actors.task_check import TaskCheck
from distplat.actors.task_pickling import check_pickles
from distplat.cli.main import run
from distplat.platform.errors import DistplatError, SpecError, UserCodeError
from distplat.platform.recovery import error_priority

JOB = """\
name: checked
task: utask:Good
strategy: ring
optimizer: {name: SGD, lr: 0.1}
steps: 1
global_batch_size: 4
"""
TASKS = """\
import os, sys
from distplat import Task
print("imported in", os.path.basename(os.getcwd()))

class Good(Task):
    def __init__(self, width=3, *, depth=2): raise RuntimeError("is not to be made here")
    def model(self): ...
    def train_data(self): ...
    def loss(self, outputs, targets): ...

class Any(Good):
    def __init__(self, **given): ...

class Needs(Good):
    def __init__(self, width): ...

class Hooked(Good):
    def collate_fn(self, samples): ...

class Meant(Task):
    def model(self): ...
    def train_dataset(self): ...
    def loss(self, outputs, targets): ...

class Other: ...
"""


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("job.yaml").write_text(JOB)
    Path("utask.py").write_text(TASKS)
    for name in [one for one in os.environ if one.startswith(("DISTPLAT_", "RAY_"))]:
        monkeypatch.delenv(name)


def validate(*settings: str, files: dict[str, str] | None = None) -> int:
    for name, text in (files or {}).items():
        Path(name).write_text(text)
    return run(["validate", "job.yaml", *(f"--set={one}" for one in settings)])


@pytest.mark.sweep(2)
@pytest.mark.parametrize(
    ("settings", "shown"),
    [
        (
            ["task=utaks:Good"],
            "could not import 'utaks' from {folder}\n  hint: did you mean 'utask'",
        ),
        (["task=utask:Godo"], "module 'utask' has no class 'Godo'\n  hint: did you mean 'Good'"),
        (["task=utask:Other"], "has no subclass of distplat.Task called 'Other'"),
        (["task=utask:Meant"], "Meant has no train_data()\n  hint: did you mean train_dataset()"),
        (
            ["task_args.widht=3"],
            "task_args.widht: Good takes no such argument\n  hint: did you mean",
        ),
        (["task=utask:Needs"], "task_args: Needs needs the argument 'width'"),
    ],
)
def test_what_is_wrong_with_a_task_is_found_by_validate(
    settings: list[str], shown: str, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert validate(*settings) == 2
    out, err = capfd.readouterr()
    assert shown.format(folder=tmp_path) in err
    assert out == ""


@pytest.mark.parametrize(
    "settings",
    [["task_args.width=3", "task_args.depth=1"], ["task=utask:Any", "task_args.anything=3"]],
)
def test_a_good_task_is_valid_and_what_it_prints_is_no_part_of_the_job(
    settings: list[str], capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert validate(*settings) == 0
    out, err = capfd.readouterr()
    assert out.startswith("name: checked\n")
    assert err == f"imported in {tmp_path.name}\n"
    assert "utask" not in sys.modules


def test_a_hook_that_is_none_is_a_warning(capfd: pytest.CaptureFixture[str]) -> None:
    assert validate("task=utask:Hooked") == 0
    assert "warning: utask.py:18: Hooked.collate_fn() is never called: " in capfd.readouterr().err


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("import nothing_like_it", "ModuleNotFoundError: No module named 'nothing_like_it'"),
        ("def broken(:", "SyntaxError: invalid syntax"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("import sys; sys.exit(0)", "SystemExit: 0"),
        ("import os; os._exit(0)", "the import of 'utask:Good' ended the process, exit code 0"),
    ],
)
def test_a_module_that_cannot_be_imported_is_the_users_failure(
    text: str, shown: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert validate(files={"utask.py": text}) == 1
    err = capfd.readouterr().err
    assert f"error: your task's module cannot be imported: {shown}" in err
    frames = [line for line in err.splitlines() if line.startswith('  File "')]
    assert all("utask.py" in line for line in frames)


def test_files_beside_the_task_do_not_stand_in_for_the_standard_library() -> None:
    assert validate(files={"json.py": "1 / 0", "subprocess.py": "1 / 0"}) == 0


def test_an_import_that_does_not_end_is_given_up(tmp_path: Path) -> None:
    Path("utask.py").write_text("import time; time.sleep(60)")
    check = TaskCheck("utask:Good", str(tmp_path), [], shown=False)
    with pytest.raises(UserCodeError, match=r"took longer than 0\.5 s"):
        check.result(0.5)
    assert check._child.poll() is not None


@pytest.mark.timeout(40)
@pytest.mark.parametrize("polled", [True, False])
@pytest.mark.parametrize("crashes", [True, False])
def test_a_process_that_the_module_has_forked_is_not_waited_for(
    crashes: bool, polled: bool, tmp_path: Path
) -> None:
    """It holds the end of the pipe by which the answer comes."""
    forks = (
        "import os, signal, time\nif not (pid := os.fork()):\n    time.sleep(100)\n"
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(pid))\n"
    )
    end = "os.kill(os.getpid(), signal.SIGSEGV)\n" if crashes else TASKS
    (tmp_path / "utask.py").write_text(forks + end)
    check = TaskCheck("utask:Good", str(tmp_path), [], shown=False)
    try:
        wanted = pytest.raises(UserCodeError, match="-11") if crashes else nullcontext()
        with wanted:
            if polled:
                check._child.wait(30)
                assert check.poll() == []
            else:
                assert check.result(30.0) == []
    finally:
        check.end()
        os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)


def test_the_answer_is_given_once_when_it_is_there(tmp_path: Path) -> None:
    check = TaskCheck("utask:Hooked", str(tmp_path), [], shown=False)
    found: list[str] = []
    until = time.monotonic() + 60
    while not found and time.monotonic() < until:
        found = check.poll()
        time.sleep(0.02)
    assert len(found) == 1
    assert check.poll() == []
    check.end()


def test_a_very_long_traceback_does_not_block_the_child(tmp_path: Path) -> None:
    Path("utask.py").write_text("raise ValueError('x' * 200_000)")
    check = TaskCheck("utask:Good", str(tmp_path), [], shown=False)
    assert check._child.wait(60) == 0
    with pytest.raises(UserCodeError, match="xxx"):
        check.poll()
    check.end()


class Held(Task):
    def model(self) -> Any: ...
    def train_data(self) -> Any: ...
    def loss(self, outputs: Any, targets: Any) -> Any: ...


FIELDS = fields_of(steps=1)


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (Held(), "must be the task's class, got an instance of Held.*\n.*hint: give Held; its"),
        (dict, "must be a subclass of distplat.Task, got dict"),
        ("m:T", "must be a subclass of distplat.Task, got a str"),
    ],
)
def test_what_a_trainer_is_given_must_be_a_class(task: Any, message: str) -> None:
    with pytest.raises(SpecError, match=message) as caught:
        Trainer(FIELDS, task)
    assert caught.value.exit_code == 2


def test_a_trainer_compares_task_args_with_the_class() -> None:
    with pytest.raises(SpecError, match=r"task_args\.width: Held takes no such argument"):
        Trainer({**FIELDS, "task_args": {"width": 3}}, Held)


def test_a_trainer_warns_of_what_is_never_called(caplog: pytest.LogCaptureFixture) -> None:
    kind = type("Hooked", (Held,), {"training_step": lambda self: None})
    job = {**FIELDS, "scaling": {"num_workers": 0}}
    with pytest.raises(DistplatError):
        Trainer(job, kind).fit()
    assert caplog.text.count("Hooked.training_step() is never called") == 1


LOCK = threading.Lock()


def by_value(**members: object) -> type[Task]:
    """A class as a user's script has it: pickled as a whole, not by name."""
    kind = type("Mine", (Held,), {**members, "__module__": "__main__"})
    return kind


def uses_a_global(self: Task) -> object:
    return LOCK


uses_a_global.__module__ = "__main__"


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"lock": threading.Lock()}, "its attribute 'lock' is a lock"),
        ({"train_data": lambda self, lock=LOCK: lock}, "cannot be sent to the workers"),
        ({"train_data": uses_a_global}, "its train_data() uses 'LOCK', a lock"),
    ],
)
def test_what_cannot_be_pickled_is_named(members: dict[str, object], message: str) -> None:
    with pytest.raises(SpecError) as caught:
        check_pickles(by_value(**members))
    assert message in str(caught.value)
    check_pickles(by_value(width=3))


def test_a_wrong_task_explains_a_failed_run_better_than_its_effects() -> None:
    assert error_priority(SpecError("no such class")) == error_priority(
        UserCodeError(0, None, "x", "")
    )


def test_a_plug_in_that_ends_the_process_is_no_success(tmp_path: Path) -> None:
    Path("mine.py").write_text("import sys; sys.exit(0)")
    assert run(["validate", "job.yaml", "--strategy-file", "mine.py"]) == 2


def test_check_class_runs_without_torch() -> None:
    ask = "import sys; import distplat.actors.task_check; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", ask], timeout=100).returncode == 0


def test_a_run_on_a_cluster_that_is_there_leaves_the_look_to_the_workers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[object] = []

    class Recorded:
        def __init__(self, *args: object, shown: bool, function: bool, fields: object) -> None:
            made.append(args)

        def end(self) -> None: ...

    monkeypatch.setattr(task_check, "TaskCheck", Recorded)
    trainer = Trainer({**FIELDS, "task": "utask:Good"})
    grasped: list[Any] = []
    monkeypatch.setattr(
        "distplat.actors.trainer.train_on_ray", lambda launch, *rest: grasped.append(launch)
    )
    trainer.fit()
    (launch,) = grasped
    for connected, count in ((True, 0), (False, 1)):
        monkeypatch.setattr("ray.is_initialized", lambda connected=connected: connected)
        with launching._task_check(launch):
            assert len(made) == count
