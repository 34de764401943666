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
    answers: Sequence[ServerReply], traffic: Sequence[tuple[int, int]]
) -> Pushed:
    """
    Merge the replies of all shards to a push or a commit.

    Args:
        answers: by shard.
        traffic: by shard, bytes of gradients received and of parameters sent.
    """
    squares = [answer.squared_norm for answer in answers if answer.squared_norm is not None]
    norm = sum(squares) ** 0.5
    return Pushed(
        None if all(answer.committed for answer in answers) else norm,
        norm if squares else None,
        staleness=max(answer.staleness for answer in answers),
        waiting_s=max(answer.waiting_s for answer in answers),
        loads=tuple(
            ShardLoad(*sizes, answer.apply_s, answer.queue_s, answer.queue_depth)
            for answer, sizes in zip(answers, traffic, strict=True)
        ),
        version=min(answer.version for answer in answers),
        dropped=max(answer.dropped for answer in answers),
        total=StepControl.unpack(np.array(answers[0].total)) if answers[0].total else None,
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
