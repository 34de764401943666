"""
How a group agrees where it is after workers were replaced, and brings all ranks there.

    rank   version           after
    0      7                 8        a survivor that had not finished the step in flight
    1      8  <- source      8        the newest: at one version all replicas have the same bits
    2      0                 8        a new worker

Replicas differ by at most the step in flight, and a step once made on one rank has had everybody's
gradients; so the newest version is right and complete, and nothing older is needed. At version 0
the first rank that has it gives its initial parameters, and no optimizer remembers anything yet.
"""

import json

import torch
from torch import Tensor

from distplat.platform.errors import StateLost
from distplat.strategies.collective import Collective
from distplat.strategies.training.flat import TORN, FlatModel
from distplat.strategies.training.object_collectives import broadcast_bytes
from distplat.strategies.training.optim import LocalOptimizer
from distplat.strategies.training.state_transfer import (
    broadcast_bits,
    broadcast_slots,
    untrained_slots,
)


def take_over_newest(
    flat: FlatModel, optimizer: LocalOptimizer, group: Collective, base: int = 0
) -> int:
    """
    Give every rank the newest rank's model and optimizer state, bit for bit.

    Args:
        flat: this rank's model; its `version` says what it is worth.
        optimizer: its optimizer, fresh or with what goes with that version.
        group: all ranks; each calls this.
        base: steps of the newest checkpoint.

    Returns:
        The version that all ranks now have.

    Raises:
        CollectiveError: a rank is missing.
        StateLost: who had the newest version is gone, and a checkpoint is newer than the rest.
    """
    device = flat.params.device
    versions = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(group.world)]
    group.all_gather(versions, torch.tensor([flat.version], device=device))
    all_versions = [int(v) for v in versions]
    newest = max(all_versions)
    if newest == min(all_versions) > 0:
        return newest  # nobody is new: a failure of the network alone
    if newest < base:
        raise StateLost(f"the state after step {base} and later")
    source = all_versions.index(newest)
    if group.rank != source:
        flat.version = TORN  # incomplete until the copy has finished
    group.broadcast(flat.params, source)
    _share_thawed(flat, source, group)
    broadcast_slots(untrained_slots(flat.model), source, group, device)
    if newest > 0:
        optimizer.load(_broadcast_state(optimizer.state(), source, group, device))
    flat.version = newest
    return newest


def _share_thawed(flat: FlatModel, source: int, group: Collective) -> None:
    """Have the same frozen parameters take part in training as on the source."""
    if flat.active.size:
        active = torch.from_numpy(flat.active.astype("uint8")).to(flat.params.device)
        group.broadcast(active, source)
        if group.rank != source:
            flat.take_over_tail(active.cpu().numpy().astype(bool))


def _broadcast_state(
    state: dict[str, Tensor], source: int, group: Collective, device: torch.device
) -> dict[str, Tensor]:
    """Copy the source's tensors to all, whatever the others have: a new worker has none yet."""
    kinds = [(name, str(t.dtype).split(".")[1], [*t.shape]) for name, t in state.items()]
    text = broadcast_bytes(json.dumps(kinds).encode(), source, group, device)
    received = {}
    for name, dtype, shape in json.loads(text):
        if group.rank == source:
            received[name] = state[name].to(device)
        else:
            received[name] = torch.empty(shape, dtype=getattr(torch, dtype), device=device)
        broadcast_bits(received[name], source, group)
    return received
