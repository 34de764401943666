"""The job's optimizer over a flat vector: torch's own classes, our schedule and clipping."""

import inspect
import math
from collections.abc import Mapping

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
    _spare_the_compiler()
    parameter = nn.Parameter(vector)
    parameter.grad = gradient
    kind = getattr(torch.optim, spec.name)
    fused = {"fused": True} if spec.name in _FUSED and vector.is_floating_point() else {}
    optimizer: torch.optim.Optimizer = kind([parameter], **spec.arguments(), **fused)
    return optimizer


def step_optimizer(
    optimizer: torch.optim.Optimizer, job: Job, step: int, total_steps: int, scale: float = 1.0
) -> float:
    """Make the update of `step` at its learning rate, times `scale`; give the rate."""
    rate = job.optimizer.lr * factor(job.lr_schedule, step, total_steps) * scale
    for group in optimizer.param_groups:
        group["lr"] = rate
    with torch.no_grad():
        inspect.unwrap(type(optimizer).step)(optimizer)
    return rate


def _spare_the_compiler() -> None:
    """
    Keep torch from importing its compiler, which takes a second of every process's start.

    torch wraps the methods of its optimizers so that `torch.compile` leaves them alone, and imports
    the compiler when one is first called. Nobody compiles our update, so the wrapper is told that
    the plain method is what it looks for, and `step` is called without its wrapper. Should torch
    change this, the second is lost again and nothing else.
    """
    plain = inspect.unwrap(torch.optim.Optimizer.add_param_group)
    plain.__dict__.setdefault("__dynamo_disable", plain)


def state_of(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Give what an optimizer of `make_optimizer` remembers, by torch's names; not a copy."""
    states = optimizer.state_dict()["state"]
    return dict(states[0]) if states else {}


def load_state(optimizer: torch.optim.Optimizer, state: Mapping[str, Tensor]) -> None:
    """Take over what `state_of` an equal optimizer gave; copied."""
    if state:
        copies = {name: value.clone() for name, value in state.items()}
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": {0: copies}, "param_groups": groups})


class LocalOptimizer:
    """Optimizer over a worker's own parameters, for strategies that update in the worker."""

    def __init__(self, flat: FlatModel, job: Job, total_steps: int) -> None:
        self._flat, self._job, self._total = flat, job, total_steps
        self._optimizer = make_optimizer(job.optimizer, flat.params, flat.grads)
        self.bounds = (0, flat.size)  #: the run of the flat vector that it updates

    def state(self) -> dict[str, Tensor]:
        """Give what it can hand over to another rank: all of `memory`; not a copy."""
        return self.memory()

    def memory(self) -> dict[str, Tensor]:
        """Give what the optimizer remembers of its run, by torch's names; not a copy."""
        return state_of(self._optimizer)

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state` of an equal optimizer gave; copied."""
        load_state(self._optimizer, state)

    @property
    def state_bytes(self) -> int:
        """Memory that `state` takes."""
        return sum(value.nbytes for value in self.state().values())

    def step(self, step: int) -> None:
        """Clip as the job says and update; `flat.grads` holds the gradient of the global batch."""
        if self._job.clip_norm is not None:
            self._flat.grads.mul_(clip_factor(self._norm(), self._job.clip_norm))
        step_optimizer(self._optimizer, self._job, step, self._total)

    def _norm(self) -> float:
        """Give the 2-norm of the gradient of the whole model."""
        return math.sqrt(squared_norm(self._flat.grads))
