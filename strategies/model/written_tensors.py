"""The tensors of a model that a forward may write: which were written, and copies of them."""

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
    """Say whether a lookup in this module may scale rows of its table."""
    return isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.max_norm is not None


class CappedTables:
    """
    The tables of one worker's model.

    Args:
        model: its embeddings with `max_norm` get another `forward` until `close`.
    """

    def __init__(self, model: nn.Module) -> None:
        self._layers = [layer for layer in model.modules() if is_capped(layer)]
        self._values: dict[int, Tensor] = {}  #: by layer, the table as it should be
        for number, layer in enumerate(self._layers):
            layer.forward = partial(self._look_up, number, layer)

    def close(self) -> None:
        """Give the layers their own `forward` back."""
        for layer in self._layers:
            layer.__dict__.pop("forward", None)

    def forget(self) -> None:
        """Take nothing of what was scaled for good."""
        self._values.clear()

    def write(self, group: Collective | None) -> None:
        """
        Have the tables as all ranks' lookups leave them; returns when they are.

        Raises:
            CollectiveError: a rank is missing.
        """
        for number, layer in enumerate(self._layers):
            table = layer.get_parameter("weight").detach()
            values = self._values.get(number, table)
            if group is not None and group.world > 1:
                values = first_written(values, table, group)
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


def first_written(now: Tensor, before: Tensor, group: Collective) -> Tensor:
    """
    Give each element as the first rank left it that changed it; the same on all ranks.

    Args:
        now: this rank's values.
        before: what all ranks had, of the same shape.
        group: each of its ranks calls this.
    """
    values, old = now.contiguous().view(-1), before.contiguous().view(-1)
    return _merged(values, values != old, old, group).view(now.shape)


def first_writer(now: Tensor, group: Collective, *, wrote: bool) -> Tensor:
    """Give the whole tensor of the first rank that `wrote` it; for want of what it was before."""
    values = now.contiguous().view(-1)
    changed = torch.full(values.shape, wrote, device=values.device)
    return _merged(values, changed, values, group).view(now.shape)


def _merged(values: Tensor, changed: Tensor, old: Tensor, group: Collective) -> Tensor:
    owner = torch.full(values.shape, group.world, dtype=torch.int32, device=values.device)
    owner[changed] = group.rank
    group.all_reduce(owner, ReduceOp.MIN)
    owned = torch.where(owner == group.rank, values, torch.zeros_like(values))
    group.all_reduce(owned)
    return torch.where(owner < group.world, owned, old)


BufferRule = Literal["rank0", "mean", "local", "written"]
"""What ranks do with a tensor that a forward changed; `written`: see `model_state.py`."""
_CHOICES = ("rank0", "mean", "local")
_TINY_BYTES = 1 << 16
_SMALL_BYTES = 1 << 20
"""Frozen parameters up to this size have a copy from the start; larger ones once they change."""


class Watched:
    """
    One tensor of the model, and copies of it.

    Args:
        slot: where it is.
        rule: what ranks do with it while no gradient trains it.
        copied: whether there is a copy from the start, for a step that is repeated.
        capped: whether it is the table of an embedding with `max_norm`.
        silent: whether its version counter does not tell: torch's batch norm writes without it.
        chosen: whether the task said the rule.
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
        self.has_copy = False  #: `kept` is one, of a buffer that may be None
        self.kept: Tensor | None = None
        self.before: Tensor | None = None  #: what was kept before that
        self.trained = False  #: whether gradients train it; see `refresh`
        self.refresh()

    def refresh(self) -> None:
        """See whether gradients train it now."""
        now = self.slot.tensor
        known = isinstance(now, nn.Parameter) or self._rule == "written"
        self.trained = now is not None and now.requires_grad and known

    @property
    def unfrozen(self) -> bool:
        """Whether it was frozen at first, and gradients train it now."""
        return self.trained and self._rule != "written"

    @property
    def rule(self) -> BufferRule:
        """What ranks do with it; of whole numbers, such as counters, there is no mean."""
        if self.capped or self.trained:
            return "written"
        now = self.slot.tensor
        counts = now is not None and not (now.is_floating_point() or now.is_complex())
        return "rank0" if counts and self._rule == "mean" else self._rule

    def differs(self) -> bool:
        """Say whether the values are others than those kept; False: there is no copy."""
        now = self.slot.tensor
        if now is None or not self.has_copy:
            return self.has_copy and self.kept is not None
        if self.kept is not None:
            return not (
                self.slot.same_kind(self.kept) and torch.equal(bits_of(self.kept), bits_of(now))
            )
        return True

    def keep(self, *, changed: bool) -> None:
        """Remember it; `changed`: its values may be others than when it was kept last."""
        if not changed and self.has_copy:
            self.before = self.kept
            return
        spare = self.before if self.before is not self.kept else None
        self.before = self.kept
        self.kept, self.has_copy = copied_into(self.slot.tensor, spare), True

    def drop_copy(self) -> None:
        """Keep no copy any more: gradients train it, and whoever updates it need not say so."""
        self.copied = self.has_copy = False
        self.kept = self.before = None

    def restore(self) -> None:
        """Put back what was kept."""
        self.slot.take(self.kept)


_LOOKS = 3
"""Steps that write a tensor in which its values are compared."""
_COMPARED = 1 << 20
"""So many elements of each."""
_ROUNDINGS = 64
"""By so many ranks may differ that compute the same on processors of two kinds."""


class RankComparison:
    """Whether ranks compute of their own samples what all then have as one rank left it."""

    def __init__(self) -> None:
        self._looks: Counter[str] = Counter()
        self._own: list[tuple[Watched, Tensor]] = []
        self._told = False

    def note(self, written: Iterable[Watched]) -> None:
        """Copy what this rank's forward has written in this step, before it is replaced."""
        for one in written:
            name, now = one.slot.name, one.slot.tensor
            if not (self._told or one.chosen or now is None or self._looks[name] == _LOOKS):
                self._looks[name] += 1
                self._own.append((one, _beginning(now).clone()))

    def differing(self) -> str | None:
        """
        Compare what was noted with what all ranks have from now on.

        Returns:
            A warning, once; None: they are the same, or nobody asks.
        """
        own, self._own = self._own, []
        apart = (one.slot.name for one, values in own if _apart(values, one.slot.tensor))
        name = next(apart, None)
        if name is None:
            return None
        self._told = True
        return (
            f"each worker's forward writes other values into {name!r}, by its own samples or "
            "random numbers, and all go on with those of one worker, as under "
            "DistributedDataParallel: the result depends on the number of workers. "
            "distplat.all_gather() gives a forward the rows of all workers; the task's "
            "buffers(name) may give 'mean', or 'rank0' if it is meant so"
        )


def _beginning(tensor: Tensor) -> Tensor:
    """Give the first elements of a tensor, in one dimension."""
    return tensor.detach().reshape(-1)[:_COMPARED]


def _apart(values: Tensor, whole: Tensor | None) -> bool:
    """Whether the first elements of a tensor were others, by more than roundings."""
    if whole is None:
        return True
    others = _beginning(whole).to(values.device)
    if (values.shape, values.dtype) != (others.shape, others.dtype):
        return True
    exact = not values.is_floating_point() and not values.is_complex()
    if exact or values.itemsize < 2:  # torch does not compute with floats of a byte
        return not torch.equal(bits_of(values), bits_of(others))
    allowed = _ROUNDINGS * torch.finfo(values.dtype).eps * others.abs().max() if len(others) else 0
    return bool(((values - others).abs() > allowed).any())


class TensorValues:
    """
    What tensors hold at one moment, to see writes that nothing else shows.

    Small ones are copied together, of others there are checksums: thousands are quick to compare,
    and a large model is not copied.

    Args:
        slots: by number.
    """

    def __init__(self, slots: Mapping[int, ModuleSlot]) -> None:
        there = {number: slot for number, slot in slots.items() if slot.tensor is not None}
        self._small = {n: slot for n, slot in there.items() if _size(slot) <= _TINY_BYTES}
        self._large = {n: slot for n, slot in there.items() if n not in self._small}
        self._sums = {
            n: checksum(slot.tensor) for n, slot in self._large.items() if slot.tensor is not None
        }
        self._sizes = [_size(slot) for slot in self._small.values()]
        self._copy = self._together()

    def differ(self) -> set[int]:
        """Give the numbers of those that hold something else now."""
        numbers = set()
        for number, slot in self._large.items():
            now = slot.tensor
            if now is None or checksum(now) != self._sums[number]:
                numbers.add(number)
        now_small = self._together()
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
        return numbers | {number for number, one, other in pieces if not torch.equal(one, other)}

    def _together(self) -> Tensor | None:
        """Give the small ones' bytes; None: one has another size now, or there is none."""
        slots = [*self._small.values()]
        if not slots or [_size(slot) for slot in slots] != self._sizes:
            return None
        tensors = [slot.tensor for slot in slots]
        first = tensors[0]
        assert first is not None, "its size was looked at"
        return cat_bytes(tensors, first.device)


def _size(slot: ModuleSlot) -> int:
    return 0 if slot.tensor is None else slot.tensor.nbytes


class VersionCounters:
    """Which tensors were written since they were marked, as far as their counters tell."""

    def __init__(self, slots: Sequence[ModuleSlot]) -> None:
        self._slots = slots
        self._movable: list[int] = []
        self._marked: tuple[list[int], list[int], list[int]] = [], [], []

    def renew(self, movable: Sequence[int]) -> None:
        """Take all for unwritten; `movable`: those whose address is to be looked at, too."""
        self._movable = [*movable]
        self._marked = self._now()

    def moved(self) -> set[int]:
        """Give the numbers of those that were written."""
        now, then = self._now(), self._marked
        if now == then:
            return set()
        pairs = zip(
            zip(now[0], now[1], strict=True), zip(then[0], then[1], strict=True), strict=True
        )
        moved = {number for number, (one, other) in enumerate(pairs) if one != other}
        addresses = zip(self._movable, now[2], then[2], strict=True)
        return moved | {number for number, one, other in addresses if one != other}

    def _now(self) -> tuple[list[int], list[int], list[int]]:
        tensors = [slot.where.get(slot.key) for slot in self._slots]
        versions = [-1 if tensor is None else tensor._version for tensor in tensors]
        chosen = (tensors[number] for number in self._movable)
        addresses = [0 if tensor is None else tensor.data_ptr() for tensor in chosen]
        return [id(tensor) for tensor in tensors], versions, addresses


def watch_tensor(
    model: nn.Module, choose: Callable[[str], str | None], beside: MutableMapping[str, Tensor]
) -> Iterator[Watched]:
    """
    Give all tensors of the model once, in an order that is the same on all ranks.

    Args:
        model: has buffers and parameters.
        choose: the task's `buffers`.
        beside: what is trained beside the model, by name.
    """
    capped, running, averaged = set(), set(), set()
    for module in model.modules():
        if is_capped(module):
            capped.add(id(module.weight))
        elif has_running_statistics(module):
            own = {id(module.running_mean), id(module.running_var)} - {id(None)}
            running |= own
            averaged |= set() if isinstance(module, nn.SyncBatchNorm) else own
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
        how = {"copied": copied, "capped": key in capped, "silent": silent}
        yield Watched(slot, rule, **how, chosen=chosen is not None)
    for name in beside:
        yield Watched(ModuleSlot(beside, name, name), "written", copied=False, capped=False)


def _rule_of(chosen: str | None, name: str, *, averaged: bool) -> BufferRule:
    if chosen is None:
        return "mean" if averaged else "rank0"
    for rule in _CHOICES:
        if chosen == rule:
            return rule  # type: ignore[return-value]
    raise ValueError(f"buffers({name!r}) must give one of {_CHOICES} or None, got {chosen!r}")


def copied_into(value: Tensor | None, spare: Tensor | None) -> Tensor | None:
    """Copy a tensor, into memory that is there if it fits."""
    if value is None:
        return None
    if spare is None or (spare.shape, spare.dtype) != (value.shape, value.dtype):
        return value.detach().clone(memory_format=torch.contiguous_format)
    return spare.copy_(value.detach())


def checksum(tensor: Tensor) -> tuple[int, ...]:
    """Sum a tensor's bytes up so that moved and changed elements show; for any dtype."""
    flat = tensor.detach().contiguous().view(-1)
    size = 4 if flat.itemsize % 4 == 0 else 1
    words = flat.view(torch.int32 if size == 4 else torch.uint8)
    width = 256
    whole = words.numel() // width * width
    rows = words[:whole].view(-1, width)
    sums_by_kind = []
    for sums in (rows.sum(0, dtype=torch.int64), rows.sum(1, dtype=torch.int64), words[whole:]):
        weights = torch.arange(1, sums.numel() + 1, device=words.device)
        sums_by_kind.append(int((sums.long() * weights).sum()))
    return tuple(sums_by_kind)
