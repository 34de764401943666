"""Hooks, instance-level `forward` methods and wrappers that users add to modules."""

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

_CALL_HOOKS = {
    "_forward_pre_hooks": "a forward pre-hook",
    "_forward_hooks": "a forward hook",
    "_backward_pre_hooks": "a backward pre-hook",
    "_backward_hooks": "a backward hook",
}
_STATE_DICT_HOOKS = {
    "_state_dict_pre_hooks": "a state_dict pre-hook",
    "_state_dict_hooks": "a state_dict hook",
}
_TENSOR_HOOKS = {
    "_backward_hooks": "a hook",
    "_post_accumulate_grad_hooks": "a post-accumulate hook",
}


def called_hooks(module: nn.Module) -> list[str]:
    """Return descriptions of hooks that run only when the module itself is called."""
    own = ["a `forward` of its own object"] if "forward" in vars(module) else []
    return [
        *own,
        *(description for name, description in _CALL_HOOKS.items() if getattr(module, name, None)),
    ]


def saved_hooks(module: nn.Module) -> list[str]:
    """Return descriptions of hooks that run only in the module's own `state_dict()`."""
    return [
        description
        for name, description in _STATE_DICT_HOOKS.items()
        if getattr(module, name, None)
    ]


def tensor_hooks(tensor: Tensor) -> list[str]:
    """Return descriptions of the user's hooks on this tensor, which another tensor would lack."""
    hooks = {text: getattr(tensor, name, None) or {} for name, text in _TENSOR_HOOKS.items()}
    return [text for text, own in hooks.items() if not all(map(_is_ours, own.values()))]


def _is_ours(hook: object) -> bool:
    return str(getattr(hook, "__module__", "")).startswith("distplat.")


def hooks_warning(model: nn.Module, part: str) -> str:
    """
    Return a warning that a parameter's hook sees a partial gradient; empty without such hooks.

    Args:
        model: a worker's model whose batch is split over workers or into micro-batches.
        part: description of the partial gradient.
    """
    by_name = ((name, tensor_hooks(parameter)) for name, parameter in model.named_parameters())
    name, hooks = next(((name, hooks) for name, hooks in by_name if hooks), ("", []))
    if not hooks:
        return ""
    return (
        f"{hooks[0]} on the parameter {name!r} is shown the gradient of {part}: as on the whole "
        "batch only where it multiplies by a constant"
    )


def has_hook_after_backward(tensor: Tensor | None) -> bool:
    """Return whether the tensor has a post-accumulate-grad hook."""
    return bool(getattr(tensor, "_post_accumulate_grad_hooks", None))


def is_parametrized(module: nn.Module) -> bool:
    """Return whether a parameter is computed from others (`torch.nn.utils.parametrize`)."""
    return bool(parametrize.is_parametrized(module))


def unwrap(model: nn.Module) -> nn.Module:
    """
    Unwrap a model and, in place, all modules in it.

    A compiled module stays compiled, as by `module.compile()`.
    """
    while (inner := _wrapped_module(model)) is not None:
        _transfer_wrapper(model, inner)
        model = inner
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if _wrapped_module(child) is not None:
                module._modules[name] = unwrap(child)
    return model


def sharded_class_name(model: nn.Module) -> str:
    """Return the class by which a model is already sharded over ranks; empty: it is not."""
    members = [*model.modules(), *model.parameters()]
    names = (cls.__name__ for member in members for cls in type(member).__mro__)
    return next((name for name in names if name in _SHARDED_CLASSES), "")


_SHARDED_CLASSES = ("FullyShardedDataParallel", "FSDPModule", "DTensor")
"""Classes of torch.distributed, by name because importing them is slow."""


class _NoReducer:
    """Replaces DDP's reducer; Lightning and Accelerate call its methods directly."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: None


class _PickledAsBase(ABCMeta):
    """Metaclass of dynamic wrapper classes: pickle saves the user's base class instead."""


def _reduce_class(cls: _PickledAsBase) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Reduce a dynamic wrapper class to its base class, without naming a function of distplat."""
    return operator.getitem, ((cls.__bases__[-1],), 0)


copyreg.pickle(_PickledAsBase, _reduce_class)


class _DDPInterface(DistributedDataParallel):
    """DDP's interface without its communication; a flag says whether backward averages."""

    _enable: Callable[[bool], None]
    _enabled = True
    _calling = False

    # Both are off: DDP would broadcast buffers in forward, and average after the first backward.
    # The user's values stay in the wrapper's `__dict__`, for pickle.
    require_forward_param_sync = property(lambda self: False, lambda self, on: None)
    static_graph = property(lambda self: False, lambda self, on: None)

    @property  # type: ignore[explicit-override]  # mypy looks for it at the setter, too
    @override
    def require_backward_grad_sync(self) -> bool:
        """Whether a backward averages; set by `no_sync()`, and directly by some training loops."""
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
        Refuse `join()`.

        Raises:
            SpecError: always, because the strategy averages gradients, not the wrapper.
        """
        text = "join() of a wrapper is for ranks that make fewer steps than others"
        hint = (
            "give all as many: DistributedSampler fills up the last batches, or leaves them out "
            "with drop_last; under `ps-async` each rank makes its own number without join()"
        )
        raise SpecError(Problem(("task",), text, hint))


def disable_averaging(wrapper: DistributedDataParallel, enable: Callable[[bool], None]) -> None:
    """
    Disable a DDP wrapper's own gradient averaging; the strategy averages instead.

    Args:
        wrapper: its interface still works: `wrapper.module`, `wrapper.no_sync()`.
        enable: sets whether the strategy averages in backward. A plain function, which copies of
            the wrapper share, for example a copy with averaged weights.
    """
    if getattr(wrapper, "_comm_hooks", None):
        logger.warning(
            "a communication hook of DistributedDataParallel is not called: the strategy sends the "
            "gradients, and `ring` has `compression`"
        )
    object.__setattr__(wrapper, "reducer", _NoReducer())
    vars(wrapper).pop("require_backward_grad_sync", None)  # now a property of the class
    cls = type(wrapper)
    if issubclass(cls, _DDPInterface):  # a copy of a wrapper without averaging
        cls = cls.__bases__[-1]
    members = {"_enable": staticmethod(enable)}  # in the class, because wrappers may be pickled
    meta: Any = _PickledAsBase if type(cls) is ABCMeta else type(cls)
    wrapper.__class__ = meta(cls.__name__, (_DDPInterface, cls), members)


def wrappers_in(model: nn.Module) -> list[DistributedDataParallel]:
    """Return the DDP wrappers among a model's modules, including the model itself."""
    return [module for module in model.modules() if isinstance(module, DistributedDataParallel)]


def modules_without_broadcast(wrappers: Sequence[DistributedDataParallel]) -> set[nn.Module]:
    """Return the wrapped modules whose buffers no wrapper broadcasts."""
    local, broadcast = set[nn.Module](), set[nn.Module]()
    for wrapper in wrappers:
        (broadcast if wrapper.broadcast_buffers else local).update(wrapper.modules())
    return local - broadcast


def _wrapped_module(module: nn.Module) -> nn.Module | None:
    """Return the module inside a wrapper; None: the module is no wrapper."""
    if isinstance(module, DataParallel | DistributedDataParallel):
        inner: nn.Module = module.module
        return inner
    return compiled_module(module)


def _transfer_wrapper(wrapper: nn.Module, inner: nn.Module) -> None:
    """Transfer compilation to the inner module, and keep `wrapper.module` access working."""
    context = getattr(wrapper, "dynamo_ctx", None)
    if context is not None:
        call_compiled(inner, context)
    name = "_orig_mod" if context is not None else "module"
    if not hasattr(inner, name):
        object.__setattr__(inner, name, inner)  # not registered: a child would change the keys
