"""How a group agrees where it is after workers were replaced, and brings all ranks there."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from distplat.platform.errors import StateLost
from distplat.strategies.collective import Collective, broadcast_value, gather_numbers
from distplat.strategies.model.flat import TORN, FlatModel
from distplat.strategies.model.optim import LocalOptimizer
from distplat.strategies.model.parameter_layout import dtype_name


@dataclass(frozen=True)
class ModuleSlot:
    """Where a module has a buffer or a parameter; a forward may put another tensor there."""

    where: MutableMapping[str, Any]
    """The module's own dictionary."""
    key: str
    name: str
    """Of the whole model."""

    @property
    def tensor(self) -> Tensor | None:
        """The present value."""
        tensor: Tensor | None = self.where.get(self.key)
        return tensor

    def same_kind(self, other: Tensor | None) -> bool:
        """Say whether a tensor could be copied into the one that is there."""
        now = self.tensor
        if now is None or other is None:
            return now is other
        return (now.shape, now.dtype) == (other.shape, other.dtype)

    def take(self, value: Tensor | None) -> None:
        """Take these values over, in place where possible."""
        now = self.tensor
        if now is None or value is None or not self.same_kind(value) or _overlaps(now):
            if isinstance(now, nn.Parameter) and value is not None:
                now.data = value.detach().clone()
            else:
                self.where[self.key] = value if value is None else value.detach().clone()
        elif now.data_ptr() != value.data_ptr():
            now.detach().copy_(value)


def _overlaps(tensor: Tensor) -> bool:
    """Whether elements share memory, as those of an expanded tensor: it cannot be written."""
    return any(
        stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True)
    )


def untrained_slots(model: nn.Module) -> list[ModuleSlot]:
    """Give buffers and frozen parameters, each once, in an order that is the same on all ranks."""
    return [
        slot
        for slot in slots_of(model)
        if not isinstance(slot.tensor, nn.Parameter) or not slot.tensor.requires_grad
    ]


def slots_of(model: nn.Module) -> list[ModuleSlot]:
    """Give all parameters and buffers, each once, in an order that is the same on all ranks."""
    slots, seen = [], set()
    for prefix, module in model.named_modules():
        for where in (module._parameters, module._buffers):
            for key, tensor in where.items():
                if tensor is None and where is module._parameters:
                    continue
                if tensor is None or id(tensor) not in seen:
                    seen.add(id(tensor))
                    slots.append(ModuleSlot(where, key, f"{prefix}.{key}" if prefix else key))
    return slots


def broadcast_slots(
    slots: Sequence[ModuleSlot], source: int, group: Collective, device: torch.device
) -> None:
    """
    Have the source's tensors on all ranks, whatever the others have there.

    Args:
        slots: the same on all ranks.
        source: a rank of the group.
        group: each of its ranks calls this.
        device: where the group's backend takes tensors.

    Raises:
        CollectiveError: a rank is missing.
    """
    if not slots:
        return
    kinds = [_kind(slot.tensor) for slot in slots]
    source_kinds = broadcast_value(kinds, source, group, device)
    for slot, kind in zip(slots, source_kinds, strict=True):
        if kind is None:
            slot.take(None)
            continue
        dtype, shape = getattr(torch, kind[0]), torch.Size(kind[1])
        now = slot.tensor
        if now is None or (now.dtype, now.shape) != (dtype, shape):
            now = torch.empty(shape, dtype=dtype, device=device)
        brought = now.detach().contiguous()
        broadcast_bits(brought, source, group)
        if group.rank != source:
            slot.take(brought)


def broadcast_bits(tensor: Tensor, source: int, group: Collective) -> None:
    """Broadcast a tensor of any dtype and layout as bytes."""
    if tensor.numel() == 0:
        return
    flat = tensor.detach().contiguous().view(-1)
    group.broadcast(flat.view(torch.uint8), source)
    if group.rank != source:
        tensor.detach().copy_(flat.view(tensor.shape))


def cat_bytes(tensors: Sequence[Tensor | None], device: torch.device) -> Tensor:
    """Put tensors of any dtypes behind each other, as bytes."""
    there = [t.detach().to(device) for t in tensors if t is not None]
    parts = [t.contiguous().view(-1).view(torch.uint8) for t in there]
    return torch.cat([torch.empty(0, dtype=torch.uint8, device=device), *parts])


def cut_bytes(together: Tensor, slots: Sequence[ModuleSlot]) -> Iterator[tuple[ModuleSlot, Tensor]]:
    """Give what `cat_bytes` put together, for the slots whose tensors have these kinds."""
    start = 0
    for slot in slots:
        now = slot.tensor
        if now is not None:
            piece = together[start : start + now.nbytes].clone()  # aligned for its dtype
            start += now.nbytes
            yield slot, piece.view(now.dtype).view(now.shape)


def _kind(tensor: Tensor | None) -> tuple[str, list[int]] | None:
    if tensor is None:
        return None
    return dtype_name(tensor), list(tensor.shape)


def take_over_newest(
    flat: FlatModel, optimizer: LocalOptimizer, group: Collective, checkpoint_step: int = 0
) -> int:
    """
    Give every rank the newest rank's model and optimizer state, bit for bit.

    Args:
        flat: this rank's model; its `version` says what it is worth.
        optimizer: its optimizer, fresh or with what goes with that version.
        group: all ranks; each calls this.
        checkpoint_step: steps of the newest checkpoint.

    Returns:
        The version that all ranks now have.

    Raises:
        CollectiveError: a rank is missing.
        StateLost: who had the newest version is gone, and a checkpoint is newer than the rest.
    """
    device = flat.params.device
    all_versions = [one for (one,) in gather_numbers([flat.version], group, device)]
    newest = max(all_versions)
    if newest == min(all_versions) > 0:
        return newest  # nobody is new: a failure of the network alone
    if newest < checkpoint_step:
        raise StateLost(f"the state after step {checkpoint_step} and later")
    source = all_versions.index(newest)
    if group.rank != source:
        flat.version = TORN  # incomplete until the copy has finished
    group.broadcast(flat.params, source)
    _share_unfrozen(flat, source, group)
    broadcast_slots(untrained_slots(flat.model), source, group, device)
    if newest > 0:
        optimizer.load(_broadcast_state(optimizer.state(), source, group, device))
    flat.version = newest
    return newest


def _share_unfrozen(flat: FlatModel, source: int, group: Collective) -> None:
    """Have the same frozen parameters take part in training as on the source."""
    if flat.active.size:
        active = torch.from_numpy(flat.active.astype("uint8")).to(flat.params.device)
        group.broadcast(active, source)
        if group.rank != source:
            flat.enable_tail(active.cpu().numpy().astype(bool))


def _broadcast_state(
    state: dict[str, Tensor], source: int, group: Collective, device: torch.device
) -> dict[str, Tensor]:
    """Copy the source's tensors to all, whatever the others have: a new worker has none yet."""
    kinds = [(name, dtype_name(t), [*t.shape]) for name, t in state.items()]
    received = {}
    for name, dtype, shape in broadcast_value(kinds, source, group, device):
        if group.rank == source:
            received[name] = state[name].to(device)
        else:
            received[name] = torch.empty(shape, dtype=getattr(torch, dtype), device=device)
        broadcast_bits(received[name], source, group)
    return received
