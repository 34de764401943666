"""
One hash seed for all workers, so that they iterate over a set of strings in the same order.

Python reads the seed from the environment when a process starts. Processes of a local Ray inherit
ours. On another Ray a worker gets it through its runtime environment, which takes 0.6 s.
"""

import os
from contextlib import AbstractContextManager
from typing import Any

import ray

from distplat.actors import ray_compat
from distplat.actors.process_setup import variables

NAME = "PYTHONHASHSEED"


def chosen() -> str:
    """Return the hash seed that the user has set for this process; else 0."""
    seed = os.environ.get(NAME, "")
    return seed if seed.isdigit() else "0"


def inherited() -> AbstractContextManager[None]:
    """Set the seed for processes that start in this block."""
    return variables({NAME: chosen()})


def options() -> dict[str, Any]:
    """Return the actor options that set the seed."""
    # A local Ray has this process's environment, but nodes that have joined it do not.
    if os.environ.get(NAME) == chosen() and ray_compat.ray_is_ours() and len(ray.nodes()) == 1:
        return {}
    return {"runtime_env": {"env_vars": {NAME: chosen()}}}
