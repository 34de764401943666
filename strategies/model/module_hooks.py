"""What users put around modules: hooks, a `forward` of the object itself, wrappers."""

from __future__ import annotations

import copyreg
import logging
import operator
from abc import ABCMeta
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.utils import parametrize
from typing_extensions import override

from distplat.platform.errors import Problem, SpecError
from distplat.strategies.torch_compat import call_compiled, compiled_module

logger = logging.getLogger(__name__)

_CALLED = {
    "_forward_pre_hooks": "a forward pre-hook",
    "_forward_hooks": "a forward hook",
    "_backward_pre_hooks": "a backward pre-hook",
    "_backward_hooks": "a backward hook",
}
_SAVED = {
    "_state_dict_pre_hooks": "a state_dict pre-hook",
    "_state_dict_hooks": "a state_dict hook",
}
_TENSOR = {"_backward_hooks": "a hook", "_post_accumulate_grad_hooks": "a post-accumulate hook"}


def called_hooks(module: nn.Module) -> list[str]:
    """Name what only a call of the module itself brings about."""
    own = ["a `forward` of its own object"] if "forward" in vars(module) else []
    return [
        *own,
        *(description for name, description in _CALLED.items() if getattr(module, name, None)),
    ]


def saved_hooks(module: nn.Module) -> list[str]:
    """Name what only `state_dict()` of the module itself brings about."""
    return [description for name, description in _SAVED.items() if getattr(module, name, None)]


def tensor_hooks(tensor: Tensor) -> list[str]:
    """Name what of the user's hangs on this tensor object, and would not on another instead."""
    hooks_by_kind = {kind: getattr(tensor, name, None) or {} for name, kind in _TENSOR.items()}
    return [kind for kind, hooks in hooks_by_kind.items() if not all(map(_is_ours, hooks.values()))]


def _is_ours(hook: object) -> bool:
    return str(getattr(hook, "__module__", "")).startswith("distplat.")


def hooks_warning(model: nn.Module, part: str) -> str:
    """
    Say that a parameter's hook sees the gradient of a part of the batch; empty: there is none.

    Args:
        model: of one worker of several, or whose batches are cut.
        part: what of the batch it sees, and what becomes of the parts.
    """
    by_name = ((name, tensor_hooks(one)) for name, one in model.named_parameters())
    name, hooks = next(((name, hooks) for name, hooks in by_name if hooks), ("", []))
    if not hooks:
        return ""
    return (
        f"{hooks[0]} on the parameter {name!r} is shown the gradient of {part}: as on the whole "
        "batch only where it multiplies by a constant"
    )


def has_hook_after_backward(tensor: Tensor | None) -> bool:
    """Whether a hook is called with the parameter once its gradient is there."""
    return bool(getattr(tensor, "_post_accumulate_grad_hooks", None))


def is_parametrized(module: nn.Module) -> bool:
    """Whether a parameter is computed from others (`torch.nn.utils.parametrize`)."""
    return bool(parametrize.is_parametrized(module))


def unwrap(model: nn.Module) -> nn.Module:
    """
    Take the wrappers off a model and, in place, off all modules in it.

    A module that was compiled stays so: its calls are compiled, as `module.compile()` has it.
    """
    while (inner := _inside(model)) is not None:
        _keep(model, inner)
        model = inner
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if _inside(child) is not None:
                module._modules[name] = unwrap(child)
    return model


def sharded_class_name(model: nn.Module) -> str:
    """Name the class by which a model has parts on each rank already; empty: it is whole."""
    every = [*model.modules(), *model.parameters()]
    names = (kind.__name__ for one in every for kind in type(one).__mro__)
    return next((name for name in names if name in _CUT), "")


_CUT = ("FullyShardedDataParallel", "FSDPModule", "DTensor")
"""Of torch.distributed; by their names, as their import takes time."""


class _Idle:
    """Stands for a wrapper's reducer; Lightning and Accelerate tell it of backwards themselves."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: None


class _PickledAsGiven(ABCMeta):
    """The type of a wrapper's class: pickle finds that by no name, and gets the user's instead."""


def _class_given(kind: _PickledAsGiven) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Give what pickle makes of a wrapper's class, without a name of ours; a copy keeps it."""
    return operator.getitem, ((kind.__bases__[-1],), 0)


copyreg.pickle(_PickledAsGiven, _class_given)


class _DDPInterface(DistributedDataParallel):
    """The interface of DDP for a wrapper of any class; a flag says whether backward averages."""

    _enable: Callable[[bool], None]
    _enabled = True
    _calling = False

    # Off: it would send buffers in a forward, and average after the first backward. What the user
    # has set stays in the wrapper's `__dict__`, for pickle.
    require_forward_param_sync = property(lambda self: False, lambda self, on: None)
    static_graph = property(lambda self: False, lambda self, on: None)

    @property
    def require_backward_grad_sync(self) -> bool:
        """Whether a backward averages; `no_sync()` sets it, and some loops do so themselves."""
        return self._enabled and not self._calling

    @require_backward_grad_sync.setter
    def require_backward_grad_sync(self, on: bool) -> None:
        self._enabled = on
        self._enable(on)

    @override
    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        self._calling = True
        try:
            return super().forward(*inputs, **kwargs)  # type: ignore[no-untyped-call]
        finally:
            self._calling = False

    @override
    def join_hook(self, **kwargs: Any) -> Any:
        """
        Be asked by `join()`, for what a rank does that has no more batches.

        Raises:
            SpecError: it would wait for others that do not average here.
        """
        text = "join() of a wrapper is for ranks that make fewer steps than others"
        hint = (
            "give all as many: DistributedSampler fills up the last batches, or leaves them out "
            "with drop_last; under `ps-async` each rank makes its own number without join()"
        )
        raise SpecError(Problem(("task",), text, hint))


def disable_averaging(wrapper: DistributedDataParallel, enable: Callable[[bool], None]) -> None:
    """
    Have a wrapper call its model and average nothing, as somebody else does.

    Args:
        wrapper: on which code may go on to rely: `wrapper.module`, `wrapper.no_sync()`.
        enable: tells who averages instead whether a backward is to. A plain function: a copy of
            the wrapper, of an average of its weights for one, shares it.
    """
    if getattr(wrapper, "_comm_hooks", None):
        logger.warning(
            "a communication hook of DistributedDataParallel is not called: the strategy sends the "
            "gradients, and `ring` has `compression`"
        )
    object.__setattr__(wrapper, "reducer", _Idle())
    vars(wrapper).pop("require_backward_grad_sync", None)  # the class has it from here on
    kind = type(wrapper)
    if issubclass(kind, _DDPInterface):  # a copy of a wrapper that passes on
        kind = kind.__bases__[-1]
    members = {"_enable": staticmethod(enable)}  # of the class: the wrapper may be pickled
    meta: Any = _PickledAsGiven if type(kind) is ABCMeta else type(kind)
    wrapper.__class__ = meta(kind.__name__, (_DDPInterface, kind), members)


def wrappers_in(model: nn.Module) -> list[DistributedDataParallel]:
    """Give a model's wrappers: itself, below `torch.compile`, or of parts of it."""
    return [one for one in model.modules() if isinstance(one, DistributedDataParallel)]


def modules_without_broadcast(wrappers: Sequence[DistributedDataParallel]) -> set[nn.Module]:
    """Give the modules whose buffers no wrapper around them broadcasts."""
    own, broadcast = set[nn.Module](), set[nn.Module]()
    for one in wrappers:
        (broadcast if one.broadcast_buffers else own).update(one.modules())
    return own - broadcast


def _inside(module: nn.Module) -> nn.Module | None:
    """Give what a wrapper wraps; None: it is none."""
    if isinstance(module, DataParallel | DistributedDataParallel):
        inner: nn.Module = module.module
        return inner
    return compiled_module(module)


def _keep(wrapper: nn.Module, inner: nn.Module) -> None:
    """Keep what the wrapper did, and let code that reaches through it go on to work."""
    context = getattr(wrapper, "dynamo_ctx", None)
    if context is not None:
        call_compiled(inner, context)
    name = "_orig_mod" if context is not None else "module"
    if not hasattr(inner, name):
        object.__setattr__(inner, name, inner)  # no child of itself: it has no name for keys
