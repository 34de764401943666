"""
Pipeline schedules: the order in which stages compute micro-batches.

A model is split into consecutive stages, a batch into micro-batches. Each function below returns
the order of all stages, drawn in its docstring: a row is a stage, a column a unit of time, `F2` the
forward of micro-batch 2, `B2` its backward, `W2` the gradient of the weights if backward is split,
`F2'` the forward on the stage's second chunk, `.` waiting.

    schedule      bubble, of all time       live activations of stage s     source
    gpipe         (p-1) / (m + p-1)         m                               Huang et al. 2019
    1f1b          (p-1) / (m + p-1)         min(p - s, m)                   Narayanan et al. 2019
    interleaved   (p-1) / (v m + p-1)       more than 1f1b, chunks of 1/v   Narayanan et al. 2021
    zb-h1         (p-1) / (3 m + p-1)       min(p, m)                       Qi et al. 2023

    p stages, m micro-batches, v chunks of layers per stage; stages of equal cost; for zb-h1 F, B
    and W of equal length and m >= p

Under every schedule a chunk accumulates weight gradients in the order of the micro-batches. So all
schedules are bitwise equal to a single process that runs the micro-batches in sequence.

**Messages between stages** are added to a schedule by `with_communication`. Two stages are
connected by one channel in each direction. A channel is a FIFO queue of fixed capacity, and blocks:
a send waits for space, a receive waits for a message. Activations and gradients may share a channel
(`interleaved` on two stages), so receives must be in the order of the sends, or a stage confuses
two tensors.

    stage 0   F0  send a0  F1  send a1          recv g0  B0           recv g1  B1
    stage 1       recv a0  F0  B0      send g0  recv a1  F1  B1  send g1

A tensor is sent as soon as it is computed and received right before it is used, so that no stage
waits for a tensor before it needs it. That alone could deadlock, with all stages waiting for space.
So plans are recorded from a simulation with a capacity of one message. If the simulation blocks,
the oldest message of a full channel is received early and stored.

The simulation executes the plan in an order in which no step waits for a later one. Plans do not
branch and only wait for messages and space, so they complete at any relative speed of the stages
(Kahn 1974), and a larger capacity only removes waits. So no plan deadlocks with a capacity of one
message or more. This module uses no torch and no clock.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum

from typing_extensions import override

from distplat.platform.errors import Problem, SpecError, hint


class ActionKind(StrEnum):
    """Kinds of computations."""

    FORWARD = "F"
    BACKWARD = "B"
    """The whole backward; if it is split, only the gradient of the stage's input."""
    WEIGHT = "W"
    """The gradient of the stage's weights, if backward is split."""


@dataclass(frozen=True, slots=True)
class Action:
    """One computation of one stage."""

    kind: ActionKind
    micro_batch: int
    chunk: int = 0
    """Index among the stage's chunks of layers."""

    @override
    def __str__(self) -> str:
        """Such as `F3`, with one prime for each chunk before this one."""
        return f"{self.kind}{self.micro_batch}{chr(39) * self.chunk}"


@dataclass(frozen=True)
class PipelineSchedule:
    """
    The computations of every stage, in order.

    Chunks of layers are numbered along the model: chunk c of stage s is number c * stages + s.
    """

    name: str
    micro_batches: int
    chunks: int
    """Chunks of layers per stage; 1 except in `interleaved`."""
    splits_backward: bool
    """Whether the gradient of the weights is a separate action."""
    actions: tuple[tuple[Action, ...], ...]
    """Actions of each stage."""

    @property
    def stages(self) -> int:
        """Number of stages."""
        return len(self.actions)

    @property
    def depth(self) -> int:
        """Number of virtual stages of the model."""
        return self.stages * self.chunks

    def virtual_stage(self, stage: int, action: Action) -> int:
        """Return the virtual stage that an action of a stage computes."""
        return action.chunk * self.stages + stage

    def stage_of(self, virtual_stage: int) -> int:
        """Return the stage that a virtual stage is on."""
        return virtual_stage % self.stages

    def peak_activations(self) -> list[int]:
        """
        Return for each stage the maximum number of (micro-batch, chunk) held at once.

        Activations are held from forward to the last action that needs them. Those of a chunk are
        1/v of a whole stage's.
        """
        last = ActionKind.WEIGHT if self.splits_backward else ActionKind.BACKWARD
        return [_peak(order, last) for order in self.actions]


def _peak(order: Iterable[Action], last: ActionKind) -> int:
    live = peak = 0
    for action in order:
        live += (action.kind is ActionKind.FORWARD) - (action.kind is last)
        peak = max(peak, live)
    return peak


def gpipe(stages: int, micro_batches: int) -> PipelineSchedule:
    """
    GPipe: all forwards, then all backwards (Huang et al. 2019).

        F0 F1 F2 F3 .  .  .  .  .  .  B0 B1 B2 B3
        .  F0 F1 F2 F3 .  .  .  .  B0 B1 B2 B3 .
        .  .  F0 F1 F2 F3 .  .  B0 B1 B2 B3 .  .
        .  .  .  F0 F1 F2 F3 B0 B1 B2 B3 .  .  .

    The paper runs backward from the last micro-batch to the first, which takes the same time; this
    order accumulates gradients as all other schedules do.

    Raises:
        ValueError: less than one stage or micro-batch.
    """
    _check(stages, micro_batches)
    forwards, backwards = _forwards_and_backwards(micro_batches)
    order = (*forwards, *backwards)
    return PipelineSchedule("gpipe", micro_batches, 1, False, (order,) * stages)


def one_f_one_b(stages: int, micro_batches: int) -> PipelineSchedule:
    """
    1F1B: a backward runs as soon as it can, to free activations early (Narayanan et al. 2019; the
    variant with a flush at the end of each step, Narayanan et al. 2021).

        F0 F1 F2 F3 .  .  .  B0 F4 B1 F5 B2 .  B3 .  B4 .  B5
        .  F0 F1 F2 .  .  B0 F3 B1 F4 B2 F5 B3 .  B4 .  B5 .
        .  .  F0 F1 .  B0 F2 B1 F3 B2 F4 B3 F5 B4 .  B5 .  .
        .  .  .  F0 B0 F1 B1 F2 B2 F3 B3 F4 B4 F5 B5 .  .  .

    Stage s runs p - s - 1 warm-up forwards, then alternates one forward and one backward.

    Raises:
        ValueError: less than one stage or micro-batch.
    """
    _check(stages, micro_batches)
    orders = []
    for stage in range(stages):
        forwards, backwards = _forwards_and_backwards(micro_batches)
        warm_up = min(stages - stage - 1, micro_batches)
        orders.append(tuple(_alternate(forwards, backwards, warm_up)))
    return PipelineSchedule("1f1b", micro_batches, 1, False, tuple(orders))


def interleaved(stages: int, micro_batches: int, chunks: int) -> PipelineSchedule:
    """
    Interleaved 1F1B: a stage has several chunks of layers, so that the pipeline fills faster
    (Narayanan et al. 2021; numbers of warm-up forwards as in Megatron-LM).

        F0  F1  F0' F1' F2  B0' F3  B1' F2' B0  F3' B1  .   B2' .   B3' B2  B3
        .   F0  F1  F0' B0' F1' B1' F2  B0  F3  B1  F2' B2' F3' B3' B2  B3  .

    Micro-batches pass through the chunks in groups of p. Stage s runs 2 (p - s - 1) + (v - 1) p
    warm-up forwards.

    Raises:
        ValueError: less than two chunks, or micro-batches that do not fill groups of p.
    """
    _check(stages, micro_batches)
    if chunks < 2:
        raise ValueError(f"interleaved needs 2 or more virtual stages, got {chunks}; 1f1b has one")
    if micro_batches % stages:
        lower = micro_batches // stages * stages
        near = f"{lower} or {lower + stages}" if lower else f"{stages}"
        raise ValueError(
            f"interleaved needs micro-batches in multiples of its {stages} stages, "
            f"got {micro_batches}: use {near}, or 1f1b, which accepts any number"
        )
    total, group = micro_batches * chunks, stages * chunks

    def nth_action(kind: ActionKind, k: int) -> Action:
        chunk = k % group // stages
        chunk = chunks - 1 - chunk if kind is ActionKind.BACKWARD else chunk
        return Action(kind, k // group * stages + k % stages, chunk)

    orders = []
    for stage in range(stages):
        forwards = (nth_action(ActionKind.FORWARD, k) for k in range(total))
        backwards = (nth_action(ActionKind.BACKWARD, k) for k in range(total))
        warm_up = min(2 * (stages - stage - 1) + (chunks - 1) * stages, total)
        orders.append(tuple(_alternate(forwards, backwards, warm_up)))
    return PipelineSchedule("interleaved", micro_batches, chunks, False, tuple(orders))


def zero_bubble_h1(stages: int, micro_batches: int) -> PipelineSchedule:
    """
    ZB-H1: gradients of the weights fill the time that stages would wait (Qi et al. 2023).

        F0 F1 F2 .  .  B0 W0 F3 B1 W1 F4 B2 W2 B3 W3 B4 W4
        .  F0 F1 .  B0 F2 B1 W0 F3 B2 W1 F4 B3 W2 B4 W3 W4
        .  .  F0 B0 F1 B1 F2 B2 W0 F3 B3 W1 F4 B4 W2 W3 W4

    The previous stage waits only for the gradient of the input, so backward is split. Stage s runs
    `W` s micro-batches after `B`, which fills its bubble. Each stage then holds p micro-batches, as
    the first stage does under 1F1B.

    Raises:
        ValueError: less than one stage or micro-batch.
    """
    _check(stages, micro_batches)
    orders = []
    for stage in range(stages):
        forwards, backwards = _forwards_and_backwards(micro_batches)
        order: list[Action] = []
        for action in _alternate(forwards, backwards, min(stages - stage - 1, micro_batches)):
            order.append(action)
            late = action.micro_batch - stage
            if action.kind is ActionKind.BACKWARD and late >= 0:
                order.append(Action(ActionKind.WEIGHT, late))
        rest = range(max(micro_batches - stage, 0), micro_batches)
        orders.append((*order, *(Action(ActionKind.WEIGHT, i) for i in rest)))
    return PipelineSchedule("zb-h1", micro_batches, 1, True, tuple(orders))


def _forwards_and_backwards(micro_batches: int) -> tuple[Iterator[Action], Iterator[Action]]:
    forwards = (Action(ActionKind.FORWARD, i) for i in range(micro_batches))
    return forwards, (Action(ActionKind.BACKWARD, i) for i in range(micro_batches))


def _alternate(
    forwards: Iterator[Action], backwards: Iterator[Action], warm_up: int
) -> Iterator[Action]:
    """Yield `warm_up` forwards, then forwards and backwards alternately, then the rest."""
    for _ in range(warm_up):
        yield next(forwards)
    for forward in forwards:
        yield forward
        yield next(backwards)
    yield from backwards


def _check(stages: int, micro_batches: int) -> None:
    if stages < 1 or micro_batches < 1:
        raise ValueError(
            f"a schedule needs at least one stage and one micro-batch, got {stages} stages "
            f"and {micro_batches} micro-batches"
        )


_SINGLE: dict[str, Callable[[int, int], PipelineSchedule]] = {
    "gpipe": gpipe,
    "1f1b": one_f_one_b,
    "zb-h1": zero_bubble_h1,
}

NAMES = (*_SINGLE, "interleaved")
"""Names of all schedules."""


def build(
    name: str, stages: int, micro_batches: int, chunks: int | None = None
) -> PipelineSchedule:
    """
    Build a schedule by name.

    Args:
        name: one of `NAMES`.
        stages: number of stages.
        micro_batches: number of micro-batches.
        chunks: chunks of layers per stage; None: the minimum of the schedule.

    Raises:
        SpecError: the name is unknown; suggests a similar one.
        ValueError: the schedule does not support these numbers; names valid ones.
    """
    if name == "interleaved":
        return interleaved(stages, micro_batches, 2 if chunks is None else chunks)
    if name not in _SINGLE:
        raise SpecError(Problem(("schedule",), f"unknown schedule {name!r}", hint(name, NAMES)))
    if chunks not in (None, 1):
        raise ValueError(f"{name} has one virtual stage per stage, got {chunks}: use interleaved")
    return _SINGLE[name](stages, micro_batches)


class Content(StrEnum):
    """Content of a message."""

    ACTIVATION = "activation"
    """A chunk's output, the next chunk's input."""
    GRADIENT = "gradient"
    """Gradient of the loss with respect to a chunk's input."""


@dataclass(frozen=True, slots=True)
class Message:
    """A message between chunks; source and target are virtual stages."""

    content: Content
    micro_batch: int
    source: int
    target: int


@dataclass(frozen=True, slots=True)
class Send:
    """Send a message to another stage."""

    message: Message
    to: int
    """Receiving stage."""


@dataclass(frozen=True, slots=True)
class Recv:
    """Receive the next message of another stage."""

    message: Message
    source: int
    """Sending stage."""


Step = Action | Send | Recv


@dataclass(frozen=True)
class Plan:
    """A schedule with its messages."""

    schedule: PipelineSchedule
    steps: tuple[tuple[Step, ...], ...]
    """Steps of each stage, in order."""


def input_of(schedule: PipelineSchedule, stage: int, action: Action) -> Message | None:
    """Return the message that an action needs from another chunk; None: it needs none."""
    virtual_stage = schedule.virtual_stage(stage, action)
    if action.kind is ActionKind.FORWARD and virtual_stage > 0:
        return Message(Content.ACTIVATION, action.micro_batch, virtual_stage - 1, virtual_stage)
    if action.kind is ActionKind.BACKWARD and virtual_stage < schedule.depth - 1:
        return Message(Content.GRADIENT, action.micro_batch, virtual_stage + 1, virtual_stage)
    return None


def output_of(schedule: PipelineSchedule, stage: int, action: Action) -> Message | None:
    """Return the message that an action produces for another chunk; None: it produces none."""
    virtual_stage = schedule.virtual_stage(stage, action)
    if action.kind is ActionKind.FORWARD and virtual_stage < schedule.depth - 1:
        return Message(Content.ACTIVATION, action.micro_batch, virtual_stage, virtual_stage + 1)
    if action.kind is ActionKind.BACKWARD and virtual_stage > 0:
        return Message(Content.GRADIENT, action.micro_batch, virtual_stage, virtual_stage - 1)
    return None


def with_communication(schedule: PipelineSchedule) -> Plan:
    """
    Add sends and receives to a schedule; chunks of the same stage need none.

    Raises:
        ValueError: the schedule deadlocks.
    """
    return _ScheduleSimulator(schedule).run()


class _ScheduleSimulator:
    """Simulates the stages with a capacity of one message per channel, and records their steps."""

    def __init__(self, schedule: PipelineSchedule) -> None:
        self._schedule = schedule
        stages = range(schedule.stages)
        self._todo = [deque(order) for order in schedule.actions]
        self._steps: list[list[Step]] = [[] for _ in stages]
        self._inputs: list[set[Message]] = [set() for _ in stages]  #: received inputs
        self._unsent: list[Message | None] = [None for _ in stages]
        self._channels: dict[tuple[int, int], deque[Message]] = {
            (source, target): deque() for source in stages for target in stages
        }

    def run(self) -> Plan:
        while any(self._todo) or any(self._unsent):
            moves = [self._advance(stage) for stage in range(self._schedule.stages)]
            if not any(moves) and not self._receive_early():
                waits = ", ".join(
                    f"stage {stage} with {todo[0]}" for stage, todo in enumerate(self._todo) if todo
                )
                raise ValueError(f"{self._schedule.name} deadlocks: {waits}")
        return Plan(self._schedule, tuple(map(tuple, self._steps)))

    def _advance(self, stage: int) -> bool:
        """Run a stage until it blocks; return whether it made any step."""
        moved = False
        while self._step(stage):
            moved = True
        return moved

    def _step(self, stage: int) -> bool:
        message = self._unsent[stage]
        if message is not None:
            return self._send(stage, message)
        if not self._todo[stage]:
            return False
        action = self._todo[stage][0]
        needed = input_of(self._schedule, stage, action)
        if needed is not None and needed not in self._inputs[stage]:
            return self._receive(self._schedule.stage_of(needed.source), stage)
        self._todo[stage].popleft()
        self._steps[stage].append(action)
        output = output_of(self._schedule, stage, action)
        if output is not None and self._schedule.stage_of(output.target) == stage:
            self._inputs[stage].add(output)
        else:
            self._unsent[stage] = output
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
        self._inputs[stage].add(message)
        return True

    def _receive_early(self) -> bool:
        """Let a stage receive early the message that blocks another stage's send."""
        for stage, message in enumerate(self._unsent):
            if message is not None:
                return self._receive(stage, self._schedule.stage_of(message.target))
        return False
