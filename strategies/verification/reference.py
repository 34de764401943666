"""
The reference of `distplat verify`: what a plain torch loop makes of a task.

Of distplat there are the task and which samples come when (`plan.py`). Virtual ranks compute one
after the other, each on a model of its own, for models may count or remember.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from distplat.strategies.task import Task
from distplat.strategies.verification.plan import ROWS, Forward, Recipe, Schedule, read, seed_all

Named = dict[str, Tensor]


@dataclass
class Trained:
    """What came out; a run of the engine is brought into the same form."""

    states: dict[int, Named]
    """The model's state by steps done; of a run some may be missing, not the last."""
    losses: list[float] = field(default_factory=list)
    used: list[set[str]] = field(default_factory=list)
    """Of references, by step: parameters that had a gradient."""
    draws: bool = False
    """Of references: whether a forward drew random numbers."""


class Rank:
    """A virtual rank: its task, its model, and the tensors of both."""

    def __init__(self, make_task: Callable[[], Task], seed: int) -> None:
        seed_all(seed)
        self.task = make_task()
        seed_all(seed)
        self.model = self.task.model()

    def named(self) -> Named:
        """Give parameters and buffers by name, each once; those that the task keeps come last."""
        kept = {f"task.{name}": value for name, value in vars(self.task).items()}
        found: list[tuple[str, Any]] = []
        for prefix, module in {"": self.model, **kept}.items():
            if isinstance(module, nn.Module):
                tensors = [*module.named_parameters(), *module.named_buffers()]
                found += [(f"{prefix}.{name}".lstrip("."), tensor) for name, tensor in tensors]
        found += [(name, value) for name, value in kept.items() if isinstance(value, nn.Parameter)]
        names = {tensor: name for name, tensor in reversed(found)}
        return {name: tensor for name, tensor in found if names[tensor] == name}

    def snapshot(self) -> Named:
        """Copy the model's state."""
        state = self.model.state_dict().items()
        return {name: value.detach().clone() for name, value in state if isinstance(value, Tensor)}


def train(
    make_task: Callable[[], Task], schedule: Schedule, recipe: Recipe, *, reverse: bool = False
) -> Trained:
    """Train by the plain loop; `reverse`: sum backwards what is rounded otherwise."""
    ranks = [Rank(make_task, recipe.seed) for _ in schedule[0]]
    spread(ranks, ranks[0].named())
    seed_all(recipe.seed)
    data = ranks[0].task.train_data()
    named = ranks[0].named().items()
    parameters = {name: tensor for name, tensor in named if isinstance(tensor, nn.Parameter)}
    rows = {name: parameters[name] for name in parameters if name.startswith(ROWS)}
    dense = [parameters[name] for name in parameters if name not in rows]
    optimizers = [recipe.optimizer(dense), *([recipe.rows([*rows.values()])] if rows else [])]
    found = Trained({0: ranks[0].snapshot()})
    for step, factor in zip(schedule, recipe.factors, strict=True):
        before = {name: tensor.detach().clone() for name, tensor in ranks[0].named().items()}
        sizes = [sum(len(forward.ids) for forward in forwards) for forwards in step]
        size = sum(sizes)
        parts = []
        for rank, forwards in zip(ranks, step, strict=True):
            rank.model.train()
            parts += [compute(rank, data, each, size, recipe, reverse, found) for each in forwards]
        spread(ranks, settled(ranks, before, sizes))
        total = sum(weight for _, _, weight in parts)
        found.losses.append(sum(loss for _, loss, _ in parts) / total if total else math.nan)
        for name, parameter in parameters.items():
            given = [gradients[name] for gradients, _, _ in parts if name in gradients]
            total_of = reduce(torch.add, given[::-1] if reverse else given) if given else None
            parameter.grad = None if total_of is None else total_of * (size / total)
        found.used.append({name for name, p in parameters.items() if p.grad is not None})
        if recipe.clip_norm is not None:
            nn.utils.clip_grad_norm_(dense, recipe.clip_norm)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group.setdefault("initial_lr", group["lr"]) * factor
            optimizer.step()
            optimizer.zero_grad()
        spread(ranks, ranks[0].named())
        found.states[len(found.losses)] = ranks[0].snapshot()
    return found


def compute(
    rank: Rank, data: Any, forward: Forward, size: int, recipe: Recipe, rounded: bool, to: Trained
) -> tuple[Named, float, float]:
    """Give a micro-batch's gradients (of its sum over `size`), the sum of its loss, its weight."""
    if forward.seed is not None:
        seed_all(forward.seed)
    inputs, targets = read(data, forward)
    drawn = torch.get_rng_state()
    with torch.autocast("cpu", torch.bfloat16) if recipe.autocast else nullcontext():
        loss: Any = rank.task.loss(rank.model(inputs), targets)
    to.draws |= not torch.equal(drawn, torch.get_rng_state())
    loss, weight = loss if isinstance(loss, tuple) else (loss * len(forward.ids), len(forward.ids))
    scale = 0.75 if rounded else 1.0
    torch.autograd.backward(loss * (scale / size))
    gradients = {}
    for name, tensor in rank.named().items():
        gradient, tensor.grad = tensor.grad, None
        if gradient is not None:
            gradients[name] = (gradient if name.startswith(ROWS) else gradient.to_dense()) / scale
    return gradients, float(loss.detach()), float(weight)


@torch.no_grad()
def settled(ranks: Sequence[Rank], before: Named, sizes: Sequence[int]) -> Named:
    """
    Join what forwards wrote: buffers and frozen parameters are the first rank's with samples.

    Running statistics are means over samples, elements of parameters the first rank's that wrote.
    """
    norms = [n for n, module in ranks[0].model.named_modules() if isinstance(module, _NormBase)]
    each = [(rank.named(), size) for rank, size in zip(ranks, sizes, strict=True) if size]
    found = dict(each[0][0])
    for name, old in before.items():
        if found[name].requires_grad:
            found[name] = old
            for tensors, _ in reversed(each):
                found[name] = torch.where(tensors[name] != old, tensors[name], found[name])
        elif name.startswith(tuple(norms)) and name.endswith(("running_mean", "running_var")):
            means = [tensors[name] * (size / sum(sizes)) for tensors, size in each]
            found[name] = torch.stack(means).sum(0)
    return found


@torch.no_grad()
def spread(ranks: Sequence[Rank], values: Named) -> None:
    """Give all ranks the same tensors."""
    for rank in ranks:
        for name, tensor in rank.named().items():
            tensor.copy_(values[name].clone())
