"""
What pipeline stages send each other, and when: sends and receives woven into a schedule.

Two stages are joined by one channel in each direction. A channel keeps the order, holds a fixed
number of messages, and blocks: a send waits for room, a receive waits for a message. Activations
and gradients may share a channel (`interleaved` on two stages), so receives must stand in the order
of the sends, or a stage takes one tensor for another.

    stage 0   F0  send a0  F1  send a1          recv g0  B0           recv g1  B1
    stage 1       recv a0  F0  B0      send g0  recv a1  F1  B1  send g1

A tensor is sent as soon as it is there and received right before it is used, so that nobody waits
for what is not needed yet. That alone could stand still: all wait for room. Hence the lists come
from an execution with room for one message. Where it stands still, the oldest message of a full
channel is received on the spot, before its time, and kept.

The lists were executed once, in an order in which no step waits for a later one. Waiting for
messages and for room, in lists that branch nowhere, ends the same way whatever the speeds (Kahn
1974), and more room only removes waits. So with room for one message or more the lists never stand
still, with any speeds.
"""

from collections import deque
from dataclasses import dataclass
from enum import StrEnum

from distplat.strategies.algorithms.schedule import Action, ActionKind, PipelineSchedule


class Content(StrEnum):
    """What a message holds."""

    ACTIVATION = "activation"
    """A chunk's output, the next chunk's input."""
    GRADIENT = "gradient"
    """Of the loss with respect to a chunk's input."""


@dataclass(frozen=True, slots=True)
class Message:
    """One tensor on its way; places are numbers of chunks along the model."""

    content: Content
    micro_batch: int
    source: int
    target: int


@dataclass(frozen=True, slots=True)
class Send:
    """Hand a message to another stage."""

    message: Message
    to: int
    """The stage."""


@dataclass(frozen=True, slots=True)
class Recv:
    """Take the next message of another stage; it is this one."""

    message: Message
    source: int
    """The stage."""


Step = Action | Send | Recv


@dataclass(frozen=True)
class Plan:
    """A schedule with its messages: what each stage does, to be followed step by step."""

    schedule: PipelineSchedule
    steps: tuple[tuple[Step, ...], ...]
    """Of each stage."""


def input_of(schedule: PipelineSchedule, stage: int, action: Action) -> Message | None:
    """Give what an action needs of another chunk; None: nothing."""
    place = schedule.place(stage, action)
    if action.kind is ActionKind.FORWARD and place > 0:
        return Message(Content.ACTIVATION, action.micro_batch, place - 1, place)
    if action.kind is ActionKind.BACKWARD and place < schedule.depth - 1:
        return Message(Content.GRADIENT, action.micro_batch, place + 1, place)
    return None


def output_of(schedule: PipelineSchedule, stage: int, action: Action) -> Message | None:
    """Give what an action makes for another chunk; None: nothing."""
    place = schedule.place(stage, action)
    if action.kind is ActionKind.FORWARD and place < schedule.depth - 1:
        return Message(Content.ACTIVATION, action.micro_batch, place, place + 1)
    if action.kind is ActionKind.BACKWARD and place > 0:
        return Message(Content.GRADIENT, action.micro_batch, place, place - 1)
    return None


def with_communication(schedule: PipelineSchedule) -> Plan:
    """
    Weave sends and receives into a schedule; between chunks of one stage nothing is sent.

    Raises:
        ValueError: the stages wait for each other whatever is sent when.
    """
    return _Weaver(schedule).weave()


class _Weaver:
    """Executes the stages with room for one message per channel, and writes down what they did."""

    def __init__(self, schedule: PipelineSchedule) -> None:
        self._schedule = schedule
        stages = range(schedule.stages)
        self._todo = [deque(order) for order in schedule.actions]
        self._steps: list[list[Step]] = [[] for _ in stages]
        self._have: list[set[Message]] = [set() for _ in stages]  #: inputs that are there
        self._unsent: list[Message | None] = [None for _ in stages]
        self._channels: dict[tuple[int, int], deque[Message]] = {
            (source, target): deque() for source in stages for target in stages
        }

    def weave(self) -> Plan:
        while any(self._todo) or any(self._unsent):
            moves = [self._go(stage) for stage in range(self._schedule.stages)]
            if not any(moves) and not self._make_room():
                waits = ", ".join(
                    f"stage {stage} with {todo[0]}" for stage, todo in enumerate(self._todo) if todo
                )
                raise ValueError(f"{self._schedule.name} stands still: {waits}")
        return Plan(self._schedule, tuple(map(tuple, self._steps)))

    def _go(self, stage: int) -> bool:
        """Let a stage go as far as it can; say whether it moved at all."""
        moved = False
        while self._move(stage):
            moved = True
        return moved

    def _move(self, stage: int) -> bool:
        message = self._unsent[stage]
        if message is not None:
            return self._send(stage, message)
        if not self._todo[stage]:
            return False
        action = self._todo[stage][0]
        needed = input_of(self._schedule, stage, action)
        if needed is not None and needed not in self._have[stage]:
            return self._receive(self._schedule.stage_of(needed.source), stage)
        self._todo[stage].popleft()
        self._steps[stage].append(action)
        made = output_of(self._schedule, stage, action)
        if made is not None and self._schedule.stage_of(made.target) == stage:
            self._have[stage].add(made)
        else:
            self._unsent[stage] = made
        return True

    def _send(self, stage: int, message: Message) -> bool:
        to = self._schedule.stage_of(message.target)
        channel = self._channels[stage, to]
        if channel:
            return False
        channel.append(message)
        self._steps[stage].append(Send(message, to))
        self._unsent[stage] = None
        return True

    def _receive(self, source: int, stage: int) -> bool:
        channel = self._channels[source, stage]
        if not channel:
            return False
        message = channel.popleft()
        self._steps[stage].append(Recv(message, source))
        self._have[stage].add(message)
        return True

    def _make_room(self) -> bool:
        """Have one stage receive before its time what keeps another from sending."""
        for stage, message in enumerate(self._unsent):
            if message is not None:
                return self._receive(stage, self._schedule.stage_of(message.target))
        return False
