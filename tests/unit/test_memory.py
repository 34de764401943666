"""Anonymous shared memory: mapped by other processes, without leaks."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import astuple, replace
from pathlib import Path

import pytest
import torch
from forked_python import ForkedPython

from distplat.actors.collectives.header import header
from distplat.actors.collectives.shm.p2p import _P2PChannel
from distplat.actors.collectives.shm.segment import GroupSegment, SegmentLayout, SharedVectors
from distplat.actors.memory.memfd import MemorySegment
from distplat.actors.messages import MemoryAddress

pytestmark = pytest.mark.usefixtures("loader_server")

OWNER = """
import sys
from distplat.actors.memory.memfd import MemorySegment
segment = MemorySegment.create("node", 5, "float32")
segment.tensor[:] = 3.0
print(*[segment.address.pid, segment.address.fd], flush=True)
for line in sys.stdin:
    if line.strip() == "seal":
        segment.seal()
    print(*segment.tensor.tolist(), flush=True)
"""

MAPPER = """
import sys
from distplat.actors.memory.memfd import MemorySegment
from distplat.actors.messages import MemoryAddress
node, pid, fd, elements, dtype, inode = sys.argv[1:]
address = MemoryAddress(node, int(pid), int(fd), int(elements), dtype, int(inode))
segment = MemorySegment.open(address)
print(*segment.tensor.tolist())
segment.tensor.add_(1)
"""


@contextmanager
def owner() -> Iterator[tuple[ForkedPython, MemoryAddress]]:
    """Run a process that owns a segment and prints it for each line of input."""
    process = ForkedPython(OWNER)
    try:
        pid, fd = map(int, process.stdout.readline().split())
        yield process, MemoryAddress("node", pid, fd, 5, "float32")
    finally:
        process.end()


def send_line(process: ForkedPython, line: str) -> list[float]:
    process.stdin.write(line + "\n")
    process.stdin.flush()
    return [float(word) for word in process.stdout.readline().split()]


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16", "int64"])
@pytest.mark.parametrize("elements", [0, 1, 5, 5000])
def test_new_segment_is_zero(elements: int, dtype: str) -> None:
    segment = MemorySegment.create("node", elements, dtype)
    address = segment.address
    assert (address.node, address.pid, address.elements) == ("node", os.getpid(), elements)
    expected = torch.zeros(elements, dtype=getattr(torch, dtype))
    assert segment.tensor.dtype == expected.dtype and torch.equal(segment.tensor, expected)


def test_other_process_maps_the_segment() -> None:
    segment = MemorySegment.create("node", 3, "float32")
    segment.tensor[:] = torch.tensor([1.0, 2.0, 3.0])
    arguments = [str(part) for part in astuple(segment.address)]
    process = ForkedPython(MAPPER, *arguments)
    assert process.stdout.readline().split() == ["1.0", "2.0", "3.0"]
    process.wait()
    assert segment.tensor.tolist() == [2.0, 3.0, 4.0]


def test_both_processes_write() -> None:
    with owner() as (process, address):
        segment = MemorySegment.open(address)
        assert segment.tensor.tolist() == [3.0] * 5
        segment.tensor[1] = 9.0
        assert send_line(process, "show") == [3.0, 9.0, 3.0, 3.0, 3.0]


def test_sealed_segment_rejects_new_mappings_only() -> None:
    with owner() as (process, address):
        segment = MemorySegment.open(address)
        send_line(process, "seal")
        with pytest.raises(OSError):
            MemorySegment.open(address)
        segment.tensor[0] = 5.0
        assert send_line(process, "show")[0] == 5.0


def test_mapping_survives_the_owner_and_new_mappings_fail() -> None:
    with owner() as (process, address):
        segment = MemorySegment.open(address)
    assert not process.is_alive()
    assert segment.tensor.tolist() == [3.0] * 5
    segment.tensor.fill_(1.0)
    with pytest.raises(OSError):
        MemorySegment.open(address)


def test_invalid_descriptor_raises() -> None:
    address = MemorySegment.create("node", 3, "float32").address
    with pytest.raises(OSError):
        MemorySegment.open(replace(address, fd=99_999))


def test_descriptor_of_another_file_raises() -> None:
    address = MemorySegment.create("node", 3, "float32").address
    with open(__file__, "rb") as other, pytest.raises(FileNotFoundError):
        MemorySegment.open(replace(address, fd=other.fileno()))


def test_reused_descriptor_of_other_memory_raises() -> None:
    old = MemorySegment.create("node", 3, "float32")
    old.seal()
    new = MemorySegment.create("node", 3, "float32")
    assert new.address.fd == old.address.fd, "the kernel reuses the lowest free descriptor"
    assert new.address != old.address
    with pytest.raises(FileNotFoundError, match="the segment no longer exists"):
        MemorySegment.open(old.address)


def test_pages_may_be_allocated_on_demand() -> None:
    segment = MemorySegment.create("node", 100_000, "float32", populate=False)
    segment.tensor[5] = 3.0
    assert MemorySegment.open(segment.address, populate=False).tensor[:7].tolist() == [0] * 5 + [
        3.0,
        0,
    ]


def test_open_leaks_no_descriptor() -> None:
    segment = MemorySegment.create("node", 3, "float32")
    memory = os.stat(segment.address.fd).st_ino

    def open_descriptors() -> int:
        """Count the descriptors of this memory; others may close meanwhile."""
        count = 0
        for number in os.listdir("/proc/self/fd"):
            with suppress(OSError):
                count += os.stat(int(number)).st_ino == memory
        return count

    before = open_descriptors()
    opened = [MemorySegment.open(segment.address) for _ in range(10)]
    # Python's mmap keeps a duplicate of each descriptor; `open` closes its own.
    assert open_descriptors() - before == len(opened)
    del opened
    assert open_descriptors() == before


def test_tensor_keeps_the_memory() -> None:
    tensor = MemorySegment.create("node", 4, "float32").tensor
    assert tensor.add_(2.0).tolist() == [2.0] * 4


def test_seal_is_idempotent() -> None:
    segment = MemorySegment.create("node", 3, "float32")
    segment.seal()
    segment.seal()
    assert segment.tensor.tolist() == [0.0] * 3


def test_segment_has_no_file_in_dev_shm() -> None:
    before = set(Path("/dev/shm").iterdir())
    segment = MemorySegment.create("node", 100_000, "float32")
    segment.tensor.fill_(1.0)
    created = {p for p in set(Path("/dev/shm").iterdir()) - before if "distplat" in p.name}
    assert not created
    assert os.readlink(f"/proc/self/fd/{segment.address.fd}") == "/memfd:distplat (deleted)"


def test_reused_descriptor_with_another_inode_is_refused() -> None:
    """Addresses that a group publishes in vectors and channels include the inode."""
    layout = SegmentLayout.of(2)
    group = GroupSegment.create("node", layout)
    part = MemorySegment.create("node", 8, "uint8")
    group.enter()
    group.publish_vector(part.address)
    offer, _ = group.read_vectors()
    assert offer == (os.getpid(), part.address.fd, part.address.inode)
    SharedVectors().add(part, [offer, offer])
    segment = MemorySegment.create("node", 8, "uint8")  # stands for the segment of another rank
    other_address = segment.address
    SharedVectors().add(part, [offer, (other_address.pid, other_address.fd, other_address.inode)])
    with pytest.raises(OSError, match="another file has its descriptor"):
        SharedVectors().add(
            part, [offer, (other_address.pid, other_address.fd, other_address.inode + 1)]
        )
    channel = _P2PChannel(group, 0, 1)
    message_header = header("send", [part.tensor], number=3)
    channel.announce(message_header, part)
    address, sent_header = channel.read_announcement(3)
    assert address == (part.address.fd, 8, part.address.inode)
    assert sent_header == message_header._replace(number=3)
