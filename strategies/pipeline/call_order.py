"""
The order in which a model calls the modules around its blocks, if it differs from registration.

    OPT     registers   embed  final_layer_norm  blocks  head
            calls       embed  blocks  final_layer_norm  head

Rank 0 calls the model once with a few samples and broadcasts the order; ranks of later attempts get
it from older ranks. A model on the meta device (`init: meta`) is not called.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from distplat.strategies.collective import Collective, broadcast_value, gather_values
from distplat.strategies.model.block_layers import CallOrder, list_of_blocks, modules_around_blocks
from distplat.strategies.model.model_call import ModelCall
from distplat.strategies.model.trials import preserve_attributes, preserve_state
from distplat.strategies.pipeline.values import clone_tensors, move_tensors
from distplat.strategies.task import Task, overrides


def has_order(task: Task, model: nn.Module | None) -> bool:
    """Return whether the call order is needed: the model has blocks, and no list of layers."""
    if model is None or list_of_blocks(model) is None:
        return False
    is_list = isinstance(model, nn.Sequential) and type(model).forward is nn.Sequential.forward
    return not is_list and not overrides(type(task), "stages")


def agree_on_order(
    find_order: Callable[[], CallOrder] | None,
    previous: CallOrder | None,
    group: Collective,
    device: torch.device,
) -> CallOrder:
    """
    Return the call order of a model's parts, the same on all ranks; called by every rank.

    Args:
        find_order: None: this rank has no model, or has it on the meta device.
        previous: this rank's order of an earlier attempt.
        group: all ranks.
        device: of the model.

    Raises:
        CollectiveError: a rank is missing.
    """
    orders: list[CallOrder | None] = gather_values(previous, group, device)
    earlier = next((order for order in orders if order is not None), None)
    if earlier is not None:
        return earlier
    found = find_order() if group.rank == 0 and find_order is not None else {}
    order: CallOrder = broadcast_value(found, 0, group, device)
    return order


def call_order_of(model: nn.Module, call: ModelCall, inputs: Callable[[], Any]) -> dict[str, bool]:
    """
    Call a model in evaluation mode to find the parts called before and after its blocks.

    Args:
        model: with values.
        call: calls the model.
        inputs: returns a few samples.

    Returns:
        The parts whose call order differs from registration, and whether they are called after the
        blocks; empty if the model has no blocks or cannot be called.
    """
    path_and_blocks = list_of_blocks(model)
    if path_and_blocks is None:
        return {}
    path, blocks = path_and_blocks
    with preserve_attributes(*call.holders):
        behind = _called_behind(model, blocks, lambda: call(model, _load_inputs(model, inputs)))
    order = {}
    for name, child, registered in modules_around_blocks(model, path):
        parts = [behind[id(module)] for module in child.modules() if id(module) in behind]
        if parts and all(parts) != registered:
            order[name] = all(parts)
    return order


def _load_inputs(model: nn.Module, inputs: Callable[[], Any]) -> Any:
    return move_tensors(clone_tensors(inputs()), next(model.parameters()).device)


@torch.no_grad()
def _called_behind(
    model: nn.Module, blocks: list[nn.Module], run: Callable[[], Any]
) -> dict[int, bool]:
    """Return by `id` of a module whether its first call comes after a block was called."""
    inside = {id(module) for block in blocks for module in block.modules()}
    called_after: dict[int, bool] = {}

    def record(block_calls: list[bool], module: nn.Module, _: object) -> None:
        if id(module) in inside:
            block_calls.append(True)
        else:
            called_after.setdefault(id(module), bool(block_calls))

    hook = partial(record, [])
    handles = [module.register_forward_pre_hook(hook) for module in model.modules()]
    try:
        with preserve_state(model):
            run()
    except Exception:  # raised by user code; training or the layer check reports it
        return {}
    finally:
        for handle in handles:
            handle.remove()
    return called_after
