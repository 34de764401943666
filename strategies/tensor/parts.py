"""
From full tensors to the ranks' parts of them, and back: to load and to save a split model.

    full    | q q q q | k k k k | v v v v |        3 blocks
    rank 0  | q q | k k | v v |                    take
    rank 1  | q q | k k | v v |                    join puts them back
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict

import torch
from torch import Tensor

from distplat.platform.tensor_slices import TensorSlice
from distplat.strategies.collective import Collective
from distplat.strategies.tensor.plan import ShardSpec
from distplat.strategies.training.object_collectives import gather_bytes


def take(whole: Tensor, spec: ShardSpec) -> Tensor:
    """Give a part of a full tensor, of at least one dimension, as a tensor of its own."""
    ranges = [whole.narrow(spec.dim, start, stop - start) for start, stop in spec.ranges()]
    return torch.cat(ranges, spec.dim) if len(ranges) > 1 else ranges[0].clone()


def place_of(shape: Sequence[int], spec: ShardSpec | None) -> TensorSlice:
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


def join(parts: Sequence[Tensor], specs: Sequence[ShardSpec]) -> Tensor:
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
    state: Mapping[str, Tensor], specs: Mapping[str, ShardSpec], group: Collective, to: int = 0
) -> dict[str, Tensor]:
    """
    Put full tensors together on one rank, one after the other. Every rank calls this.

    Args:
        state: the rank's tensors by name: those of its `state_dict`, or of an optimizer's state
            under the names of the parameters. The same names in the same order on all ranks.
        specs: what `parallelize` gave; a name that is not in it is complete on every rank.
        group: the tensor group.
        to: the rank that gets them.

    Returns:
        All tensors in full on rank `to`, nothing elsewhere.

    Raises:
        CollectiveError: a rank is missing.
    """
    device = next(iter(state.values())).device if state else torch.device("cpu")
    told = json.dumps({name: asdict(spec) for name, spec in specs.items()}).encode()
    by_rank = [
        {name: ShardSpec(**fields) for name, fields in json.loads(said).items()}
        for said in gather_bytes(told, group, device)
    ]
    full: dict[str, Tensor] = {}
    for name, mine in state.items():
        if group.rank == to:
            ranks = [told[name] for told in by_rank] if name in specs else []
            full[name] = _receive(mine.detach(), ranks, group, to) if ranks else mine.detach()
        elif name in specs and specs[name].extent:
            group.send(mine.detach().contiguous(), to)
    return full


def _receive(mine: Tensor, specs: Sequence[ShardSpec], group: Collective, to: int) -> Tensor:
    parts = []
    for rank, spec in enumerate(specs):
        part = mine
        if rank != to:
            part = _room(mine, spec)
            if spec.extent:
                group.recv(part, rank)
        parts.append(part)
    return join(parts, specs)


def _room(mine: Tensor, spec: ShardSpec) -> Tensor:
    """Give memory for another rank's part of the tensor of which `mine` is one."""
    shape = list(mine.shape)
    if shape:  # a counter among the buffers of a branch has none
        shape[spec.dim] = spec.extent
    return mine.new_empty(shape)
