"""
The layers of a model that calls a list of blocks one after the other.

    forward     embed, mask, rotary | block 0 | block 1 | ... | norm, head
    layers         BeforeBlocks         0         1             AfterBlocks

The model's own `forward` runs twice: in `BeforeBlocks` until it has called all blocks, and in
`AfterBlocks` from there. In each, stand-ins take the place of the modules that the layer does not
have. So `forward` may be any Python, as that of Hugging Face's models is; it is not traced.

1. `BeforeBlocks`: the stand-in of each block records the arguments that it is called with. The
   first argument are the features. The others (masks, rotary embeddings, settings) may differ
   between blocks.
2. `BlockLayer`: calls its block with the recorded arguments, and with the features that the block
   before has given.
3. `AfterBlocks`: the stand-in of the last block gives what that block gave. Those of modules before
   the blocks give NaN, which must not reach the result.

Layers hand on a dictionary. `calls` are the recorded arguments as JSON, in which tensors are
numbers of `shared`:

    {"inputs": ..., "whole": false, "features": tensor, "shared": [mask, cos, sin],
     "calls": "[[[], {...}], ...]", "tied": []}

Where a batch is no pair (inputs, targets), the task's `forward` or `step` runs in place of the
model's, on the whole batch (`model_call.py`).

A module belongs to the side of the blocks on which it is registered, unless a trial has shown that
it is called on the other (`pipeline/call_order.py`). A module without parameters and state, such as
dropout, is on both sides. A tensor of both sides, such as the weight of an embedding and its tied
head, belongs to `BeforeBlocks`. It is handed on as `tied`, and its gradient comes back that way.

`hybrid` compares the layers of every model with the model before it trains them.
"""

from __future__ import annotations

import copy
import json
import math
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from distplat.platform.errors import SpecError
from distplat.strategies.model.model_call import Batch, ModelCall, changed_modes, torch_modes
from distplat.strategies.model.placeholders import (
    AllCalled,
    Ancestors,
    BetweenBlocks,
    Placeholder,
    ancestors_of,
    check_unwritten,
    nan_like,
    no_blocks,
    refuse_nan,
    with_answers,
)
from distplat.strategies.model.trials import Runner
from distplat.strategies.torch_compat import tree_leaves

CallOrder = Mapping[str, bool]
"""Modules beside the blocks that are called on the other side than they are registered on: by name,
whether that is behind the blocks."""
Missing = tuple[dict[str, Any], str, int]
"""A module's parameters or buffers, the name of a missing one, and its number among the tied."""
CallArguments = tuple[Sequence[Any], Mapping[str, Any]]
"""Positional arguments, and those by name."""


def block_modules(
    model: nn.Module, call: ModelCall, order: CallOrder | None
) -> list[nn.Module] | None:
    """
    Give the layers of a model, in order; None where it has no list of blocks.

    Args:
        model: whose forward calls all blocks one after the other.
        call: how it is called.
        order: see `CallOrder`.
    """
    path_and_blocks = list_of_blocks(model)
    if path_and_blocks is None:
        return None
    path, blocks = path_and_blocks
    before, after, anywhere = _sides(model, path, order or {})
    first = {id(p) for one in before.values() for p in one.parameters()}
    of_both = [p for one in after.values() for p in one.parameters() if id(p) in first]
    tied = {id(one): one for one in (*of_both, *anywhere)}
    begin = _with_stand_ins(model, path, after, {})
    end = _with_stand_ins(model, path, before, tied)
    for one in (begin, end):  # hooks of the whole model are called around its layers
        one._forward_pre_hooks, one._forward_hooks = OrderedDict(), OrderedDict()
    return [
        BeforeBlocks(begin, ancestors_of(begin, path), len(blocks), list(tied.values()), call),
        *(BlockLayer(one, n, last=one is blocks[-1]) for n, one in enumerate(blocks)),
        AfterBlocks(end, ancestors_of(end, path), _missing(model, end, [*tied]), call),
    ]


def number_of_blocks(model: nn.Module) -> int:
    """Give the number of blocks in a model's list; 0: it has none."""
    path_and_blocks = list_of_blocks(model)
    return len(path_and_blocks[1]) if path_and_blocks is not None else 0


def list_of_blocks(model: nn.Module) -> tuple[str, list[nn.Module]] | None:
    """
    Give the name of a model's list of blocks, and the blocks; None: it has none.

    The list is the `nn.ModuleList` of several modules of one class that has the most elements.
    """
    best, largest = None, 0
    for path, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or len(module) < 2:
            continue
        if len({type(block) for block in module}) > 1 or len({*map(id, module)}) < len(module):
            continue
        size = sum(parameter.numel() for parameter in module.parameters())
        if size > largest:
            best, largest = (path, list(module)), size
    return best


def beside_blocks(model: nn.Module, path: str) -> Iterator[tuple[str, nn.Module, bool]]:
    """Give the modules beside a list: name, module, whether it is registered behind the list."""
    parent, name = model, ""
    for step in path.split("."):
        behind = False
        for own, child in parent.named_children():
            if own == step:
                behind = True
            else:
                yield f"{name}{own}", child, behind
        parent, name = parent.get_submodule(step), f"{name}{step}."


def _sides(
    model: nn.Module, path: str, order: CallOrder
) -> tuple[dict[int, nn.Module], dict[int, nn.Module], list[Tensor]]:
    """
    Say what belongs to which side of the blocks.

    Returns:
        The modules with state that are called before the blocks, and after them, by id. And the
        tensors of modules around the blocks, whose forward may use them on both sides.
    """
    before, after, anywhere = dict[int, nn.Module](), dict[int, nn.Module](), list[Tensor]()
    for name, child, behind in beside_blocks(model, path):
        if child.state_dict():
            (after if order.get(name, behind) else before)[id(child)] = child
    parent = model
    for step in path.split("."):
        anywhere += [*parent.parameters(recurse=False), *parent.buffers(recurse=False)]
        parent = parent.get_submodule(step)
    return before, after, anywhere


def _with_stand_ins(
    model: nn.Module, path: str, absent: Mapping[int, nn.Module], tied: Mapping[int, Tensor]
) -> nn.Module:
    """
    Copy a model around its own modules, with stand-ins for the blocks and for some modules.

    Args:
        model: or a module of it, that the list of blocks is in.
        path: of the list, in the module.
        absent: by id, modules that get a stand-in.
        tied: by id, tensors that the copy does not have.
    """
    step, _, rest = path.partition(".")
    clone = _copy_without(model, tied)
    for name, child in model._modules.items():
        if name != step and child is not None:
            stands_in = id(child) in absent
            clone._modules[name] = Placeholder(child) if stands_in else _lacking(child, tied)
    inner = model.get_submodule(step)
    if rest:
        clone._modules[step] = _with_stand_ins(inner, rest, absent, tied)
    else:
        blocks = (Placeholder(block, number=n) for n, block in enumerate(inner.children()))
        clone._modules[step] = nn.ModuleList(blocks)
    return clone


def _lacking(module: nn.Module, tied: Mapping[int, Tensor]) -> nn.Module:
    """Give a module without some tensors: itself where it has none of them, else a copy."""
    if not any(id(one) in tied for one in (*module.parameters(), *module.buffers())):
        return module
    clone = _copy_without(module, tied)
    for name, child in module._modules.items():
        clone._modules[name] = None if child is None else _lacking(child, tied)
    return clone


def _copy_without(module: nn.Module, tied: Mapping[int, Tensor]) -> nn.Module:
    """Copy a module, with the same children, without some of its own tensors."""
    clone = copy.copy(module)
    clone._modules = dict(module._modules)
    for kind in ("_parameters", "_buffers"):
        held: dict[str, Tensor | None] = getattr(module, kind)
        kept = {name: None if id(one) in tied else one for name, one in held.items()}
        setattr(clone, kind, kept)
    return clone


def _missing(model: nn.Module, copied: nn.Module, tied: Sequence[int]) -> list[Missing]:
    """Say where in a copy of the model which of the tied tensors are missing."""
    numbers = {one: number for number, one in enumerate(tied)}
    missing = []
    tensors = (
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    )
    for path, tensor in tensors:
        parent, _, name = path.rpartition(".")
        try:
            module = copied.get_submodule(parent)
        except AttributeError:
            continue  # inside of a stand-in
        for held in (module._parameters, module._buffers):
            if id(tensor) in numbers and name in held and held[name] is None:
                missing.append((held, name, numbers[id(tensor)]))
    return missing


class BeforeBlocks(Runner):
    """
    A model up to its blocks.

    Args:
        model: with stand-ins for its blocks, and for the modules after them.
        ancestors: see `ancestors_of`.
        blocks: number of blocks.
        tied: tensors of it that `AfterBlocks` needs, too.
        call: how it is called.
    """

    def __init__(
        self,
        model: nn.Module,
        ancestors: Ancestors,
        blocks: int,
        tied: Sequence[Tensor],
        call: ModelCall,
    ) -> None:
        super().__init__()
        self.model, self._blocks, self._tied, self._call = model, blocks, tuple(tied), call
        self._ancestors = tuple(ancestors)
        # An object, so that what a trial has found out is not put back.
        self._form = SimpleNamespace(tuples=False)

    @override
    def beside(self) -> tuple[object, ...]:
        return self._call.holders

    def forward(self, inputs: Any) -> Any:
        """
        Give what the first block takes, and what all are called with.

        Raises:
            SpecError: it does not call each block, or with something that cannot be handed on.
        """
        calls = self._recorded(inputs)
        shared: list[Tensor] = []
        encoded = [_encoded_call(*call, shared) for call in calls]
        whole = isinstance(inputs, Batch)
        return {
            "inputs": inputs.batch if whole else inputs,
            "whole": whole,
            "features": _features_of_call(*calls[0]),
            "shared": shared,
            "calls": json.dumps(encoded),
            "tied": list(self._tied),
        }

    def _recorded(self, inputs: Any) -> list[CallArguments]:
        """Give the calls of all blocks; find out first whether blocks give tensors or tuples."""
        states = _generators(inputs)
        try:
            return self._run(inputs)
        except SpecError:
            raise
        except (BetweenBlocks, Exception) as error:
            first = error
        for generator, state in states:
            generator.set_state(state)
        self._form.tuples = not self._form.tuples
        try:
            return self._run(inputs)
        except (BetweenBlocks, Exception):
            self._form.tuples = not self._form.tuples
            if isinstance(first, Exception):
                raise first from None  # of the user's own: a sample that the embedding has not
            raise no_blocks(f"its forward {first}") from None

    def _run(self, inputs: Any) -> list[CallArguments]:
        """Run forward until it has called all blocks."""
        calls: list[CallArguments] = []
        modes = torch_modes()

        def record(_: int, *args: Any, **kwargs: Any) -> Any:
            if not calls and (changed := changed_modes(modes)):
                raise no_blocks(f"its blocks run inside of {changed}")
            calls.append((args, kwargs))
            features = _features_of_call(*calls[0])
            if _features_of_call(args, kwargs) is not features:
                raise BetweenBlocks(
                    f"computes something between blocks {len(calls) - 2} and the next"
                )
            if len(calls) == self._blocks:
                raise AllCalled
            return (features,) if self._form.tuples else features

        with check_unwritten(self._ancestors):
            try:
                with with_answers(self.model, record, None):
                    self._call.of_part(self.model, inputs)
            except AllCalled:
                return calls
        raise no_blocks(f"its forward calls {len(calls)} of {self._blocks} blocks")


class BlockLayer(nn.Module):
    """
    One block.

    Args:
        block: takes features as its first argument; gives them, or a tuple that begins with them.
        number: of the block.
        last: no block comes behind it.
    """

    def __init__(self, block: nn.Module, number: int, *, last: bool) -> None:
        super().__init__()
        self.block, self._number, self._last = block, number, last

    def forward(self, value: Any) -> Any:
        """Give what the next block takes, or what the last one gave."""
        args, kwargs = _parsed(value["calls"])[self._number]
        tensors = value["features"], value["shared"]
        outputs = self.block(
            *(_decoded(one, *tensors) for one in args),
            **{name: _decoded(one, *tensors) for name, one in kwargs.items()},
        )
        if self._last:
            kept = {name: value[name] for name in ("inputs", "whole", "tied")}
            return {**kept, "outputs": outputs}
        return {**value, "features": _features(outputs)}


class AfterBlocks(Runner):
    """
    A model from its last block on.

    Args:
        model: with stand-ins for its blocks, and for the modules before them.
        ancestors: see `ancestors_of`.
        missing: where tied parameters are missing.
        call: how it is called.
    """

    def __init__(
        self, model: nn.Module, ancestors: Ancestors, missing: Sequence[Missing], call: ModelCall
    ) -> None:
        super().__init__()
        self.model, self._missing, self._call = model, tuple(missing), call
        self._ancestors, self._last = tuple(ancestors), 0
        self._looks = True  #: in the first micro-batch
        for one in model.modules():
            if isinstance(one, Placeholder) and one.number is not None:
                one.is_behind, self._last = True, max(self._last, one.number)

    @override
    def beside(self) -> tuple[object, ...]:
        return self._call.holders

    def forward(self, value: Any) -> Any:
        """Give what the model gives."""
        outputs = value["outputs"]
        features = _features(outputs)
        before, others = features.new_full(features.shape, math.nan), nan_like(outputs)

        def given(number: int, *args: Any, **kwargs: Any) -> Any:
            return outputs if number == self._last else others

        try:
            for held, name, number in self._missing:
                held[name] = value["tied"][number]
            inputs = Batch(value["inputs"]) if value["whole"] else value["inputs"]
            with check_unwritten(self._ancestors), with_answers(self.model, given, before):
                result = self._call.of_part(self.model, inputs)
        finally:
            for held, name, _ in self._missing:
                held[name] = None
        if self.training and self._looks:
            self._looks = False
            refuse_nan(features, result)
        return result


def _generators(inputs: Any) -> list[tuple[torch.Generator, Tensor]]:
    """Give torch's generators that a forward on these inputs may draw from, with their states."""
    cuda = {one.device.index for one in tree_leaves(inputs) if getattr(one, "is_cuda", False)}
    generators = [
        torch.default_generator,
        *(torch.cuda.default_generators[n] for n in sorted(cuda)),
    ]
    return [(generator, generator.get_state()) for generator in generators]


def _features_of_call(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    """Give the first argument of a block's call."""
    first = args[0] if args else next(iter(kwargs.values()), None)
    return _features(first)


def _features(outputs: Any) -> Tensor:
    """Give the features of what a block gave: a tensor, or a tuple that begins with them."""
    features = outputs[0] if isinstance(outputs, tuple | list) and outputs else outputs
    if not isinstance(features, Tensor):
        raise no_blocks(
            f"its blocks take or give {type(features).__name__} for a tensor of features"
        )
    return features


def _encoded_call(args: Sequence[Any], kwargs: Mapping[str, Any], shared: list[Tensor]) -> Any:
    """Give the arguments of a call as JSON takes them; `shared` takes the tensors, each once."""
    features = _features_of_call(args, kwargs)
    encoded = [_encoded(one, f"argument {n}", features, shared) for n, one in enumerate(args)]
    return [encoded, {name: _encoded(one, name, features, shared) for name, one in kwargs.items()}]


def _encoded(tree: Any, where: str, features: Tensor, shared: list[Tensor]) -> Any:
    if tree is features:
        return {"features": 0}
    if isinstance(tree, Tensor):
        numbers = [n for n, one in enumerate(shared) if one is tree]
        if not numbers:
            shared.append(tree)
        return {"shared": numbers[0] if numbers else len(shared) - 1}
    if isinstance(tree, list | dict) and not tree:
        raise no_blocks(
            f"its blocks are called with {where}, an empty container, which they may fill"
        )
    if isinstance(tree, tuple | list):
        kind = "tuple" if isinstance(tree, tuple) else "list"
        return {kind: [_encoded(one, where, features, shared) for one in tree]}
    if isinstance(tree, dict) and all(isinstance(key, str) for key in tree):
        return {"dict": {key: _encoded(one, where, features, shared) for key, one in tree.items()}}
    if tree is None or type(tree) in (bool, int, float, str):
        return tree
    if type(tree).__name__.endswith("Cache"):
        return None  # Hugging Face's caches of keys and values are empty when a forward begins
    raise no_blocks(
        f"its blocks are called with {where}, a {type(tree).__name__}, and stages hand on"
        " tensors and constants"
    )


def _decoded(encoded: Any, features: Tensor, shared: Sequence[Tensor]) -> Any:
    if not isinstance(encoded, dict):
        return encoded
    ((kind, held),) = encoded.items()
    if kind == "features":
        return features
    if kind == "shared":
        return shared[held]
    if kind == "dict":
        return {key: _decoded(one, features, shared) for key, one in held.items()}
    items = [_decoded(one, features, shared) for one in held]
    return tuple(items) if kind == "tuple" else items


@lru_cache(maxsize=64)
def _parsed(text: str) -> list[Any]:
    """Read the calls that `BeforeBlocks` has written; equal for all micro-batches of a size."""
    calls: list[Any] = json.loads(text)
    return calls
