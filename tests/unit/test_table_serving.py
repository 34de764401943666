"""A server of tables and the roads to it: shared memory on its node, arrays from elsewhere."""

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


def serving() -> TableServing:
    return TableServing(TablePart("embedding-server-0", 0), LocalCluster().transport("here"))


def segments(node: str = "here") -> tuple[MemorySegment, MemorySegment]:
    return MemorySegment.create(node, 64, "int64"), MemorySegment.create(node, 256, "float32")


def test_who_is_near() -> None:
    server = serving()
    ids, _ = segments()
    assert server.open(plan(), 0, ids.address).shares_memory
    assert not server.open(plan(), 1, segments("elsewhere")[0].address).shares_memory
    gone = MemoryAddress("here", os.getpid(), 999_999, 64, "int64")
    assert not server.open(plan(), 1, gone).shares_memory


@pytest.mark.parametrize("near", [True, False])
def test_rows_go_there_and_gradients_come_back(near: bool) -> None:
    server, (ids, values) = serving(), segments()
    server.open(plan(world=1), 0, ids.address)
    ids.tensor.numpy()[2:5] = IDS
    gradients = np.arange(12, dtype=np.float32).reshape(3, 4)
    values.tensor.numpy()[10:22] = gradients.reshape(-1)
    there = RowTransfer(0, 3, ids.address, values.address, 2, 10)
    assert server.push(
        PushId("run", 0, 0, 0), [there if near else RowTransfer(0, 3, IDS, gradients)]
    )
    pull = PullId(0, 0, 0)
    rows = server.pull(pull, there if near else RowTransfer(0, 3, IDS, None))
    if near:
        assert rows is None
        rows = values.tensor.numpy()[10:22].reshape(3, 4).copy()
    assert rows is not None and np.array_equal(rows, -gradients)
    assert server.sizes()[0][1] == 3


def test_a_lost_answer_is_given_again_without_touching_memory_in_use() -> None:
    server, (ids, values) = serving(), segments()
    server.open(plan(world=1), 0, ids.address)
    near, far = RowTransfer(0, 3, ids.address, values.address), RowTransfer(0, 3, IDS, None)
    server.pull(PullId(0, 0, 0), near)
    values.tensor.fill_(7.0)
    server.pull(PullId(0, 0, 0), near)
    assert (values.tensor == 7).all()
    server.pull(PullId(0, 0, 1), far)
    again = server.pull(PullId(0, 0, 1), far)
    assert again is not None and (again == 0).all()
    with pytest.raises(StaleError):
        server.pull(PullId(0, 0, 0), near)


def test_larger_memory_takes_the_place_of_the_old() -> None:
    server, (ids, values) = serving(), segments()
    server.open(plan(world=1), 0, ids.address)
    server.pull(PullId(0, 0, 0), RowTransfer(0, 3, ids.address, values.address))
    larger = MemorySegment.create("here", 1024, "float32")
    larger.tensor.fill_(7.0)
    server.pull(PullId(0, 0, 1), RowTransfer(0, 3, ids.address, larger.address, 0, 1000))
    assert (larger.tensor[1000:1012] == 0).all()
    assert (larger.tensor[:1000] == 7).all()


def test_a_late_push_leaves_no_old_memory_behind() -> None:
    """The number of a descriptor is used again: process and descriptor may be those of the old."""
    server, (ids, values) = serving(), segments()
    server.open(plan(world=1), 0, ids.address)
    old, old_ids = RowTransfer(0, 3, ids.address, values.address), ids.address
    server.open(plan(1, world=1), 1, segments()[0].address)  # another worker is quicker
    with pytest.raises(FencedError):
        server.push(PushId("run", 0, 0, 0), [old])
    for segment in (ids, values):
        segment.seal()
    ids, values = segments()
    assert replace(ids.address, inode=0) == replace(old_ids, inode=0), "the lowest that is free"
    server.open(plan(1, world=1), 0, ids.address)
    ids.tensor.numpy()[:3] = IDS
    values.tensor.fill_(1.0)
    server.push(PushId("run", 1, 0, 0), [RowTransfer(0, 3, ids.address, values.address)])
    rows = server.pull(PullId(1, 0, 0), RowTransfer(0, 3, IDS, None))
    assert rows is not None and (rows == -1.0).all()


def test_gradients_of_another_shape_are_refused_before_they_count() -> None:
    server, (ids, _) = serving(), segments()
    server.open(plan(world=1), 0, ids.address)
    with pytest.raises(ValueError, match=r"gradients have shape \(3, 5\), not \(3, 4\)"):
        server.push(PushId("run", 0, 0, 0), [RowTransfer(0, 3, IDS, np.zeros((3, 5), np.float32))])
    fine = RowTransfer(0, 3, IDS, np.ones((3, 4), np.float32))
    assert server.push(PushId("run", 0, 0, 0), [fine]) == 1
