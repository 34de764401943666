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

_MANY = 400
"""Descriptors; by default a process may have 1024."""
_left = 0
"""Of them, after the last look: what is held for long is not looked for after each test."""


@pytest.fixture(autouse=True)
def few_descriptors() -> Iterator[None]:
    """Have runs in memory go when there are many: each mapping holds one."""
    global _left
    yield
    if len(os.listdir("/proc/self/fd")) > _left + _MANY:
        gc.collect()
        _left = len(os.listdir("/proc/self/fd"))
