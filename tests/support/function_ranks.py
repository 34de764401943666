"""A train function in memory: N ranks as threads, with the group of `strategies/fakes.py`."""

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from local_run import saved_state_of, with_timeouts
from local_servers import Servers
from rank_threads import on_ranks
from torch import Tensor

from distplat.actors.checkpoint_uploader import CheckpointUploader
from distplat.actors.local_actors import HERE
from distplat.actors.training import run_function
from distplat.platform.checkpoints import Delivery
from distplat.platform.progress import AnyReport
from distplat.platform.spec import Job
from distplat.platform.torchrun import ProcessLocation
from distplat.strategies.catalog import make_job, make_strategy
from distplat.strategies.checkpoint.checkpoint_reader import SavedState
from distplat.strategies.fakes import Fabric
from distplat.strategies.function.function_session import SessionPorts
from distplat.strategies.loop.loop import Progress

LIMIT_S = 60.0
"""Deadline of waits."""


@dataclass
class FunctionRun:
    """Results of a run."""

    trained: list[dict[str, Tensor]] = field(default_factory=list)  #: by rank
    reports: list[AnyReport] = field(default_factory=list)
    checkpoints: dict[int, SavedState] = field(default_factory=dict)  #: by version


def function_job(workers: int = 1, **fields: Any) -> Job:
    """Build the job of a train function."""
    defaults = {"name": "test", "strategy": "ring", "scaling": {"num_workers": workers}}
    return make_job({**defaults, "own_loop": True, **fields})


def call_on_ranks(
    function: Callable[[Mapping[str, Any]], object],
    workers: int = 1,
    *,
    job: Job | None = None,
    saved: SavedState | None = None,
    nodes: Callable[[int], str] = lambda rank: "here",
    home: str = HERE,
    ending: Callable[[int], bool] = lambda rank: False,
) -> FunctionRun:
    """Run a function on all ranks; raises the error of the first failed rank."""
    job = job or function_job(workers)
    world, run, lock = job.scaling.world, FunctionRun(), threading.Lock()
    fabric, roles = Fabric(world, LIMIT_S), make_strategy(job).roles(job)
    servers = Servers(with_timeouts(job, LIMIT_S), roles) if roles.servers else None

    def deliver(delivery: Delivery) -> None:
        with lock:
            state = saved_state_of(job, delivery.version, [delivery])
            run.checkpoints[delivery.version] = state

    def body(rank: int) -> dict[str, Tensor]:
        copied = lambda arrays: [array.copy() for array in arrays]  # noqa: E731
        uploader = CheckpointUploader(rank, 0, copied, deliver, LIMIT_S)
        trained = run_function(
            job,
            lambda: function,
            fabric.collective(rank),
            ProcessLocation(nodes(rank), f"{nodes(rank)}.cluster"),
            SessionPorts(
                run.reports.append, uploader.take, Progress(), saved, lambda: ending(rank)
            ),
            servers.shards(rank, 1, node=home) if servers is not None else None,
        )
        uploader.flush()
        return trained

    def give_up() -> None:
        fabric.abort()
        if servers is not None:
            servers.renew(1)

    try:
        run.trained = on_ranks(world, body, failed=give_up)
    finally:
        if servers is not None:
            servers.close()
    return run
