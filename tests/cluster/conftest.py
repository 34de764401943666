"""One local Ray for many modules, and a census after every test: nothing of a run may be left."""

import gc
import os
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import ray
import signal_defaults
import torch
from ray.experimental.internal_kv import _internal_kv_list

GONE_WITHIN_S = 30.0
MOST_S = 240
"""A process of Ray is there in three seconds, on a busy machine in thirty; some tests start ten."""
MARK = "TESTED_BY"
"""Variable of the environment of all that tests start: `<pid>:<module>`, or `<pid>:local_ray`."""
LOCAL_RAY = f"{os.getpid()}:local_ray"

torch.set_num_threads(1)  # as in a worker: what a test computes beside a run has the run's bits

signal_defaults.reset()

# Actors import the helpers beside the tests; a raylet hands its environment on to them.
_HERE = Path(__file__).parent
os.environ["PYTHONPATH"] = os.pathsep.join([str(_HERE), str(_HERE.parent / "support")])

# Ray gives an actor that is to be killed 5 s to die by itself; one that a test froze never does.
os.environ["RAY_kill_worker_timeout_milliseconds"] = "500"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """
    Put first the modules that share a Ray: one that has its own ends theirs.

    Of the others the longest comes first: else one process is alone with it at the end.
    """
    for item in items:
        if item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(MOST_S))
    items.sort(
        key=lambda one: (
            "local_ray" not in getattr(one, "fixturenames", ()),
            "test_jobs.py" not in one.nodeid,
        )
    )


@pytest.fixture(scope="module")
def local_ray(mark: None) -> None:
    """A local Ray with more CPUs than the machine has cores; modules in a row share it."""
    if ray.is_initialized():
        return
    module, os.environ[MARK] = os.environ[MARK], LOCAL_RAY
    os.environ["PYTHONHASHSEED"] = "0"  # as for a run's own Ray, so that workers start at once
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
    """Say whose the processes are that a module starts; no Ray of another one is beside them."""
    module = request.module.__name__
    os.environ[MARK] = f"{os.getpid()}:{module}"
    tests = [one for one in request.session.items if one.getparent(pytest.Module) is request.node]
    if not all("local_ray" in getattr(one, "fixturenames", ()) for one in tests):
        ray.shutdown()


@pytest.fixture(scope="session", autouse=True)
def no_ray_is_left() -> Iterator[None]:
    """The last module's Ray ends with the session."""
    yield
    ray.shutdown()


def ours() -> list[psutil.Process]:
    """This process, those that come from it, and orphans that this module's tests have started."""
    me, marks = psutil.Process(), {os.environ.get(MARK, ""), LOCAL_RAY}
    mine = [me, *me.children(recursive=True)]
    for process in psutil.process_iter():
        try:
            if process.ppid() == 1 and process.environ().get(MARK) in marks:
                mine += [process, *process.children(recursive=True)]
        except psutil.Error:  # it has ended meanwhile, or is somebody else's
            continue
    return mine


def segments() -> set[str]:
    """Processes of ours that still map one of our memory segments; other runs' are their affair."""
    found = set()
    for process in ours():
        try:
            maps = Path(f"/proc/{process.pid}/maps").read_text()
            name = process.name()
        except (OSError, psutil.Error):  # it has ended meanwhile
            continue
        if "memfd:distplat" in maps:
            found.add(f"{process.pid} {name}")
    return found


def orphans() -> set[str]:
    """Processes that ours have started by themselves, for loading, and that outlived them."""
    found = set()
    for process in ours():
        try:
            if process.ppid() == 1 and "multiprocessing" in " ".join(process.cmdline()):
                found.add(f"{process.pid} {process.cmdline()}")
        except psutil.Error:  # it has ended meanwhile
            continue
    return found


def files(before: set[str]) -> set[str]:
    """What has come into /dev/shm since; what a process that is not ours maps is that one's."""
    found = {name for name in os.listdir("/dev/shm") if not name.startswith("plasma")} - before
    if not found:
        return found
    mine = {process.pid for process in ours()}
    for pid in set(psutil.pids()) - mine:
        with suppress(OSError):
            maps = Path(f"/proc/{pid}/maps").read_text()
            found = {name for name in found if f"/dev/shm/{name}" not in maps}
    return found


def leftovers(shm_before: set[str]) -> dict[str, object]:
    """What is still there of the runs of this test."""
    actors = ray.util.list_named_actors(all_namespaces=True) if ray.is_initialized() else []
    keys = _internal_kv_list(b"distplat/") if ray.is_initialized() else []
    found = {
        "actors": actors,
        "segments": segments(),
        "orphans": orphans(),
        "shm": files(shm_before),
        "keys": keys,
    }
    return {kind: things for kind, things in found.items() if things}


@pytest.fixture(autouse=True)
def census() -> Iterator[None]:
    """No actor, segment, loader process, file in /dev/shm or key of ours outlives a test."""
    before = set(os.listdir("/dev/shm"))
    yield
    deadline = time.monotonic() + GONE_WITHIN_S
    while left := leftovers(before):
        if time.monotonic() > deadline:
            ray.shutdown()  # the next module begins with another one
            pytest.fail(f"left behind: {left}")
        time.sleep(0.2)
        gc.collect()  # what is left of servers that were threads of this process
