"""
Differentiable `distplat.all_gather`, for losses that need the rows of all ranks.

    forward    each rank: own rows ────────▶ rows of all ranks, in rank order
    backward   each rank: gradient of all rows ── sum ──▶ gradient of own rows

Before each operation all ranks exchange announcements. Different operations raise an error. A rank
without samples in a step participates in the operations of the other ranks until these announce
the end of their calls. This protocol costs an additional operation in each step, so ranks without
samples use it only if the code of the task or model names `all_gather`, or if an earlier step has
called `all_gather`.
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
from typing_extensions import override

from distplat.platform.errors import Problem, SpecError
from distplat.platform.spec import Job
from distplat.strategies.collective import Collective, gather_numbers
from distplat.strategies.strategy_spec import Roles
from distplat.strategies.task import Task
from distplat.strategies.task_methods import referenced_names

_IDLE, _FORWARD, _BACKWARD, _END = range(4)
_MAX_DIMENSIONS = 8
_DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32]

_NOT_EXPECTED = Problem(
    ("task",),
    "all_gather() is first called in a step in which a worker has no samples and does not expect "
    "the call",
    "name it in a method of the task or in the model's forward(), or set data.drop_last: true",
)

_thread_state = threading.local()
"""`gathering`: the `Gathering` of this thread's step; `calls`: this thread's calls so far."""

_OTHER_THREAD = Problem(
    ("task",),
    "all_gather() is called outside the training thread, where it cannot gather rows",
    "do not call it inside torch.utils.checkpoint: on a GPU, recomputation runs in another thread",
)


class _ActiveGatherings:
    """Number of gatherings of this process that have been entered and have several ranks."""

    def __init__(self) -> None:
        self.count, self._lock = 0, threading.Lock()

    def add(self, change: int) -> None:
        with self._lock:
            self.count += change


_active = _ActiveGatherings()


def all_gather(tensor: Tensor) -> Tensor:
    """
    Return the rows of all workers' batches, in rank order; for a loss that needs all samples.

    Gradients flow back to the workers that own the rows. All workers with samples in a step must
    make the same calls. Outside of training steps, for example in evaluations, the tensor itself
    is returned. In a train function each call gathers, and all workers must make it.

    Args:
        tensor: shape [rows, ...]; workers may have different numbers of rows. The dtype is bool,
            int32, int64, or floating point of 16 to 64 bits.

    Returns:
        Shape [rows of all workers, ...]; with one worker a copy.

    Raises:
        SpecError: `gradient_accumulation` splits the batch of a step, the strategy's workers are
            not in the same step, or the calling thread is not the training thread.
    """
    _thread_state.calls = calls() + 1
    if _active.count and not hasattr(_thread_state, "gathering"):
        raise SpecError(_OTHER_THREAD)
    gathering: Gathering | None = getattr(_thread_state, "gathering", None)
    return tensor if gathering is None else gathering.gather(tensor)


def calls() -> int:
    """Return the number of calls of `all_gather` in this thread."""
    return getattr(_thread_state, "calls", 0)


def idle_ranks_wait() -> bool:
    """Return whether this thread's step has ranks without samples that wait for calls."""
    gathering: Gathering | None = getattr(_thread_state, "gathering", None)
    return gathering is not None and gathering.idle_ranks_wait


class _Announcement(NamedTuple):
    """The next operation of a rank, sent to all ranks before the operation."""

    operation: int
    call: int = 0
    """Number of the call in the step."""
    dtype: int = 0
    """Index in `_DTYPES`."""
    rows: int = 0
    row_shape: tuple[int, ...] = ()

    @classmethod
    def of(cls, operation: int, call: int, tensor: Tensor) -> _Announcement:
        """Build the announcement of an operation on a tensor."""
        dtype = _DTYPES.index(tensor.dtype)
        return cls(operation, call, dtype, len(tensor), tuple(tensor.shape[1:]))

    @classmethod
    def from_numbers(cls, numbers: list[int]) -> _Announcement:
        """Decode the result of `to_numbers`."""
        operation, call, dtype, rows, dimensions, *row_shape = numbers
        return cls(operation, call, dtype, rows, tuple(row_shape[:dimensions]))

    @override
    def __str__(self) -> str:
        """`makes call 1 with rows of float32 [3]`."""
        if self.operation == _END:
            return "makes no more calls"
        verb = "makes" if self.operation == _FORWARD else "is in the backward of"
        dtype = str(_DTYPES[self.dtype]).removeprefix("torch.")
        return f"{verb} call {self.call} with rows of {dtype} {[*self.row_shape]}"

    def to_numbers(self) -> list[int]:
        """Encode the announcement as integers; their number is the same for all shapes."""
        padding = [0] * (_MAX_DIMENSIONS - len(self.row_shape))
        row_shape = [len(self.row_shape), *self.row_shape, *padding]
        return [self.operation, self.call, self.dtype, self.rows, *row_shape]

    @property
    def signature(self) -> tuple[object, ...]:
        """The fields that must be equal on all ranks; in backward each rank has all rows."""
        rows = self.rows if self.operation == _BACKWARD else 0
        return self.operation, self.call, self.dtype, rows, self.row_shape

    def zeros(self, rows: int, device: torch.device) -> Tensor:
        """Create a tensor of zeros with the announced dtype and row shape."""
        return torch.zeros(rows, *self.row_shape, dtype=_DTYPES[self.dtype], device=device)


class Gathering:
    """
    One rank's state of `all_gather` in an attempt; a context manager for the forwards of a step.

    Args:
        make_group: creates or returns the group of all ranks; called by all ranks or by none.
        world: number of ranks.
        micro_batches: returns each rank's number of micro-batches in a step.
        expected: whether the code of the task or model names `all_gather`; see `uses_all_gather`.
        refused: the problem with any call of `all_gather` in this job; None: calls are allowed.
    """

    def __init__(
        self,
        make_group: Callable[[], Collective | None] = lambda: None,
        world: int = 1,
        micro_batches: Callable[[int], Sequence[int]] = lambda step: [1],
        expected: bool = False,
        refused: Problem | None = None,
    ) -> None:
        self._make_group, self._world, self._micro_batches = make_group, world, micro_batches
        self._expected, self._refused = expected, refused
        # marks this thread as a training thread, which `all_gather` checks
        _thread_state.gathering = getattr(_thread_state, "gathering", None)
        self._group: Collective | None = None
        self._step = 0  #: the current step
        self._calls = 0  #: calls in the current step

    def begin(self, step: int) -> Gathering:
        """Start a step, before its forwards."""
        self._step, self._calls = step, 0
        return self

    def __enter__(self) -> None:
        _thread_state.gathering = self
        _active.add(int(self._world > 1))

    def __exit__(self, *error: object) -> None:
        _thread_state.gathering = None
        _active.add(-int(self._world > 1))

    def finish(self, device: torch.device) -> None:
        """
        Announce the end of this rank's calls.

        A rank without samples participates in the operations of the other ranks, until they end.

        Args:
            device: device of the model.

        Raises:
            CollectiveError: a rank is missing.
            RuntimeError: another rank makes a further call.
        """
        if self._world == 1 or not self._idle_ranks_participate:
            return
        if self._micro_batches(self._step)[self._subgroup().rank]:
            self._announce(_Announcement(_END), device)
            return
        while (peer := self._announce(_Announcement(_IDLE), device)[0]).operation != _END:
            rows = sum(self._row_counts) if peer.operation == _FORWARD else peer.rows
            self._subgroup().all_reduce(peer.zeros(rows, device))

    def gather(self, tensor: Tensor) -> Tensor:
        """Return all ranks' rows in rank order, differentiably; see `distplat.all_gather`."""
        if self._refused is not None:
            raise SpecError(self._refused)
        if not 1 <= tensor.ndim <= _MAX_DIMENSIONS:
            text = f"all_gather() requires 1 to {_MAX_DIMENSIONS} dimensions, rows first"
            raise ValueError(f"{text}; got a tensor with {tensor.ndim} dimensions")
        dtypes = (*_DTYPES, torch.bool)
        if tensor.dtype not in dtypes:
            names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            text = f"all_gather() does not support the dtype {tensor.dtype}: convert the tensor"
            raise ValueError(f"{text}, for example with .long(), to one of {names}")
        if self._world == 1:
            return tensor.clone()  # as with several ranks, writes to the result leave the input
        if tensor.dtype is torch.bool:
            return self.gather(tensor.int()).bool()
        if not self._idle_ranks_participate and min(self._micro_batches(self._step)) == 0:
            raise SpecError(_NOT_EXPECTED)
        self._calls += 1
        apply: Any = _Gather.apply
        rows: Tensor = apply(tensor, self, self._calls)
        return rows

    @property
    def idle_ranks_wait(self) -> bool:
        """Whether this step has ranks without samples, which wait in `finish` for calls."""
        return self._idle_ranks_participate and min(self._micro_batches(self._step)) == 0

    def gather_rows(self, tensor: Tensor, call: int) -> tuple[Tensor, slice]:
        """Return the rows of all ranks, and the slice with this rank's rows."""
        announcement = _Announcement.of(_FORWARD, call, tensor)
        self._announce(announcement, tensor.device)
        ends = [*accumulate(self._row_counts)]
        rank = self._subgroup().rank
        own_rows = slice(ends[rank] - self._row_counts[rank], ends[rank])
        gathered = announcement.zeros(ends[-1], tensor.device)
        gathered[own_rows] = tensor.detach()
        self._subgroup().all_reduce(gathered)
        return gathered, own_rows

    def sum_over_ranks(self, gradient: Tensor, call: int) -> Tensor:
        """Return the gradient of all rows, summed over the ranks."""
        self._announce(_Announcement.of(_BACKWARD, call, gradient), gradient.device)
        total = gradient.clone(memory_format=torch.contiguous_format)
        self._subgroup().all_reduce(total)
        return total

    @property
    def _idle_ranks_participate(self) -> bool:
        """Whether ranks without samples participate in operations; equal on all ranks."""
        return self._expected or self._group is not None

    def _subgroup(self) -> Collective:
        if self._group is None:
            group = self._make_group()
            assert group is not None, (
                "a strategy that supports all_gather has a group or can create one"
            )
            # a subgroup, since gradients may be in flight in the group
            self._group = group.subgroup("all-gather", range(group.world))
        return self._group

    def _announce(self, announcement: _Announcement, device: torch.device) -> list[_Announcement]:
        """
        Exchange announcements of the next operation; return those of ranks with samples.

        Raises:
            RuntimeError: ranks announce different operations.
        """
        group = self._subgroup()
        numbers = gather_numbers(announcement.to_numbers(), group, device)
        announced = [_Announcement.from_numbers(row) for row in numbers]
        self._row_counts = [a.rows for a in announced]
        active = {rank: a for rank, a in enumerate(announced) if a.operation != _IDLE}
        first_ranks = {a.signature: rank for rank, a in reversed(active.items())}
        if len(first_ranks) > 1:
            ranks = sorted(first_ranks.values())
            texts = ", ".join(f"rank {rank} {announced[rank]}" for rank in ranks)
            raise RuntimeError(
                f"workers make different calls of all_gather(): {texts}. Whether and in which "
                "order it is called, and the shape of a row, must not depend on the samples"
            )
        return [*active.values()]


class _Gather(torch.autograd.Function):
    """Rows of all ranks; the gradient of a rank's own rows is summed over all ranks."""

    @staticmethod
    @override
    def forward(ctx: Any, tensor: Tensor, gathering: Gathering, call: int) -> Tensor:
        """Return the rows of all ranks."""
        ctx.gathering, ctx.call = gathering, call
        gathered, ctx.own_rows = gathering.gather_rows(tensor, call)
        return gathered

    @staticmethod
    @once_differentiable
    @override
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        """Return the gradient of this rank's rows."""
        return ctx.gathering.sum_over_ranks(gradient, ctx.call)[ctx.own_rows], None, None


def all_gather_conflict(job: Job, roles: Roles, *, gathers: bool) -> str:
    """
    Return the setting that prevents `all_gather`, with the reason; empty: `all_gather` is allowed.

    Each worker must hold the whole model and compute a part of the same step's batch.

    Args:
        job: the job.
        roles: the roles of the job's strategy.
        gathers: see `Strategy.gathers`.
    """
    if roles.group_size > 1:
        return "stages or slices: workers have parts of the model"
    if gathers and not roles.consistency.backup_workers:
        return ""
    name = "`backup_workers`" if gathers else f"the strategy {job.strategy.name!r}"
    return f"{name}: workers are not in the same step"


def uses_all_gather(task: Task, model: nn.Module) -> bool:
    """
    Return whether the code of a task, its module or its model names `all_gather`.

    Args:
        task: the user's task.
        model: the task's model.
    """
    module = type(task).__module__
    classes = {type(task), *map(type, model.modules())}
    module_values = vars(sys.modules.get(module, object)).values()
    classes |= {v for v in module_values if isinstance(v, type) and v.__module__ == module}
    bases = {base for cls in classes for base in cls.__mro__ if base is not nn.Module}
    members = [member for base in bases for member in vars(base).values()]
    functions = [v for v in [*module_values, *members] if isinstance(v, FunctionType)]
    return any(all_gather.__name__ in referenced_names(function) for function in functions)
