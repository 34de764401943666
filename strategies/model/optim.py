"""The job's optimizer over a flat vector: torch's own classes, our schedule and clipping."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from typing_extensions import override

from distplat.platform.errors import SpecError, StateLost
from distplat.platform.model_options import EMA
from distplat.platform.optimizer_checks import match_problems, shape_problems
from distplat.platform.optimizers import Optimizer
from distplat.platform.plateau import Plateau, PlateauState
from distplat.platform.spec import Job
from distplat.platform.vector_layout import Layout
from distplat.strategies.algorithms.reduce import clip_factor
from distplat.strategies.collective import Collective, gather_values
from distplat.strategies.model.ema import AVERAGE
from distplat.strategies.model.flat import FlatModel
from distplat.strategies.model.optimizer_state import PER_PARAMETER, UPDATES, USED, Presence
from distplat.strategies.model.parameter_layout import (
    scale_in_place,
    segments_of,
    squared_norm_of,
    typed,
)
from distplat.strategies.model.tensor_optimizer import TensorOptimizer, VectorOptimizer
from distplat.strategies.sparse.modules import dense_parameters, tables_of

FUSED = {"SGD", "Adam", "AdamW", "Adagrad"}
"""Classes that have a fused kernel on the CPU: one pass over memory in place of several."""

FUSED_TYPES = {"float32", "float64"}
"""Types that it updates: torch 2.13's does nothing to 16-bit types on the CPU."""


@dataclass
class _Range:
    """Neighbouring pieces that are updated alike; for torch they are a single parameter."""

    pieces: slice
    """Indices in the list of pieces."""
    start: int
    """First element of the vector."""
    stop: int
    dtype: str
    group: int
    """Number of the parameter group."""
    used: bool
    """Whether torch has a state for it."""
    parameter: nn.Parameter = field(init=False)
    """Views of the vector, and of the gradient as its `.grad`."""
    optimizer: torch.optim.Optimizer = field(init=False)
    """The one that has the parameter."""

    @property
    def state(self) -> dict[str, Any]:
        """What torch remembers of it."""
        state: dict[str, Any] = self.optimizer.state.get(self.parameter, {})
        return state

    def of(self, vector: Tensor) -> Tensor:
        """Give the elements of a vector, in their type."""
        return typed(vector, self.start, self.stop, self.dtype)


class FlatOptimizer(VectorOptimizer):
    """
    One of torch's optimizers over a run of the flat vector, as if each parameter were its own.

    A parameter without a gradient is passed over: it does not decay, it does not move, and its step
    is not counted. The others are updated in as few operations as possible. Neighbours are one
    range if they have the same type, parameter group and history of gradients:

        pieces      0.weight | 0.bias | 1.weight | 2.weight
        gradient      yes       yes       no         yes
        ranges      [               ]            [        ]

    So where all parameters have a gradient in each step, and there are no groups, each segment of
    the vector is one range. Ranges depend on the layout, on presence and on what is remembered, and
    on nothing else.

    What torch remembers is kept by its names. A vector, such as `exp_avg`, is laid out as the
    parameters are, and torch updates views of it. A scalar, such as `step`, is kept for each piece,
    and is read back from torch when it is wanted.

    Args:
        spec: name and arguments.
        vector: shape [n]; updated in place.
        gradient: shape [n].
        layout: what lies where; None: a single parameter.
        ema: the average of the vector that is kept beside it; None: there is none.
    """

    def __init__(
        self,
        spec: Optimizer,
        vector: Tensor,
        gradient: Tensor,
        layout: Layout | None = None,
        ema: EMA | None = None,
    ) -> None:
        super().__init__(vector, layout, ema)
        self.gradient = gradient
        self._pieces = self._layout.pieces
        self._group_of = np.array([piece.group for piece in self._pieces], np.int64)
        self._segment_of = segments_of(self._layout)
        kinds = [(fused, used) for fused in (True, False) for used in (True, False)]
        # A fused kernel wants a state of all its parameters or of none; hence two of each.
        self._optimizers = {(f, u): _torch_optimizer(spec, fused=f) for f, u in kinds}
        self._used = np.zeros(len(self._pieces), np.bool_)  #: pieces that torch has a state for
        self._vectors: dict[str, Tensor] = {}
        self._scalars: dict[str, Tensor] = {}  #: by piece
        self._ranges: list[_Range] | None = None  #: of `_present`; None: to be found anew
        self._present: NDArray[np.bool_] | None = None  #: by piece; None: all

    @override
    def step(
        self, rates: Sequence[float], present: Presence = None, *, applied: bool = True
    ) -> None:
        ranges = self._ranges_of(present)
        with torch.no_grad():
            for optimizer in self._optimizers.values():
                for group, rate in zip(optimizer.param_groups, rates, strict=True):
                    group["lr"] = rate
                if any(group["params"] for group in optimizer.param_groups):
                    inspect.unwrap(type(optimizer).step)(optimizer)
            if self._average is not None and applied:
                self._average.update(tail=any(one.start >= self._layout.tail for one in ranges))
        if not all(one.used for one in ranges):
            self._keep_new_states(ranges)

    @override
    def state(self) -> dict[str, Tensor]:
        """Give what it remembers, by torch's names (see `PER_PARAMETER`); vectors are no copies."""
        average = self._averaged()
        if not self._used.any() and not average:
            return {}
        self._read_scalars()
        count = self._layout.parameters
        state = dict(self._vectors)
        used = torch.zeros(count, dtype=torch.bool)
        indices = torch.from_numpy(self._slots)
        used[indices] = torch.from_numpy(self._used)
        for name, values in self._scalars.items():
            of_all = torch.zeros(count, dtype=values.dtype)
            of_all[indices] = values.cpu()
            state[PER_PARAMETER + name] = of_all
        return {**state, **average, USED: used}

    @override
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state` of an equal optimizer gave; copied. Nothing: as if it were new."""
        indices = torch.from_numpy(self._slots)
        used = state.get(USED)
        self._used[:] = used[indices].cpu().numpy() if used is not None else False
        self._vectors, self._scalars, self._ranges = {}, {}, None
        self._load_average(state)
        for name, values in state.items():
            if name in (USED, AVERAGE, UPDATES):
                continue
            if name.startswith(PER_PARAMETER):
                self._scalars[name.removeprefix(PER_PARAMETER)] = values[indices].clone()
            else:
                self._vectors[name] = torch.zeros_like(self._vector).copy_(values)

    def adjust(
        self, names: Sequence[Sequence[str]], values: NDArray[np.float64]
    ) -> tuple[float, ...]:
        """
        Have groups go on with other arguments.

        Args:
            names: by group, from 1, the arguments; `beta1` is the first of `betas`.
            values: of all of them, one after the other.

        Returns:
            Learning rates, as `step` takes them.
        """
        rates, given = [0.0], iter(values.tolist())
        for number, wanted in enumerate(names, 1):
            arguments = dict(zip(wanted, given, strict=False))
            rates.append(arguments.pop("lr"))
            if "beta1" in arguments:
                arguments["betas"] = arguments.pop("beta1"), arguments.pop("beta2")
            for optimizer in self._optimizers.values():
                optimizer.param_groups[number].update(arguments)
        return tuple(rates)

    @override
    def use(self, gradient: Tensor) -> None:
        """Take gradients from another vector from now on, shape [n]."""
        self.gradient = gradient
        for one in self._ranges or ():
            one.parameter.grad = one.of(gradient)

    @override
    def _kept(self) -> Iterable[Tensor]:
        return [*self._vectors.values(), *self._scalars.values()]

    def _ranges_of(self, present: Presence) -> list[_Range]:
        """Give the ranges to be updated; torch's optimizers have them as parameters."""
        updated: NDArray[np.bool_] | None = self._at_first
        if present is not None:
            updated = np.asarray(present, np.bool_)[self._slots]
        if updated is not None and updated.all():
            updated = None
        if self._ranges is not None and _equal(updated, self._present):
            return self._ranges
        self._read_scalars()
        self._present, self._ranges = updated, self._find_ranges(updated)
        for optimizer in self._optimizers.values():
            _forget_parameters(optimizer)
        for one in self._ranges:
            self._give_to_torch(one)
        return self._ranges

    def _find_ranges(self, present: NDArray[np.bool_] | None) -> list[_Range]:
        """Put neighbours together that are updated alike."""
        count = len(self._pieces)
        if not count:
            return []
        facts = [self._segment_of, self._group_of, self._used]
        facts += [] if present is None else [present]
        facts += [values.cpu().numpy() for values in self._scalars.values()]
        changes = np.logical_or.reduce([one[1:] != one[:-1] for one in facts])
        bounds = [0, *(np.flatnonzero(changes) + 1).tolist(), count]
        return [
            self._range(slice(first, stop))
            for first, stop in pairwise(bounds)
            if present is None or present[first]
        ]

    def _range(self, pieces: slice) -> _Range:
        """Make a range; it has the padding behind it, up to the next piece or the segment's end."""
        segment = self._layout.segments[int(self._segment_of[pieces.start])]
        start, stop = self._pieces[pieces.start].start, segment.stop
        if pieces.stop < len(self._pieces):
            stop = min(stop, self._pieces[pieces.stop].start)
        group, used = int(self._group_of[pieces.start]), bool(self._used[pieces.start])
        return _Range(pieces, start, stop, segment.dtype, group, used)

    def _give_to_torch(self, one: _Range) -> None:
        """Make a range a parameter of the torch optimizer that is right for its type."""
        fused = one.dtype in FUSED_TYPES or self._vector.device.type != "cpu"
        one.optimizer = self._optimizers[fused, one.used]
        one.parameter = nn.Parameter(one.of(self._vector))
        one.parameter.grad = one.of(self.gradient)
        one.optimizer.param_groups[one.group]["params"].append(one.parameter)
        if one.used:
            on = self._vector.device if one.optimizer.defaults.get("fused") else None
            one.optimizer.state[one.parameter] = {
                **{name: one.of(vector) for name, vector in self._vectors.items()},
                **{n: v[one.pieces.start].clone().to(on) for n, v in self._scalars.items()},
            }

    def _keep_new_states(self, ranges: Sequence[_Range]) -> None:
        """Copy what torch has begun to remember; ranges that have a state now are found anew."""
        for one in ranges:
            if one.used:
                continue
            for name, value in one.state.items():
                if value is None:
                    continue
                if not value.ndim:
                    self._keep_scalar(name, one, value)
                else:
                    if name not in self._vectors:
                        self._vectors[name] = torch.zeros_like(self._vector)
                    one.of(self._vectors[name]).copy_(value)
                self._used[one.pieces] = True
        if self._used.any():
            self._read_scalars()
            self._ranges = None

    def _keep_scalar(self, name: str, one: _Range, value: Tensor) -> None:
        if name not in self._scalars:
            count = len(self._pieces)
            self._scalars[name] = torch.zeros(count, dtype=value.dtype, device=value.device)
        self._scalars[name][one.pieces] = value

    def _read_scalars(self) -> None:
        """Take over the scalars that torch has counted on meanwhile."""
        for one in self._ranges or ():
            for name, value in one.state.items() if one.used else ():
                if name in self._scalars:
                    self._keep_scalar(name, one, value)


def _equal(one: NDArray[np.bool_] | None, other: NDArray[np.bool_] | None) -> bool:
    if one is None or other is None:
        return one is other
    return bool((one == other).all())


def _torch_optimizer(spec: Optimizer, *, fused: bool) -> torch.optim.Optimizer:
    """Make a torch optimizer that has all groups, and no parameters yet."""
    kind = getattr(torch.optim, spec.name)
    more = {"fused": True} if fused and spec.name in FUSED else {}
    groups = [
        {"params": [nn.Parameter(torch.zeros(1))], **variant.arguments()}
        for variant in spec.variants()
    ]
    optimizer: torch.optim.Optimizer = kind(groups, **spec.arguments(), **more)
    _forget_parameters(optimizer)
    return optimizer


def _forget_parameters(optimizer: torch.optim.Optimizer) -> None:
    for group in optimizer.param_groups:
        group["params"] = []
    optimizer.state.clear()


def optimizer_of(
    spec: Optimizer, vector: Tensor, gradient: Tensor, layout: Layout | None, ema: EMA | None
) -> VectorOptimizer:
    """Make the optimizer of a run of the flat vector; see both for the arguments."""
    kind: type[TensorOptimizer | FlatOptimizer]
    kind = TensorOptimizer if spec.whole else FlatOptimizer
    return kind(spec, vector, gradient, layout, ema)


def rate_of(job: Job, step: int, total_steps: int) -> tuple[float, ...]:
    """Give the learning rate of a step: of parameters in no group, then of each group."""
    schedule = job.lr_schedule
    return tuple(schedule.rate(base, step, total_steps) for base in job.optimizer.rates())


def rate_figures(job: Job, step: int, total_steps: int) -> dict[str, float]:
    """Give the learning rates of a step by the names of docs/metrics.md."""
    named = zip(job.optimizer.figures(), rate_of(job, step, total_steps), strict=True)
    return {name: rate for name, rate in named if name}


def norm_figures(norm: float | None) -> dict[str, float]:
    """Give the gradient's norm by the name of docs/metrics.md; None: nobody has computed it."""
    return {} if norm is None else {"grad_norm": norm}


class LocalOptimizer:
    """Optimizer over a worker's own parameters, for strategies that update in the worker."""

    grad_norm: float | None = None
    """2-norm of the gradient of the update made last, before it was clipped; None: not known."""

    def __init__(self, flat: FlatModel, job: Job, total_steps: int) -> None:
        self._flat, self._job, self._total = flat, job, total_steps
        vectors = flat.params, flat.grads, flat.layout
        self._optimizer = optimizer_of(job.optimizer, *vectors, job.ema)
        self.bounds = (0, flat.size)  #: the run of the flat vector that it updates

    def state(self) -> dict[str, Tensor]:
        """Give what it can hand over to another rank: all of `memory`; not a copy."""
        return self.memory()

    def memory(self) -> dict[str, Tensor]:
        """Give what the optimizer remembers of its run, see `FlatOptimizer.state`."""
        return self._optimizer.state()

    def average(self) -> Tensor:
        """Give the average of the whole flat vector; every rank calls this. Not a copy."""
        return self._optimizer.average

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state` of an equal optimizer gave; copied."""
        self._optimizer.load(state)

    @property
    def state_bytes(self) -> int:
        """Memory that the optimizer's state takes."""
        return self._optimizer.state_bytes

    def step(self, step: int, present: Presence = None, scale: float = 1.0) -> None:
        """
        Clip as the job says and update; `flat.grads` holds the gradient of the global batch.

        Args:
            step: the step's number, from 0.
            present: which parameters have a gradient, see `Presence`.
            scale: what the gradient is to be multiplied by, before it is clipped.
        """
        if self._job.clip_norm is not None:
            self.grad_norm = self._norm() * scale
            scale *= clip_factor(self.grad_norm, self._job.clip_norm)
        scale_in_place(self._updated_gradients(), scale)
        self._update(step, present)

    def _updated_gradients(self) -> list[Tensor]:
        """Give what of the gradient this rank updates by, each segment in its own type."""
        return self._flat.typed(self._flat.grads)

    def _update(self, step: int, present: Presence) -> None:
        """Make the update of a gradient that is clipped."""
        self._optimizer.step(rate_of(self._job, step, self._total), present)

    def _norm(self) -> float:
        """Give the 2-norm of the gradient of the whole model, before it is scaled."""
        return math.sqrt(squared_norm_of(self._flat.grads, self._flat.layout.segments))


def sync_plateau(
    plateau: Plateau,
    version: int,
    group: Collective | None,
    server_settings: Sequence[float],
    device: torch.device,
) -> None:
    """
    Have what the others have, and the servers; every rank calls this when an attempt begins.

    Args:
        plateau: this rank's.
        version: with which the attempt begins.
        group: all ranks; None: there is one.
        server_settings: what servers know of the rates; empty: nothing.
        device: of the model.

    Raises:
        StateLost: who knew the rates of this version is gone.
    """
    known = [] if plateau.known is None else [plateau.known]
    if server_settings:
        known.append(PlateauState.of(server_settings))
    if group is not None and group.world > 1:
        every = gather_values(known, group, device)
        known = [PlateauState.of(one) for some in every for one in some]
    if not plateau.sync(version, known):
        raise StateLost("what evaluations made of the learning rate")


def check_groups(rule: Optimizer, model: nn.Module, extra: Mapping[str, Tensor]) -> None:
    """
    See that each pattern of the groups has parameters, and each optimizer those that it takes.

    Args:
        rule: the job's optimizer.
        model: the whole one.
        extra: trained parameters outside of it, by name.

    Raises:
        SpecError: names the groups.
    """
    if not rule.groups and not rule.whole:
        return
    named = dict(dense_parameters(model))
    first = {id(parameter): name for name, parameter in named.items()}
    again = model.named_parameters(remove_duplicate=False)
    others = {name: first[id(p)] for name, p in again if id(p) in first and name not in named}
    tables = {path: (path, f"{path}.table", f"{path}.weight") for path in tables_of(model)}
    problems = match_problems(rule, [*named, *extra], tables, others)
    every = {**named, **extra}.items()
    shapes = {name: p.shape for name, p in every if p.requires_grad and p.numel()}
    if problems := problems or shape_problems(rule, shapes):
        raise SpecError(*problems)
