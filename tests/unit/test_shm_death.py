"""A rank whose process is killed or frozen is named, by ranks that only share memory with it."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from distplat.actors.shm.arena import Arena, Layout
from distplat.actors.shm.end import End
from distplat.platform.errors import CollectiveError
from distplat.strategies.collective import ReduceOp, Traffic

PEER = """
import sys, threading, time
import torch
from distplat.actors.messages import Address
from distplat.actors.shm.arena import Arena, Layout
from distplat.actors.shm.end import End
from distplat.strategies.collective import ReduceOp, Traffic
layout = Layout.of(2)
address = Address("", int(sys.argv[1]), int(sys.argv[2]), layout.size, "uint8")
end = End("death", Arena.open(address, layout, 1), 60.0, threading.Event(), Traffic())
end.enter()
while end.absent():
    time.sleep(0.001)
end.begin()
for _ in range(3):
    end.all_reduce(torch.ones(1000), ReduceOp.SUM)
time.sleep(60)
"""
LIMIT_S = 1.5


@contextmanager
def group_of_two() -> Iterator[tuple[End, "subprocess.Popen[bytes]"]]:
    """Rank 0 here, rank 1 in another process; three operations are behind them."""
    arena = Arena.create("", Layout.of(2))
    where = arena.segment.address
    end = End("death", arena, LIMIT_S, threading.Event(), Traffic())
    end.enter()
    command = [sys.executable, "-c", PEER, str(where.pid), str(where.fd)]
    with subprocess.Popen(command) as process:
        try:
            deadline = time.monotonic() + 60
            while end.absent():
                assert time.monotonic() < deadline
                time.sleep(0.01)
            end.begin()
            for _ in range(3):
                tensor = torch.ones(1000)
                end.all_reduce(tensor, ReduceOp.SUM)
                assert tensor.eq(2).all()
            yield end, process
        finally:
            process.kill()
            end.close()


def held_processes() -> int:
    """Descriptors of processes that this one has open."""
    links = [entry.path for entry in os.scandir("/proc/self/fd")]
    return sum("pidfd" in os.readlink(link) for link in links if os.path.islink(link))


def test_a_killed_peer_is_found_long_before_the_deadline() -> None:
    before = held_processes()
    with group_of_two() as (end, process):
        threading.Timer(0.2, process.kill).start()
        assert held_processes() == before + 1
        began = time.monotonic()
        with pytest.raises(CollectiveError) as caught:
            end.all_reduce(torch.ones(1000), ReduceOp.SUM)
        assert time.monotonic() - began < 0.2 + 0.5
        assert (caught.value.missing, caught.value.number) == ((1,), 3)
        assert "its process died" in caught.value.cause
    assert held_processes() == before


def test_a_peer_that_died_before_is_found_too() -> None:
    with group_of_two() as (end, process):
        process.kill()
        process.wait(5.0)
        with pytest.raises(CollectiveError, match="its process died"):
            end.recv(torch.ones(5), 1)


def test_a_frozen_peer_is_named_after_the_deadline() -> None:
    with group_of_two() as (end, process):
        process.send_signal(signal.SIGSTOP)
        began = time.monotonic()
        with pytest.raises(CollectiveError) as caught:
            end.all_reduce(torch.ones(1000), ReduceOp.SUM)
        assert LIMIT_S <= time.monotonic() - began < LIMIT_S + 0.5
        assert (caught.value.missing, caught.value.cause) == ((1,), "deadline 1.5 s")
