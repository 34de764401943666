"""Fixtures of the unit tests: no Ray processes, one thread of torch, seeded generators."""

import gc
import logging
import os
import threading
from collections.abc import Iterator
from multiprocessing import forkserver
from typing import Any

import local_run
import marks
import pytest
import signal_defaults
import torch
from hypothesis import HealthCheck, settings

from distplat.strategies.loop.loaders import LoaderContext
from distplat.strategies.loop.seeding import seed_all

signal_defaults.reset()
os.environ.pop("FORCE_COLOR", None)  # some CI systems set it, and tests compare printed text
torch.set_num_threads(1)
# On a loaded machine an example and its generation may be slow.
_PATIENT: dict[str, Any] = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("the same examples", derandomize=True, max_examples=50, **_PATIENT)
settings.register_profile("new examples", **_PATIENT)  # `make test-all`: --hypothesis-profile
settings.load_profile("the same examples")

_MANY = 400
"""File descriptors; the default limit of a process is 1024."""
_remaining = 0
"""Descriptors still open after the last collection."""


@pytest.hookimpl(tryfirst=True)  # before `-m` deselects items
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the cases of long sweeps that `make test` runs."""
    marks.mark_sweeps(items)


def pytest_collection_finish() -> None:
    """Exclude imported objects, which live until exit, from garbage collections."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Seed all generators before each test."""
    seed_all(0)


@pytest.fixture(autouse=True)
def few_descriptors() -> Iterator[None]:
    """Collect garbage if many descriptors are open: each mapping of a run in memory has one."""
    global _remaining
    yield
    if len(os.listdir("/proc/self/fd")) > _remaining + _MANY:
        gc.collect()
        _remaining = len(os.listdir("/proc/self/fd"))


@pytest.fixture
def caplog(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """Exclude records of threads of earlier tests."""
    current = threading.current_thread()
    earlier = {thread for thread in threading.enumerate() if thread is not current}

    def is_own(record: logging.LogRecord) -> bool:
        """Compare objects: a new thread may have the identifier of an ended one."""
        return threading.current_thread() not in earlier

    caplog.handler.addFilter(is_own)
    yield caplog
    caplog.handler.removeFilter(is_own)  # all tests share the handler


@pytest.fixture(scope="session")
def loader_server() -> None:
    """Fork loader processes from a server that has already imported the tests' modules."""
    LoaderContext().set_forkserver_preload(["torch.utils.data", "pytest", "local_run"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(
            "PYTHONPATH", os.path.dirname(local_run.__file__)
        )  # the server does not inherit sys.path
        forkserver.ensure_running()
