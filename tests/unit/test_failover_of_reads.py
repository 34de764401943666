"""A primary server dies outside of a push: its backup replaces it, workers keep the parameters."""

import threading
import time
from functools import cache

import pytest
import torch
from call_faults import Call, Fault, add_rule
from classifiers import Mlp, job
from control_records import record_of
from local_run import Attempt, LocalRun, with_timeouts
from local_servers import ELSEWHERE, Servers, wait_for_backups
from torch import Tensor

from distplat.actors.local_actors import HERE
from distplat.platform.errors import Abandoned
from distplat.platform.stop_order import StopOrder
from distplat.strategies.catalog import make_strategy
from distplat.strategies.model.flat import FlatModel

LIMIT_S = 60.0


class StopAtStep3(Attempt):
    """Ends before step 3."""

    ends = (Abandoned,)

    def before(self, rank: int, step: int) -> StopOrder:
        if step == 3:
            raise Abandoned("stop")
        return super().before(rank, step)


def run_of(strategy: str) -> LocalRun:
    return LocalRun(job({"name": strategy, "num_servers": 2, "replication": 2}, 2), Mlp)


@cache
def parameters_without_loss() -> dict[str, Tensor]:
    run = run_of("ps-sync")
    assert Attempt(run).make()
    run.close()
    return run.parameters()


def kill_primary_at(servers: Servers, method: str) -> threading.Event:
    """Kill server 0 when worker 0 first calls a method of server 1; return an event of the kill."""
    killed = threading.Event()

    def kill_and_wait_for_the_backup() -> None:
        servers.nodes["server-0"].die("killed by the test")
        until = time.monotonic() + LIMIT_S
        while servers.manager.body.assignments()[0].primary == "server-0":
            assert time.monotonic() < until, "the manager does not promote the backup"
            time.sleep(0.01)

    def rule(call: Call) -> Fault | None:
        if (call.process, call.actor, call.method) != ("worker-0", "server-1", method):
            return None
        if killed.is_set():
            return None
        killed.set()
        return Fault(then=kill_and_wait_for_the_backup, reply_delay_s=0.5)

    add_rule(servers.cluster, rule)
    return killed


@pytest.mark.parametrize("remote_servers", [False, True])
@pytest.mark.parametrize("method", ["attach", "pull"])
def test_primary_lost_while_a_worker_connects(method: str, remote_servers: bool) -> None:
    run = run_of("ps-sync")
    assert not StopAtStep3(run, remote_servers=remote_servers).make()
    run.renew(1)
    wait_for_backups(run.servers)
    killed = kill_primary_at(run.servers, method)
    assert Attempt(run, remote_servers=remote_servers).make()
    assert killed.is_set()
    run.close()
    for name, value in parameters_without_loss().items():
        assert torch.equal(run.parameters()[name], value), name


@pytest.mark.sweep(2)
@pytest.mark.parametrize("node", [HERE, ELSEWHERE])
@pytest.mark.parametrize("method", ["seen", "left_out", "average"])
@pytest.mark.parametrize("strategy", ["ps-sync", "ps-async"])
def test_answers_without_parameters_keep_them(strategy: str, method: str, node: str) -> None:
    options = {"name": strategy, "num_servers": 2, "replication": 2}
    config = job(options, 1, ema={"decay": 0.9})
    servers = Servers(with_timeouts(config, LIMIT_S), make_strategy(config).roles(config))
    flat = FlatModel(torch.nn.Linear(5, 4))
    shards = servers.shards(0, 5, node=node)
    shards.connect(flat)
    wait_for_backups(servers)
    flat.grads.fill_(1.0)
    shards.push(0, record_of(flat), task=0)
    before = [parameter.clone() for parameter in flat.parameters]
    servers.nodes["server-0"].die("killed by the test")
    getattr(shards, method)()
    assert servers.manager.body.assignments()[0].primary != "server-0"
    assert all(map(torch.equal, flat.parameters, before))
    shards.close()
    servers.close()
