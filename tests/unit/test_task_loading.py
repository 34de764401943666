"""Finding the user's task, and showing the user's errors from the user's first line on."""

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
    """Undo what a test imports."""
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


def test_a_class_is_found(tmp_path: Path) -> None:
    write(tmp_path, "utask.py", GOOD)
    found = load_task_class("utask:Digits", str(tmp_path))
    assert issubclass(found, Task)
    assert (found.__module__, found.__name__) == ("utask", "Digits")
    assert load_task_class("utask:Digits", str(tmp_path)) is found
    assert sys.path.count(str(tmp_path)) == 1


def test_the_folder_comes_before_all_that_is_searched(tmp_path: Path) -> None:
    """As on PYTHONPATH, or among what another program has put on a node."""
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
def test_a_module_that_is_not_the_folders_is_not_trained(
    name: str, where: str, tmp_path: Path
) -> None:
    write(tmp_path, "before/utask.py", GOOD)
    load_task_class("utask:Digits", str(tmp_path / "before"))
    write(tmp_path, f"{name}.py", GOOD)
    with pytest.raises(SpecError) as caught:
        load_task_class(f"{name}:Digits", str(tmp_path))
    said = f"{tmp_path / name}.py would not be used: a module {name!r} "
    assert str(caught.value).startswith(f"task: {said}{where.format(folder=tmp_path)}")


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
def test_a_module_of_an_earlier_jobs_folder_is_not_imported_instead(
    imports: str, tmp_path: Path
) -> None:
    """In one process a second job imports what is there, whatever its own folder has."""
    for folder, size in (("one", 1), ("two", 2)):
        write(tmp_path, f"{folder}/utask_helpers.py", f"SIZE = {size}\n")
        write(tmp_path, f"{folder}/utask_middle/part.py", "from utask_helpers import SIZE\n")
    write(tmp_path, "one/utask_one.py", GOOD + "import utask_helpers\n")
    write(tmp_path, "two/utask_two.py", GOOD + imports + "\n")
    write(tmp_path, "two/train.py", imports + "\n")
    one, two = (str(tmp_path / name) for name in ("one", "two"))
    load_task_class("utask_one:Digits", one)
    said = (
        f"{two}/utask_helpers.py would not be used: a module 'utask_helpers' was imported before, "
        f"from {one}/utask_helpers.py"
    )
    for load, entry in ((load_task_class, "utask_two:Digits"), (load_train_function, "train.py")):
        with pytest.raises(SpecError) as caught:
            load(entry, two)
        assert said in str(caught.value)
    assert load_task_class("utask_one:Digits", one)


def test_a_module_of_an_earlier_jobs_package_is_not_imported_instead(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        write(tmp_path, f"{folder}/utask_shared/sizes.py", "SIZE = 3\n")
        task = GOOD + "from .sizes import SIZE\n"
        write(tmp_path, f"{folder}/utask_shared/task_{folder}.py", task)
    load_task_class("utask_shared.task_one:Digits", str(tmp_path / "one"))
    with pytest.raises(SpecError, match=r"two/utask_shared/sizes.py would not be used"):
        load_task_class("utask_shared.task_two:Digits", str(tmp_path / "two"))


class _Garbage:
    """Lets another thread run when it is collected, which may be while a tree is built."""

    def __init__(self) -> None:
        self.me = self

    def __del__(self) -> None:
        time.sleep(0)


def test_imports_are_looked_at_in_several_threads(tmp_path: Path) -> None:
    """Ranks of tests are threads; CPython counts something of `ast` once for all of them."""
    nested = "x = " + "[" * 30 + "1" + "]" * 30 + "\n"
    for folder in ("one", "."):  # else no file is looked into
        write(tmp_path, f"{folder}/utask_helpers.py", GOOD)
    load_task_class("utask_helpers:Digits", str(tmp_path / "one"))
    write(tmp_path, "utask.py", GOOD + nested * 100)
    failed: list[BaseException] = []

    def load() -> None:
        try:
            for _ in range(10):
                _Garbage()
                load_task_class("utask:Digits", str(tmp_path))
        except BaseException as error:
            failed.append(error)

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
    assert not failed and not any(thread.is_alive() for thread in threads)


def test_where_nothing_else_is_here_no_file_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder may have a large library, each of whose files takes milliseconds."""
    read: list[str] = []

    def imported(name: str, path: Path) -> set[str]:
        read.append(name)
        return set()

    monkeypatch.setattr(task_loading, "_names_imported", imported)
    write(tmp_path, "utask_helpers.py", "SIZE = 3\n")
    write(tmp_path, "string/__init__.py", "")
    write(tmp_path, "utask.py", GOOD + "from utask_helpers import SIZE\n")
    for _ in range(2):  # the second time its imports are here, from the same folder
        assert load_task_class("utask:Digits", str(tmp_path))
    assert not read
    write(tmp_path, "torch.py", "")
    load_task_class("utask:Digits", str(tmp_path))
    assert read == ["utask"]


def test_a_task_imports_the_distplat_and_the_main_module_that_run_it(tmp_path: Path) -> None:
    """Beside a task there may be a checkout of ours."""
    for name in ("distplat/__init__.py", "__main__.py"):
        write(tmp_path, name, "raise AssertionError('it was imported')\n")
    write(tmp_path, "utask.py", GOOD + "import __main__\n")
    assert issubclass(load_task_class("utask:Digits", str(tmp_path)), Task)


def test_what_ray_has_shipped_of_the_folder_is_the_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker beside the driver has both; a file with strategies imports what was shipped."""
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


def test_what_a_folder_has_and_the_task_does_not_import_is_no_matter(tmp_path: Path) -> None:
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


def test_a_module_that_was_compiled_beside_its_source_is_the_folders(tmp_path: Path) -> None:
    """Python takes `utask.*.so` before `utask.py`."""
    write(tmp_path, "utask.py", GOOD)
    found = load_task_class("utask:Digits", str(tmp_path))
    write(tmp_path, compiled := f"utask{EXTENSION_SUFFIXES[0]}", "")
    sys.modules["utask"].__file__ = str(tmp_path / compiled)
    assert load_task_class("utask:Digits", str(tmp_path)) is found


def test_a_module_may_put_an_object_in_its_place(tmp_path: Path) -> None:
    swap = "import sys\nsys.modules[__name__] = type('Names', (), {'Digits': Digits})()\n"
    write(tmp_path, "utask_swapped.py", GOOD + swap)
    assert issubclass(load_task_class("utask_swapped:Digits", str(tmp_path)), Task)
    with pytest.raises(SpecError, match=r"Names.* has no class 'Letters'"):
        load_task_class("utask_swapped:Letters", str(tmp_path))


def test_a_class_in_a_package_is_found(tmp_path: Path) -> None:
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
def test_what_is_not_there(entry: str, message: str, hint: str, tmp_path: Path) -> None:
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
def test_what_the_users_module_raises_passes_through(
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
    """What a worker makes of the error of a call of ours."""
    try:
        call(*args)
    except Exception as error:
        # This function's own frame comes first; a worker's would be ours and left out.
        assert error.__traceback__ is not None
        return as_user_error(error.with_traceback(error.__traceback__.tb_next), 2, 7)
    raise AssertionError("nothing was raised")


def files(error: UserCodeError) -> list[str]:
    """Names of the files of the traceback's frames, in order."""
    lines = [line for line in error.traceback.splitlines() if line.startswith('  File "')]
    return [Path(line.split('"')[1]).name for line in lines]


def test_a_traceback_starts_at_the_users_frame(tmp_path: Path) -> None:
    write(tmp_path, "utask.py", RAISES)
    task = load_task_class("utask:Digits", str(tmp_path))()
    error = caught(prepare, JOB, task)
    assert files(error) == ["utask.py", "utask.py"]
    assert "raise ValueError" in error.traceback
    assert (error.rank, error.step, error.summary) == (2, 7, "ValueError: no layers today")


def test_an_error_at_import_starts_at_the_users_frame(tmp_path: Path) -> None:
    write(tmp_path, "utask.py", "import utask_helper\n")
    write(tmp_path, "utask_helper.py", "raise RuntimeError('not today')\n")
    error = caught(load_task_class, "utask:Digits", str(tmp_path))
    names = [name for name in files(error) if not name.startswith("<frozen")]
    assert names == ["utask.py", "utask_helper.py"]
    assert files(error)[0] == "utask.py"


def test_an_error_that_we_raise_has_no_frames_of_ours(tmp_path: Path) -> None:
    write(tmp_path, "utask.py", RAISES.replace("return build()", "return 3"))
    task = load_task_class("utask:Digits", str(tmp_path))()
    error = caught(prepare, JOB, task)
    assert (
        error.summary == "ValueError: utask.py:5: model() must return a torch.nn.Module, got an int"
    )
    assert error.traceback == error.summary + "\n"


class _Mute(RuntimeError):
    def __str__(self) -> str:
        raise KeyError("no text")


class _Odd(SyntaxError):
    @property
    def text(self) -> str:  # type: ignore[override]
        raise KeyError("no line")


@pytest.mark.parametrize("kind", [_Mute, _Odd])
def test_an_exception_that_raises_when_it_is_shown_is_told(kind: type[Exception]) -> None:
    """Else the training thread would end without a word, and the run wait for its deadline."""
    error = kind("gloo")
    found = as_user_error(error, 1, 3)
    assert (found.rank, found.step) == (1, 3)
    assert kind.__name__ in str(found)
    assert killed_loader(error) is None
    assert lost_peer(error) is None


def test_the_middle_of_a_long_message_is_left_out() -> None:
    """A message may have a whole batch in it: terminal and `result.json` would have it twice."""
    found = as_user_error(ValueError("begin " + "x" * 1_000_000 + " end"), 1, 3)
    assert len(found.summary) < 3_000 and len(found.traceback) < 60_000
    for shown in (found.summary, found.traceback.rstrip()):
        assert "ValueError: begin x" in shown and shown.endswith("x end")
        assert "characters ...]" in shown
    short = as_user_error(ValueError("y" * 1_500), 1, 3)
    assert short.summary == "ValueError: " + "y" * 1_500
    without_frames = as_user_error(ValueError("z" * 10_000), 1, 3)
    assert without_frames.frames == "", "it is shown once"


def test_a_chain_of_causes_is_kept(tmp_path: Path) -> None:
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
        ("another", "", "folder"),  # of the same machine, or disks are shared: `test_spawn.py`
        ("another", "gcs://_ray_pkg_1.zip", "here"),
    ],
)
def test_on_another_node_the_code_is_what_was_shipped(
    node: str, shipped: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder of the same path may be there, last week's or somebody else's."""
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
def test_a_full_dev_shm_is_named_with_its_size(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
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
def test_what_a_ddp_script_asks_for_is_told_what_stands_for_it(
    line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    remedy = caught(exec, "import os, torch\n" + line).remedy
    assert "distplat.get_context()" in remedy and "distplat.prepare" in remedy


def invalid_device() -> None:
    raise RuntimeError("CUDA error: invalid device ordinal")


def part_of_a_vector() -> None:
    """As the parameters of a model that is prepared are."""
    model = torch.nn.Linear(2, 1)
    whole = torch.zeros(4)
    model.weight.data, model.bias.data = whole[:2].view(1, 2), whole[2:3]
    save_model(model, "nowhere")


@pytest.mark.parametrize(
    ("fail", "remedy"),
    [
        (invalid_device, "distplat.get_context().device"),
        (part_of_a_vector, "safe_serialization=False"),
    ],
)
def test_what_is_otherwise_under_torchrun_has_its_remedy(
    fail: Callable[[], None], remedy: str
) -> None:
    assert remedy in caught(fail).remedy


def outside_of_a_run() -> str:
    with pytest.raises(SpecError) as refused:
        api.get_context()
    return str(refused.value)


SPAWN = "in place of `mp.spawn"
OF_GROUP = 'File "/opt/torch/distributed/rendezvous.py", line 1, in f\nOSError: address in use'


@pytest.mark.parametrize(
    ("inner", "own_loop", "remedy"),
    [
        (lambda: "KeyError: 'LOCAL_RANK'", True, SPAWN),
        (lambda: OF_GROUP, True, SPAWN),
        (outside_of_a_run, True, SPAWN),
        (lambda: "RuntimeError: CUDA out of memory", True, "a smaller `batch_size`"),
        (lambda: "RuntimeError: CUDA out of memory", False, "raise `gradient_accumulation`"),
        (lambda: "KeyError: 'LOCAL_RANK'", False, "torch.distributed has no group"),
        (lambda: "ValueError: a file is damaged", True, ""),
    ],
)
def test_an_error_in_a_spawned_process_has_the_remedy_of_what_it_did(
    inner: Callable[[], str], own_loop: bool, remedy: str
) -> None:
    text = f"\n\n-- Process 0 terminated with the following error:\n{inner()}\n"
    error = as_user_error(ProcessRaisedException(text, 0, 7), 0, 3, own_loop=own_loop)
    assert remedy in error.remedy and bool(error.remedy) is bool(remedy)


def test_a_worker_has_no_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["default_worker.py", "--node-ip-address=10.0.0.7"])
    with pytest.raises(SystemExit) as ended:
        ArgumentParser().parse_args()
    assert "`task_args`" in as_user_error(ended.value, 0, None).remedy


class Broken:
    """A data set of which some samples cannot be read."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> torch.Tensor:
        if index == 17:
            raise ValueError("line 1\nline 2")
        return torch.ones(1 + index // 32)


def error_of(ids: list[int], *, in_loader: bool) -> Exception:
    """Give what the reading of some samples raises; of a loader process, as torch hands it on."""
    data: Any = Broken()
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
    ("ids", "said"),
    [
        ([4, 17, 9], "(sample 17 of the data set)"),
        ([*range(10), 40], "(samples 0, 1, 2, 3, 4, 5, 6, 7, ... of the data set)"),
    ],
)
def test_the_samples_are_named_that_could_not_be_read_or_put_together(
    ids: list[int], said: str, in_loader: bool
) -> None:
    told = as_user_error(error_of(ids, in_loader=in_loader), 0, 3)
    assert told.text.splitlines()[-1 if "hint" not in told.text else -2].endswith(said)
    assert told.traceback.endswith(f"{said}\n") and told.traceback.count(" of the data set") == 1


def test_a_frame_that_nobody_wrote_is_left_out() -> None:
    """`dataclass` makes constructors of text."""

    @dataclass
    class Sized:
        size: int

        def __post_init__(self) -> None:
            raise ValueError("no size")

    try:
        Sized(0)
    except ValueError as error:
        assert "<string>" not in as_user_error(error, 0, None).traceback
