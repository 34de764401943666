"""
Row F25: a quarter of all requests and a quarter of all answers lost; some late, some twice.

In memory: the real servers, manager, scheduler and clients over `LocalTransport`, ranks as threads.
Ranks are on another node than servers, so pushes and what servers answer are messages, too.
Ranks of `ring` send no such messages; what the controller asks is lost in `chaos_memory.py`, under
every strategy. On real processes Ray takes seconds to notice that a message is lost
(`tests/cluster/test_lost_replies.py`).
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
"""Of requests that are lost, and of answers."""
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


class Still(Watched):
    """Without dropout: ranks are threads, and share torch's generator."""

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 3))


class Lossy:
    """
    A rule that decides on each call by its name and number: one seed is one set of lost messages.

    Args:
        seed: of the trial.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.lost: Counter[str] = Counter()  #: by what became of calls
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
            self.lost[lose or ("twice" if twice else "kept")] += 1
        return Fault(draw.choice((0.0, 0.0, 0.01)), 0.0, lose, twice)


def run(strategy: str, seed: int | None) -> tuple[str, list[str], Counter[str]]:
    """
    Train in memory.

    Args:
        strategy: one of `PLANS`.
        seed: of the lost messages; None: none is lost.

    Returns:
        A hash of the model, what is wrong with the updates, and what became of the calls.
    """
    given = {"steps": STEPS, "global_batch_size": 8, "task_args": {"pause": 0.0}}
    job = job_of(PLANS[strategy], WORLD[strategy], **given)
    made = LocalRun(job, Still, timeout_s=60.0)
    rule = Lossy(seed or 0)
    if seed is not None:
        for cluster in (made.servers.cluster, made.desk.cluster):
            add_rule(cluster, rule)
    Attempt(made, apart=True).make()
    stores = [service.store for service in made.servers.shard_servers()]
    problems = [f"a shard made {one.version} updates" for one in stores if one.version != STEPS]
    if strategy == "ps-async":
        logs = made.servers.logs()
        problems = [flaw for log in logs for flaw in log_flaws(ApplyLog(log), 2, STEPS)]
    made.close()
    parameters = made.parameters()
    digest = hashlib.sha256()
    for name in sorted(parameters):
        digest.update(parameters[name].numpy().tobytes())
        if not torch.isfinite(parameters[name].double()).all():
            problems.append(f"{name} is not finite")
    return digest.hexdigest(), problems, rule.lost


_undisturbed: dict[str, str] = {}


def trial(strategy: str, seed: int) -> tuple[list[str], Counter[str]]:
    """Compare a run that loses messages with one that does not; give what is wrong."""
    retrying_calls.RETRY_PAUSE_S = 0.001
    logging.getLogger(retrying_calls.__name__).setLevel(logging.ERROR)
    if strategy not in _undisturbed:
        _undisturbed[strategy] = run(strategy, None)[0]
    found, problems, lost = run(strategy, seed)
    if strategy != "ps-async" and found != _undisturbed[strategy]:
        problems.append("the model has other bits than that of the run without a fault")
    return problems, lost
