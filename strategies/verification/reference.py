"""
The reference of `distplat verify`: what a plain torch loop makes of a task.

Of distplat there are the task and which samples come when (`recipes.py`). Virtual ranks compute one
after the other, each on a model of its own, for models may count or remember.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from distplat.strategies.task import Task, has_step, step_of
from distplat.strategies.verification import recipes
from distplat.strategies.verification.recipes import Batches, MicroBatch, Recipe, Tensors, Trained

MakeTask = Callable[[], Task]


class Rank:
    """A virtual rank: its task, its model, and the tensors of both."""

    def __init__(self, make: MakeTask, seed: int) -> None:
        recipes.seed_all(seed)
        self.task = make()
        recipes.seed_all(seed)
        self.model = self.task.model()

    def named(self) -> Tensors:
        """Give parameters and buffers by name, each once; those that the task keeps come last."""
        tensors = [(name[1:], tensor) for name, tensor in tensors_of("", self.model)]
        for name, value in vars(self.task).items():
            tensors += tensors_of(f"task:{name}", value)
        names = {tensor: name for name, tensor in reversed(tensors)}
        return {name: tensor for name, tensor in tensors if names[tensor] == name}

    def snapshot(self) -> Tensors:
        """Copy the model's state, and what the task trains beside it."""
        named = [(n, t) for n, t in self.named().items() if not n.startswith(recipes.ROWS)]
        kept = [(n, t) for n, t in named if n.startswith("task:") and t.requires_grad]
        state = [*self.model.state_dict().items(), *kept]
        return {name: value.detach().clone() for name, value in state if isinstance(value, Tensor)}


def tensors_of(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """Find what may be trained or written in a model, or in an attribute of a task."""
    if isinstance(value, nn.Module):
        tensors = [*value.named_parameters(), *value.named_buffers()]
        yield from ((f"{name}.{path}", tensor) for path, tensor in tensors)
    elif isinstance(value, Tensor):
        yield from [(name, value)] if value.requires_grad and value.is_leaf else []
    elif isinstance(value, dict | list | tuple):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from tensors_of(f"{name}.{key}", item)


def train(make: MakeTask, schedule: Batches, recipe: Recipe, *, reverse: bool = False) -> Trained:
    """Train by the plain loop; `reverse`: sum backwards what is rounded otherwise."""
    ranks = [Rank(make, recipe.seed) for _ in schedule[0]]
    spread(ranks, ranks[0].named())
    recipes.seed_all(recipe.seed)
    data = recipes.numbered(ranks[0].task.train_data(), schedule, recipe.seed)
    parameters = ranks[0].named()  # with buffers: what has no gradient rests
    rows = {name: parameters[name] for name in parameters if name.startswith(recipes.ROWS)}
    dense = {name: one for name, one in parameters.items() if name not in rows}
    made = recipe.optimizer(ranks[0].task, dense)
    optimizers = [*made, *([recipe.rows([*rows.values()])] if rows else [])]
    trained, rounding = Trained({0: ranks[0].snapshot()}), 0.75 if reverse else 1.0
    for step, rate in zip(schedule, recipe.rates, strict=True):
        before = {name: tensor.detach().clone() for name, tensor in ranks[0].named().items()}
        sizes = [sum(len(forward.ids) for forward in forwards) for forwards in step]
        scale = rounding / sum(sizes)
        parts, terms = [], recipes.terms_of(ranks[0].task, data, step)
        for rank, forwards in zip(ranks, step, strict=True):
            rank.model.train()
            parts += [compute(rank, data, each, recipe, scale, trained, terms) for each in forwards]
        spread(ranks, settled(ranks, before, sizes))
        total = sum(weight for _, _, weight in parts)
        trained.losses.append(sum(loss for _, loss, _ in parts) / total if total else math.nan)
        for name, parameter in parameters.items():
            given = [gradients[name] for gradients, _, _ in parts if name in gradients]
            summed = reduce(torch.add, given[::-1] if reverse else given) if given else None
            parameter.grad = None if summed is None else summed * (sum(sizes) / total / rounding)
        trained.used.append({name for name, p in parameters.items() if p.grad is not None})
        if recipe.clip_norm is not None:
            nn.utils.clip_grad_norm_([*dense.values()], recipe.clip_norm)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate(group.setdefault("initial_lr", group["lr"]))
            optimizer.step()
            optimizer.zero_grad()
        spread(ranks, ranks[0].named())
        if (done := len(trained.losses)) % recipe.every == 0 or done == len(schedule):
            trained.states[done] = ranks[0].snapshot()
    return trained


def compute(
    rank: Rank, data: Any, forward: MicroBatch, recipe: Recipe, scale: float, to: Trained, of: Any
) -> tuple[Tensors, float, float]:
    """Give a micro-batch's gradients times `scale`, the sum of its loss, its weight."""
    if forward.seed is not None:
        recipes.seed_all(forward.seed)
    batch, kept = recipes.read(rank.task, data, forward)
    drawn = torch.get_rng_state()
    with torch.autocast("cpu", torch.bfloat16) if recipe.autocast else nullcontext():
        loss: Any = step_of(rank.task)(rank.model, batch)
    loss = loss["loss"] if isinstance(loss, Mapping) and has_step(rank.task) else loss
    loss = recipes.together(loss, of, len(forward.ids))
    to.draws |= not torch.equal(drawn, torch.get_rng_state())
    loss, weight = loss if isinstance(loss, tuple) else (loss * kept, kept)
    torch.autograd.backward(loss * scale)
    gradients = {}
    for name, tensor in rank.named().items():
        gradient, tensor.grad = tensor.grad, None
        if gradient is not None:
            gradients[name] = gradient if name.startswith(recipes.ROWS) else gradient.to_dense()
    return gradients, float(loss.detach()), float(weight)


@torch.no_grad()
def settled(ranks: Sequence[Rank], before: Tensors, sizes: Sequence[int]) -> Tensors:
    """Join what forwards wrote: the first rank's with samples; means of running statistics."""
    norms = [n for n, module in ranks[0].model.named_modules() if isinstance(module, _NormBase)]
    each = [(rank.named(), size) for rank, size in zip(ranks, sizes, strict=True) if size]
    joined = dict(each[0][0])
    for name, old in before.items():
        if joined[name].requires_grad:
            joined[name] = old
            for tensors, _ in reversed(each):
                joined[name] = torch.where(tensors[name] != old, tensors[name], joined[name])
        elif name.startswith(tuple(norms)) and name.endswith(("running_mean", "running_var")):
            means = [tensors[name] * (size / sum(sizes)) for tensors, size in each]
            joined[name] = torch.stack(means).sum(0)
    return joined


@torch.no_grad()
def spread(ranks: Sequence[Rank], values: Tensors) -> None:
    """Give all ranks the same tensors."""
    for rank in ranks:
        for name, tensor in rank.named().items():
            tensor.copy_(values[name].clone())
