"""
In which order a model calls what lies beside its blocks, where it registers it in another.

    OPT     registers   embed  final_layer_norm  blocks  head
            calls       embed  blocks  final_layer_norm  head

Rank 0 calls the model with a few samples, once, and all ranks take its word; who comes later asks
those that know. Without values (`init: meta`) there is nothing to call.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from distplat.strategies.collective import Collective, broadcast_value, gather_values
from distplat.strategies.model.block_layers import CallOrder, beside_blocks, list_of_blocks
from distplat.strategies.model.model_call import ModelCall
from distplat.strategies.model.trials import preserve_attributes, untouched
from distplat.strategies.pipeline.values import copied, on_device
from distplat.strategies.task import Task, overrides


def has_order(task: Task, model: nn.Module | None) -> bool:
    """Whether the order of a model's parts is asked for: it has blocks, and nobody lists layers."""
    if model is None or list_of_blocks(model) is None:
        return False
    listed = isinstance(model, nn.Sequential) and type(model).forward is nn.Sequential.forward
    return not listed and not overrides(type(task), "stages")


def agreed_order(
    tried: Callable[[], CallOrder] | None,
    known: CallOrder | None,
    group: Collective,
    device: torch.device,
) -> CallOrder:
    """
    Give the order of a model's parts, the same on all ranks; each calls this.

    Args:
        tried: finds it; None: this rank has no model, or one without values.
        known: what this rank has found in an attempt before.
        group: all ranks.
        device: of the model.

    Raises:
        CollectiveError: a rank is missing.
    """
    every: list[CallOrder | None] = gather_values(known, group, device)
    agreed_before = next((one for one in every if one is not None), None)
    if agreed_before is not None:
        return agreed_before
    own = tried() if group.rank == 0 and tried is not None else {}
    agreed: CallOrder = broadcast_value(own, 0, group, device)
    return agreed


def call_order_of(model: nn.Module, call: ModelCall, inputs: Callable[[], Any]) -> dict[str, bool]:
    """
    Call a model in evaluation mode, and see which parts are called before and behind its blocks.

    Args:
        model: with values.
        call: how it is called.
        inputs: gives a few samples.

    Returns:
        The parts that are registered elsewhere, and whether they are behind; nothing where the
        model has no blocks, or cannot be called.
    """
    path_and_blocks = list_of_blocks(model)
    if path_and_blocks is None:
        return {}
    path, blocks = path_and_blocks
    with preserve_attributes(*call.holders):
        behind = _called_behind(model, blocks, lambda: call(model, _given(model, inputs)))
    order = {}
    for name, child, registered in beside_blocks(model, path):
        parts = [behind[id(one)] for one in child.modules() if id(one) in behind]
        if parts and all(parts) != registered:
            order[name] = all(parts)
    return order


def _given(model: nn.Module, inputs: Callable[[], Any]) -> Any:
    return on_device(copied(inputs()), next(model.parameters()).device)


@torch.no_grad()
def _called_behind(
    model: nn.Module, blocks: list[nn.Module], run: Callable[[], Any]
) -> dict[int, bool]:
    """Give by `id` of a module whether it is first called when blocks have been."""
    inside = {id(one) for block in blocks for one in block.modules()}
    called_after: dict[int, bool] = {}

    def note(begun: list[bool], module: nn.Module, _: object) -> None:
        if id(module) in inside:
            begun.append(True)
        else:
            called_after.setdefault(id(module), bool(begun))

    hook = partial(note, [])
    handles = [one.register_forward_pre_hook(hook) for one in model.modules()]
    try:
        with untouched(model):
            run()
    except Exception:  # of the user's own; training, or the comparison, says it
        return {}
    finally:
        for handle in handles:
            handle.remove()
    return called_after
