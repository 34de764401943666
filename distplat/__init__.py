"""
Distributed training of PyTorch models on Ray: one job file, every architecture.

The public names live here and are loaded on first use, so that `import distplat` costs nothing
and a command-line call pays for torch and Ray only when it needs them. The code is in the four
folders beside this one, reached as `distplat.platform`, `.strategies`, `.actors` and `.cli`.
"""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_HOMES = {
    "Callback": "distplat.actors.callbacks",
    "Checkpoint": "distplat.strategies.directory_checkpoint",
    "Trainer": "distplat.actors.trainer",
    "Result": "distplat.actors.result",
    "weights": "distplat.actors.weights",
    "Job": "distplat.platform.spec",
    "Task": "distplat.strategies.task",
    "load_job": "distplat.strategies.catalog",
    "DistplatError": "distplat.platform.errors",
    "sample_rng": "distplat.strategies.loop.seeding",
    "barrier": "distplat.strategies.function.api",
    "gather_for_metrics": "distplat.strategies.function.api",
    "get_checkpoint": "distplat.strategies.function.api",
    "get_context": "distplat.strategies.function.api",
    "no_sync": "distplat.strategies.function.api",
    "prepare": "distplat.strategies.function.api",
    "report": "distplat.strategies.function.api",
    "should_stop": "distplat.strategies.function.api",
    "all_gather": "distplat.strategies.loop.gathering",
}

__all__ = [
    "Callback",
    "Checkpoint",
    "DistplatError",
    "Job",
    "Result",
    "Task",
    "Trainer",
    "__version__",
    "all_gather",
    "barrier",
    "gather_for_metrics",
    "get_checkpoint",
    "get_context",
    "load_job",
    "no_sync",
    "prepare",
    "report",
    "sample_rng",
    "should_stop",
    "weights",
]

if TYPE_CHECKING:
    from distplat.actors.callbacks import Callback
    from distplat.actors.result import Result
    from distplat.actors.trainer import Trainer
    from distplat.actors.weights import weights
    from distplat.platform.errors import DistplatError
    from distplat.platform.spec import Job
    from distplat.strategies.catalog import load_job
    from distplat.strategies.directory_checkpoint import Checkpoint
    from distplat.strategies.function.api import (
        barrier,
        gather_for_metrics,
        get_checkpoint,
        get_context,
        no_sync,
        prepare,
        report,
        should_stop,
    )
    from distplat.strategies.loop.gathering import all_gather
    from distplat.strategies.loop.seeding import sample_rng
    from distplat.strategies.task import Task


def __getattr__(name: str) -> object:
    """Load a public name from its home on first use (PEP 562)."""
    if name == "nn":  # as `torch.nn` is there after `import torch`
        return import_module("distplat.nn")
    if name not in _HOMES:
        raise AttributeError(f"module 'distplat' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
