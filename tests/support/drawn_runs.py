"""A random task, trained in memory and in plain torch loops."""

from __future__ import annotations

from drawn_tasks import DrawnRun
from in_memory_engine import task_factory, to_trained
from local_run import train as train_in_memory

from distplat.strategies.verification.compare import Comparison, compare
from distplat.strategies.verification.recipes import ReferenceSamples, recipe_of, split_batches
from distplat.strategies.verification.reference import train
from distplat.strategies.verification.switched import Switches

TOLERANCE = 1e-9
"""Tolerance for float64, relative to a tensor's largest element; typical errors are below 1e-13."""
NARROW_TOLERANCE = 1e-5
"""Tolerance for tasks with a float32 layer."""


def train_and_compare(drawn: DrawnRun) -> Comparison:
    """Train in memory and in plain loops; return the comparison."""
    job, task_type = drawn.job(), drawn.task()
    task = lambda: task_factory(task_type)(Switches())  # noqa: E731
    schedule, recipe = (
        split_batches(job, ReferenceSamples(drawn.samples)),
        recipe_of(job, task_factory(task_type)(Switches())),
    )
    plain, reversed_order = (train(task, schedule, recipe, reverse=r) for r in (False, True))
    run = to_trained(job, train_in_memory(job, task_type))
    names = sorted(set().union(*plain.used))
    tolerance = NARROW_TOLERANCE if "narrow" in drawn.blocks else TOLERANCE
    return compare(run, plain, reversed_order, names, tolerance)
