"""RemoteTables, a worker's client of embedding tables, with servers on its own and other nodes."""

import threading
from functools import partial
from typing import Any

import numpy as np
import pytest
from table_plans import job

from distplat.actors.local_transport import LocalCluster
from distplat.actors.messages import TablePart, WorkOrder
from distplat.actors.servers.node import ServerNode
from distplat.actors.servers.tables import RemoteTables
from distplat.platform.shard_map import TablePlan, TableSpec
from distplat.strategies.sparse.routing import Routed, route
from distplat.strategies.sparse.table import RowGradients

SPECS = (TableSpec("a", 1000, 3, 1.0), TableSpec("b", None, 5, 1.0))


def connect(nodes: list[str]) -> tuple[RemoteTables, TablePlan]:
    cluster = LocalCluster()
    parts = [TablePart(f"embedding-server-{k}", k) for k in range(len(nodes))]
    servers = [
        cluster.spawn(part.server, node, partial(ServerNode, part.server, tables=part))
        for part, node in zip(parts, nodes, strict=True)
    ]
    config = job(1, len(nodes))
    order = WorkOrder(
        config, "run", 0, 0, "", "", None, None, None, embedding_servers=tuple(servers)
    )
    tables = RemoteTables(cluster.transport("here", "worker-0"), order, 0, threading.Event())
    plan, _ = tables.connect(SPECS, 10)
    tables.begin(0)
    return tables, plan


def routed(plan: TablePlan, table: int, ids: Any) -> Routed:
    return route(plan, SPECS[table], np.asarray(ids, np.int64))[0]


@pytest.mark.parametrize("nodes", [["here"], ["here", "here"], ["here", "far"], ["far", "far"]])
def test_pull_and_push_match_a_dict_on_any_nodes(nodes: list[str]) -> None:
    tables, plan = connect(nodes)
    random = np.random.default_rng(0)
    model = [dict[int, Any](), dict[int, Any]()]
    for step in range(4):
        count = 10 * 40**step  # the shared memory must grow
        gradients_of = []
        for table, spec in enumerate(SPECS):
            ids = routed(plan, table, random.permutation(min(count, 1000)))
            rows = tables.pull(table, ids, keep=True)
            for place, row in zip(ids.ids.tolist(), rows, strict=True):
                assert np.array_equal(model[table].setdefault(place, row.copy()), row)
            slope = random.standard_normal((len(ids.ids), spec.width)).astype(np.float32)
            gradients_of.append((ids, RowGradients(table, ids.ids, slope)))
        tables.push(step, gradients_of).wait()
        for table, (ids, gradients) in enumerate(gradients_of):
            for place, slope in zip(ids.ids.tolist(), gradients.values, strict=True):
                model[table][place] = model[table][place] - slope
    for table in range(2):
        all_ids = routed(plan, table, list(model[table]))
        rows = tables.pull(table, all_ids, keep=False)
        assert np.array_equal(rows, [model[table][i] for i in all_ids.ids.tolist()])


def test_kept_rows_are_valid_until_the_push() -> None:
    tables, plan = connect(["here"])
    first = tables.pull(0, routed(plan, 0, [1, 2, 3]), keep=True)
    temporary = tables.pull(0, routed(plan, 0, [4, 5, 6]), keep=False)
    copies = first.copy(), temporary.copy()
    tables.pull(0, routed(plan, 0, [7, 8, 9]), keep=True)
    tables.pull(1, routed(plan, 1, np.arange(50_000)), keep=True)  # grows the memory
    assert np.array_equal(first, copies[0])
    assert not np.array_equal(temporary, copies[1])


def test_push_reaches_servers_without_ids() -> None:
    tables, plan = connect(["here", "here", "here"])
    assert tables.pull(0, routed(plan, 0, []), keep=True).shape == (0, 3)
    rows = tables.pull(0, routed(plan, 0, [5]), keep=True)
    assert rows.shape == (1, 3)
    tables.push(0, []).wait()  # all servers count the step, also without gradients
    table_servers = [server.body.serving.server for server in tables._calls.servers]
    assert [table_server.store.ledger.updates for table_server in table_servers] == [1, 1, 1]


@pytest.mark.parametrize("ids", [[5], []], ids=str)
def test_all_servers_count_updates_of_used_tables(ids: list[int]) -> None:
    tables, plan = connect(["here", "far", "here"])
    table_servers = [server.body.serving.server for server in tables._calls.servers]
    used = routed(plan, 1, ids)
    gradients = [(used, RowGradients(1, used.ids, np.ones((len(ids), 5), np.float32)))]
    for step, skip in enumerate((False, True, False)):
        tables.push(step, gradients, None, skip).wait()
    assert [
        [table.updates for table in table_server.store.tables] for table_server in table_servers
    ] == [[0, 2]] * 3
    first = np.empty((len(ids), 5), np.float32)
    connect(["here"])[0]._calls.servers[0].body.serving.server.store.tables[1].read(used.ids, first)
    assert np.array_equal(tables.pull(1, used, keep=False), first - 2)
