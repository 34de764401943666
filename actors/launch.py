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

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import ray

from distplat.actors import compat, hash_seed
from distplat.actors.actor_group import ActorGroup, Launch
from distplat.actors.checkpointing import Checkpoints
from distplat.actors.controller import Controller
from distplat.actors.messages import rendezvous_key
from distplat.actors.ray_transport import RayTransport
from distplat.actors.retrying_calls import ask
from distplat.actors.stopping import Stopping
from distplat.actors.tables.saving import sources_of
from distplat.actors.task_check import TaskCheck
from distplat.actors.task_pickling import check_pickles
from distplat.platform.apply_log import FILE_NAME, pack
from distplat.platform.errors import InfrastructureError
from distplat.platform.progress import Summary
from distplat.platform.spec import Job
from distplat.platform.tensor_slices import Bytes
from distplat.strategies.sparse.files import keep_tables

logger = logging.getLogger(__name__)

_FETCH_S = 60.0
"""How long the driver waits for a part of a checkpoint to come from its node."""

Keep = Callable[[str, bytes], object]
"""Puts a file of the given name into the run directory."""


def train_on_ray(launch: Launch, tell: Callable[[Summary], None], keep: Keep) -> bytes:
    """
    Train on the connected Ray, or on a local one for the time of the run.

    Args:
        launch: what to run.
        tell: takes what happens.
        keep: takes the embedding tables and the log of updates, of runs that have them.

    Raises:
        DistplatError: see `Trainer.fit`.
    """
    if launch.task is not None:
        check_pickles(launch.task)
    # Twice: Ray's start must not be cut off, or it leaves processes; and it sets handlers itself.
    with (
        Stopping() as early,
        _task_check(launch) as task_check,
        local_ray(launch.job),
        failures_of_ray(),
        Stopping() as stopping,
    ):
        early.check()
        launch = replace(launch, checked=launch.checked or task_check is not None)

        def check() -> None:
            stopping.check()
            for line in task_check.poll() if task_check is not None else ():
                logger.warning("%s", line)

        # Where tasks are leased rank 0 alone gives parts: the others may come and go.
        parts = 1 if launch.roles.consistency.dynamic_tasks else launch.job.scaling.world
        checkpoints = Checkpoints(launch, parts, _open_box)
        actor_group = ActorGroup(launch, checkpoints.newest())
        try:
            controller = Controller(
                actor_group, launch.job.failure, launch.policy, check, checkpoints
            )
            model = controller.run(tell)
            if launch.roles.consistency.asynchronous and controller.base == 0:
                _keep_log(launch, actor_group, keep)
            if launch.job.embeddings is not None and launch.job.checkpoint.save_final:
                keep_tables(sources_of(actor_group, launch.job), launch.job.seed, keep)
            return model
        finally:
            checkpoints.drain()  # what is complete is worth keeping, however the run ends
            actor_group.end()
            # Ranks take their words back themselves, unless they were killed.
            compat.delete_all(rendezvous_key(launch.run))


@contextmanager
def failures_of_ray() -> Iterator[None]:
    """
    Tell a cluster that ends while it is used from an error of ours.

    Raises:
        InfrastructureError: Ray itself could not do what it was asked.
    """
    try:
        yield
    except ray.exceptions.RaySystemError as error:
        raise InfrastructureError(f"the Ray cluster fails: {error}") from error


@contextmanager
def _task_check(launch: Launch) -> Iterator[TaskCheck | None]:
    """
    Have the task looked at while a Ray of our own starts.

    On a cluster that is there already workers may find what is not to be found here: they look at
    it themselves, before they build anything.
    """
    entry = launch.job.task
    if launch.task is not None or entry is None or ray.is_initialized():
        yield None
        return
    check = TaskCheck(entry, launch.working_dir, launch.job.task_args, shown=False)
    try:
        yield check
    finally:
        check.end()


def _open_box(box: list[Any]) -> list[Bytes]:
    arrays: list[Bytes] = ray.get(box[0], timeout=_FETCH_S)
    return arrays


def _keep_log(launch: Launch, actor_group: ActorGroup, keep: Keep) -> None:
    """Fetch the shards' logs; a run that has its model does not fail for want of them."""
    manager = actor_group.roles["server-manager"]
    limit, setting = launch.job.failure.step_timeout_s, "step_timeout_s"
    calls = [manager.logs.remote]
    try:
        logs = ask(RayTransport(), "log", calls, ["server-manager"], limit, setting)[0]
    except InfrastructureError as error:
        logger.warning("no %s: %s", FILE_NAME, error)
    else:
        keep(FILE_NAME, pack(logs, {"run": launch.run}))


@contextmanager
def local_ray(job: Job, *, logs: bool = True) -> Iterator[None]:
    """
    Be connected to Ray: as we are, or to a local instance that ends with the block.

    Args:
        job: has so many workers at most.
        logs: whether what a local instance's workers print comes to this process.
    """
    if ray.is_initialized():
        yield
        return
    cpus = job.scaling.num_workers * job.scaling.resources()["CPU"]
    # More workers than cores is slow but right: on a laptop that is what trying out means.
    with hash_seed.inherited():
        ray.init(
            address="local",
            include_dashboard=False,
            num_cpus=max(os.cpu_count() or 1, int(np.ceil(cpus))),
            log_to_driver=logs,
            logging_level="error",  # Ray warns of its own token file at every start
        )
        try:
            yield
        finally:
            ray.shutdown()
