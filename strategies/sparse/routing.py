"""Which server keeps a row, and the order in which a worker asks for rows."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from distplat.platform.shard_map import TablePlan, TableSpec
from distplat.strategies.algorithms.seeds import GOLDEN, mix


@dataclass(frozen=True)
class Routed:
    """Ids in the order of the servers that keep them, each once."""

    ids: NDArray[np.int64]
    """Shape [n]."""
    cuts: tuple[int, ...]
    """Server k has those from `cuts[k]` to `cuts[k + 1]`."""

    def part(self, server: int) -> slice:
        """Give the slice of one server's ids."""
        return slice(self.cuts[server], self.cuts[server + 1])


def server_of(plan: TablePlan, table: TableSpec, ids: NDArray[np.int64]) -> NDArray[np.int64]:
    """Give the server of each id, shape [n]; a pure function, so nobody keeps a directory."""
    servers = plan.servers
    if plan.job.embeddings is not None and plan.job.embeddings.partition == "range":
        assert table.rows is not None, "checked when the model was looked at"
        return np.minimum(ids // -(-table.rows // servers), servers - 1)
    # High bits: the row index of a server goes by the low ones.
    high = mix(ids.astype(np.uint64) + GOLDEN) >> np.uint64(33)
    return (high % np.uint64(servers)).astype(np.int64)


def route(
    plan: TablePlan, table: TableSpec, ids: NDArray[np.int64]
) -> tuple[Routed, NDArray[np.int64] | None]:
    """
    Bring ids into the order of their servers.

    Args:
        plan: number of servers and partition count.
        table: whose ids they are.
        ids: shape [n], each once.

    Returns:
        The ids, and where in `ids` each of them stood; None: they are in order as they came.
    """
    if plan.servers == 1:
        return Routed(ids, (0, len(ids))), None
    servers = server_of(plan, table, ids)
    order = np.argsort(servers.astype(np.uint16), kind="stable")
    counts = np.bincount(servers, minlength=plan.servers)
    cuts = (0, *np.cumsum(counts).tolist())
    return Routed(ids[order], cuts), order
