"""TableServing: rows in shared memory for workers on its node, in arrays for remote workers."""

import os
from dataclasses import replace

import numpy as np
import pytest
from table_plans import plan

from distplat.actors.local_transport import LocalCluster
from distplat.actors.memory.memfd import MemorySegment
from distplat.actors.messages import MemoryAddress, RowTransfer, TablePart
from distplat.actors.servers.table_serving import TableServing
from distplat.platform.errors import FencedError, StaleError
from distplat.platform.ledger import PullId, PushId

IDS = np.array([3, 5, 8])


def make_server() -> TableServing:
    return TableServing(TablePart("embedding-server-0", 0), LocalCluster().transport("here"))


def segments(node: str = "here") -> tuple[MemorySegment, MemorySegment]:
    return MemorySegment.create(node, 64, "int64"), MemorySegment.create(node, 256, "float32")


def test_memory_is_shared_with_workers_on_the_same_node() -> None:
    server = make_server()
    ids, _ = segments()
    assert server.open(plan(), 0, ids.address).shares_memory
    assert not server.open(plan(), 1, segments("elsewhere")[0].address).shares_memory
    closed = MemoryAddress("here", os.getpid(), 999_999, 64, "int64")
    assert not server.open(plan(), 1, closed).shares_memory


@pytest.mark.parametrize("local", [True, False])
def test_push_and_pull_exchange_gradients_and_rows(local: bool) -> None:
    server, (ids, values) = make_server(), segments()
    server.open(plan(world=1), 0, ids.address)
    ids.tensor.numpy()[2:5] = IDS
    gradients = np.arange(12, dtype=np.float32).reshape(3, 4)
    values.tensor.numpy()[10:22] = gradients.reshape(-1)
    transfer = RowTransfer(0, 3, ids.address, values.address, 2, 10)
    assert server.push(
        PushId("run", 0, 0, 0), [transfer if local else RowTransfer(0, 3, IDS, gradients)]
    )
    pull = PullId(0, 0, 0)
    rows = server.pull(pull, transfer if local else RowTransfer(0, 3, IDS, None))
    if local:
        assert rows is None
        rows = values.tensor.numpy()[10:22].reshape(3, 4).copy()
    assert rows is not None and np.array_equal(rows, -gradients)
    assert server.sizes()[0][1] == 3


def test_repeated_pull_does_not_write_shared_memory() -> None:
    server, (ids, values) = make_server(), segments()
    server.open(plan(world=1), 0, ids.address)
    local, remote = RowTransfer(0, 3, ids.address, values.address), RowTransfer(0, 3, IDS, None)
    server.pull(PullId(0, 0, 0), local)
    values.tensor.fill_(7.0)
    server.pull(PullId(0, 0, 0), local)
    assert (values.tensor == 7).all()
    server.pull(PullId(0, 0, 1), remote)
    repeated = server.pull(PullId(0, 0, 1), remote)
    assert repeated is not None and (repeated == 0).all()
    with pytest.raises(StaleError):
        server.pull(PullId(0, 0, 0), local)


def test_pull_switches_to_a_larger_segment() -> None:
    server, (ids, values) = make_server(), segments()
    server.open(plan(world=1), 0, ids.address)
    server.pull(PullId(0, 0, 0), RowTransfer(0, 3, ids.address, values.address))
    larger = MemorySegment.create("here", 1024, "float32")
    larger.tensor.fill_(7.0)
    server.pull(PullId(0, 0, 1), RowTransfer(0, 3, ids.address, larger.address, 0, 1000))
    assert (larger.tensor[1000:1012] == 0).all()
    assert (larger.tensor[:1000] == 7).all()


def test_fenced_push_caches_no_segment() -> None:
    """The kernel reuses descriptor numbers: the address of a new segment may equal the old one."""
    server, (ids, values) = make_server(), segments()
    server.open(plan(world=1), 0, ids.address)
    old, old_ids = RowTransfer(0, 3, ids.address, values.address), ids.address
    # A worker of the next attempt opens first.
    server.open(plan(1, world=1), 1, segments()[0].address)
    with pytest.raises(FencedError):
        server.push(PushId("run", 0, 0, 0), [old])
    for segment in (ids, values):
        segment.seal()
    ids, values = segments()
    assert replace(ids.address, inode=0) == replace(old_ids, inode=0), (
        "the kernel assigns the lowest free descriptor"
    )
    server.open(plan(1, world=1), 0, ids.address)
    ids.tensor.numpy()[:3] = IDS
    values.tensor.fill_(1.0)
    server.push(PushId("run", 1, 0, 0), [RowTransfer(0, 3, ids.address, values.address)])
    rows = server.pull(PullId(1, 0, 0), RowTransfer(0, 3, IDS, None))
    assert rows is not None and (rows == -1.0).all()


def test_push_with_a_wrong_shape_is_rejected_before_it_counts() -> None:
    server, (ids, _) = make_server(), segments()
    server.open(plan(world=1), 0, ids.address)
    with pytest.raises(ValueError, match=r"gradients have shape \(3, 5\), not \(3, 4\)"):
        server.push(PushId("run", 0, 0, 0), [RowTransfer(0, 3, IDS, np.zeros((3, 5), np.float32))])
    valid = RowTransfer(0, 3, IDS, np.ones((3, 4), np.float32))
    assert server.push(PushId("run", 0, 0, 0), [valid]) == 1
