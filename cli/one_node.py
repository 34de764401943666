"""
A remote job's driver: put the job's runtime environment aside.

An actor that has one starts in a new process, behind another that prepares it, which takes a
second. On a cluster of one node the driver's own copies of the user's folder and of distplat are at
hand for every actor.
"""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from distplat.actors.compat import JOB_CONFIG_VARIABLE
from distplat.cli.shipping import JOB_VARIABLE

_REPLACEABLE = {"working_dir", "py_modules", "excludes", "env_vars"}
"""Parts of a runtime environment that come to the same thing on the driver's own node."""


@contextmanager
def without_job_environment() -> Iterator[bool]:
    """
    Hide the runtime environment that the job API left for its driver, if it can be done without.

    Yields:
        Whether something is hidden: who joins a larger cluster must join again with it.
    """
    given = os.environ.get(JOB_CONFIG_VARIABLE)
    config = json.loads(given) if given else {}
    if given is None or not replaceable(config.get("runtime_env", {})):
        yield False
        return
    os.environ[JOB_CONFIG_VARIABLE] = json.dumps({**config, "runtime_env": {}})
    try:
        yield True
    finally:
        os.environ[JOB_CONFIG_VARIABLE] = given


def replaceable(environment: Mapping[str, Any]) -> bool:
    """Say whether the driver's own node has everything of a runtime environment anyway."""
    ours_alone = set(environment.get("env_vars", {})) <= {JOB_VARIABLE}
    one_module = len(environment.get("py_modules", {})) <= 1
    public = {key for key in environment if not key.startswith("_")}
    return ours_alone and one_module and public <= _REPLACEABLE
