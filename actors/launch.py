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
"""In the run directory: the ends of the logs of a Ray of our own that failed."""
_STARTS = ("start", "starting processes")
"""What is waited for while processes start, in the error when they are late."""
_PYTHONS = ("py_executable", "image_uri", "container")
"""Fields of a runtime environment that Ray does not check."""
_KEEP_S = 10.0
"""How long the disk may take to write them."""
_LOW_DISK_BYTES = 64 * 2**20
"""With less free disk than this Ray may not start: the error says how much there is."""
_MIN_DISK_BYTES = 2**20
"""With less free disk than this Ray does not start."""


def train_on_ray(launch: Launch, handlers: RunHandlers, stopping: Stopping) -> None:
    """
    Train on the connected Ray, or on a local one for the time of the run.

    Args:
        launch: what to run.
        handlers: called with what comes of it.
        stopping: entered before: Ray's start must not be cut off, or it leaves processes.

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

        def look() -> None:
            head.check()
            for line in checking.poll() if checking is not None else ():
                logger.warning("%s", line)

        def check() -> None:
            stopping.check()
            look()

        _follow(launch, check, look, handlers, head)


@contextmanager
def ray_for_run(
    stopping: Stopping, scaling: Scaling, *, logs: bool = True, keep_in: Path | None = None
) -> Iterator[HeadWatch]:
    """
    Be connected to Ray for a run, and know whether its head is there; see `local_ray`.

    Args:
        stopping: entered before: a signal is noted while Ray starts, too.
        scaling: has so many workers at most.
        logs: see `local_ray`.
        keep_in: the run directory; see `local_ray`.

    Raises:
        Interrupted: a signal came before the run began, or the second one, which does not wait.
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
    except KeyboardInterrupt:  # the second signal: an end like after the first, but at once
        stopping.check()
        raise


def _follow(
    launch: Launch,
    check: Callable[[], None],
    look: Callable[[], None],
    handlers: RunHandlers,
    head: HeadWatch,
) -> None:
    saved = newest_checkpoint(launch)
    actor_group = ActorGroup(launch, saved)
    # Ranks take their words back themselves, unless they were killed.
    endings = [actor_group.end, lambda: ray_compat.delete_all(rendezvous_key(launch.run))]
    try:
        handle = spawn_controller(ControllerActor, launch.job, launch.run)
        endings.insert(0, lambda: ray.kill(handle))
        actor_group.begin(handle)
        checkpoint_step = saved.step if saved else 0
        controller = ControllerClient(RayTransport(), handle, actor_group, checkpoint_step)
        endings.insert(0, lambda: controller.end(head.insist))
        controller.follow(check, handlers, look)
    finally:
        # Without a head nothing of that can be done: all ends with this process.
        call_all(_if_head_answers(head, ending) for ending in endings)


def _if_head_answers(head: HeadWatch, ending: Callable[[], object]) -> Callable[[], object]:
    return lambda: ending() if head.answers() else None


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
    except DeadlineExceeded as error:
        if error.what not in _STARTS or not (advice := _advice_for_python()):
            raise
        late = error.missing, error.seconds, error.setting
        raise DeadlineExceeded(error.what, *late, advice) from None


def _advice_for_python() -> str:
    """Say which Python Ray starts processes with, if that is not its own."""
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
    Have the task looked at while a Ray of our own starts.

    On a cluster that is there already workers may find what is not to be found here: they look at
    it themselves, before they build anything.
    """
    if launch.task is not None or launch.job.task is None or ray.is_initialized():
        yield None
        return
    with task_check(launch.job, launch.working_dir, shown=False) as check:
        yield check


@contextmanager
def _failures_of_start() -> Iterator[None]:
    """
    Say what to do where Ray does not start: what it raises then is of many classes.

    Raises:
        InfrastructureError: it did not.
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
    """Say what Ray may have too little of: its own words for that are of time."""
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
    See that there is some room for Ray's files: without any it tries for half a minute.

    Raises:
        InfrastructureError: there is none.
    """
    try:
        reserve(folder, _MIN_DISK_BYTES).close()
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            return  # Ray makes the folder, or says what is wrong with it
        remedy = "free some of its disk, or have RAY_TMPDIR lead to another one"
        raise InfrastructureError(
            f"a local Ray could not be started: {folder}: {error.strerror}; {remedy}"
        ) from None


@contextmanager
def local_ray(
    scaling: Scaling, *, logs: bool = True, keep_in: Path | None = None
) -> Iterator[None]:
    """
    Be connected to Ray: as we are, or to a local instance that ends with the block.

    Args:
        scaling: has so many workers at most.
        logs: whether what a local instance's workers print comes to this process.
        keep_in: a directory that gets the ends of its logs where it fails, or we do; those of
            another Ray stay where they are, which is said then.

    Raises:
        InfrastructureError: Ray cannot be started; it gives itself 30 s, which nothing changes.
        SpecError: the user's token cannot be read.
    """
    if ray.is_initialized():
        try:
            yield
        except Exception as error:
            if keep_in and _may_be_rays_fault(error) and (there := ray_compat.log_folder()):
                logger.warning("Ray's own logs are in %s of each node", there)
            raise
        return
    # More workers than cores is slow but right: on a laptop that is what trying out means.
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
    """Say whether Ray's logs may tell more of an error: the cluster's, or one of ours."""
    return getattr(error, "exit_code", None) in (
        None,
        DistplatError.exit_code,
        InfrastructureError.exit_code,
    )


def _shut_down(folder: RayFolder, keep_in: Path | None = None) -> None:
    """End the Ray of this process; its files go, too."""
    try:
        ray.shutdown()
    finally:
        _keep_logs(folder, keep_in)
        folder.remove()


def _keep_logs(folder: RayFolder, keep_in: Path | None) -> None:
    """Write the ends of a Ray's logs into a run directory, if they are wanted and it takes them."""
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
    Have a Ray that starts now ask for a token that only this user can read.

    Raises:
        SpecError: see `check_token`.
    """
    if warning := secure_token(Path.home(), os.environ):
        logger.warning("%s", warning)
    ray_compat.ask_for_token()
    check_token(Path.home(), os.environ)


def _warn_of_long_name(folder: Path) -> None:
    """Say where the files of a Ray lie, if that is not where its user wants them."""
    if ray_compat.has_long_name(folder):
        text = (
            "the files of this run's Ray lie in %s, not in %s: the names of its sockets would be "
            "too long there; have RAY_TMPDIR lead to a directory with a name of at most %d bytes"
        )
        logger.warning(text, ray_compat.temporary_folder(), folder, ray_compat.FOLDER_BYTES)


def _start_ray(scaling: Scaling, *, logs: bool, keep_in: Path | None) -> RayFolder:
    """Start a Ray; give the directory of its files."""
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
                logging_level="error",  # what it warns of at a start is for who keeps clusters
                _temp_dir=str(folder.path),
            )
        except Exception:
            ray.shutdown()  # a notebook would keep what there is of it
            _keep_logs(folder, keep_in)
            folder.close()  # Ray's words for why may name files
            raise
        except BaseException:
            _shut_down(folder)
            raise
    return folder
