"""The loss of a task as a script would have it: one scalar."""

from typing import Any

from torch import Tensor

from distplat.strategies.task import Task


def mean_loss(task: Task, outputs: Any, targets: Any) -> Tensor:
    """Give the task's loss, a scalar; of `(sum, weight)` their ratio."""
    loss = task.loss(outputs, targets)
    return loss[0] / loss[1] if isinstance(loss, tuple) else loss
