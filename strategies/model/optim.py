"""The job's optimizer over a flat vector: torch's optimizer classes plus schedule and clipping."""

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
"""Classes with a fused CPU kernel: one pass over memory instead of several."""

FUSED_TYPES = {"float32", "float64"}
"""Dtypes that the fused CPU kernel updates: torch 2.13's leaves 16-bit parameters unchanged."""


@dataclass
class _Range:
    """Adjacent pieces with the same update; torch's optimizer sees them as one parameter."""

    pieces: slice
    """Indices in the list of pieces."""
    start: int
    """First element of the vector."""
    stop: int
    dtype: str
    group: int
    """Number of the parameter group."""
    used: bool
    """Whether torch's optimizer has state for the range."""
    parameter: nn.Parameter = field(init=False)
    """View of the vector; its `.grad` is a view of the gradient."""
    optimizer: torch.optim.Optimizer = field(init=False)
    """Optimizer that holds the parameter."""

    @property
    def state(self) -> dict[str, Any]:
        """Torch's optimizer state of the parameter."""
        state: dict[str, Any] = self.optimizer.state.get(self.parameter, {})
        return state

    def view(self, vector: Tensor) -> Tensor:
        """Return the range's elements of a vector, in the range's dtype."""
        return typed(vector, self.start, self.stop, self.dtype)


class FlatOptimizer(VectorOptimizer):
    """
    A torch optimizer over a range of the flat vector, equivalent to separate parameters.

    A parameter without a gradient is skipped: no weight decay, no update, no step count. The others
    are updated in as few operations as possible. Adjacent parameters form one range if they have
    the same dtype, parameter group and history of gradients:

        pieces      0.weight | 0.bias | 1.weight | 2.weight
        gradient      yes       yes       no         yes
        ranges      [               ]            [        ]

    If all parameters have a gradient in each step and there are no groups, each segment of the
    vector is one range. Ranges depend only on the layout, on `present` and on the optimizer state.

    The state has torch's names. A vector, such as `exp_avg`, has the layout of the parameters, and
    torch updates views of it. A scalar, such as `step`, is stored for each piece, and is copied
    from torch before each use.

    Args:
        spec: name and arguments.
        vector: shape [n]; updated in place.
        gradient: shape [n].
        layout: of the vector; None: a single parameter.
        ema: options of the moving average of the vector; None: no average.
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
        keys = [(fused, used) for fused in (True, False) for used in (True, False)]
        # A fused kernel needs state for all of its parameters or for none; hence two of each.
        self._optimizers = {(f, u): _torch_optimizer(spec, fused=f) for f, u in keys}
        self._used = np.zeros(len(self._pieces), np.bool_)  #: pieces for which torch has state
        self._vectors: dict[str, Tensor] = {}
        self._scalars: dict[str, Tensor] = {}  #: by piece
        self._ranges: list[_Range] | None = None  #: for `_present`; None: must be recomputed
        self._present: NDArray[np.bool_] | None = None  #: by piece; None: all

    @override
    def step(
        self, rates: Sequence[float], present: Presence = None, *, applied: bool = True
    ) -> None:
        ranges = self._update_ranges(present)
        with torch.no_grad():
            for optimizer in self._optimizers.values():
                for group, rate in zip(optimizer.param_groups, rates, strict=True):
                    group["lr"] = rate
                if any(group["params"] for group in optimizer.param_groups):
                    inspect.unwrap(type(optimizer).step)(optimizer)
            if self._average is not None and applied:
                self._average.update(tail=any(part.start >= self._layout.tail for part in ranges))
        if not all(part.used for part in ranges):
            self._save_new_states(ranges)

    @override
    def state(self) -> dict[str, Tensor]:
        """Return the state by torch's names (see `PER_PARAMETER`); vectors are not copied."""
        average = self._average_state()
        if not self._used.any() and not average:
            return {}
        self._read_scalars()
        count = self._layout.parameters
        state = dict(self._vectors)
        used = torch.zeros(count, dtype=torch.bool)
        indices = torch.from_numpy(self._slots)
        used[indices] = torch.from_numpy(self._used)
        for name, values in self._scalars.items():
            scalars = torch.zeros(count, dtype=values.dtype)
            scalars[indices] = values.cpu()
            state[PER_PARAMETER + name] = scalars
        return {**state, **average, USED: used}

    @override
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Load a copy of the `state` of an equal optimizer; an empty one resets the optimizer."""
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
        Set arguments of parameter groups.

        Args:
            names: argument names of each group, from group 1; `beta1` is the first of `betas`.
            values: of all arguments, concatenated.

        Returns:
            Learning rates, as `step` takes them.
        """
        rates, remaining = [0.0], iter(values.tolist())
        for number, group_names in enumerate(names, 1):
            arguments = dict(zip(group_names, remaining, strict=False))
            rates.append(arguments.pop("lr"))
            if "beta1" in arguments:
                arguments["betas"] = arguments.pop("beta1"), arguments.pop("beta2")
            for optimizer in self._optimizers.values():
                optimizer.param_groups[number].update(arguments)
        return tuple(rates)

    @override
    def use(self, gradient: Tensor) -> None:
        self.gradient = gradient
        for part in self._ranges or ():
            part.parameter.grad = part.view(gradient)

    @override
    def _state_tensors(self) -> Iterable[Tensor]:
        return [*self._vectors.values(), *self._scalars.values()]

    def _update_ranges(self, present: Presence) -> list[_Range]:
        """Return the ranges to update, after adding them to torch's optimizers."""
        updated: NDArray[np.bool_] | None = self._trained_from_start
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
        for part in self._ranges:
            self._add_to_torch(part)
        return self._ranges

    def _find_ranges(self, present: NDArray[np.bool_] | None) -> list[_Range]:
        """Merge adjacent pieces that have the same update."""
        count = len(self._pieces)
        if not count:
            return []
        keys = [self._segment_of, self._group_of, self._used]
        keys += [] if present is None else [present]
        keys += [values.cpu().numpy() for values in self._scalars.values()]
        changes = np.logical_or.reduce([key[1:] != key[:-1] for key in keys])
        bounds = [0, *(np.flatnonzero(changes) + 1).tolist(), count]
        return [
            self._build_range(slice(first, stop))
            for first, stop in pairwise(bounds)
            if present is None or present[first]
        ]

    def _build_range(self, pieces: slice) -> _Range:
        """Build a range; it includes the padding up to the next piece or the segment's end."""
        segment = self._layout.segments[int(self._segment_of[pieces.start])]
        start, stop = self._pieces[pieces.start].start, segment.stop
        if pieces.stop < len(self._pieces):
            stop = min(stop, self._pieces[pieces.stop].start)
        group, used = int(self._group_of[pieces.start]), bool(self._used[pieces.start])
        return _Range(pieces, start, stop, segment.dtype, group, used)

    def _add_to_torch(self, part: _Range) -> None:
        """Add a range as a parameter to the torch optimizer for its dtype."""
        fused = part.dtype in FUSED_TYPES or self._vector.device.type != "cpu"
        part.optimizer = self._optimizers[fused, part.used]
        part.parameter = nn.Parameter(part.view(self._vector))
        part.parameter.grad = part.view(self.gradient)
        part.optimizer.param_groups[part.group]["params"].append(part.parameter)
        if part.used:
            device = self._vector.device if part.optimizer.defaults.get("fused") else None
            part.optimizer.state[part.parameter] = {
                **{name: part.view(vector) for name, vector in self._vectors.items()},
                **{n: v[part.pieces.start].clone().to(device) for n, v in self._scalars.items()},
            }

    def _save_new_states(self, ranges: Sequence[_Range]) -> None:
        """Copy state that torch created in this step; ranges are recomputed for the next one."""
        for part in ranges:
            if part.used:
                continue
            for name, value in part.state.items():
                if value is None:
                    continue
                if not value.ndim:
                    self._save_scalar(name, part, value)
                else:
                    if name not in self._vectors:
                        self._vectors[name] = torch.zeros_like(self._vector)
                    part.view(self._vectors[name]).copy_(value)
                self._used[part.pieces] = True
        if self._used.any():
            self._read_scalars()
            self._ranges = None

    def _save_scalar(self, name: str, part: _Range, value: Tensor) -> None:
        if name not in self._scalars:
            count = len(self._pieces)
            self._scalars[name] = torch.zeros(count, dtype=value.dtype, device=value.device)
        self._scalars[name][part.pieces] = value

    def _read_scalars(self) -> None:
        """Copy the scalars that torch has updated since the last call."""
        for part in self._ranges or ():
            for name, value in part.state.items() if part.used else ():
                if name in self._scalars:
                    self._save_scalar(name, part, value)


def _equal(first: NDArray[np.bool_] | None, second: NDArray[np.bool_] | None) -> bool:
    if first is None or second is None:
        return first is second
    return bool((first == second).all())


def _torch_optimizer(spec: Optimizer, *, fused: bool) -> torch.optim.Optimizer:
    """Build a torch optimizer with all parameter groups and no parameters."""
    cls = getattr(torch.optim, spec.name)
    fused_argument = {"fused": True} if fused and spec.name in FUSED else {}
    groups = [
        {"params": [nn.Parameter(torch.zeros(1))], **variant.arguments()}
        for variant in spec.variants()
    ]
    optimizer: torch.optim.Optimizer = cls(groups, **spec.arguments(), **fused_argument)
    _forget_parameters(optimizer)
    return optimizer


def _forget_parameters(optimizer: torch.optim.Optimizer) -> None:
    for group in optimizer.param_groups:
        group["params"] = []
    optimizer.state.clear()


def optimizer_of(
    spec: Optimizer, vector: Tensor, gradient: Tensor, layout: Layout | None, ema: EMA | None
) -> VectorOptimizer:
    """Build the optimizer of a range of the flat vector; see its class for the arguments."""
    cls: type[TensorOptimizer | FlatOptimizer]
    cls = TensorOptimizer if spec.whole else FlatOptimizer
    return cls(spec, vector, gradient, layout, ema)


def rate_of(job: Job, step: int, total_steps: int) -> tuple[float, ...]:
    """Return the learning rates of a step: of ungrouped parameters, then of each group."""
    schedule = job.lr_schedule
    return tuple(schedule.rate(base, step, total_steps) for base in job.optimizer.rates())


def rate_figures(job: Job, step: int, total_steps: int) -> dict[str, float]:
    """Return the learning rates of a step by the names of docs/metrics.md."""
    named = zip(job.optimizer.figures(), rate_of(job, step, total_steps), strict=True)
    return {name: rate for name, rate in named if name}


def norm_figures(norm: float | None) -> dict[str, float]:
    """Return the gradient norm by the name of docs/metrics.md; None: not computed."""
    return {} if norm is None else {"grad_norm": norm}


class LocalOptimizer:
    """Optimizer over a worker's own parameters, for strategies that update in the worker."""

    grad_norm: float | None = None
    """2-norm of the last update's gradient before clipping; None: not computed."""

    def __init__(self, flat: FlatModel, job: Job, total_steps: int) -> None:
        self._flat, self._job, self._total = flat, job, total_steps
        vectors = flat.params, flat.grads, flat.layout
        self._optimizer = optimizer_of(job.optimizer, *vectors, job.ema)
        self.bounds = (0, flat.size)  #: updated range of the flat vector

    def state(self) -> dict[str, Tensor]:
        """Return the state that another rank can load: all of `memory`, not copied."""
        return self.memory()

    def memory(self) -> dict[str, Tensor]:
        """Return the optimizer state of this rank's range, see `FlatOptimizer.state`."""
        return self._optimizer.state()

    def average(self) -> Tensor:
        """Return the average of the whole flat vector, not copied; every rank calls this."""
        return self._optimizer.average

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Load a copy of the `state` of an equal optimizer."""
        self._optimizer.load(state)

    @property
    def state_bytes(self) -> int:
        """Size of the optimizer's state in bytes."""
        return self._optimizer.state_bytes

    def step(self, step: int, present: Presence = None, scale: float = 1.0) -> None:
        """
        Clip by the job's `clip_norm` and update; `flat.grads` holds the global batch's gradient.

        Args:
            step: number of the step, from 0.
            present: which parameters have a gradient, see `Presence`.
            scale: factor of the gradient, applied before clipping.
        """
        if self._job.clip_norm is not None:
            self.grad_norm = self._norm() * scale
            scale *= clip_factor(self.grad_norm, self._job.clip_norm)
        scale_in_place(self._updated_gradients(), scale)
        self._update(step, present)

    def _updated_gradients(self) -> list[Tensor]:
        """Return the part of the gradient that this rank applies, each segment in its own dtype."""
        return self._flat.typed(self._flat.grads)

    def _update(self, step: int, present: Presence) -> None:
        """Apply the clipped gradient."""
        self._optimizer.step(rate_of(self._job, step, self._total), present)

    def _norm(self) -> float:
        """Return the 2-norm of the whole model's gradient, before scaling."""
        return math.sqrt(squared_norm_of(self._flat.grads, self._flat.layout.segments))


def sync_plateau(
    plateau: Plateau,
    version: int,
    group: Collective | None,
    server_settings: Sequence[float],
    device: torch.device,
) -> None:
    """
    Synchronize the plateau schedule with other ranks and servers, at the start of an attempt.

    Every rank calls this.

    Args:
        plateau: of this rank.
        version: first version of the attempt.
        group: all ranks; None: a single rank.
        server_settings: state of the schedule on servers; empty: none.
        device: of the model.

    Raises:
        StateLost: no rank and no server has the schedule's state of this version.
    """
    states = [] if plateau.known is None else [plateau.known]
    if server_settings:
        states.append(PlateauState.of(server_settings))
    if group is not None and group.world > 1:
        gathered = gather_values(states, group, device)
        states = [PlateauState.of(values) for rank_values in gathered for values in rank_values]
    if not plateau.sync(version, states):
        raise StateLost("what evaluations made of the learning rate")


def check_groups(rule: Optimizer, model: nn.Module, extra: Mapping[str, Tensor]) -> None:
    """
    Check that each group pattern matches parameters that the group's optimizer can update.

    Args:
        rule: the job's optimizer.
        model: the whole model.
        extra: trained parameters outside the model, by name.

    Raises:
        SpecError: a pattern matches nothing, or unsuitable shapes; names the groups.
    """
    if not rule.groups and not rule.whole:
        return
    named = dict(dense_parameters(model))
    names = {id(parameter): name for name, parameter in named.items()}
    uses = model.named_parameters(remove_duplicate=False)
    aliases = {name: names[id(p)] for name, p in uses if id(p) in names and name not in named}
    tables = {path: (path, f"{path}.table", f"{path}.weight") for path in tables_of(model)}
    problems = match_problems(rule, [*named, *extra], tables, aliases)
    parameters = {**named, **extra}.items()
    shapes = {name: p.shape for name, p in parameters if p.requires_grad and p.numel()}
    if problems := problems or shape_problems(rule, shapes):
        raise SpecError(*problems)
