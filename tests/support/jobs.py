"""The job of a test: what it does not say is the smallest that trains."""

from collections.abc import Mapping
from typing import Any

from distplat.platform.spec import Job
from distplat.strategies.catalog import make_job


def fields_of(
    strategy: str | Mapping[str, Any] = "ring", workers: int = 1, **fields: Any
) -> dict[str, Any]:
    """Make the fields of a job as its file has them; `fields` replaces defaults or adds to them."""
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
    Make a job, checked as `submit` checks it: the strategy's options too.

    Raises:
        SpecError: everything that is wrong.
    """
    return make_job(fields_of(strategy, workers, **fields))
