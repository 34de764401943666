"""
Pipeline schedules: in which order a stage computes its micro-batches.

A model is cut into stages that follow each other, a batch into micro-batches. Each function below
gives the order for every stage at once, drawn in its docstring: a row is a stage, a column a unit
of time, `F2` the forward of micro-batch 2, `B2` its backward, `W2` the gradient of the weights
where that is a step of its own, `F2'` the same on the stage's second chunk of layers, `.` waiting.

    schedule      bubble, of all time       live activations of stage s     source
    gpipe         (p-1) / (m + p-1)         m                               Huang et al. 2019
    1f1b          (p-1) / (m + p-1)         min(p - s, m)                   Narayanan et al. 2019
    interleaved   (p-1) / (v m + p-1)       more than 1f1b, chunks of 1/v   Narayanan et al. 2021
    zb-h1         (p-1) / (3 m + p-1)       min(p, m)                       Qi et al. 2023

    p stages, m micro-batches, v chunks of layers per stage; stages of equal cost; for zb-h1 F, B
    and W of equal length and m >= p

Under every schedule a chunk adds its weight gradients in the order of the micro-batches. So all
schedules give the bits that one process gives which takes the micro-batches one after the other.

**Messages between stages** are woven into a schedule by `with_communication`. Two stages are joined
by one channel in each direction. A channel keeps the order, holds a fixed number of messages, and
blocks: a send waits for room, a receive waits for a message. Activations and gradients may share a
channel (`interleaved` on two stages), so receives must stand in the order of the sends, or a stage
takes one tensor for another.

    stage 0   F0  send a0  F1  send a1          recv g0  B0           recv g1  B1
    stage 1       recv a0  F0  B0      send g0  recv a1  F1  B1  send g1

A tensor is sent as soon as it is there and received right before it is used, so that nobody waits
for what is not needed yet. That alone could stand still: all wait for room. Hence the lists come
from an execution with room for one message. Where it stands still, the oldest message of a full
channel is received on the spot, before its time, and kept.

The lists were executed once, in an order in which no step waits for a later one. Waiting for
messages and for room, in lists that branch nowhere, ends the same way whatever the speeds (Kahn
1974), and more room only removes waits. So with room for one message or more the lists never stand
still, with any speeds. No torch here and no clock.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum

from distplat.platform.errors import Problem, SpecError, hint


class ActionKind(StrEnum):
    """What a stage computes."""

    FORWARD = "F"
    BACKWARD = "B"
    """All of backward; where it is split, the gradient of the stage's input alone."""
    WEIGHT = "W"
    """The gradient of the stage's weights, in schedules that split backward."""


@dataclass(frozen=True, slots=True)
class Action:
    """One computation of one stage."""

    kind: ActionKind
    micro_batch: int
    chunk: int = 0
    """Which of the stage's chunks of layers."""

    def __str__(self) -> str:
        """`F3`; one prime for each chunk before this one."""
        return f"{self.kind}{self.micro_batch}{chr(39) * self.chunk}"


@dataclass(frozen=True)
class PipelineSchedule:
    """
    What every stage computes, in order.

    Chunks of layers are numbered along the model: chunk c of stage s is number c * stages + s.
    """

    name: str
    micro_batches: int
    chunks: int
    """Chunks of layers per stage ("virtual stages"); 1 save in `interleaved`."""
    splits_backward: bool
    """Whether the gradient of the weights is an action of its own."""
    actions: tuple[tuple[Action, ...], ...]
    """Of each stage."""

    @property
    def stages(self) -> int:
        """Number of stages."""
        return len(self.actions)

    @property
    def depth(self) -> int:
        """Number of chunks of layers in the whole model."""
        return self.stages * self.chunks

    def virtual_stage(self, stage: int, action: Action) -> int:
        """Give the number, along the model, of the chunk that an action works on."""
        return action.chunk * self.stages + stage

    def stage_of(self, virtual_stage: int) -> int:
        """Give the stage that owns a chunk."""
        return virtual_stage % self.stages

    def peak_activations(self) -> list[int]:
        """
        Give for each stage how many (micro-batch, chunk) it holds at once, at most.

        Counted from forward until the last action that needs the activations. A chunk's are 1/v of
        what a whole stage's would be.
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

    The paper goes backward from the last micro-batch to the first, which takes the same time; this
    order adds the gradients up as all other schedules do.

    Raises:
        ValueError: less than one stage or micro-batch.
    """
    _check(stages, micro_batches)
    forwards, backwards = _forwards_and_backwards(micro_batches)
    order = (*forwards, *backwards)
    return PipelineSchedule("gpipe", micro_batches, 1, False, (order,) * stages)


def one_f_one_b(stages: int, micro_batches: int) -> PipelineSchedule:
    """
    1F1B: as soon as a backward can run it runs, so that activations go early (Narayanan et al.
    2019; in the form with a flush at the end of each step, Narayanan et al. 2021).

        F0 F1 F2 F3 .  .  .  B0 F4 B1 F5 B2 .  B3 .  B4 .  B5
        .  F0 F1 F2 .  .  B0 F3 B1 F4 B2 F5 B3 .  B4 .  B5 .
        .  .  F0 F1 .  B0 F2 B1 F3 B2 F4 B3 F5 B4 .  B5 .  .
        .  .  .  F0 B0 F1 B1 F2 B2 F3 B3 F4 B4 F5 B5 .  .  .

    Stage s runs p - s - 1 forwards ahead, then one forward and one backward in turn.

    Raises:
        ValueError: less than one stage or micro-batch.
    """
    _check(stages, micro_batches)
    orders = []
    for stage in range(stages):
        forwards, backwards = _forwards_and_backwards(micro_batches)
        ahead = min(stages - stage - 1, micro_batches)
        orders.append(tuple(_in_turn(forwards, backwards, ahead)))
    return PipelineSchedule("1f1b", micro_batches, 1, False, tuple(orders))


def interleaved(stages: int, micro_batches: int, chunks: int) -> PipelineSchedule:
    """
    Interleaved 1F1B: a stage has several chunks of layers, so that the pipeline fills in shorter
    strides (Narayanan et al. 2021; the numbers of forwards ahead are Megatron-LM's).

        F0  F1  F0' F1' F2  B0' F3  B1' F2' B0  F3' B1  .   B2' .   B3' B2  B3
        .   F0  F1  F0' B0' F1' B1' F2  B0  F3  B1  F2' B2' F3' B3' B2  B3  .

    Micro-batches go in groups of p through chunk after chunk. Stage s runs
    2 (p - s - 1) + (v - 1) p forwards ahead.

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
            f"got {micro_batches}: take {near}, or 1f1b, which takes any number"
        )
    total, group = micro_batches * chunks, stages * chunks

    def turn(kind: ActionKind, k: int) -> Action:
        chunk = k % group // stages
        chunk = chunks - 1 - chunk if kind is ActionKind.BACKWARD else chunk
        return Action(kind, k // group * stages + k % stages, chunk)

    orders = []
    for stage in range(stages):
        forwards = (turn(ActionKind.FORWARD, k) for k in range(total))
        backwards = (turn(ActionKind.BACKWARD, k) for k in range(total))
        ahead = min(2 * (stages - stage - 1) + (chunks - 1) * stages, total)
        orders.append(tuple(_in_turn(forwards, backwards, ahead)))
    return PipelineSchedule("interleaved", micro_batches, chunks, False, tuple(orders))


def zero_bubble_h1(stages: int, micro_batches: int) -> PipelineSchedule:
    """
    ZB-H1: the gradient of the weights waits until there is nothing better to do (Qi et al. 2023).

        F0 F1 F2 .  .  B0 W0 F3 B1 W1 F4 B2 W2 B3 W3 B4 W4
        .  F0 F1 .  B0 F2 B1 W0 F3 B2 W1 F4 B3 W2 B4 W3 W4
        .  .  F0 B0 F1 B1 F2 B2 W0 F3 B3 W1 F4 B4 W2 W3 W4

    The neighbour waits for the gradient of the input only, so backward is split. Stage s runs `W`
    s micro-batches behind `B`: what would be its bubble at the start, it computes at the end. Each
    stage then holds p micro-batches, as the first one does under 1F1B.

    Raises:
        ValueError: less than one stage or micro-batch.
    """
    _check(stages, micro_batches)
    orders = []
    for stage in range(stages):
        forwards, backwards = _forwards_and_backwards(micro_batches)
        order: list[Action] = []
        for action in _in_turn(forwards, backwards, min(stages - stage - 1, micro_batches)):
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


def _in_turn(
    forwards: Iterator[Action], backwards: Iterator[Action], ahead: int
) -> Iterator[Action]:
    """Give `ahead` forwards, then one forward and one backward in turn, then what is left."""
    for _ in range(ahead):
        yield next(forwards)
    for forward in forwards:
        yield forward
        yield next(backwards)
    yield from backwards


def _check(stages: int, micro_batches: int) -> None:
    if stages < 1 or micro_batches < 1:
        raise ValueError(
            f"a schedule needs one stage and one micro-batch at least, got {stages} stages "
            f"and {micro_batches} micro-batches"
        )


_SINGLE: dict[str, Callable[[int, int], PipelineSchedule]] = {
    "gpipe": gpipe,
    "1f1b": one_f_one_b,
    "zb-h1": zero_bubble_h1,
}

NAMES = (*_SINGLE, "interleaved")
"""All schedules."""


def build(
    name: str, stages: int, micro_batches: int, chunks: int | None = None
) -> PipelineSchedule:
    """
    Make a schedule by its name.

    Args:
        name: one of `NAMES`.
        stages: how many.
        micro_batches: how many.
        chunks: of layers per stage; None: as few as the schedule can have.

    Raises:
        SpecError: there is no schedule of that name; says which is near.
        ValueError: the schedule does not take these numbers; says which it takes.
    """
    if name == "interleaved":
        return interleaved(stages, micro_batches, 2 if chunks is None else chunks)
    if name not in _SINGLE:
        raise SpecError(Problem(("schedule",), f"unknown schedule {name!r}", hint(name, NAMES)))
    if chunks not in (None, 1):
        raise ValueError(f"{name} has one virtual stage per stage, got {chunks}: take interleaved")
    return _SINGLE[name](stages, micro_batches)


class Content(StrEnum):
    """What a message holds."""

    ACTIVATION = "activation"
    """A chunk's output, the next chunk's input."""
    GRADIENT = "gradient"
    """Of the loss with respect to a chunk's input."""


@dataclass(frozen=True, slots=True)
class Message:
    """One tensor on its way; source and target are virtual stages."""

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
    virtual_stage = schedule.virtual_stage(stage, action)
    if action.kind is ActionKind.FORWARD and virtual_stage > 0:
        return Message(Content.ACTIVATION, action.micro_batch, virtual_stage - 1, virtual_stage)
    if action.kind is ActionKind.BACKWARD and virtual_stage < schedule.depth - 1:
        return Message(Content.GRADIENT, action.micro_batch, virtual_stage + 1, virtual_stage)
    return None


def output_of(schedule: PipelineSchedule, stage: int, action: Action) -> Message | None:
    """Give what an action makes for another chunk; None: nothing."""
    virtual_stage = schedule.virtual_stage(stage, action)
    if action.kind is ActionKind.FORWARD and virtual_stage < schedule.depth - 1:
        return Message(Content.ACTIVATION, action.micro_batch, virtual_stage, virtual_stage + 1)
    if action.kind is ActionKind.BACKWARD and virtual_stage > 0:
        return Message(Content.GRADIENT, action.micro_batch, virtual_stage, virtual_stage - 1)
    return None


def with_communication(schedule: PipelineSchedule) -> Plan:
    """
    Weave sends and receives into a schedule; between chunks of one stage nothing is sent.

    Raises:
        ValueError: the stages wait for each other whatever is sent when.
    """
    return _ScheduleSimulator(schedule).run()


class _ScheduleSimulator:
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

    def run(self) -> Plan:
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
        output = output_of(self._schedule, stage, action)
        if output is not None and self._schedule.stage_of(output.target) == stage:
            self._have[stage].add(output)
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
        self._have[stage].add(message)
        return True

    def _make_room(self) -> bool:
        """Have one stage receive before its time what keeps another from sending."""
        for stage, message in enumerate(self._unsent):
            if message is not None:
                return self._receive(stage, self._schedule.stage_of(message.target))
        return False
