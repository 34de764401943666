"""
A model that calls a list of blocks, as layers: its own forward runs up to them, and on from them.

    forward     embed, mask, rotary | block 0 | block 1 | ... | norm, head
    layers         BeforeBlocks         0         1             AfterBlocks

No trace is needed: `forward` may be any Python, as that of Hugging Face's models is. `BeforeBlocks`
runs it with stand-ins for the blocks, which note with what they are called: features first, then
masks, rotary embeddings and settings, which may differ between blocks. All that is handed on, and
each block is called so, with the features that the one before has given. `AfterBlocks` runs forward
once more, with blocks that give what the last one gave, and stand-ins for what comes before them.

    {"inputs": ..., "whole": false, "features": tensor, "shared": [mask, cos, sin],
     "calls": "[[[], {...}], ...]", "tied": []}

Where a batch is no pair (inputs, targets), it is the task's `forward` or `step` that runs up to the
blocks, and on from them, on the whole batch (`model_call.py`).

What of a model is called before its blocks is what is registered before them, unless a trial has
shown another order (`pipeline/call_order.py`). Modules without parameters and state, such as
dropout or rotary embeddings, are on both sides. A tensor that both sides have, as a head does that
is tied to the embedding, or that forward may use anywhere, belongs to the first: it is handed on as
`tied`, and its gradient comes back the same way.

Whether a model can be had so is seen by a trial, which `hybrid` makes in any case: layers must
give what the model gives.
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
from distplat.strategies.model.stand_ins import (
    Between,
    Called,
    Homes,
    StandIn,
    answering,
    homes_of,
    lost,
    refuse_lost,
    unfit,
    unwritten,
)
from distplat.strategies.model.trials import Runner
from distplat.strategies.torch_compat import tree_leaves

Order = Mapping[str, bool]
"""By the name of a part beside the blocks: whether it is called behind them, for parts that are
registered elsewhere."""


def block_modules(
    model: nn.Module, call: ModelCall, order: Order | None = None
) -> list[nn.Module] | None:
    """
    Give modules that make up a model, in order; None where it has no list of blocks.

    The list is the model's largest `nn.ModuleList` of blocks of one class.

    Args:
        model: whose forward calls all blocks one after the other.
        call: how it is called.
        order: of its parts, where it is not that of their registration.
    """
    found = list_of_blocks(model)
    if found is None:
        return None
    path, blocks = found
    before, after, both = _sides(model, path, order or {})
    first = {id(p) for one in before.values() for p in one.parameters()}
    of_both = [p for one in after.values() for p in one.parameters() if id(p) in first]
    tied = {id(one): one for one in (*of_both, *both)}
    behind = _without(model, path, before, tied)
    begin = _without(model, path, after, {})
    for one in (begin, behind):  # hooks of the whole model are called around its layers
        one._forward_pre_hooks, one._forward_hooks = OrderedDict(), OrderedDict()
    return [
        BeforeBlocks(begin, homes_of(begin, path), len(blocks), list(tied.values()), call),
        *(BlockLayer(one, n, last=one is blocks[-1]) for n, one in enumerate(blocks)),
        AfterBlocks(behind, homes_of(behind, path), _missing(model, behind, [*tied]), call),
    ]


def most_blocks(model: nn.Module) -> int:
    """Give the number of blocks in a model's list; 0: it has none."""
    found = list_of_blocks(model)
    return len(found[1]) if found is not None else 0


def list_of_blocks(model: nn.Module) -> tuple[str, list[nn.Module]] | None:
    """Give the name of a model's largest list of blocks, and the blocks."""
    best, weight = None, 0
    for path, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or len(module) < 2:
            continue
        if len({type(block) for block in module}) > 1 or len({*map(id, module)}) < len(module):
            continue
        size = sum(parameter.numel() for parameter in module.parameters())
        if size > weight:
            best, weight = (path, list(module)), size
    return best


def beside_blocks(model: nn.Module, path: str) -> Iterator[tuple[str, nn.Module, bool]]:
    """Give the parts beside a list: name, module, and whether it is registered behind the list."""
    home, name = model, ""
    for step in path.split("."):
        behind = False
        for own, child in home.named_children():
            if own == step:
                behind = True
            else:
                yield f"{name}{own}", child, behind
        home, name = home.get_submodule(step), f"{name}{step}."


def _sides(
    model: nn.Module, path: str, order: Order
) -> tuple[dict[int, nn.Module], dict[int, nn.Module], list[Tensor]]:
    """
    Give the modules with state that are called before and after the blocks.

    And the tensors of modules that have the blocks inside, which their forward may use anywhere.
    """
    before, after, both = dict[int, nn.Module](), dict[int, nn.Module](), list[Tensor]()
    for name, child, behind in beside_blocks(model, path):
        if child.state_dict():
            (after if order.get(name, behind) else before)[id(child)] = child
    home = model
    for step in path.split("."):
        both += [*home.parameters(recurse=False), *home.buffers(recurse=False)]
        home = home.get_submodule(step)
    return before, after, both


def _without(
    model: nn.Module, path: str, left_out: Mapping[int, nn.Module], tied: Mapping[int, Tensor]
) -> nn.Module:
    """Give a model around the same modules, but for those left out, the blocks and what is tied."""
    step, _, rest = path.partition(".")
    found = _copy_without(model, tied)
    for name, child in model._modules.items():
        if name != step and child is not None:
            alike = StandIn(child) if id(child) in left_out else _lacking(child, tied)
            found._modules[name] = alike
    inner = model.get_submodule(step)
    if rest:
        found._modules[step] = _without(inner, rest, left_out, tied)
    else:
        blocks = (StandIn(block, number=n) for n, block in enumerate(inner.children()))
        found._modules[step] = nn.ModuleList(blocks)
    return found


def _lacking(module: nn.Module, tied: Mapping[int, Tensor]) -> nn.Module:
    """Give a module without some tensors: itself where it has none of them, else a copy."""
    if not any(id(one) in tied for one in (*module.parameters(), *module.buffers())):
        return module
    found = _copy_without(module, tied)
    for name, child in module._modules.items():
        found._modules[name] = None if child is None else _lacking(child, tied)
    return found


def _copy_without(module: nn.Module, tied: Mapping[int, Tensor]) -> nn.Module:
    """Give a copy of a module with the same children, and without what is tied."""
    found = copy.copy(module)
    found._modules = dict(module._modules)
    for kind in ("_parameters", "_buffers"):
        held: dict[str, Tensor | None] = getattr(module, kind)
        kept = {name: None if id(one) in tied else one for name, one in held.items()}
        setattr(found, kind, kept)
    return found


def _missing(model: nn.Module, copied: nn.Module, tied: Sequence[int]) -> list[Missing]:
    """Say where in a copy of the model tensors are missing, and which those are."""
    numbers = {one: number for number, one in enumerate(tied)}
    found = []
    tensors = (
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    )
    for path, tensor in tensors:
        home, _, name = path.rpartition(".")
        try:
            module = copied.get_submodule(home)
        except AttributeError:
            continue  # inside of a stand-in
        for held in (module._parameters, module._buffers):
            if id(tensor) in numbers and name in held and held[name] is None:
                found.append((held, name, numbers[id(tensor)]))
    return found


Missing = tuple[dict[str, Any], str, int]
"""A module's parameters or buffers, the name of a missing one, and its number among the tied."""
Call = tuple[Sequence[Any], Mapping[str, Any]]
"""Arguments by place and by name."""


class BeforeBlocks(Runner):
    """
    A model up to its blocks.

    Args:
        model: with stand-ins for its blocks, and for what comes after them.
        homes: see `homes_of`.
        blocks: how many it has.
        tied: parameters of it that what comes after the blocks has, too.
        call: how it is called.
    """

    def __init__(
        self,
        model: nn.Module,
        homes: Homes,
        blocks: int,
        tied: Sequence[Tensor],
        call: ModelCall,
    ) -> None:
        super().__init__()
        self.model, self._blocks, self._tied, self._call = model, blocks, tuple(tied), call
        self._homes = tuple(homes)
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
        calls = self._noted(inputs)
        shared: list[Tensor] = []
        told = [_told_call(*call, shared) for call in calls]
        whole = isinstance(inputs, Batch)
        return {
            "inputs": inputs.batch if whole else inputs,
            "whole": whole,
            "features": _first(*calls[0]),
            "shared": shared,
            "calls": json.dumps(told),
            "tied": list(self._tied),
        }

    def _noted(self, inputs: Any) -> list[Call]:
        """Give the calls; whether blocks give tensors or tuples is found out by the first ones."""
        states = _generators(inputs)
        try:
            return self._run(inputs)
        except SpecError:
            raise
        except (Between, Exception) as error:
            first = error
        for generator, state in states:
            generator.set_state(state)
        self._form.tuples = not self._form.tuples
        try:
            return self._run(inputs)
        except (Between, Exception):
            self._form.tuples = not self._form.tuples
            if isinstance(first, Exception):
                raise first from None  # of the user's own: a sample that the embedding has not
            raise unfit(f"its forward {first}") from None

    def _run(self, inputs: Any) -> list[Call]:
        calls: list[Call] = []
        modes = torch_modes()

        def note(_: int, *args: Any, **kwargs: Any) -> Any:
            if not calls and (changed := changed_modes(modes)):
                raise unfit(f"its blocks run inside of {changed}")
            calls.append((args, kwargs))
            features = _first(*calls[0])
            if _first(args, kwargs) is not features:
                raise Between(f"computes something between blocks {len(calls) - 2} and the next")
            if len(calls) == self._blocks:
                raise Called
            return (features,) if self._form.tuples else features

        with unwritten(self._homes):
            try:
                with answering(self.model, note, None):
                    self._call.of_part(self.model, inputs)
            except Called:
                return calls
        raise unfit(f"its forward calls {len(calls)} of {self._blocks} blocks")


class BlockLayer(nn.Module):
    """
    One block.

    Args:
        block: takes features as its first argument; gives them, or a tuple that begins with them.
        number: of the block.
        last: nothing of the calls is needed behind it.
    """

    def __init__(self, block: nn.Module, number: int, *, last: bool) -> None:
        super().__init__()
        self.block, self._number, self._last = block, number, last

    def forward(self, value: Any) -> Any:
        """Give what the next block takes, or what the last one gave."""
        args, kwargs = _calls(value["calls"])[self._number]
        features, shared = value["features"], value["shared"]
        given = [_heard(one, features, shared) for one in args]
        outputs = self.block(
            *given, **{name: _heard(one, features, shared) for name, one in kwargs.items()}
        )
        if self._last:
            kept = {name: value[name] for name in ("inputs", "whole", "tied")}
            return {**kept, "outputs": outputs}
        return {**value, "features": _features(outputs)}


class AfterBlocks(Runner):
    """
    A model from its last block on.

    Args:
        model: with stand-ins for its blocks, and for what comes before them.
        homes: see `homes_of`.
        missing: where tied parameters are missing.
        call: how it is called.
    """

    def __init__(
        self, model: nn.Module, homes: Homes, missing: Sequence[Missing], call: ModelCall
    ) -> None:
        super().__init__()
        self.model, self._missing, self._call = model, tuple(missing), call
        self._homes, self._last = tuple(homes), 0
        self._looks = True  #: in the first micro-batch
        for one in model.modules():
            if isinstance(one, StandIn) and one.number is not None:
                one.is_behind, self._last = True, max(self._last, one.number)

    @override
    def beside(self) -> tuple[object, ...]:
        return self._call.holders

    def forward(self, value: Any) -> Any:
        """Give what the model gives."""
        outputs = value["outputs"]
        features = _features(outputs)
        before, others = features.new_full(features.shape, math.nan), lost(outputs)

        def given(number: int, *args: Any, **kwargs: Any) -> Any:
            return outputs if number == self._last else others

        try:
            for held, name, number in self._missing:
                held[name] = value["tied"][number]
            inputs = Batch(value["inputs"]) if value["whole"] else value["inputs"]
            with unwritten(self._homes), answering(self.model, given, before):
                found = self._call.of_part(self.model, inputs)
        finally:
            for held, name, _ in self._missing:
                held[name] = None
        if self.training and self._looks:
            self._looks = False
            refuse_lost(features, found)
        return found


def _generators(inputs: Any) -> list[tuple[torch.Generator, Tensor]]:
    """Give torch's generators that a forward on these inputs may draw from, with their states."""
    cuda = {one.device.index for one in tree_leaves(inputs) if getattr(one, "is_cuda", False)}
    found = [torch.default_generator, *(torch.cuda.default_generators[n] for n in sorted(cuda))]
    return [(generator, generator.get_state()) for generator in found]


def _first(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    """Give the first argument of a block's call: its features."""
    found = args[0] if args else next(iter(kwargs.values()), None)
    return _features(found)


def _features(outputs: Any) -> Tensor:
    found = outputs[0] if isinstance(outputs, tuple | list) and outputs else outputs
    if not isinstance(found, Tensor):
        raise unfit(f"its blocks take or give {type(found).__name__} for a tensor of features")
    return found


def _told_call(args: Sequence[Any], kwargs: Mapping[str, Any], shared: list[Tensor]) -> Any:
    """Write down a call; `shared` takes the tensors, each once."""
    features = _first(args, kwargs)
    told = [_told(one, f"argument {n}", features, shared) for n, one in enumerate(args)]
    return [told, {name: _told(one, name, features, shared) for name, one in kwargs.items()}]


def _told(tree: Any, where: str, features: Tensor, shared: list[Tensor]) -> Any:
    if tree is features:
        return {"features": 0}
    if isinstance(tree, Tensor):
        numbers = [n for n, one in enumerate(shared) if one is tree]
        if not numbers:
            shared.append(tree)
        return {"shared": numbers[0] if numbers else len(shared) - 1}
    if isinstance(tree, list | dict) and not tree:
        raise unfit(f"its blocks are called with {where}, an empty container, which they may fill")
    if isinstance(tree, tuple | list):
        kind = "tuple" if isinstance(tree, tuple) else "list"
        return {kind: [_told(one, where, features, shared) for one in tree]}
    if isinstance(tree, dict) and all(isinstance(key, str) for key in tree):
        return {"dict": {key: _told(one, where, features, shared) for key, one in tree.items()}}
    if tree is None or type(tree) in (bool, int, float, str):
        return tree
    if type(tree).__name__.endswith("Cache"):  # of keys and values: Hugging Face's are made anew
        return None  # in each forward, so there are none yet
    raise unfit(
        f"its blocks are called with {where}, a {type(tree).__name__}, and stages hand on"
        " tensors and constants"
    )


def _heard(told: Any, features: Tensor, shared: Sequence[Tensor]) -> Any:
    if not isinstance(told, dict):
        return told
    ((kind, held),) = told.items()
    if kind == "features":
        return features
    if kind == "shared":
        return shared[held]
    if kind == "dict":
        return {key: _heard(one, features, shared) for key, one in held.items()}
    items = [_heard(one, features, shared) for one in held]
    return tuple(items) if kind == "tuple" else items


@lru_cache(maxsize=64)
def _calls(text: str) -> list[Any]:
    """Read what `BeforeBlocks` has written; the same for all micro-batches of a size."""
    found: list[Any] = json.loads(text)
    return found
