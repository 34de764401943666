"""Unit tests start no processes of Ray and keep to one core."""

import gc
import os
from collections.abc import Iterator

import pytest
import signal_defaults
import torch
from hypothesis import settings

signal_defaults.reset()
torch.set_num_threads(1)
settings.register_profile("any machine", deadline=None)  # a busy one makes an example slow
settings.load_profile("any machine")

_MANY = 600
"""Descriptors; by default a process may have 1024."""


@pytest.fixture(autouse=True)
def few_descriptors() -> Iterator[None]:
    """Have runs in memory go when there are many: each mapping holds one."""
    yield
    if len(os.listdir("/proc/self/fd")) > _MANY:
        gc.collect()
