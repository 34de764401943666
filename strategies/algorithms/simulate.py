"""
How long a pipeline schedule takes: its stages run against each other, on paper.

    stage 0   |F0|F1|F2|        |B0====|          bubble = idle time / (stages x makespan)
    stage 1      |F0|F1|...|B0====|
              0              time ->   makespan

A stage does one step after the other. A send costs it nothing but waits for room in the channel;
the message is there `send` later, and takes up room until it is received. Messages do not slow each
other down: links have a latency here, no bandwidth.

Only two steps wait for another stage: the n-th send of a channel for the receive n - buffer, the
n-th receive for the n-th send. So times follow from each other without an event queue, in any order
in which the stages are visited.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from distplat.strategies.algorithms.pipeline_schedule import (
    Action,
    ActionKind,
    Message,
    PipelineSchedule,
    Plan,
    Recv,
    Send,
    Step,
    input_of,
    output_of,
    with_communication,
)


class Deadlock(ValueError):
    """Stages wait for each other for ever."""


@dataclass(frozen=True)
class Costs:
    """
    Durations of one micro-batch on one whole stage, in any unit; a chunk takes 1/v of it.

    Raises:
        ValueError: a negative one.
    """

    forward: float = 1.0
    backward_input: float = 1.0
    backward_weight: float = 1.0
    send: float = 0.0
    """From the end of a send to where the message can be received."""

    def __post_init__(self) -> None:
        if min(self.forward, self.backward_input, self.backward_weight, self.send) < 0:
            raise ValueError(f"durations must not be negative: {self}")

    def of(self, action: Action, schedule: PipelineSchedule) -> float:
        """Give the duration of one action."""
        if action.kind is ActionKind.FORWARD:
            whole = self.forward
        elif action.kind is ActionKind.WEIGHT:
            whole = self.backward_weight
        else:
            whole = self.backward_input
            whole += 0.0 if schedule.splits_backward else self.backward_weight
        return whole / schedule.chunks


@dataclass(frozen=True, slots=True)
class Span:
    """When an action ran."""

    action: Action
    start: float
    end: float


@dataclass(frozen=True)
class Simulation:
    """The result of simulating a schedule."""

    spans: tuple[tuple[Span, ...], ...]
    """Of each stage, in order."""
    peak_activations: tuple[int, ...]
    """Of each stage: (micro-batch, chunk) held at once, at most."""

    @property
    def makespan(self) -> float:
        """Time from the first start to the last end."""
        return makespan(self.spans)

    @property
    def bubble(self) -> float:
        """Part of the stages' time, 0 to 1, in which they do not compute."""
        return bubble(self.spans)


def makespan(spans: Sequence[Sequence[Span]]) -> float:
    """Give the time from the first start to the last end, 0 where nothing ran."""
    every = [span for row in spans for span in row]
    return max((s.end for s in every), default=0.0) - min((s.start for s in every), default=0.0)


def bubble(spans: Sequence[Sequence[Span]]) -> float:
    """Give the part of the stages' time, 0 to 1, in which they do not compute."""
    whole = makespan(spans) * len(spans)
    busy = sum(span.end - span.start for row in spans for span in row)
    return 1 - busy / whole if whole else 0.0


def simulate(
    schedule: PipelineSchedule | Plan,
    costs: Costs | Sequence[Costs] = Costs(),
    buffer: int | None = None,
) -> Simulation:
    """
    Run a schedule.

    Args:
        schedule: with its messages or without; then they are woven in.
        costs: of all stages, or one for each.
        buffer: messages that a channel between two stages holds; None: any number.

    Raises:
        Deadlock: the stages wait for each other; says who waits for what.
        ValueError: an action runs before what it needs, or the arguments make no sense.
    """
    plan = schedule if isinstance(schedule, Plan) else with_communication(schedule)
    stages = plan.schedule.stages
    per_stage = [costs] * stages if isinstance(costs, Costs) else list(costs)
    if len(per_stage) != stages:
        raise ValueError(f"{len(per_stage)} costs for {stages} stages")
    if buffer is not None and buffer < 1:
        raise ValueError(f"a channel holds one message at least, got a buffer of {buffer}")
    spans = _Execution(plan, per_stage, buffer).run()
    return Simulation(spans, tuple(plan.schedule.peak_activations()))


class _ChannelTimes:
    """When each message was sent, and when received."""

    def __init__(self) -> None:
        self.sent: list[tuple[Message, float]] = []
        self.received: list[float] = []


class _Execution:
    """One execution; every stage has a clock of its own."""

    def __init__(self, plan: Plan, costs: list[Costs], buffer: int | None) -> None:
        self._plan, self._costs, self._buffer = plan, costs, buffer
        stages = range(plan.schedule.stages)
        self._clock = [0.0 for _ in stages]
        self._next = [0 for _ in stages]
        self._spans: list[list[Span]] = [[] for _ in stages]
        self._have: list[set[Message | Action]] = [set() for _ in stages]
        self._channels: defaultdict[tuple[int, int], _ChannelTimes] = defaultdict(_ChannelTimes)

    def run(self) -> tuple[tuple[Span, ...], ...]:
        """Run all stages to their ends."""
        while self._unfinished():
            if not any([self._go(stage) for stage in self._unfinished()]):
                raise Deadlock("; ".join(map(self._wait, self._unfinished())))
        return tuple(map(tuple, self._spans))

    def _unfinished(self) -> list[int]:
        return [s for s, steps in enumerate(self._plan.steps) if self._next[s] < len(steps)]

    def _go(self, stage: int) -> bool:
        """Let a stage go as far as it can; say whether it moved at all."""
        steps, before = self._plan.steps[stage], self._next[stage]
        while self._next[stage] < len(steps) and self._try(stage, steps[self._next[stage]]):
            self._next[stage] += 1
        return self._next[stage] > before

    def _try(self, stage: int, step: Step) -> bool:
        if isinstance(step, Send):
            return self._send(stage, step)
        if isinstance(step, Recv):
            return self._recv(stage, step)
        self._compute(stage, step)
        return True

    def _send(self, stage: int, step: Send) -> bool:
        if step.message not in self._have[stage]:
            raise ValueError(f"stage {stage} sends {step.message} before it has it")
        channel = self._channels[stage, step.to]
        if self._buffer is not None and len(channel.sent) >= self._buffer:
            freed = len(channel.sent) - self._buffer
            if freed >= len(channel.received):
                return False
            self._clock[stage] = max(self._clock[stage], channel.received[freed])
        channel.sent.append((step.message, self._clock[stage] + self._costs[stage].send))
        return True

    def _recv(self, stage: int, step: Recv) -> bool:
        channel = self._channels[step.source, stage]
        number = len(channel.received)
        if number >= len(channel.sent):
            return False
        message, there = channel.sent[number]
        if message != step.message:
            raise ValueError(f"stage {stage} expects {step.message}, what comes is {message}")
        self._clock[stage] = max(self._clock[stage], there)
        channel.received.append(self._clock[stage])
        self._have[stage].add(message)
        return True

    def _compute(self, stage: int, action: Action) -> None:
        schedule, have = self._plan.schedule, self._have[stage]
        needed = [input_of(schedule, stage, action), _before(action)]
        missing = [one for one in needed if one is not None and one not in have]
        if missing:
            raise ValueError(f"stage {stage} computes {action} without {missing[0]}")
        start = self._clock[stage]
        self._clock[stage] = start + self._costs[stage].of(action, schedule)
        self._spans[stage].append(Span(action, start, self._clock[stage]))
        output = output_of(schedule, stage, action)
        have.update({action} if output is None else {action, output})

    def _wait(self, stage: int) -> str:
        step = self._plan.steps[stage][self._next[stage]]
        if isinstance(step, Send):
            return f"stage {stage} waits for room to send {step.message} to stage {step.to}"
        assert isinstance(step, Recv), "a computation waits for nobody"
        return f"stage {stage} waits for {step.message} from stage {step.source}"


def _before(action: Action) -> Action | None:
    """Give the action on the same chunk that must come first."""
    earlier = {ActionKind.BACKWARD: ActionKind.FORWARD, ActionKind.WEIGHT: ActionKind.BACKWARD}.get(
        action.kind
    )
    return Action(earlier, action.micro_batch, action.chunk) if earlier else None
