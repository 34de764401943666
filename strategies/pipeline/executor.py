"""
One stage of one replica follows its list: computes, sends, receives, as the schedule says.

Deadlock is impossible by construction: the lists run to their ends with room for one message per
channel (`algorithms/pipeline_schedule.py`), and every channel has room for one at least.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from distplat.strategies.algorithms.pipeline_schedule import (
    Action,
    ActionKind,
    Content,
    Message,
    PipelineSchedule,
    Plan,
    Recv,
    Send,
    build,
    with_communication,
)
from distplat.strategies.model.flat import FlatModel
from distplat.strategies.pipeline.channel import Channel
from distplat.strategies.pipeline.interfaces import Source, Tail, TraceSpan
from distplat.strategies.pipeline.limits import Reached, untouched
from distplat.strategies.pipeline.rank_model import Chunk


@lru_cache(maxsize=16)  # an epoch's last batch may have fewer micro-batches than the others
def training_plan(name: str, stages: int, micro_batches: int, chunks: int) -> Plan:
    """
    Give the plan of a step.

    `interleaved` takes multiples of its stages only; a short batch goes through all chunks forward,
    then through all backward.
    """
    if name == "interleaved" and micro_batches % stages:
        return with_communication(flushed(stages, micro_batches, chunks))
    return with_communication(build(name, stages, micro_batches, chunks))


def flushed(stages: int, micro_batches: int, chunks: int) -> PipelineSchedule:
    """
    Give GPipe's order over several chunks; any number of micro-batches.

        F0 F1 F2 .  F0' F1' F2' .  .   B0' B1' B2' .  B0 B1 B2
        .  F0 F1 F2 .   F0' F1' F2' B0' B1' B2' .  B0 B1 B2 .
    """
    every = [(chunk, i) for chunk in range(chunks) for i in range(micro_batches)]
    back = [(chunk, i) for chunk in reversed(range(chunks)) for i in range(micro_batches)]
    order = (
        *(Action(ActionKind.FORWARD, i, chunk) for chunk, i in every),
        *(Action(ActionKind.BACKWARD, i, chunk) for chunk, i in back),
    )
    return PipelineSchedule("flushed", micro_batches, chunks, False, (order,) * stages)


@lru_cache(maxsize=16)
def evaluation_plan(stages: int, micro_batches: int, chunks: int) -> Plan:
    """Give the plan of forwards alone; in groups of as many as there are stages, to hold few."""
    order = [
        Action(ActionKind.FORWARD, i, chunk)
        for start in range(0, micro_batches, stages)
        for chunk in range(chunks)
        for i in range(start, min(start + stages, micro_batches))
    ]
    schedule = PipelineSchedule(
        "evaluation", micro_batches, chunks, False, (tuple(order),) * stages
    )
    return with_communication(schedule)


PlanOf = Callable[[int], Plan]
"""The plan for a number of micro-batches."""


@dataclass(frozen=True)
class StageContext:
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
    flat: FlatModel
    """What backward adds gradients to."""

    @property
    def depth(self) -> int:
        """Places along the whole model."""
        return len(self.chunks) * self.stages

    def is_last(self, place: int) -> bool:
        """Whether what the place gives goes into the loss."""
        return place + 1 == self.depth


class _Live(NamedTuple):
    """A micro-batch between forward and backward."""

    inputs: Any
    """A tensor; on the first place whatever the data gives."""
    outputs: Tensor
    """On the last place what is to be differentiated."""
    buffer: Tensor | None
    """What `inputs` lies in, if it is to be given back."""


class ScheduleRun:
    """
    One execution of a plan on one rank.

    Args:
        seat: where it is.
        plan: what is to be done.
        source: of micro-batches.
        tail: told when gradients become final; None: forwards alone.
        look: shown what each place gives, before it is differentiated.
    """

    def __init__(
        self,
        seat: StageContext,
        plan: Plan,
        source: Source,
        tail: Tail | None,
        look: Callable[[Tensor], None] = lambda outputs: None,
    ) -> None:
        self._seat, self._plan, self._source, self._tail = seat, plan, source, tail
        self._look = look
        self._channel = seat.channel
        self._schedule = plan.schedule
        self._final = plan.schedule.micro_batches - 1
        self._splits = plan.schedule.splits_backward
        self._have: dict[Message, tuple[Tensor, bool]] = {}  #: with whether it is a buffer
        self._live: dict[tuple[int, int], _Live] = {}
        self._late: dict[tuple[int, int], tuple[_Live, Tensor | None, Tensor | None]] = {}
        self.spans: list[TraceSpan] = []

    def run(self) -> list[TraceSpan]:
        """
        Do it; give what was done, and when.

        Raises:
            CollectiveError: a stage is missing.
        """
        stages, alive = self._seat.stages, self._seat.alive
        for step in self._plan.steps[self._seat.stage]:
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
            self.spans.append(TraceSpan(kind, chunk, number, began, time.perf_counter()))
            alive()
        self._channel.finish()
        return self.spans

    def _kind(self, message: Message) -> tuple[int, int]:
        """Give what buffers of a message are like: a gradient has the shape of its activation."""
        entered = max(message.source, message.target)
        return entered, self._source.sizes[message.micro_batch]

    def _compute(self, action: Action) -> None:
        place = self._schedule.place(self._seat.stage, action)
        if action.kind is ActionKind.FORWARD:
            self._forward(action.micro_batch, place)
            return
        makes_final = ActionKind.WEIGHT if self._splits else ActionKind.BACKWARD
        final = action.micro_batch == self._final and action.kind is makes_final
        if final and self._tail is not None:
            self._tail.last_backward()
        if action.kind is ActionKind.BACKWARD:
            self._backward(action.micro_batch, place)
        else:
            self._weights(action.micro_batch, place)
        if final and self._tail is not None:
            self._tail.pause()

    def _forward(self, number: int, place: int) -> None:
        seat, source = self._seat, self._source
        buffer: Tensor | None = None
        if place == 0:
            inputs = given = source.inputs(number)
        else:
            arrived, pooled = self._have.pop(_activation(number, place))
            buffer = arrived if pooled else None
            inputs = arrived.detach()
            inputs.requires_grad_(self._tail is not None)
            given = entered(inputs)
        with seat.context():
            outputs = seat.chunks[place].run(given, source.seed(number))
        if buffer is not None and _one_memory(buffer, outputs):
            buffer = None  # a chunk that hands its input on: others still read it
        if seat.is_last(place):
            outputs = source.loss(number, outputs)
        else:
            self._have[_activation(number, place + 1)] = outputs.detach(), False
        if self._tail is not None:
            self._look(outputs)
            self._live[number, place] = _Live(inputs, outputs, buffer)
        elif buffer is not None:
            self._channel.give_back((place, source.sizes[number]), buffer)

    def _backward(self, number: int, place: int) -> None:
        """Where backward is split, the gradient of the input alone."""
        live = self._live.pop((number, place))
        gradient, pooled = self._gradient_for(number, place)
        buffer = gradient if pooled else None
        if self._splits:
            if place > 0 and live.outputs.requires_grad:
                self._differentiate(live.outputs, gradient, [live.inputs], retain_graph=True)
        elif live.outputs.requires_grad:
            self._differentiate(live.outputs, gradient)
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
            self._differentiate(live.outputs, gradient, own)
        self._give_back(number, place, live, buffer)

    def _differentiate(
        self,
        outputs: Tensor,
        gradient: Tensor | None,
        inputs: Sequence[Tensor] | None = None,
        *,
        retain_graph: bool = False,
    ) -> None:
        """Go backward once; all of a step's backwards are here."""
        self._seat.flat.before_backward()
        torch.autograd.backward(outputs, gradient, retain_graph, inputs=inputs)
        self._seat.flat.take_in()

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


def entered(inputs: Tensor) -> Tensor:
    """
    Give what a chunk is to be called with: the same memory, but no leaf of autograd.

    So a chunk may begin with a layer that works in place, and its input's gradient is still the one
    before that layer. Nothing is copied.
    """
    if not inputs.requires_grad:
        return inputs
    outputs: Tensor = _Entered.apply(inputs)  # type: ignore[no-untyped-call]
    return outputs


class _Entered(Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor) -> Tensor:
        return inputs.data  # no view: autograd refuses to write into one of a leaf

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


def _one_memory(one: Tensor, other: Tensor) -> bool:
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


def _activation(number: int, place: int) -> Message:
    return Message(Content.ACTIVATION, number, place - 1, place)


def _gradient(number: int, place: int) -> Message:
    """Name the gradient of what a place gives."""
    return Message(Content.GRADIENT, number, place + 1, place)


class Executor:
    """
    Runs plans on one rank.

    Args:
        seat: where it is.
        reached: watches what backward reaches.
    """

    def __init__(self, seat: StageContext, reached: Reached) -> None:
        self._seat, self._reached = seat, reached
        self._sizes: set[int] = set()  #: of micro-batches whose shapes are agreed
        self.spans: list[TraceSpan] = []  #: of the plan that ran last

    def train(self, plan: Plan, source: Source, tail: Tail) -> None:
        """
        Run a step's forwards and backwards; gradients are added to what is there.

        Raises:
            CollectiveError: a stage is missing.
            SpecError: see `Reached`.
        """
        self._agree_on_shapes(source)
        self._mode(training=True)
        self.spans = ScheduleRun(self._seat, plan, source, tail, self._reached.look).run()
        self._reached.stepped()

    @torch.no_grad()
    def evaluate(self, plan: Plan, source: Source) -> None:
        """
        Run forwards alone; `source.loss` takes the outputs.

        Raises:
            CollectiveError: a stage is missing.
        """
        self._agree_on_shapes(source)
        self._mode(training=False)
        ScheduleRun(self._seat, plan, source, None).run()

    def _mode(self, *, training: bool) -> None:
        for chunk in self._seat.chunks.values():
            chunk.set_mode(training=training)

    @torch.no_grad()
    def _agree_on_shapes(self, source: Source) -> None:
        """Pass one micro-batch of each new size through the model, stage after stage."""
        if self._seat.depth == 1:
            return
        first = {size: number for number, size in reversed([*enumerate(source.sizes)])}
        for size in sorted(first.keys() - self._sizes):
            self._mode(training=False)
            chunks: Any = self._seat.chunks.values()
            with untouched(*chunks):
                self._pass_through(source, size, first[size])
            self._sizes.add(size)

    def _pass_through(self, source: Source, size: int, number: int) -> None:
        arrived: Tensor | None = None  # from a chunk of this rank
        for place, chunk in self._seat.chunks.items():
            if place == 0:
                inputs = source.peek(number).clone()  # a layer may work in place
            elif arrived is not None:
                inputs = arrived
            else:
                inputs = self._seat.channel.hear((place, size), (place - 1) % self._seat.stages)
            arrived = None
            if place + 1 == self._seat.depth:
                continue
            with self._seat.context():
                outputs = chunk.run(inputs, 0)
            self._seat.channel.learn((place + 1, size), outputs)
            to = (place + 1) % self._seat.stages
            if to == self._seat.stage:
                arrived = outputs
            else:
                self._seat.channel.tell((place + 1, size), to)
        self._seat.channel.finish()
