"""
Has the servers of `ps-async` make a train function's updates, where its optimizer steps.

    worker     forward, backward | step: push ─▶ ...  ◀─ newest parameters | forward ...
    servers                             optimizer on each shard, with the step's lr and so on

A worker's gradient is its own: it is clipped, scaled and looked at by torch's own functions, and
each push is an update. The user's optimizer stays the object that it is. While it steps its
parameters have no `.grad`, so that it moves nothing; its `state_dict()` is fetched.

Servers make the optimizer anew: its class and some arguments stay (`OptimizerFacts`), numbers may
change with each push.

    SGD(groups: lr, momentum, nesterov)     stays: class SGD, nesterov of each group
                                            with each push: lr, momentum, ... of each group
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import TypeAdapter
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from distplat.platform.errors import Problem, SpecError
from distplat.platform.optimizers import AnyOptimizer
from distplat.platform.shard_map import OwnLoop
from distplat.strategies.function.gradient_average import (
    Exchange,
    SessionContext,
    broadcast_from_rank0,
    check_same_model,
)
from distplat.strategies.function.loop_checks import check_alike, not_prepared, parameters_of
from distplat.strategies.loop.control import NonFiniteSteps, StepControl
from distplat.strategies.model.flat import FlatModel
from distplat.strategies.model.optimizer_state import NUMBERS, PER_PARAMETER, USED
from distplat.strategies.model.sync_batch_norm import refuse_sync_batch_norm
from distplat.strategies.ports import LoopOptimizer, LoopShards, Pushed
from distplat.strategies.torch_compat import not_compiled

_LOOK_S = 0.1
"""How often who is ready asks whether the others are."""

_SAMPLED = 256
"""Elements of each parameter that are compared between two steps."""


class ServerUpdates(Exchange):
    """
    See the top of the file.

    Args:
        context: the run.
        shards: the way to the servers; they are met at the first step.
    """

    together = False

    def __init__(self, context: SessionContext, shards: LoopShards) -> None:
        self._context, self._shards = context, shards
        self._models: list[nn.Module] = []
        self._optimizers: list[Optimizer] = []
        self._trained: dict[int, bool] = {}  #: by parameter: whether it was when it was prepared
        self._hooks: list[RemovableHandle] = []
        self._flat: FlatModel | None = None
        self._policy = NonFiniteSteps.of(context.job)
        self._pushes = self._stale_sum = 0
        self._last = Pushed()

    @property
    @override
    def models(self) -> list[nn.Module]:
        return self._models

    @override
    def add(self, model: nn.Module, *, alone: bool, own_buffers: Set[nn.Module]) -> None:
        self._refuse_later("a model")
        why = "which waits for all ranks: here each goes at its own pace"
        refuse_sync_batch_norm(model, why, "use nn.BatchNorm, or `ring` or `ps-sync`")
        group, named = self._context.group, [*model.named_parameters()]
        facts = repr([(n, p.shape, p.dtype, p.requires_grad) for n, p in named])
        check_same_model(model, facts, group, named[0][1].device)
        sharing = (one for one in model.modules() if one not in own_buffers)
        buffers = (buffer for one in sharing for buffer in one.buffers(recurse=False))
        tensors = [one.data for one in [*model.parameters(), *buffers] if one.numel()]
        broadcast_from_rank0(tensors, group)
        self._models.append(model)
        self._trained |= {id(one): one.requires_grad for one in model.parameters()}

    @override
    def take(self, optimizer: Optimizer) -> None:
        self._refuse_later("an optimizer")
        OptimizerFacts([*self._optimizers, optimizer])
        self._optimizers.append(optimizer)
        self._hooks += [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
            optimizer.register_state_dict_pre_hook(self._fetch_state),
            optimizer.register_state_dict_post_hook(self._forget_state),
            optimizer.register_load_state_dict_post_hook(self._state_loaded),
        ]

    def _refuse_later(self, what: str) -> None:
        if self._flat is not None:
            text = f"prepare() got {what} after the first step, when the servers have all there is"
            hint = "prepare all models and optimizers before the first step"
            raise SpecError(Problem(("task",), text, hint))

    @override
    def check(self, optimizer: Optimizer) -> None:
        if self._flat is not None and self._count() != self._counts:
            text = "an optimizer got parameters after the first step, when the servers have all"
            raise SpecError(Problem(("task",), text, "add them before the first step"))
        if not any(one is optimizer for one in self._optimizers):
            text = f"{type(optimizer).__name__}.step() would move parameters that the servers keep"
            raise SpecError(Problem(("task",), text, "hand the optimizer to prepare(), too"))

    @override
    def enable(self, on: bool, model: nn.Module | None = None) -> None:
        """Gradients are this rank's own in any case."""

    @not_compiled
    def _before_step(
        self, optimizer: Optimizer, args: Any, kwargs: Mapping[str, Any]
    ) -> tuple[Any, Any]:
        """
        Push instead; what torch's own step finds afterwards has no gradient.

        Returns:
            What that step gets: a closure that was called here already.
        """
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is not None:  # those that servers know call it once, before all else
            with torch.enable_grad():
                loss = closure()
            args, kwargs = (optimizer, lambda: loss), {}
        params = parameters_of(optimizer)
        self._taken = [(one, one.grad) for one in params]
        found_inf = getattr(optimizer, "found_inf", None)  # of a GradScaler, for a fused kernel
        if found_inf is None or not float(found_inf):
            scale = getattr(optimizer, "grad_scale", None)
            self._push({id(one) for one in params}, 1.0 if scale is None else 1.0 / float(scale))
        for one in params:
            one.grad = None
        return args, kwargs

    @not_compiled
    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for one, grad in self._taken:
            one.grad = grad
        self._taken = []

    @torch.no_grad()
    def _push(self, mine: set[int], scale: float) -> None:
        """Have the servers make an update of some parameters, and take the newest ones."""
        flat, step = self._connect(), self._context.step()
        self._check_unwritten(flat)
        for optimizer in self._optimizers:
            self._check_state(optimizer)
        settings = self._facts.settings()
        has = [id(one) in mine and one.grad is not None for one in flat.parameters]
        present = np.array(has, np.bool_)
        self._fill(flat, present)
        flat.scale_gradients(scale)
        rank = self._context.group.rank
        local = StepControl(1.0, 1.0, rank=rank, present=present, settings=settings)
        if self._policy.looks:
            local = local.looked_at(flat)
        self._policy.decide(local, step, flat.name)
        self._last = self._shards.push(self._pushes, local)
        self._pushes += 1
        self._stale_sum += self._last.staleness
        self._written.note()
        self._context.done()

    def _fill(self, flat: FlatModel, present: NDArray[np.bool_]) -> None:
        for view, one, has in zip(self._views, flat.parameters, present.tolist(), strict=True):
            if has and one.grad is not None:
                view.copy_(one.grad if one.grad.layout is torch.strided else one.grad.to_dense())
            else:
                view.zero_()

    def _check_unwritten(self, flat: FlatModel) -> None:
        """
        See that nobody but the servers has changed the parameters.

        Raises:
            SpecError: names the first.
        """
        moved = flat.check_layout(self._context.step())
        moved += map(flat.name, self._written.slots())
        if moved:
            text = f"{moved[0]!r} was written to after the first step: the servers keep it"
            hint = f"write, or load, before the first step; or {REMEDY}"
            raise SpecError(Problem(("task",), text, hint))

    def _count(self) -> list[int]:
        return [len(parameters_of(one)) for one in self._optimizers]

    def _connect(self) -> FlatModel:
        """Meet the servers, once; they go on with what rank 0's models and optimizers have."""
        if self._flat is not None:
            return self._flat
        facts = OptimizerFacts(self._optimizers)
        whole = self._models[0] if len(self._models) == 1 else nn.ModuleList(self._models)
        named = {name: facts.group_of(one) for name, one in whole.named_parameters()}
        self._check_all_known(whole)
        grads = [(one, one.grad) for one in whole.parameters()]
        with self._as_prepared(whole):
            self._flat = flat = FlatModel(whole, group_of=lambda name: named[name])
        loop = LoopOptimizer(facts.own_loop, _state_of(flat, self._optimizers))
        self._shards.connect_loop(flat, loop)
        for one, grad in grads:
            one.grad = grad
        for optimizer in self._optimizers:
            optimizer.state = _StateOnServers()
        self._facts, self._written = facts, _Written(flat)
        self._views = [slot.view(flat.grads) for slot in flat.slots]
        self._counts = self._count()
        return flat

    @contextmanager
    def _as_prepared(self, whole: nn.Module) -> Iterator[None]:
        """Have those trained that were when prepared: the loop of a GAN freezes one by turns."""
        every = [(one, one.requires_grad) for one in whole.parameters()]
        for one, now in every:
            one.requires_grad_(self._trained.get(id(one), now))
        try:
            yield
        finally:
            for one, now in every:
                one.requires_grad_(now)

    def _check_all_known(self, whole: nn.Module) -> None:
        known = {id(one) for one in whole.parameters()}
        for optimizer in self._optimizers:
            parameters = parameters_of(optimizer)
            if strange := [p for p in parameters if p.requires_grad and id(p) not in known]:
                raise not_prepared(optimizer, strange)

    def _fetch_state(self, optimizer: Optimizer) -> None:
        """Have the servers' state in the optimizer, for `state_dict()`."""
        if self._flat is None:
            return
        self._check_state(optimizer)
        optimizer.state, state = defaultdict(dict), self._shards.optimizer_state()
        used = state.pop(USED, None)
        parameter_ids = {*map(id, parameters_of(optimizer))}
        for index, (slot, one) in enumerate(
            zip(self._flat.slots, self._flat.parameters, strict=True)
        ):
            if used is None or not used[index] or id(one) not in parameter_ids:
                continue
            for name, values in state.items():
                if name.startswith(PER_PARAMETER):
                    key, value = name.removeprefix(PER_PARAMETER), values[index].clone()
                else:
                    key, value = name, slot.view(values).clone().to(one.device)
                optimizer.state[one][key] = value

    def _forget_state(self, optimizer: Optimizer, state: dict[str, Any]) -> None:
        if self._flat is not None:
            optimizer.state = _StateOnServers()

    def _check_state(self, optimizer: Optimizer) -> None:
        """
        See that nobody has put another state in the place of the servers'.

        Raises:
            SpecError: somebody has.
        """
        if not isinstance(optimizer.state, _StateOnServers):
            raise _of_servers()

    def _state_loaded(self, optimizer: Optimizer) -> None:
        if self._flat is not None:
            text = "an optimizer got a state_dict after the first step: the servers have its state"
            raise SpecError(Problem(("task",), text, f"load before the first step; or {REMEDY}"))

    @override
    def leave(self) -> None:
        if not self._models or not self._optimizers:
            return
        self._connect()
        while self._shards.leave():
            self._context.done()
            time.sleep(_LOOK_S)

    @override
    def settle(self) -> None:
        if self._flat is None:
            for model in self._models:
                check_alike(model, self._context.group, "at the end")
        elif not self._written.slots():  # else the loop has chosen what is its result
            self._shards.refresh()

    @override
    def figures(self) -> dict[str, float]:
        if not self._pushes:
            return {}
        return {
            "staleness": float(self._last.staleness),
            "staleness_mean": self._stale_sum / self._pushes,
            "waiting_s": self._last.waiting_s,
        }

    @override
    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()


class _StateOnServers(defaultdict[Tensor, Any]):
    """
    An optimizer's `state` that nobody may read, copy or reset: it would not be the servers'.

    Raises:
        SpecError: somebody does.
    """

    def __init__(self) -> None:
        super().__init__(dict)

    def _refuse(self, *args: Any, **named: Any) -> Any:
        raise _of_servers()

    def __bool__(self) -> bool:
        """There is one: who finds none, as torch.distributed.checkpoint, steps to have it made."""
        return True

    __contains__ = __iter__ = __len__ = __missing__ = get = items = keys = values = _refuse
    __delitem__ = __setitem__ = clear = pop = popitem = setdefault = update = _refuse
    __copy__ = __reduce_ex__ = copy = _refuse


def _of_servers() -> SpecError:
    text = "optimizer.state was used after the first step: the servers keep it"
    return SpecError(Problem(("task",), text, f"read it by optimizer.state_dict(); {REMEDY}"))


class _Written:
    """
    Tells which parameters somebody else than the servers has written since the last step.

    Servers write into the memory below them, which counts no version. What is written through
    `.data` counts none either: it is found by the values of some elements.

    Args:
        flat: the model.
    """

    def __init__(self, flat: FlatModel) -> None:
        self._flat = flat
        counts = [min(_SAMPLED, one.stop - one.offset) for one in flat.slots]
        ends = zip(flat.slots, counts, strict=True)
        spread = [torch.linspace(s.offset, s.stop - 1, n, dtype=torch.float64) for s, n in ends]
        self._indices = torch.cat(spread).long().to(flat.params.device)
        self._slot_of = np.repeat(np.arange(len(counts)), counts)
        self.note()

    def note(self) -> None:
        """Take the parameters as they are now for those of the servers."""
        self._versions, self._values = self._read()

    def slots(self) -> list[int]:
        """Give the indices of parameters that have changed since."""
        versions, values = self._read()
        pairs = zip(versions, self._versions, strict=True)
        changed = {slot for slot, (now, then) in enumerate(pairs) if now != then}
        if not torch.equal(values, self._values):
            others = (values != self._values).any(1).cpu().numpy()
            changed.update(self._slot_of[others].tolist())
        return sorted(changed)

    def _read(self) -> tuple[list[int], Tensor]:
        values = self._flat.params[self._indices].unsqueeze(1)
        return [one._version for one in self._flat.parameters], values.view(torch.uint8)


def _state_of(flat: FlatModel, optimizers: list[Optimizer]) -> dict[str, Tensor]:
    """Give what optimizers remember of a model, see `FlatOptimizer.state`."""
    state_dict: dict[str, Tensor] = {}
    used = torch.zeros(len(flat.slots), dtype=torch.bool)
    for index, (slot, one) in enumerate(zip(flat.slots, flat.parameters, strict=True)):
        state = next((dict(o.state[one]) for o in optimizers if one in o.state), {})
        for name, value in state.items():
            if not isinstance(value, Tensor):
                continue
            used[index] = True
            if name not in NUMBERS:
                whole = state_dict.setdefault(name, torch.zeros_like(flat.params, device="cpu"))
                slot.view(whole).copy_(value)
            else:
                zeros = torch.zeros(len(flat.slots), dtype=value.dtype)
                state_dict.setdefault(PER_PARAMETER + name, zeros)[index] = value
    return {**state_dict, USED: used} if state_dict else {}


_SPECS: TypeAdapter[Any] = TypeAdapter(AnyOptimizer)
_KINDS = ("SGD", "Adam", "AdamW", "RMSprop", "Adagrad", "Adadelta", "Adamax", "NAdam", "RAdam")
_OF_TORCH = {"params", "foreach", "fused", "capturable", "differentiable"}
"""What says nothing of the update's result."""

REMEDY = "use `strategy: ring` or `ps-sync`, where each worker makes the update itself"


class OptimizerFacts:
    """
    All prepared optimizers of a train function, as one.

    Args:
        optimizers: of one class; each parameter is in one group of one of them.

    Raises:
        SpecError: servers cannot make their updates; says why.
    """

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        kinds = sorted({type(one).__name__ for one in optimizers})
        name = kinds[0]
        for one in optimizers:
            if type(one).__name__ not in _KINDS or type(one).__module__.split(".")[0] != "torch":
                what = f"servers of ps-async make no updates of {type(one).__name__}"
                what += f": they know {', '.join(_KINDS)}"
                raise SpecError(Problem(("task",), what, REMEDY))
        if len(kinds) > 1:
            what = f"servers of ps-async run one class of optimizer, and got {', '.join(kinds)}"
            raise SpecError(Problem(("task",), what, f"use one class for all, or {REMEDY}"))
        self._groups = [group for one in optimizers for group in one.param_groups]
        groups = enumerate(self._groups, 1)
        self._numbers = {id(one): number for number, group in groups for one in group["params"]}
        if len(self._numbers) < sum(len(group["params"]) for group in self._groups):
            what = "two optimizers have a parameter in common: servers of ps-async keep one state"
            raise SpecError(Problem(("task",), what, REMEDY))
        bare = _SPECS.validate_python({"name": name, "lr": 1.0})
        self._fields = [one for one in type(bare).model_fields if one not in ("name", "groups")]
        for optimizer in optimizers:
            _check_arguments(optimizer, self._fields)
        self._flags = [*map(self._flags_of, self._groups)]
        made = [{"match": f"{n}", **flags} for n, flags in enumerate(self._flags, 1)]
        spec = _SPECS.validate_python({"name": name, "lr": 1.0, "groups": made})
        names = tuple(tuple(n for n, _ in self._numbers_of(group)) for group in self._groups)
        self.own_loop = OwnLoop(spec, names)

    def group_of(self, parameter: Tensor) -> int:
        """Give the number of a parameter's group, from 1; 0: it is in none."""
        return self._numbers.get(id(parameter), 0)

    def settings(self) -> NDArray[np.float64]:
        """
        Give the numbers as they are now, see `OwnLoop.settings`.

        Raises:
            SpecError: something else than these has changed.
        """
        for group, flags in zip(self._groups, self._flags, strict=True):
            if (now := self._flags_of(group)) != flags:
                changed = ", ".join(name for name in flags if flags[name] != now[name])
                what = f"{changed} of an optimizer has changed: servers of ps-async cannot follow"
                raise SpecError(Problem(("task",), what, REMEDY))
        values = [value for group in self._groups for _, value in self._numbers_of(group)]
        return np.array(values, np.float64)

    def _flags_of(self, group: Mapping[str, Any]) -> dict[str, bool]:
        return {k: group[k] for k in self._fields if isinstance(group.get(k), bool)}

    def _numbers_of(self, group: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
        for name in self._fields:
            value = group.get(name)
            if name == "betas" and value is not None:
                yield from zip(("beta1", "beta2"), map(float, value), strict=True)
            elif value is not None and not isinstance(value, bool):
                yield name, float(value)


def _check_arguments(optimizer: Optimizer, known: Sequence[str]) -> None:
    """Refuse arguments that servers would not have, where they say something."""
    plain = type(optimizer)([nn.Parameter(torch.zeros(1))], lr=1.0).defaults  # type: ignore[call-arg]
    for group in optimizer.param_groups:
        for name, usual in plain.items():
            if name not in known and name not in _OF_TORCH and group.get(name) != usual:
                what = f"{type(optimizer).__name__} has {name}={group.get(name)!r}, which servers "
                raise SpecError(Problem(("task",), what + "of ps-async do not know", REMEDY))
