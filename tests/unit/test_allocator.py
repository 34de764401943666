"""Memory that a step frees is there for the next one: no page faults. In a process of its own."""

import os
import subprocess
import sys

import pytest

BLOCKS = """
import ctypes, resource, sys, threading
from distplat.actors.process_setup import keep_freed_memory

def faults_of_a_step(libc):
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
    kept = keep_freed_memory() if sys.argv[1] == "keep" else False
    counts = [faults_of_a_step(libc) for _ in range(4)]
    print(kept, counts[-1])

thread = threading.Thread(target=work)  # as in a worker: not the main thread
thread.start()
thread.join()
"""


def faults(what: str, **environment: str) -> tuple[bool, int]:
    command = [sys.executable, "-c", BLOCKS, what]
    env = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")} | environment
    out = subprocess.run(command, env=env, capture_output=True, text=True, timeout=100, check=True)
    kept, count = out.stdout.split()
    return kept == "True", int(count)


def test_freed_memory_is_used_again() -> None:
    kept, count = faults("keep")
    if not kept:
        pytest.skip("not glibc")
    assert count < 100, "the fourth step touches no new page"
    assert faults("leave")[1] > 10 * max(count, 100), "which it does without"


def test_users_own_settings_are_left_alone() -> None:
    assert faults("keep", MALLOC_TRIM_THRESHOLD_="1000000")[0] is False
