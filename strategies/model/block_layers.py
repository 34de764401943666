"""
The layers of a model that calls a list of blocks one after the other.

    forward     embed, mask, rotary | block 0 | block 1 | ... | norm, head
    layers         BeforeBlocks         0         1             AfterBlocks

The model's own `forward` runs twice: in `BeforeBlocks` until it has called all blocks, and in
`AfterBlocks` from there. In each, placeholders replace the modules that the layer does not have. So
`forward` may be any Python code, as in Hugging Face's models; it is not traced.

1. `BeforeBlocks`: the placeholder of each block records its call's arguments. The first argument is
   the features tensor. The others (masks, rotary embeddings, settings) may differ between blocks.
2. `BlockLayer`: calls its block with the recorded arguments and the previous block's features.
3. `AfterBlocks`: the placeholder of the last block returns that block's outputs. Placeholders of
   modules before the blocks return NaN, which must not reach the result.

Layers pass a dictionary to the next layer. `calls` are the recorded arguments as JSON, in which
tensors are indices into `shared`:

    {"inputs": ..., "whole": false, "features": tensor, "shared": [mask, cos, sin],
     "calls": "[[[], {...}], ...]", "tied": []}

If a batch is not a pair (inputs, targets), the task's `forward` or `step` runs on the whole batch,
instead of the model's `forward` (`model_call.py`).

A module belongs to the side of the blocks on which it is registered, unless a trial call shows that
it is called on the other side (`pipeline/call_order.py`). A module without parameters and buffers,
such as dropout, is on both sides. A tensor used on both sides, such as the weight of an embedding
and its tied head, belongs to `BeforeBlocks`. It is passed on as `tied`, so that its gradient flows
back.

Before training, `hybrid` compares the outputs of the layers with those of the model.
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
    not_blocks_error,
    placeholder_outputs,
    refuse_nan,
)
from distplat.strategies.model.trials import Runner
from distplat.strategies.torch_compat import tree_leaves

CallOrder = Mapping[str, bool]
"""Modules that are called on the other side of the blocks than they are registered on: by name,
whether they are called after the blocks."""
Missing = tuple[dict[str, Any], str, int]
"""A module's `_parameters` or `_buffers`, the name of a missing tensor, its index among `tied`."""
CallArguments = tuple[Sequence[Any], Mapping[str, Any]]
"""Positional and keyword arguments."""


def block_modules(
    model: nn.Module, call: ModelCall, order: CallOrder | None
) -> list[nn.Module] | None:
    """
    Return the layers of a model, in order; None: the model has no list of blocks.

    Args:
        model: its forward calls all blocks one after the other.
        call: how the model is called.
        order: see `CallOrder`.
    """
    path_and_blocks = list_of_blocks(model)
    if path_and_blocks is None:
        return None
    path, blocks = path_and_blocks
    before, after, shared_tensors = _sides(model, path, order or {})
    first = {id(p) for module in before.values() for p in module.parameters()}
    of_both = [p for module in after.values() for p in module.parameters() if id(p) in first]
    tied = {id(tensor): tensor for tensor in (*of_both, *shared_tensors)}
    begin = _with_placeholders(model, path, after, {})
    end = _with_placeholders(model, path, before, tied)
    for clone in (begin, end):  # hooks of the whole model are called around its layers
        clone._forward_pre_hooks, clone._forward_hooks = OrderedDict(), OrderedDict()
    return [
        BeforeBlocks(begin, ancestors_of(begin, path), len(blocks), list(tied.values()), call),
        *(BlockLayer(block, n, last=block is blocks[-1]) for n, block in enumerate(blocks)),
        AfterBlocks(end, ancestors_of(end, path), _missing(model, end, [*tied]), call),
    ]


def number_of_blocks(model: nn.Module) -> int:
    """Return the number of blocks in a model's list; 0: the model has no list."""
    path_and_blocks = list_of_blocks(model)
    return len(path_and_blocks[1]) if path_and_blocks is not None else 0


def list_of_blocks(model: nn.Module) -> tuple[str, list[nn.Module]] | None:
    """
    Return the name of a model's list of blocks, and the blocks; None: the model has no list.

    The list is the `nn.ModuleList` with the most parameters among those of several modules of the
    same class.
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


def modules_around_blocks(model: nn.Module, path: str) -> Iterator[tuple[str, nn.Module, bool]]:
    """Yield the modules around a list: name, module, whether it is registered after the list."""
    parent, name = model, ""
    for step in path.split("."):
        after = False
        for own, child in parent.named_children():
            if own == step:
                after = True
            else:
                yield f"{name}{own}", child, after
        parent, name = parent.get_submodule(step), f"{name}{step}."


def _sides(
    model: nn.Module, path: str, order: CallOrder
) -> tuple[dict[int, nn.Module], dict[int, nn.Module], list[Tensor]]:
    """
    Assign modules to the sides of the blocks.

    Returns:
        The modules with state that are called before the blocks, and after them, by id; and the
        tensors of modules that contain the blocks, whose forward may use them on both sides.
    """
    before, after, shared_tensors = dict[int, nn.Module](), dict[int, nn.Module](), list[Tensor]()
    for name, child, registered_after in modules_around_blocks(model, path):
        if child.state_dict():
            (after if order.get(name, registered_after) else before)[id(child)] = child
    parent = model
    for step in path.split("."):
        shared_tensors += [*parent.parameters(recurse=False), *parent.buffers(recurse=False)]
        parent = parent.get_submodule(step)
    return before, after, shared_tensors


def _with_placeholders(
    model: nn.Module, path: str, absent: Mapping[int, nn.Module], tied: Mapping[int, Tensor]
) -> nn.Module:
    """
    Copy a model, sharing its modules, with placeholders for the blocks and absent modules.

    Args:
        model: the model, or one of its modules that contains the list of blocks.
        path: of the list, in the module.
        absent: by id, modules to replace by placeholders.
        tied: by id, tensors to leave out of the copy.
    """
    step, _, rest = path.partition(".")
    clone = _copy_without(model, tied)
    for name, child in model._modules.items():
        if name != step and child is not None:
            is_absent = id(child) in absent
            clone._modules[name] = (
                Placeholder(child) if is_absent else _without_tensors(child, tied)
            )
    inner = model.get_submodule(step)
    if rest:
        clone._modules[step] = _with_placeholders(inner, rest, absent, tied)
    else:
        blocks = (Placeholder(block, number=n) for n, block in enumerate(inner.children()))
        clone._modules[step] = nn.ModuleList(blocks)
    return clone


def _without_tensors(module: nn.Module, tied: Mapping[int, Tensor]) -> nn.Module:
    """Return a module without some tensors: itself if it has none of them, else a copy."""
    if not any(id(tensor) in tied for tensor in (*module.parameters(), *module.buffers())):
        return module
    clone = _copy_without(module, tied)
    for name, child in module._modules.items():
        clone._modules[name] = None if child is None else _without_tensors(child, tied)
    return clone


def _copy_without(module: nn.Module, tied: Mapping[int, Tensor]) -> nn.Module:
    """Copy a module, with the same children, without some of its own tensors."""
    clone = copy.copy(module)
    clone._modules = dict(module._modules)
    for attribute in ("_parameters", "_buffers"):
        tensors: dict[str, Tensor | None] = getattr(module, attribute)
        remaining = {name: None if id(t) in tied else t for name, t in tensors.items()}
        setattr(clone, attribute, remaining)
    return clone


def _missing(model: nn.Module, copied: nn.Module, tied: Sequence[int]) -> list[Missing]:
    """Return the places of tied tensors that are missing in a copy of the model."""
    numbers = {tensor_id: number for number, tensor_id in enumerate(tied)}
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
            continue  # inside a placeholder
        for tensors_by_name in (module._parameters, module._buffers):
            if id(tensor) in numbers and tensors_by_name.get(name, tensor) is None:
                missing.append((tensors_by_name, name, numbers[id(tensor)]))
    return missing


class BeforeBlocks(Runner):
    """
    A model up to its blocks.

    Args:
        model: with placeholders for its blocks, and for the modules after them.
        ancestors: see `ancestors_of`.
        blocks: number of blocks.
        tied: tensors that `AfterBlocks` also uses.
        call: how the model is called.
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
        # A separate object, so that the end of a trial does not restore the flag.
        self._form = SimpleNamespace(tuples=False)

    @override
    def external_objects(self) -> tuple[object, ...]:
        return self._call.holders

    @override
    def forward(self, inputs: Any) -> Any:
        """
        Return the first block's features, and the arguments of all blocks' calls.

        Raises:
            SpecError: the forward does not call each block, or an argument cannot be passed on.
        """
        calls = self._record_calls(inputs)
        shared: list[Tensor] = []
        encoded = [_encoded_call(*call, shared) for call in calls]
        whole = isinstance(inputs, Batch)
        return {
            "inputs": inputs.batch if whole else inputs,
            "whole": whole,
            "features": _call_features(*calls[0]),
            "shared": shared,
            "calls": json.dumps(encoded),
            "tied": list(self._tied),
        }

    def _record_calls(self, inputs: Any) -> list[CallArguments]:
        """Return the calls of all blocks; detect whether blocks return tensors or tuples."""
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
                raise first from None  # the user's own error, such as an id out of range
            raise not_blocks_error(f"its forward {first}") from None

    def _run(self, inputs: Any) -> list[CallArguments]:
        """Run forward until it has called all blocks; return their calls."""
        calls: list[CallArguments] = []
        modes = torch_modes()

        def record(_: int, *args: Any, **kwargs: Any) -> Any:
            if not calls and (changed := changed_modes(modes)):
                raise not_blocks_error(f"its blocks run inside of {changed}")
            calls.append((args, kwargs))
            features = _call_features(*calls[0])
            if _call_features(args, kwargs) is not features:
                raise BetweenBlocks(
                    f"computes something between blocks {len(calls) - 2} and the next"
                )
            if len(calls) == self._blocks:
                raise AllCalled
            return (features,) if self._form.tuples else features

        with check_unwritten(self._ancestors):
            try:
                with placeholder_outputs(self.model, record, None):
                    self._call.of_part(self.model, inputs)
            except AllCalled:
                return calls
        raise not_blocks_error(f"its forward calls {len(calls)} of {self._blocks} blocks")


class BlockLayer(nn.Module):
    """
    A single block.

    Args:
        block: takes features as its first argument; returns them, or a tuple that starts with them.
        number: of the block.
        last: whether it is the last block.
    """

    def __init__(self, block: nn.Module, number: int, *, last: bool) -> None:
        super().__init__()
        self.block, self._number, self._last = block, number, last

    @override
    def forward(self, value: Any) -> Any:
        """Return the inputs of the next layer: features, or the last block's outputs."""
        args, kwargs = _parsed(value["calls"])[self._number]
        tensors = value["features"], value["shared"]
        outputs = self.block(
            *(_decoded(arg, *tensors) for arg in args),
            **{name: _decoded(arg, *tensors) for name, arg in kwargs.items()},
        )
        if self._last:
            passed_on = {name: value[name] for name in ("inputs", "whole", "tied")}
            return {**passed_on, "outputs": outputs}
        return {**value, "features": _features(outputs)}


class AfterBlocks(Runner):
    """
    A model from its last block on.

    Args:
        model: with placeholders for its blocks, and for the modules before them.
        ancestors: see `ancestors_of`.
        missing: places of missing tied parameters.
        call: how the model is called.
    """

    def __init__(
        self, model: nn.Module, ancestors: Ancestors, missing: Sequence[Missing], call: ModelCall
    ) -> None:
        super().__init__()
        self.model, self._missing, self._call = model, tuple(missing), call
        self._ancestors, self._last = tuple(ancestors), 0
        self._checks_nan = True  #: in the first micro-batch
        for module in model.modules():
            if isinstance(module, Placeholder) and module.number is not None:
                module.called_before, self._last = True, max(self._last, module.number)

    @override
    def external_objects(self) -> tuple[object, ...]:
        return self._call.holders

    @override
    def forward(self, value: Any) -> Any:
        """Return the model's outputs."""
        outputs = value["outputs"]
        features = _features(outputs)
        before, others = features.new_full(features.shape, math.nan), nan_like(outputs)

        def block_outputs(number: int, *args: Any, **kwargs: Any) -> Any:
            return outputs if number == self._last else others

        try:
            for tensors_by_name, name, number in self._missing:
                tensors_by_name[name] = value["tied"][number]
            inputs = Batch(value["inputs"]) if value["whole"] else value["inputs"]
            with (
                check_unwritten(self._ancestors),
                placeholder_outputs(self.model, block_outputs, before),
            ):
                result = self._call.of_part(self.model, inputs)
        finally:
            for tensors_by_name, name, _ in self._missing:
                tensors_by_name[name] = None
        if self.training and self._checks_nan:
            self._checks_nan = False
            refuse_nan(features, result)
        return result


def _generators(inputs: Any) -> list[tuple[torch.Generator, Tensor]]:
    """Return torch's generators that a forward on these inputs may use, with their states."""
    cuda = {leaf.device.index for leaf in tree_leaves(inputs) if getattr(leaf, "is_cuda", False)}
    generators = [
        torch.default_generator,
        *(torch.cuda.default_generators[n] for n in sorted(cuda)),
    ]
    return [(generator, generator.get_state()) for generator in generators]


def _call_features(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    """Return the features of a block's call: its first argument."""
    first = args[0] if args else next(iter(kwargs.values()), None)
    return _features(first)


def _features(outputs: Any) -> Tensor:
    """Return the features in a block's outputs: a tensor, or a tuple that starts with them."""
    features = outputs[0] if isinstance(outputs, tuple | list) and outputs else outputs
    if not isinstance(features, Tensor):
        raise not_blocks_error(
            f"its blocks take or give {type(features).__name__} for a tensor of features"
        )
    return features


def _encoded_call(args: Sequence[Any], kwargs: Mapping[str, Any], shared: list[Tensor]) -> Any:
    """Return the arguments of a call as JSON values; append new tensors to `shared`."""
    features = _call_features(args, kwargs)
    encoded = [_encoded(arg, f"argument {n}", features, shared) for n, arg in enumerate(args)]
    return [encoded, {name: _encoded(arg, name, features, shared) for name, arg in kwargs.items()}]


def _encoded(tree: Any, where: str, features: Tensor, shared: list[Tensor]) -> Any:
    if tree is features:
        return {"features": 0}
    if isinstance(tree, Tensor):
        numbers = [n for n, tensor in enumerate(shared) if tensor is tree]
        if not numbers:
            shared.append(tree)
        return {"shared": numbers[0] if numbers else len(shared) - 1}
    if isinstance(tree, list | dict) and not tree:
        raise not_blocks_error(
            f"its blocks are called with {where}, an empty container, which they may fill"
        )
    if isinstance(tree, tuple | list):
        kind = "tuple" if isinstance(tree, tuple) else "list"
        return {kind: [_encoded(item, where, features, shared) for item in tree]}
    if isinstance(tree, dict) and all(isinstance(key, str) for key in tree):
        items = {key: _encoded(item, where, features, shared) for key, item in tree.items()}
        return {"dict": items}
    if tree is None or type(tree) in (bool, int, float, str):
        return tree
    if type(tree).__name__.endswith("Cache"):
        return None  # Hugging Face's key-value caches are empty at the start of a forward
    raise not_blocks_error(
        f"its blocks are called with {where}, a {type(tree).__name__}, and stages hand on"
        " tensors and constants"
    )


def _decoded(encoded: Any, features: Tensor, shared: Sequence[Tensor]) -> Any:
    if not isinstance(encoded, dict):
        return encoded
    ((kind, content),) = encoded.items()
    if kind == "features":
        return features
    if kind == "shared":
        return shared[content]
    if kind == "dict":
        return {key: _decoded(item, features, shared) for key, item in content.items()}
    items = [_decoded(item, features, shared) for item in content]
    return tuple(items) if kind == "tuple" else items


@lru_cache(maxsize=64)
def _parsed(text: str) -> list[Any]:
    """Parse the calls that `BeforeBlocks` encoded; equal for all micro-batches of a size."""
    calls: list[Any] = json.loads(text)
    return calls
