"""
Whether layers one after the other compute what the whole model does, before any is left out.

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
    preserve_attributes,
    stop_dropping,
    untouched,
)
from distplat.strategies.pipeline.limits import leaves, refused
from distplat.strategies.pipeline.values import copied, on_device, tensor_leaves
from distplat.strategies.task import describe_value

_SMALL = 1 << 20
"""Elements of a parameter whose gradient is compared: not all those of a large model are held."""
_CLOSE = 1e-3
"""Outputs may differ by so much of their norm, in rounding: sums are of other parts."""


def check_layers(
    model: nn.Module, layers: Sequence[Layer], inputs: Callable[[], Any], call: ModelCall
) -> None:
    """
    See whether layers one after the other give what the model gives.

    In evaluation mode outputs are compared, and which parameters a backward would reach. Models
    that draw random numbers there, or cannot be called with the inputs, are not compared; where
    nobody has said what their layers are, that is an error. In training mode, without dropout,
    outputs are compared where the model repeats them.

    Args:
        model: with values.
        layers: of it.
        inputs: gives a few samples.
        call: how the model is called.

    Raises:
        SpecError: they do not.
    """
    device = next(model.parameters()).device
    given = on_device(inputs(), device)
    for training in (False, True):
        trial = _Trial(model, layers, given, training=training)
        try:
            again, whole = (trial.run(partial(call, model), seed) for seed in (0, 1))
        except Exception as error:  # what is trained is what the layers say, if the model does not
            if not training:
                _refuse_guess(layers, f"it cannot be called with the inputs: {error}")
            continue
        if not alike(whole, again):
            if not training:
                _refuse_guess(layers, "it draws random numbers in evaluation")
            continue
        behind = trial.run(partial(_one_after_the_other, model, layers), 1)
        _compare_outputs(model, layers, behind, whole, training=training)
        _compare_gradients(trial, model, layers, call, behind)


class _Trial:
    """
    Runs a model, or its layers, as if nothing had been run before.

    Args:
        model: whole.
        layers: of it.
        given: what enters it.
        training: whether in training mode; without dropout, which no other order would repeat.
    """

    def __init__(
        self, model: nn.Module, layers: Sequence[Layer], given: Any, *, training: bool
    ) -> None:
        self._modules = model, *(layer.module for layer in layers)
        self._given, self._training = given, training

    def run(self, work: Callable[[Any], Any], seed: int) -> Any:
        """
        Give what `work` makes of the inputs.

        Args:
            work: may write into its inputs.
            seed: what draws random numbers gives something else with another one.
        """
        with untouched(*self._modules), preserve_rng_state(), torch.enable_grad():
            seed_quickly(seed)
            for module in self._modules:
                for part in module.modules():
                    part.training = self._training
                stop_dropping(module)
            with WithoutDropout() if self._training else nullcontext():
                return work(copied(self._given))


def _compare_outputs(
    model: nn.Module, layers: Sequence[Layer], behind: Any, whole: Any, *, training: bool
) -> None:
    """Compare what layers gave with what the model gave."""
    if not _to_write(layers):
        behind, whole = _of_both(behind, whole)
    elif not tensor_leaves(whole):
        _refuse_guess(layers, f"it gives {describe_value(whole)}, and no tensors that are seen")
    if not alike(behind, whole):
        mode = " in training" if training else ""
        raise _layers_do(layers, f"compute otherwise than {type(model).__name__} does{mode}")
    left, right = ({id(leaf) for leaf in leaves(tensor_leaves(one))} for one in (behind, whole))
    differ = [name for name, p in model.named_parameters() if (id(p) in left) != (id(p) in right)]
    if differ:
        text = f"give other parameters gradients than {type(model).__name__} does: "
        raise _layers_do(layers, text + ", ".join(differ))


def _compare_gradients(
    trial: _Trial, model: nn.Module, layers: Sequence[Layer], call: ModelCall, behind: Any
) -> None:
    """
    Compare gradients of small parameters, where there are some; `behind`: what layers gave.

    What layers leave out that changes no output, as a `detach()`, changes those of biases, too.
    """
    named = model.named_parameters()
    small = {n: p for n, p in named if p.requires_grad and p.numel() <= _SMALL}
    guessed = bool(_to_write(layers))

    def of_model(given: Any) -> NamedGradients:
        whole = call(model, given)
        return gradients_of(whole if guessed else _of_both(behind, whole)[1], small)

    def of_layers(given: Any) -> NamedGradients:
        return gradients_of(_one_after_the_other(model, layers, given), small)

    try:
        whole_grads, again = (trial.run(of_model, 1) for _ in range(2))
        layer_grads = trial.run(of_layers, 1)
    except Exception:  # a backward that fails comes again in training
        return
    differ = (
        [] if other_gradients(again, whole_grads) else other_gradients(layer_grads, whole_grads)
    )
    if differ:
        text = f"give {', '.join(differ)} another gradient than {type(model).__name__} does"
        raise _layers_do(layers, text)


def _one_after_the_other(model: nn.Module, layers: Sequence[Layer], value: Any) -> Any:
    try:
        for layer in layers:
            # Stages have each a task of their own, which may count.
            beside = layer.module.beside() if isinstance(layer.module, Runner) else ()
            with preserve_attributes(*beside):
                value = layer.module(value)
    except SpecError:
        raise
    except Exception as error:
        text = f"fail where {type(model).__name__} does not: {error}"
        raise _layers_do(layers, text) from error
    return value


def _layers_do(layers: Sequence[Layer], what: str) -> SpecError:
    hint = "have the task's `stages` say all that `forward` does, or set `pipeline: 1`"
    text = f"the layers {', '.join(one.name for one in layers)} one after the other {what}"
    return refused(text, _to_write(layers) or hint)


def _of_both(behind: Any, whole: Any) -> tuple[Any, Any]:
    """Leave out entries that the task's own layers do not give: who asks for one has an error."""
    if not (isinstance(behind, Mapping) and isinstance(whole, Mapping)):
        return behind, whole
    return {**behind}, {name: whole[name] for name in behind if name in whole}


def _refuse_guess(layers: Sequence[Layer], why: str) -> None:
    hint = _to_write(layers)
    if hint:
        raise refused(f"the model's layers cannot be compared with the model: {why}", hint)


def _to_write(layers: Sequence[Layer]) -> str:
    """Say what `stages` would be, where layers are guessed; empty: they are not."""
    if not any(isinstance(one, BeforeBlocks) for one in layers[0].module.modules()):
        return ""
    blocks = layers[1].name.rpartition(".")[0]
    return (
        f"give the task a `stages(model)`, such as [First(model), *map(Block, model.{blocks}), "
        "Last(model)], whose modules each take what the one before gives; or set `pipeline: 1`"
    )


@torch.no_grad()
def _close(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype or one.is_meta != other.is_meta:
        return False  # on `meta` is what comes of weights that another stage has
    if not one.is_floating_point():
        return torch.equal(one, other)
    known = ~(one.isnan() & other.isnan())
    first, second = one[known].double(), other[known].double()
    if not (first.isfinite().all() and second.isfinite().all()):
        return torch.equal(first, second)
    close = max(_CLOSE, 8 * torch.finfo(one.dtype).eps)
    return bool((first - second).norm() <= close * second.norm())


def alike(one: Any, other: Any) -> bool:
    """Compare the tensors in two results."""
    left, right = tensor_leaves(one), tensor_leaves(other)
    return len(left) == len(right) and all(map(_close, left, right))


NamedGradients = Mapping[str, Tensor | None]
"""By the names of parameters."""


def gradients_of(outputs: Any, trained: Mapping[str, Tensor]) -> NamedGradients:
    """Give those of some sum of the outputs."""
    differentiable = [one for one in tensor_leaves(outputs) if one.requires_grad]
    if not trained or not differentiable:
        return {}
    total = torch.stack([_some_sum(one) for one in differentiable]).sum()
    gradients = torch.autograd.grad(total, [*trained.values()], allow_unused=True)
    return dict(zip(trained, gradients, strict=True))


def other_gradients(mine: NamedGradients, theirs: NamedGradients) -> list[str]:
    """Name parameters whose gradients differ; one that should be 0 differs by rounding."""
    both = {name: (mine[name], whole) for name, whole in theirs.items()}
    norms = [float(whole.norm()) for whole in theirs.values() if whole is not None]
    least = 1e-2 * max(norms, default=0.0)
    differ = []
    for name, (one, whole) in both.items():
        if one is None or whole is None:
            if one is not whole:
                differ.append(name)
            continue
        close = max(_CLOSE, 8 * torch.finfo(whole.dtype).eps)
        if not float((one - whole).norm()) <= close * max(float(whole.norm()), least):
            differ.append(name)
    return differ


def _some_sum(tensor: Tensor) -> Tensor:
    """Weigh elements, which a norm would bring to the same sum whatever they are."""
    weights = torch.arange(tensor.numel(), device=tensor.device).cos()
    return (tensor.double() * weights.view(tensor.shape)).sum()
