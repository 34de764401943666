"""
One stage goes through a plan: what is live between forward and backward, and what is sent when.

    stage 0    F0 ─▶ F1 ─▶ ...      B0       what nobody waits for:
    stage 1          F0    B0 ─▶ ──▲  W0     weights' gradients, after the input's gradient has left
"""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from distplat.strategies.algorithms.schedule import Action, Kind
from distplat.strategies.algorithms.schedule_messages import Content, Message, Plan, Recv, Send
from distplat.strategies.pipeline.channel import Channel
from distplat.strategies.pipeline.in_place import InPlace, Sums
from distplat.strategies.pipeline.packed import Packed
from distplat.strategies.pipeline.part import Chunk, Way
from distplat.strategies.pipeline.seams import Source, Span, Tail


@dataclass(frozen=True)
class Seat:
    """Where a rank sits in its pipeline, and what it works with."""

    chunks: dict[int, Chunk]
    """This rank's, by place along the model."""
    stage: int
    """This rank's."""
    stages: int
    channel: Channel
    """To the other stages."""
    context: Callable[[], AbstractContextManager[object]]
    """Gives the context in which forwards run."""
    alive: Callable[[], None]
    """Called after each thing done."""

    @property
    def depth(self) -> int:
        """Places along the whole model."""
        return len(self.chunks) * self.stages

    def is_last(self, place: int) -> bool:
        """Whether what the place gives goes into the loss."""
        return place + 1 == self.depth


class _Live(NamedTuple):
    """A micro-batch between forward and backward."""

    inputs: Tensor
    outputs: Tensor
    """On the last place what is to be differentiated."""
    buffer: Tensor | None
    """What `inputs` lies in, if it is to be given back."""


class Run:
    """
    One execution of a plan on one rank.

    Args:
        seat: where it is.
        plan: what is to be done.
        source: of micro-batches.
        tail: told when gradients become final; None: forwards alone.
        packed: weights of this step.
    """

    def __init__(
        self, seat: Seat, plan: Plan, source: Source, tail: Tail | None, packed: Packed
    ) -> None:
        self._seat, self._plan, self._source, self._tail = seat, plan, source, tail
        self._channel = seat.channel
        self._schedule = plan.schedule
        self._final = plan.schedule.micro_batches - 1
        self._splits = plan.schedule.splits_backward
        self._have: dict[Message, tuple[Tensor, bool]] = {}  #: with whether it is a buffer
        self._packed, self._sums = packed, Sums(packed)
        # Who listens learns from parameters' hooks when gradients are final.
        by_hooks = tail is not None and tail.listens
        self._last = self._final - 1 if by_hooks else self._final  #: that adds in place
        self._live: dict[tuple[int, int], _Live] = {}
        self._late: dict[tuple[int, int], tuple[_Live, Tensor | None, Tensor | None]] = {}
        self.spans: list[Span] = []

    def run(self) -> list[Span]:
        """
        Do it; give what was done, and when.

        Raises:
            CollectiveError: a stage is missing.
        """
        stages, alive = self._seat.stages, self._seat.alive
        for step in self._plan.steps[self._seat.stage]:
            if isinstance(step, Recv):  # the first message is long in coming
                self._beside("pack", self._packed.prepare, step.message.micro_batch)
            began = time.perf_counter()
            if isinstance(step, Send):
                kind, chunk = "send", step.message.source // stages
                tensor, _ = self._have.pop(step.message)
                self._channel.send(tensor, step.to)
                number = step.message.micro_batch
            elif isinstance(step, Recv):
                kind, chunk = "recv", step.message.target // stages
                number = step.message.micro_batch
                buffer = self._channel.receive(self._kind(step.message), step.source)
                self._have[step.message] = buffer, True
            else:
                kind, chunk, number = step.kind.value, step.chunk, step.micro_batch
                self._compute(step)
            self.spans.append(Span(kind, chunk, number, began, time.perf_counter()))
            if self._nobody_waits(step):
                self._beside("W", self._sums.settle, number)
            alive()
        self._channel.finish()
        return self.spans

    def _nobody_waits(self, step: Send | Recv | Action) -> bool:
        """
        Whether a backward is over, and what it gives the stage before is on its way.

        So it is once for each backward, before the next one: nothing is due at a step's end.
        """
        if isinstance(step, Send):
            return step.message.content is Content.GRADIENT
        if isinstance(step, Recv) or step.kind is not Kind.BACKWARD:
            return False
        return self._schedule.place(self._seat.stage, step) == 0

    def _beside(self, kind: str, work: Callable[[], bool], number: int) -> None:
        """Compute what is in no schedule."""
        began = time.perf_counter()
        if work():
            self.spans.append(Span(kind, 0, number, began, time.perf_counter()))

    def _kind(self, message: Message) -> tuple[int, int]:
        """Give what buffers of a message are like: a gradient has the shape of its activation."""
        entered = max(message.source, message.target)
        return entered, self._source.sizes[message.micro_batch]

    def _compute(self, action: Action) -> None:
        place = self._schedule.place(self._seat.stage, action)
        if action.kind is Kind.FORWARD:
            self._forward(action.micro_batch, place)
            return
        makes_final = Kind.WEIGHT if self._splits else Kind.BACKWARD
        final = action.micro_batch == self._final and action.kind is makes_final
        if final and self._tail is not None:
            self._tail.last_backward()
        if action.kind is Kind.BACKWARD:
            self._backward(action.micro_batch, place)
        else:
            self._weights(action.micro_batch, place)
        if final and self._tail is not None:
            self._tail.pause()

    def _forward(self, number: int, place: int) -> None:
        seat, source = self._seat, self._source
        buffer: Tensor | None = None
        if place == 0:
            inputs = source.inputs(number)
        else:
            arrived, pooled = self._have.pop(_activation(number, place))
            buffer = arrived if pooled else None
            inputs = arrived.detach()
            inputs.requires_grad_(self._tail is not None)
        with seat.context():
            outputs = seat.chunks[place].run(inputs, source.seed(number), self._way(number))
        if buffer is not None and _one_memory(buffer, outputs):
            buffer = None  # a chunk that hands its input on: others still read it
        if seat.is_last(place):
            outputs = source.loss(number, outputs)
        else:
            self._have[_activation(number, place + 1)] = outputs.detach(), False
        if self._tail is not None:
            self._live[number, place] = _Live(inputs, outputs, buffer)
        elif buffer is not None:
            self._channel.give_back((place, source.sizes[number]), buffer)

    def _way(self, number: int) -> Way:
        """The last micro-batch's gradients are final, and hooks are to say so."""
        if self._tail is None or self._splits or number > self._last:
            return nullcontext
        return partial(InPlace, self._sums, flush=number == self._last)

    def _backward(self, number: int, place: int) -> None:
        """Where backward is split, the gradient of the input alone."""
        live = self._live.pop((number, place))
        gradient, pooled = self._gradient_for(number, place)
        buffer = gradient if pooled else None
        if self._splits:
            if place > 0 and live.outputs.requires_grad:
                torch.autograd.backward(
                    live.outputs, gradient, inputs=[live.inputs], retain_graph=True
                )
        elif live.outputs.requires_grad:
            torch.autograd.backward(live.outputs, gradient)
        if place > 0:
            made = live.inputs.grad
            live.inputs.grad = None
            made = torch.zeros_like(live.inputs) if made is None else made
            if buffer is not None and _one_memory(buffer, made):
                buffer = None
            self._have[_gradient(number, place - 1)] = made, False
        if self._splits:
            self._late[number, place] = live, gradient, buffer
        else:
            self._give_back(number, place, live, buffer)

    def _weights(self, number: int, place: int) -> None:
        live, gradient, buffer = self._late.pop((number, place))
        own = [p for p in self._seat.chunks[place].parameters() if p.requires_grad]
        if own and live.outputs.requires_grad:
            torch.autograd.backward(live.outputs, gradient, inputs=own)
        self._give_back(number, place, live, buffer)

    def _gradient_for(self, number: int, place: int) -> tuple[Tensor | None, bool]:
        if self._seat.is_last(place):
            return None, False
        return self._have.pop(_gradient(number, place))

    def _give_back(self, number: int, place: int, live: _Live, gradient: Tensor | None) -> None:
        size = self._source.sizes[number]
        if live.buffer is not None:
            self._channel.give_back((place, size), live.buffer)
        if gradient is not None:
            self._channel.give_back((place + 1, size), gradient)


def _one_memory(one: Tensor, other: Tensor) -> bool:
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


def _activation(number: int, place: int) -> Message:
    return Message(Content.ACTIVATION, number, place - 1, place)


def _gradient(number: int, place: int) -> Message:
    """Name the gradient of what a place gives."""
    return Message(Content.GRADIENT, number, place + 1, place)
