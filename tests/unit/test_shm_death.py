"""Errors name a rank whose process was killed or frozen."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from forked_python import ForkedPython

from distplat.actors.collectives.rendezvous import GroupMember, GroupSettings
from distplat.actors.collectives.shm.segment import GroupSegment, SegmentLayout
from distplat.actors.collectives.shm.shm_group import ShmGroup
from distplat.platform.errors import CollectiveError

pytestmark = pytest.mark.usefixtures("loader_server")

PEER = """
import sys, time
import torch
from distplat.actors.collectives.rendezvous import GroupMember, GroupSettings
from distplat.actors.collectives.shm.shm_group import ShmGroup
from distplat.actors.collectives.shm.segment import GroupSegment, SegmentLayout
from distplat.actors.messages import MemoryAddress
layout = SegmentLayout.of(2)
address = MemoryAddress("", int(sys.argv[1]), int(sys.argv[2]), layout.size, "uint8")
segment = GroupSegment.open(address, layout, 1)
group = ShmGroup(GroupMember("death", 1, 2, GroupSettings(60.0, 60.0)), segment=segment)
for _ in range(3):
    group.all_reduce(torch.ones(1000))
time.sleep(60)
"""
LIMIT_S = 0.5


@contextmanager
def group_of_two() -> Iterator[tuple[ShmGroup, ForkedPython]]:
    """Yield rank 0, and the process of rank 1, after three operations."""
    segment = GroupSegment.create("", SegmentLayout.of(2))
    address = segment.segment.address
    process = ForkedPython(PEER, str(address.pid), str(address.fd))
    try:
        member = GroupMember("death", 0, 2, GroupSettings(60.0, 60.0))
        group = ShmGroup(member, segment=segment)
        try:
            for _ in range(3):
                tensor = torch.ones(1000)
                group.all_reduce(tensor)
                assert tensor.eq(2).all()
            yield group, process
        finally:
            process.kill()
            group.close()
    finally:
        process.end()


def open_pidfds() -> int:
    """Return the number of open process descriptors."""
    links = [entry.path for entry in os.scandir("/proc/self/fd")]
    return sum("pidfd" in os.readlink(link) for link in links if os.path.islink(link))


def test_killed_peer_is_detected_before_the_deadline() -> None:
    before = open_pidfds()
    with group_of_two() as (group, process):
        threading.Timer(0.2, process.kill).start()
        assert open_pidfds() == before + 1
        began = time.monotonic()
        with pytest.raises(CollectiveError) as caught:
            group.all_reduce(torch.ones(1000))
        assert time.monotonic() - began < 30.0
        assert (caught.value.missing, caught.value.number) == ((1,), 3)
        assert "its process died" in caught.value.cause
    assert open_pidfds() == before


def test_detects_peer_that_died_before_the_operation() -> None:
    with group_of_two() as (group, process):
        process.kill()
        process.wait()
        with pytest.raises(CollectiveError, match="its process died"):
            group.recv(torch.ones(5), 1)


def test_frozen_peer_is_named_after_the_deadline() -> None:
    with group_of_two() as (group, process):
        os.kill(process.pid, signal.SIGSTOP)
        group._liveness._settings = GroupSettings(LIMIT_S)
        began = time.monotonic()
        with pytest.raises(CollectiveError) as caught:
            group.all_reduce(torch.ones(1000))
        assert time.monotonic() - began >= LIMIT_S
        assert (caught.value.missing, caught.value.cause) == ((1,), "deadline 0.5 s")
