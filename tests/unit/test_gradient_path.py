"""
The files on the path of a gradient from the end of backward to the update, in order.

The lists contain all product files in which a function is called during the path, so they are an
upper bound. `docs/architecture.md` shows the path. A change of the path changes a list.
"""

import threading
from functools import cache
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

from classifiers import Mlp
from jobs import job_of
from local_run import train

from distplat.platform.spec import Job
from distplat.strategies.loop.loop import StepExchange
from distplat.strategies.worker_strategy import make_worker_strategy

ROOT = Path(__file__).resolve().parents[2]


FOLDERS = {"platform", "strategies", "actors"}
HEALTH_CHECKS = {"watch", "poll"}
"""Names of threads of the server manager, which may run at any time."""
STEP = 1  # after the first step, which sets up buckets and caches


class Trace:
    """Product files in which functions are called, from one rank's `exchange` to its `update`."""

    def __init__(self, update: CodeType) -> None:
        self._exchange, self._update = StepExchange.exchange.__code__, update
        self._rank: int | None = None
        self.worker: list[str] = []  #: files in the thread of that rank
        self.servers: list[str] = []  #: files in all other threads

    def __call__(self, frame: FrameType, event: str, arg: Any) -> None:
        code, thread = frame.f_code, threading.get_ident()
        if event == "call" and code is self._exchange and self._is_step(frame):
            self._rank = thread
        is_health_check = threading.current_thread().name in HEALTH_CHECKS
        if self._rank is not None and event == "call" and not is_health_check:
            files = self.worker if thread == self._rank else self.servers
            name = relative_name(code.co_filename)
            if name not in files and name.split("/")[0] in FOLDERS:
                files.append(name)
        if event == "return" and code is self._update and thread == self._rank:
            self._rank = None

    def _is_step(self, frame: FrameType) -> bool:
        return (frame.f_locals["step"], frame.f_locals["self"]._rank) == (STEP, 0)


@cache
def relative_name(file: str) -> str:
    path = Path(file).resolve()
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else file


def trace_run(job: Job) -> Trace:
    trace = Trace(type(make_worker_strategy(job)).update.__code__)
    threading.setprofile(trace)
    try:
        train(job, Mlp)
    finally:
        threading.setprofile(None)
    return trace


def test_path_under_ring() -> None:
    """On Ray, files of `actors/collectives` replace `strategies/fakes.py`."""
    assert trace_run(job_of("ring", 2, steps=STEP + 1)).worker == [
        "strategies/loop/loop.py",
        "strategies/loop/compute.py",
        "strategies/model/flat.py",
        "strategies/loop/control.py",
        "strategies/ring_worker.py",
        "strategies/model/model_state.py",
        "strategies/model/written_tensors.py",
        "strategies/checkpoint/state_sync.py",
        "strategies/reduction/bucket_reducer.py",
        "strategies/reduction/base.py",
        "strategies/algorithms/buckets.py",
        "strategies/fakes.py",
        "strategies/algorithms/reduce.py",
        "platform/even_split.py",
        "strategies/loop/session.py",
        "platform/sampler.py",
        "strategies/model/optim.py",
        "strategies/model/parameter_layout.py",
        "platform/optimizers.py",
        "platform/lr_schedules.py",
    ]


def test_path_under_ps_sync() -> None:
    trace = trace_run(job_of({"name": "ps-sync", "num_servers": 1}, 1, steps=STEP + 1))
    assert trace.worker == [
        "strategies/loop/loop.py",
        "strategies/loop/compute.py",
        "strategies/model/flat.py",
        "strategies/loop/control.py",
        "strategies/ps_sync_worker.py",
        "strategies/model/model_state.py",
        "strategies/model/written_tensors.py",
        "strategies/checkpoint/state_sync.py",
        "strategies/model/parameter_layout.py",
        "actors/servers/shards.py",
        "actors/servers/map_watcher.py",
        "actors/servers/fan_out.py",
        "actors/retrying_calls.py",
        "platform/awake_clock.py",
        "actors/servers/vector_transport.py",
        "actors/memory/device_copy.py",
        "actors/memory/mailboxes.py",
        "actors/memory/futex.py",
        "platform/shard_map.py",
        "strategies/server/answers.py",
    ]
    # If the mailbox's thread is awake already, it does not call the futex.
    served = [name for name in trace.servers if name != "actors/memory/futex.py"]
    assert served[: served.index("platform/lr_schedules.py") + 1] == [
        "actors/servers/shard_serving.py",
        "actors/memory/mailboxes.py",
        "platform/server_group.py",
        "strategies/loop/control.py",
        "strategies/server/server.py",
        "platform/load.py",
        "strategies/server/dense_store.py",
        "platform/ledger.py",
        "strategies/model/parameter_layout.py",
        "strategies/algorithms/reduce.py",
        "strategies/model/optim.py",
        "platform/optimizers.py",
        "platform/lr_schedules.py",
    ]
