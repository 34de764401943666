"""
The optimizer that a task makes itself: any rule, over whole parameters, alike on every rank.

A job's own optimizers act element by element, so they update runs of the flat vector. Here torch's
class has the parameters themselves, which are views of it, and gradients that are views of the
other. Its memory is whatever the class keeps: it goes to checkpoints and to replaced workers as
tensors and JSON.
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


class MadeOptimizer:
    """
    An optimizer that a task has made, and how it was then.

    Args:
        optimizer: fresh.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self._packs = type(optimizer).state_dict is not torch.optim.Optimizer.state_dict
        """Whether the class says itself what its state is."""
        self._dict = deepcopy(optimizer.state_dict()) if self._packs else {}
        self._groups = [deepcopy(_plain(group)) for group in optimizer.param_groups]

    def state_by_name(self, names: Mapping[int, str]) -> dict[str, Any]:
        """
        Give its state.

        Args:
            names: by id, of the parameters; they stand in their place.
        """
        optimizer, params = self.optimizer, self._params(names)
        if self._packs:
            return {"params": params, "own": optimizer.state_dict()}
        state = {names[id(p)]: dict(s) for p, s in optimizer.state.items() if isinstance(p, Tensor)}
        others = {k: s for k, s in optimizer.state.items() if not isinstance(k, Tensor)}
        changed = [
            {k: v for k, v in _plain(now).items() if k not in old or not _same(v, old[k])}
            for now, old in zip(optimizer.param_groups, self._groups, strict=True)
        ]
        return {"params": params, "state": state, "others": others, "groups": changed}

    def put(self, state_by_name: Mapping[str, Any] | None, names: Mapping[int, str]) -> None:
        """
        Have it as `state_by_name` says; None: as it was made.

        Raises:
            SpecError: that one has the parameters in other groups.
        """
        optimizer, params = self.optimizer, self._params(names)
        if state_by_name is not None and state_by_name["params"] != params:
            raise _other_groups("other parameters in its groups")
        if self._packs:
            optimizer.load_state_dict(
                deepcopy(self._dict) if state_by_name is None else state_by_name["own"]
            )
            return
        changed = [{}] * len(params) if state_by_name is None else state_by_name["groups"]
        for group, old, new in zip(optimizer.param_groups, self._groups, changed, strict=True):
            group.update(deepcopy(old) | new)
        optimizer.state.clear()
        if state_by_name is not None:
            by_name = {names[id(p)]: p for group in optimizer.param_groups for p in group["params"]}
            optimizer.state.update(
                {by_name[name]: kept for name, kept in state_by_name["state"].items()}
            )
            optimizer.state.update(state_by_name["others"])

    def _params(self, names: Mapping[int, str]) -> list[list[str]]:
        groups = self.optimizer.param_groups
        return [[names[id(p)] for p in group["params"]] for group in groups]


MadeOptimizers = Sequence[MadeOptimizer]
"""What a task's `optimizer` gave: one, or several that share the parameters out."""


def make_optimizers(job: Job, task: Task, flat: FlatModel) -> tuple[MadeOptimizers, Job]:
    """
    Ask a task for its optimizer.

    Args:
        job: the run; has `optimizer: {name: task}`.
        task: the user's.
        flat: its model.

    Returns:
        What it gave; and the job with the rates of its param groups.

    Raises:
        ValueError: it is none that could be used; says what is wrong.
    """
    seed_all(job.seed)
    named = [*dense_parameters(flat.model), *flat.extra.items()]
    returned = method_of(task, "optimizer")(named)
    given = [*returned] if isinstance(returned, list | tuple) else [returned]
    where = f"{method_location(task, 'optimizer')}optimizer()"
    if not given or not all(isinstance(one, torch.optim.Optimizer) for one in given):
        kinds = ", ".join(type(one).__name__ for one in given) or "nothing"
        wanted = "must return a torch.optim.Optimizer, or a list of them"
        raise ValueError(f"{where} {wanted}; got {kinds}{no_return(returned)}")
    for one in given:
        _check_step(one, where)
    optimizers = [MadeOptimizer(one) for one in given]
    _check_parameters(optimizers, flat, where)
    rates = [_rate(group, where) for group in _groups(optimizers)]
    own = TaskOptimizer(name="task").model_copy(update={"lr": rates[0], "of_groups": (*rates,)})
    return optimizers, job.model_copy(update={"optimizer": own})


def optimizers_digest(made: MadeOptimizers, flat: FlatModel) -> str:
    """Fingerprint classes, groups and arguments: equal on all ranks that train alike."""
    names, simple = _names(flat), (bool, int, float, str, tuple)
    facts = [
        (
            type(one.optimizer).__name__,
            [names[id(p)] for p in group["params"]],
            {k: v for k, v in group.items() if isinstance(v, simple)},
        )
        for one in made
        for group in one.optimizer.param_groups
    ]
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


class TaskUpdate(LocalOptimizer):
    """
    A task's own optimizers over a worker's parameters.

    Args:
        flat: the model.
        job: its schedule, clipping and average.
        total_steps: of the run.
        made: see `make_optimizers`.
    """

    def __init__(self, flat: FlatModel, job: Job, total_steps: int, made: MadeOptimizers) -> None:
        self._flat, self._job, self._total, self._made = flat, job, total_steps, made
        self.bounds = (0, flat.size)
        self._gradients = [slot.view(flat.grads) for slot in flat.slots]
        self._at_first = np.arange(len(flat.slots)) < len(flat.trained_slots)
        self._average = None
        if job.ema is not None:
            self._average = AveragedVector(job.ema, flat.params, flat.layout)
        self._looked = False

    def memory(self) -> dict[str, Tensor]:
        """
        Give what they remember: `TREE`, JSON in bytes, and the tensors that it counts.

        Raises:
            SpecError: it holds something that is neither tensor nor number.
        """
        names = _names(self._flat)
        average = {} if self._average is None else self._average.state()
        states = [one.state_by_name(names) for one in self._made]
        tree, tensors = pack({"optimizers": states, "average": average}, "optimizer()")
        text = json.dumps({"tree": tree, "devices": [one.device.type for one in tensors]})
        head = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
        return {TREE: head, **{f"{TREE}/{n}": one for n, one in enumerate(tensors)}}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """
        Take over what `memory` of equal ones gave; copied. Nothing: as if they were new.

        Raises:
            SpecError: it is of optimizers that have the parameters in other groups.
        """
        states: list[Any] = [None] * len(self._made)
        average: Mapping[str, Tensor] = {}
        if TREE in state:
            head = json.loads(state[TREE].cpu().numpy().tobytes())
            device = self._flat.params.device
            tensors = [
                state[f"{TREE}/{n}"].to("cpu" if at == "cpu" else device, copy=True)
                for n, at in enumerate(head["devices"])
            ]
            tree = unpack(head["tree"], tensors)
            states, average = tree["optimizers"], tree["average"]
        if len(states) != len(self._made):
            raise _other_groups(f"{len(states)} optimizers, the task makes {len(self._made)}")
        for one, what in zip(self._made, states, strict=True):
            one.put(what, _names(self._flat))
        if self._average is not None:
            self._average.load(average)

    @override
    def average(self) -> Tensor:
        return self._flat.params if self._average is None else self._average.values

    @property
    def state_bytes(self) -> int:
        """Memory that their state takes."""
        average = 0 if self._average is None else self._average.state_bytes
        states = [state for one in self._made for state in one.optimizer.state.values()]
        kept = chain.from_iterable(one.values() for one in states if isinstance(one, Mapping))
        return average + sum(value.nbytes for value in kept if isinstance(value, Tensor))

    def _update(self, step: int, present: Presence) -> None:
        """Let each optimizer step, with random numbers that are the same on every rank."""
        flat, rates = self._flat, iter(rate_of(self._job, step, self._total))
        updated = self._at_first if present is None else np.asarray(present, np.bool_)
        before = [parameter.grad for parameter in flat.parameters]
        for parameter, has, gradient in zip(flat.parameters, updated, self._gradients, strict=True):
            parameter.grad = gradient if has else None
        seed_quickly(update_seed(self._job.seed, step))
        for group in _groups(self._made):
            group["lr"] = next(rates)
        for one in self._made:
            one.optimizer.step()
        for parameter, own in zip(flat.parameters, before, strict=True):
            parameter.grad = own
        if self._average is not None and updated.any():
            self._average.update(tail=bool((updated & ~self._at_first).any()))
        if not self._looked:  # what no checkpoint could keep is told now, not hours later
            self._looked = True
            self.memory()


def _groups(made: MadeOptimizers) -> Iterable[dict[str, Any]]:
    return chain.from_iterable(one.optimizer.param_groups for one in made)


def _names(flat: FlatModel) -> dict[int, str]:
    named = [*dense_parameters(flat.model), *flat.extra.items()]
    return {id(parameter): name for name, parameter in named}


def _plain(group: Mapping[str, Any]) -> dict[str, Any]:
    """Give the arguments of a param group; its rate is the schedule's."""
    return {k: v for k, v in group.items() if k not in ("params", "lr", "initial_lr")}


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and bool(torch.equal(one, other))
    try:
        return type(one) is type(other) and bool(one == other)
    except (ValueError, RuntimeError):  # of several elements
        return False


def _other_groups(what: str) -> SpecError:
    text = f"the checkpoint's optimizer has {what}"
    hint = "make it as it was, or start without --resume"
    return SpecError(Problem(("optimizer",), text, hint))


def _check_step(made: torch.optim.Optimizer, where: str) -> None:
    """See that a step needs no closure: gradients are there, and come from all workers."""
    needed = [
        one.name
        for one in list(inspect.signature(type(made).step).parameters.values())[1:]
        if one.default is one.empty and one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)
    ]
    if needed:
        text = f"gave a {type(made).__name__}, whose step() needs {', '.join(needed)}"
        raise ValueError(f"{where} {text}: gradients are those of all workers, made once in a step")


def _check_parameters(made: MadeOptimizers, flat: FlatModel, where: str) -> None:
    """See that every trainable parameter is in one group, and nothing else."""
    names = _names(flat)
    parameters = [p for group in _groups(made) for p in group["params"]]
    if any(id(p) not in names for p in parameters):
        text = "has a tensor that is none of `named_parameters`"
        raise ValueError(f"{where} {text}: give the optimizer those that it got")
    twice = next(
        (p for n, p in enumerate(parameters) if any(p is one for one in parameters[:n])), None
    )
    if twice is not None:
        raise ValueError(f"{where} has {names[id(twice)]!r} in two optimizers")
    here = {id(p) for p in parameters}
    for slot, parameter in zip(flat.trained_slots, flat.parameters, strict=False):
        if id(parameter) not in here:
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
