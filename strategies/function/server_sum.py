"""
Averages gradients by the servers of `ps-sync`, in each backward.

    vector     | gradients of model 0 | of model 1 | who has one |
    backward ─ push ─▶ servers add up in rank order ─▶ the sum ─▶ mean in `.grad` | returns

Servers keep nothing of the model: they add up, as the summation service of BytePS does (Jiang et
al., OSDI 2020), and each worker makes the update with its own optimizer. So what a loop does with
`.grad` between backward and step is what it does in one process (docs/decisions/train_function.md).
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

_LINE, _BLOCK = 64, 4096
"""Bytes: models begin at multiples of a cache line; a vector of several types is one of a block."""


class SummedVectors:
    """
    What is summed, see `Vectors`: the gradients of all models, and who has one.

    Args:
        flats: the models.
    """

    def __init__(self, flats: Sequence[FlatModel]) -> None:
        types = dict.fromkeys(s.dtype for one in flats for s in one.layout.segments)
        self.mixed = len(types) > 1
        kind = torch.uint8 if self.mixed else getattr(torch, next(iter(types)))
        line = _LINE // kind.itemsize
        segments: list[Segment] = []
        self.starts: list[int] = []
        """Where each model's gradients begin."""
        end = 0
        for one in flats:
            self.starts.append(end)
            item = one.grads.itemsize // kind.itemsize
            for s in one.layout.segments:
                segments.append(Segment(end + s.start * item, end + s.stop * item, s.dtype))
            end = -(-(end + one.size * item) // line) * line
        count = sum(len(one.slots) for one in flats)
        own = "float32" if self.mixed else next(iter(types))
        stop = end + count * (getattr(torch, own).itemsize // kind.itemsize)
        self._flags = Segment(end, stop, own)
        size = -(-stop // _BLOCK) * _BLOCK if self.mixed else stop
        pieces = tuple(Piece(0, one.start, one.stop) for one in [*segments, self._flags])
        self.layout = Layout(size, (*segments, self._flags), pieces, 1, size)
        self.params = torch.zeros(size, dtype=kind, device=flats[0].params.device)
        self.grads = torch.zeros_like(self.params)
        self.version = 0
        self._digest = hashlib.sha256(repr([one.digest() for one in flats]).encode())

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
        """By slot of all models, whether this rank has a gradient."""
        (flags,) = typed_views(self.grads, [self._flags])
        return flags

    @property
    def summed_flags(self) -> Tensor:
        """By slot of all models, how many ranks have a gradient."""
        (flags,) = typed_views(self.params, [self._flags])
        return flags

    def of_model(self, vector: Tensor, number: int, flat: FlatModel) -> Tensor:
        """Give a model's part of a vector, with the elements of the model's own."""
        start = self.starts[number]
        length = flat.size * flat.grads.itemsize // vector.itemsize
        return vector[start : start + length].view(flat.grads.dtype)

    def finite(self) -> bool:
        """Say whether all sums are finite, by their views in the vector."""
        return all(map(is_finite, typed_views(self.params, self.layout.segments)))


class ServerSum:
    """
    What all models of a session share: the servers.

    Args:
        context: the run.
        shards: the way to the servers; not connected yet.
    """

    def __init__(self, context: SessionContext, shards: LoopShards) -> None:
        self.context, self._shards = context, shards
        self.members: list[GradientAverage] = []
        self._vectors: SummedVectors | None = None
        self._under_way = False
        self._pushes = 0
        self._policy = NonFiniteSteps.of(context.job)

    def add(self, member: GradientAverage) -> None:
        """
        Take a model in.

        Raises:
            SpecError: it comes too late.
        """
        if self._vectors is not None:
            text = "prepare() got a model after a backward, when the servers had all there is"
            hint = "prepare all models before the first backward, or use `strategy: ring`"
            raise SpecError(Problem(("task",), text, hint))
        self.members.append(member)

    def begin(self) -> None:
        """Called with each gradient; the first one of a backward begins the exchange at its end."""
        if not self._under_way:
            self._under_way = True
            for one in self.members:
                one.flat.gradients.copied.clear()
            after_backward(self._exchange)

    def leave(self) -> None:
        """Called when this rank's loop is over; who waits for its gradient is told so."""
        if self.members:
            self._connect()
            self._shards.leave()

    def _connect(self) -> SummedVectors:
        """Meet the servers, once; gradients that are there stay, and what a loop has written."""
        if self._vectors is not None:
            return self._vectors
        flats = [one.flat for one in self.members]
        for flat in flats:
            flat.check_layout(self.context.step())
        self._vectors = vectors = SummedVectors(flats)
        self._shards.connect_loop(vectors, LoopOptimizer(OwnLoop()))
        for number, flat in enumerate(flats):
            flat.move(flat.params, vectors.of_model(vectors.grads, number, flat))
        return vectors

    @not_compiled
    def _exchange(self) -> None:
        """Called after backward: the gradients of all models are averaged."""
        self._under_way = False
        vectors, context = self._connect(), self.context
        present = [one.gather().present for one in self.members]
        vectors.flags.copy_(torch.from_numpy(np.concatenate(present)))
        local = context.record(np.ones(1, np.bool_))
        if self._policy.looks and (slot := self._first_non_finite()) is not None:
            local = local.broken(slot)
        pushed = self._shards.push(self._pushes, local)
        self._pushes += 1
        total = (pushed.total or local).named(local)
        total.check_batch(local, context.step())
        if self._policy.looks and vectors.grads.dtype is torch.float16 and not vectors.finite():
            total = total.broken(ELSEWHERE)
        broken: NonFiniteError | None = None
        try:
            self._policy.decide(total, context.step(), self._name)
        except NonFiniteError as error:
            broken = error
        now: NDArray[np.bool_] = (vectors.summed_flags > 0).cpu().numpy()
        ends, scale = np.cumsum([len(one) for one in present])[:-1], 1.0 / context.group.world
        for number, has in enumerate(np.split(now, ends)):
            member = self.members[number]
            flat = member.flat
            sums = vectors.of_model(vectors.params, number, flat)
            looked = sums, flat.segments, flat.layout.pieces
            whole = broken is None or first_non_finite(*looked) is None
            member.note(None if whole else broken)
            member.hand_out(np.flatnonzero(has).tolist(), scale, sums)
            member.finish()

    def _first_non_finite(self) -> int | None:
        """Give the first slot of all models whose gradient is not finite; None: all are."""
        first = 0
        for one in self.members:
            if (slot := one.flat.first_non_finite(unseen=True)) is not None:
                return first + slot
            first += len(one.flat.slots)
        return None

    def _name(self, slot: int) -> str:
        names = [one.flat.name(n) for one in self.members for n in range(len(one.flat.slots))]
        return names[slot]


class ServerAverage(GradientAverage):
    """
    By servers that add gradients up.

    Args:
        model: see `GradientAverage`.
        servers: the way to them.
        number: see there.
        own_buffers: see there.
    """

    def __init__(
        self,
        model: nn.Module,
        servers: ServerSum,
        number: int,
        own_buffers: Set[nn.Module],
    ) -> None:
        super().__init__(model, servers.context, number, own_buffers)
        self._servers = servers
        servers.add(self)

        self.flat.copy_when_ready(True, looks=self._policy.looks)

    @override
    def _begin(self, index: int) -> None:
        self._servers.begin()
        self.flat.gradients.ready(index)  # while it is in the processor's cache
