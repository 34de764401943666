"""A task's loss as one scalar, for plain torch loops."""

from typing import Any

from torch import Tensor

from distplat.strategies.task import Task


def mean_loss(task: Task, outputs: Any, targets: Any) -> Tensor:
    """Return the task's loss as a scalar; for `(sum, weight)` their ratio."""
    loss = task.loss(outputs, targets)
    return loss[0] / loss[1] if isinstance(loss, tuple) else loss
