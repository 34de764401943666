"""The tensors of a model that a forward may write: detection of writes, and copies."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from distplat.strategies.checkpoint.state_sync import ModuleSlot, cat_bytes, slots_of
from distplat.strategies.collective import Collective, ReduceOp
from distplat.strategies.model.parameter_layout import bits_of
from distplat.strategies.torch_compat import has_running_statistics


def is_capped(module: nn.Module) -> bool:
    """Return whether a lookup in this module may rescale rows of its table."""
    return isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.max_norm is not None


class CappedTables:
    """
    Embedding tables with `max_norm`, whose lookups rescale rows in a copy.

    Args:
        model: its embeddings with `max_norm` have their `forward` replaced until `close`.
    """

    def __init__(self, model: nn.Module) -> None:
        self._layers = [layer for layer in model.modules() if is_capped(layer)]
        self._values: dict[int, Tensor] = {}  #: by layer, the table with rescaled rows
        for number, layer in enumerate(self._layers):
            layer.forward = partial(self._look_up, number, layer)

    def close(self) -> None:
        """Restore the layers' own `forward`."""
        for layer in self._layers:
            layer.__dict__.pop("forward", None)

    def clear(self) -> None:
        """Discard the rescaled rows."""
        self._values.clear()

    def write(self, group: Collective | None) -> None:
        """
        Write the rows rescaled by all ranks into the tables, and wait until all ranks have done so.

        Raises:
            CollectiveError: a rank is missing.
        """
        for number, layer in enumerate(self._layers):
            table = layer.get_parameter("weight").detach()
            values = self._values.get(number, table)
            if group is not None and group.world > 1:
                values = merge_first_written(values, table, group)
            if group is None or group.rank == 0:
                table.copy_(values)
        self._values.clear()
        if group is not None:
            group.barrier()

    def _look_up(self, number: int, layer: nn.Module, *inputs: Any, **named: Any) -> Any:
        table = layer.get_parameter("weight")
        copy = table.clone()
        layer._parameters["weight"] = copy  # type: ignore[assignment]
        try:
            outputs = type(layer).forward(layer, *inputs, **named)
        finally:
            layer._parameters["weight"] = table
        scaled, before = copy.detach(), self._values.get(number)
        if before is not None:
            scaled = torch.where(scaled != table.detach(), scaled, before)
        self._values[number] = scaled.clone()
        return outputs


def merge_first_written(now: Tensor, before: Tensor, group: Collective) -> Tensor:
    """
    Return each element as written by the first rank that changed it; equal on all ranks.

    Args:
        now: this rank's values.
        before: previous values, equal on all ranks and of the same shape.
        group: all of its ranks call this.
    """
    values, old = now.contiguous().view(-1), before.contiguous().view(-1)
    return _merge(values, values != old, old, group).view(now.shape)


def copy_first_writer(now: Tensor, group: Collective, *, wrote: bool) -> Tensor:
    """Return the whole tensor of the first rank with `wrote`; needs no previous values."""
    values = now.contiguous().view(-1)
    changed = torch.full(values.shape, wrote, device=values.device)
    return _merge(values, changed, values, group).view(now.shape)


def _merge(values: Tensor, changed: Tensor, old: Tensor, group: Collective) -> Tensor:
    owner = torch.full(values.shape, group.world, dtype=torch.int32, device=values.device)
    owner[changed] = group.rank
    group.all_reduce(owner, ReduceOp.MIN)
    owned = torch.where(owner == group.rank, values, torch.zeros_like(values))
    group.all_reduce(owned)
    return torch.where(owner < group.world, owned, old)


BufferRule = Literal["rank0", "mean", "local", "written"]
"""How ranks synchronize a tensor that a forward wrote; `written`: see `model_state.py`."""
_CHOICES = ("rank0", "mean", "local")
_TINY_BYTES = 1 << 16
_SMALL_BYTES = 1 << 20
"""Maximum size of frozen parameters that are copied from the start, not only once they change."""


class WatchedTensor:
    """
    A tensor of the model, and copies of its values.

    Args:
        slot: location of the tensor.
        rule: how ranks synchronize the tensor while no gradient trains it.
        copied: whether it is copied from the start, to repeat a step.
        capped: whether it is the table of an embedding with `max_norm`.
        silent: whether writes may skip its version counter, as torch's batch norm does.
        chosen: whether the task chose the rule.
    """

    def __init__(
        self,
        slot: ModuleSlot,
        rule: BufferRule,
        *,
        copied: bool,
        capped: bool,
        silent: bool = False,
        chosen: bool = False,
    ) -> None:
        self.slot, self._rule, self.chosen = slot, rule, chosen
        self.copied, self.capped, self.silent = copied, capped, silent
        self.has_copy = False  #: whether `kept` is valid; the copy of a None buffer is None
        self.kept: Tensor | None = None  #: last copy
        self.before: Tensor | None = None  #: the copy before `kept`
        self.trained = False  #: whether gradients train the tensor; see `refresh`
        self.refresh()

    def refresh(self) -> None:
        """Update `trained`."""
        now = self.slot.tensor
        trainable = isinstance(now, nn.Parameter) or self._rule == "written"
        self.trained = now is not None and now.requires_grad and trainable

    @property
    def unfrozen(self) -> bool:
        """Whether the tensor was frozen at first and is trained now."""
        return self.trained and self._rule != "written"

    @property
    def rule(self) -> BufferRule:
        """How ranks synchronize the tensor; integers, such as counters, are never averaged."""
        if self.capped or self.trained:
            return "written"
        now = self.slot.tensor
        counts = now is not None and not (now.is_floating_point() or now.is_complex())
        return "rank0" if counts and self._rule == "mean" else self._rule

    def differs(self) -> bool:
        """Return whether the values differ from the copy; False without a copy."""
        now = self.slot.tensor
        if now is None or not self.has_copy:
            return self.has_copy and self.kept is not None
        if self.kept is not None:
            return not (
                self.slot.same_kind(self.kept) and torch.equal(bits_of(self.kept), bits_of(now))
            )
        return True

    def keep(self, *, changed: bool) -> None:
        """Copy the tensor; `changed`: its values may differ from the last copy."""
        if not changed and self.has_copy:
            self.before = self.kept
            return
        spare = self.before if self.before is not self.kept else None
        self.before = self.kept
        self.kept, self.has_copy = copy_into(self.slot.tensor, spare), True

    def drop_copy(self) -> None:
        """Stop copying: gradients train the tensor now, and updates are not reported here."""
        self.copied = self.has_copy = False
        self.kept = self.before = None

    def restore(self) -> None:
        """Restore the last copy."""
        self.slot.take(self.kept)


_COMPARED_STEPS = 3
"""Number of steps in which a written tensor is compared between ranks."""
_COMPARED_ELEMENTS = 1 << 20
"""Maximum number of compared elements of a tensor."""
_ROUNDINGS = 64
"""Tolerance in units of eps: the same computation may differ between processor types."""


class RankComparison:
    """Detects tensors that differ between ranks before one rank's values replace the others."""

    def __init__(self) -> None:
        self._compared_steps: Counter[str] = Counter()
        self._written: list[tuple[WatchedTensor, Tensor]] = []
        self._warned = False

    def note(self, written: Iterable[WatchedTensor]) -> None:
        """Copy the tensors that this rank's forward wrote, before they are synchronized."""
        if self._warned:
            return
        for watched in written:
            name, now = watched.slot.name, watched.slot.tensor
            if watched.chosen or now is None or self._compared_steps[name] == _COMPARED_STEPS:
                continue
            self._compared_steps[name] += 1
            self._written.append((watched, _head(now).clone()))

    def mismatch_warning(self) -> str | None:
        """
        Compare the copies of `note` with the synchronized values.

        Returns:
            A warning, at most once; None: the values are equal.
        """
        written, self._written = self._written, []
        differing = (
            watched.slot.name for watched, values in written if _differ(values, watched.slot.tensor)
        )
        name = next(differing, None)
        if name is None:
            return None
        self._warned = True
        return (
            f"each worker's forward writes other values into {name!r}, by its own samples or "
            "random numbers, and all continue with those of one worker, as under "
            "DistributedDataParallel: the result depends on the number of workers. "
            "distplat.all_gather() gives a forward the rows of all workers; the task's "
            "buffers(name) may give 'mean', or 'rank0' if it is meant so"
        )


def _head(tensor: Tensor) -> Tensor:
    """Return the first elements of a tensor, in one dimension."""
    return tensor.detach().reshape(-1)[:_COMPARED_ELEMENTS]


def _differ(values: Tensor, whole: Tensor | None) -> bool:
    """Return whether the first elements of a tensor differ by more than rounding errors."""
    if whole is None:
        return True
    others = _head(whole).to(values.device)
    if (values.shape, values.dtype) != (others.shape, others.dtype):
        return True
    exact = not values.is_floating_point() and not values.is_complex()
    if exact or values.itemsize < 2:  # torch has no arithmetic for one-byte floats
        return not torch.equal(bits_of(values), bits_of(others))
    allowed = _ROUNDINGS * torch.finfo(values.dtype).eps * others.abs().max() if len(others) else 0
    return bool(((values - others).abs() > allowed).any())


class TensorValues:
    """
    The values of tensors at one moment, to detect writes that version counters miss.

    Small tensors are copied into one tensor, large ones get a checksum: so thousands of tensors are
    compared quickly, and a large model is not copied.

    Args:
        slots: by number.
    """

    def __init__(self, slots: Mapping[int, ModuleSlot]) -> None:
        present = {number: slot for number, slot in slots.items() if slot.tensor is not None}
        self._small = {n: slot for n, slot in present.items() if _size(slot) <= _TINY_BYTES}
        self._large = {n: slot for n, slot in present.items() if n not in self._small}
        self._sums = {
            n: checksum(slot.tensor) for n, slot in self._large.items() if slot.tensor is not None
        }
        self._sizes = [_size(slot) for slot in self._small.values()]
        self._copy = self._pack()

    def differ(self) -> set[int]:
        """Return the numbers of tensors whose values have changed."""
        numbers = set()
        for number, slot in self._large.items():
            now = slot.tensor
            if now is None or checksum(now) != self._sums[number]:
                numbers.add(number)
        now_small = self._pack()
        if now_small is None or self._copy is None:
            return numbers | {n for n in self._small if now_small is not self._copy}
        if torch.equal(now_small, self._copy):
            return numbers
        pieces = zip(
            self._small,
            torch.split(now_small, self._sizes),
            torch.split(self._copy, self._sizes),
            strict=True,
        )
        return numbers | {number for number, new, old in pieces if not torch.equal(new, old)}

    def _pack(self) -> Tensor | None:
        """Return the small tensors' bytes; None: a size has changed, or there are no small ones."""
        slots = [*self._small.values()]
        if not slots or [_size(slot) for slot in slots] != self._sizes:
            return None
        tensors = [slot.tensor for slot in slots]
        first = tensors[0]
        assert first is not None, "its size was checked"
        return cat_bytes(tensors, first.device)


def _size(slot: ModuleSlot) -> int:
    return 0 if slot.tensor is None else slot.tensor.nbytes


class VersionCounters:
    """Detects tensors written since the last `renew`, by version counters and addresses."""

    def __init__(self, slots: Sequence[ModuleSlot]) -> None:
        self._slots = slots
        self._address_numbers: list[int] = []
        self._marked: tuple[list[int], list[int], list[int]] = [], [], []

    def renew(self, address_numbers: Sequence[int]) -> None:
        """Reset the detection; `address_numbers`: tensors whose address is also compared."""
        self._address_numbers = [*address_numbers]
        self._marked = self._current()

    def written(self) -> set[int]:
        """Return the numbers of written tensors."""
        now, marked = self._current(), self._marked
        if now == marked:
            return set()
        pairs = zip(
            zip(now[0], now[1], strict=True), zip(marked[0], marked[1], strict=True), strict=True
        )
        written = {number for number, (new, old) in enumerate(pairs) if new != old}
        addresses = zip(self._address_numbers, now[2], marked[2], strict=True)
        return written | {number for number, new, old in addresses if new != old}

    def _current(self) -> tuple[list[int], list[int], list[int]]:
        tensors = [slot.where.get(slot.key) for slot in self._slots]
        versions = [-1 if tensor is None else tensor._version for tensor in tensors]
        chosen = (tensors[number] for number in self._address_numbers)
        addresses = [0 if tensor is None else tensor.data_ptr() for tensor in chosen]
        return [id(tensor) for tensor in tensors], versions, addresses


def watch_tensors(
    model: nn.Module, choose: Callable[[str], str | None], extra: MutableMapping[str, Tensor]
) -> Iterator[WatchedTensor]:
    """
    Yield all tensors of the model once, in the same order on all ranks.

    Args:
        model: its parameters and buffers.
        choose: the task's `buffers`.
        extra: trained tensors outside the model, by name.
    """
    capped, running, averaged = set(), set(), set()
    for module in model.modules():
        if is_capped(module):
            capped.add(id(module.weight))
        elif has_running_statistics(module):
            statistics = {id(module.running_mean), id(module.running_var)} - {id(None)}
            running |= statistics
            averaged |= set() if isinstance(module, nn.SyncBatchNorm) else statistics
    for slot in slots_of(model):
        tensor = slot.tensor
        parameter, key = isinstance(tensor, nn.Parameter), id(tensor)
        rule: BufferRule = "written"
        chosen: str | None = None
        if not (parameter and tensor is not None and tensor.requires_grad):
            chosen = choose(slot.name)
            rule = _rule_of(chosen, slot.name, averaged=key in averaged)
        small = rule != "written" and tensor is not None and tensor.nbytes <= _SMALL_BYTES
        copied, silent = not parameter or key in capped or small, key in running
        flags = {"copied": copied, "capped": key in capped, "silent": silent}
        yield WatchedTensor(slot, rule, **flags, chosen=chosen is not None)
    for name in extra:
        yield WatchedTensor(ModuleSlot(extra, name, name), "written", copied=False, capped=False)


def _rule_of(chosen: str | None, name: str, *, averaged: bool) -> BufferRule:
    if chosen is None:
        return "mean" if averaged else "rank0"
    for rule in _CHOICES:
        if chosen == rule:
            return rule  # type: ignore[return-value]
    raise ValueError(f"buffers({name!r}) must give one of {_CHOICES} or None, got {chosen!r}")


def copy_into(value: Tensor | None, spare: Tensor | None) -> Tensor | None:
    """Copy a tensor, into `spare` if its shape and dtype match."""
    if value is None:
        return None
    if spare is None or (spare.shape, spare.dtype) != (value.shape, value.dtype):
        return value.detach().clone(memory_format=torch.contiguous_format)
    return spare.copy_(value.detach())


def checksum(tensor: Tensor) -> tuple[int, ...]:
    """Return a checksum that detects changed and moved elements, for any dtype."""
    flat = tensor.detach().contiguous().view(-1)
    size = 4 if flat.itemsize % 4 == 0 else 1
    words = flat.view(torch.int32 if size == 4 else torch.uint8)
    width = 256
    whole = words.numel() // width * width
    rows = words[:whole].view(-1, width)
    checksums = []
    for sums in (rows.sum(0, dtype=torch.int64), rows.sum(1, dtype=torch.int64), words[whole:]):
        weights = torch.arange(1, sums.numel() + 1, device=words.device)
        checksums.append(int((sums.long() * weights).sum()))
    return tuple(checksums)
