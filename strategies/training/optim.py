"""The job's optimizer over a flat vector: torch's own classes, our schedule and clipping."""

import torch
from torch import Tensor, nn

from distplat.platform.learning_rate import factor
from distplat.platform.optimizers import Optimizer
from distplat.platform.spec import Job
from distplat.strategies.algorithms.reduce import clip_factor, squared_norm
from distplat.strategies.training.flat import FlatModel

_FUSED = {"SGD", "Adam", "AdamW", "Adagrad"}
"""Classes with a fused kernel on the CPU: one pass over memory instead of several."""


def make_optimizer(spec: Optimizer, vector: Tensor, gradient: Tensor) -> torch.optim.Optimizer:
    """
    Build a torch optimizer whose single parameter is `vector`, updated in place from `gradient`.

    Args:
        spec: name and arguments.
        vector: shape [n]; a shard or a whole model.
        gradient: shape [n].
    """
    parameter = nn.Parameter(vector)
    parameter.grad = gradient
    kind = getattr(torch.optim, spec.name)
    fused = {"fused": True} if spec.name in _FUSED and vector.is_floating_point() else {}
    optimizer: torch.optim.Optimizer = kind([parameter], **spec.arguments(), **fused)
    return optimizer


def step_optimizer(
    optimizer: torch.optim.Optimizer, job: Job, step: int, total_steps: int
) -> float:
    """Make the update of `step` at its learning rate; give the rate."""
    rate = job.optimizer.lr * factor(job.lr_schedule, step, total_steps)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    return rate


class LocalOptimizer:
    """Optimizer over a worker's own parameters, for strategies that update in the worker."""

    def __init__(self, flat: FlatModel, job: Job, total_steps: int) -> None:
        self._flat, self._job, self._total = flat, job, total_steps
        self._optimizer = make_optimizer(job.optimizer, flat.params, flat.grads)

    def step(self, step: int) -> None:
        """Clip as the job says and update; `flat.grads` holds the gradient of the global batch."""
        if self._job.clip_norm is not None:
            norm = squared_norm(self._flat.grads) ** 0.5
            self._flat.grads.mul_(clip_factor(norm, self._job.clip_norm))
        step_optimizer(self._optimizer, self._job, step, self._total)
