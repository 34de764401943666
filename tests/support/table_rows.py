"""The rows of an embedding table on in-memory servers."""

import numpy as np
from local_servers import TableServers
from numpy.typing import NDArray


def table_rows(group: TableServers, number: int, count: int) -> NDArray[np.float32]:
    """Return a table, shape [count, width]; missing rows are NaN."""
    width = group.table_servers[0].sizes()[number][0].width
    rows = np.full((count, width), np.nan, np.float32)
    for service in group.table_servers:
        table = service.store.tables[number]
        table.read(table.ids(), out := np.empty((len(table), width), np.float32))
        rows[table.ids()] = out
    return rows
