"""Jobs with one embedding table, and the plan of its servers."""

from typing import Any

from jobs import job_of

from distplat.platform.shard_map import TablePlan, TableSpec, plan_of
from distplat.platform.spec import Job

SPEC = TableSpec("t", 100, 4, 0.0)


def job(world: int = 2, servers: int = 1, **more: Any) -> Job:
    fields = {
        "embeddings": {"servers": servers, "optimizer": {"name": "SGD", "lr": 1.0}},
        "steps": 10,
        "global_batch_size": world,
        "failure": {"step_timeout_s": 0.5},
        **more,
    }
    return job_of("ring", world, **fields)


def plan(attempt: int = 0, *, rewinds: bool = True, **more: Any) -> TablePlan:
    return plan_of(job(**more), "run", attempt, (SPEC,), 10, rewinds=rewinds)
