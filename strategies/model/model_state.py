"""
What a model has beside what gradients train, kept equal on all ranks.

    buffer                          rank 0's after each step, as under torch's DDP
    running mean, variance          the mean over the ranks, weighted by their samples
    frozen parameter                like a buffer, where a forward writes it (a momentum teacher)
    trained parameter               element by element the value of the first rank that wrote it,
                                    where a forward does (`nn.Embedding(max_norm=...)`)

Only what a forward was seen to change is copied and travels. A write is seen by the tensor's
version counter, its address or its identity; one through `.data` by a checksum, in the first steps
and before checkpoints. What one rank has seen, all learn of in the same step. docs/model_state.md
is for users.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from distplat.platform.errors import Problem, SpecError, StateLost
from distplat.strategies.checkpoint.state_sync import (
    ModuleSlot,
    broadcast_slots,
    cat_bytes,
    cut_bytes,
)
from distplat.strategies.collective import Collective, ReduceOp
from distplat.strategies.model.flat import FlatModel
from distplat.strategies.model.module_hooks import has_hook_after_backward
from distplat.strategies.model.sync_batch_norm import SyncNorms
from distplat.strategies.model.written_tensors import (
    BufferRule,
    CappedTables,
    RankComparison,
    TensorValues,
    VersionCounters,
    Watched,
    copied_into,
    first_writer,
    first_written,
    watch_tensor,
)

logger = logging.getLogger(__name__)

_FIRST_STEPS = 3
"""Steps after a start in which checksums are compared."""


@dataclass(frozen=True)
class Shares:
    """How the ranks' parts of a step compare; functions of the step alone."""

    samples: Callable[[int], Sequence[int]]
    """By rank of the group, the samples of a step."""
    micro_batches: Callable[[int], Sequence[int]]
    """By rank of the group, the micro-batches of a step."""
    checkpoint_due: Callable[[int], bool] = lambda version: False
    """Whether a checkpoint is made of a version."""


class ModelState:
    """
    One rank's watch over its model, through all attempts of a run.

    A rank calls `settle`, `sync` or a hand-over of its own, and `keep` when an attempt begins; then
    for each step `end_forwards`, `synchronize`, `keep`.

    Args:
        flat: this rank's model, or its part of one.
        shares: how the ranks' parts of a step compare.
        choose: the task's `buffers`.

    Raises:
        ValueError: `choose` gave something else than it may.
    """

    def __init__(
        self,
        flat: FlatModel,
        shares: Shares,
        choose: Callable[[str], str | None] = lambda name: None,
    ) -> None:
        self._flat, self.shares = flat, shares
        self._watched = list(watch_tensor(flat.model, choose, flat.extra))
        slots = [(number, one.slot) for number, one in enumerate(self._watched) if one.trained]
        self._hooked = {number for number, slot in slots if has_hook_after_backward(slot.tensor)}
        """Those with a hook of the user's that is called with the gradient: ours come later."""
        self._silent = [number for number, one in enumerate(self._watched) if one.silent]
        self._marks = VersionCounters([one.slot for one in self._watched])
        self._known = {number for number, one in enumerate(self._watched) if one.capped}
        self._group: Collective | None = None
        self._norms: SyncNorms | None = None
        self._tables: CappedTables | None = None
        self._served = ""  #: where trained parameters are the servers': what to do instead
        self._shifting = False
        self._mark()
        self._values: TensorValues | None = None  #: as they were kept, where they will be compared
        self._new: set[int] = set()  #: what this rank alone knows of
        self._until = _FIRST_STEPS
        self.version: int | None = None  #: of what is kept; None: nothing is
        self._synchronized: int | None = None  #: version that the tensors are of, if it counts
        self._comparison = RankComparison()

    @property
    def needs_group(self) -> bool:
        """Whether ranks must talk to each other about more than gradients."""
        return any(one.capped or not one.trained for one in self._watched)

    def connect(
        self,
        group: Collective | None,
        *,
        served: str = "",
        one_memory: bool = False,
        shifting: bool = False,
    ) -> None:
        """
        Begin an attempt.

        Args:
            group: all ranks that have this model; None: each goes on with its own.
            served: where servers keep the trained parameters: the way out for a model whose
                forward writes them. Empty: they are this rank's own.
            one_memory: whether this rank computes on the memory that servers update.
            shifting: whether servers change them while this rank computes.

        Raises:
            SpecError: a forward of this model writes them, and servers keep them.
        """
        self._group, self._served, self._shifting = group, served, shifting
        self._tables = self._take_tables(one_memory=one_memory)
        if self._norms is not None:
            self._norms.close()
        self._norms = SyncNorms.of(self._flat.model, group, self.shares.micro_batches)

    def _take_tables(self, *, one_memory: bool) -> CappedTables | None:
        """Have lookups that scale rows of tables which servers keep made in copies."""
        if self._tables is not None:
            self._tables.close()
        any_table = False
        for number, one in enumerate(self._watched):
            one.refresh()
            if one.capped and one.trained and self._served:
                if not one_memory:
                    raise self._refused(one.slot.name)
                any_table, one.copied = True, False
                self._known.discard(number)
        return CappedTables(self._flat.model) if any_table else None

    def settle(self, version: int, *, left_out: bool = False) -> bool:
        """
        Have the tensors at this version, if this rank has that; False: it is as if it were new.

        Args:
            version: of the parameters.
            left_out: whether the step before it was left out, so that it wrote nothing.

        Raises:
            StateLost: something was written for the first time by the step that is to be repeated.
        """
        if self.version == version or (left_out and self._synchronized == version):
            self.restore()
            self.version = version
        elif self._synchronized == version:
            self.keep(version)
        else:
            self.version = None
        return self.version == version

    def sync(self, version: int, first: int, *, left_out: bool = False) -> None:
        """
        Give ranks that are new the others' state; in a fresh run all have rank 0's.

        Args:
            version: of the parameters.
            first: the version with which the run began.
            left_out: see `settle`.

        Raises:
            CollectiveError: a rank is missing.
            StateLost: nobody has the state of this version.
        """
        has = self.settle(version, left_out=left_out)
        group = self._group
        if group is not None and group.world > 1:
            settled = torch.zeros(group.world, dtype=torch.int32, device=self._device)
            settled[group.rank] = has
            group.all_reduce(settled)
            holders = [rank for rank, one in enumerate(settled.tolist()) if one]
            if not holders and version != first and self._untrained():
                raise StateLost("the model's buffers and frozen parameters")
            if len(holders) < group.world:
                self.take_from(holders[0] if holders else 0)
        self.keep(version)

    def take_from(self, source: int) -> None:
        """Have a rank's untrained tensors on all ranks of the group."""
        assert self._group is not None, "connect() gave a group"
        broadcast_slots(self._untrained(), source, self._group, self._device)

    def keep(self, version: int) -> None:
        """Remember all that changes as that of a version: the next forward writes into it."""
        if self.version is None:
            self._until = version + _FIRST_STEPS
        moved = self._moved()
        for number in moved:
            self._watched[number].refresh()  # a frozen parameter may have been unfrozen
        for number in [n for n in moved if self._watched[n].unfrozen]:
            self._known.discard(number)
            self._watched[number].drop_copy()
        changed = self._known | moved
        for number, one in enumerate(self._watched):
            if one.copied:
                one.keep(changed=number in changed)
        self._mark()
        self._values = TensorValues(self._uncopied()) if self._thorough(version) else None
        self.version = self._synchronized = version
        if self._norms is not None:
            self._norms.begin(version)

    def restore(self) -> None:
        """
        Put back what was kept last: the step that wrote since is made once more.

        Raises:
            StateLost: there is no copy of something that it wrote.
        """
        if self._tables is not None:
            self._tables.forget()
        lost = self._put_back()
        if lost:
            raise StateLost(f"{lost[0].slot.name!r} as it was before the step in flight")

    def finish(self, version: int, *, skipped: bool) -> None:
        """Called when a step is over: of one that is passed over what forwards wrote is undone."""
        if skipped:
            self.restore()
        self.keep(version)

    def step_back(self) -> None:
        """Restore the version before the one that was kept last."""
        for one in self._watched:
            if one.has_copy and one.before is not None and not (one.trained and self._served):
                one.kept = one.before
                one.restore()
        self._mark()

    def discard(self) -> None:
        """
        Restore what an evaluation has written; what has no copy, the next step reports as changed.

        Raises:
            SpecError: it wrote a trained parameter that servers keep.
        """
        if self._tables is not None:
            self._tables.forget()
        if self.version is not None:
            lost = self._put_back()
            self._refuse(lost)
            self._new |= {self._watched.index(one) for one in lost}

    def _put_back(self) -> list[Watched]:
        """Give what was written and has no copy."""
        lost = []
        for number in sorted(self._known | self._moved()):
            one = self._watched[number]
            if not one.has_copy:
                lost.append(one)
            elif not (one.trained and self._served):
                one.restore()
        self._mark()
        return lost

    def snapshot(self) -> list[Tensor | None]:
        """Copy what no gradient trains."""
        return [copied_into(slot.tensor, None) for slot in self._untrained()]

    def load(self, snapshot: Sequence[Tensor | None]) -> None:
        """Take over what `snapshot` gave."""
        for slot, value in zip(self._untrained(), snapshot, strict=True):
            slot.take(value)

    @contextmanager
    def on_a_copy(self) -> Iterator[None]:
        """
        Have forwards and backwards of the first steps compute on a copy of what servers change.

        Elsewhere values that changed tell of a write. Where servers change them meanwhile they do
        not, so forwards get parameters of their own.

        Raises:
            SpecError: they wrote a trained parameter.
        """
        if not self._shifting or self.version is None or self.version >= self._until:
            yield
            return
        own = self._flat.params.clone()
        before = own.clone()
        with self._flat.with_params(own):
            yield
            written = self._flat.written(own, before)
        if written is not None:
            raise self._refused(written)

    @property
    def ranks_wait(self) -> bool:
        """Whether ranks wait in `end_forwards` for others' forwards and backwards in this step."""
        return self._norms is not None and self._norms.ranks_wait

    def end_forwards(self, step: int) -> None:
        """Called after this rank's forwards and backwards; before gradients are met."""
        if self._norms is not None:
            self._norms.finish(step)

    def changed(self, step: int) -> bool:
        """
        Say whether this rank's forward wrote what ranks do not know of yet; once per step.

        Raises:
            SpecError: it wrote a trained parameter that servers keep, or a hook updates one.
        """
        written = self._moved() - self._known
        if self._thorough(step):
            written |= {n for n, one in enumerate(self._watched) if one.differs()}
            written |= self._values.differ() if self._values is not None else set()
            written -= self._known
        self._refuse([self._watched[number] for number in sorted(written)])
        updated = written & self._hooked
        if updated and sum(self.shares.micro_batches(step)) > 1:
            self._refuse_updates(updated)
        copied = [n for n in self._known if self._watched[n].has_copy]
        shaped = {n for n in copied if not self._watched[n].slot.same_kind(self._watched[n].kept)}
        self._new |= written | shaped
        return bool(self._new)

    def synchronize(self, step: int, changed: bool | None = None) -> None:
        """
        Make what changed equal on all ranks, after the step's forwards and before its update.

        Args:
            step: under way.
            changed: whether `changed` was true on some rank; None: the ranks ask each other.

        Raises:
            CollectiveError: a rank is missing.
            SpecError: see `changed`.
        """
        changed_here = self.changed(step) if changed is None else bool(self._new)
        group, own = self._group, self._new
        if group is None or group.world == 1:
            self._learn(own)
        else:
            if self._looks(group.rank, step):
                numbers = sorted(own | self._moved())
                written = [self._watched[number] for number in numbers]
                self._comparison.note(one for one in written if one.rule == "rank0")
            if self._asked(group, changed_here) if changed is None else changed:
                self._agree(group, step)
            self._exchange(group, step, own)
            if (text := self._comparison.differing()) is not None:
                logger.warning("%s", text)
        if self._tables is not None:
            self._tables.write(group)
        self._synchronized = step + 1

    def _asked(self, group: Collective, mine: bool) -> bool:
        flag = torch.tensor([int(mine)], dtype=torch.int32, device=self._device)
        group.all_reduce(flag, ReduceOp.MAX)
        return bool(flag.item())

    def _agree(self, group: Collective, step: int) -> None:
        """Learn what others have seen; bring buffers that have another shape now."""
        seen = torch.zeros(len(self._watched), dtype=torch.int32, device=self._device)
        seen[sorted(self._new)] = 1
        group.all_reduce(seen, ReduceOp.MAX)
        self._learn({number for number, one in enumerate(seen.tolist()) if one})
        slots = [one.slot for one in self._those("rank0")]
        broadcast_slots(slots, self._source(step), group, self._device)

    def _learn(self, numbers: set[int]) -> None:
        self._known |= numbers
        for number in numbers:
            self._watched[number].copied = True
        self._new = set()

    def _exchange(self, group: Collective, step: int, wrote: set[int]) -> None:
        """Exchange what ranks wrote; `wrote`: what this rank has now written for the first time."""
        samples = self.shares.samples(step)
        self._average(group, samples)
        slots = [one.slot for one in self._those("rank0")]
        together = cat_bytes([slot.tensor for slot in slots], self._device)
        if together.numel():
            group.broadcast(together, self._source(step))
            for slot, value in cut_bytes(together, slots):
                slot.take(value)
        for one in self._those("written"):
            _reconcile(one, group, wrote=self._watched.index(one) in wrote)

    def _looks(self, rank: int, step: int) -> bool:
        """Whether this rank compares what it has with the source's: one says it for all."""
        samples, parts = self.shares.samples(step), self.shares.micro_batches(step)
        source = self._source(step)
        others = [n for n, one in enumerate(samples) if one and n != source]
        return rank in others[:1] and parts[rank] == parts[source]  # else counters would differ

    def _average(self, group: Collective, samples: Sequence[int]) -> None:
        share = samples[group.rank] / max(1, sum(samples))
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for one in self._those("mean"):
            now = one.slot.tensor
            if now is not None:
                by_dtype.setdefault(now.dtype, []).append(now)
        for tensors in by_dtype.values():
            together = torch.cat([tensor.detach().reshape(-1) for tensor in tensors])
            together = together * share if share else torch.zeros_like(together)
            group.all_reduce(together)
            sizes = [tensor.numel() for tensor in tensors]
            for tensor, mean in zip(tensors, torch.split(together, sizes), strict=True):
                tensor.detach().copy_(mean.view(tensor.shape))

    def _source(self, step: int) -> int:
        """Give the first rank that had samples."""
        return next((rank for rank, one in enumerate(self.shares.samples(step)) if one), 0)

    def _those(self, rule: BufferRule) -> list[Watched]:
        """Give what is known to change and goes by a rule, in the order of all ranks."""
        return [one for n in sorted(self._known) if (one := self._watched[n]).rule == rule]

    def _uncopied(self) -> dict[int, ModuleSlot]:
        """Give what only its values tell of, by number."""
        return {
            number: one.slot
            for number, one in enumerate(self._watched)
            if not one.has_copy and not (one.trained and self._shifting)
        }

    def _moved(self) -> set[int]:
        """Give the numbers of what was written since it was marked, as far as that shows."""
        moved = self._marks.moved()
        silent = [n for n in self._silent if n not in self._known]
        return moved | {n for n in silent if self._watched[n].differs()}

    def _mark(self) -> None:
        self._marks.renew([n for n, one in enumerate(self._watched) if not one.trained])

    def _untrained(self) -> list[ModuleSlot]:
        return [one.slot for one in self._watched if not one.trained]

    def _thorough(self, step: int) -> bool:
        return step < self._until or self.shares.checkpoint_due(step + 1)

    def _refuse(self, written: Sequence[Watched]) -> None:
        for one in written:
            if one.trained and self._served:
                raise self._refused(one.slot.name)

    def _refuse_updates(self, numbers: set[int]) -> None:
        """Refuse an update in backward, which is by the gradient of a part of the batch."""
        for number in sorted(numbers):
            text = (
                f"a post-accumulate hook changes {self._watched[number].slot.name!r} in backward, "
                "where a worker has the gradient of its part of the batch, or of a micro-batch"
            )
            hint = "leave updates to the job's `optimizer`, or use one worker without accumulation"
            raise SpecError(Problem(("task",), text, hint))

    def _refused(self, name: str) -> SpecError:
        text = f"a forward writes the trained parameter {name!r}, which servers keep"
        way_out = f"{self._served}, or freeze what gradients do not train (requires_grad=False)"
        return SpecError(Problem(("strategy",), text, way_out))

    @property
    def _device(self) -> torch.device:
        return self._flat.params.device


def _reconcile(one: Watched, group: Collective, *, wrote: bool) -> None:
    """
    Take each element from the first rank that wrote it.

    Without a copy, which is there from the next step on, the whole tensor is the first rank's that
    `wrote` it.
    """
    now = one.slot.tensor
    if now is None:
        return
    if one.kept is not None:
        one.slot.take(first_written(now.detach(), one.kept, group))
    else:
        one.slot.take(first_writer(now.detach(), group, wrote=wrote))
