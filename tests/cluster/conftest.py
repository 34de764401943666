"""One local Ray for many modules, and a leak check after every test."""

import gc
import os
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import marks
import psutil
import pytest
import ray
import signal_defaults
import torch
from ray.experimental.internal_kv import _internal_kv_list

CLEANUP_TIMEOUT_S = 30.0
TIMEOUT_S = 240
"""A process of Ray starts in 3 s, on a busy machine in 30 s; some tests start ten processes."""
LONGEST = "test_jobs", "test_hierarchical", "test_submit"
"""Modules with their own Ray, the longest first."""
MARK = "TESTED_BY"
"""Environment variable of the tests' child processes: `<pid>:<module>`, or `<pid>:local_ray`."""
LOCAL_RAY = f"{os.getpid()}:local_ray"

torch.set_num_threads(1)  # as in a worker: references computed by a test are bit-identical

signal_defaults.reset()

# Actors import the helper modules; they inherit the environment of the raylet.
_HERE = Path(__file__).parent
os.environ["PYTHONPATH"] = os.pathsep.join([str(_HERE), str(_HERE.parent / "support")])

# Ray waits 5 s for the exit of a killed actor; an actor that a test has frozen does not exit.
os.environ["RAY_kill_worker_timeout_milliseconds"] = "500"


@pytest.hookimpl(tryfirst=True)  # before `-m` is evaluated
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """
    Run the modules that share a Ray first: a module with its own Ray ends the shared one.

    The longest of the others run next, so that one process is not left with them at the end.
    """
    marks.mark_sweeps(items)
    for item in items:
        if item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(TIMEOUT_S))
    items.sort(
        key=lambda item: (
            "local_ray" not in getattr(item, "fixturenames", ()),
            *(f"{name}.py" not in item.nodeid for name in LONGEST),
        )
    )


@pytest.fixture(scope="module")
def local_ray(mark: None) -> None:
    """Start a local Ray with more CPUs than the machine has cores; consecutive modules share it."""
    if ray.is_initialized():
        return
    module, os.environ[MARK] = os.environ[MARK], LOCAL_RAY
    os.environ["PYTHONHASHSEED"] = "0"  # as for a private Ray, so that workers start at once
    ray.init(
        address="local",
        include_dashboard=False,
        num_cpus=8,
        object_store_memory=200 * 2**20,
        logging_level="warning",
    )
    os.environ[MARK] = module


@pytest.fixture(scope="module", autouse=True)
def mark(request: pytest.FixtureRequest) -> None:
    """Mark the processes that a module starts; end the shared Ray if the module has its own."""
    module = request.module.__name__
    os.environ[MARK] = f"{os.getpid()}:{module}"
    tests = [
        test for test in request.session.items if test.getparent(pytest.Module) is request.node
    ]
    if not all("local_ray" in getattr(test, "fixturenames", ()) for test in tests):
        ray.shutdown()


@pytest.fixture(scope="session", autouse=True)
def shut_down_ray() -> Iterator[None]:
    """End the last module's Ray with the session."""
    yield
    ray.shutdown()


def own_processes() -> list[psutil.Process]:
    """Return this process, its descendants, and orphans that this module's tests have started."""
    me, marks = psutil.Process(), {os.environ.get(MARK, ""), LOCAL_RAY}
    own = [me, *me.children(recursive=True)]
    for process in psutil.process_iter():
        try:
            if process.ppid() == 1 and process.environ().get(MARK) in marks:
                own += [process, *process.children(recursive=True)]
        except psutil.Error:  # it has ended, or belongs to another user
            continue
    return own


def mapped_segments() -> set[str]:
    """Return the tests' processes that still map a memory segment of distplat."""
    found = set()
    for process in own_processes():
        try:
            maps = Path(f"/proc/{process.pid}/maps").read_text()
            name = process.name()
        except (OSError, psutil.Error):  # it has ended
            continue
        if "memfd:distplat" in maps:
            found.add(f"{process.pid} {name}")
    return found


def orphaned_loaders() -> set[str]:
    """Return loader processes that have outlived their workers."""
    found = set()
    for process in own_processes():
        try:
            if process.ppid() == 1 and "multiprocessing" in " ".join(process.cmdline()):
                found.add(f"{process.pid} {process.cmdline()}")
        except psutil.Error:  # it has ended
            continue
    return found


def new_shm_files(before: set[str]) -> set[str]:
    """Return new files in /dev/shm, except those mapped by processes of other programs."""
    found = {name for name in os.listdir("/dev/shm") if not name.startswith("plasma")} - before
    if not found:
        return found
    own = {process.pid for process in own_processes()}
    for pid in set(psutil.pids()) - own:
        with suppress(OSError):
            maps = Path(f"/proc/{pid}/maps").read_text()
            found = {name for name in found if f"/dev/shm/{name}" not in maps}
    return found


def leftovers(shm_before: set[str]) -> dict[str, object]:
    """Return the remaining actors, segments, processes, files and keys of this test's runs."""
    actors = ray.util.list_named_actors(all_namespaces=True) if ray.is_initialized() else []
    keys = _internal_kv_list(b"distplat/") if ray.is_initialized() else []
    found = {
        "actors": actors,
        "segments": mapped_segments(),
        "orphans": orphaned_loaders(),
        "shm": new_shm_files(shm_before),
        "keys": keys,
    }
    return {resource: left for resource, left in found.items() if left}


@pytest.fixture(autouse=True)
def leak_check() -> Iterator[None]:
    """Fail if an actor, segment, loader process, file in /dev/shm or key outlives a test."""
    before = set(os.listdir("/dev/shm"))
    yield
    deadline = time.monotonic() + CLEANUP_TIMEOUT_S
    while left := leftovers(before):
        if time.monotonic() > deadline:
            ray.shutdown()  # the next module starts a new one
            pytest.fail(f"left behind: {left}")
        time.sleep(0.2)
        gc.collect()  # servers of this process free their memory
