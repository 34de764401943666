"""
Models without the wrappers that change their names: what is saved has the plain model's keys.

    torch.compile(net)     _orig_mod.0.weight   ->   0.weight, still compiled
    DataParallel(net)      module.0.weight      ->   0.weight: a worker has one device

Everything here goes by the names of parameters: checkpoints, the saved model, what ranks agree on.
So wrappers go where the model is made, once, instead of being looked through everywhere.
"""

from __future__ import annotations

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from distplat.strategies.training.compat import call_compiled, compiled_module


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
