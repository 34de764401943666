"""TaskCheck: a child process imports and checks the task before the run starts."""

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
    def __init__(self, width=3, *, depth=2): raise RuntimeError("must not be created here")
    def model(self): ...
    def train_data(self): ...
    def loss(self, outputs, targets): ...

class Any(Good):
    def __init__(self, **kwargs): ...

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
    for name in [name for name in os.environ if name.startswith(("DISTPLAT_", "RAY_"))]:
        monkeypatch.delenv(name)


def validate(*settings: str, files: dict[str, str] | None = None) -> int:
    for name, text in (files or {}).items():
        Path(name).write_text(text)
    return run(["validate", "job.yaml", *(f"--set={setting}" for setting in settings)])


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
def test_validate_reports_task_errors(
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
def test_validate_accepts_task_and_keeps_its_output_from_stdout(
    settings: list[str], capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert validate(*settings) == 0
    out, err = capfd.readouterr()
    assert out.startswith("name: checked\n")
    assert err == f"imported in {tmp_path.name}\n"
    assert "utask" not in sys.modules


def test_unknown_hook_is_a_warning(capfd: pytest.CaptureFixture[str]) -> None:
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
def test_import_failure_is_a_user_error(
    text: str, shown: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert validate(files={"utask.py": text}) == 1
    err = capfd.readouterr().err
    assert f"error: your task's module cannot be imported: {shown}" in err
    frames = [line for line in err.splitlines() if line.startswith('  File "')]
    assert all("utask.py" in line for line in frames)


def test_files_beside_the_task_do_not_shadow_the_standard_library() -> None:
    assert validate(files={"json.py": "1 / 0", "subprocess.py": "1 / 0"}) == 0


def test_import_that_hangs_times_out(tmp_path: Path) -> None:
    Path("utask.py").write_text("import time; time.sleep(60)")
    check = TaskCheck("utask:Good", str(tmp_path), [], shown=False)
    with pytest.raises(UserCodeError, match=r"took longer than 0\.5 s"):
        check.result(0.5)
    assert check._child.poll() is not None


@pytest.mark.timeout(40)
@pytest.mark.parametrize("polled", [True, False])
@pytest.mark.parametrize("crashes", [True, False])
def test_check_does_not_wait_for_forked_processes(
    crashes: bool, polled: bool, tmp_path: Path
) -> None:
    """The forked process inherits the write end of the result pipe."""
    fork_source = (
        "import os, signal, time\nif not (pid := os.fork()):\n    time.sleep(100)\n"
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(pid))\n"
    )
    end = "os.kill(os.getpid(), signal.SIGSEGV)\n" if crashes else TASKS
    (tmp_path / "utask.py").write_text(fork_source + end)
    check = TaskCheck("utask:Good", str(tmp_path), [], shown=False)
    try:
        expectation = pytest.raises(UserCodeError, match="-11") if crashes else nullcontext()
        with expectation:
            if polled:
                check._child.wait(30)
                assert check.poll() == []
            else:
                assert check.result(30.0) == []
    finally:
        check.end()
        os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)


def test_poll_returns_the_warnings_once(tmp_path: Path) -> None:
    check = TaskCheck("utask:Hooked", str(tmp_path), [], shown=False)
    warnings: list[str] = []
    deadline = time.monotonic() + 60
    while not warnings and time.monotonic() < deadline:
        warnings = check.poll()
        time.sleep(0.02)
    assert len(warnings) == 1
    assert check.poll() == []
    check.end()


def test_long_traceback_does_not_block_the_child(tmp_path: Path) -> None:
    Path("utask.py").write_text("raise ValueError('x' * 200_000)")
    check = TaskCheck("utask:Good", str(tmp_path), [], shown=False)
    assert check._child.wait(60) == 0
    with pytest.raises(UserCodeError, match="xxx"):
        check.poll()
    check.end()


class EmptyTask(Task):
    def model(self) -> Any: ...
    def train_data(self) -> Any: ...
    def loss(self, outputs: Any, targets: Any) -> Any: ...


FIELDS = fields_of(steps=1)


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (
            EmptyTask(),
            "must be the task's class, got an instance of EmptyTask.*\n.*hint: give EmptyTask; its",
        ),
        (dict, "must be a subclass of distplat.Task, got dict"),
        ("m:T", "must be a subclass of distplat.Task, got a str"),
    ],
)
def test_trainer_rejects_anything_but_a_task_class(task: Any, message: str) -> None:
    with pytest.raises(SpecError, match=message) as caught:
        Trainer(FIELDS, task)
    assert caught.value.exit_code == 2


def test_trainer_checks_task_args() -> None:
    with pytest.raises(SpecError, match=r"task_args\.width: EmptyTask takes no such argument"):
        Trainer({**FIELDS, "task_args": {"width": 3}}, EmptyTask)


def test_trainer_warns_of_unknown_hooks(caplog: pytest.LogCaptureFixture) -> None:
    task = type("Hooked", (EmptyTask,), {"training_step": lambda self: None})
    job = {**FIELDS, "scaling": {"num_workers": 0}}
    with pytest.raises(DistplatError):
        Trainer(job, task).fit()
    assert caplog.text.count("Hooked.training_step() is never called") == 1


LOCK = threading.Lock()


def main_module_task(**members: object) -> type[Task]:
    """Return a class of module `__main__`, which is pickled by value."""
    task = type("Mine", (EmptyTask,), {**members, "__module__": "__main__"})
    return task


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
def test_check_pickles_names_the_unpicklable_object(
    members: dict[str, object], message: str
) -> None:
    with pytest.raises(SpecError) as caught:
        check_pickles(main_module_task(**members))
    assert message in str(caught.value)
    check_pickles(main_module_task(width=3))


def test_task_errors_have_the_priority_of_user_errors() -> None:
    assert error_priority(SpecError("no such class")) == error_priority(
        UserCodeError(0, None, "x", "")
    )


def test_exit_in_a_strategy_file_is_an_error(tmp_path: Path) -> None:
    Path("mine.py").write_text("import sys; sys.exit(0)")
    assert run(["validate", "job.yaml", "--strategy-file", "mine.py"]) == 2


def test_task_check_does_not_import_torch() -> None:
    script = "import sys; import distplat.actors.task_check; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], timeout=100).returncode == 0


def test_run_on_a_connected_cluster_starts_no_task_check(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    checks: list[object] = []

    class RecordedCheck:
        def __init__(self, *args: object, shown: bool, function: bool, fields: object) -> None:
            checks.append(args)

        def end(self) -> None: ...

    monkeypatch.setattr(task_check, "TaskCheck", RecordedCheck)
    trainer = Trainer({**FIELDS, "task": "utask:Good"})
    launches: list[Any] = []
    monkeypatch.setattr(
        "distplat.actors.trainer.train_on_ray", lambda launch, *rest: launches.append(launch)
    )
    trainer.fit()
    (launch,) = launches
    for connected, count in ((True, 0), (False, 1)):
        monkeypatch.setattr("ray.is_initialized", lambda connected=connected: connected)
        with launching._task_check(launch):
            assert len(checks) == count
