"""Embedding tables of a reference: dense parameters whose gradients are sparse, under torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from distplat.platform.embeddings import Embeddings
from distplat.platform.table_plan import TableSpec
from distplat.strategies.sparse.modules import Sharded, tables_of
from distplat.strategies.sparse.rows import initial_rows
from distplat.strategies.task import Task

KEPT = "_rows_of_reference"
"""Attribute of the task that keeps the tables."""


class TorchRowWiseAdagrad(torch.optim.Optimizer):
    """Adagrad with one number of state for each row; torch has none."""

    def __init__(
        self, params: Iterable[Tensor], lr: float, initial_accumulator_value: float, eps: float
    ) -> None:
        defaults = {"lr": lr, "first": initial_accumulator_value, "eps": eps}
        super().__init__(list(params), defaults)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update the rows that have a gradient."""
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                gradient = weight.grad.coalesce()
                rows, values = gradient.indices()[0], gradient.values()
                state = self.state[weight]
                sums = state.setdefault("sum", weight.new_full((len(weight), 1), group["first"]))
                sums[rows] += values.square().mean(1, keepdim=True)
                weight[rows] -= group["lr"] * values / (sums[rows].sqrt() + group["eps"])


def row_optimizer(spec: Embeddings) -> Callable[[Iterable[Tensor]], torch.optim.Optimizer]:
    """Give what makes the optimizer of rows that a job names."""
    options = spec.optimizer.model_dump(exclude={"name"})
    if spec.optimizer.name == "RowWiseAdagrad":
        return partial(TorchRowWiseAdagrad, **options)
    return partial(getattr(torch.optim, spec.optimizer.name), **options)


def with_rows(task: Task, seed: int) -> Task:
    """Have a task's model find its rows in tables that the task keeps."""
    whole: Any = task
    original = whole.model

    def model() -> nn.Module:
        built: nn.Module = original()
        setattr(whole, KEPT, _Rows(built, seed))
        return built

    whole.model = model
    return task


class _Rows(nn.Module):
    """All tables of a model, with the first values that servers give them."""

    def __init__(self, model: nn.Module, seed: int) -> None:
        super().__init__()
        self.weights = nn.ParameterList()
        for name, module in tables_of(model).items():
            rows, width = module.num_embeddings, module.embedding_dim
            if rows is None:
                raise ValueError(f"{name} has no num_embeddings: no plain table can stand for it")
            spec = TableSpec(name, rows, width, module.init_std, module.whole)
            values = initial_rows(spec, seed, np.arange(rows))
            self.weights.append(nn.Parameter(torch.from_numpy(values)))
            module.source = _Source(self.weights[-1])


class _Source:
    """One table's rows (see `RowSource`)."""

    def __init__(self, weight: Tensor) -> None:
        self._weight = weight

    def rows(self, module: Sharded, ids: Tensor) -> tuple[Tensor, Tensor | None]:
        """See `RowSource`."""
        found = nn.functional.embedding(ids, self._weight, sparse=True)
        if module.padding_idx is not None:
            found = found * (ids != module.padding_idx).unsqueeze(1)
        return found, None
