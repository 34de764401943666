"""
The optimizers that a task builds itself: any update rule over whole parameters, on every rank.

The optimizers of a job file act element by element, so they update ranges of the flat vector. A
task's optimizer holds the model's parameters, which are views of the vector, and gradients that are
views of `flat.grads`. Its state is saved in checkpoints and sent to replaced workers as tensors and
JSON.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from itertools import chain
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from distplat.platform.errors import Problem, SpecError
from distplat.platform.optimizers import TaskOptimizer
from distplat.platform.spec import Job
from distplat.strategies.algorithms.seeds import update_seed
from distplat.strategies.loop.checks import method_location, no_return
from distplat.strategies.loop.seeding import seed_all, seed_quickly
from distplat.strategies.model.ema import AveragedVector
from distplat.strategies.model.flat import FlatModel
from distplat.strategies.model.optim import LocalOptimizer, rate_of
from distplat.strategies.model.optimizer_state import TREE, Presence
from distplat.strategies.sparse.modules import dense_parameters
from distplat.strategies.state_tree import pack, unpack
from distplat.strategies.task import Task, method_of


class ResettableOptimizer:
    """
    A task's optimizer that can be reset to its initial state.

    Args:
        optimizer: without any update.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self._custom_state = type(optimizer).state_dict is not torch.optim.Optimizer.state_dict
        """Whether the class overrides `state_dict`."""
        self._initial_state = deepcopy(optimizer.state_dict()) if self._custom_state else {}
        self._groups = [deepcopy(_arguments(group)) for group in optimizer.param_groups]

    def state_by_name(self, names: Mapping[int, str]) -> dict[str, Any]:
        """
        Return the optimizer's state, with names in place of parameters.

        Args:
            names: of the parameters, by id.
        """
        optimizer, params = self.optimizer, self._params(names)
        if self._custom_state:
            return {"params": params, "own": optimizer.state_dict()}
        state = {names[id(p)]: dict(s) for p, s in optimizer.state.items() if isinstance(p, Tensor)}
        others = {k: s for k, s in optimizer.state.items() if not isinstance(k, Tensor)}
        changed = [
            {k: v for k, v in _arguments(new).items() if k not in old or not _equal(v, old[k])}
            for new, old in zip(optimizer.param_groups, self._groups, strict=True)
        ]
        return {"params": params, "state": state, "others": others, "groups": changed}

    def load(self, state_by_name: Mapping[str, Any] | None, names: Mapping[int, str]) -> None:
        """
        Load what `state_by_name` returned; None: reset to the initial state.

        Raises:
            SpecError: the state has the parameters in other groups.
        """
        optimizer, params = self.optimizer, self._params(names)
        if state_by_name is not None and state_by_name["params"] != params:
            raise _other_groups_error("other parameters in its groups")
        if self._custom_state:
            optimizer.load_state_dict(
                deepcopy(self._initial_state) if state_by_name is None else state_by_name["own"]
            )
            return
        changed = [{}] * len(params) if state_by_name is None else state_by_name["groups"]
        for group, old, new in zip(optimizer.param_groups, self._groups, changed, strict=True):
            group.update(deepcopy(old) | new)
        optimizer.state.clear()
        if state_by_name is not None:
            by_name = {names[id(p)]: p for group in optimizer.param_groups for p in group["params"]}
            optimizer.state.update(
                {by_name[name]: state for name, state in state_by_name["state"].items()}
            )
            optimizer.state.update(state_by_name["others"])

    def _params(self, names: Mapping[int, str]) -> list[list[str]]:
        groups = self.optimizer.param_groups
        return [[names[id(p)] for p in group["params"]] for group in groups]


ResettableOptimizers = Sequence[ResettableOptimizer]
"""The optimizers that a task's `optimizer` returned; each parameter belongs to one of them."""


def build_optimizers(job: Job, task: Task, flat: FlatModel) -> tuple[ResettableOptimizers, Job]:
    """
    Build the optimizers of a task by its `optimizer` method.

    Args:
        job: has `optimizer: {name: task}`.
        task: of the user.
        flat: the task's model.

    Returns:
        The optimizers; and the job with the learning rates of their param groups.

    Raises:
        ValueError: the method returned something unusable; the message names it.
    """
    seed_all(job.seed)
    named = [*dense_parameters(flat.model), *flat.extra.items()]
    returned = method_of(task, "optimizer")(named)
    optimizers = [*returned] if isinstance(returned, list | tuple) else [returned]
    where = f"{method_location(task, 'optimizer')}optimizer()"
    if not optimizers or not all(isinstance(opt, torch.optim.Optimizer) for opt in optimizers):
        types = ", ".join(type(opt).__name__ for opt in optimizers) or "nothing"
        allowed = "must return a torch.optim.Optimizer, or a list of them"
        raise ValueError(f"{where} {allowed}; got {types}{no_return(returned)}")
    for optimizer in optimizers:
        _check_step(optimizer, where)
    resettable = [ResettableOptimizer(optimizer) for optimizer in optimizers]
    _check_parameters(resettable, flat, where)
    rates = [_rate(group, where) for group in _groups(resettable)]
    spec = TaskOptimizer(name="task").model_copy(update={"lr": rates[0], "of_groups": (*rates,)})
    return resettable, job.model_copy(update={"optimizer": spec})


def optimizers_digest(made: ResettableOptimizers, flat: FlatModel) -> str:
    """Return a hash of classes, groups and arguments, to compare between ranks."""
    names, simple = _names(flat), (bool, int, float, str, tuple)
    facts = [
        (
            type(resettable.optimizer).__name__,
            [names[id(p)] for p in group["params"]],
            {k: v for k, v in group.items() if isinstance(v, simple)},
        )
        for resettable in made
        for group in resettable.optimizer.param_groups
    ]
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


class TaskUpdate(LocalOptimizer):
    """
    A task's own optimizers over a worker's parameters.

    Args:
        flat: the model.
        job: its schedule, clipping and average apply.
        total_steps: of the run.
        made: optimizers of `build_optimizers`.
    """

    def __init__(
        self, flat: FlatModel, job: Job, total_steps: int, made: ResettableOptimizers
    ) -> None:
        self._flat, self._job, self._total, self._made = flat, job, total_steps, made
        self.bounds = (0, flat.size)
        self._gradients = [slot.view(flat.grads) for slot in flat.slots]
        self._trained_from_start = np.arange(len(flat.slots)) < len(flat.trained_slots)
        self._average = None
        if job.ema is not None:
            self._average = AveragedVector(job.ema, flat.params, flat.layout)
        self._checked_state = False

    @override
    def memory(self) -> dict[str, Tensor]:
        """
        Return the optimizers' state: JSON bytes under `TREE`, and the tensors that it refers to.

        Raises:
            SpecError: the state contains a value that is neither tensor nor number.
        """
        names = _names(self._flat)
        average = {} if self._average is None else self._average.state()
        states = [resettable.state_by_name(names) for resettable in self._made]
        tree, tensors = pack({"optimizers": states, "average": average}, "optimizer()")
        text = json.dumps({"tree": tree, "devices": [tensor.device.type for tensor in tensors]})
        head = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
        return {TREE: head, **{f"{TREE}/{n}": tensor for n, tensor in enumerate(tensors)}}

    @override
    def load(self, state: Mapping[str, Tensor]) -> None:
        """
        Load a copy of the `memory` of equal optimizers; an empty one resets them.

        Raises:
            SpecError: the state belongs to optimizers with other parameter groups.
        """
        states: list[Any] = [None] * len(self._made)
        average: Mapping[str, Tensor] = {}
        if TREE in state:
            head = json.loads(state[TREE].cpu().numpy().tobytes())
            device = self._flat.params.device
            tensors = [
                state[f"{TREE}/{n}"].to("cpu" if saved == "cpu" else device, copy=True)
                for n, saved in enumerate(head["devices"])
            ]
            tree = unpack(head["tree"], tensors)
            states, average = tree["optimizers"], tree["average"]
        if len(states) != len(self._made):
            raise _other_groups_error(f"{len(states)} optimizers, the task makes {len(self._made)}")
        for resettable, optimizer_state in zip(self._made, states, strict=True):
            resettable.load(optimizer_state, _names(self._flat))
        if self._average is not None:
            self._average.load(average)

    @override
    def average(self) -> Tensor:
        return self._flat.params if self._average is None else self._average.values

    @property
    @override
    def state_bytes(self) -> int:
        """Size of the optimizers' state in bytes."""
        average = 0 if self._average is None else self._average.state_bytes
        states = chain.from_iterable(made.optimizer.state.values() for made in self._made)
        values = chain.from_iterable(s.values() for s in states if isinstance(s, Mapping))
        return average + sum(value.nbytes for value in values if isinstance(value, Tensor))

    @override
    def _update(self, step: int, present: Presence) -> None:
        """Run each optimizer's step, with the same random numbers on every rank."""
        flat, rates = self._flat, iter(rate_of(self._job, step, self._total))
        updated = self._trained_from_start if present is None else np.asarray(present, np.bool_)
        before = [parameter.grad for parameter in flat.parameters]
        for parameter, has, gradient in zip(flat.parameters, updated, self._gradients, strict=True):
            parameter.grad = gradient if has else None
        seed_quickly(update_seed(self._job.seed, step))
        for group in _groups(self._made):
            group["lr"] = next(rates)
        for resettable in self._made:
            resettable.optimizer.step()
        for parameter, grad in zip(flat.parameters, before, strict=True):
            parameter.grad = grad
        if self._average is not None:
            self._average.update(tail=bool((updated & ~self._trained_from_start).any()))
        if not self._checked_state:  # report a state that cannot be saved now, not hours later
            self._checked_state = True
            self.memory()


def _groups(made: ResettableOptimizers) -> Iterable[dict[str, Any]]:
    return chain.from_iterable(resettable.optimizer.param_groups for resettable in made)


def _names(flat: FlatModel) -> dict[int, str]:
    named = [*dense_parameters(flat.model), *flat.extra.items()]
    return {id(parameter): name for name, parameter in named}


def _arguments(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a param group without its learning rate, which the schedule sets."""
    return {k: v for k, v in group.items() if k not in ("params", "lr", "initial_lr")}


def _equal(first: Any, second: Any) -> bool:
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return first.shape == second.shape and bool(torch.equal(first, second))
    try:
        return type(first) is type(second) and bool(first == second)
    except (ValueError, RuntimeError):  # an array of several elements has no truth value
        return False


def _other_groups_error(what: str) -> SpecError:
    text = f"the checkpoint's optimizer has {what}"
    hint = "make it as it was, or start without --resume"
    return SpecError(Problem(("optimizer",), text, hint))


def _check_step(optimizer: torch.optim.Optimizer, where: str) -> None:
    """Check that step() requires no closure: gradients are computed before it, by all workers."""
    required = [
        p.name
        for p in list(inspect.signature(type(optimizer).step).parameters.values())[1:]
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    if required:
        text = f"gave a {type(optimizer).__name__}, whose step() needs {', '.join(required)}"
        raise ValueError(f"{where} {text}: gradients are those of all workers, made once in a step")


def _check_parameters(made: ResettableOptimizers, flat: FlatModel, where: str) -> None:
    """Check that every trainable parameter is in exactly one group, and nothing else is."""
    names = _names(flat)
    parameters = [p for group in _groups(made) for p in group["params"]]
    if any(id(p) not in names for p in parameters):
        text = "has a tensor that is none of `named_parameters`"
        raise ValueError(f"{where} {text}: give the optimizer those that it got")
    grouped: set[int] = set()
    for parameter in parameters:
        if id(parameter) in grouped:
            raise ValueError(f"{where} has {names[id(parameter)]!r} in two optimizers")
        grouped.add(id(parameter))
    for slot, parameter in zip(flat.trained_slots, flat.parameters, strict=False):
        if id(parameter) not in grouped:
            hint = "give it to one, or freeze it in model() with requires_grad_(False)"
            raise ValueError(f"{where} leaves out {slot.name!r}, which is to be trained: {hint}")


def _rate(group: Mapping[str, Any], where: str) -> float:
    lr = group.get("lr")
    if isinstance(lr, Tensor) and lr.numel() == 1:
        lr = float(lr)
    rate = float(lr) if isinstance(lr, Real) else math.nan
    if not (math.isfinite(rate) and rate >= 0):
        text = f"has a param group whose lr is {lr!r}: the run's schedule sets it in each step"
        raise ValueError(f"{where} {text}, so it must be a number")
    return rate
