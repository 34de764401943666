"""Futex words in shared memory, between threads and between processes."""

import mmap
import os
import subprocess
import sys
import threading
import time

import pytest

from distplat.actors.memory.futex import Word, reached, supported

pytestmark = pytest.mark.skipif(not supported(), reason="needs Linux futexes")

ECHO = """
import mmap, sys
from distplat.actors.memory.futex import Word
memory = memoryview(mmap.mmap(int(sys.argv[1]), 4096))
request, reply = Word(memory, 0), Word(memory, 128)
for turn in range(1, 101):
    for _ in range(100):
        if request.wait(turn, 0.1):
            break
    memory[256] = memory[512]
    reply.post()
"""


@pytest.fixture
def memory() -> memoryview:
    return memoryview(mmap.mmap(-1, 4096))


def set_value(memory: memoryview, value: int) -> None:
    memory[:4].cast("I")[0] = value


@pytest.mark.parametrize(
    ("value", "target", "expected"),
    [
        (0, 0, True),
        (0, 1, False),
        (5, 3, True),
        (2**32 - 1, 2**32 - 1, True),
        (2**32 - 1, 0, False),
        (0, 2**32 - 1, True),
        (3, 2**32 - 5, True),
    ],
)
def test_reached_with_wraparound(value: int, target: int, expected: bool) -> None:
    assert reached(value, target) is expected


def test_post_increments_and_wraps(memory: memoryview) -> None:
    word = Word(memory, 0)
    word.post()
    word.post()
    assert word.value == 2
    set_value(memory, 2**32 - 1)
    word.post()
    assert word.value == 0
    assert bytes(memory[4:]) == bytes(4092)  # the other words are unchanged


def test_wait_returns_at_once_if_reached(memory: memoryview) -> None:
    word = Word(memory, 0)
    word.post()
    start = time.monotonic()
    assert word.wait(1, 60.0)
    assert time.monotonic() - start < 30.0


def test_wait_times_out(memory: memoryview) -> None:
    start = time.monotonic()
    assert not Word(memory, 0).wait(1, 0.2)
    assert time.monotonic() - start > 0.15


def test_post_wakes_all_waiters(memory: memoryview) -> None:
    word = Word(memory, 4)
    woken: list[bool] = []
    threads = [
        threading.Thread(target=lambda: woken.append(word.wait(1, 60.0)), daemon=True)
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    time.sleep(0.1)
    assert not woken
    word.post()
    for thread in threads:
        thread.join(30.0)
    assert woken == [True] * 3


def test_wake_without_a_post_ends_the_wait(memory: memoryview) -> None:
    word = Word(memory, 0)
    woken: list[bool] = []
    thread = threading.Thread(target=lambda: woken.append(word.wait(1, 60.0)), daemon=True)
    thread.start()
    deadline = time.monotonic() + 30.0
    while not woken and time.monotonic() < deadline:  # a wake before the wait has no effect
        time.sleep(0.01)
        word.wake()
    assert woken == [False]
    thread.join(60)


def test_other_threads_run_during_a_wait(memory: memoryview) -> None:
    word = Word(memory, 0)
    thread = threading.Thread(target=word.wait, args=(1, 60.0), daemon=True)
    thread.start()
    start = time.monotonic()
    for _ in range(10):
        time.sleep(0.01)
    assert time.monotonic() - start < 30.0
    word.post()
    thread.join(60)


def test_post_and_wait_between_processes() -> None:
    descriptor = os.memfd_create("test")
    os.ftruncate(descriptor, 4096)
    memory = memoryview(mmap.mmap(descriptor, 4096))
    request, reply = Word(memory, 0), Word(memory, 128)
    command = [sys.executable, "-c", ECHO, str(descriptor)]
    with subprocess.Popen(command, pass_fds=[descriptor]) as process:
        try:
            for turn in range(1, 101):
                memory[512] = turn
                request.post()
                assert any(reply.wait(turn, 0.1) for _ in range(200))
                assert memory[256] == turn
        finally:
            process.kill()
    os.close(descriptor)
