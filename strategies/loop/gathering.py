"""
`distplat.all_gather` inside a loss: the rows of all ranks, with gradient.

    forward    every rank: its rows ────────▶ the rows of all, in rank order
    backward   every rank: gradient of all the rows ── sum ──▶ that of its own rows

Each operation begins with an announcement of every rank. So ranks that do not do the same end with
an error, and a rank without samples in a step takes part in the others' operations, until they
announce the end. That costs an operation in each step, so it is done where the code of task or
model names `all_gather`, or where a step before has called it.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Sequence
from itertools import accumulate
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from distplat.platform.errors import Problem, SpecError
from distplat.platform.spec import Job
from distplat.strategies.collective import Collective, gather_numbers
from distplat.strategies.strategy_spec import Roles
from distplat.strategies.task import Task
from distplat.strategies.task_methods import referenced_names

_NOTHING, _FORWARD, _BACKWARD, _END = range(4)
_DIMENSIONS = 8
"""Of a tensor, at most."""
_TYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32]

_NOT_EXPECTED = Problem(
    ("task",),
    "all_gather() is called first in a step in which a worker has no samples, and does not know it",
    "name it in a method of the task or in the model's forward(), or set data.drop_last: true",
)

_here = threading.local()
"""`gathering`: of the step that this thread computes; `calls`: how often it has asked."""

_ELSEWHERE = Problem(
    ("task",),
    "all_gather() is called in another thread than the one that trains, and would gather nothing",
    "leave it out of what torch.utils.checkpoint computes again: a GPU's backward has a thread",
)


class _UnderWay:
    """Gatherings of this process that are entered and have several ranks."""

    def __init__(self) -> None:
        self.count, self._counting = 0, threading.Lock()

    def add(self, more: int) -> None:
        with self._counting:
            self.count += more


_under_way = _UnderWay()


def all_gather(tensor: Tensor) -> Tensor:
    """
    Give the rows of all workers' batches, in rank order; for a loss that needs all samples.

    Gradients flow back to the workers whose rows they are of. Every worker that has samples in a
    step must call it alike. Outside of a training step, in evaluations too, it gives the tensor
    itself. In a train function it gathers each time, and every worker calls it.

    Args:
        tensor: shape [rows, ...]; workers may have different numbers of rows. Of bool, int32,
            int64 or a type of floating point numbers of 16 to 64 bits.

    Returns:
        Shape [rows of all workers, ...]; with one worker a copy.

    Raises:
        SpecError: the batch of a step is cut by `gradient_accumulation`, the strategy's workers
            are not in the same step, or another thread trains.
    """
    _here.calls = calls() + 1
    if _under_way.count and not hasattr(_here, "gathering"):
        raise SpecError(_ELSEWHERE)
    now: Gathering | None = getattr(_here, "gathering", None)
    return tensor if now is None else now.gather(tensor)


def calls() -> int:
    """Count the calls of `all_gather` in this thread."""
    return getattr(_here, "calls", 0)


def idle_ranks_wait() -> bool:
    """Say whether ranks without samples in the step of this thread wait for the others' calls."""
    now: Gathering | None = getattr(_here, "gathering", None)
    return now is not None and now.idle_ranks_wait


class _Announcement(NamedTuple):
    """What a rank announces before an operation."""

    kind: int
    call: int = 0
    """Which call of the step."""
    type: int = 0
    """Index in `_TYPES`."""
    rows: int = 0
    row: tuple[int, ...] = ()
    """Shape of one."""

    @classmethod
    def of(cls, kind: int, call: int, tensor: Tensor) -> _Announcement:
        """Describe a tensor of rows."""
        return cls(kind, call, _TYPES.index(tensor.dtype), len(tensor), tuple(tensor.shape[1:]))

    @classmethod
    def read(cls, numbers: list[int]) -> _Announcement:
        """Read what `numbers` gave."""
        kind, call, dtype, rows, dimensions, *row = numbers
        return cls(kind, call, dtype, rows, tuple(row[:dimensions]))

    def __str__(self) -> str:
        """`makes call 1 with rows of float32 [3]`."""
        if self.kind == _END:
            return "makes no more calls"
        what = "makes" if self.kind == _FORWARD else "is in the backward of"
        kind = str(_TYPES[self.type]).removeprefix("torch.")
        return f"{what} call {self.call} with rows of {kind} {[*self.row]}"

    def numbers(self) -> list[int]:
        """Give it as numbers, of any shape as many."""
        row = [len(self.row), *self.row, *[0] * (_DIMENSIONS - len(self.row))]
        return [self.kind, self.call, self.type, self.rows, *row]

    @property
    def common(self) -> tuple[object, ...]:
        """What all ranks must announce alike; of a backward they have the rows of all."""
        rows = self.rows if self.kind == _BACKWARD else 0
        return self.kind, self.call, self.type, rows, self.row

    def zeros(self, rows: int, device: torch.device) -> Tensor:
        """Give so many rows."""
        return torch.zeros(rows, *self.row, dtype=_TYPES[self.type], device=device)


class Gathering:
    """
    One rank's part in `all_gather`, in one attempt: a context in which the forwards of a step run.

    Args:
        make_group: makes the group of all ranks, or gives it; every rank calls it, or none.
        world: ranks.
        parts: by rank, the micro-batches of a step.
        expected: whether the code looks as if it calls it; see `uses_all_gather`.
        refused: what is wrong with calling it at all; None: nothing.
    """

    def __init__(
        self,
        make_group: Callable[[], Collective | None] = lambda: None,
        world: int = 1,
        parts: Callable[[int], Sequence[int]] = lambda step: [1],
        expected: bool = False,
        refused: Problem | None = None,
    ) -> None:
        self._make_group, self._world, self._parts = make_group, world, parts
        self._expected, self._refused = expected, refused
        _here.gathering = getattr(_here, "gathering", None)  # this thread is the one that trains
        self._group: Collective | None = None
        self._step = 0  #: the one under way
        self._calls = 0  #: in it

    def begin(self, step: int) -> Gathering:
        """Called with the step whose forwards come next."""
        self._step, self._calls = step, 0
        return self

    def __enter__(self) -> None:
        _here.gathering = self
        _under_way.add(int(self._world > 1))

    def __exit__(self, *error: object) -> None:
        _here.gathering = None
        _under_way.add(-int(self._world > 1))

    def finish(self, device: torch.device) -> None:
        """
        Say that this rank has made its calls; one without samples takes part in what others do.

        Args:
            device: of the model.

        Raises:
            CollectiveError: a rank is missing.
            RuntimeError: another rank calls once more.
        """
        if self._world == 1 or not self._all_take_part:
            return
        if self._parts(self._step)[self._subgroup().rank]:
            self._announce(_Announcement(_END), device)
            return
        while (other := self._announce(_Announcement(_NOTHING), device)[0]).kind != _END:
            rows = sum(self._rows) if other.kind == _FORWARD else other.rows
            self._subgroup().all_reduce(other.zeros(rows, device))

    def gather(self, tensor: Tensor) -> Tensor:
        """Give all ranks' tensors in rank order, with gradient; what `distplat.all_gather` does."""
        if self._refused is not None:
            raise SpecError(self._refused)
        if not 1 <= tensor.ndim <= _DIMENSIONS:
            text = f"all_gather() takes 1 to {_DIMENSIONS} dimensions, rows first"
            raise ValueError(f"{text}; got a tensor of {tensor.ndim}")
        if tensor.dtype not in (*_TYPES, torch.bool):
            names = ", ".join(str(one).removeprefix("torch.") for one in (*_TYPES, torch.bool))
            text = f"all_gather() takes no tensor of type {tensor.dtype}: convert it, with .long()"
            raise ValueError(f"{text} for example, to one of {names}")
        if self._world == 1:
            return tensor.clone()  # as others give it: what is written there is not in the tensor
        if tensor.dtype is torch.bool:
            return self.gather(tensor.int()).bool()
        if not self._all_take_part and min(self._parts(self._step)) == 0:
            raise SpecError(_NOT_EXPECTED)
        self._calls += 1
        apply: Any = _Gather.apply
        rows: Tensor = apply(tensor, self, self._calls)
        return rows

    @property
    def idle_ranks_wait(self) -> bool:
        """Whether ranks without samples in this step wait in `finish` for what the others do."""
        return self._all_take_part and min(self._parts(self._step)) == 0

    def rows_of_all(self, mine: Tensor, call: int) -> tuple[Tensor, slice]:
        """Give the rows of all ranks, and which of them are this one's."""
        announcement = _Announcement.of(_FORWARD, call, mine)
        self._announce(announcement, mine.device)
        ends = [*accumulate(self._rows)]
        rank = self._subgroup().rank
        own = slice(ends[rank] - self._rows[rank], ends[rank])
        whole = announcement.zeros(ends[-1], mine.device)
        whole[own] = mine.detach()
        self._subgroup().all_reduce(whole)
        return whole, own

    def sum_over_ranks(self, gradient: Tensor, call: int) -> Tensor:
        """Give the sum of the ranks' gradients of all rows."""
        self._announce(_Announcement.of(_BACKWARD, call, gradient), gradient.device)
        total = gradient.clone(memory_format=torch.contiguous_format)
        self._subgroup().all_reduce(total)
        return total

    @property
    def _all_take_part(self) -> bool:
        """Whether ranks without samples know that there may be calls; the same on all."""
        return self._expected or self._group is not None

    def _subgroup(self) -> Collective:
        if self._group is None:
            group = self._make_group()
            assert group is not None, "strategies whose ranks gather have a group, or can make one"
            # Gradients may be on their way through the group itself.
            self._group = group.subgroup("all-gather", range(group.world))
        return self._group

    def _announce(self, mine: _Announcement, device: torch.device) -> list[_Announcement]:
        """
        Exchange announcements of the next operation; give those of ranks that know of one.

        Raises:
            RuntimeError: ranks announce different operations.
        """
        group = self._subgroup()
        every = [_Announcement.read(row) for row in gather_numbers(mine.numbers(), group, device)]
        self._rows = [one.rows for one in every]
        known = {rank: one for rank, one in enumerate(every) if one.kind != _NOTHING}
        first = {one.common: rank for rank, one in reversed(known.items())}
        if len(first) > 1:
            texts = ", ".join(f"rank {rank} {every[rank]}" for rank in sorted(first.values()))
            raise RuntimeError(
                f"workers do not call all_gather() alike: {texts}. Whether and in which order it "
                "is called, and the shape of a row, must not depend on the samples"
            )
        return [*known.values()]


class _Gather(torch.autograd.Function):
    """The rows of all ranks; the gradient of a rank's own is the sum of what all ranks found."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, gathering: Gathering, call: int) -> Tensor:
        """Give the rows of all ranks."""
        ctx.gathering, ctx.call = gathering, call
        whole, ctx.own = gathering.rows_of_all(tensor, call)
        return whole

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        """Give the gradient of this rank's rows."""
        return ctx.gathering.sum_over_ranks(gradient, ctx.call)[ctx.own], None, None


def all_gather_conflict(job: Job, roles: Roles, *, gathers: bool) -> str:
    """
    Name what keeps workers from having each a part of one step's batch, and why; empty: they have.

    Args:
        job: the run.
        roles: what its strategy needs.
        gathers: see `Strategy.gathers`.
    """
    if roles.group_size > 1:
        return "stages or slices: workers have parts of the model"
    if gathers and not roles.consistency.backup_workers:
        return ""
    name = "`backup_workers`" if gathers else f"the strategy {job.strategy.name!r}"
    return f"{name}: workers are not in one step"


def uses_all_gather(task: Task, model: nn.Module) -> bool:
    """
    Say whether the code of a task, of its module or of its model names `all_gather`.

    Args:
        task: the user's.
        model: what it has built.
    """
    kinds = {type(task), *map(type, model.modules())}
    own = vars(sys.modules.get(type(task).__module__, object)).values()
    kinds |= {
        one for one in own if isinstance(one, type) and one.__module__ == type(task).__module__
    }
    bases = {base for kind in kinds for base in kind.__mro__ if base is not nn.Module}
    members = [member for base in bases for member in vars(base).values()]
    functions = [one for one in [*own, *members] if isinstance(one, FunctionType)]
    return any(all_gather.__name__ in referenced_names(one) for one in functions)
