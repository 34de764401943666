"""
Check, before the model is cut, that its layers in sequence compute what the whole model does.

Outputs of a few samples are compared, and the gradients of small parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from distplat.platform.errors import SpecError
from distplat.strategies.loop.seeding import preserve_rng_state, seed_quickly
from distplat.strategies.model.block_layers import BeforeBlocks
from distplat.strategies.model.layers import Layer
from distplat.strategies.model.model_call import ModelCall
from distplat.strategies.model.trials import (
    Runner,
    WithoutDropout,
    disable_dropout,
    preserve_attributes,
    preserve_state,
)
from distplat.strategies.pipeline.limits import leaves, pipeline_error
from distplat.strategies.pipeline.values import clone_tensors, move_tensors, tensor_leaves
from distplat.strategies.task import describe_value

_SMALL = 1 << 20
"""Largest parameter, in elements, whose gradient is compared; limits the memory needed."""
_TOLERANCE = 1e-3
"""Relative difference of norms that counts as rounding: the order of sums may differ."""


def check_layers(
    model: nn.Module, layers: Sequence[Layer], inputs: Callable[[], Any], call: ModelCall
) -> None:
    """
    Check that the layers in sequence compute the same as the model.

    In evaluation mode outputs are compared, and the parameters that backward would reach. A model
    that draws random numbers in evaluation, or cannot be called with the inputs, is not compared;
    if its layers are guessed rather than listed by the task, that is an error. In training mode,
    without dropout, outputs are compared if the model is deterministic.

    Args:
        model: the whole model, with values.
        layers: of the model.
        inputs: returns a few samples.
        call: calls the model.

    Raises:
        SpecError: the results differ.
    """
    device = next(model.parameters()).device
    samples = move_tensors(inputs(), device)
    for training in (False, True):
        trial = _Trial(model, layers, samples, training=training)
        try:
            again, whole = (trial.run(partial(call, model), seed) for seed in (0, 1))
        except Exception as error:  # only the layers are trained, so the model itself may fail
            if not training:
                _refuse_guess(layers, f"it cannot be called with the inputs: {error}")
            continue
        if not all_close(whole, again):
            if not training:
                _refuse_guess(layers, "it draws random numbers in evaluation")
            continue
        chained = trial.run(partial(_run_layers, model, layers), 1)
        _compare_outputs(model, layers, chained, whole, training=training)
        _compare_gradients(trial, model, layers, call, chained)


class _Trial:
    """
    Runs a model or its layers without side effects.

    Args:
        model: the whole model.
        layers: of the model.
        inputs: of the model.
        training: run in training mode, without dropout, which depends on the order of calls.
    """

    def __init__(
        self, model: nn.Module, layers: Sequence[Layer], inputs: Any, *, training: bool
    ) -> None:
        self._modules = model, *(layer.module for layer in layers)
        self._inputs, self._training = inputs, training

    def run(self, function: Callable[[Any], Any], seed: int) -> Any:
        """
        Return `function` of the inputs.

        Args:
            function: may write into its inputs.
            seed: for random numbers.
        """
        with preserve_state(*self._modules), preserve_rng_state(), torch.enable_grad():
            seed_quickly(seed)
            for module in self._modules:
                for part in module.modules():
                    part.training = self._training
                disable_dropout(module)
            with WithoutDropout() if self._training else nullcontext():
                return function(clone_tensors(self._inputs))


def _compare_outputs(
    model: nn.Module, layers: Sequence[Layer], chained: Any, whole: Any, *, training: bool
) -> None:
    """Compare the outputs of the layers with those of the model."""
    if not _stages_hint(layers):
        chained, whole = _common_entries(chained, whole)
    elif not tensor_leaves(whole):
        _refuse_guess(layers, f"it returns {describe_value(whole)}, in which no tensors are found")
    if not all_close(chained, whole):
        mode = " in training" if training else ""
        raise _layers_error(layers, f"do not compute what {type(model).__name__} does{mode}")
    left, right = ({id(leaf) for leaf in leaves(tensor_leaves(each))} for each in (chained, whole))
    differ = [name for name, p in model.named_parameters() if (id(p) in left) != (id(p) in right)]
    if differ:
        text = f"compute gradients of other parameters than {type(model).__name__} does: "
        raise _layers_error(layers, text + ", ".join(differ))


def _compare_gradients(
    trial: _Trial, model: nn.Module, layers: Sequence[Layer], call: ModelCall, chained: Any
) -> None:
    """
    Compare gradients of small parameters, if there are any; `chained`: outputs of the layers.

    A missing operation that changes no output, such as `detach()`, changes the gradients.
    """
    named = model.named_parameters()
    small = {n: p for n, p in named if p.requires_grad and p.numel() <= _SMALL}
    is_guess = bool(_stages_hint(layers))

    def of_model(inputs: Any) -> NamedGradients:
        whole = call(model, inputs)
        return gradients_of(whole if is_guess else _common_entries(chained, whole)[1], small)

    def of_layers(inputs: Any) -> NamedGradients:
        return gradients_of(_run_layers(model, layers, inputs), small)

    try:
        whole_grads, again = (trial.run(of_model, 1) for _ in range(2))
        layer_grads = trial.run(of_layers, 1)
    except Exception:  # training will report a failing backward
        return
    if different_gradients(again, whole_grads):  # the model is not deterministic
        return
    differ = different_gradients(layer_grads, whole_grads)
    if differ:
        text = f"give {', '.join(differ)} a different gradient than {type(model).__name__} does"
        raise _layers_error(layers, text)


def _run_layers(model: nn.Module, layers: Sequence[Layer], value: Any) -> Any:
    try:
        for layer in layers:
            # Each stage has its own task object, which may hold state.
            objects = layer.module.external_objects() if isinstance(layer.module, Runner) else ()
            with preserve_attributes(*objects):
                value = layer.module(value)
    except SpecError:
        raise
    except Exception as error:
        text = f"fail where {type(model).__name__} does not: {error}"
        raise _layers_error(layers, text) from error
    return value


def _layers_error(layers: Sequence[Layer], message: str) -> SpecError:
    hint = "let the task's `stages` return all that `forward` does, or set `pipeline: 1`"
    text = f"the layers {', '.join(layer.name for layer in layers)} in sequence {message}"
    return pipeline_error(text, _stages_hint(layers) or hint)


def _common_entries(chained: Any, whole: Any) -> tuple[Any, Any]:
    """Drop entries that the listed layers do not return; a loss that uses one raises an error."""
    if not (isinstance(chained, Mapping) and isinstance(whole, Mapping)):
        return chained, whole
    return {**chained}, {name: whole[name] for name in chained if name in whole}


def _refuse_guess(layers: Sequence[Layer], reason: str) -> None:
    hint = _stages_hint(layers)
    if hint:
        raise pipeline_error(
            f"the model's layers cannot be compared with the model: {reason}", hint
        )


def _stages_hint(layers: Sequence[Layer]) -> str:
    """Return how to write `stages` if the layers are guessed; empty: the task lists them."""
    if not any(isinstance(module, BeforeBlocks) for module in layers[0].module.modules()):
        return ""
    blocks = layers[1].name.rpartition(".")[0]
    return (
        f"give the task a `stages(model)`, such as [First(model), *map(Block, model.{blocks}), "
        "Last(model)], where each module takes the output of the one before; or set `pipeline: 1`"
    )


@torch.no_grad()
def _close(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype or one.is_meta != other.is_meta:
        return False  # outputs on `meta` depend on weights of another stage
    if not one.is_floating_point():
        return torch.equal(one, other)
    defined = ~(one.isnan() & other.isnan())
    first, second = one[defined].double(), other[defined].double()
    if not (first.isfinite().all() and second.isfinite().all()):
        return torch.equal(first, second)
    close = max(_TOLERANCE, 8 * torch.finfo(one.dtype).eps)
    return bool((first - second).norm() <= close * second.norm())


def all_close(one: Any, other: Any) -> bool:
    """Return whether all tensors of two results are close."""
    left, right = tensor_leaves(one), tensor_leaves(other)
    return len(left) == len(right) and all(map(_close, left, right))


NamedGradients = Mapping[str, Tensor | None]
"""Gradients by name of parameter."""


def gradients_of(outputs: Any, trained: Mapping[str, Tensor]) -> NamedGradients:
    """Return the gradients of a fixed weighted sum of the outputs."""
    differentiable = [tensor for tensor in tensor_leaves(outputs) if tensor.requires_grad]
    if not trained or not differentiable:
        return {}
    total = torch.stack([_weighted_sum(tensor) for tensor in differentiable]).sum()
    gradients = torch.autograd.grad(total, [*trained.values()], allow_unused=True)
    return dict(zip(trained, gradients, strict=True))


def different_gradients(gradients: NamedGradients, expected: NamedGradients) -> list[str]:
    """Return the parameters whose gradients differ by more than rounding."""
    norms = [float(gradient.norm()) for gradient in expected.values() if gradient is not None]
    floor = 1e-2 * max(norms, default=0.0)  # a gradient that should be 0 is not exactly 0
    differ = []
    for name, whole in expected.items():
        gradient = gradients[name]
        if gradient is None or whole is None:
            if gradient is not whole:
                differ.append(name)
            continue
        close = max(_TOLERANCE, 8 * torch.finfo(whole.dtype).eps)
        if not float((gradient - whole).norm()) <= close * max(float(whole.norm()), floor):
            differ.append(name)
    return differ


def _weighted_sum(tensor: Tensor) -> Tensor:
    """Return a sum with varying weights: after a norm layer a plain sum would be constant."""
    weights = torch.arange(tensor.numel(), device=tensor.device).cos()
    return (tensor.double() * weights.view(tensor.shape)).sum()
