"""Placeholders for modules that a stage lacks, while the model's forward runs there."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from typing_extensions import override

from distplat.platform.errors import Problem, SpecError
from distplat.strategies.torch_compat import tree_leaves, tree_map


class AllCalled(BaseException):
    """All blocks were called; an `except Exception` in the model must not catch it."""


class BetweenBlocks(BaseException):
    """A block was called with other features than the previous block returned."""


class Placeholder(nn.Module):
    """
    Replaces a module that is not computed on this stage.

    Args:
        module: its attributes stay readable, such as a block's `attention_type` or the dtype of an
            embedding's weight; its tensors are copied to `meta`.
        number: of the block; None: the module is no block.
    """

    def __init__(self, module: nn.Module, *, number: int | None = None) -> None:
        super().__init__()
        self.number = number
        self.called_before = False  #: the module is a block that an earlier stage has called
        self._handler: Callable[..., Any] = _not_called
        tensors = (*module.parameters(), *module.buffers())
        empty = {id(tensor): torch.empty_like(tensor, device="meta") for tensor in tensors}
        # A tuple, so that the copy is not registered as a child.
        self._original = (copy.deepcopy(module, cast(dict[int, Any], empty)),)

    @override
    def __getattr__(self, name: str) -> Any:
        """
        Return an attribute of the replaced module.

        Raises:
            SpecError: the block's forward may have written the attribute, such as `aux_loss`.
        """
        attribute = getattr(self.__dict__["_original"][0], name)
        if self.__dict__["called_before"] and (
            attribute is None or isinstance(attribute, float | Tensor)
        ):
            raise not_blocks_error(
                f"behind its blocks its forward reads what they may have kept, `{name}`"
            )
        return attribute

    @override
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the outputs of the handler set by `placeholder_outputs`."""
        return self._handler(*args, **kwargs)


def _not_called(*args: Any, **kwargs: Any) -> Any:
    text = "its forward goes on before all blocks are called, or its parts are in another order"
    raise not_blocks_error(text)


@contextmanager
def placeholder_outputs(model: nn.Module, block: Callable[..., Any], other: Any) -> Iterator[None]:
    """
    Set the outputs of a model's placeholders.

    Args:
        model: with placeholders.
        block: returns a block's outputs; gets its number and the arguments of the call.
        other: outputs of the other placeholders; None: they must not be called.

    Raises:
        SpecError: blocks are called out of the list's order, or more than once.
    """
    placeholders = [module for module in model.modules() if isinstance(module, Placeholder)]
    called: list[int] = []

    def in_turn(number: int, *args: Any, **kwargs: Any) -> Any:
        if number != len(called):
            text = "its forward calls blocks in another order than they are listed in, or again"
            raise not_blocks_error(text)
        called.append(number)
        return block(number, *args, **kwargs)

    try:
        for placeholder in placeholders:
            if placeholder.number is not None:
                placeholder._handler = partial(in_turn, placeholder.number)
            elif other is not None:
                placeholder._handler = lambda *args, **kwargs: other
        yield
    finally:
        for placeholder in placeholders:
            placeholder._handler = _not_called


Ancestors = Sequence[tuple[str, nn.Module]]
"""The modules that contain the blocks, with the prefixes of their tensors' names."""


def ancestors_of(model: nn.Module, path: str) -> Ancestors:
    """Return a model and its modules on the path to the list of blocks."""
    ancestors, prefix = [], ""
    for step in path.split("."):
        ancestors.append((prefix, model))
        model, prefix = model.get_submodule(step), f"{prefix}{step}."
    return ancestors


@contextmanager
def check_unwritten(ancestors: Ancestors) -> Iterator[None]:
    """
    Check that a forward writes no tensor of the modules that contain the blocks.

    Raises:
        SpecError: the forward writes one; two stages run it, each on its own copy.
    """
    before = _own_tensors(ancestors)
    yield
    now = _own_tensors(ancestors)
    for name, (tensor, version) in before.items():
        if name not in now or now[name][0] is not tensor or now[name][1] != version:
            raise not_blocks_error(f"its forward writes `{name}`, and two stages run it")


def _own_tensors(ancestors: Ancestors) -> dict[str, tuple[Tensor, int]]:
    tensors_by_path = [(path, {**m._parameters, **m._buffers}) for path, m in ancestors]
    return {
        f"{path}{name}": (tensor, tensor._version)
        for path, tensors in tensors_by_path
        for name, tensor in tensors.items()
        if tensor is not None
    }


def nan_like(outputs: Any) -> Any:
    """Return a block's outputs with all floats replaced by NaN, to detect their use."""

    def to_nan(value: Any) -> Any:
        is_float = isinstance(value, Tensor) and value.is_floating_point()
        return torch.full_like(value, math.nan) if is_float else value

    return tree_map(to_nan, outputs)


def refuse_nan(features: Tensor, outputs: Any) -> None:
    """
    Check that a model's outputs are not NaN if its last block's features are not.

    Raises:
        SpecError: the outputs depend on values of other stages, see `nan_like`.
    """
    tensors = [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]
    if bool(features.isnan().any()) or not any(map(_is_invalid, tensors)):
        return
    text = "in training its forward uses behind the blocks what comes before them, or what another "
    raise not_blocks_error(f"{text}than the last one has given")


def _is_invalid(tensor: Tensor) -> bool:
    """Return whether a tensor has NaN, or is on `meta` and so from a placeholder's weights."""
    return tensor.is_meta or bool(tensor.isnan().any())


def not_blocks_error(text: str) -> SpecError:
    """Return the error for a model that does not consist of blocks."""
    hint = "give the task a `stages(model)` that lists the parts in order"
    return SpecError(Problem(("strategy", "cut"), f"the model is not one of blocks: {text}", hint))
