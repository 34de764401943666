"""
Linear layers split by columns or rows, and embeddings split by vocabulary (Shoeybi et al. 2019).

    x --f--> x W[:, own columns] -> GELU -> h W[own rows, :] --g--> + bias, once
             colwise                        rowwise

A module stays the object that it was, at its place and under its name: its class becomes one of
those below, and its parameters the rank's part of them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
    """Give a part of a full tensor, of at least one dimension, as a tensor of its own."""
    ranges = [whole.narrow(spec.dim, start, stop - start) for start, stop in spec.ranges()]
    return torch.cat(ranges, spec.dim) if len(ranges) > 1 else ranges[0].clone()


def tensor_slice_of(shape: Sequence[int], spec: ShardSpec | None) -> TensorSlice:
    """
    Say where a rank's part lies in the full tensor.

    Args:
        shape: of the part.
        spec: what it is; None: complete. Buffers of a branch that is elsewhere are complete, too.
    """
    if spec is None or not shape or shape[spec.dim] == spec.size:
        return TensorSlice(tuple(shape))
    full = (*shape[: spec.dim], spec.size, *shape[spec.dim + 1 :])
    return TensorSlice(full, (spec.dim, spec.start, spec.stop), blocks=spec.blocks)


def join_parts(parts: Sequence[Tensor], specs: Sequence[ShardSpec]) -> Tensor:
    """
    Put a full tensor together.

    Args:
        parts: one per rank.
        specs: what each is of the full tensor.

    Raises:
        ValueError: the parts are not all of it.
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
    Put full tensors together on rank 0, one after the other. Every rank calls this.

    Args:
        state: the rank's tensors by name: those of its `state_dict`, or of an optimizer's state
            under the names of the parameters. The same names in the same order on all ranks.
        specs: what `parallelize` gave; a name that is not in it is complete on every rank.
        group: the tensor group.

    Returns:
        All tensors in full on rank 0, nothing elsewhere.

    Raises:
        CollectiveError: a rank is missing.
    """
    device = next(iter(state.values())).device if state else torch.device("cpu")
    every = gather_values({name: asdict(spec) for name, spec in specs.items()}, group, device)
    by_rank = [{name: ShardSpec(**fields) for name, fields in its.items()} for its in every]
    full: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if group.rank == 0:
            ranks = [specs_of_rank[name] for specs_of_rank in by_rank] if name in specs else []
            full[name] = _receive(tensor.detach(), ranks, group) if ranks else tensor.detach()
        elif name in specs and specs[name].extent:
            group.send(tensor.detach().contiguous(), 0)
    return full


def _receive(mine: Tensor, specs: Sequence[ShardSpec], group: Collective) -> Tensor:
    parts = []
    for rank, spec in enumerate(specs):
        part = mine
        if rank != 0:
            part = _room(mine, spec)
            if spec.extent:
                group.recv(part, rank)
        parts.append(part)
    return join_parts(parts, specs)


def _room(mine: Tensor, spec: ShardSpec) -> Tensor:
    """Give memory for another rank's part of the tensor of which `mine` is one."""
    shape = list(mine.shape)
    if shape:  # a counter among the buffers of a branch has none
        shape[spec.dim] = spec.extent
    return mine.new_empty(shape)


Parts = dict[str, ShardSpec]
"""What of a module's parameters the rank has, by their names in the module."""
_Module = TypeVar("_Module", bound=nn.Module)


def set_class(module: nn.Module, kind: type[_Module]) -> _Module:
    """Give a module another class; it stays the same object."""
    module.__class__ = kind
    return cast(_Module, module)


class ColumnLinear(nn.Linear):
    """A rank's columns of a linear layer; the input is complete."""

    region: TensorParallelRegion
    bounds: Bounds
    gathers: bool
    """Whether the output is put together, or left split."""

    def forward(self, input: Tensor) -> Tensor:
        """[..., in] -> [..., own columns], or [..., out] where they are put together."""
        if self.gathers:
            outputs = super().forward(copy_forward(input, self.region.group))
            return gathered(outputs, self.bounds, self.region.group)
        outputs = super().forward(self.region.enter(input))
        if self.training:
            self.region.begin(outputs.device)
        return outputs


def lone_columns(module: nn.Module) -> list[tuple[str, str]]:
    """
    Find layers whose columns are split beside others of their size that are whole.

    Returns:
        Names of both, as a plan of a gated MLP has them that leaves one of its two out.
    """
    pairs = []
    for prefix, parent in module.named_modules():
        layers = [(f"{prefix}.{own}".strip("."), one) for own, one in parent.named_children()]
        for split, columns in layers:
            if isinstance(columns, ColumnLinear) and not columns.gathers:
                sizes = columns.in_features, columns.bounds[-1][1]
                pairs += [
                    (split, name)
                    for name, one in layers
                    if type(one) is nn.Linear and (one.in_features, one.out_features) == sizes
                ]
    return pairs


class RowLinear(nn.Linear):
    """A rank's rows of a linear layer; the input is split as a column layer leaves it, or whole."""

    region: TensorParallelRegion
    bounds: Bounds
    title: str

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
    """A rank's rows of an embedding: zeros for those of others, and the sum is complete."""

    region: TensorParallelRegion
    start: int
    """Number of the rank's first row."""
    size: int
    """Rows on all ranks."""

    def forward(self, input: Tensor) -> Tensor:
        """[...] numbers of rows -> [..., features]."""
        own = input - self.start
        elsewhere = (own < 0) | (own >= self.num_embeddings)
        # A number that no rank has stays out of range: it is refused as in a whole embedding.
        nowhere = (input < 0) | (input >= self.size)
        own = own.masked_fill(elsewhere, 0).masked_fill(nowhere, self.num_embeddings)
        rows = super().forward(own).masked_fill(elsewhere.unsqueeze(-1), 0.0)
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
    Make a linear layer one of columns.

    Args:
        name: in the model, for errors.
        linear: complete, the same on all ranks.
        region: of the model.
        gathers: put the output together.
        units: columns that stay together are one unit; None: each is one.
        blocks: equal parts of the columns that are cut alike.

    Raises:
        SpecError: no linear layer, or more ranks than units.
    """
    layer = _plain(name, linear, nn.Linear, "colwise")
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
    Make a linear layer one of rows; its bias stays whole and is added once.

    Raises:
        SpecError: no linear layer, or more ranks than units.
    """
    layer = _plain(name, linear, nn.Linear, "rowwise")
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
    Make an embedding one of the rank's rows.

    Raises:
        SpecError: no embedding, one that cannot be split, or more ranks than rows.
    """
    table = _plain(name, embedding, nn.Embedding, "embedding")
    for option in ("max_norm", "scale_grad_by_freq", "sparse"):
        if getattr(table, option):
            text = f"{name}: an embedding with `{option}` cannot be split"
            raise SpecError(Problem((), text, "leave it out of the plan"))
    size, group = table.num_embeddings, region.group
    spec = slice_of(name, 0, size, size, group.rank, group.world)
    keep(table, {"weight": spec})
    table.num_embeddings = spec.extent
    if table.padding_idx is not None:
        here = spec.start <= table.padding_idx < spec.stop
        table.padding_idx = table.padding_idx - spec.start if here else None
    split = set_class(table, VocabularyEmbedding)
    split.region, split.start, split.size = region, spec.start, size
    return {"weight": spec}


def keep(module: nn.Module, parts: Parts) -> None:
    """Replace parameters by the rank's part of them; the rest of their memory is let go."""
    for name, spec in parts.items():
        whole = module._parameters[name]
        assert whole is not None
        part = take(whole.detach(), spec)
        module._parameters[name] = nn.Parameter(part, requires_grad=whole.requires_grad)


def _plain(name: str, module: nn.Module, kind: type[_Module], style: str) -> _Module:
    """
    Check that a module is what a style splits, and computes as it does.

    Raises:
        SpecError: it is something else, or has a `forward` or a weight of its own.
    """
    what = type(module).__name__
    if not isinstance(module, kind):
        text = f"{name} is a {what}, and `{style}` splits {kind.__name__}"
        inner = [*module.children()]
        raise SpecError(Problem((), text, "name the layer itself" if inner else "leave it whole"))
    if type(module).forward is not kind.forward or "weight" not in module._parameters:
        text = f"{name} ({what}) computes otherwise than {kind.__name__}, so it cannot be split"
        raise SpecError(Problem((), text, "leave it out of the plan"))
    return module
