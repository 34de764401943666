"""What the servers of a table in memory have, put together."""

import numpy as np
from local_servers import TableServers
from numpy.typing import NDArray


def table_rows(group: TableServers, number: int, count: int) -> NDArray[np.float32]:
    """Return a table, shape [count, width]; missing rows are NaN."""
    width = group.table_servers[0].sizes()[number][0].width
    found = np.full((count, width), np.nan, np.float32)
    for service in group.table_servers:
        kept = service.store.tables[number]
        kept.read(kept.ids(), out := np.empty((len(kept), width), np.float32))
        found[kept.ids()] = out
    return found
