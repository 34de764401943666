"""
Learning rate schedules: distplat's own shapes, and torch's schedulers by name and arguments.

Each schedule is a function of the step alone, where torch computes a rate from the previous one. So
servers, leased tasks and resumed runs get the same bits for a step without its history. The
schedule that depends on evaluations is a function of its state (`plateau.py`). A unit test compares
names, arguments and rates with torch's.
"""

import math
from abc import abstractmethod
from array import array
from bisect import bisect_right
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field
from typing_extensions import override

from distplat.platform.errors import Problem
from distplat.platform.fields import Count, Flag, Index, NonNegative, Number, Positive, Spec

UnitInterval = Annotated[Number, Field(ge=0, le=1)]
"""A number from 0 to 1."""

WARMUP = "`warmup_steps` can be combined with all but CyclicLR"
METHOD = "write lr(step, total) in the task"
REFUSED_SCHEDULES = {
    "LambdaLR": f"it needs a function, which a job file cannot hold; {METHOD}",
    "MultiplicativeLR": f"it needs a function, which a job file cannot hold; {METHOD}",
    "ChainedScheduler": "it multiplies others; SequentialLR chains them one after the other, "
    f"{WARMUP}, or {METHOD}",
    "ReduceLROnPlateau": "with a warm-up it is {name: ReduceLROnPlateau, warmup_steps: ...}",
}
"""torch schedulers that a job may not name, or not inside SequentialLR, and why."""


class LRSchedule(Spec):
    """Fields of all schedules."""

    name: str
    warmup_steps: Index = 0
    """Steps in which the rate grows linearly from 1/warmup_steps of `lr` to `lr`; 0: no warm-up."""

    def unused_fields(self) -> set[str]:
        """Return the fields without effect on this schedule."""
        return set()

    @property
    def needs_length(self) -> bool:
        """Whether rates depend on the number of steps of the run."""
        return False

    def rate(self, base: float, step: int, total_steps: int) -> float:
        """
        Return the learning rate of a step.

        Args:
            base: `lr` of the optimizer, or of one of its groups.
            step: from 0.
            total_steps: of the run.
        """
        if step < self.warmup_steps:
            return base * ((step + 1) / self.warmup_steps)
        return self._after(base, step - self.warmup_steps, total_steps - self.warmup_steps)

    @abstractmethod
    def _after(self, base: float, step: int, steps: int) -> float:
        """Return the rate of a step; `step` and `steps` count from the end of the warm-up."""


class Schedule(LRSchedule):
    """
    A shape over the whole run, after a linear warm-up.

    `linear` and `cosine` decay from the first step to the last, `wsd` (warm-up, stable, decay) in
    its last steps.
    """

    name: Literal["constant", "linear", "cosine", "step", "wsd"] = "constant"
    """One of the shapes below, or a scheduler of torch with its own arguments."""
    final_factor: UnitInterval = 0.0
    """`linear`, `cosine`, `wsd`: factor on `lr` in the last step."""
    every_steps: Index = 0
    """`step`: interval in steps between multiplications by `gamma`."""
    gamma: Positive = 0.1
    """`step`: factor on the rate."""
    decay_steps: Index = 0
    """`wsd`: number of last steps in which the rate decays; until then it is `lr`."""
    decay: Literal["linear", "cosine", "sqrt"] = "linear"
    """`wsd`: shape of the decay; `sqrt`: as 1 - sqrt (Hägele et al., NeurIPS 2024)."""

    @override
    def unused_fields(self) -> set[str]:
        used = {
            "constant": set(),
            "linear": {"final_factor"},
            "cosine": {"final_factor"},
            "step": {"every_steps", "gamma"},
            "wsd": {"final_factor", "decay_steps", "decay"},
        }[self.name]
        return {"final_factor", "every_steps", "gamma", "decay_steps", "decay"} - used

    @property
    @override
    def needs_length(self) -> bool:
        return self.name in ("linear", "cosine", "wsd")

    @override
    def _after(self, base: float, step: int, steps: int) -> float:
        match self.name:
            case "constant":
                return base
            case "step":
                return base * _power(self.gamma, step // self.every_steps)
            case "wsd":
                decayed_steps = step + 1 - steps + self.decay_steps
                return base * self._decay_factor(self.decay, decayed_steps, self.decay_steps)
            case "linear" | "cosine" as shape:
                return base * self._decay_factor(shape, step, steps - 1)

    def _decay_factor(self, shape: str, step: int, steps: int) -> float:
        """Return the factor after `step` of the `steps` decay steps."""
        progress, final = min(1.0, max(0.0, step / max(1, steps))), self.final_factor
        if shape == "cosine":
            return _cosine(1.0, final, progress)
        return 1.0 - (1.0 - final) * (math.sqrt(progress) if shape == "sqrt" else progress)


class ConstantLR(LRSchedule):
    """A constant factor in the first steps."""

    name: Literal["ConstantLR"]
    factor: UnitInterval = 1.0 / 3
    total_iters: Count = 5

    @override
    def _after(self, base: float, step: int, steps: int) -> float:
        return base * self.factor if step < self.total_iters else base


class LinearLR(LRSchedule):
    """From one factor to another, linearly."""

    name: Literal["LinearLR"]
    start_factor: Annotated[Number, Field(gt=0, le=1)] = 1.0 / 3
    end_factor: UnitInterval = 1.0
    total_iters: Count = 5

    @override
    def _after(self, base: float, step: int, steps: int) -> float:
        progress = min(step, self.total_iters) / self.total_iters
        return base * (self.start_factor + (self.end_factor - self.start_factor) * progress)


class PolynomialLR(LRSchedule):
    """Decay to zero, by a power of the remaining fraction."""

    name: Literal["PolynomialLR"]
    total_iters: Count = 5
    power: NonNegative = 1.0

    @override
    def _after(self, base: float, step: int, steps: int) -> float:
        left = 1.0 - min(step, self.total_iters) / self.total_iters
        return base * float(left**self.power)


class StepLR(LRSchedule):
    """Multiply by `gamma` every `step_size` steps."""

    name: Literal["StepLR"]
    step_size: Count
    gamma: Positive = 0.1

    @override
    def _after(self, base: float, step: int, steps: int) -> float:
        return base * _power(self.gamma, step // self.step_size)


class MultiStepLR(LRSchedule):
    """Multiply by `gamma` at each milestone."""

    name: Literal["MultiStepLR"]
    milestones: tuple[Count, ...] = Field(min_length=1)
    gamma: Positive = 0.1

    @override
    def _after(self, base: float, step: int, steps: int) -> float:
        return base * _power(self.gamma, bisect_right(sorted(self.milestones), step))


class ExponentialLR(LRSchedule):
    """Multiply by `gamma` in every step."""

    name: Literal["ExponentialLR"]
    gamma: Positive

    @override
    def _after(self, base: float, step: int, steps: int) -> float:
        return base * _power(self.gamma, step)


class CosineAnnealingLR(LRSchedule):
    """Half a cosine down to `eta_min` in `T_max` steps, then up again."""

    name: Literal["CosineAnnealingLR"]
    T_max: Count
    eta_min: NonNegative = 0.0

    @override
    def _after(self, base: float, step: int, steps: int) -> float:
        return _cosine(base, self.eta_min, step / self.T_max)


class CosineAnnealingWarmRestarts(LRSchedule):
    """Repeated half cosines, each `T_mult` times as long (Loshchilov & Hutter, 2017)."""

    name: Literal["CosineAnnealingWarmRestarts"]
    T_0: Count
    T_mult: Count = 1
    eta_min: NonNegative = 0.0

    @override
    def _after(self, base: float, step: int, steps: int) -> float:
        length = self.T_0
        if self.T_mult == 1:
            step %= length
        while step >= length:
            step -= length
            length *= self.T_mult
        return _cosine(base, self.eta_min, step / length)


class OneCycleLR(LRSchedule):
    """
    One cycle up and down over the run (Smith & Topin, 2018).

    `max_lr` replaces the rates of the optimizer and its groups, as in torch; without it, each `lr`
    is the `max_lr` of its group.
    """

    name: Literal["OneCycleLR"]
    max_lr: Positive | None = None
    total_steps: Count | None = None
    pct_start: UnitInterval = 0.3
    anneal_strategy: Literal["cos", "linear"] = "cos"
    cycle_momentum: Flag = True
    div_factor: Positive = 25.0
    final_div_factor: Positive = 1e4
    three_phase: Flag = False

    @property
    @override
    def needs_length(self) -> bool:
        return True

    @override
    def rate(self, base: float, step: int, total_steps: int) -> float:
        return super().rate(self.max_lr or base, step, total_steps)

    @override
    def _after(self, base: float, step: int, steps: int) -> float:
        first = base / self.div_factor
        last, top = first / self.final_div_factor, self.pct_start * steps - 1.0
        ends = [(top, first, base), (steps - 1.0, base, last)]
        if self.three_phase:
            again = 2.0 * self.pct_start * steps - 2.0
            ends[1:] = [(again, base, first), (steps - 1.0, first, last)]
        index = next((at for at, (end, _, _) in enumerate(ends) if step <= end), len(ends) - 1)
        begin = ends[index - 1][0] if index else 0.0
        end, start_rate, end_rate = ends[index]
        progress = (step - begin) / (end - begin) if end > begin else 1.0
        if self.anneal_strategy == "linear":
            return (end_rate - start_rate) * progress + start_rate
        return _cosine(start_rate, end_rate, progress)


class CyclicLR(LRSchedule):
    """Repeated cycles up and down (Smith, 2017), between rates that replace `lr`."""

    name: Literal["CyclicLR"]
    base_lr: NonNegative
    max_lr: Positive
    step_size_up: Count = 2000
    step_size_down: Count | None = None
    mode: Literal["triangular", "triangular2", "exp_range"] = "triangular"
    gamma: Positive = 1.0
    cycle_momentum: Flag = True

    @override
    def _after(self, base: float, step: int, steps: int) -> float:
        length = self.step_size_up + (self.step_size_down or self.step_size_up)
        cycle, rising = math.floor(1 + step / length), self.step_size_up / length
        progress = 1.0 + step / length - cycle
        height = progress / rising if progress <= rising else (progress - 1.0) / (rising - 1.0)
        scale = 1.0 if self.mode == "triangular" else _power(0.5, cycle - 1)
        scale = _power(self.gamma, step) if self.mode == "exp_range" else scale
        return self.base_lr + (self.max_lr - self.base_lr) * height * scale


Chainable = (
    ConstantLR
    | LinearLR
    | PolynomialLR
    | StepLR
    | MultiStepLR
    | ExponentialLR
    | CosineAnnealingLR
    | CosineAnnealingWarmRestarts
)
"""Schedulers that start from the rates of the optimizer and its groups, so they can be chained."""


class SequentialLR(LRSchedule):
    """Schedulers one after the other; each starts at its milestone."""

    name: Literal["SequentialLR"]
    schedulers: tuple[Annotated[Chainable, Field(discriminator="name")], ...] = Field(min_length=1)
    milestones: tuple[Count, ...]

    @override
    def _after(self, base: float, step: int, steps: int) -> float:
        index = bisect_right(self.milestones, step)
        begin = self.milestones[index - 1] if index else 0
        return self.schedulers[index].rate(base, step - begin, steps - begin)


class ReduceLROnPlateau(LRSchedule):
    """
    Multiply by `factor` when evaluations stop improving; updated after each evaluation past the
    warm-up.
    """

    name: Literal["ReduceLROnPlateau"]
    metric: str = Field("loss", min_length=1)
    """Metric of an evaluation: `loss`, or a name that the task's metrics() returns."""
    mode: Literal["min", "max"] = "min"
    factor: Annotated[Number, Field(ge=0, lt=1)] = 0.1
    patience: Index = 10
    threshold: NonNegative = 1e-4
    threshold_mode: Literal["rel", "abs"] = "rel"
    cooldown: Index = 0
    min_lr: NonNegative = 0.0
    eps: NonNegative = 1e-8

    def is_better(self, figure: float, best: float) -> bool:
        """Return whether a value is better than the best so far; NaN is never better."""
        relative, by = self.threshold_mode == "rel", self.threshold
        if self.mode == "min":
            return figure < (best * (1.0 - by) if relative else best - by)
        return figure > (best * (by + 1.0) if relative else best + by)

    def reduced(self, base: float, times: int) -> float:
        """
        Return a rate after `times` reductions.

        Args:
            base: `lr` of the optimizer, or of one of its groups.
            times: from 0.
        """
        for _ in range(times):
            lower = max(base * self.factor, self.min_lr)
            if not base - lower > self.eps:
                break  # further reductions have no effect either
            base = lower
        return base

    @override
    def _after(self, base: float, step: int, steps: int) -> float:
        """Return the rate before any evaluation; `Plateau` applies the reductions."""
        return base


AnySchedule = Schedule | Chainable | OneCycleLR | CyclicLR | SequentialLR | ReduceLROnPlateau


def _with_name(value: object) -> object:
    """Accept a mapping without a name as a constant rate."""
    if isinstance(value, dict) and "name" not in value:
        return {"name": "constant", **value}
    return value


@dataclass(frozen=True)
class TaskSchedule:
    """Rates returned by a task's `lr`; replaces the job's schedule on workers and servers."""

    factors: "array[float]"
    """By step, the factor on each `lr` of the job."""

    def rate(self, base: float, step: int, total_steps: int) -> float:
        """Return the learning rate of a step: `base` times the task's factor."""
        return base * self.factors[step]


NamedSchedule = Annotated[AnySchedule, Field(discriminator="name"), BeforeValidator(_with_name)]
"""Schedule field of a job file."""


def schedule_problems(schedule: LRSchedule, steps: int | None) -> list[Problem]:
    """
    Check a job's schedule, including options without effect.

    Args:
        schedule: the job's.
        steps: of the run; None: not known yet.
    """
    if isinstance(schedule, OneCycleLR | CyclicLR) and schedule.cycle_momentum:
        text = "must be false, which is not torch's default: momentum stays as the optimizer has it"
        return [Problem(("lr_schedule", "cycle_momentum"), text, "write cycle_momentum: false")]
    if isinstance(schedule, CyclicLR) and schedule.warmup_steps:
        text = "cannot be combined with CyclicLR, which has its own rates"
        return [Problem(("lr_schedule", "warmup_steps"), text, "remove it")]
    if isinstance(schedule, SequentialLR):
        return _sequence_problems(schedule)
    if isinstance(schedule, OneCycleLR) and steps is not None:
        return length_problems(schedule, steps)
    if not isinstance(schedule, Schedule):
        return []
    problems = [
        Problem(
            ("lr_schedule", field), f"has no effect on the schedule {schedule.name!r}", "remove it"
        )
        for field in sorted(schedule.unused_fields() & schedule.model_fields_set)
    ]
    for name, field in (("step", "every_steps"), ("wsd", "decay_steps")):
        if schedule.name == name and not getattr(schedule, field):
            text = f"the schedule {name!r} needs it, >= 1"
            problems.append(Problem(("lr_schedule", field), text))
    return problems if steps is None else [*problems, *length_problems(schedule, steps)]


def unbounded_problems(schedule: LRSchedule) -> list[Problem]:
    """Check that the schedule of a run with only a time limit does not need the number of steps."""
    if not schedule.needs_length:
        return []
    text = f"{schedule.name!r} follows the number of steps, which `max_time_s` alone does not say"
    hint = "give `steps` or `epochs` beside max_time_s, or another schedule: constant, or by steps"
    return [Problem(("lr_schedule",), text, hint)]


def length_problems(schedule: LRSchedule, steps: int) -> list[Problem]:
    """
    Check a schedule against the length of the run.

    Args:
        schedule: the job's.
        steps: of the run.
    """
    if isinstance(schedule, OneCycleLR):
        own, left = schedule.total_steps, steps - schedule.warmup_steps
        if own is None or own == left:
            return []
        after = " after the warm-up" if schedule.warmup_steps else ""
        text = f"is {own}, and the run has {left} steps{after}"
        return [Problem(("lr_schedule", "total_steps"), text, "remove it: the run's are taken")]
    if not isinstance(schedule, Schedule) or schedule.name != "wsd":
        return []
    if schedule.warmup_steps + schedule.decay_steps <= steps:
        return []
    text = f"with `warmup_steps` more than all steps of the run, which are {steps}"
    return [Problem(("lr_schedule", "decay_steps"), text)]


def _sequence_problems(schedule: SequentialLR) -> list[Problem]:
    where, milestones = ("lr_schedule", "milestones"), schedule.milestones
    if len(milestones) != len(schedule.schedulers) - 1:
        text = f"must be one fewer than `schedulers`, and are {len(milestones)}"
        return [Problem(where, f"{text} for {len(schedule.schedulers)}")]
    if any(after <= before for before, after in pairwise(milestones)):
        return [Problem(where, f"must grow from one to the next (got {[*milestones]})")]
    return []


def _cosine(start: float, end: float, progress: float) -> float:
    """Interpolate between two rates along half a cosine."""
    return end + (start - end) * (1.0 + math.cos(math.pi * progress)) / 2.0


def _power(base: float, exponent: int) -> float:
    try:
        return float(base**exponent)
    except OverflowError:
        return math.inf
