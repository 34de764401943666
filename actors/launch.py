"""
From a job to a running cast: connect to Ray, spawn, give orders, watch, and end everything.

    driver                       actors, all started side by side
    ------                       --------------------------------
    spawn          ->            worker 0..N-1, server 0..S-1, server manager
    WorkOrder      ->            worker: import torch, build model and data, join, train
    poll           <->           News: steps, evaluations, errors
    result         <-            worker 0: the trained model
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import ray
from ray.experimental.internal_kv import _internal_kv_del

from distplat.actors.controller import Controller
from distplat.actors.messages import WorkOrder, rendezvous_key
from distplat.actors.spawn import spawn, start_workers
from distplat.actors.stopping import Stopping
from distplat.platform.progress import EvalSummary, StepSummary
from distplat.platform.spec import Job
from distplat.strategies.base import Roles
from distplat.strategies.catalog import StrategyFile
from distplat.strategies.task import Task


@dataclass(frozen=True)
class Launch:
    """What a run starts from."""

    job: Job
    run: str
    roles: Roles
    task: type[Task] | None
    """None: the class that `job.task` names."""
    working_dir: str
    strategy_file: StrategyFile | None


def train_on_ray(launch: Launch, tell: Callable[[StepSummary | EvalSummary], None]) -> bytes:
    """
    Train on the connected Ray, or on a local one for the time of the run.

    Raises:
        DistplatError: see `Trainer.fit`.
    """
    # Twice: Ray's start must not be cut off, or it leaves processes; and it sets handlers itself.
    with Stopping() as early, local_ray(launch.job), Stopping() as stopping:
        early.check()
        attempt = 0
        cast = spawn(launch.job, launch.roles, launch.run, attempt)
        try:
            orders = [
                _order(launch, attempt, rank, cast.manager)
                for rank in range(launch.job.scaling.num_workers)
            ]
            # Held, so that Ray keeps the calls; that a worker has its orders, polling will show.
            started = start_workers(cast, orders)
            controller = Controller(cast, launch.job.failure, tell, stopping.check)
            state = controller.run()
            del started
            return state
        finally:
            cast.end()
            # Rank 0 takes its address back itself, unless it was killed.
            _internal_kv_del(rendezvous_key(launch.run), del_by_prefix=True)


@contextmanager
def local_ray(job: Job) -> Iterator[None]:
    """Be connected to Ray: as we are, or to a local instance that ends with the block."""
    if ray.is_initialized():
        yield
        return
    cpus = job.scaling.num_workers * job.scaling.resources()["CPU"]
    # More workers than cores is slow but right: on a laptop that is what trying out means.
    ray.init(
        address="local",
        include_dashboard=False,
        num_cpus=max(os.cpu_count() or 1, int(np.ceil(cpus))),
        logging_level="error",  # Ray warns of its own token file at every start
    )
    try:
        yield
    finally:
        ray.shutdown()


def _order(launch: Launch, attempt: int, rank: int, manager: object) -> WorkOrder:
    task: str | bytes = launch.job.task or ""
    if launch.task is not None:
        task = ray.cloudpickle.dumps(launch.task)
    return WorkOrder(
        job=launch.job,
        run=launch.run,
        attempt=attempt,
        rank=rank,
        task=task,
        search_path=launch.working_dir,
        strategy_file=launch.strategy_file,
        manager=manager,
        collective=launch.roles.collective,
    )
