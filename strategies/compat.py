"""
Everything private of torch that distplat uses, behind one name each, with the reason.

A release of torch may change it without a word; tests/unit/test_compat.py fails then, name by name.
The registries of a module (`_parameters`, `_buffers`, `_modules`, its hooks) and a tensor's
`_version` are used as they are: the same test holds that they are there.
"""

import inspect
from collections.abc import Callable
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils import _pytree
from torch.utils.data._utils.collate import collate, default_collate_fn_map

COLLATE_RULES: dict[Any, Callable[..., Any]] = default_collate_fn_map
"""torch's rules by type; public is only the function that applies them to everything."""


def collate_by(rules: dict[Any, Callable[..., Any]], samples: list[Any]) -> Any:
    """Put samples together by rules of our own: `default_collate` takes none."""
    return collate(samples, collate_fn_map=rules)


def has_running_statistics(module: nn.Module) -> TypeGuard[_NormBase]:
    """Tell a norm with running statistics: it has no public class above all its kinds."""
    return isinstance(module, _NormBase)


def check_input(layer: nn.SyncBatchNorm, x: Tensor) -> None:
    """Check an input's dimensions as the layer's own forward does, which is replaced."""
    layer._check_input_dim(x)


def any_hook_for_all_modules() -> bool:
    """Whether there are hooks for every module of the process, of which nothing public tells."""
    return bool(nn.modules.module._has_any_global_hook())  # type: ignore[no-untyped-call]


def compiled_module(module: nn.Module) -> nn.Module | None:
    """Give what `torch.compile` wrapped; by name, for dynamo's class takes seconds to import."""
    if type(module).__name__ == "OptimizedModule" and "_orig_mod" in module._modules:
        return module._modules["_orig_mod"]
    return None


def call_compiled(module: nn.Module, context: Callable[..., Any]) -> None:
    """Have a module's calls compiled in place, as `module.compile()` does, by a given compiler."""
    # A frame of ours around it: dynamo passes over those of torch's own modules.
    call: Callable[..., object] = module._call_impl
    module._compiled_call_impl = context(lambda *args, **named: call(*args, **named))


def fall_back_to_eager() -> None:
    """Have what `torch.compile` cannot compile run as it is, with a warning of torch's own."""
    import torch._dynamo  # takes a second: for jobs that compile only

    torch._dynamo.config.suppress_errors = True


def spare_the_compiler() -> None:
    """
    Keep torch from importing its compiler, which takes a second of every process's start.

    torch wraps the methods of its optimizers so that `torch.compile` leaves them alone, and imports
    the compiler when one is first called. Nobody compiles our update, so the wrapper is told that
    the plain method is what it looks for, and `step` is called without its wrapper. Should torch
    change this, the second is lost again and nothing else.
    """
    plain = inspect.unwrap(torch.optim.Optimizer.add_param_group)
    plain.__dict__.setdefault("__dynamo_disable", plain)


def after_backward(call: Callable[[], None]) -> None:
    """
    Have the backward under way call this at its end, before it returns; from one of its hooks.

    DistributedDataParallel ends its reduction so. What it raises comes out of `backward()`.
    """
    torch.autograd.Variable._execution_engine.queue_callback(call)


def tree_map(function: Callable[[Any], Any], tree: Any) -> Any:
    """Apply a function to all leaves of nested containers: torch has it for its own use only."""
    return _pytree.tree_map(function, tree)


def tree_leaves(tree: Any) -> list[Any]:
    """Give the leaves of nested containers, in order."""
    return _pytree.tree_leaves(tree)
