"""Loading of the user's task, and reports of user errors that start at the user's first frame."""

import gc
import importlib
import shutil
import signal
import sys
import threading
import time
import traceback
from argparse import ArgumentParser
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import torch
from jobs import job_of
from safetensors.torch import save_model
from torch.multiprocessing.spawn import ProcessRaisedException

from distplat.actors import task_loading
from distplat.actors.task_loading import load_task_class, load_train_function
from distplat.actors.training import search_path
from distplat.actors.user_errors import as_user_error, killed_loader, lost_peer
from distplat.platform.errors import SpecError, UserCodeError
from distplat.strategies import torch_compat
from distplat.strategies.function import api
from distplat.strategies.loop.batches import SampleRun, Samples
from distplat.strategies.loop.session import prepare
from distplat.strategies.task import Task

GOOD = """
from distplat import Task

class Digits(Task):
    def model(self): ...
    def train_data(self): ...
    def loss(self, outputs, targets): ...

class Letters(Digits):
    pass

class NoTask:
    pass

value = 3
"""


@pytest.fixture(autouse=True)
def _clean_imports(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Undo the test's imports."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name.startswith("utask"):
            del sys.modules[name]
    importlib.invalidate_caches()


def write(folder: Path, name: str, text: str) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_loads_a_task_class(tmp_path: Path) -> None:
    write(tmp_path, "utask.py", GOOD)
    cls = load_task_class("utask:Digits", str(tmp_path))
    assert issubclass(cls, Task)
    assert (cls.__module__, cls.__name__) == ("utask", "Digits")
    assert load_task_class("utask:Digits", str(tmp_path)) is cls
    assert sys.path.count(str(tmp_path)) == 1


def test_search_folder_is_first_on_sys_path(tmp_path: Path) -> None:
    """PYTHONPATH or another program's files on the node may have a module of the same name."""
    write(tmp_path, "utask.py", GOOD)
    write(tmp_path / "other", "utask.py", GOOD)
    sys.path[:0] = [str(tmp_path / "other"), str(tmp_path)]
    load_task_class("utask:Digits", str(tmp_path))
    assert sys.modules["utask"].__file__ == str(tmp_path / "utask.py")


@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("utask", "was imported before, from {folder}/before/utask.py"),
        ("queue", "was imported before, from "),
        ("time", "is built into Python"),
    ],
)
def test_module_from_another_folder_is_rejected(name: str, where: str, tmp_path: Path) -> None:
    write(tmp_path, "before/utask.py", GOOD)
    load_task_class("utask:Digits", str(tmp_path / "before"))
    write(tmp_path, f"{name}.py", GOOD)
    with pytest.raises(SpecError) as caught:
        load_task_class(f"{name}:Digits", str(tmp_path))
    expected = f"{tmp_path / name}.py would not be used: a module {name!r} "
    assert str(caught.value).startswith(f"task: {expected}{where.format(folder=tmp_path)}")


@pytest.mark.parametrize(
    "imports",
    [
        "import utask_helpers",
        "from utask_helpers import SIZE",
        "def model():\n    from utask_helpers import SIZE",
        "import utask_middle.part",
        "from utask_middle import part",
    ],
)
def test_helper_module_of_an_earlier_job_is_rejected(imports: str, tmp_path: Path) -> None:
    """A second job in one process would get the first job's modules from `sys.modules`."""
    for folder, size in (("one", 1), ("two", 2)):
        write(tmp_path, f"{folder}/utask_helpers.py", f"SIZE = {size}\n")
        write(tmp_path, f"{folder}/utask_middle/part.py", "from utask_helpers import SIZE\n")
    write(tmp_path, "one/utask_one.py", GOOD + "import utask_helpers\n")
    write(tmp_path, "two/utask_two.py", GOOD + imports + "\n")
    write(tmp_path, "two/train.py", imports + "\n")
    one, two = (str(tmp_path / name) for name in ("one", "two"))
    load_task_class("utask_one:Digits", one)
    expected = (
        f"{two}/utask_helpers.py would not be used: a module 'utask_helpers' was imported before, "
        f"from {one}/utask_helpers.py"
    )
    for load, entry in ((load_task_class, "utask_two:Digits"), (load_train_function, "train.py")):
        with pytest.raises(SpecError) as caught:
            load(entry, two)
        assert expected in str(caught.value)
    assert load_task_class("utask_one:Digits", one)


def test_package_module_of_an_earlier_job_is_rejected(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        write(tmp_path, f"{folder}/utask_shared/sizes.py", "SIZE = 3\n")
        task = GOOD + "from .sizes import SIZE\n"
        write(tmp_path, f"{folder}/utask_shared/task_{folder}.py", task)
    load_task_class("utask_shared.task_one:Digits", str(tmp_path / "one"))
    with pytest.raises(SpecError, match=r"two/utask_shared/sizes.py would not be used"):
        load_task_class("utask_shared.task_two:Digits", str(tmp_path / "two"))


class _Garbage:
    """Yields to another thread when it is collected, possibly in the middle of `ast.parse`."""

    def __init__(self) -> None:
        self.me = self

    def __del__(self) -> None:
        time.sleep(0)


def test_tasks_load_in_several_threads_at_once(tmp_path: Path) -> None:
    """Ranks of tests are threads, and `ast` of CPython has a recursion counter that they share."""
    nested = "x = " + "[" * 30 + "1" + "]" * 30 + "\n"
    for folder in ("one", "."):  # otherwise no file is parsed
        write(tmp_path, f"{folder}/utask_helpers.py", GOOD)
    load_task_class("utask_helpers:Digits", str(tmp_path / "one"))
    write(tmp_path, "utask.py", GOOD + nested * 100)
    errors: list[BaseException] = []

    def load() -> None:
        try:
            for _ in range(10):
                _Garbage()
                load_task_class("utask:Digits", str(tmp_path))
        except BaseException as error:
            errors.append(error)

    before = gc.get_threshold()
    gc.set_threshold(50, 5, 1000)
    try:
        threads = [threading.Thread(target=load, daemon=True) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    finally:
        gc.set_threshold(*before)
    assert not errors and not any(thread.is_alive() for thread in threads)


def test_files_are_parsed_only_if_a_module_may_be_shadowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder may contain a large library, and parsing takes milliseconds per file."""
    parsed: list[str] = []

    def record(name: str, path: Path) -> set[str]:
        parsed.append(name)
        return set()

    monkeypatch.setattr(task_loading, "_names_imported", record)
    write(tmp_path, "utask_helpers.py", "SIZE = 3\n")
    write(tmp_path, "string/__init__.py", "")
    write(tmp_path, "utask.py", GOOD + "from utask_helpers import SIZE\n")
    for _ in range(2):  # the second time its imports are loaded, from the same folder
        assert load_task_class("utask:Digits", str(tmp_path))
    assert not parsed
    write(tmp_path, "torch.py", "")
    load_task_class("utask:Digits", str(tmp_path))
    assert parsed == ["utask"]


def test_task_folder_does_not_shadow_distplat_and_main(tmp_path: Path) -> None:
    """The task's folder may contain a checkout of distplat."""
    for name in ("distplat/__init__.py", "__main__.py"):
        write(tmp_path, name, "raise AssertionError('it was imported')\n")
    write(tmp_path, "utask.py", GOOD + "import __main__\n")
    assert issubclass(load_task_class("utask:Digits", str(tmp_path)), Task)


def test_module_shipped_by_ray_counts_as_the_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker on the driver's node has both, and a strategy file imports the shipped module."""
    shipped = tmp_path / "working_dir_files/_ray_pkg_17"
    for folder in (tmp_path, shipped):
        write(folder, "utask_helpers.py", "SIZE = 3\n")
    write(tmp_path, "utask.py", GOOD + "from utask_helpers import SIZE\n")
    monkeypatch.syspath_prepend(shipped)
    importlib.import_module("utask_helpers")
    assert load_task_class("utask:Digits", str(tmp_path))
    write(tmp_path, "utask_helpers.py", "SIZE = 4\n")
    with pytest.raises(SpecError, match=r"utask_helpers.py would not be used: .*_ray_pkg_17"):
        load_task_class("utask:Digits", str(tmp_path))


def test_files_that_the_task_does_not_import_are_ignored(tmp_path: Path) -> None:
    write(tmp_path, "one/utask_helpers.py", GOOD)
    load_task_class("utask_helpers:Digits", str(tmp_path / "one"))
    for name in ("utask_helpers", "torch", "random"):
        write(tmp_path, f"two/{name}.py", "raise AssertionError('it was imported')\n")
    write(tmp_path, "two/utask_two.py", GOOD + "import random\nfrom . import utask_helpers\n")
    with pytest.raises(ImportError, match="relative import"):
        load_task_class("utask_two:Digits", str(tmp_path / "two"))
    write(tmp_path, "two/utask_other.py", GOOD + "import random\nfrom utask_gone import one\n")
    with pytest.raises(ModuleNotFoundError, match="utask_gone"):
        load_task_class("utask_other:Digits", str(tmp_path / "two"))
    write(tmp_path, "two/utask_third.py", GOOD + "import random\n")
    assert load_task_class("utask_third:Digits", str(tmp_path / "two"))


def test_compiled_module_beside_its_source_counts_as_the_folders(tmp_path: Path) -> None:
    """Python prefers `utask.*.so` to `utask.py`."""
    write(tmp_path, "utask.py", GOOD)
    cls = load_task_class("utask:Digits", str(tmp_path))
    write(tmp_path, compiled := f"utask{EXTENSION_SUFFIXES[0]}", "")
    sys.modules["utask"].__file__ = str(tmp_path / compiled)
    assert load_task_class("utask:Digits", str(tmp_path)) is cls


def test_module_may_replace_itself_in_sys_modules(tmp_path: Path) -> None:
    swap = "import sys\nsys.modules[__name__] = type('Names', (), {'Digits': Digits})()\n"
    write(tmp_path, "utask_swapped.py", GOOD + swap)
    assert issubclass(load_task_class("utask_swapped:Digits", str(tmp_path)), Task)
    with pytest.raises(SpecError, match=r"Names.* has no class 'Letters'"):
        load_task_class("utask_swapped:Letters", str(tmp_path))


def test_loads_a_class_of_a_package(tmp_path: Path) -> None:
    write(tmp_path, "utask_pkg/deep.py", GOOD)
    assert load_task_class("utask_pkg.deep:Letters", str(tmp_path)).__name__ == "Letters"


@pytest.mark.parametrize(
    ("entry", "message", "hint"),
    [
        ("utask:Digit", "module 'utask' has no class 'Digit'", "did you mean 'Digits'?"),
        ("utask:Nothing", "has no class 'Nothing'", "allowed: Digits, Letters"),
        ("utask:NoTask", "has no subclass of distplat.Task called 'NoTask'", "allowed: Digits"),
        ("utask:value", "has no subclass of distplat.Task called 'value'", "allowed: Digits"),
        ("utaks:Digits", "could not import 'utaks' from {folder}", "did you mean 'utask'?"),
        ("utask_pkg.deeper:Digits", "could not import 'utask_pkg.deeper' from {folder}", ""),
        ("utask_gone.deep:Digits", "could not import 'utask_gone.deep'", ""),
    ],
)
def test_missing_module_or_class_has_a_hint(
    entry: str, message: str, hint: str, tmp_path: Path
) -> None:
    write(tmp_path, "utask.py", GOOD)
    write(tmp_path, "utask_pkg/deep.py", GOOD)
    with pytest.raises(SpecError) as caught:
        load_task_class(entry, str(tmp_path))
    (problem,) = caught.value.problems
    assert problem.where == ("task",)
    assert message.format(folder=tmp_path) in problem.message
    assert problem.hint.startswith(hint)


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("import utask_no_such_thing", ModuleNotFoundError, "utask_no_such_thing"),
        ("from json import no_such_name", ImportError, "no_such_name"),
        ("1 / 0", ZeroDivisionError, "division"),
        ("def broken(:", SyntaxError, "invalid syntax"),
    ],
)
def test_errors_of_the_users_module_propagate(
    text: str, error: type[Exception], message: str, tmp_path: Path
) -> None:
    write(tmp_path, "utask.py", text)
    with pytest.raises(error, match=message):
        load_task_class("utask:Digits", str(tmp_path))


RAISES = """
from distplat import Task

class Digits(Task):
    def model(self):
        return build()
    def train_data(self): ...
    def loss(self, outputs, targets): ...

def build():
    raise ValueError("no layers today")
"""

JOB = job_of(steps=1)


def caught(call: Callable[..., object], *args: object) -> UserCodeError:
    """Return a worker's report of the error that `call` raises."""
    try:
        call(*args)
    except Exception as error:
        # The first frame is this function's; in a worker it would be distplat's, and removed.
        assert error.__traceback__ is not None
        return as_user_error(error.with_traceback(error.__traceback__.tb_next), 2, 7)
    raise AssertionError("nothing was raised")


def files(error: UserCodeError) -> list[str]:
    """Return the file names of the traceback's frames, in order."""
    lines = [line for line in error.traceback.splitlines() if line.startswith('  File "')]
    return [Path(line.split('"')[1]).name for line in lines]


def test_traceback_starts_at_the_users_frame(tmp_path: Path) -> None:
    write(tmp_path, "utask.py", RAISES)
    task = load_task_class("utask:Digits", str(tmp_path))()
    error = caught(prepare, JOB, task)
    assert files(error) == ["utask.py", "utask.py"]
    assert "raise ValueError" in error.traceback
    assert (error.rank, error.step, error.summary) == (2, 7, "ValueError: no layers today")


def test_traceback_of_an_import_starts_at_the_users_frame(tmp_path: Path) -> None:
    write(tmp_path, "utask.py", "import utask_helper\n")
    write(tmp_path, "utask_helper.py", "raise RuntimeError('not today')\n")
    error = caught(load_task_class, "utask:Digits", str(tmp_path))
    names = [name for name in files(error) if not name.startswith("<frozen")]
    assert names == ["utask.py", "utask_helper.py"]
    assert files(error)[0] == "utask.py"


def test_traceback_of_a_distplat_error_has_no_frames(tmp_path: Path) -> None:
    write(tmp_path, "utask.py", RAISES.replace("return build()", "return 3"))
    task = load_task_class("utask:Digits", str(tmp_path))()
    error = caught(prepare, JOB, task)
    assert (
        error.summary == "ValueError: utask.py:5: model() must return a torch.nn.Module, got an int"
    )
    assert error.traceback == error.summary + "\n"


class _FailingStr(RuntimeError):
    def __str__(self) -> str:
        raise KeyError("no text")


class _FailingText(SyntaxError):
    @property
    def text(self) -> str:  # type: ignore[override]
        raise KeyError("no line")


@pytest.mark.parametrize("error_type", [_FailingStr, _FailingText])
def test_exception_whose_str_fails_is_reported(error_type: type[Exception]) -> None:
    """Otherwise the training thread ends silently and the run waits until its deadline."""
    error = error_type("gloo")
    cls = as_user_error(error, 1, 3)
    assert (cls.rank, cls.step) == (1, 3)
    assert error_type.__name__ in str(cls)
    assert killed_loader(error) is None
    assert lost_peer(error) is None


def test_middle_of_a_long_message_is_omitted() -> None:
    """A message may contain a whole batch, and terminal and `result.json` show it twice."""
    cls = as_user_error(ValueError("begin " + "x" * 1_000_000 + " end"), 1, 3)
    assert len(cls.summary) < 3_000 and len(cls.traceback) < 60_000
    for shown in (cls.summary, cls.traceback.rstrip()):
        assert "ValueError: begin x" in shown and shown.endswith("x end")
        assert "characters ...]" in shown
    short = as_user_error(ValueError("y" * 1_500), 1, 3)
    assert short.summary == "ValueError: " + "y" * 1_500
    without_frames = as_user_error(ValueError("z" * 10_000), 1, 3)
    assert without_frames.frames == "", "the message is shown once"


def test_traceback_keeps_the_chain_of_causes(tmp_path: Path) -> None:
    text = RAISES.replace(
        'raise ValueError("no layers today")',
        'try: 1 / 0\n    except ZeroDivisionError as e: raise ValueError("outer") from e',
    )
    write(tmp_path, "utask.py", text)
    task = load_task_class("utask:Digits", str(tmp_path))()
    error = caught(prepare, JOB, task)
    assert "ZeroDivisionError: division by zero" in error.traceback
    assert "direct cause" in error.traceback
    assert error.summary == "ValueError: outer"


@pytest.mark.parametrize(
    ("node", "shipped", "expected"),
    [
        ("driver's", "", "folder"),
        ("driver's", "gcs://_ray_pkg_1.zip", "folder"),
        ("another", "", "folder"),  # same machine or shared disk: `test_spawn.py`
        ("another", "gcs://_ray_pkg_1.zip", "here"),
    ],
)
def test_search_path_of_another_node_is_the_shipped_folder(
    node: str, shipped: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other node may have an outdated or unrelated folder at the same path."""
    environment = {"working_dir": shipped} if shipped else {}
    context = SimpleNamespace(runtime_env=environment, get_node_id=lambda: node)
    monkeypatch.setattr(ray, "get_runtime_context", lambda: context)
    order: Any = SimpleNamespace(search_path=str(tmp_path), node="driver's")
    assert search_path(order) == {"folder": str(tmp_path), "here": str(Path.cwd())}[expected]


@pytest.mark.parametrize(
    "text",
    [
        "unable to allocate shared memory(shm) for file </torch_16_1_0>: No space left on device",
        "unable to write to file </torch_16_1_0>: No space left on device (28)",
        "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that "
        "dataloader's workers are out of shared memory. Please try to raise your limit.",
        "DataLoader worker (pid(s) 7) exited unexpectedly",
    ],
)
def test_full_dev_shm_error_reports_its_size(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_compat, "loader_exit_codes", lambda error: [0, -signal.SIGBUS])

    def fail() -> None:
        raise RuntimeError(text)

    size = shutil.disk_usage("/dev/shm").total // 2**20
    remedy = caught(fail).remedy
    assert f"in /dev/shm, which has {size} MiB here and is full" in remedy
    assert "--shm-size" in remedy and "data.num_workers: 0" in remedy


@pytest.mark.parametrize(
    "line",
    [
        "torch.distributed.get_rank()",
        "torch.distributed.init_process_group('gloo')",
        "torch.utils.data.DistributedSampler([1, 2])",
        "os.environ['LOCAL_RANK']",
        "os.environ['MASTER_ADDR']",
    ],
)
def test_ddp_api_error_names_the_distplat_api(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    remedy = caught(exec, "import os, torch\n" + line).remedy
    assert "distplat.get_context()" in remedy and "distplat.prepare" in remedy


def raise_invalid_device() -> None:
    raise RuntimeError("CUDA error: invalid device ordinal")


def save_parameter_views() -> None:
    """Save parameters that are views of one vector, as in a prepared model."""
    model = torch.nn.Linear(2, 1)
    whole = torch.zeros(4)
    model.weight.data, model.bias.data = whole[:2].view(1, 2), whole[2:3]
    save_model(model, "nowhere")


@pytest.mark.parametrize(
    ("fail", "remedy"),
    [
        (raise_invalid_device, "distplat.get_context().device"),
        (save_parameter_views, "safe_serialization=False"),
    ],
)
def test_error_that_torchrun_would_not_raise_has_a_remedy(
    fail: Callable[[], None], remedy: str
) -> None:
    assert remedy in caught(fail).remedy


def get_context_outside_a_run() -> str:
    with pytest.raises(SpecError) as refused:
        api.get_context()
    return str(refused.value)


SPAWN_REMEDY = "in place of `mp.spawn"
GROUP_ERROR = 'File "/opt/torch/distributed/rendezvous.py", line 1, in f\nOSError: address in use'


@pytest.mark.parametrize(
    ("inner", "own_loop", "remedy"),
    [
        (lambda: "KeyError: 'LOCAL_RANK'", True, SPAWN_REMEDY),
        (lambda: GROUP_ERROR, True, SPAWN_REMEDY),
        (get_context_outside_a_run, True, SPAWN_REMEDY),
        (lambda: "RuntimeError: CUDA out of memory", True, "a smaller `batch_size`"),
        (lambda: "RuntimeError: CUDA out of memory", False, "raise `gradient_accumulation`"),
        (lambda: "KeyError: 'LOCAL_RANK'", False, "torch.distributed has no group"),
        (lambda: "ValueError: a file is damaged", True, ""),
    ],
)
def test_error_in_a_spawned_process_has_a_remedy(
    inner: Callable[[], str], own_loop: bool, remedy: str
) -> None:
    text = f"\n\n-- Process 0 terminated with the following error:\n{inner()}\n"
    error = as_user_error(ProcessRaisedException(text, 0, 7), 0, 3, own_loop=own_loop)
    assert remedy in error.remedy and bool(error.remedy) is bool(remedy)


def test_argument_parser_error_points_to_task_args(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["default_worker.py", "--node-ip-address=10.0.0.7"])
    with pytest.raises(SystemExit) as ended:
        ArgumentParser().parse_args()
    assert "`task_args`" in as_user_error(ended.value, 0, None).remedy


class BrokenData:
    """Sample 17 cannot be read, and samples of the two halves have different shapes."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> torch.Tensor:
        if index == 17:
            raise ValueError("line 1\nline 2")
        return torch.ones(1 + index // 32)


def error_of(ids: list[int], *, in_loader: bool) -> Exception:
    """Return the error of reading samples, wrapped as by a loader process if `in_loader`."""
    data: Any = BrokenData()
    try:
        Samples(data).__getitems__(SampleRun(0, 0, ids))
    except Exception as error:
        if not in_loader:
            return error
        where = f"Caught {type(error).__name__} in DataLoader worker process 0."
        return type(error)(f"{where}\nOriginal {traceback.format_exc()}")
    raise AssertionError


@pytest.mark.parametrize("in_loader", [False, True])
@pytest.mark.parametrize(
    ("ids", "suffix"),
    [
        ([4, 17, 9], "(sample 17 of the data set)"),
        ([*range(10), 40], "(samples 0, 1, 2, 3, 4, 5, 6, 7, ... of the data set)"),
    ],
)
def test_error_of_a_batch_names_the_samples(ids: list[int], suffix: str, in_loader: bool) -> None:
    error = as_user_error(error_of(ids, in_loader=in_loader), 0, 3)
    assert error.text.splitlines()[-1 if "hint" not in error.text else -2].endswith(suffix)
    assert (
        error.traceback.endswith(f"{suffix}\n") and error.traceback.count(" of the data set") == 1
    )


def test_traceback_omits_generated_frames() -> None:
    """`dataclass` generates `__init__` from a string."""

    @dataclass
    class Sized:
        size: int

        def __post_init__(self) -> None:
            raise ValueError("no size")

    try:
        Sized(0)
    except ValueError as error:
        assert "<string>" not in as_user_error(error, 0, None).traceback
