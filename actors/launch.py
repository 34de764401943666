"""
Run a job on Ray: connect, spawn the actors, follow the controller, and shut everything down.

    driver                       actors, all started side by side
    ------                       --------------------------------
    spawn          ->            worker 0..N-1, server 0..S-1, server manager, controller
    WorkOrder      ->            worker: import torch, build model and data, join, train
    begin, poll    <->           controller: events; at the end the trained model
                                 controller <-> workers: PollResult: steps, evaluations, errors
"""

from __future__ import annotations

import errno
import logging
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import ray

from distplat.actors import hash_seed, ray_compat
from distplat.actors.actor_group import ActorGroup, Launch
from distplat.actors.checkpointing import newest_checkpoint
from distplat.actors.controller_actor import ControllerActor
from distplat.actors.controller_client import ControllerClient, RunHandlers
from distplat.actors.head_watch import HeadWatch
from distplat.actors.messages import rendezvous_key
from distplat.actors.ray_errors import as_ours
from distplat.actors.ray_folder import RayFolder
from distplat.actors.ray_token import check_token, secure_token, token_of
from distplat.actors.ray_transport import RayTransport
from distplat.actors.role_output import role_output
from distplat.actors.spawn import spawn_controller
from distplat.actors.stopping import Stopping, call_all
from distplat.actors.task_check import TaskCheck, task_check
from distplat.actors.task_pickling import check_pickles
from distplat.platform.disk import reserve, with_deadline, write_atomically
from distplat.platform.errors import (
    DeadlineExceeded,
    DistplatError,
    InfrastructureError,
    SpecError,
    StorageError,
)
from distplat.platform.spec import Scaling

logger = logging.getLogger(__name__)

RAY_LOG = "ray.log"
"""File in the run directory: last lines of the logs of a local Ray that failed."""
_STARTS = ("start", "starting processes")
"""Names of waits for process starts, as in `DeadlineExceeded.what`."""
_PYTHONS = ("py_executable", "image_uri", "container")
"""Fields of a runtime environment that replace Python; Ray does not validate them."""
_KEEP_S = 10.0
"""Timeout for writing `RAY_LOG`."""
_LOW_DISK_BYTES = 64 * 2**20
"""Free disk space below which Ray may fail to start; the error then names the free space."""
_MIN_DISK_BYTES = 2**20
"""Free disk space without which Ray does not start."""


def train_on_ray(launch: Launch, handlers: RunHandlers, stopping: Stopping) -> None:
    """
    Train on the connected Ray, or start a local one for the run.

    Args:
        launch: parameters of the run.
        handlers: callbacks for events and results.
        stopping: already entered, because an interrupted start of Ray leaves processes.

    Raises:
        DistplatError: see `Trainer.fit`.
    """
    if launch.task is not None:
        check_pickles(launch.task)
    with (
        _task_check(launch) as checking,
        ray_for_run(stopping, launch.job.scaling, keep_in=launch.folder) as head,
        role_output(launch.job.name, launch.folder, logger.warning, shown=launch.log_to_driver),
    ):
        launch = replace(launch, checked=launch.checked or checking is not None)

        def check_health() -> None:
            head.check()
            for line in checking.poll() if checking is not None else ():
                logger.warning("%s", line)

        def check() -> None:
            stopping.check()
            check_health()

        _follow(launch, check, check_health, handlers, head)


@contextmanager
def ray_for_run(
    stopping: Stopping, scaling: Scaling, *, logs: bool = True, keep_in: Path | None = None
) -> Iterator[HeadWatch]:
    """
    Connect to Ray for a run and watch the cluster's head; see `local_ray`.

    Args:
        stopping: already entered, so that signals are recorded while Ray starts.
        scaling: largest number of workers.
        logs: see `local_ray`.
        keep_in: the run directory; see `local_ray`.

    Raises:
        Interrupted: a signal arrived before the run started, or a second one during the run.
        DistplatError: see `local_ray`, `failures_of_ray`.
    """
    try:
        with (
            local_ray(scaling, logs=logs, keep_in=keep_in),
            failures_of_ray(),
            HeadWatch(ray.get_runtime_context().gcs_address) as head,
        ):
            stopping.check()
            yield head
    except KeyboardInterrupt:  # second signal: stop as after the first, but at once
        stopping.check()
        raise


def _follow(
    launch: Launch,
    check: Callable[[], None],
    check_health: Callable[[], None],
    handlers: RunHandlers,
    head: HeadWatch,
) -> None:
    saved = newest_checkpoint(launch)
    actor_group = ActorGroup(launch, saved)
    # Ranks delete their own keys unless they were killed.
    cleanups = [actor_group.end, lambda: ray_compat.delete_all(rendezvous_key(launch.run))]
    try:
        handle = spawn_controller(ControllerActor, launch.job, launch.run)
        cleanups.insert(0, lambda: ray.kill(handle))
        actor_group.set_controller(handle)
        checkpoint_step = saved.step if saved else 0
        controller = ControllerClient(RayTransport(), handle, actor_group, checkpoint_step)
        cleanups.insert(0, lambda: controller.end(head.require))
        controller.follow(check, handlers, check_health)
    finally:
        # Without a head no cleanup is possible; the actors end with this process.
        call_all(_if_head_answers(head, cleanup) for cleanup in cleanups)


def _if_head_answers(head: HeadWatch, cleanup: Callable[[], object]) -> Callable[[], object]:
    return lambda: cleanup() if head.answers() else None


@contextmanager
def failures_of_ray() -> Iterator[None]:
    """
    Convert Ray's exceptions in the block to ours.

    Raises:
        InfrastructureError: Ray failed.
        SpecError: the user's request cannot be satisfied.
    """
    try:
        yield
    except ray.exceptions.RayError as error:
        raise as_ours(error) from error
    except DeadlineExceeded as error:
        if error.what not in _STARTS or not (advice := _advice_for_python()):
            raise
        late = error.missing, error.seconds, error.setting
        raise DeadlineExceeded(error.what, *late, advice) from None


def _advice_for_python() -> str:
    """Return a hint if the runtime environment replaces the workers' Python; empty: it does not."""
    keys = [key for key in _PYTHONS if ray.get_runtime_context().runtime_env.get(key)]
    if not keys:
        return ""
    return (
        f"Ray starts processes with `{keys[0]}` of the runtime environment, and does not tell "
        "where that cannot be run: see that it is there on every node"
    )


@contextmanager
def _task_check(launch: Launch) -> Iterator[TaskCheck | None]:
    """
    Check the task while a local Ray starts.

    On an existing cluster the task's modules may exist on the workers only; workers check it
    themselves before they build anything.
    """
    if launch.task is not None or launch.job.task is None or ray.is_initialized():
        yield None
        return
    with task_check(launch.job, launch.working_dir, shown=False) as check:
        yield check


@contextmanager
def _failures_of_start() -> Iterator[None]:
    """
    Convert any exception of Ray's start to an error with advice.

    Raises:
        InfrastructureError: Ray did not start.
    """
    try:
        yield
    except DistplatError:
        raise
    except Exception as error:
        load = f"{os.getloadavg()[0]:.0f} processes want the {os.cpu_count()} cores of this machine"
        busy = "; ".join([load, *_shortages()])
        why = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        remedy = "try again, or start one with `ray start --head` and give --address auto"
        raise InfrastructureError(
            f"a local Ray could not be started ({busy}): {why}; {remedy}"
        ) from error


def _shortages() -> list[str]:
    """Return scarce resources of this machine; Ray's own error would only name a timeout."""
    shortages = []
    addresses, _ = resource.getrlimit(resource.RLIMIT_AS)
    if addresses != resource.RLIM_INFINITY:
        shortages.append(f"`ulimit -v` allows {addresses / 2**30:.1f} GiB of addresses")
    folder = ray_compat.temporary_folder()
    with suppress(OSError):
        free = shutil.disk_usage(folder).free
        if free < _LOW_DISK_BYTES:
            shortages.append(f"{folder} has {free // 2**20} MiB free")
    return shortages


def _check_room(folder: Path) -> None:
    """
    Check for free disk space; without any, Ray would retry for half a minute.

    Raises:
        InfrastructureError: the disk is full.
    """
    try:
        reserve(folder, _MIN_DISK_BYTES).close()
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            return  # Ray creates the folder or reports the problem
        remedy = "free some of its disk, or have RAY_TMPDIR lead to another one"
        raise InfrastructureError(
            f"a local Ray could not be started: {folder}: {error.strerror}; {remedy}"
        ) from None


@contextmanager
def local_ray(
    scaling: Scaling, *, logs: bool = True, keep_in: Path | None = None
) -> Iterator[None]:
    """
    Use the connected Ray, or start a local one and shut it down after the block.

    Args:
        scaling: largest number of workers.
        logs: whether to print the output of a local Ray's workers in this process.
        keep_in: directory for the last lines of a local Ray's logs after an internal failure; for
            another Ray a warning names the folder of its logs.

    Raises:
        InfrastructureError: Ray cannot be started; its start timeout of 30 s is fixed.
        SpecError: the user's token cannot be read.
    """
    if ray.is_initialized():
        try:
            yield
        except Exception as error:
            if keep_in and _may_be_rays_fault(error) and (folder_name := ray_compat.log_folder()):
                logger.warning("Ray's own logs are in %s of each node", folder_name)
            raise
        return
    # More workers than cores are allowed: slow, but useful to try a job on a laptop.
    _secure()
    with hash_seed.inherited():
        _warn_of_long_name(ray_compat.wanted_folder())
        folder = _start_ray(scaling, logs=logs, keep_in=keep_in)
        logs_to: Path | None = None
        try:
            yield
        except Exception as error:
            logs_to = keep_in if _may_be_rays_fault(error) else None
            raise
        finally:
            _shut_down(folder, logs_to)


def _may_be_rays_fault(error: Exception) -> bool:
    """Return whether Ray's logs may explain an error: one of the cluster, or an internal one."""
    return getattr(error, "exit_code", None) in (
        None,
        DistplatError.exit_code,
        InfrastructureError.exit_code,
    )


def _shut_down(folder: RayFolder, keep_in: Path | None = None) -> None:
    """Shut down the local Ray and delete its files."""
    try:
        ray.shutdown()
    finally:
        _keep_logs(folder, keep_in)
        folder.remove()


def _keep_logs(folder: RayFolder, keep_in: Path | None) -> None:
    """Write the last lines of Ray's logs into the run directory; failures are ignored."""
    if keep_in is None:
        return
    path, token = keep_in / RAY_LOG, ""
    with suppress(SpecError):
        token = token_of(Path.home(), os.environ)
    with suppress(OSError, StorageError):
        if not (text := folder.ends_of_logs(token)):
            return
        with_deadline(lambda moved: write_atomically(path, text), path, _KEEP_S)
        logger.warning("what Ray logged at the end is in %s", path)


def _secure() -> None:
    """
    Enable Ray's token authentication, with a token that only this user can read.

    Raises:
        SpecError: see `check_token`.
    """
    if warning := secure_token(Path.home(), os.environ):
        logger.warning("%s", warning)
    ray_compat.ask_for_token()
    check_token(Path.home(), os.environ)


def _warn_of_long_name(folder: Path) -> None:
    """Log a warning if Ray's files cannot be in the folder that the user has chosen."""
    if ray_compat.has_long_name(folder):
        text = (
            "the files of this run's Ray lie in %s, not in %s: the names of its sockets would be "
            "too long there; have RAY_TMPDIR lead to a directory with a name of at most %d bytes"
        )
        logger.warning(text, ray_compat.temporary_folder(), folder, ray_compat.FOLDER_BYTES)


def _start_ray(scaling: Scaling, *, logs: bool, keep_in: Path | None) -> RayFolder:
    """Start a local Ray; return the directory of its files."""
    cpus = scaling.num_workers * scaling.resources()["CPU"]
    with (
        ray_compat.loopback(),
        ray_compat.own_process_groups(),
        ray_compat.own_signals(),
        _failures_of_start(),
    ):
        folder = RayFolder(ray_compat.temporary_folder())
        try:
            _check_room(folder.path.parent)
            ray.init(
                address="local",
                include_dashboard=False,
                num_cpus=max(os.cpu_count() or 1, int(np.ceil(cpus))),
                log_to_driver=logs,
                logging_level="error",  # its start-up warnings are for cluster operators
                _temp_dir=str(folder.path),
            )
        except Exception:
            ray.shutdown()  # a half-started Ray would stay in a notebook
            _keep_logs(folder, keep_in)
            folder.close()  # keep the files: Ray's error may name some
            raise
        except BaseException:
            _shut_down(folder)
            raise
    return folder
