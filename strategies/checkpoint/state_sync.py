"""State synchronization after workers were replaced: all ranks get the newest rank's state."""

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
    """A module's buffer or parameter by its key; a forward may replace the tensor."""

    where: MutableMapping[str, Any]
    """The module's `_parameters` or `_buffers`."""
    key: str
    name: str
    """Name in the whole model."""

    @property
    def tensor(self) -> Tensor | None:
        """The current tensor."""
        tensor: Tensor | None = self.where.get(self.key)
        return tensor

    def same_kind(self, other: Tensor | None) -> bool:
        """Return whether a tensor has the shape and dtype of the current one."""
        current = self.tensor
        if current is None or other is None:
            return current is other
        return (current.shape, current.dtype) == (other.shape, other.dtype)

    def take(self, value: Tensor | None) -> None:
        """Set the slot to these values, in place where possible."""
        current = self.tensor
        if current is None or value is None or not self.same_kind(value) or _overlaps(current):
            if isinstance(current, nn.Parameter) and value is not None:
                current.data = value.detach().clone()
            else:
                self.where[self.key] = value if value is None else value.detach().clone()
        elif current.data_ptr() != value.data_ptr():
            current.detach().copy_(value)


def _overlaps(tensor: Tensor) -> bool:
    """Return whether elements share memory, as in an expanded tensor, which cannot be written."""
    return any(
        stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True)
    )


def untrained_slots(model: nn.Module) -> list[ModuleSlot]:
    """Return buffers and frozen parameters, each once, in the same order on all ranks."""
    return [
        slot
        for slot in slots_of(model)
        if not isinstance(slot.tensor, nn.Parameter) or not slot.tensor.requires_grad
    ]


def slots_of(model: nn.Module) -> list[ModuleSlot]:
    """Return all parameters and buffers, each once, in the same order on all ranks."""
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
    Broadcast the source's tensors to all ranks, whose tensors may have other shapes and dtypes.

    Args:
        slots: the same on all ranks.
        source: a rank of the group.
        group: the group; all its ranks call this.
        device: device of the group's backend.

    Raises:
        CollectiveError: a rank is missing.
    """
    if not slots:
        return
    specs = [_spec_of(slot.tensor) for slot in slots]
    source_specs = broadcast_value(specs, source, group, device)
    for slot, spec in zip(slots, source_specs, strict=True):
        if spec is None:
            slot.take(None)
            continue
        dtype, shape = getattr(torch, spec[0]), torch.Size(spec[1])
        tensor = slot.tensor
        if tensor is None or (tensor.dtype, tensor.shape) != (dtype, shape):
            tensor = torch.empty(shape, dtype=dtype, device=device)
        buffer = tensor.detach().contiguous()
        broadcast_bits(buffer, source, group)
        if group.rank != source:
            slot.take(buffer)


def broadcast_bits(tensor: Tensor, source: int, group: Collective) -> None:
    """Broadcast a tensor of any dtype and layout as bytes."""
    if tensor.numel() == 0:
        return
    flat = tensor.detach().contiguous().view(-1)
    group.broadcast(flat.view(torch.uint8), source)
    if group.rank != source:
        tensor.detach().copy_(flat.view(tensor.shape))


def cat_bytes(tensors: Sequence[Tensor | None], device: torch.device) -> Tensor:
    """Concatenate tensors of any dtypes, as bytes."""
    present = [t.detach().to(device) for t in tensors if t is not None]
    parts = [t.contiguous().view(-1).view(torch.uint8) for t in present]
    return torch.cat([torch.empty(0, dtype=torch.uint8, device=device), *parts])


def cut_bytes(packed: Tensor, slots: Sequence[ModuleSlot]) -> Iterator[tuple[ModuleSlot, Tensor]]:
    """Split the result of `cat_bytes` by the shapes and dtypes of the slots' tensors."""
    start = 0
    for slot in slots:
        tensor = slot.tensor
        if tensor is not None:
            piece = packed[start : start + tensor.nbytes].clone()  # clone to align for the dtype
            start += tensor.nbytes
            yield slot, piece.view(tensor.dtype).view(tensor.shape)


def _spec_of(tensor: Tensor | None) -> tuple[str, list[int]] | None:
    if tensor is None:
        return None
    return dtype_name(tensor), list(tensor.shape)


def take_over_newest(
    flat: FlatModel, optimizer: LocalOptimizer, group: Collective, checkpoint_step: int = 0
) -> int:
    """
    Copy the newest rank's model and optimizer state to all ranks, bit for bit.

    Args:
        flat: this rank's model with its `version`.
        optimizer: this rank's optimizer, new or with the state of that version.
        group: the group of all ranks; all of them call this.
        checkpoint_step: step of the newest checkpoint.

    Returns:
        The version that all ranks now have.

    Raises:
        CollectiveError: a rank is missing.
        StateLost: no rank has the newest version any more, and a checkpoint is newer.
    """
    device = flat.params.device
    all_versions = [version for (version,) in gather_numbers([flat.version], group, device)]
    newest = max(all_versions)
    if newest == min(all_versions) > 0:
        return newest  # no new worker: only the network had failed
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
    """Unfreeze the parameters that the source has unfrozen."""
    if flat.active.size:
        active = torch.from_numpy(flat.active.astype("uint8")).to(flat.params.device)
        group.broadcast(active, source)
        if group.rank != source:
            flat.enable_tail(active.cpu().numpy().astype(bool))


def _broadcast_state(
    state: dict[str, Tensor], source: int, group: Collective, device: torch.device
) -> dict[str, Tensor]:
    """Broadcast the source's tensors; other ranks need none: a new worker has no state yet."""
    specs = [(name, dtype_name(t), [*t.shape]) for name, t in state.items()]
    received = {}
    for name, dtype, shape in broadcast_value(specs, source, group, device):
        if group.rank == source:
            received[name] = state[name].to(device)
        else:
            received[name] = torch.empty(shape, dtype=getattr(torch, dtype), device=device)
        broadcast_bits(received[name], source, group)
    return received
