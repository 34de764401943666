"""The private APIs of torch that collective groups use exist and work as expected."""

import inspect
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed
from rank_threads import on_ranks

from distplat.strategies import torch_compat
from distplat.strategies.collective import ReduceOp

dist: Any = torch.distributed
OPERATION_S = 10.0


def on_gloo_ranks(
    world: int, body: Callable[[Any, int], None], operation_s: float = OPERATION_S
) -> None:
    """Call `body(process group, rank)` on every rank of a gloo group with a store in memory."""
    store, groups = dist.HashStore(), {}

    def run(rank: int) -> None:
        groups[rank] = torch_compat.gloo_group(store, "test", rank, world, operation_s, "127.0.0.1")
        body(groups[rank], rank)

    on_ranks(world, run)


@pytest.mark.parametrize("op", [op for op in ReduceOp if op is not ReduceOp.AVG])
def test_all_reduce_and_reduce(op: ReduceOp) -> None:
    expected = {"sum": 5.0, "min": 2.0, "max": 3.0, "product": 6.0}[op]

    def body(group: Any, rank: int) -> None:
        tensor = torch.full((5,), 2.0 + rank)
        torch_compat.all_reduce(group, tensor, op).wait()
        assert tensor.eq(expected).all()
        tensor = torch.full((5,), 2.0 + rank)
        torch_compat.reduce(group, tensor, op, 1).wait()
        assert rank == 0 or tensor.eq(expected).all()

    on_gloo_ranks(2, body)


def test_broadcast_gather_and_barrier() -> None:
    def body(group: Any, rank: int) -> None:
        tensor = torch.full((3,), float(rank))
        torch_compat.broadcast(group, tensor, 1).wait()
        assert tensor.eq(1).all()
        table = torch.empty(2 * 3, dtype=torch.int64)
        torch_compat.all_gather_even(group, table, torch.arange(3) + 10 * rank).wait()
        assert table.tolist() == [0, 1, 2, 10, 11, 12]
        outputs = [torch.empty(3) for _ in range(2)]
        torch_compat.all_gather(group, outputs, torch.full((3,), float(rank))).wait()
        assert [output.tolist() for output in outputs] == [[0.0] * 3, [1.0] * 3]
        group.barrier().wait()

    on_gloo_ranks(2, body)


def test_reduce_scatter() -> None:
    def body(group: Any, rank: int) -> None:
        output = torch.empty(2)
        inputs = [torch.full((2,), float(rank + to)) for to in range(2)]
        torch_compat.reduce_scatter(group, output, inputs, ReduceOp.SUM).wait()
        assert output.tolist() == [1.0 + 2 * rank] * 2

    on_gloo_ranks(2, body)


def test_when_done_calls_back() -> None:
    def body(group: Any, rank: int) -> None:
        done = threading.Event()
        work = torch_compat.all_reduce(group, torch.ones(3), ReduceOp.SUM)
        torch_compat.when_done(work, done.set)
        work.wait()
        assert done.wait(OPERATION_S)

    on_gloo_ranks(2, body)


def test_operation_has_a_deadline() -> None:
    def body(group: Any, rank: int) -> None:
        if rank == 0:
            started = time.monotonic()
            with pytest.raises(RuntimeError):
                torch_compat.all_reduce(group, torch.ones(3), ReduceOp.SUM).wait()
            assert 0.2 < time.monotonic() - started < 5.0

    on_gloo_ranks(2, body, 0.3)


def test_expired_operation_breaks_all_connections() -> None:
    """`TorchGroup` relies on this to end the waits of both sides."""
    issued = threading.Event()

    def body(group: Any, rank: int) -> None:
        if rank == 0:
            assert issued.wait(OPERATION_S)
            with pytest.raises(RuntimeError):
                group.recv([torch.empty(1)], 1, 77).wait(timedelta(milliseconds=1))
        else:
            started = time.monotonic()
            work = torch_compat.all_reduce(group, torch.ones(3), ReduceOp.SUM)
            issued.set()
            with pytest.raises(RuntimeError):
                work.wait()
            assert time.monotonic() - started < OPERATION_S / 2

    on_gloo_ranks(2, body)


def test_available_backends() -> None:
    assert torch_compat.gloo_available()
    assert torch_compat.nccl_available() == (dist.is_nccl_available() and torch.cuda.is_available())


@pytest.mark.skipif(not dist.is_nccl_available(), reason="torch was built without NCCL")
def test_nccl_private_names_exist() -> None:
    assert callable(dist.ProcessGroupNCCL.abort) and callable(dist.ProcessGroupNCCL.shutdown)
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timedelta(seconds=1)
    assert options._timeout == timedelta(seconds=1)


def test_other_collective_modules_use_no_process_groups() -> None:
    """These tests do not cover private names outside of `torch_compat`."""
    from distplat.actors.collectives import hierarchical, torch_group, torch_store

    for module in (hierarchical, torch_group, torch_store):
        source = inspect.getsource(module)
        assert "ProcessGroup" not in source.split('"""', 2)[2].replace("`ProcessGroupGloo.", "")
        assert "torch.distributed" not in source.split('"""', 2)[2]
