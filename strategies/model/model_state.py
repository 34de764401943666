"""
Synchronization of tensors that a forward writes, so that they stay equal on all ranks.

    buffer                          rank 0's value after each step, as under torch's DDP
    running mean, variance          the mean over the ranks, weighted by their samples
    frozen parameter                like a buffer, if a forward writes it (a momentum teacher)
    trained parameter               for each element the value of the first rank that wrote it,
                                    if a forward writes it (`nn.Embedding(max_norm=...)`)

Only tensors that a forward was seen to write are copied and exchanged. A write changes the tensor's
version counter, its address or its identity; a write through `.data` is detected by a checksum, in
the first steps and before checkpoints. Ranks share the detected writes in the same step.
docs/model_state.md is the page for users.
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
    WatchedTensor,
    copy_first_writer,
    copy_into,
    merge_first_written,
    watch_tensors,
)

logger = logging.getLogger(__name__)

_FIRST_STEPS = 3
"""Number of steps after a start in which values are compared."""


@dataclass(frozen=True)
class Shares:
    """Sizes of the ranks' parts of a step; functions of the step alone."""

    samples: Callable[[int], Sequence[int]]
    """Returns the number of samples of a step, by rank of the group."""
    micro_batches: Callable[[int], Sequence[int]]
    """Returns the number of micro-batches of a step, by rank of the group."""
    checkpoint_due: Callable[[int], bool] = lambda version: False
    """Returns whether a checkpoint of a version is saved."""


class ModelState:
    """
    Tracks which tensors of a rank's model are written, through all attempts of a run.

    At the start of an attempt a rank calls `sync`, or `restore_version` and a transfer of its own,
    and `keep`; then for each step `end_forwards`, `synchronize`, `keep`.

    Args:
        flat: this rank's model, or its part of a model.
        shares: sizes of the ranks' parts of a step.
        choose: the task's `buffers`.

    Raises:
        ValueError: `choose` returned an invalid rule.
    """

    def __init__(
        self,
        flat: FlatModel,
        shares: Shares,
        choose: Callable[[str], str | None] = lambda name: None,
    ) -> None:
        self._flat, self.shares = flat, shares
        self._watched = list(watch_tensors(flat.model, choose, flat.extra))
        trained = [(n, w.slot.tensor) for n, w in enumerate(self._watched) if w.trained]
        self._hooked = {n for n, tensor in trained if has_hook_after_backward(tensor)}
        """Trained tensors with a user's post-accumulate hook, which runs before our hooks."""
        self._silent = [number for number, watched in enumerate(self._watched) if watched.silent]
        self._marks = VersionCounters([watched.slot for watched in self._watched])
        self._written = {number for number, watched in enumerate(self._watched) if watched.capped}
        self._group: Collective | None = None
        self._norms: SyncNorms | None = None
        self._tables: CappedTables | None = None
        self._served = ""  #: hint for models that write parameters of servers; empty: no servers
        self._shifting = False
        self._mark()
        self._values: TensorValues | None = None  #: values of uncopied tensors, to compare later
        self._newly_written: set[int] = set()  #: written tensors that other ranks do not know
        self._compare_until = _FIRST_STEPS
        self.version: int | None = None  #: version of the copies; None: no copies
        self._synchronized: int | None = None  #: version of the synchronized tensors
        self._comparison = RankComparison()

    @property
    def needs_group(self) -> bool:
        """Whether ranks must exchange more than gradients."""
        return any(watched.capped or not watched.trained for watched in self._watched)

    def connect(
        self,
        group: Collective | None,
        *,
        served: str = "",
        one_memory: bool = False,
        shifting: bool = False,
    ) -> None:
        """
        Start an attempt.

        Args:
            group: all ranks that have this model; None: ranks are not synchronized.
            served: if servers hold the trained parameters: the hint in errors for a model whose
                forward writes them. Empty: this rank holds them.
            one_memory: whether this rank computes on the memory that servers update.
            shifting: whether servers change parameters while this rank computes.

        Raises:
            SpecError: a forward of this model writes trained parameters that servers hold.
        """
        self._group, self._served, self._shifting = group, served, shifting
        self._tables = self._wrap_tables(one_memory=one_memory)
        if self._norms is not None:
            self._norms.close()
        self._norms = SyncNorms.of(self._flat.model, group, self.shares.micro_batches)

    def _wrap_tables(self, *, one_memory: bool) -> CappedTables | None:
        """Let lookups with `max_norm` work on copies of tables that servers hold."""
        if self._tables is not None:
            self._tables.close()
        any_table = False
        for number, watched in enumerate(self._watched):
            watched.refresh()
            if watched.capped and watched.trained and self._served:
                if not one_memory:
                    raise self._served_write_error(watched.slot.name)
                any_table, watched.copied = True, False
                self._written.discard(number)
        return CappedTables(self._flat.model) if any_table else None

    def restore_version(self, version: int, *, left_out: bool = False) -> bool:
        """
        Restore the tensors of a version; return False if this rank does not have them.

        Args:
            version: of the parameters.
            left_out: whether the previous step was skipped, and therefore wrote nothing.

        Raises:
            StateLost: the step to repeat wrote a tensor that has no copy.
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
        Broadcast the state to ranks that lack it; a fresh run starts with rank 0's state.

        Args:
            version: of the parameters.
            first: version at the start of the run.
            left_out: see `restore_version`.

        Raises:
            CollectiveError: a rank is missing.
            StateLost: no rank has the state of this version.
        """
        has_state = self.restore_version(version, left_out=left_out)
        group = self._group
        if group is not None and group.world > 1:
            flags = torch.zeros(group.world, dtype=torch.int32, device=self._device)
            flags[group.rank] = has_state
            group.all_reduce(flags)
            holders = [rank for rank, flag in enumerate(flags.tolist()) if flag]
            if not holders and version != first and self._untrained():
                raise StateLost("the model's buffers and frozen parameters")
            if len(holders) < group.world:
                self.broadcast_from(holders[0] if holders else 0)
        self.keep(version)

    def broadcast_from(self, source: int) -> None:
        """Broadcast a rank's untrained tensors to all ranks of the group."""
        assert self._group is not None, "connect() gave a group"
        broadcast_slots(self._untrained(), source, self._group, self._device)

    def keep(self, version: int) -> None:
        """Copy the tensors that change, as the state of a version, before the next forward."""
        if self.version is None:
            self._compare_until = version + _FIRST_STEPS
        newly_written = self._detect_written()
        for number in newly_written:
            self._watched[number].refresh()  # a frozen parameter may have been unfrozen
        for number in [n for n in newly_written if self._watched[n].unfrozen]:
            self._written.discard(number)
            self._watched[number].drop_copy()
        changed = self._written | newly_written
        for number, watched in enumerate(self._watched):
            if watched.copied:
                watched.keep(changed=number in changed)
        self._mark()
        self._values = TensorValues(self._uncopied()) if self._compares_values(version) else None
        self.version = self._synchronized = version
        if self._norms is not None:
            self._norms.begin(version)

    def restore(self) -> None:
        """
        Restore the last copies, to repeat the step that has written since.

        Raises:
            StateLost: the step wrote a tensor that has no copy.
        """
        if self._tables is not None:
            self._tables.clear()
        lost = self._restore_written()
        if lost:
            raise StateLost(f"{lost[0].slot.name!r} as it was before the step in flight")

    def finish(self, version: int, *, skipped: bool) -> None:
        """Finish a step; the forwards' writes of a skipped step are undone."""
        if skipped:
            self.restore()
        self.keep(version)

    def step_back(self) -> None:
        """Restore the version before the last copies."""
        for watched in self._watched:
            served = watched.trained and self._served
            if watched.has_copy and watched.before is not None and not served:
                watched.kept = watched.before
                watched.restore()
        self._mark()

    def discard(self) -> None:
        """
        Undo the writes of an evaluation; the next step reports tensors without a copy as changed.

        Raises:
            SpecError: the evaluation wrote a trained parameter that servers hold.
        """
        if self._tables is not None:
            self._tables.clear()
        if self.version is not None:
            lost = self._restore_written()
            self._refuse_served_writes(lost)
            self._newly_written |= {self._watched.index(watched) for watched in lost}

    def _restore_written(self) -> list[WatchedTensor]:
        """Restore written tensors that have a copy; return those that have none."""
        lost = []
        for number in sorted(self._written | self._detect_written()):
            watched = self._watched[number]
            if not watched.has_copy:
                lost.append(watched)
            elif not (watched.trained and self._served):
                watched.restore()
        self._mark()
        return lost

    def snapshot(self) -> list[Tensor | None]:
        """Return copies of all untrained tensors."""
        return [copy_into(slot.tensor, None) for slot in self._untrained()]

    def load(self, snapshot: Sequence[Tensor | None]) -> None:
        """Load what `snapshot` returned."""
        for slot, value in zip(self._untrained(), snapshot, strict=True):
            slot.take(value)

    @contextmanager
    def compute_on_copy(self) -> Iterator[None]:
        """
        In the first steps, compute on a copy of parameters that servers change concurrently.

        Writes of a forward are detected by changed values. If servers also change the values, this
        detection needs a private copy of the parameters.

        Raises:
            SpecError: a forward or backward wrote a trained parameter.
        """
        if not self._shifting or self.version is None or self.version >= self._compare_until:
            yield
            return
        params = self._flat.params.clone()
        before = params.clone()
        with self._flat.with_params(params):
            yield
            name = self._flat.written(params, before)
        if name is not None:
            raise self._served_write_error(name)

    @property
    def ranks_wait(self) -> bool:
        """Whether `end_forwards` waits for other ranks' forwards and backwards in this step."""
        return self._norms is not None and self._norms.ranks_wait

    def end_forwards(self, step: int) -> None:
        """Finish this rank's forwards and backwards, before gradients are exchanged."""
        if self._norms is not None:
            self._norms.finish(step)

    def changed(self, step: int) -> bool:
        """
        Return whether this rank wrote tensors that other ranks do not know of; call once per step.

        Raises:
            SpecError: a forward wrote a trained parameter that servers hold, or a hook updates a
                trained parameter.
        """
        written = self._detect_written() - self._written
        if self._compares_values(step):
            written |= {n for n, watched in enumerate(self._watched) if watched.differs()}
            written |= self._values.differ() if self._values is not None else set()
            written -= self._written
        self._refuse_served_writes([self._watched[number] for number in sorted(written)])
        updated = written & self._hooked
        if updated and sum(self.shares.micro_batches(step)) > 1:
            self._refuse_hook_updates(updated)
        copied = [n for n in self._written if self._watched[n].has_copy]
        reshaped = {n for n in copied if not self._watched[n].slot.same_kind(self._watched[n].kept)}
        self._newly_written |= written | reshaped
        return bool(self._newly_written)

    def synchronize(self, step: int, changed: bool | None = None) -> None:
        """
        Make written tensors equal on all ranks, after the step's forwards and before its update.

        Args:
            step: current step.
            changed: whether `changed()` was true on any rank; None: determine it by an all-reduce.

        Raises:
            CollectiveError: a rank is missing.
            SpecError: see `changed`.
        """
        changed_here = self.changed(step) if changed is None else bool(self._newly_written)
        group, newly_written = self._group, self._newly_written
        if group is None or group.world == 1:
            self._mark_written(newly_written)
        else:
            if self._compares_ranks(group.rank, step):
                numbers = sorted(newly_written | self._detect_written())
                written = [self._watched[number] for number in numbers]
                self._comparison.note(watched for watched in written if watched.rule == "rank0")
            if self._any_rank(group, changed_here) if changed is None else changed:
                self._share_written(group, step)
            self._exchange(group, step, newly_written)
            if (text := self._comparison.mismatch_warning()) is not None:
                logger.warning("%s", text)
        if self._tables is not None:
            self._tables.write(group)
        self._synchronized = step + 1

    def _any_rank(self, group: Collective, local: bool) -> bool:
        flag = torch.tensor([int(local)], dtype=torch.int32, device=self._device)
        group.all_reduce(flag, ReduceOp.MAX)
        return bool(flag.item())

    def _share_written(self, group: Collective, step: int) -> None:
        """Merge the ranks' newly written tensors; broadcast buffers, whose shape may differ."""
        flags = torch.zeros(len(self._watched), dtype=torch.int32, device=self._device)
        flags[sorted(self._newly_written)] = 1
        group.all_reduce(flags, ReduceOp.MAX)
        self._mark_written({number for number, flag in enumerate(flags.tolist()) if flag})
        slots = [watched.slot for watched in self._written_by_rule("rank0")]
        broadcast_slots(slots, self._source(step), group, self._device)

    def _mark_written(self, numbers: set[int]) -> None:
        self._written |= numbers
        for number in numbers:
            self._watched[number].copied = True
        self._newly_written = set()

    def _exchange(self, group: Collective, step: int, newly_written: set[int]) -> None:
        """Exchange the written tensors; `newly_written`: of this rank, in this step."""
        samples = self.shares.samples(step)
        self._average(group, samples)
        slots = [watched.slot for watched in self._written_by_rule("rank0")]
        packed = cat_bytes([slot.tensor for slot in slots], self._device)
        if packed.numel():
            group.broadcast(packed, self._source(step))
            for slot, value in cut_bytes(packed, slots):
                slot.take(value)
        for watched in self._written_by_rule("written"):
            _reconcile(watched, group, wrote=self._watched.index(watched) in newly_written)

    def _compares_ranks(self, rank: int, step: int) -> bool:
        """Return whether this rank compares its tensors with the source's; only one rank does."""
        samples, parts = self.shares.samples(step), self.shares.micro_batches(step)
        source = self._source(step)
        others = [n for n, count in enumerate(samples) if count and n != source]
        return rank in others[:1] and parts[rank] == parts[source]  # else counters would differ

    def _average(self, group: Collective, samples: Sequence[int]) -> None:
        share = samples[group.rank] / max(1, sum(samples))
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for watched in self._written_by_rule("mean"):
            now = watched.slot.tensor
            if now is not None:
                by_dtype.setdefault(now.dtype, []).append(now)
        for tensors in by_dtype.values():
            packed = torch.cat([tensor.detach().reshape(-1) for tensor in tensors])
            packed = packed * share if share else torch.zeros_like(packed)
            group.all_reduce(packed)
            sizes = [tensor.numel() for tensor in tensors]
            for tensor, mean in zip(tensors, torch.split(packed, sizes), strict=True):
                tensor.detach().copy_(mean.view(tensor.shape))

    def _source(self, step: int) -> int:
        """Return the first rank that had samples."""
        samples = self.shares.samples(step)
        return next((rank for rank, count in enumerate(samples) if count), 0)

    def _written_by_rule(self, rule: BufferRule) -> list[WatchedTensor]:
        """Return the written tensors with a rule, in the same order on all ranks."""
        written = (self._watched[number] for number in sorted(self._written))
        return [watched for watched in written if watched.rule == rule]

    def _uncopied(self) -> dict[int, ModuleSlot]:
        """Return the tensors without a copy whose values show writes, by number."""
        return {
            number: watched.slot
            for number, watched in enumerate(self._watched)
            if not watched.has_copy and not (watched.trained and self._shifting)
        }

    def _detect_written(self) -> set[int]:
        """Return the numbers of tensors with a detectable write since the last mark."""
        written = self._marks.written()
        silent = [n for n in self._silent if n not in self._written]
        return written | {n for n in silent if self._watched[n].differs()}

    def _mark(self) -> None:
        self._marks.renew([n for n, watched in enumerate(self._watched) if not watched.trained])

    def _untrained(self) -> list[ModuleSlot]:
        return [watched.slot for watched in self._watched if not watched.trained]

    def _compares_values(self, step: int) -> bool:
        return step < self._compare_until or self.shares.checkpoint_due(step + 1)

    def _refuse_served_writes(self, written: Sequence[WatchedTensor]) -> None:
        for watched in written:
            if watched.trained and self._served:
                raise self._served_write_error(watched.slot.name)

    def _refuse_hook_updates(self, numbers: set[int]) -> None:
        """Refuse an update in backward, which uses the gradient of a part of the batch."""
        for number in sorted(numbers):
            text = (
                f"a post-accumulate hook changes {self._watched[number].slot.name!r} in backward, "
                "where a worker has the gradient of its part of the batch, or of a micro-batch"
            )
            hint = "leave updates to the job's `optimizer`, or use one worker without accumulation"
            raise SpecError(Problem(("task",), text, hint))

    def _served_write_error(self, name: str) -> SpecError:
        text = f"a forward writes the trained parameter {name!r}, which servers keep"
        hint = f"{self._served}, or freeze what gradients do not train (requires_grad=False)"
        return SpecError(Problem(("strategy",), text, hint))

    @property
    def _device(self) -> torch.device:
        return self._flat.params.device


def _reconcile(watched: WatchedTensor, group: Collective, *, wrote: bool) -> None:
    """
    Set each element to the value of the first rank that wrote it.

    The first write of a tensor has no copy to compare with: take the first writer's whole tensor.
    """
    tensor = watched.slot.tensor
    if tensor is None:
        return
    if watched.kept is not None:
        watched.slot.take(merge_first_written(tensor.detach(), watched.kept, group))
    else:
        watched.slot.take(copy_first_writer(tensor.detach(), group, wrote=wrote))
