"""
Distributed training of PyTorch models on Ray: one job file, four architectures.

Public names are imported on first use. `import distplat` is therefore cheap, and the command line
imports torch and Ray only when a command needs them. The code is in the four folders beside this
file, imported as `distplat.platform`, `.strategies`, `.actors` and `.cli`.
"""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_MODULES = {
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
    """Import the module of a public name on first use (PEP 562)."""
    if name == "nn":  # like `torch.nn`, available without an import of its own
        return import_module("distplat.nn")
    if name not in _MODULES:
        raise AttributeError(f"module 'distplat' has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)
