"""Merging of replies from several servers, for clients of shards and of embedding tables."""

import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np

from distplat.platform.ledger import ServerReply
from distplat.platform.load import ShardLoad
from distplat.strategies.checkpoint.parts import vector_spec_of, vector_specs_of
from distplat.strategies.loop.control import StepControl
from distplat.strategies.model.optimizer_state import USED
from distplat.strategies.ports import Pushed, ShardCopy, TablesCopy
from distplat.strategies.server.server import ShardServer
from distplat.strategies.server.table_store import TableServer

LOOK_S = 1.0
"""How long one request waits for ranks that are behind."""

Copy = TypeVar("Copy", ShardCopy, TablesCopy)


def merge_push_replies(
    replies: Sequence[ServerReply], traffic: Sequence[tuple[int, int]]
) -> Pushed:
    """
    Merge the replies of all shards to a push or a commit.

    Args:
        replies: by shard.
        traffic: by shard, bytes of gradients received and of parameters sent.
    """
    squares = [reply.squared_norm for reply in replies if reply.squared_norm is not None]
    norm = sum(squares) ** 0.5
    return Pushed(
        None if all(reply.committed for reply in replies) else norm,
        norm if squares else None,
        staleness=max(reply.staleness for reply in replies),
        waiting_s=max(reply.waiting_s for reply in replies),
        loads=tuple(
            ShardLoad(*sizes, reply.apply_s, reply.queue_s, reply.queue_depth)
            for reply, sizes in zip(replies, traffic, strict=True)
        ),
        version=min(reply.version for reply in replies),
        dropped=max(reply.dropped for reply in replies),
        total=StepControl.unpack(np.array(replies[0].total)) if replies[0].total else None,
    )


def shard_copy(start: int, server: ShardServer, version: int, limit_s: float) -> ShardCopy:
    """Return a shard's checkpoint copies of a version; `ref` holds the tensors themselves."""
    steps, copies = server.take_copies(version, limit_s)
    if copies is None:
        return ShardCopy(steps, start)
    state = {name: value for name, value in copies.items() if name}
    specs, used = vector_specs_of(state)
    tensors = [copies[""], *(value for name, value in state.items() if name != USED)]
    specs = [vector_spec_of("model", tensors[0]), *specs]
    return ShardCopy(steps, start, tuple(specs), tensors, used)


def tables_copy(server: TableServer, version: int, limit_s: float) -> TablesCopy:
    """Return an embedding server's checkpoint copies of a version; `ref` holds the arrays."""
    steps, bundle = server.take_copies(version, limit_s)
    if bundle is None:
        return TablesCopy(steps)
    arrays, entries = bundle
    return TablesCopy(steps, entries, arrays)


def fetch_copies(
    requests: Sequence[Callable[[float], Copy]], version: int, patience_s: float
) -> list[Copy] | None:
    """
    Fetch the checkpoint copies of a version from all servers.

    Args:
        requests: by server; the argument is how many seconds to wait for ranks that are behind.
        version: steps.
        patience_s: longest time without progress of any rank.

    Returns:
        The copies; None if a server no longer has them, or no rank makes progress.
    """
    copies = []
    for request in requests:
        last_steps, deadline = -1, time.monotonic() + patience_s
        while (copy := request(min(LOOK_S, patience_s))).ref is None:
            if copy.steps >= version or time.monotonic() > deadline:
                return None
            if copy.steps > last_steps:
                last_steps, deadline = copy.steps, time.monotonic() + patience_s
        copies.append(copy)
    return copies
