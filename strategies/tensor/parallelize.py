"""
Split a model's modules over a tensor group, by a plan.

    plan        blocks.*.mlp.up: colwise        names as they were; on rank 1 of 2:
                blocks.*.mlp.down: rowwise
    model       blocks.0.mlp.up    [64, 16]  -> [32, 16]     ShardSpec(0, 32, 64, 64)
                blocks.0.mlp.down  [16, 64]  -> [16, 32]     ShardSpec(1, 32, 64, 64)
                head               [10, 16]     [10, 16]     not in the plan: the same on all ranks

All ranks of the group are given the same inputs and have the same outputs. Gradients of what is not
split are the same bits on every rank, so replicas stay equal without an exchange.
"""

import functools
from collections import defaultdict
from collections.abc import Mapping

from torch import nn

from distplat.platform.errors import Problem, SpecError
from distplat.strategies.collective import Collective
from distplat.strategies.model.module_hooks import called_hooks, is_parametrized, tensor_hooks
from distplat.strategies.tensor.attention import SplitMultiheadAttention, split_heads
from distplat.strategies.tensor.branches import Branch, Branches, split_branches
from distplat.strategies.tensor.exchange import TensorParallelRegion
from distplat.strategies.tensor.parallel_layers import (
    ColumnLinear,
    Parts,
    RowLinear,
    VocabularyEmbedding,
    split_columns,
    split_rows,
    split_vocabulary,
)
from distplat.strategies.tensor.parallel_plan import ShardSpec, resolve, siblings


def parallelize(
    module: nn.Module, plan: Mapping[str, str], group: Collective, *, partial: bool = False
) -> dict[str, ShardSpec]:
    """
    Split a module in place. Every rank of the group calls this with the same module and plan.

    Args:
        module: a model or a pipeline stage, with values, the same on all ranks; of no use after an
            error.
        plan: pattern of module names -> style (`plan.STYLES`).
        group: the tensor group. With one rank the plan is checked and nothing is split.
        partial: the module is a part of the model: patterns may name nothing in it. Check the plan
            against the names of the whole model then, with `plan.resolve`.

    Returns:
        Which part of a tensor this rank has, by the names of parameters, and for branches of
        buffers too. What is not in it is complete on every rank.

    Raises:
        SpecError: the plan does not fit the module; holds every problem found.
    """
    modules = dict(module.named_modules())
    styles = resolve(plan, list(modules), partial=partial)
    _check_pairs(modules, styles)
    if group.world == 1:
        return {}
    _refuse_lost(modules, styles)
    tied = _tied(module)
    region = TensorParallelRegion(group)
    specs, branches = _split_all(modules, styles, region)
    _tie_again(module, tied, specs)
    for one in modules.values():
        if isinstance(one, nn.TransformerEncoderLayer):
            one.activation_relu_or_gelu = 0  # else evaluation takes a way past our layers
    module.register_forward_pre_hook(functools.partial(_reset, region, branches))
    return specs


def reconnect(module: nn.Module, group: Collective) -> None:
    """
    Go on with the group of another attempt, without what a forward that failed has left behind.

    Args:
        module: that `parallelize` was given.
        group: the same ranks, in the same order.
    """
    for one in module.modules():
        if isinstance(
            one, ColumnLinear | RowLinear | SplitMultiheadAttention | VocabularyEmbedding
        ):
            one.region.group = group
            one.region.forget()
        elif isinstance(one, Branch):
            one.around.region.group = group
            one.around.forget()


def _reset(region: TensorParallelRegion, branches: list[Branches], *_: object) -> None:
    """Leave nothing of the forward before, which may have failed; called before each."""
    region.forget()
    for one in branches:
        one.forget()


def _split_all(
    modules: Mapping[str, nn.Module], styles: Mapping[str, str], region: TensorParallelRegion
) -> tuple[dict[str, ShardSpec], list[Branches]]:
    """
    Split module after module.

    Raises:
        SpecError: holds every problem found.
    """
    specs: dict[str, ShardSpec] = {}
    branches: list[Branches] = []
    problems: list[Problem] = []
    for name, style in styles.items():
        if style != "branches":
            try:
                parts = _split(name, modules[name], style, region)
            except SpecError as error:
                problems += error.problems
            else:
                specs |= {f"{name}.{own}": spec for own, spec in parts.items()}
    grouped = siblings([name for name, style in styles.items() if style == "branches"])
    for names in grouped.values():
        try:
            around, parts = split_branches({name: modules[name] for name in names}, region)
        except SpecError as error:
            problems += error.problems
        else:
            branches.append(around)
            specs |= parts
    if problems:
        raise SpecError(*problems)
    return specs, branches


def _split(name: str, module: nn.Module, style: str, region: TensorParallelRegion) -> Parts:
    match style:
        case "colwise" | "colwise_gather":
            return split_columns(name, module, region, gathers=style == "colwise_gather")
        case "rowwise":
            return split_rows(name, module, region)
        case "embedding":
            return split_vocabulary(name, module, region)
        case "heads":
            return split_heads(name, module, region)
    raise AssertionError(style)


def _check_pairs(modules: Mapping[str, nn.Module], styles: Mapping[str, str]) -> None:
    """Refuse columns that nothing takes: a layer after them would see a part for the whole."""
    taken = {
        getattr(modules[name], "in_features", None)
        for name, style in styles.items()
        if style == "rowwise"
    }
    problems = [
        Problem(
            (),
            f"{name}: `colwise` leaves its {width} outputs split, and no `rowwise` layer takes "
            f"{width} inputs",
            "make the layer that uses them `rowwise`, or this one `colwise_gather`",
        )
        for name, style in styles.items()
        if style == "colwise"
        and (width := getattr(modules[name], "out_features", None)) not in taken
    ]
    if problems:
        raise SpecError(*problems)


def _refuse_lost(modules: Mapping[str, nn.Module], styles: Mapping[str, str]) -> None:
    """
    Refuse what hangs on layers to be sliced, where it would see a part for the whole.

    Branches are whole on the rank that has them; theirs are called by each rank, with one input.
    """
    problems = []
    hint = "leave the layer out of the plan, or take it off"
    for name, style in styles.items():
        whole = style == "branches"
        for own, one in modules[name].named_modules(prefix=name):
            if whole and own != name:
                continue
            kinds = called_hooks(one)
            if is_parametrized(one) and not whole:
                kinds.append("a parametrization")
            text = f"{own} ({type(one).__name__}) has {{}}, and `{style}` slices it"
            problems += [Problem((), text.format(kind), hint) for kind in kinds]
            parameters = [] if whole else one.named_parameters(own, recurse=False)
            for parameter, tensor in parameters:
                text = f"{parameter} has {{}}, and `{style}` slices it"
                problems += [Problem((), text.format(k), hint) for k in tensor_hooks(tensor)]
    if problems:
        raise SpecError(*problems)


def _tied(module: nn.Module) -> list[list[str]]:
    """Give the names of parameters that have several."""
    names: defaultdict[int, list[str]] = defaultdict(list)
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names[id(parameter)].append(name)
    return [several for several in names.values() if len(several) > 1]


def _tie_again(module: nn.Module, tied: list[list[str]], specs: dict[str, ShardSpec]) -> None:
    """
    Let parameters that were one tensor be one again.

    Raises:
        SpecError: they are not split alike.
    """
    problems = []
    for first, *others in tied:
        one = module.get_parameter(first)
        if all(module.get_parameter(other) is one for other in others):  # one module, two names
            if first in specs:
                specs |= dict.fromkeys(others, specs[first])
            continue
        parts = {name: specs.get(name) for name in (first, *others)}
        if len(set(parts.values())) > 1:
            text = f"{' and '.join(parts)} are one tensor, and the plan does not split them alike"
            hint = "an `embedding` and a `colwise_gather` layer go together; or leave both whole"
            problems.append(Problem((), text, hint))
            continue
        for other in others:
            home, _, own = other.rpartition(".")
            module.get_submodule(home)._parameters[own] = one
    if problems:
        raise SpecError(*problems)
