"""
One hash seed for all workers: where a set of strings is gone through, all see one order.

A process has its hash seed from its environment, before Python starts. What a Ray of our own
starts has ours at no cost; on another Ray a worker asks for it, which takes it 0.6 s.
"""

import os
from contextlib import AbstractContextManager
from typing import Any

import ray

from distplat.actors import ray_compat
from distplat.actors.process_setup import variables

NAME = "PYTHONHASHSEED"


def chosen() -> str:
    """Give the user's seed, if this process has one; else 0."""
    seed = os.environ.get(NAME, "")
    return seed if seed.isdigit() else "0"


def inherited() -> AbstractContextManager[None]:
    """Have processes that start in this block hash alike."""
    return variables({NAME: chosen()})


def options() -> dict[str, Any]:
    """Give what an actor is to be asked for with, so that it has the seed."""
    # What this process has started has its environment; a node that has joined has not.
    if os.environ.get(NAME) == chosen() and ray_compat.ray_is_ours() and len(ray.nodes()) == 1:
        return {}
    return {"runtime_env": {"env_vars": {NAME: chosen()}}}
