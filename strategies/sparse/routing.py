"""Assignment of rows to servers, and the order of ids in a request."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from distplat.platform.shard_map import TablePlan, TableSpec
from distplat.strategies.algorithms.seeds import GOLDEN, mix


@dataclass(frozen=True)
class Routed:
    """Unique ids in the order of the servers that store them."""

    ids: NDArray[np.int64]
    """Shape [n]."""
    cuts: tuple[int, ...]
    """Server k stores the ids from `cuts[k]` to `cuts[k + 1]`."""

    def part(self, server: int) -> slice:
        """Return the slice of a server's ids."""
        return slice(self.cuts[server], self.cuts[server + 1])


def server_of(plan: TablePlan, table: TableSpec, ids: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the server of each id, shape [n]; a pure function, so no directory is needed."""
    servers = plan.servers
    if plan.job.embeddings is not None and plan.job.embeddings.partition == "range":
        assert table.rows is not None, "checked by `Lookups`"
        return np.minimum(ids // -(-table.rows // servers), servers - 1)
    # High bits, because a server's row index uses the low bits.
    high = mix(ids.astype(np.uint64) + GOLDEN) >> np.uint64(33)
    return (high % np.uint64(servers)).astype(np.int64)


def route(
    plan: TablePlan, table: TableSpec, ids: NDArray[np.int64]
) -> tuple[Routed, NDArray[np.int64] | None]:
    """
    Sort ids by their servers.

    Args:
        plan: number of servers and partition.
        table: of the ids.
        ids: shape [n], unique.

    Returns:
        The sorted ids, and the index of each in `ids`; None: the order is unchanged.
    """
    if plan.servers == 1:
        return Routed(ids, (0, len(ids))), None
    servers = server_of(plan, table, ids)
    order = np.argsort(servers.astype(np.uint16), kind="stable")
    counts = np.bincount(servers, minlength=plan.servers)
    cuts = (0, *np.cumsum(counts).tolist())
    return Routed(ids[order], cuts), order
