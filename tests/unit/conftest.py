"""Unit tests start no processes of Ray and keep to one core."""

import gc
import logging
import os
import random
import threading
from collections.abc import Iterator
from multiprocessing import forkserver
from typing import Any

import local_run
import marks
import numpy as np
import pytest
import signal_defaults
import torch
from hypothesis import HealthCheck, settings

from distplat.strategies.loop.loaders import LoaderContext

signal_defaults.reset()
os.environ.pop("FORCE_COLOR", None)  # many a CI sets it: tests read what is printed
torch.set_num_threads(1)
# A busy machine makes an example slow, and drawing it.
_PATIENT: dict[str, Any] = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("the same examples", derandomize=True, **_PATIENT)
settings.register_profile("new examples", **_PATIENT)  # `make test-all`: --hypothesis-profile
settings.load_profile("the same examples")

_MANY = 400
"""Descriptors; by default a process may have 1024."""
_left = 0
"""Of them, after the last look: what is held for long is not looked for after each test."""


@pytest.hookimpl(tryfirst=True)  # before `-m` is looked at
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Know which cases of long sweeps `make test` has."""
    marks.mark_sweeps(items)


def pytest_collection_finish() -> None:
    """Have collections look at what tests make alone: what is imported never goes."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def seeded() -> None:
    """What a test draws depends on no test before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def few_descriptors() -> Iterator[None]:
    """Have runs in memory go when there are many: each mapping holds one."""
    global _left
    yield
    if len(os.listdir("/proc/self/fd")) > _left + _MANY:
        gc.collect()
        _left = len(os.listdir("/proc/self/fd"))


@pytest.fixture
def caplog(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """Keep out what threads say that an earlier test has left."""
    me = threading.current_thread()
    earlier = [thread for thread in threading.enumerate() if thread is not me]

    def is_own(record: logging.LogRecord) -> bool:
        return all(record.thread != one.ident for one in earlier if one.is_alive())

    caplog.handler.addFilter(is_own)
    yield caplog
    caplog.handler.removeFilter(is_own)  # the handler is that of all tests


@pytest.fixture(scope="session")
def loader_server() -> None:
    """Fork loader processes from a server that has imported what test modules do, not each anew."""
    LoaderContext().set_forkserver_preload(["torch.utils.data", "pytest", "local_run"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.path.dirname(local_run.__file__))  # it is not told sys.path
        forkserver.ensure_running()
