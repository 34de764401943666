"""What the answers of servers come to, for clients of parameters and of tables."""

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
"""How long one question waits for the other ranks."""

Copy = TypeVar("Copy", ShardCopy, TablesCopy)


def merge_push_replies(
    answers: Sequence[ServerReply], traffic: Sequence[tuple[int, int]]
) -> Pushed:
    """
    Put together what all shards answered to a push, or to a commit.

    Args:
        answers: by shard.
        traffic: by shard, bytes of gradients that it read and of parameters that it gave.
    """
    squares = [one.squared_norm for one in answers if one.squared_norm is not None]
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
    """Give what a shard has kept of a version; its `ref` is the tensors themselves."""
    steps, kept = server.take_copies(version, limit_s)
    if kept is None:
        return ShardCopy(steps, start)
    state = {name: value for name, value in kept.items() if name}
    kinds, used = vector_specs_of(state)
    tensors = [kept[""], *(value for name, value in state.items() if name != USED)]
    kinds = [vector_spec_of("model", tensors[0]), *kinds]
    return ShardCopy(steps, start, tuple(kinds), tensors, used)


def tables_copy(server: TableServer, version: int, limit_s: float) -> TablesCopy:
    """Give what an embedding server has kept of a version; its `ref` is the arrays themselves."""
    steps, bundle = server.take_copies(version, limit_s)
    if bundle is None:
        return TablesCopy(steps)
    arrays, entries = bundle
    return TablesCopy(steps, entries, arrays)


def fetch_copies(
    asks: Sequence[Callable[[float], Copy]], version: int, patience_s: float
) -> list[Copy] | None:
    """
    Fetch what all servers have kept of a version.

    Args:
        asks: by server; waits for ranks that are behind, at most so many seconds.
        version: steps.
        patience_s: how long no rank may make a step.

    Returns:
        None: a shard has its copies no more, or nobody moves.
    """
    copies = []
    for ask in asks:
        before, until = -1, time.monotonic() + patience_s
        while (copy := ask(min(LOOK_S, patience_s))).ref is None:
            if copy.steps >= version or time.monotonic() > until:
                return None
            if copy.steps > before:
                before, until = copy.steps, time.monotonic() + patience_s
        copies.append(copy)
    return copies
