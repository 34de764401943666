"""
Average gradients with the servers of `ps-sync`, in each backward.

    vector     | gradients of model 0 | of model 1 | which exist |
    backward ─ push ─▶ servers sum in rank order ─▶ the sum ─▶ mean in `.grad` | returns

Servers store no part of the model. They only sum, like the summation service of BytePS (Jiang et
al., OSDI 2020), and each worker runs its own optimizer. A loop may therefore use `.grad` between
backward and step as in a single process (docs/decisions/train_function.md).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence, Set

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from typing_extensions import override

from distplat.platform.errors import NonFiniteError, Problem, SpecError
from distplat.platform.shard_map import OwnLoop
from distplat.platform.vector_layout import Layout, Piece, Segment
from distplat.strategies.function.gradient_average import GradientAverage, SessionContext
from distplat.strategies.loop.control import ELSEWHERE, NonFiniteSteps
from distplat.strategies.model.flat import FlatModel
from distplat.strategies.model.parameter_layout import first_non_finite, is_finite, typed_views
from distplat.strategies.ports import LoopOptimizer, LoopShards
from distplat.strategies.torch_compat import after_backward, not_compiled

_CACHE_LINE, _BLOCK_SIZE = 64, 4096
"""In bytes: alignment of each model's gradients, and of the size of a vector of several dtypes."""


class SummedVectors:
    """
    The vectors to sum, see `Vectors`: the gradients of all models, and which of them exist.

    Args:
        flats: the models.
    """

    def __init__(self, flats: Sequence[FlatModel]) -> None:
        dtypes = dict.fromkeys(s.dtype for flat in flats for s in flat.layout.segments)
        self.mixed = len(dtypes) > 1
        dtype = torch.uint8 if self.mixed else getattr(torch, next(iter(dtypes)))
        line = _CACHE_LINE // dtype.itemsize
        segments: list[Segment] = []
        self.starts: list[int] = []
        """First element of each model's gradients."""
        end = 0
        for flat in flats:
            self.starts.append(end)
            item = flat.grads.itemsize // dtype.itemsize
            for s in flat.layout.segments:
                segments.append(Segment(end + s.start * item, end + s.stop * item, s.dtype))
            end = -(-(end + flat.size * item) // line) * line
        count = sum(len(flat.slots) for flat in flats)
        flags_dtype = "float32" if self.mixed else next(iter(dtypes))
        stop = end + count * (getattr(torch, flags_dtype).itemsize // dtype.itemsize)
        self._flags = Segment(end, stop, flags_dtype)
        size = -(-stop // _BLOCK_SIZE) * _BLOCK_SIZE if self.mixed else stop
        pieces = tuple(Piece(0, s.start, s.stop) for s in [*segments, self._flags])
        self.layout = Layout(size, (*segments, self._flags), pieces, 1, size)
        self.params = torch.zeros(size, dtype=dtype, device=flats[0].params.device)
        self.grads = torch.zeros_like(self.params)
        self.version = 0
        self._digest = hashlib.sha256(repr([flat.digest() for flat in flats]).encode())

    @property
    def size(self) -> int:
        """See `Vectors`."""
        return self.layout.size

    def digest(self) -> str:
        """See `Vectors`."""
        return self._digest.hexdigest()[:16]

    def move(self, params: Tensor, grads: Tensor) -> None:
        """See `Vectors`."""
        self.params, self.grads = params, grads

    @property
    def flags(self) -> Tensor:
        """Whether this rank has a gradient, for each slot of all models."""
        (flags,) = typed_views(self.grads, [self._flags])
        return flags

    @property
    def summed_flags(self) -> Tensor:
        """Number of ranks that have a gradient, for each slot of all models."""
        (flags,) = typed_views(self.params, [self._flags])
        return flags

    def of_model(self, vector: Tensor, number: int, flat: FlatModel) -> Tensor:
        """Return a model's part of a vector, in the model's own dtype."""
        start = self.starts[number]
        length = flat.size * flat.grads.itemsize // vector.itemsize
        return vector[start : start + length].view(flat.grads.dtype)

    def finite(self) -> bool:
        """Return whether all sums are finite."""
        return all(map(is_finite, typed_views(self.params, self.layout.segments)))


class ServerSum:
    """
    The connection to the servers, shared by all models of a session.

    Args:
        context: settings shared by all models.
        shards: the port to the servers; not connected yet.
    """

    def __init__(self, context: SessionContext, shards: LoopShards) -> None:
        self.context, self._shards = context, shards
        self.members: list[GradientAverage] = []
        self._vectors: SummedVectors | None = None
        self._is_scheduled = False
        self._pushes = 0
        self._policy = NonFiniteSteps.of(context.job)

    def add(self, member: GradientAverage) -> None:
        """
        Add a model.

        Raises:
            SpecError: A backward has already run.
        """
        if self._vectors is not None:
            text = "prepare() got a model after a backward, when the servers were connected already"
            hint = "prepare all models before the first backward, or use `strategy: ring`"
            raise SpecError(Problem(("task",), text, hint))
        self.members.append(member)

    def begin(self) -> None:
        """Called with each gradient; a backward's first one schedules the exchange at its end."""
        if not self._is_scheduled:
            self._is_scheduled = True
            for member in self.members:
                member.flat.gradients.copied.clear()
            after_backward(self._exchange)

    def leave(self) -> None:
        """Called when this rank's loop has ended; ranks that wait for its gradient are informed."""
        if self.members:
            self._connect()
            self._shards.leave()

    def _connect(self) -> SummedVectors:
        """Connect to the servers on the first call, keeping existing gradients and parameters."""
        if self._vectors is not None:
            return self._vectors
        flats = [member.flat for member in self.members]
        for flat in flats:
            flat.check_layout(self.context.step())
        self._vectors = vectors = SummedVectors(flats)
        self._shards.connect_loop(vectors, LoopOptimizer(OwnLoop()))
        for number, flat in enumerate(flats):
            flat.move(flat.params, vectors.of_model(vectors.grads, number, flat))
        return vectors

    @not_compiled
    def _exchange(self) -> None:
        """Called at the end of backward: average the gradients of all models."""
        self._is_scheduled = False
        vectors, context = self._connect(), self.context
        present = [member.gather().present for member in self.members]
        vectors.flags.copy_(torch.from_numpy(np.concatenate(present)))
        local = context.record(np.ones(1, np.bool_))
        if self._policy.checks and (slot := self._first_non_finite()) is not None:
            local = local.broken(slot)
        pushed = self._shards.push(self._pushes, local)
        self._pushes += 1
        total = (pushed.total or local).named(local)
        total.check_batch(local, context.step())
        if self._policy.checks and vectors.grads.dtype is torch.float16 and not vectors.finite():
            total = total.broken(ELSEWHERE)
        broken: NonFiniteError | None = None
        try:
            self._policy.decide(total, context.step(), self._name)
        except NonFiniteError as error:
            broken = error
        has_gradient: NDArray[np.bool_] = (vectors.summed_flags > 0).cpu().numpy()
        ends, scale = np.cumsum([len(flags) for flags in present])[:-1], 1.0 / context.group.world
        for number, mask in enumerate(np.split(has_gradient, ends)):
            member = self.members[number]
            flat = member.flat
            sums = vectors.of_model(vectors.params, number, flat)
            sum_views = sums, flat.segments, flat.layout.pieces
            is_intact = broken is None or first_non_finite(*sum_views) is None
            member.set_non_finite(None if is_intact else broken)
            member.write_means(np.flatnonzero(mask).tolist(), scale, sums)
            member.finish()

    def _first_non_finite(self) -> int | None:
        """Return the first slot of all models with a non-finite gradient; None: all are finite."""
        first = 0
        for member in self.members:
            if (slot := member.flat.first_non_finite(unseen=True)) is not None:
                return first + slot
            first += len(member.flat.slots)
        return None

    def _name(self, slot: int) -> str:
        return [m.flat.name(n) for m in self.members for n in range(len(m.flat.slots))][slot]


class ServerAverage(GradientAverage):
    """
    Averages gradients with servers that sum them.

    Args:
        model: see `GradientAverage`.
        servers: the connection to the servers.
        number: see `GradientAverage`.
        local_buffers: see `GradientAverage`.
    """

    def __init__(
        self,
        model: nn.Module,
        servers: ServerSum,
        number: int,
        local_buffers: Set[nn.Module],
    ) -> None:
        super().__init__(model, servers.context, number, local_buffers)
        self._servers = servers
        servers.add(self)

        self.flat.copy_when_ready(True, check_finite=self._policy.checks)

    @override
    def _start_exchange(self, index: int) -> None:
        self._servers.begin()
        self.flat.gradients.ready(index)  # while the gradient is in the processor's cache
