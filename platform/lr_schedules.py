"""
The learning rate over the steps: shapes of our own, and schedulers of torch by name and arguments.

Each is a function of the step alone, where torch's compute a rate from the one before: so servers,
leased tasks and a run that goes on have a step's rate without its history, with the same bits. The
one that goes by evaluations is a function of what they came to (`plateau.py`). A unit test holds
names, arguments and rates here against torch's.
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

WARMUP = "`warmup_steps` may stand beside all but CyclicLR"
METHOD = "write lr(step, total) in the task"
REFUSED_SCHEDULES = {
    "LambdaLR": f"it needs a function, which a job file cannot hold; {METHOD}",
    "MultiplicativeLR": f"it needs a function, which a job file cannot hold; {METHOD}",
    "ChainedScheduler": f"it multiplies others; SequentialLR has one after the other, {WARMUP}, or "
    f"{METHOD}",
    "ReduceLROnPlateau": "with a warm-up it is {name: ReduceLROnPlateau, warmup_steps: ...}",
}
"""Schedulers of torch that a job may not name, or not inside SequentialLR, and why."""


class LRSchedule(Spec):
    """Fields that all schedules have."""

    name: str
    warmup_steps: Index = 0
    """Steps in which the rate grows linearly from 1/warmup_steps of `lr` to `lr`; 0: no warm-up."""

    def unused_fields(self) -> set[str]:
        """Give the fields that have no effect on a schedule of this name."""
        return set()

    @property
    def needs_length(self) -> bool:
        """Whether a rate depends on how many steps the run has."""
        return False

    def rate(self, base: float, step: int, total_steps: int) -> float:
        """
        Give the learning rate of a step.

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
        """Give the rate of a step; it and their number are counted from the end of the warm-up."""


class Schedule(LRSchedule):
    """
    Shapes over the whole run, after a linear warm-up.

    `linear` and `cosine` fall from the first step to the last, `wsd` (warm-up, stable, decay) in
    its last steps.
    """

    name: Literal["constant", "linear", "cosine", "step", "wsd"] = "constant"
    """A shape over the whole run, below, or a scheduler of torch with its own arguments."""
    final_factor: UnitInterval = 0.0
    """`linear`, `cosine`, `wsd`: what `lr` is multiplied by in the last step."""
    every_steps: Index = 0
    """`step`: multiply by `gamma` once in so many steps."""
    gamma: Positive = 0.1
    """`step`: what to multiply by."""
    decay_steps: Index = 0
    """`wsd`: the last steps of the run, in which the rate falls; until then it is `lr`."""
    decay: Literal["linear", "cosine", "sqrt"] = "linear"
    """`wsd`: how it falls; `sqrt`: as 1 - sqrt (Hägele et al., NeurIPS 2024)."""

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

    def _after(self, base: float, step: int, steps: int) -> float:
        match self.name:
            case "constant":
                return base
            case "step":
                return base * _power(self.gamma, step // self.every_steps)
            case "wsd":
                decayed_steps = step + 1 - steps + self.decay_steps
                return base * self._fallen(self.decay, decayed_steps, self.decay_steps)
            case "linear" | "cosine" as shape:
                return base * self._fallen(shape, step, steps - 1)

    def _fallen(self, shape: str, step: int, steps: int) -> float:
        """Give the factor after so many steps of those in which it falls."""
        done, final = min(1.0, max(0.0, step / max(1, steps))), self.final_factor
        if shape == "cosine":
            return _cosine(1.0, final, done)
        return 1.0 - (1.0 - final) * (math.sqrt(done) if shape == "sqrt" else done)


class ConstantLR(LRSchedule):
    """A factor in the first steps."""

    name: Literal["ConstantLR"]
    factor: UnitInterval = 1.0 / 3
    total_iters: Count = 5

    def _after(self, base: float, step: int, steps: int) -> float:
        return base * self.factor if step < self.total_iters else base


class LinearLR(LRSchedule):
    """From one factor to another."""

    name: Literal["LinearLR"]
    start_factor: Annotated[Number, Field(gt=0, le=1)] = 1.0 / 3
    end_factor: UnitInterval = 1.0
    total_iters: Count = 5

    def _after(self, base: float, step: int, steps: int) -> float:
        done = min(step, self.total_iters) / self.total_iters
        return base * (self.start_factor + (self.end_factor - self.start_factor) * done)


class PolynomialLR(LRSchedule):
    """To zero, by a power of what is left."""

    name: Literal["PolynomialLR"]
    total_iters: Count = 5
    power: NonNegative = 1.0

    def _after(self, base: float, step: int, steps: int) -> float:
        left = 1.0 - min(step, self.total_iters) / self.total_iters
        return base * float(left**self.power)


class StepLR(LRSchedule):
    """Times `gamma` once in so many steps."""

    name: Literal["StepLR"]
    step_size: Count
    gamma: Positive = 0.1

    def _after(self, base: float, step: int, steps: int) -> float:
        return base * _power(self.gamma, step // self.step_size)


class MultiStepLR(LRSchedule):
    """Times `gamma` at each of some steps."""

    name: Literal["MultiStepLR"]
    milestones: tuple[Count, ...] = Field(min_length=1)
    gamma: Positive = 0.1

    def _after(self, base: float, step: int, steps: int) -> float:
        return base * _power(self.gamma, bisect_right(sorted(self.milestones), step))


class ExponentialLR(LRSchedule):
    """Times `gamma` in every step."""

    name: Literal["ExponentialLR"]
    gamma: Positive

    def _after(self, base: float, step: int, steps: int) -> float:
        return base * _power(self.gamma, step)


class CosineAnnealingLR(LRSchedule):
    """Half a cosine down to `eta_min` in `T_max` steps, then up again."""

    name: Literal["CosineAnnealingLR"]
    T_max: Count
    eta_min: NonNegative = 0.0

    def _after(self, base: float, step: int, steps: int) -> float:
        return _cosine(base, self.eta_min, step / self.T_max)


class CosineAnnealingWarmRestarts(LRSchedule):
    """Half a cosine again and again, each `T_mult` times as long (Loshchilov & Hutter, 2017)."""

    name: Literal["CosineAnnealingWarmRestarts"]
    T_0: Count
    T_mult: Count = 1
    eta_min: NonNegative = 0.0

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
    Up and down again over the run (Smith & Topin, 2018).

    `max_lr` stands in place of the rates of optimizer and groups, as in torch; without it each
    `lr` is the `max_lr` of its group.
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
        done = (step - begin) / (end - begin) if end > begin else 1.0
        if self.anneal_strategy == "linear":
            return (end_rate - start_rate) * done + start_rate
        return _cosine(start_rate, end_rate, done)


class CyclicLR(LRSchedule):
    """Up and down again and again (Smith, 2017), between rates that stand in place of `lr`."""

    name: Literal["CyclicLR"]
    base_lr: NonNegative
    max_lr: Positive
    step_size_up: Count = 2000
    step_size_down: Count | None = None
    mode: Literal["triangular", "triangular2", "exp_range"] = "triangular"
    gamma: Positive = 1.0
    cycle_momentum: Flag = True

    def _after(self, base: float, step: int, steps: int) -> float:
        length = self.step_size_up + (self.step_size_down or self.step_size_up)
        cycle, rising = math.floor(1 + step / length), self.step_size_up / length
        done = 1.0 + step / length - cycle
        height = done / rising if done <= rising else (done - 1.0) / (rising - 1.0)
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
"""Schedulers that begin with the rates of optimizer and groups, and so may follow each other."""


class SequentialLR(LRSchedule):
    """One scheduler after the other; each begins anew at its milestone."""

    name: Literal["SequentialLR"]
    schedulers: tuple[Annotated[Chainable, Field(discriminator="name")], ...] = Field(min_length=1)
    milestones: tuple[Count, ...]

    def _after(self, base: float, step: int, steps: int) -> float:
        index = bisect_right(self.milestones, step)
        begin = self.milestones[index - 1] if index else 0
        return self.schedulers[index].rate(base, step - begin, steps - begin)


class ReduceLROnPlateau(LRSchedule):
    """Times `factor` once evaluations get no better; stepped after each behind the warm-up."""

    name: Literal["ReduceLROnPlateau"]
    metric: str = Field("loss", min_length=1)
    """Figure of an evaluation: `loss`, or a name that the task's metrics() gives."""
    mode: Literal["min", "max"] = "min"
    factor: Annotated[Number, Field(ge=0, lt=1)] = 0.1
    patience: Index = 10
    threshold: NonNegative = 1e-4
    threshold_mode: Literal["rel", "abs"] = "rel"
    cooldown: Index = 0
    min_lr: NonNegative = 0.0
    eps: NonNegative = 1e-8

    def better(self, figure: float, best: float) -> bool:
        """Say whether a figure is better than the best so far; NaN is never."""
        relative, by = self.threshold_mode == "rel", self.threshold
        if self.mode == "min":
            return figure < (best * (1.0 - by) if relative else best - by)
        return figure > (best * (by + 1.0) if relative else best + by)

    def reduced(self, base: float, times: int) -> float:
        """
        Give a rate that was reduced `times` times.

        Args:
            base: `lr` of the optimizer, or of one of its groups.
            times: from 0.
        """
        for _ in range(times):
            lower = max(base * self.factor, self.min_lr)
            if not base - lower > self.eps:
                break  # nor will it be the next time
            base = lower
        return base

    def _after(self, base: float, step: int, steps: int) -> float:
        """Before any evaluation; see `Plateau` for later."""
        return base


AnySchedule = Schedule | Chainable | OneCycleLR | CyclicLR | SequentialLR | ReduceLROnPlateau


def _with_name(value: object) -> object:
    """Take a mapping without a name for a constant rate."""
    if isinstance(value, dict) and "name" not in value:
        return {"name": "constant", **value}
    return value


@dataclass(frozen=True)
class TaskSchedule:
    """What a task's `lr` gave; workers and servers have it in place of a schedule of the job's."""

    factors: "array[float]"
    """By step: what each `lr` of the job is multiplied by."""

    def rate(self, base: float, step: int, total_steps: int) -> float:
        """Give the learning rate of a step: `base` times the task's factor."""
        return base * self.factors[step]


NamedSchedule = Annotated[AnySchedule, Field(discriminator="name"), BeforeValidator(_with_name)]
"""As a job file has it."""


def schedule_problems(schedule: LRSchedule, steps: int | None) -> list[Problem]:
    """
    Name what is wrong with a job's schedule. An option that it does not use is an error.

    Args:
        schedule: the job's.
        steps: of the run; None: not known yet.
    """
    if isinstance(schedule, OneCycleLR | CyclicLR) and schedule.cycle_momentum:
        text = "must be false, which is not torch's default: momentum stays as the optimizer has it"
        return [Problem(("lr_schedule", "cycle_momentum"), text, "write cycle_momentum: false")]
    if isinstance(schedule, CyclicLR) and schedule.warmup_steps:
        text = "cannot stand beside CyclicLR, which has rates of its own"
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
    """Name a schedule that needs to know how many steps a run has which only its time ends."""
    if not schedule.needs_length:
        return []
    text = f"{schedule.name!r} follows the number of steps, which `max_time_s` alone does not say"
    hint = "give `steps` or `epochs` beside max_time_s, or another schedule: constant, or by steps"
    return [Problem(("lr_schedule",), text, hint)]


def length_problems(schedule: LRSchedule, steps: int) -> list[Problem]:
    """
    Compare a schedule with the length of the run.

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


def _cosine(start: float, end: float, done: float) -> float:
    """Go from one rate to another along half a cosine."""
    return end + (start - end) * (1.0 + math.cos(math.pi * done)) / 2.0


def _power(base: float, exponent: int) -> float:
    try:
        return float(base**exponent)
    except OverflowError:
        return math.inf
