"""
Row F25: a quarter of all requests and a quarter of all replies are lost; some are late or repeated.

Servers, manager, scheduler and clients run over `LocalTransport`, ranks are threads. Ranks and
servers are on different nodes, so pushes and their replies are messages. Ranks of `ring` send no
such messages; calls of the controller are lost in `chaos_memory.py`, under every strategy. On real
processes Ray takes seconds to detect a lost message (`tests/cluster/test_lost_replies.py`).
"""

import hashlib
import logging
import random
import threading
from collections import Counter
from typing import Any

import torch
from call_faults import Call, Fault, add_rule
from chaos_rows import MICRO_BATCHES, STORES_AT, WORLD
from chaos_task import Watched
from jobs import job_of
from local_run import Attempt, LocalRun
from torch import nn

from distplat.actors import retrying_calls
from distplat.platform.apply_log import ApplyLog, log_flaws

SHARE = 0.25
"""Share of lost requests, and of lost replies."""
STEPS = 12
PLANS: dict[str, dict[str, Any]] = {
    "ps-sync": {"name": "ps-sync", "num_servers": 2},
    "ps-async": {"name": "ps-async", "num_servers": 2, "staleness": 2},
    "hybrid": {
        "name": "hybrid",
        "pipeline": 2,
        "data": 2,
        "micro_batches": MICRO_BATCHES,
        **STORES_AT["hybrid"],
    },
}


class WithoutDropout(Watched):
    """A model without dropout: rank threads share torch's generator."""

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 3))


class LossRule:
    """
    A rule that draws the fault of each call from the seed, the call's name and its number.

    Args:
        seed: of the trial.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.faults: Counter[str] = Counter()  #: number of calls by fault
        self._calls: Counter[tuple[str, str, str]] = Counter()
        self._counting = threading.Lock()

    def __call__(self, call: Call) -> Fault:
        name = call.process, call.actor, call.method
        with self._counting:
            self._calls[name] += 1
            draw = random.Random(f"{self.seed} {name} {self._calls[name]}")
            share = (1 - 2 * SHARE, SHARE, SHARE)
            lose: Any = draw.choices(("", "request", "reply"), share)[0]
            twice = draw.random() < SHARE
            self.faults[lose or ("twice" if twice else "kept")] += 1
        return Fault(draw.choice((0.0, 0.0, 0.01)), 0.0, lose, twice)


def run(strategy: str, seed: int | None) -> tuple[str, list[str], Counter[str]]:
    """
    Train in memory.

    Args:
        strategy: one of `PLANS`.
        seed: of the lost messages; None: no message is lost.

    Returns:
        The model's hash, the problems of the updates, and the number of calls by fault.
    """
    fields = {"steps": STEPS, "global_batch_size": 8, "task_args": {"pause": 0.0}}
    job = job_of(PLANS[strategy], WORLD[strategy], **fields)
    local_run = LocalRun(job, WithoutDropout, timeout_s=60.0)
    rule = LossRule(seed or 0)
    if seed is not None:
        for cluster in (local_run.servers.cluster, local_run.task_scheduler.cluster):
            add_rule(cluster, rule)
    Attempt(local_run, remote_servers=True).make()
    stores = [service.store for service in local_run.servers.shard_servers()]
    problems = [
        f"a shard made {store.version} updates" for store in stores if store.version != STEPS
    ]
    if strategy == "ps-async":
        logs = local_run.servers.logs()
        problems = [flaw for log in logs for flaw in log_flaws(ApplyLog(log), 2, STEPS)]
    local_run.close()
    parameters = local_run.parameters()
    digest = hashlib.sha256()
    for name in sorted(parameters):
        digest.update(parameters[name].numpy().tobytes())
        if not torch.isfinite(parameters[name].double()).all():
            problems.append(f"{name} is not finite")
    return digest.hexdigest(), problems, rule.faults


_unfailed: dict[str, str] = {}


def trial(strategy: str, seed: int) -> tuple[list[str], Counter[str]]:
    """Compare a run with lost messages with a run without; return the problems and the faults."""
    retrying_calls.RETRY_PAUSE_S = 0.001
    logging.getLogger(retrying_calls.__name__).setLevel(logging.ERROR)
    if strategy not in _unfailed:
        _unfailed[strategy] = run(strategy, None)[0]
    found, problems, faults = run(strategy, seed)
    if strategy != "ps-async" and found != _unfailed[strategy]:
        problems.append("the model has other bits than that of the run without a fault")
    return problems, faults
