"""Stand-ins for the parts of a model that a stage has not, while its forward runs there."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from distplat.platform.errors import Problem, SpecError
from distplat.strategies.torch_compat import tree_leaves, tree_map


class AllCalled(BaseException):
    """All blocks are called; no `except Exception` of the model's is to catch it."""


class BetweenBlocks(BaseException):
    """A block is called with something else than what the one before has given."""


class Placeholder(nn.Module):
    """
    Stands for a module that is not called.

    Args:
        module: whose attributes may be asked for, such as a block's `attention_type` or the type of
            an embedding's weight; kept without values.
        number: of the block that it is; None: it is something else.
    """

    def __init__(self, module: nn.Module, *, number: int | None = None) -> None:
        super().__init__()
        self.number = number
        self.is_behind = False  #: it is a block, and has been called
        self.answer: Callable[..., Any] = _not_called
        tensors = (*module.parameters(), *module.buffers())
        empty = {id(one): torch.empty_like(one, device="meta") for one in tensors}
        # In a tuple, so that it is no module of this one, and has no name in it.
        self._like = (copy.deepcopy(module, cast(dict[int, Any], empty)),)

    def __getattr__(self, name: str) -> Any:
        """
        Give an attribute of the module that it stands for.

        Raises:
            SpecError: it may be what the block's forward has left, such as `aux_loss`.
        """
        attribute = getattr(self.__dict__["_like"][0], name)
        if self.__dict__["is_behind"] and (
            attribute is None or isinstance(attribute, float | Tensor)
        ):
            raise no_blocks(
                f"behind its blocks its forward reads what they may have kept, `{name}`"
            )
        return attribute

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Answer as it is told to."""
        return self.answer(*args, **kwargs)


def _not_called(*args: Any, **kwargs: Any) -> Any:
    text = "its forward goes on before all blocks are called, or its parts are in another order"
    raise no_blocks(text)


@contextmanager
def with_answers(model: nn.Module, block: Callable[..., Any], other: Any) -> Iterator[None]:
    """
    Have a model's stand-ins answer: those of blocks by a call, others with a value.

    Args:
        model: with stand-ins.
        block: gets the number of a block, and what that is called with.
        other: None: others are not to be called.

    Raises:
        SpecError: blocks are called in another order than they are listed in, or once more.
    """
    stand_ins = [one for one in model.modules() if isinstance(one, Placeholder)]
    called: list[int] = []

    def in_turn(number: int, *args: Any, **kwargs: Any) -> Any:
        if number != len(called):
            text = "its forward calls blocks in another order than they are listed in, or again"
            raise no_blocks(text)
        called.append(number)
        return block(number, *args, **kwargs)

    try:
        for one in stand_ins:
            if one.number is not None:
                one.answer = partial(in_turn, one.number)
            elif other is not None:
                one.answer = lambda *args, **kwargs: other
        yield
    finally:
        for one in stand_ins:
            one.answer = _not_called


Ancestors = Sequence[tuple[str, nn.Module]]
"""The modules that have the blocks inside, with the beginnings of their tensors' names."""


def ancestors_of(model: nn.Module, path: str) -> Ancestors:
    """Give a model and what it has on the way to the list of this name."""
    ancestors, prefix = [], ""
    for step in path.split("."):
        ancestors.append((prefix, model))
        model, prefix = model.get_submodule(step), f"{prefix}{step}."
    return ancestors


@contextmanager
def check_unwritten(ancestors: Ancestors) -> Iterator[None]:
    """
    See that a forward writes no tensor of the modules that have the blocks inside.

    Raises:
        SpecError: it does; two stages run it, each with a copy.
    """
    before = _own_tensors(ancestors)
    yield
    now = _own_tensors(ancestors)
    for name, (tensor, version) in before.items():
        if name not in now or now[name][0] is not tensor or now[name][1] != version:
            raise no_blocks(f"its forward writes `{name}`, and two stages run it")


def _own_tensors(ancestors: Ancestors) -> dict[str, tuple[Tensor, int]]:
    held = [(path, {**parent._parameters, **parent._buffers}) for path, parent in ancestors]
    return {
        f"{path}{name}": (tensor, tensor._version)
        for path, tensors in held
        for name, tensor in tensors.items()
        if tensor is not None
    }


def nan_like(outputs: Any) -> Any:
    """Give what has the form of a block's outputs, and is not a number: whoever uses it notices."""

    def one(value: Any) -> Any:
        floats = isinstance(value, Tensor) and value.is_floating_point()
        return torch.full_like(value, math.nan) if floats else value

    return tree_map(one, outputs)


def refuse_nan(features: Tensor, outputs: Any) -> None:
    """
    See that a model's outputs are numbers where what its last block gave is.

    Raises:
        SpecError: they come of what only other stages have, see `nan_like`.
    """
    floats = [one for one in tree_leaves(outputs) if isinstance(one, Tensor)]
    if bool(features.isnan().any()) or not any(map(_is_lost, floats)):
        return
    text = "in training its forward uses behind the blocks what comes before them, or what another "
    raise no_blocks(f"{text}than the last one has given")


def _is_lost(tensor: Tensor) -> bool:
    """On `meta` is what comes of a stand-in's weights."""
    return tensor.is_meta or bool(tensor.isnan().any())


def no_blocks(text: str) -> SpecError:
    """Give the error of a model that is not one of blocks, and why it is not."""
    hint = "give the task a `stages(model)` that lists the parts in order"
    return SpecError(Problem(("strategy", "cut"), f"the model is not one of blocks: {text}", hint))
