"""
The reference of `distplat verify`: a plain torch loop that trains a task.

It uses only the task and the order of samples (`recipes.py`) of distplat. Virtual ranks compute in
sequence, each with its own model, since models may hold state.
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
        """Return parameters and buffers by name, each once; tensors of the task come last."""
        tensors = [(name[1:], tensor) for name, tensor in tensors_of("", self.model)]
        for name, value in vars(self.task).items():
            tensors += tensors_of(f"task:{name}", value)
        names = {tensor: name for name, tensor in reversed(tensors)}
        return {name: tensor for name, tensor in tensors if names[tensor] == name}

    def snapshot(self) -> Tensors:
        """Copy the model's state, and trained tensors of the task."""
        named = [(n, t) for n, t in self.named().items() if not n.startswith(recipes.ROWS)]
        task_tensors = [(n, t) for n, t in named if n.startswith("task:") and t.requires_grad]
        state = [*self.model.state_dict().items(), *task_tensors]
        return {name: value.detach().clone() for name, value in state if isinstance(value, Tensor)}


def tensors_of(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a model, or of a task's attribute, that may be trained or written."""
    if isinstance(value, nn.Module):
        tensors = [*value.named_parameters(), *value.named_buffers()]
        yield from ((f"{name}.{path}", tensor) for path, tensor in tensors)
    elif isinstance(value, Tensor):
        yield from [(name, value)] if value.requires_grad and value.is_leaf else []
    elif isinstance(value, dict | list | tuple):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from tensors_of(f"{name}.{key}", item)


def train(make: MakeTask, schedule: Batches, recipe: Recipe, *, reverse: bool = False) -> Trained:
    """Train by the plain loop; `reverse`: sum in reverse order, with other rounding."""
    ranks = [Rank(make, recipe.seed) for _ in schedule[0]]
    spread(ranks, ranks[0].named())
    recipes.seed_all(recipe.seed)
    data = recipes.load_stream(ranks[0].task.train_data(), schedule, recipe.seed)
    parameters = ranks[0].named()  # includes buffers, which have no gradients
    rows = {name: parameters[name] for name in parameters if name.startswith(recipes.ROWS)}
    dense = {name: tensor for name, tensor in parameters.items() if name not in rows}
    optimizers = [*recipe.optimizer(ranks[0].task, dense)]
    optimizers += [recipe.rows([*rows.values()])] if rows else []
    trained, rounding = Trained({0: ranks[0].snapshot()}), 0.75 if reverse else 1.0
    for step, rate in zip(schedule, recipe.rates, strict=True):
        before = {name: tensor.detach().clone() for name, tensor in ranks[0].named().items()}
        sizes = [sum(len(forward.ids) for forward in forwards) for forwards in step]
        scale = rounding / sum(sizes)
        parts, terms = [], recipes.terms_of(ranks[0].task, data, step)
        for rank, forwards in zip(ranks, step, strict=True):
            rank.model.train()
            parts += [
                compute(rank, data, micro, recipe, scale, trained, terms) for micro in forwards
            ]
        spread(ranks, merge_writes(ranks, before, sizes))
        total = sum(weight for _, _, weight in parts)
        trained.losses.append(sum(loss for _, loss, _ in parts) / total if total else math.nan)
        for name, parameter in parameters.items():
            grads = [gradients[name] for gradients, _, _ in parts if name in gradients]
            summed = reduce(torch.add, grads[::-1] if reverse else grads) if grads else None
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
    rank: Rank, data: Any, micro: MicroBatch, recipe: Recipe, scale: float, to: Trained, terms: Any
) -> tuple[Tensors, float, float]:
    """Return a micro-batch's gradients times `scale`, the sum of its loss, and its weight."""
    if micro.seed is not None:
        recipes.seed_all(micro.seed)
    batch, samples = recipes.load_batch(rank.task, data, micro)
    rng_state = torch.get_rng_state()
    with torch.autocast("cpu", torch.bfloat16) if recipe.autocast else nullcontext():
        loss: Any = step_of(rank.task)(rank.model, batch)
    loss = loss["loss"] if isinstance(loss, Mapping) and has_step(rank.task) else loss
    loss = recipes.merge_terms(loss, terms, len(micro.ids))
    to.draws |= not torch.equal(rng_state, torch.get_rng_state())
    loss, weight = loss if isinstance(loss, tuple) else (loss * samples, samples)
    torch.autograd.backward(loss * scale)
    gradients = {}
    for name, tensor in rank.named().items():
        gradient, tensor.grad = tensor.grad, None
        if gradient is not None:
            gradients[name] = gradient if name.startswith(recipes.ROWS) else gradient.to_dense()
    return gradients, float(loss.detach()) if samples else 0.0, float(weight)


@torch.no_grad()
def merge_writes(ranks: Sequence[Rank], before: Tensors, sizes: Sequence[int]) -> Tensors:
    """Merge writes of forwards: from the first rank with samples; running statistics averaged."""
    norms = [n for n, module in ranks[0].model.named_modules() if isinstance(module, _NormBase)]
    states = [(rank.named(), size) for rank, size in zip(ranks, sizes, strict=True) if size]
    merged = dict(states[0][0])
    for name, old in before.items():
        if merged[name].requires_grad:
            merged[name] = old
            for tensors, _ in reversed(states):
                merged[name] = torch.where(tensors[name] != old, tensors[name], merged[name])
        elif name.startswith(tuple(norms)) and name.endswith(("running_mean", "running_var")):
            means = [tensors[name] * (size / sum(sizes)) for tensors, size in states]
            merged[name] = torch.stack(means).sum(0)
    return merged


@torch.no_grad()
def spread(ranks: Sequence[Rank], values: Tensors) -> None:
    """Copy the same values to all ranks."""
    for rank in ranks:
        for name, tensor in rank.named().items():
            tensor.copy_(values[name].clone())
