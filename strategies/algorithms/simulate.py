"""
Simulation of a pipeline schedule's duration.

    stage 0   |F0|F1|F2|        |B0====|          bubble = idle time / (stages x makespan)
    stage 1      |F0|F1|...|B0====|
              0              time ->   makespan

A stage runs its steps in sequence. A send takes no time but waits for space in the channel; the
message arrives `send` later, and occupies the channel until it is received. Links have a latency
but unlimited bandwidth.

Only two kinds of steps wait for another stage: the n-th send of a channel waits for receive
n - buffer, and the n-th receive waits for the n-th send. So no event queue is needed, and stages
can be visited in any order.
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
    """All unfinished stages wait for each other."""


@dataclass(frozen=True)
class Costs:
    """
    Durations of one micro-batch on one whole stage, in any unit; a chunk takes 1/v of them.

    Raises:
        ValueError: a duration is negative.
    """

    forward: float = 1.0
    backward_input: float = 1.0
    backward_weight: float = 1.0
    send: float = 0.0
    """Latency from a send until the message can be received."""

    def __post_init__(self) -> None:
        if min(self.forward, self.backward_input, self.backward_weight, self.send) < 0:
            raise ValueError(f"durations must not be negative: {self}")

    def of(self, action: Action, schedule: PipelineSchedule) -> float:
        """Return the duration of an action."""
        if action.kind is ActionKind.FORWARD:
            duration = self.forward
        elif action.kind is ActionKind.WEIGHT:
            duration = self.backward_weight
        else:
            duration = self.backward_input
            duration += 0.0 if schedule.splits_backward else self.backward_weight
        return duration / schedule.chunks


@dataclass(frozen=True, slots=True)
class Span:
    """Time span of an action."""

    action: Action
    start: float
    end: float


@dataclass(frozen=True)
class Simulation:
    """The result of simulating a schedule."""

    spans: tuple[tuple[Span, ...], ...]
    """Spans of each stage, in order."""
    peak_activations: tuple[int, ...]
    """Maximum number of (micro-batch, chunk) that each stage holds at once."""

    @property
    def makespan(self) -> float:
        """Time from the first start to the last end."""
        return makespan(self.spans)

    @property
    def bubble(self) -> float:
        """Fraction of the stages' time without computation."""
        return bubble(self.spans)


def makespan(spans: Sequence[Sequence[Span]]) -> float:
    """Return the time from the first start to the last end, or 0 without spans."""
    flat = [span for row in spans for span in row]
    return max((s.end for s in flat), default=0.0) - min((s.start for s in flat), default=0.0)


def bubble(spans: Sequence[Sequence[Span]]) -> float:
    """Return the fraction of the stages' time without computation."""
    total = makespan(spans) * len(spans)
    busy = sum(span.end - span.start for row in spans for span in row)
    return 1 - busy / total if total else 0.0


def simulate(
    schedule: PipelineSchedule | Plan,
    costs: Costs | Sequence[Costs] = Costs(),
    buffer: int | None = None,
) -> Simulation:
    """
    Simulate a schedule.

    Args:
        schedule: a plan, or a schedule to which messages are added.
        costs: of all stages, or one for each.
        buffer: capacity of a channel in messages; None: unlimited.

    Raises:
        Deadlock: the stages wait for each other; names what each waits for.
        ValueError: an action runs before its inputs, or the arguments are invalid.
    """
    plan = schedule if isinstance(schedule, Plan) else with_communication(schedule)
    stages = plan.schedule.stages
    per_stage = [costs] * stages if isinstance(costs, Costs) else list(costs)
    if len(per_stage) != stages:
        raise ValueError(f"{len(per_stage)} costs for {stages} stages")
    if buffer is not None and buffer < 1:
        raise ValueError(f"a channel holds at least one message, got a buffer of {buffer}")
    spans = _Execution(plan, per_stage, buffer).run()
    return Simulation(spans, tuple(plan.schedule.peak_activations()))


class _ChannelTimes:
    """Arrival times of messages, and times of their receipt."""

    def __init__(self) -> None:
        self.sent: list[tuple[Message, float]] = []
        self.received: list[float] = []


class _Execution:
    """One simulated execution; every stage has its own clock."""

    def __init__(self, plan: Plan, costs: list[Costs], buffer: int | None) -> None:
        self._plan, self._costs, self._buffer = plan, costs, buffer
        stages = range(plan.schedule.stages)
        self._clock = [0.0 for _ in stages]
        self._next = [0 for _ in stages]
        self._spans: list[list[Span]] = [[] for _ in stages]
        #: messages and completed actions
        self._available: list[set[Message | Action]] = [set() for _ in stages]
        self._channels: defaultdict[tuple[int, int], _ChannelTimes] = defaultdict(_ChannelTimes)

    def run(self) -> tuple[tuple[Span, ...], ...]:
        """Run all stages to completion."""
        while self._unfinished():
            if not any([self._advance(stage) for stage in self._unfinished()]):
                raise Deadlock("; ".join(map(self._describe_wait, self._unfinished())))
        return tuple(map(tuple, self._spans))

    def _unfinished(self) -> list[int]:
        return [s for s, steps in enumerate(self._plan.steps) if self._next[s] < len(steps)]

    def _advance(self, stage: int) -> bool:
        """Run a stage until it blocks; return whether it made any step."""
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
        if step.message not in self._available[stage]:
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
        message, arrival = channel.sent[number]
        if message != step.message:
            raise ValueError(f"stage {stage} expects {step.message}, but receives {message}")
        self._clock[stage] = max(self._clock[stage], arrival)
        channel.received.append(self._clock[stage])
        self._available[stage].add(message)
        return True

    def _compute(self, stage: int, action: Action) -> None:
        schedule, available = self._plan.schedule, self._available[stage]
        needed = [input_of(schedule, stage, action), _prerequisite(action)]
        missing = [item for item in needed if item is not None and item not in available]
        if missing:
            raise ValueError(f"stage {stage} computes {action} without {missing[0]}")
        start = self._clock[stage]
        self._clock[stage] = start + self._costs[stage].of(action, schedule)
        self._spans[stage].append(Span(action, start, self._clock[stage]))
        output = output_of(schedule, stage, action)
        available.update({action} if output is None else {action, output})

    def _describe_wait(self, stage: int) -> str:
        step = self._plan.steps[stage][self._next[stage]]
        if isinstance(step, Send):
            return f"stage {stage} waits for space to send {step.message} to stage {step.to}"
        assert isinstance(step, Recv), "a computation never waits"
        return f"stage {stage} waits for {step.message} from stage {step.source}"


def _prerequisite(action: Action) -> Action | None:
    """Return the action on the same chunk that must run first."""
    earlier = {ActionKind.BACKWARD: ActionKind.FORWARD, ActionKind.WEIGHT: ActionKind.BACKWARD}.get(
        action.kind
    )
    return Action(earlier, action.micro_batch, action.chunk) if earlier else None
