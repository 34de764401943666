"""
From a job to a run on Ray: connect, spawn, give orders, follow the controller, and end everything.

    driver                       actors, all started side by side
    ------                       --------------------------------
    spawn          ->            worker 0..N-1, server 0..S-1, server manager, controller
    WorkOrder      ->            worker: import torch, build model and data, join, train
    begin, poll    <->           controller: what happened; at the end the trained model
                                 controller <-> workers: PollResult: steps, evaluations, errors
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import ray

from distplat.actors import compat, hash_seed
from distplat.actors.actor_group import ActorGroup, Launch
from distplat.actors.checkpointing import newest_checkpoint
from distplat.actors.controller_actor import ControllerActor
from distplat.actors.controller_client import ControllerClient, Sink
from distplat.actors.head_watch import HeadWatch
from distplat.actors.messages import rendezvous_key
from distplat.actors.ray_errors import as_ours
from distplat.actors.ray_transport import RayTransport
from distplat.actors.role_output import role_output
from distplat.actors.spawn import spawn_controller
from distplat.actors.stopping import Stopping, end_each
from distplat.actors.task_check import TaskCheck, said_by_job
from distplat.actors.task_pickling import check_pickles
from distplat.platform.ray_token import secure_token
from distplat.platform.spec import Scaling

logger = logging.getLogger(__name__)


def train_on_ray(launch: Launch, sink: Sink) -> None:
    """
    Train on the connected Ray, or on a local one for the time of the run.

    Args:
        launch: what to run.
        sink: takes what comes of it.

    Raises:
        DistplatError: see `Trainer.fit`.
    """
    if launch.task is not None:
        check_pickles(launch.task)
    # Around all of it: Ray's start must not be cut off, or it leaves processes.
    with (
        Stopping() as stopping,
        _task_check(launch) as task_check,
        local_ray(launch.job.scaling),
        failures_of_ray(),
        role_output(launch.job.name, launch.folder, logger.warning, shown=launch.log_to_driver),
        HeadWatch(ray.get_runtime_context().gcs_address) as head,
    ):
        stopping.arm()
        stopping.check()
        launch = replace(launch, checked=launch.checked or task_check is not None)

        def check() -> None:
            stopping.check()
            head.check()
            for line in task_check.poll() if task_check is not None else ():
                logger.warning("%s", line)

        try:
            _follow(launch, check, sink, head)
        except KeyboardInterrupt:  # the second signal: an end like after the first, but at once
            stopping.check()
            raise


def _follow(launch: Launch, check: Callable[[], None], sink: Sink, head: HeadWatch) -> None:
    saved = newest_checkpoint(launch)
    actor_group = ActorGroup(launch, saved)
    # Ranks take their words back themselves, unless they were killed.
    endings = [actor_group.end, lambda: compat.delete_all(rendezvous_key(launch.run))]
    try:
        handle = spawn_controller(ControllerActor, launch.job, launch.run)
        endings.insert(0, lambda: ray.kill(handle))
        base = saved.step if saved else 0
        controller = ControllerClient(RayTransport(), handle, actor_group, base)
        endings.insert(0, controller.end)
        controller.follow(check, sink)
    finally:
        if not head.gone:  # else nothing of that can be done: all ends with this process
            end_each(endings)


@contextmanager
def failures_of_ray() -> Iterator[None]:
    """
    Tell what Ray raises while it is used from an error of ours.

    Raises:
        InfrastructureError: Ray itself could not do what it was asked.
        SpecError: the user asked for what cannot be had.
    """
    try:
        yield
    except ray.exceptions.RayError as error:
        raise as_ours(error) from error


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
    job = launch.job
    given = entry, launch.working_dir, job.task_args
    check = TaskCheck(*given, shown=False, function=job.own_loop, said=said_by_job(job))
    try:
        yield check
    finally:
        check.end()


@contextmanager
def local_ray(scaling: Scaling, *, logs: bool = True) -> Iterator[None]:
    """
    Be connected to Ray: as we are, or to a local instance that ends with the block.

    Args:
        scaling: has so many workers at most.
        logs: whether what a local instance's workers print comes to this process.
    """
    if ray.is_initialized():
        yield
        return
    cpus = scaling.num_workers * scaling.resources()["CPU"]
    # More workers than cores is slow but right: on a laptop that is what trying out means.
    if warning := secure_token(Path.home(), os.environ):
        logger.warning("%s", warning)
    with hash_seed.inherited():
        with compat.loopback():
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
