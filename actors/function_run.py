"""A worker's part in a run of a train function: the function called, with a session around it."""

from __future__ import annotations

import pickle
from collections.abc import Callable

import torch
from torch import Tensor

from distplat.actors.messages import WorkOrder
from distplat.actors.task_check import check_function
from distplat.actors.task_loading import TrainFunction, load_train_function
from distplat.platform.spec import Job
from distplat.strategies.collective import Collective, gather_bytes
from distplat.strategies.function.session import FunctionSession, Outlets, Place
from distplat.strategies.function.words import call, running
from distplat.strategies.loop.checks import check_device
from distplat.strategies.loop.seeding import seed_all
from distplat.strategies.ports import LoopShards


def run_function(
    job: Job,
    load: Callable[[], TrainFunction],
    group: Collective,
    node: str,
    outlets: Outlets,
    shards: LoopShards | None = None,
) -> dict[str, Tensor]:
    """
    Call a train function; give the state of what it has prepared.

    Args:
        job: the run.
        load: gives the function; seeded before, as for a task.
        group: all ranks.
        node: this rank's.
        outlets: to the worker.
        shards: the way to parameter servers; None: the strategy has none.

    Raises:
        whatever the function raises.
    """
    device = "cuda" if job.scaling.use_gpu else "cpu"
    check_device(device)
    place = _place(group, node, torch.device(device))
    seed_all(job.seed)
    function = load()
    session = FunctionSession(job, place, group, outlets, shards)
    try:
        seed_all(job.seed)
        with running(session):
            call(function, job.task_args)
        session.leave()
        group.barrier()  # who leaves early takes its memory with it
        return {name: value.clone() for name, value in session.trained().items()}
    finally:
        session.close()


def loaded(order: WorkOrder, search_path: str) -> TrainFunction:
    """
    Give the function that an order names, looked at.

    Raises:
        SpecError: see `load_train_function`, `check_function`.
    """
    if isinstance(order.task, bytes):
        found: TrainFunction = pickle.loads(order.task)  # noqa: S301  our own driver pickled it
    else:
        found = load_train_function(order.task, search_path)
    check_function(found)
    return found


def _place(group: Collective, node: str, device: torch.device) -> Place:
    nodes = gather_bytes(node.encode(), group, device)
    here = [rank for rank, one in enumerate(nodes) if one == node.encode()]
    return Place(group.rank, group.world, here.index(group.rank), len(here), device)
