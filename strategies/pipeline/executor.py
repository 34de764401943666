"""
One stage of one replica follows its list: computes, sends, receives, as the schedule says.

Deadlock is impossible by construction: the lists run to their ends with room for one message per
channel (`algorithms/pipeline_schedule.py`), and every channel has room for one at least.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
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
from distplat.strategies.model.model_call import Batch
from distplat.strategies.model.trials import untouched
from distplat.strategies.pipeline.channel import Channel
from distplat.strategies.pipeline.forward_writes import ForwardWrites
from distplat.strategies.pipeline.interfaces import BackwardListener, Source, TraceSpan
from distplat.strategies.pipeline.limits import GradientReach
from distplat.strategies.pipeline.rank_model import Chunk
from distplat.strategies.pipeline.values import Packing, ValueLayout, copied, tensor_leaves


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
    orders = (tuple(order),) * stages
    return with_communication(PipelineSchedule("evaluation", micro_batches, chunks, False, orders))


@dataclass(frozen=True)
class StageContext:
    """One rank's position in its pipeline, its chunks and its channel."""

    chunks: dict[int, Chunk]
    """This rank's, by virtual stage."""
    stage: int
    """This rank's."""
    stages: int
    channel: Channel
    """To the other stages."""
    autocast: Callable[[], AbstractContextManager[object]]
    """Gives the context in which forwards run."""
    alive: Callable[[], None]
    """Called after each step of the plan."""
    flat: FlatModel
    """The parameters and gradients of the chunks."""

    @property
    def depth(self) -> int:
        """Virtual stages of the whole model."""
        return len(self.chunks) * self.stages

    def is_last(self, virtual_stage: int) -> bool:
        """Whether what the virtual stage gives goes into the loss."""
        return virtual_stage + 1 == self.depth


class _Live(NamedTuple):
    """A micro-batch between forward and backward."""

    inputs: list[Tensor]
    """Tensors whose gradients are sent to the virtual stage before."""
    outputs: list[Tensor]
    """Tensors whose gradients come from the next virtual stage; on the last one the loss."""
    buffer: Tensor | None
    """The receive buffer that holds `inputs`, if it is to be given back."""


class _Held(NamedTuple):
    """The tensors of a message that is to be sent or used."""

    tensors: list[Tensor]
    buffer: Tensor | None = None
    """The receive buffer that holds them, if it is to be given back."""


class ScheduleRun:
    """
    One execution of a plan on one rank.

    Args:
        context: where it is.
        plan: what is to be done.
        source: of micro-batches.
        listener: told when gradients become final; None: forwards alone.
        look: shown what each virtual stage gives, before it is differentiated.
        writes: watches what forwards write that a backward follows.
    """

    def __init__(
        self,
        context: StageContext,
        plan: Plan,
        source: Source,
        listener: BackwardListener | None,
        look: Callable[[Sequence[Tensor]], None] = lambda outputs: None,
        writes: ForwardWrites | None = None,
    ) -> None:
        self._context, self._plan, self._source, self._listener = context, plan, source, listener
        self._look, self._writes = look, writes
        self._channel = context.channel
        self._schedule = plan.schedule
        self._final = plan.schedule.micro_batches - 1
        self._splits = plan.schedule.splits_backward
        self._have: dict[Message, _Held] = {}
        #: by virtual stage and micro-batch, if they vary
        self._layouts: dict[tuple[int, int], ValueLayout] = {}
        self._live: dict[tuple[int, int], _Live] = {}
        self._deferred: dict[tuple[int, int], tuple[_Live, _Held]] = {}
        self.spans: list[TraceSpan] = []

    def run(self) -> list[TraceSpan]:
        """
        Follow the plan to its end; give what was done, and when.

        Raises:
            CollectiveError: a stage is missing.
        """
        stages, alive = self._context.stages, self._context.alive
        for step in self._plan.steps[self._context.stage]:
            began = time.perf_counter()
            if isinstance(step, Send):
                kind, chunk = "send", step.message.source // stages
                self._send(step)
                number = step.message.micro_batch
            elif isinstance(step, Recv):
                kind, chunk = "recv", step.message.target // stages
                number = step.message.micro_batch
                self._have[step.message] = self._received(step)
            else:
                kind, chunk, number = step.kind.value, step.chunk, step.micro_batch
                self._compute(step)
            self.spans.append(TraceSpan(kind, chunk, number, began, time.perf_counter()))
            alive()
        self._channel.finish()
        return self.spans

    def _send(self, step: Send) -> None:
        message, tensors = step.message, self._have.pop(step.message).tensors
        if self._carries_layout(message):
            layout = self._layout(message.target, message.micro_batch)
            self._channel.send_with_layout(message.target, layout, tensors, step.to)
        else:
            self._channel.send(self._packing(message), tensors, step.to)

    def _received(self, step: Recv) -> _Held:
        message = step.message
        if self._carries_layout(message):
            layout, tensors = self._channel.receive_with_layout(message.target, step.source)
            self._layouts[message.target, message.micro_batch] = layout
            return _Held(tensors)
        packing = self._packing(message)
        buffer = self._channel.receive(packing, step.source)
        return _Held([] if buffer is None else packing.unpack(buffer), buffer)

    def _carries_layout(self, message: Message) -> bool:
        """Whether a message comes with its layout; both ends know that of a gradient."""
        return self._channel.varies and message.content is Content.ACTIVATION

    def _packing(self, message: Message) -> Packing:
        """Give the layout of a message: gradients have the shapes of what they are of."""
        layout = self._layout(max(message.source, message.target), message.micro_batch)
        return layout.values if message.content is Content.ACTIVATION else layout.gradients

    def _layout(self, virtual_stage: int, number: int) -> ValueLayout:
        if self._channel.varies:
            return self._layouts[virtual_stage, number]
        return self._channel.layout((virtual_stage, self._source.sizes[number]))

    def _compute(self, action: Action) -> None:
        virtual_stage = self._schedule.virtual_stage(self._context.stage, action)
        if action.kind is ActionKind.FORWARD:
            self._forward(action.micro_batch, virtual_stage)
            return
        makes_final = ActionKind.WEIGHT if self._splits else ActionKind.BACKWARD
        final = action.micro_batch == self._final and action.kind is makes_final
        if final and self._listener is not None:
            self._listener.last_backward()
        if action.kind is ActionKind.BACKWARD:
            self._backward(action.micro_batch, virtual_stage)
        else:
            self._weights(action.micro_batch, virtual_stage)
        if final and self._listener is not None:
            self._listener.pause()

    def _forward(self, number: int, virtual_stage: int) -> None:
        context, source = self._context, self._source
        inputs: list[Tensor] = []
        buffer: Tensor | None = None
        if virtual_stage == 0:
            given = source.inputs(number)
        else:
            held = self._have.pop(_activation(number, virtual_stage))
            buffer = held.buffer
            layout, trains = self._layout(virtual_stage, number), self._listener is not None
            given, inputs = chunk_inputs(layout, held.tensors, differentiated=trains)
        with context.autocast(), self._watched(virtual_stage):
            outputs = context.chunks[virtual_stage].run(given, source.seed(number))
        if buffer is not None and _share_memory(buffer, tensor_leaves(outputs)):
            buffer = None  # a chunk that hands its input on: others still read it
        differentiable = self._pass_on(number, virtual_stage, outputs)
        if self._listener is not None:
            self._look(differentiable)
            self._live[number, virtual_stage] = _Live(inputs, differentiable, buffer)
        elif buffer is not None:
            self._channel.give_back(buffer)

    def _watched(self, virtual_stage: int) -> AbstractContextManager[object]:
        """Give the context in which a forward must not change what micro-batches wait with."""
        waiting = any(
            at == virtual_stage for held in (self._live, self._deferred) for _, at in held
        )
        return self._writes.forward() if self._writes and waiting else nullcontext()

    def _pass_on(self, number: int, virtual_stage: int, outputs: Any) -> list[Tensor]:
        """Keep outputs to be sent, or compute the loss; give what is to be differentiated."""
        if self._context.is_last(virtual_stage):
            return [self._source.loss(number, outputs)]
        following = virtual_stage + 1
        if self._channel.varies:
            self._layouts[following, number] = ValueLayout.read(following, outputs)
        layout = self._layout(following, number)
        tensors = layout.tensors(outputs)
        self._have[_activation(number, following)] = _Held([one.detach() for one in tensors])
        return [tensors[n] for n in layout.wanted]

    def _backward(self, number: int, virtual_stage: int) -> None:
        """Compute gradients; where backward is split, those of the inputs alone."""
        live = self._live.pop((number, virtual_stage))
        last = self._context.is_last(virtual_stage)
        held = _Held([]) if last else self._have.pop(_gradient(number, virtual_stage))
        if not self._splits:
            self._differentiate(live.outputs, held.tensors)
        elif live.inputs:
            self._differentiate(live.outputs, held.tensors, live.inputs, retain_graph=True)
        if virtual_stage > 0:
            gradients = [_taken_gradient(one) for one in live.inputs]
            if held.buffer is not None and _share_memory(held.buffer, gradients):
                held = _Held(held.tensors)
            self._have[_gradient(number, virtual_stage - 1)] = _Held(gradients)
        if self._splits:
            self._deferred[number, virtual_stage] = live, held
        else:
            self._give_back(live, held)

    def _weights(self, number: int, virtual_stage: int) -> None:
        live, held = self._deferred.pop((number, virtual_stage))
        own = [p for p in self._context.chunks[virtual_stage].parameters() if p.requires_grad]
        if own:
            self._differentiate(live.outputs, held.tensors, own)
        self._give_back(live, held)

    def _differentiate(
        self,
        outputs: Sequence[Tensor],
        gradients: Sequence[Tensor],
        inputs: Sequence[Tensor] | None = None,
        *,
        retain_graph: bool = False,
    ) -> None:
        """
        Go backward once; all of a step's backwards are here.

        Args:
            outputs: those that need no gradient are left out.
            gradients: of the outputs; empty: these are the loss.
            inputs: to which gradients are added; None: all.
            retain_graph: another backward follows.
        """
        of: Sequence[Tensor | None] = gradients or [None] * len(outputs)
        pairs = [(o, g) for o, g in zip(outputs, of, strict=True) if o.requires_grad]
        if not pairs:
            return
        self._context.flat.before_backward()
        differentiable, known = zip(*pairs, strict=True)
        try:
            torch.autograd.backward(differentiable, known, retain_graph, inputs=inputs)
        except RuntimeError as error:
            raise (self._writes.explained(error) if self._writes else error) from error
        self._context.flat.collect()

    def _give_back(self, *held: _Live | _Held) -> None:
        for one in held:
            if one.buffer is not None:
                self._channel.give_back(one.buffer)


def chunk_inputs(
    layout: ValueLayout, tensors: Sequence[Tensor], *, differentiated: bool
) -> tuple[Any, list[Tensor]]:
    """
    Give what a chunk is to be called with: the same memory, but no leaf of autograd.

    So a chunk may begin with a layer that works in place, and its inputs' gradients are still those
    before that layer. Nothing is copied.

    Args:
        layout: of what enters the virtual stage.
        tensors: as they came.
        differentiated: whether a backward follows.

    Returns:
        The value, and the leaves to which backward adds gradients, as `layout.wanted` says.
    """
    given = [tensor.data for tensor in tensors]  # no views: each has a version of its own
    inputs: list[Tensor] = []
    for n in layout.wanted if differentiated else ():
        inputs.append(tensors[n].detach().requires_grad_())
        given[n] = _NoLeaf.apply(inputs[-1])  # type: ignore[no-untyped-call]
    return layout.value(given), inputs


class _NoLeaf(Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor) -> Tensor:
        return inputs.data  # no view: autograd refuses to write into one of a leaf

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


def _taken_gradient(inputs: Tensor) -> Tensor:
    gradient, inputs.grad = inputs.grad, None
    return torch.zeros_like(inputs) if gradient is None else gradient


def _share_memory(buffer: Tensor, tensors: Sequence[Tensor]) -> bool:
    address = buffer.untyped_storage().data_ptr()
    return any(address == one.untyped_storage().data_ptr() for one in tensors)


def _activation(number: int, virtual_stage: int) -> Message:
    return Message(Content.ACTIVATION, number, virtual_stage - 1, virtual_stage)


def _gradient(number: int, virtual_stage: int) -> Message:
    """Name the gradient of what a virtual stage gives."""
    return Message(Content.GRADIENT, number, virtual_stage + 1, virtual_stage)


class Executor:
    """
    Runs plans on one rank.

    Args:
        context: where it is.
        reached: watches what backward reaches.
    """

    def __init__(self, context: StageContext, reached: GradientReach) -> None:
        self._context, self._reached = context, reached
        self._writes = ForwardWrites(context.flat.model)
        self._stepped = False  #: a step was made
        self._sizes: set[int] = set()  #: of micro-batches whose shapes are agreed
        self.spans: list[TraceSpan] = []  #: of the plan that ran last

    def train(
        self, plan: Plan, source: Source, listener: BackwardListener, *, thorough: bool
    ) -> None:
        """
        Run a step's forwards and backwards; gradients are added to what is there.

        `thorough`: look for writes that nothing shows; in the first step it is done anyway.

        Raises:
            CollectiveError: a stage is missing.
            SpecError: see `GradientReach` and `ForwardWrites`.
        """
        self._agree_on_shapes(source)
        self._mode(training=True)
        self._writes.begin_step(thorough=thorough or not self._stepped)
        watches = self._reached.look, self._writes
        self.spans = ScheduleRun(self._context, plan, source, listener, *watches).run()
        self._reached.stepped()
        self._stepped = True

    @torch.no_grad()
    def evaluate(self, plan: Plan, source: Source) -> None:
        """
        Run forwards alone; `source.loss` takes the outputs.

        Raises:
            CollectiveError: a stage is missing.
        """
        self._agree_on_shapes(source)
        self._mode(training=False)
        ScheduleRun(self._context, plan, source, None).run()

    def _mode(self, *, training: bool) -> None:
        for chunk in self._context.chunks.values():
            chunk.set_mode(training=training)

    @torch.enable_grad()
    def _agree_on_shapes(self, source: Source) -> None:
        """Pass one micro-batch of each new size through the model, stage after stage."""
        if self._context.depth == 1:
            return
        first = {size: number for number, size in reversed([*enumerate(source.sizes)])}
        for size in sorted(first.keys() - self._sizes):
            if self._context.channel.varies:
                return
            self._mode(training=False)
            with untouched(*self._context.chunks.values()):
                self._pass_through(source, size, first[size])
            self._sizes.add(size)

    def _pass_through(self, source: Source, size: int, number: int) -> None:
        """
        Compute with gradients, to see to what they come back.

        Values travel behind their forms, for a layer may compute with what it finds in an input,
        such as lengths.
        """
        context, channel = self._context, self._context.channel
        arrived: list[Tensor] = []  # from a chunk of this rank
        for virtual_stage, chunk in context.chunks.items():
            before, to = (virtual_stage - 1) % context.stages, (virtual_stage + 1) % context.stages
            if virtual_stage == 0:
                inputs = copied(source.peek(number))  # a layer may work in place
                channel.varies = source.varies or isinstance(inputs, Batch)
            else:
                kind = (virtual_stage, size)
                if before == context.stage:
                    layout = channel.layout(kind)
                else:
                    layout = channel.receive_layout(kind, before)
                    buffer = channel.receive(layout.values, before)
                    assert buffer is not None, "a value has tensors"
                    arrived = layout.values.unpack(buffer)
                inputs, _ = chunk_inputs(layout, arrived, differentiated=True)
            if virtual_stage + 1 == context.depth:
                continue
            with context.autocast():
                outputs = chunk.seeded(inputs, 0)
            layout = channel.learn((virtual_stage + 1, size), outputs)
            arrived = [one.detach() for one in layout.tensors(outputs)]
            if to != context.stage:
                channel.send_layout((virtual_stage + 1, size), to)
                channel.send(layout.values, arrived, to)
        channel.finish()
