"""What users put around modules: hooks, a `forward` of the object itself, wrappers."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.utils import parametrize

from distplat.strategies.torch_compat import call_compiled, compiled_module

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
_TENSOR = {
    "_backward_hooks": "a hook",
    "_post_accumulate_grad_hooks": "a post-accumulate hook",
}


def called_hooks(module: nn.Module) -> list[str]:
    """Name what only a call of the module itself brings about."""
    own = ["a `forward` of its own object"] if "forward" in vars(module) else []
    return [*own, *(told for name, told in _CALLED.items() if getattr(module, name, None))]


def saved_hooks(module: nn.Module) -> list[str]:
    """Name what only `state_dict()` of the module itself brings about."""
    return [told for name, told in _SAVED.items() if getattr(module, name, None)]


def tensor_hooks(tensor: Tensor) -> list[str]:
    """Name what hangs on this tensor object, and would not on another in its place."""
    return [told for name, told in _TENSOR.items() if getattr(tensor, name, None)]


def is_parametrized(module: nn.Module) -> bool:
    """Whether a parameter is computed from others (`torch.nn.utils.parametrize`)."""
    return bool(parametrize.is_parametrized(module))


def unwrapped(model: nn.Module) -> nn.Module:
    """
    Take the wrappers off a model and, in place, off all modules in it.

    A module that was compiled stays so: its calls are compiled, as `module.compile()` has it.
    """
    while (inner := _inside(model)) is not None:
        _keep(model, inner)
        model = inner
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            plain = child
            while (inner := _inside(plain)) is not None:
                _keep(plain, inner)
                plain = inner
            if plain is not child:
                module._modules[name] = plain
                unwrapped(plain)
    return model


def passing_on(
    wrapper: DistributedDataParallel, no_sync: Callable[[], AbstractContextManager[None]]
) -> None:
    """
    Have a wrapper call its model and average nothing, as somebody else does.

    Args:
        wrapper: on which code may go on to rely: `wrapper.module`, `wrapper.no_sync()`.
        no_sync: of who averages instead.
    """
    wrapper.require_backward_grad_sync = wrapper.require_forward_param_sync = False
    wrapper.static_graph = False  # it would average after the first backward all the same
    object.__setattr__(wrapper, "no_sync", no_sync)


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
