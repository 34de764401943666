"""
Run a train function's updates on the servers of `ps-async`, when its optimizer steps.

    worker     forward, backward | step: push ─▶ ...  ◀─ newest parameters | forward ...
    servers                             optimizer on each shard, with the step's lr etc.

Gradients are not averaged: torch's own functions clip, scale and inspect a worker's gradient, and
each push is an update. The user's optimizer remains the same object. During its step its parameters
have no `.grad`, so torch updates nothing. Its `state_dict()` is fetched from the servers.

Servers create their own optimizer. Its class and boolean arguments are fixed (`OptimizerConfig`);
numbers may change with each push.

    SGD(groups: lr, momentum, nesterov)     fixed: class SGD, nesterov of each group
                                            with each push: lr, momentum, ... of each group
"""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from distplat.platform.errors import Problem, SpecError
from distplat.strategies.function.gradient_average import (
    Exchange,
    SessionContext,
    broadcast_from_rank0,
    check_same_model,
)
from distplat.strategies.function.loop_checks import (
    check_same_parameters,
    parameters_of,
    unprepared_error,
)
from distplat.strategies.function.optimizer_config import REMEDY, OptimizerConfig
from distplat.strategies.loop.control import NonFiniteSteps, StepControl
from distplat.strategies.model.flat import FlatModel
from distplat.strategies.model.optimizer_state import NUMBERS, PER_PARAMETER, USED
from distplat.strategies.model.sync_batch_norm import refuse_sync_batch_norm
from distplat.strategies.ports import LoopOptimizer, LoopShards, Pushed
from distplat.strategies.torch_compat import not_compiled

_LEAVE_CHECK_S = 0.1
"""Interval at which a finished rank checks whether the others have finished."""

_NUM_SAMPLED = 256
"""Number of elements of each parameter that are compared between two steps."""


class ServerUpdates(Exchange):
    """
    Training with updates on servers, see the module's docstring.

    Args:
        context: settings shared by all models.
        shards: the port to the servers; connected at the first step.
    """

    synchronous = False

    def __init__(self, context: SessionContext, shards: LoopShards) -> None:
        self._context, self._shards = context, shards
        self._models: list[nn.Module] = []
        self._optimizers: list[Optimizer] = []
        self._trained: dict[int, bool] = {}  #: by parameter id: `requires_grad` when prepared
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
    def add_model(
        self, model: nn.Module, *, is_only_model: bool, local_buffers: Set[nn.Module]
    ) -> None:
        self._refuse_later("a model")
        why = "which waits for all ranks: ps-async ranks do not run the same steps"
        refuse_sync_batch_norm(model, why, "use nn.BatchNorm, or `ring` or `ps-sync`")
        group, named = self._context.group, [*model.named_parameters()]
        facts = repr([(n, p.shape, p.dtype, p.requires_grad) for n, p in named])
        check_same_model(model, facts, group, named[0][1].device)
        shared = (module for module in model.modules() if module not in local_buffers)
        buffers = (buffer for module in shared for buffer in module.buffers(recurse=False))
        tensors = [tensor.data for tensor in [*model.parameters(), *buffers] if tensor.numel()]
        broadcast_from_rank0(tensors, group)
        self._models.append(model)
        self._trained |= {id(p): p.requires_grad for p in model.parameters()}

    @override
    def add_optimizer(self, optimizer: Optimizer) -> None:
        self._refuse_later("an optimizer")
        OptimizerConfig([*self._optimizers, optimizer])
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
            text = f"prepare() got {what} after the first step, when the servers are already set up"
            hint = "prepare all models and optimizers before the first step"
            raise SpecError(Problem(("task",), text, hint))

    @override
    def check_optimizer(self, optimizer: Optimizer) -> None:
        if self._flat is not None and self._count() != self._counts:
            text = "an optimizer got parameters after the first step, which the servers do not have"
            raise SpecError(Problem(("task",), text, "add them before the first step"))
        if not any(prepared is optimizer for prepared in self._optimizers):
            text = (
                f"{type(optimizer).__name__}.step() would update parameters that the servers keep"
            )
            raise SpecError(Problem(("task",), text, "pass the optimizer to prepare(), too"))

    @override
    def enable(self, on: bool, model: nn.Module | None = None) -> None:
        """Gradients are never averaged."""

    @not_compiled
    def _before_step(
        self, optimizer: Optimizer, args: Any, kwargs: Mapping[str, Any]
    ) -> tuple[Any, Any]:
        """
        Push the gradients, and remove them so that torch's own step updates nothing.

        Returns:
            The arguments of torch's step. A closure is called here, and replaced by its loss.
        """
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is not None:  # the supported optimizers call it once, at the start
            with torch.enable_grad():
                loss = closure()
            args, kwargs = (optimizer, lambda: loss), {}
        params = parameters_of(optimizer)
        self._removed = [(p, p.grad) for p in params]
        found_inf = getattr(optimizer, "found_inf", None)  # set by a GradScaler for fused kernels
        if found_inf is None or not float(found_inf):
            scale = getattr(optimizer, "grad_scale", None)
            self._push({id(p) for p in params}, 1.0 if scale is None else 1.0 / float(scale))
        for p in params:
            p.grad = None
        return args, kwargs

    @not_compiled
    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for p, grad in self._removed:
            p.grad = grad
        self._removed = []

    @torch.no_grad()
    def _push(self, parameter_ids: set[int], scale: float) -> None:
        """Push the gradients of some parameters, given by id, and load the newest parameters."""
        flat, step = self._connect(), self._context.step()
        self._check_unwritten(flat)
        for optimizer in self._optimizers:
            self._check_state(optimizer)
        settings = self._config.settings()
        flags = [id(p) in parameter_ids and p.grad is not None for p in flat.parameters]
        present = np.array(flags, np.bool_)
        self._fill(flat, present)
        flat.scale_gradients(scale)
        rank = self._context.group.rank
        local = StepControl(1.0, 1.0, rank=rank, present=present, settings=settings)
        if self._policy.checks:
            local = local.looked_at(flat)
        self._policy.decide(local, step, flat.name)
        self._last = self._shards.push(self._pushes, local)
        self._pushes += 1
        self._stale_sum += self._last.staleness
        self._writes.record()
        self._context.on_exchange()

    def _fill(self, flat: FlatModel, present: NDArray[np.bool_]) -> None:
        for view, p, has_grad in zip(self._views, flat.parameters, present.tolist(), strict=True):
            if has_grad and p.grad is not None:
                view.copy_(p.grad if p.grad.layout is torch.strided else p.grad.to_dense())
            else:
                view.zero_()

    def _check_unwritten(self, flat: FlatModel) -> None:
        """
        Check that only the servers have changed the parameters.

        Raises:
            SpecError: The message names the first changed parameter.
        """
        changed = flat.check_layout(self._context.step())
        changed += map(flat.name, self._writes.changed_slots())
        if changed:
            text = f"{changed[0]!r} was written to after the first step: the servers keep it"
            hint = f"write, or load, before the first step; or {REMEDY}"
            raise SpecError(Problem(("task",), text, hint))

    def _count(self) -> list[int]:
        return [len(parameters_of(optimizer)) for optimizer in self._optimizers]

    def _connect(self) -> FlatModel:
        """
        Connect to the servers on the first call; they start with rank 0's parameters and optimizer
        state.
        """
        if self._flat is not None:
            return self._flat
        config = OptimizerConfig(self._optimizers)
        model = self._models[0] if len(self._models) == 1 else nn.ModuleList(self._models)
        groups = {name: config.group_of(p) for name, p in model.named_parameters()}
        self._check_all_prepared(model)
        grads = [(p, p.grad) for p in model.parameters()]
        with self._as_prepared(model):
            self._flat = flat = FlatModel(model, group_of=lambda name: groups[name])
        loop = LoopOptimizer(config.own_loop, _state_of(flat, self._optimizers))
        self._shards.connect_loop(flat, loop)
        for p, grad in grads:
            p.grad = grad
        for optimizer in self._optimizers:
            optimizer.state = _StateOnServers()
        self._config, self._writes = config, _WriteDetector(flat)
        self._views = [slot.view(flat.grads) for slot in flat.slots]
        self._counts = self._count()
        return flat

    @contextmanager
    def _as_prepared(self, model: nn.Module) -> Iterator[None]:
        """
        Restore each parameter's `requires_grad` as prepared: a GAN's loop freezes its models in
        turn.
        """
        current = [(p, p.requires_grad) for p in model.parameters()]
        for p, requires_grad in current:
            p.requires_grad_(self._trained.get(id(p), requires_grad))
        try:
            yield
        finally:
            for p, requires_grad in current:
                p.requires_grad_(requires_grad)

    def _check_all_prepared(self, model: nn.Module) -> None:
        prepared = {id(p) for p in model.parameters()}
        for optimizer in self._optimizers:
            parameters = parameters_of(optimizer)
            if others := [p for p in parameters if p.requires_grad and id(p) not in prepared]:
                raise unprepared_error(optimizer, others)

    def _fetch_state(self, optimizer: Optimizer) -> None:
        """Load the servers' state into the optimizer, for `state_dict()`."""
        if self._flat is None:
            return
        self._check_state(optimizer)
        optimizer.state, state = defaultdict(dict), self._shards.optimizer_state()
        used = state.pop(USED, None)
        parameter_ids = {*map(id, parameters_of(optimizer))}
        for index, (slot, p) in enumerate(
            zip(self._flat.slots, self._flat.parameters, strict=True)
        ):
            if used is None or not used[index] or id(p) not in parameter_ids:
                continue
            for name, values in state.items():
                if name.startswith(PER_PARAMETER):
                    key, value = name.removeprefix(PER_PARAMETER), values[index].clone()
                else:
                    key, value = name, slot.view(values).clone().to(p.device)
                optimizer.state[p][key] = value

    def _forget_state(self, optimizer: Optimizer, state: dict[str, Any]) -> None:
        if self._flat is not None:
            optimizer.state = _StateOnServers()

    def _check_state(self, optimizer: Optimizer) -> None:
        """
        Check that the optimizer's state was not replaced.

        Raises:
            SpecError: It was replaced.
        """
        if not isinstance(optimizer.state, _StateOnServers):
            raise _state_error()

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
            self._context.on_exchange()
            time.sleep(_LEAVE_CHECK_S)

    @override
    def finalize(self) -> None:
        if self._flat is None:
            for model in self._models:
                check_same_parameters(model, self._context.group, "at the end")
        elif not self._writes.changed_slots():  # else the loop has written its own result
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


_MOVES_STATE = ("lightning.fabric.utilities.optimizer", "lightning_fabric.utilities.optimizer")
"""Modules that read `state` only to move it; Lightning's Trainer does so at its end."""


class _StateOnServers(defaultdict[Tensor, Any]):
    """
    An optimizer's `state` that must not be read, copied or reset, because the servers have the
    state. Lightning may move it to another device: there is nothing to move.

    Raises:
        SpecError: Any other access.
    """

    def __init__(self) -> None:
        super().__init__(dict)

    def _refuse(self, *args: Any, **named: Any) -> Any:
        raise _state_error()

    @override
    def items(self) -> Any:
        if sys._getframe(1).f_globals.get("__name__") not in _MOVES_STATE:
            raise _state_error()
        return {}.items()

    def __bool__(self) -> bool:
        """Return True: torch.distributed.checkpoint runs a step to create missing state."""
        return True

    __contains__ = __iter__ = __len__ = __missing__ = get = keys = values = _refuse
    __delitem__ = __setitem__ = clear = pop = popitem = setdefault = update = _refuse
    __copy__ = __reduce_ex__ = copy = _refuse


def _state_error() -> SpecError:
    text = "optimizer.state was used after the first step: the servers keep it"
    return SpecError(Problem(("task",), text, f"read it with optimizer.state_dict(); {REMEDY}"))


class _WriteDetector:
    """
    Detects parameters that were written since the last step by anything but the servers.

    The servers' writes to the shared memory do not increment a tensor's version counter, and
    neither do the user's writes through `.data`. The latter are detected by comparing some
    elements.

    Args:
        flat: the model.
    """

    def __init__(self, flat: FlatModel) -> None:
        self._flat = flat
        counts = [min(_NUM_SAMPLED, slot.stop - slot.offset) for slot in flat.slots]
        pairs = zip(flat.slots, counts, strict=True)
        spread = [torch.linspace(s.offset, s.stop - 1, n, dtype=torch.float64) for s, n in pairs]
        self._indices = torch.cat(spread).long().to(flat.params.device)
        self._slot_of = np.repeat(np.arange(len(counts)), counts)
        self.record()

    def record(self) -> None:
        """Record the current parameters as the servers' values."""
        self._versions, self._values = self._read()

    def changed_slots(self) -> list[int]:
        """Return the indices of parameters that have changed since `record`."""
        versions, values = self._read()
        pairs = zip(versions, self._versions, strict=True)
        changed = {slot for slot, (new, old) in enumerate(pairs) if new != old}
        if not torch.equal(values, self._values):
            differs = (values != self._values).any(1).cpu().numpy()
            changed.update(self._slot_of[differs].tolist())
        return sorted(changed)

    def _read(self) -> tuple[list[int], Tensor]:
        values = self._flat.params[self._indices].unsqueeze(1)
        return [p._version for p in self._flat.parameters], values.view(torch.uint8)


def _state_of(flat: FlatModel, optimizers: list[Optimizer]) -> dict[str, Tensor]:
    """Return the state of a model's optimizers, see `FlatOptimizer.state`."""
    state_dict: dict[str, Tensor] = {}
    used = torch.zeros(len(flat.slots), dtype=torch.bool)
    for index, (slot, p) in enumerate(zip(flat.slots, flat.parameters, strict=True)):
        state = next((dict(o.state[p]) for o in optimizers if p in o.state), {})
        for name, value in state.items():
            if not isinstance(value, Tensor):
                continue
            used[index] = True
            if name not in NUMBERS:
                vector = state_dict.setdefault(name, torch.zeros_like(flat.params, device="cpu"))
                slot.view(vector).copy_(value)
            else:
                zeros = torch.zeros(len(flat.slots), dtype=value.dtype)
                state_dict.setdefault(PER_PARAMETER + name, zeros)[index] = value
    return {**state_dict, USED: used} if state_dict else {}
