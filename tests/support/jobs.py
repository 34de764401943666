"""Jobs of tests; defaults are the smallest values that train."""

from collections.abc import Mapping
from typing import Any

from distplat.platform.spec import Job
from distplat.strategies.catalog import make_job


def fields_of(
    strategy: str | Mapping[str, Any] = "ring", workers: int = 1, **fields: Any
) -> dict[str, Any]:
    """Return the fields of a job file; `fields` replaces defaults or adds to them."""
    length = {} if fields.keys() & {"epochs", "steps"} else {"steps": 4}
    return {
        "name": "test",
        "strategy": strategy,
        "scaling": {"num_workers": workers},
        "optimizer": {"name": "SGD", "lr": 0.1},
        "global_batch_size": 4,
        **length,
        **fields,
    }


def job_of(strategy: str | Mapping[str, Any] = "ring", workers: int = 1, **fields: Any) -> Job:
    """
    Build a job and validate it as `submit` does, including the strategy's options.

    Raises:
        SpecError: all problems of the job.
    """
    return make_job(fields_of(strategy, workers, **fields))
