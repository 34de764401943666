"""
Every private name of torch that groups use; right for torch 2.11 to 2.13.

torch.distributed's public functions work on process groups of its own registry, and the first of
them is the process's world. A group with a store and a lifetime of its own needs the classes below
them. `tests/unit/test_collectives_compat.py` fails when one of the names is gone.
"""

import os
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch.distributed
from torch import Tensor

from distplat.strategies.collective import ReduceOp

dist: Any = torch.distributed  # torch's stubs leave out most of the process groups

_OPS = {
    ReduceOp.SUM: dist.ReduceOp.SUM,
    ReduceOp.PRODUCT: dist.ReduceOp.PRODUCT,
    ReduceOp.MIN: dist.ReduceOp.MIN,
    ReduceOp.MAX: dist.ReduceOp.MAX,
}

_ERROR_HANDLING = "TORCH_NCCL_ASYNC_ERROR_HANDLING"
"""Unless it is 0, torch ends the process when an operation of NCCL is late."""


def gloo_works() -> bool:
    """Whether this torch was built with gloo."""
    return bool(dist.is_gloo_available())


def nccl_works() -> bool:
    """Whether this torch was built with NCCL, and there is a GPU."""
    return bool(dist.is_nccl_available() and torch.cuda.is_available())


def serve_store(listener: int, host: str, port: int) -> Any:
    """Serve a store on a socket that listens already; the store ends with the object."""
    return dist.TCPStore(
        host, port, is_master=True, wait_for_workers=False, master_listen_fd=listener
    )


def connect_store(host: str, port: int, timeout_s: float, secret: str) -> Any:
    """
    Connect to a store; who does not know the secret, by which all keys begin, sees none of them.

    Raises:
        RuntimeError: nobody serves it in time.
    """
    timeout = timedelta(seconds=timeout_s)
    client = dist.TCPStore(host, port, is_master=False, timeout=timeout, wait_for_workers=False)
    return dist.PrefixStore(secret, client)


def gloo_group(
    store: Any, purpose: str, rank: int, world: int, operation_s: float, host: str
) -> Any:
    """
    Connect ranks by gloo.

    Args:
        store: of all of them.
        purpose: tells this group from others in the store.
        rank: place in the group.
        world: ranks in the group.
        operation_s: deadline of one operation.
        host: address to listen on.

    Raises:
        RuntimeError: gloo could not connect.
    """
    options = dist.ProcessGroupGloo._Options()
    options._timeout = timedelta(seconds=operation_s)
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=host)]
    return dist.ProcessGroupGloo(dist.PrefixStore(purpose, store), rank, world, options)


def nccl_group(store: Any, purpose: str, rank: int, world: int, operation_s: float) -> Any:
    """Connect ranks by NCCL; see `gloo_group`. Communicators are made by the first operations."""
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timedelta(seconds=operation_s)
    before = os.environ.get(_ERROR_HANDLING)
    os.environ[_ERROR_HANDLING] = "0"  # read by the constructor
    try:
        return dist.ProcessGroupNCCL(dist.PrefixStore(purpose, store), rank, world, options)
    finally:
        del os.environ[_ERROR_HANDLING]
        if before is not None:
            os.environ[_ERROR_HANDLING] = before


def all_reduce(group: Any, tensor: Tensor, op: ReduceOp) -> Any:
    """Begin an all-reduce in place; gives torch's `Work`, as all functions below."""
    options = dist.AllreduceOptions()
    options.reduceOp = _OPS[op]
    return group.allreduce([tensor], options)


def reduce(group: Any, tensor: Tensor, op: ReduceOp, root: int) -> Any:
    """Begin a reduce into the root's tensor."""
    options = dist.ReduceOptions()
    options.reduceOp, options.rootRank = _OPS[op], root
    return group.reduce([tensor], options)


def broadcast(group: Any, tensor: Tensor, root: int) -> Any:
    """Begin a broadcast."""
    options = dist.BroadcastOptions()
    options.rootRank = root
    return group.broadcast([tensor], options)


def all_gather_even(group: Any, table: Tensor, row: Tensor) -> Any:
    """Begin to gather vectors of one size, shape [n], into a table, shape [world * n]."""
    return group._allgather_base(table, row)


def all_gather(group: Any, outputs: Sequence[Tensor], tensor: Tensor) -> Any:
    """Begin to gather vectors, with NCCL of uneven sizes."""
    return group.allgather([list(outputs)], [tensor])


def reduce_scatter(group: Any, output: Tensor, inputs: Sequence[Tensor], op: ReduceOp) -> Any:
    """Begin to reduce everybody's r-th input into rank r's output, with NCCL of uneven sizes."""
    options = dist.ReduceScatterOptions()
    options.reduceOp = _OPS[op]
    return group.reduce_scatter([output], [list(inputs)], options)


def when_done(work: Any, callback: Any) -> None:
    """Have a function called, on torch's thread, when the operation of a `Work` is over."""
    work.get_future().add_done_callback(lambda future: callback())
