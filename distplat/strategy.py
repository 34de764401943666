"""
The API for custom strategies (docs/own_strategies.md).

Names are imported on first use. The names of the driver's half (`Strategy`, `Options`, `Roles`,
...) do not import torch, the others do.
"""

from importlib import import_module
from typing import TYPE_CHECKING

_MODULES = {
    "Consistency": "distplat.platform.spec",
    "Problem": "distplat.platform.errors",
    "StopOrder": "distplat.platform.stop_order",
    "Job": "distplat.platform.spec",
    "register": "distplat.strategies.catalog",
    "GroupSpec": "distplat.strategies.strategy_spec",
    "Options": "distplat.strategies.strategy_spec",
    "Roles": "distplat.strategies.strategy_spec",
    "Strategy": "distplat.strategies.strategy_spec",
    "Collective": "distplat.strategies.collective",
    "Handle": "distplat.strategies.collective",
    "ReduceOp": "distplat.strategies.collective",
    "Pushed": "distplat.strategies.ports",
    "Shards": "distplat.strategies.ports",
    "CheckpointPart": "distplat.strategies.checkpoint.checkpoint_types",
    "StepControl": "distplat.strategies.loop.control",
    "sum_heads": "distplat.strategies.loop.control",
    "FlatModel": "distplat.strategies.model.flat",
    "LocalOptimizer": "distplat.strategies.model.optim",
    "model_part": "distplat.strategies.checkpoint.parts",
    "optimizer_part": "distplat.strategies.checkpoint.parts",
    "server_part": "distplat.strategies.checkpoint.parts",
    "with_average": "distplat.strategies.model.ema",
    "Context": "distplat.strategies.worker_strategy",
    "WorkerStrategy": "distplat.strategies.worker_strategy",
}

__all__ = [
    "CheckpointPart",
    "Collective",
    "Consistency",
    "Context",
    "FlatModel",
    "GroupSpec",
    "Handle",
    "Job",
    "LocalOptimizer",
    "Options",
    "Problem",
    "Pushed",
    "ReduceOp",
    "Roles",
    "Shards",
    "StepControl",
    "StopOrder",
    "Strategy",
    "WorkerStrategy",
    "model_part",
    "optimizer_part",
    "register",
    "server_part",
    "sum_heads",
    "with_average",
]

if TYPE_CHECKING:
    from distplat.platform.errors import Problem
    from distplat.platform.spec import Consistency, Job
    from distplat.platform.stop_order import StopOrder
    from distplat.strategies.catalog import register
    from distplat.strategies.checkpoint.checkpoint_types import CheckpointPart
    from distplat.strategies.checkpoint.parts import model_part, optimizer_part, server_part
    from distplat.strategies.collective import Collective, Handle, ReduceOp
    from distplat.strategies.loop.control import StepControl, sum_heads
    from distplat.strategies.model.ema import with_average
    from distplat.strategies.model.flat import FlatModel
    from distplat.strategies.model.optim import LocalOptimizer
    from distplat.strategies.ports import Pushed, Shards
    from distplat.strategies.strategy_spec import GroupSpec, Options, Roles, Strategy
    from distplat.strategies.worker_strategy import Context, WorkerStrategy


def __getattr__(name: str) -> object:
    """Import the module of a name on first use (PEP 562)."""
    if name not in _MODULES:
        raise AttributeError(f"module 'distplat.strategy' has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)
