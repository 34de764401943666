"""
Linear layers split by columns or rows, and embeddings split by vocabulary (Shoeybi et al. 2019).

    x --f--> x W[:, own columns] -> GELU -> h W[own rows, :] --g--> + bias, once
             colwise                        rowwise

A module stays the same object with the same name: its class becomes one of the classes below, and
its parameters become this rank's part.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from distplat.platform.errors import Problem, SpecError
from distplat.platform.tensor_slices import TensorSlice
from distplat.strategies.collective import Collective, gather_values
from distplat.strategies.tensor.exchange import (
    Bounds,
    TensorParallelRegion,
    copy_forward,
    gathered,
    scattered,
    sum_forward,
)
from distplat.strategies.tensor.parallel_plan import ShardSpec, slice_of


def take(whole: Tensor, spec: ShardSpec) -> Tensor:
    """Copy a rank's part of a full tensor, which has at least one dimension."""
    ranges = [whole.narrow(spec.dim, start, stop - start) for start, stop in spec.ranges()]
    return torch.cat(ranges, spec.dim) if len(ranges) > 1 else ranges[0].clone()


def tensor_slice_of(shape: Sequence[int], spec: ShardSpec | None) -> TensorSlice:
    """
    Return the position of a rank's part in the full tensor.

    Args:
        shape: of the part.
        spec: of the part; None: complete. Buffers of another rank's branch are complete, too.
    """
    if spec is None or not shape or shape[spec.dim] == spec.size:
        return TensorSlice(tuple(shape))
    full = (*shape[: spec.dim], spec.size, *shape[spec.dim + 1 :])
    return TensorSlice(full, (spec.dim, spec.start, spec.stop), blocks=spec.blocks)


def join_parts(parts: Sequence[Tensor], specs: Sequence[ShardSpec]) -> Tensor:
    """
    Merge the ranks' parts to the full tensor.

    Args:
        parts: one per rank.
        specs: of the parts.

    Raises:
        ValueError: the parts do not cover the full tensor.
    """
    for part, spec in zip(parts, specs, strict=True):
        if spec.whole:
            return part.clone()
    size, dim = specs[0].size, specs[0].dim
    if sum(spec.extent for spec in specs) != size:
        raise ValueError(f"parts {[s.ranges() for s in specs]} do not make up {size}")
    shape = list(parts[0].shape)
    shape[dim] = size
    whole = parts[0].new_empty(shape)
    for part, spec in zip(parts, specs, strict=True):
        pieces = torch.split(part, spec.stop - spec.start, dim) if spec.extent else ()
        for piece, (start, stop) in zip(pieces, spec.ranges(), strict=bool(pieces)):
            whole.narrow(dim, start, stop - start).copy_(piece)
    return whole


def gather_full(
    state: Mapping[str, Tensor], specs: Mapping[str, ShardSpec], group: Collective
) -> dict[str, Tensor]:
    """
    Gather full tensors on rank 0, one after the other. Every rank calls this.

    Args:
        state: the rank's tensors by name: its `state_dict`, or an optimizer's state under the names
            of the parameters. The same names in the same order on all ranks.
        specs: returned by `parallelize`; tensors without a spec are complete on every rank.
        group: the tensor group.

    Returns:
        All full tensors on rank 0, nothing on other ranks.

    Raises:
        CollectiveError: a rank is missing.
    """
    device = next(iter(state.values())).device if state else torch.device("cpu")
    gathered = gather_values({name: asdict(spec) for name, spec in specs.items()}, group, device)
    by_rank = [{name: ShardSpec(**fields) for name, fields in g.items()} for g in gathered]
    full: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if group.rank == 0:
            ranks = [specs_of_rank[name] for specs_of_rank in by_rank] if name in specs else []
            full[name] = _receive(tensor.detach(), ranks, group) if ranks else tensor.detach()
        elif name in specs and specs[name].extent:
            group.send(tensor.detach().contiguous(), 0)
    return full


def _receive(local: Tensor, specs: Sequence[ShardSpec], group: Collective) -> Tensor:
    parts = []
    for rank, spec in enumerate(specs):
        part = local
        if rank != 0:
            part = _empty_part(local, spec)
            if spec.extent:
                group.recv(part, rank)
        parts.append(part)
    return join_parts(parts, specs)


def _empty_part(local: Tensor, spec: ShardSpec) -> Tensor:
    """Allocate memory for another rank's part of the same tensor as `local`."""
    shape = list(local.shape)
    if shape:  # a branch's buffer may be a counter without dimensions
        shape[spec.dim] = spec.extent
    return local.new_empty(shape)


Parts = dict[str, ShardSpec]
"""The rank's part of each of a module's parameters, by their names in the module."""
_Module = TypeVar("_Module", bound=nn.Module)


def set_class(module: nn.Module, cls: type[_Module]) -> _Module:
    """Change the class of a module, in place."""
    module.__class__ = cls
    return cast(_Module, module)


class ColumnLinear(nn.Linear):
    """A rank's columns of a linear layer; the input is complete."""

    region: TensorParallelRegion
    bounds: Bounds
    gathers: bool
    """Whether the output is gathered; otherwise it stays split."""

    @override
    def forward(self, input: Tensor) -> Tensor:
        """[..., in] -> [..., own columns], or [..., out] if they are gathered."""
        if self.gathers:
            outputs = super().forward(copy_forward(input, self.region.group))
            return gathered(outputs, self.bounds, self.region.group)
        outputs = super().forward(self.region.enter(input))
        if self.training:
            self.region.begin(outputs.device)
        return outputs


def lone_columns(module: nn.Module) -> list[tuple[str, str]]:
    """
    Find split column layers with an unsplit sibling of the same size.

    Returns:
        Names of both: in a gated MLP, the plan probably omits one of the two layers.
    """
    pairs = []
    for prefix, parent in module.named_modules():
        children = parent.named_children()
        layers = [(f"{prefix}.{name}".strip("."), child) for name, child in children]
        for split, columns in layers:
            if isinstance(columns, ColumnLinear) and not columns.gathers:
                sizes = columns.in_features, columns.bounds[-1][1]
                pairs += [
                    (split, name)
                    for name, layer in layers
                    if type(layer) is nn.Linear and (layer.in_features, layer.out_features) == sizes
                ]
    return pairs


class RowLinear(nn.Linear):
    """A rank's rows of a linear layer; the input is a column layer's split output, or complete."""

    region: TensorParallelRegion
    bounds: Bounds
    title: str

    @override
    def forward(self, input: Tensor) -> Tensor:
        """[..., own rows] or [..., in] -> [..., out]."""
        width, size = input.shape[-1], self.bounds[-1][1]
        if width == size:
            input = scattered(input, self.bounds, self.region.group)
        elif width != self.in_features:
            raise ValueError(
                f"{self.title} (rowwise) has {self.in_features} of {size} inputs on this rank and "
                f"was given {width}: what comes before must be `colwise` or complete"
            )
        else:
            self.region.end()
        outputs = sum_forward(F.linear(input, self.weight).contiguous(), self.region.group)
        if self.bias is None:
            return outputs
        return outputs + self.bias.to(outputs.dtype)


class VocabularyEmbedding(nn.Embedding):
    """A rank's rows of an embedding: other ranks' rows are zeros, and the sum is complete."""

    region: TensorParallelRegion
    start: int
    """Number of the rank's first row."""
    size: int
    """Number of rows on all ranks."""

    @override
    def forward(self, input: Tensor) -> Tensor:
        """[...] indices -> [..., features]."""
        local = input - self.start
        on_other_rank = (local < 0) | (local >= self.num_embeddings)
        # An index that no rank has stays out of range, so that it raises as in `nn.Embedding`.
        invalid = (input < 0) | (input >= self.size)
        local = local.masked_fill(on_other_rank, 0).masked_fill(invalid, self.num_embeddings)
        rows = super().forward(local).masked_fill(on_other_rank.unsqueeze(-1), 0.0)
        return sum_forward(rows, self.region.group)


def split_columns(
    name: str,
    linear: nn.Module,
    region: TensorParallelRegion,
    *,
    gathers: bool = False,
    units: int | None = None,
    blocks: int = 1,
) -> Parts:
    """
    Split the columns of a linear layer.

    Args:
        name: in the model, for errors.
        linear: complete, the same on all ranks.
        region: of the model.
        gathers: gather the output.
        units: number of groups of columns that stay together; None: each column is a unit.
        blocks: number of equal blocks of columns, each of which is split.

    Raises:
        SpecError: not a linear layer, or more ranks than units.
    """
    layer = _check_type(name, linear, nn.Linear, "colwise")
    size = layer.out_features
    group = region.group
    ranks = range(group.world)
    specs = [slice_of(name, 0, units or size, size, r, group.world, blocks=blocks) for r in ranks]
    parts = {p: specs[group.rank] for p in ("weight", "bias") if getattr(layer, p) is not None}
    keep(layer, parts)
    layer.out_features = specs[group.rank].extent
    split = set_class(layer, ColumnLinear)
    split.region, split.gathers = region, gathers
    split.bounds = [(spec.start, spec.stop) for spec in specs]
    return parts


def split_rows(
    name: str, linear: nn.Module, region: TensorParallelRegion, *, units: int | None = None
) -> Parts:
    """
    Split the rows of a linear layer; the bias stays complete and is added once.

    Raises:
        SpecError: not a linear layer, or more ranks than units.
    """
    layer = _check_type(name, linear, nn.Linear, "rowwise")
    size, group = layer.in_features, region.group
    specs = [slice_of(name, 1, units or size, size, r, group.world) for r in range(group.world)]
    parts = {"weight": specs[group.rank]}
    keep(layer, parts)
    layer.in_features = specs[group.rank].extent
    split = set_class(layer, RowLinear)
    split.region, split.title = region, name
    split.bounds = [(spec.start, spec.stop) for spec in specs]
    return parts


def split_vocabulary(name: str, embedding: nn.Module, region: TensorParallelRegion) -> Parts:
    """
    Split the rows of an embedding.

    Raises:
        SpecError: not an embedding, an unsupported option, or more ranks than rows.
    """
    table = _check_type(name, embedding, nn.Embedding, "embedding")
    for option in ("max_norm", "scale_grad_by_freq", "sparse"):
        if getattr(table, option):
            text = f"{name}: an embedding with `{option}` cannot be split"
            raise SpecError(Problem((), text, "leave it out of the plan"))
    size, group = table.num_embeddings, region.group
    spec = slice_of(name, 0, size, size, group.rank, group.world)
    keep(table, {"weight": spec})
    table.num_embeddings = spec.extent
    if table.padding_idx is not None:
        is_local = spec.start <= table.padding_idx < spec.stop
        table.padding_idx = table.padding_idx - spec.start if is_local else None
    split = set_class(table, VocabularyEmbedding)
    split.region, split.start, split.size = region, spec.start, size
    return {"weight": spec}


def keep(module: nn.Module, parts: Parts) -> None:
    """Replace parameters by this rank's part; the memory of the full tensors is freed."""
    for name, spec in parts.items():
        whole = module._parameters[name]
        assert whole is not None
        part = take(whole.detach(), spec)
        module._parameters[name] = nn.Parameter(part, requires_grad=whole.requires_grad)


def _check_type(name: str, module: nn.Module, cls: type[_Module], style: str) -> _Module:
    """
    Check that a module has the class that a style splits, and its `forward`.

    Raises:
        SpecError: the module has another class, an overridden `forward` or a computed weight.
    """
    class_name = type(module).__name__
    if not isinstance(module, cls):
        text = f"{name} is a {class_name}, and `{style}` splits {cls.__name__}"
        inner = [*module.children()]
        raise SpecError(Problem((), text, "name the layer itself" if inner else "leave it whole"))
    if type(module).forward is not cls.forward or "weight" not in module._parameters:
        text = (
            f"{name} ({class_name}) computes otherwise than {cls.__name__}, so it cannot be split"
        )
        raise SpecError(Problem((), text, "leave it out of the plan"))
    return module
