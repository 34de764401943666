"""The groups of a job's optimizer, compared with the model before its first step."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from distplat.platform.errors import SpecError
from distplat.platform.optimizer_checks import match_problems, shape_problems
from distplat.platform.optimizers import Optimizer
from distplat.strategies.sparse.modules import dense_parameters, tables_of


def check_groups(rule: Optimizer, model: nn.Module, extra: Mapping[str, Tensor]) -> None:
    """
    See that each pattern of the groups has parameters, and each optimizer those that it takes.

    Args:
        rule: the job's optimizer.
        model: the whole one.
        extra: trained parameters outside of it, by name.

    Raises:
        SpecError: names the groups.
    """
    if not rule.groups and not rule.whole:
        return
    named = dict(dense_parameters(model))
    first = {id(parameter): name for name, parameter in named.items()}
    again = model.named_parameters(remove_duplicate=False)
    others = {name: first[id(p)] for name, p in again if id(p) in first and name not in named}
    tables = {path: (path, f"{path}.table", f"{path}.weight") for path in tables_of(model)}
    problems = match_problems(rule, [*named, *extra], tables, others)
    every = {**named, **extra}.items()
    shapes = {name: p.shape for name, p in every if p.requires_grad and p.numel()}
    if problems := problems or shape_problems(rule, shapes):
        raise SpecError(*problems)
