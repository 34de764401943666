"""
What a model does around its layers, where a pipeline calls the layers and never the model.

    plain torch   model(x):  forward pre-hooks ─▶ layer 0 ─▶ ... ─▶ layer n ─▶ forward hooks
    pipeline                 [ pre-hooks, layer 0 ] ─▶ ... ─▶ [ layer n, hooks ]
                             on the first stage                on the last one

Forward hooks of the whole model are kept so. They are given what the rank has: one that asks for
more than `training` of the model, or for the model's inputs behind its last layer, is told so.
What cannot be kept is refused by name.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NoReturn

from torch import Tensor, nn

from distplat.platform.errors import Problem, SpecError
from distplat.strategies.training.compat import any_hook_for_all_modules
from distplat.strategies.training.module_hooks import called_hooks, saved_hooks
from distplat.strategies.training.stages import Layer, one_tensor

_WHERE = ("strategy", "pipeline")
_KEPT = {"a forward pre-hook", "a forward hook"}

Hook = Callable[..., Any]


def with_hooks(model: nn.Module, layers: Sequence[Layer]) -> list[Layer]:
    """
    Give the layers with the whole model's forward hooks around them.

    Raises:
        SpecError: the model, or a module between it and its layers, has something that a call of
            the layers alone would leave out; names each.
    """
    problems = [*_of_the_whole(model), *_between(model, layers)]
    if any_hook_for_all_modules():
        text = "there are hooks for all modules (`register_module_..._hook`)"
        problems.append(_problem(text, "register them on the layers that they are for"))
    if problems:
        raise SpecError(*problems)
    found = list(layers)
    if model._forward_pre_hooks:
        hooks = list(model._forward_pre_hooks.values())
        found[0] = replace(found[0], module=_Before(found[0].module, hooks))
    if model._forward_hooks:
        hooks = list(model._forward_hooks.values())
        found[-1] = replace(found[-1], module=_After(found[-1].module, hooks))
    return found


def _of_the_whole(model: nn.Module) -> list[Problem]:
    told = [kind for kind in called_hooks(model) if kind not in _KEPT]
    told += [*saved_hooks(model), *_own_ways(model)]
    others: Mapping[str, object] = {
        "a hook `with_kwargs`": model._forward_pre_hooks_with_kwargs
        or model._forward_hooks_with_kwargs,
        "a hook with `always_call`": model._forward_hooks_always_called,
        "a `__call__` of its own": type(model).__call__ is not nn.Module.__call__,
    }
    told += [kind for kind, there in others.items() if there]
    text = "the whole model ({}) has {}, and a pipeline calls its layers only"
    hint = "put it on a layer, or set `pipeline: 1`"
    return [_problem(text.format(type(model).__name__, kind), hint) for kind in told]


def _own_ways(module: nn.Module) -> list[str]:
    """Name what a module does for all its parts, where that is more than to do it for each."""
    usual = {"train": nn.Module.train, "state_dict": nn.Module.state_dict}
    return [
        f"a `{name}` of its own"
        for name, method in usual.items()
        if getattr(type(module), name) is not method or name in vars(module)
    ]


def _between(model: nn.Module, layers: Sequence[Layer]) -> list[Problem]:
    """Find what is on modules of which only the parts are called."""
    inside = {id(module) for layer in layers for module in layer.module.modules()}
    found = []
    for name, module in model.named_modules():
        if id(module) in inside or module is model:
            continue
        never_called = type(module).forward is nn.Module.forward
        told = [*([] if never_called else called_hooks(module)), *saved_hooks(module)]
        told += _own_ways(module)
        text = f"{name} ({type(module).__name__}) has {{}}, and a pipeline calls its parts only"
        hint = f"have the task's `stages` name {name} itself, or set `pipeline: 1`"
        found += [_problem(text.format(kind), hint) for kind in told]
    return found


def _problem(message: str, hint: str) -> Problem:
    return Problem(_WHERE, message, hint)


class _Before(nn.Module):
    """The model's first layer behind the whole model's forward pre-hooks."""

    def __init__(self, module: nn.Module, hooks: Sequence[Hook]) -> None:
        super().__init__()
        self.module, self._hooks = module, tuple(hooks)

    def forward(self, inputs: Tensor) -> Tensor:
        for hook in self._hooks:
            given = hook(_Elsewhere(self), (inputs,))
            if isinstance(given, tuple) and len(given) == 1:
                given = given[0]
            if given is not None:
                inputs = one_tensor("a forward pre-hook of the model", given)
        outputs: Tensor = self.module(inputs)
        return outputs


class _After(nn.Module):
    """The model's last layer before the whole model's forward hooks."""

    def __init__(self, module: nn.Module, hooks: Sequence[Hook]) -> None:
        super().__init__()
        self.module, self._hooks = module, tuple(hooks)

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.module(inputs)
        for hook in self._hooks:
            given = hook(_Elsewhere(self), _Elsewhere(), outputs)
            if given is not None:
                outputs = one_tensor("a forward hook of the model", given)
        return outputs


class _Elsewhere:
    """
    Stands for the whole model, or its inputs, where a rank has a part of them.

    Args:
        here: the rank's part of the model, which knows the mode; None: these are the inputs.
    """

    def __init__(self, here: nn.Module | None = None) -> None:
        self.__dict__["_here"] = here

    def __getattr__(self, name: str) -> Any:
        if name == "training" and self._here is not None:
            return self._here.training
        self._refuse(f"`{name}` of the whole model" if self._here is not None else "inputs")

    def __setattr__(self, name: str, value: object) -> None:
        self._refuse(f"`{name}` of the whole model, to write it" if self._here else "inputs")

    def __getitem__(self, index: object) -> Any:
        self._refuse("inputs" if self._here is None else "parts of the whole model")

    def __iter__(self) -> Any:
        self._refuse("inputs" if self._here is None else "parts of the whole model")

    def __len__(self) -> int:
        self._refuse("inputs" if self._here is None else "parts of the whole model")

    def __call__(self, *_: object) -> Any:
        self._refuse("a call of the whole model")

    def _refuse(self, what: str) -> NoReturn:
        text = f"a hook of the whole model asks for {what}, which no stage has"
        raise SpecError(_problem(text, "hang it on a layer, or set `pipeline: 1`"))
