"""
Split a model's modules over a tensor group, by a plan.

    plan        blocks.*.mlp.up: colwise        names as they were; on rank 1 of 2:
                blocks.*.mlp.down: rowwise
    model       blocks.0.mlp.up    [64, 16]  -> [32, 16]     ShardSpec(0, 32, 64, 64)
                blocks.0.mlp.down  [16, 64]  -> [16, 32]     ShardSpec(1, 32, 64, 64)
                head               [10, 16]     [10, 16]     not in the plan: the same on all ranks

All ranks of the group have the same inputs and outputs. Gradients of unsplit parameters have the
same bits on every rank, so these parameters stay equal without an exchange.
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
        module: a model or a pipeline stage, initialized equally on all ranks; unusable after an
            error.
        plan: pattern of module names -> style (`STYLES`).
        group: the tensor group. With one rank the plan is checked and nothing is split.
        partial: the module is a part of the model, in which patterns may match nothing. The caller
            checks the plan against the whole model with `resolve`.

    Returns:
        This rank's part of each split parameter, by name, and of the buffers of branches. All other
        tensors are complete on every rank.

    Raises:
        SpecError: the plan does not fit the module; contains all problems.
    """
    modules = dict(module.named_modules())
    styles = resolve(plan, list(modules), partial=partial)
    _check_pairs(modules, styles)
    if group.world == 1:
        return {}
    _refuse_hooks(modules, styles)
    tied = _tied_names(module)
    region = TensorParallelRegion(group)
    specs, branches = _split_all(modules, styles, region)
    _retie(module, tied, specs)
    for child in modules.values():
        if isinstance(child, nn.TransformerEncoderLayer):
            child.activation_relu_or_gelu = 0  # disables the fast path, which bypasses split layers
    module.register_forward_pre_hook(functools.partial(_reset, region, branches))
    return specs


def reconnect(module: nn.Module, group: Collective) -> None:
    """
    Use the group of another attempt, and discard the state of a failed forward.

    Args:
        module: split by `parallelize`.
        group: the same ranks, in the same order.
    """
    for child in module.modules():
        if isinstance(
            child, ColumnLinear | RowLinear | SplitMultiheadAttention | VocabularyEmbedding
        ):
            child.region.group = group
            child.region.forget()
        elif isinstance(child, Branch):
            child.branch_group.region.group = group
            child.branch_group.forget()


def _reset(region: TensorParallelRegion, branches: list[Branches], *_: object) -> None:
    """Discard the state of the previous forward, which may have failed; a forward pre-hook."""
    region.forget()
    for group in branches:
        group.forget()


def _split_all(
    modules: Mapping[str, nn.Module], styles: Mapping[str, str], region: TensorParallelRegion
) -> tuple[dict[str, ShardSpec], list[Branches]]:
    """
    Split all modules of the plan.

    Raises:
        SpecError: contains all problems.
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
            group, parts = split_branches({name: modules[name] for name in names}, region)
        except SpecError as error:
            problems += error.problems
        else:
            branches.append(group)
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
    """Refuse split outputs without a `rowwise` consumer: the next layer would see a part."""
    consumed = {
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
        and (width := getattr(modules[name], "out_features", None)) not in consumed
    ]
    if problems:
        raise SpecError(*problems)


def _refuse_hooks(modules: Mapping[str, nn.Module], styles: Mapping[str, str]) -> None:
    """
    Refuse hooks and parametrizations of layers to be split, which would see only a part.

    A branch is complete on its rank; only hooks of the branch module itself are refused.
    """
    problems = []
    hint = "leave the layer out of the plan, or take it off"
    for name, style in styles.items():
        whole = style == "branches"
        for path, child in modules[name].named_modules(prefix=name):
            if whole and path != name:
                continue
            found = called_hooks(child)
            if is_parametrized(child) and not whole:
                found.append("a parametrization")
            text = f"{path} ({type(child).__name__}) has {{}}, and `{style}` slices it"
            problems += [Problem((), text.format(hook), hint) for hook in found]
            parameters = [] if whole else child.named_parameters(path, recurse=False)
            for parameter, tensor in parameters:
                text = f"{parameter} has {{}}, and `{style}` slices it"
                problems += [Problem((), text.format(k), hint) for k in tensor_hooks(tensor)]
    if problems:
        raise SpecError(*problems)


def _tied_names(module: nn.Module) -> list[list[str]]:
    """Return the groups of names of shared parameters."""
    names: defaultdict[int, list[str]] = defaultdict(list)
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names[id(parameter)].append(name)
    return [group for group in names.values() if len(group) > 1]


def _retie(module: nn.Module, tied: list[list[str]], specs: dict[str, ShardSpec]) -> None:
    """
    Tie shared parameters again after the split.

    Raises:
        SpecError: the plan splits tied parameters differently.
    """
    problems = []
    for first, *others in tied:
        shared = module.get_parameter(first)
        if all(module.get_parameter(other) is shared for other in others):  # a shared module
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
            module.get_submodule(home)._parameters[own] = shared
    if problems:
        raise SpecError(*problems)
