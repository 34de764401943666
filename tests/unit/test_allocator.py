"""The allocator keeps freed memory: later steps cause no page faults. Runs in a subprocess."""

import os
import subprocess
import sys

import pytest

BLOCKS = """
import ctypes, resource, sys, threading
from distplat.actors.process_setup import keep_freed_memory

def faults_of_step(libc):
    before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
    blocks = [libc.malloc(4 << 20) for _ in range(24)]
    for block in blocks:
        ctypes.memset(block, 1, 4 << 20)
    for block in reversed(blocks):
        libc.free(block)
    return resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before

def work():
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    is_set = keep_freed_memory() if sys.argv[1] == "keep" else False
    counts = [faults_of_step(libc) for _ in range(4)]
    print(is_set, counts[-1])

thread = threading.Thread(target=work)  # as in a worker: not the main thread
thread.start()
thread.join()
"""


def faults(mode: str, **environment: str) -> tuple[bool, int]:
    """Return whether the allocator was configured, and the page faults of the fourth step."""
    command = [sys.executable, "-c", BLOCKS, mode]
    env = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")} | environment
    out = subprocess.run(command, env=env, capture_output=True, text=True, timeout=100, check=True)
    is_set, count = out.stdout.split()
    return is_set == "True", int(count)


def test_reuses_freed_memory() -> None:
    is_set, count = faults("keep")
    if not is_set:
        pytest.skip("not glibc")
    assert count < 100, "the fourth step touches new pages"
    assert faults("leave")[1] > 10 * max(count, 100), "no new pages with the default settings"


def test_keeps_settings_of_the_environment() -> None:
    assert faults("keep", MALLOC_TRIM_THRESHOLD_="1000000")[0] is False
