"""
What users hang on modules and tensors: hooks, a `forward` of the object's own.

They take effect where torch calls the module itself, or adds to the tensor's own gradient. Whoever
calls only parts of a module, or puts another tensor in a parameter's place, looks here first.
"""

from torch import Tensor, nn
from torch.nn.utils import parametrize

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
