"""The optimizer's parameter groups beside a model: see platform/parameter_groups.py."""

from collections.abc import Iterable

from torch import nn

from distplat.platform.errors import SpecError
from distplat.platform.optimizers import Optimizer
from distplat.platform.parameter_groups import match_problems
from distplat.strategies.sparse.modules import dense_parameters, tables_of


def check_groups(rule: Optimizer, model: nn.Module, extra: Iterable[str]) -> None:
    """
    See that each pattern of the groups has parameters, and none an embedding table.

    Args:
        rule: the job's optimizer.
        model: the whole one.
        extra: names of trained parameters outside of it.

    Raises:
        SpecError: names the groups.
    """
    if not rule.groups:
        return
    named = dict(dense_parameters(model))
    first = {id(parameter): name for name, parameter in named.items()}
    again = model.named_parameters(remove_duplicate=False)
    others = {name: first[id(p)] for name, p in again if id(p) in first and name not in named}
    tables = {path: (path, f"{path}.table", f"{path}.weight") for path in tables_of(model)}
    problems = match_problems(rule, [*named, *extra], tables, others)
    if problems:
        raise SpecError(*problems)
