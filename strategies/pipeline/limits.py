"""
What a pipeline cannot do, found and named: nothing that a stage leaves out goes unsaid.

    before the run     SyncBatchNorm, losses with `weights`, batches and inputs of other forms;
                       what layers compute: `check_layers`
    in the first step  parameters that a backward reaches and no optimizer of this rank has
    in every step      parameters that were frozen when the model was cut, and no longer are
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from distplat.platform.errors import Problem, SpecError
from distplat.strategies.collective import Collective
from distplat.strategies.loop.seeding import generators_kept, seed_quickly
from distplat.strategies.model.block_layers import BeforeBlocks
from distplat.strategies.model.layers import Layer
from distplat.strategies.model.model_call import Batch, ModelCall
from distplat.strategies.model.trials import (
    Runner,
    WithoutDropout,
    attributes_kept,
    stop_dropping,
    untouched,
)
from distplat.strategies.pipeline.values import copied, is_value, on_device, tensors_in
from distplat.strategies.task import Task, kind_of, overrides, own_call
from distplat.strategies.torch_compat import tree_map

_DEPTH = 3
"""Containers within containers of a task in which parameters are looked for."""


def as_pair(task: Task, batch: Any) -> tuple[Any, Any]:
    """
    Take a batch apart: the first stage gets the inputs, the last one the targets.

    A batch that is no pair, or that the task hands to the model itself, is both.

    Raises:
        SpecError: nobody says how the model is called with it.
    """
    if own_call(task) is not None:
        return Batch(batch), batch
    if isinstance(batch, Mapping):
        return Batch(batch if type(batch) is dict else dict(batch)), batch
    if isinstance(batch, list | tuple) and len(batch) == 2:
        return batch[0], batch[1]
    text = f"a batch is {kind_of(batch)}, and nobody says how the model is called with it"
    hint = (
        "give a pair (inputs, targets) or a dict of the model's arguments, or write "
        "forward(model, batch)"
    )
    raise SpecError(Problem(("task",), text, hint))


def entering(inputs: Any) -> Any:
    """
    Check what the data gives as inputs of a model that is cut.

    Raises:
        SpecError: it is no tree of tensors and constants.
    """
    if isinstance(inputs, Tensor) or is_value(inputs):
        return inputs
    given = inputs.batch if isinstance(inputs, Batch) else inputs
    text = f"a pipeline takes tensors as inputs, train_data gives {kind_of(given)}"
    hint = "give a tensor, or tensors in lists, tuples and dicts, or set `pipeline: 1`"
    raise _refused(text, hint)


def refuse_weights(task: Task) -> None:
    """
    Refuse a loss whose weights all ranks are to know before the first forward.

    Raises:
        SpecError: the task has `weights`.
    """
    if overrides(type(task), "weights"):
        text = f"{type(task).__name__}.weights() gets whole batches, which no rank of `hybrid` has"
        raise SpecError(Problem(("task",), text, "use `strategy: ring` or `strategy: ps-sync`"))


class GradientReach:
    """
    Watches that backward reaches the rank's own parameters, and all that it is to train.

    Args:
        modules: of this rank.
        task: whose loss may use parameters of its own.
        names: of the whole model's parameters; see `names_of`.
    """

    def __init__(
        self, modules: Iterable[nn.Module], task: Task, names: Mapping[int, ParameterName]
    ) -> None:
        own = {n: p for module in modules for n, p in module.named_parameters()}
        self._own = {id(p) for p in own.values()}
        self._frozen = [(n, p) for n, p in own.items() if not p.requires_grad]
        self._task, self._names = task, names
        self._looks = True

    def look(self, outputs: Sequence[Tensor]) -> None:
        """
        Look at what a virtual stage gives, before it is differentiated; in the first step only.

        Parameters that neither the model nor the task has are left as they are, as in plain torch.

        Raises:
            SpecError: it depends on a parameter that this rank does not train.
        """
        if not self._looks:
            return
        of_task = dict(_tensors_in(vars(self._task), "", _DEPTH))
        for leaf in leaves(outputs):
            if id(leaf) in self._own:
                continue
            if id(leaf) in of_task:
                text = f"the loss uses a parameter that the task keeps: `self.{of_task[id(leaf)]}`"
                hint = "make it a part of the model's last layer, or use `ring` or `ps-sync`"
                raise _refused(text, hint)
            known = self._names.get(id(leaf))
            if known is not None and known.ref() is leaf:
                text = f"a stage uses {known.name}, which is in none of its layers"
                raise _refused(text, "hold it in the layer that uses it, or set `pipeline: 1`")

    def stepped(self) -> None:
        """
        Be told that a step's gradients are there.

        Raises:
            SpecError: a parameter that was frozen now asks for gradients.
        """
        self._looks = False
        thawed = [name for name, parameter in self._frozen if parameter.requires_grad]
        if thawed:
            text = f"parameters were thawed during the run: {', '.join(thawed)}"
            hint = "`hybrid` cannot take them in: thaw them in `model()`, or use `ring`"
            raise SpecError(Problem(("strategy", "name"), text, hint))


class ParameterName:
    """A parameter's name, as long as the parameter is there."""

    def __init__(self, name: str, parameter: nn.Parameter) -> None:
        self.name, self.ref = name, weakref.ref(parameter)


def names_of(model: nn.Module) -> dict[int, ParameterName]:
    """Give the names of a model's parameters, by `id`; keeps none of them alive."""
    return {id(p): ParameterName(name, p) for name, p in model.named_parameters()}


def _tensors_in(value: Any, name: str, depth: int) -> Iterator[tuple[int, str]]:
    """Give tensors by `id`, with their names, in what a task holds."""
    if isinstance(value, Tensor):
        yield id(value), name
    elif isinstance(value, nn.Module):
        yield from ((id(p), f"{name}.{own}") for own, p in value.named_parameters())
    elif depth and isinstance(value, dict | list | tuple):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in items:
            yield from _tensors_in(item, f"{name}.{key}" if name else str(key), depth - 1)


def _refused(message: str, hint: str) -> SpecError:
    return SpecError(Problem(("strategy", "pipeline"), message, hint))


SAMPLES = 2
"""That layers are tried with: one alone might lose its dimension in a `squeeze`."""
_SMALL = 1 << 20
"""Elements of a parameter whose gradient is compared: not all those of a large model are held."""
_CLOSE = 1e-3
"""Outputs may differ by so much of their norm, in rounding: sums are of other parts."""


def check_layers(
    model: nn.Module,
    layers: Sequence[Layer],
    inputs: Callable[[], Any],
    call: ModelCall | None = None,
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
        call: how the model is called; None: with its inputs.

    Raises:
        SpecError: they do not.
    """
    call = call or ModelCall()
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
        with untouched(*self._modules), generators_kept(), torch.enable_grad():
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
    elif not tensors_in(whole):
        _refuse_guess(layers, f"it gives {kind_of(whole)}, and no tensors that are seen")
    if not alike(behind, whole):
        mode = " in training" if training else ""
        raise _layers_do(layers, f"compute otherwise than {type(model).__name__} does{mode}")
    mine, theirs = ({id(leaf) for leaf in leaves(tensors_in(one))} for one in (behind, whole))
    differ = [name for name, p in model.named_parameters() if (id(p) in mine) != (id(p) in theirs)]
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
        theirs, again = (trial.run(of_model, 1) for _ in range(2))
        mine = trial.run(of_layers, 1)
    except Exception:  # a backward that fails comes again in training
        return
    differ = [] if other_gradients(again, theirs) else other_gradients(mine, theirs)
    if differ:
        text = f"give {', '.join(differ)} another gradient than {type(model).__name__} does"
        raise _layers_do(layers, text)


def _one_after_the_other(model: nn.Module, layers: Sequence[Layer], value: Any) -> Any:
    try:
        for layer in layers:
            # Stages have each a task of their own, which may count.
            beside = layer.module.beside() if isinstance(layer.module, Runner) else ()
            with attributes_kept(*beside):
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
    return _refused(text, _to_write(layers) or hint)


def _of_both(behind: Any, whole: Any) -> tuple[Any, Any]:
    """Leave out entries that the task's own layers do not give: who asks for one has an error."""
    if not (isinstance(behind, Mapping) and isinstance(whole, Mapping)):
        return behind, whole
    return {**behind}, {name: whole[name] for name in behind if name in whole}


def _refuse_guess(layers: Sequence[Layer], why: str) -> None:
    hint = _to_write(layers)
    if hint:
        raise _refused(f"the model's layers cannot be compared with the model: {why}", hint)


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


def leaves(outputs: Sequence[Tensor]) -> Iterator[Tensor]:
    """Give the tensors to which a backward from all outputs would add gradients."""
    waiting, seen = [one.grad_fn for one in outputs], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            yield leaf
        waiting += [following for following, _ in node.next_functions]


@torch.no_grad()
def inputs_of(layers: Sequence[Layer], starts: Mapping[int, int], inputs: Any) -> dict[int, Any]:
    """
    Give what enters some virtual stages for a few samples, in evaluation mode.

    Args:
        layers: of the whole model, not sliced.
        starts: by virtual stage, the number of its first layer.
        inputs: of the model.
    """
    found: dict[int, Any] = {}
    some = layers[: max(starts.values())]
    device = tensors_in(inputs)[0].device
    values = on_device(inputs, next((p.device for p in layers[0].module.parameters()), device))
    with untouched(*(layer.module for layer in some)):
        for number in range(len(some) + 1):
            found |= {
                virtual_stage: copied(values)
                for virtual_stage, start in starts.items()
                if start == number
            }
            if number < len(some):
                values = some[number].module(values)
    return {virtual_stage: on_device(value, device) for virtual_stage, value in found.items()}


def shared(inputs: Any, slices: Collective) -> Any:
    """Give all slices the first one's inputs: each has read them for itself, perhaps at random."""

    def one(value: Any) -> Any:
        if isinstance(value, Tensor):
            value = value.contiguous()
            slices.broadcast(value)
        return value

    return tree_map(one, inputs)


def alike(one: Any, other: Any) -> bool:
    """Compare the tensors in two results."""
    mine, theirs = tensors_in(one), tensors_in(other)
    return len(mine) == len(theirs) and all(map(_close, mine, theirs))


NamedGradients = Mapping[str, Tensor | None]
"""By the names of parameters."""


def gradients_of(outputs: Any, trained: Mapping[str, Tensor]) -> NamedGradients:
    """Give those of some sum of the outputs."""
    found = [one for one in tensors_in(outputs) if one.requires_grad]
    if not trained or not found:
        return {}
    total = torch.stack([_some_sum(one) for one in found]).sum()
    made = torch.autograd.grad(total, [*trained.values()], allow_unused=True)
    return dict(zip(trained, made, strict=True))


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
