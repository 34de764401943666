"""From a model to what one rank holds of it: layers, cut points, the chunks of its stage."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

from torch import Tensor, nn
from typing_extensions import override

from distplat.platform.errors import Problem, SpecError
from distplat.strategies.algorithms.partition import bounds
from distplat.strategies.algorithms.seeds import derive_seed
from distplat.strategies.checkpoint.checkpoint_types import Holding
from distplat.strategies.loop.seeding import seed_quickly
from distplat.strategies.model.block_layers import BeforeBlocks, CallOrder
from distplat.strategies.model.flat import FlatModel
from distplat.strategies.model.layers import (
    Layer,
    Stage,
    found_layers,
    layers_around_blocks,
    layers_of,
    named_tensors,
    refuse_tied,
    with_all_names,
    with_unread_buffers,
)
from distplat.strategies.model.meta import materialise
from distplat.strategies.model.model_call import Batch, ModelCall, TakesBatch
from distplat.strategies.model.module_hooks import called_hooks, saved_hooks
from distplat.strategies.model.module_options import recomputed
from distplat.strategies.model.trials import Runner
from distplat.strategies.pipeline.limits import NamesById
from distplat.strategies.pipeline.slicing_trial import SlicingTrial
from distplat.strategies.pipeline.values import copied
from distplat.strategies.task import Task, model_call_method, overrides
from distplat.strategies.task_methods import referenced_names
from distplat.strategies.tensor.parallel_layers import tensor_slice_of
from distplat.strategies.tensor.parallel_plan import ShardSpec
from distplat.strategies.torch_compat import has_global_hooks

_WHERE = ("strategy", "pipeline")
_SUPPORTED_HOOKS = {"a forward pre-hook", "a forward hook"}

Hook = Callable[..., Any]


def with_hooks(model: nn.Module, layers: Sequence[Layer]) -> list[Layer]:
    """
    Give the layers with the whole model's forward hooks around them.

    Raises:
        SpecError: the model, or a module between it and its layers, has something that a call of
            the layers alone would leave out; names each.
    """
    problems = [*_hooks_of_whole(model, layers), *_hooks_between(model, layers)]
    if has_global_hooks():
        text = "there are hooks for all modules (`register_module_..._hook`)"
        problems.append(_problem(text, "register them on the layers that they are for"))
    if problems:
        raise SpecError(*problems)
    hooked = list(layers)
    if model._forward_pre_hooks:
        hooks = list(model._forward_pre_hooks.values())
        hooked[0] = replace(hooked[0], module=_WithPreHooks(hooked[0].module, hooks))
    if model._forward_hooks:
        hooks = list(model._forward_hooks.values())
        hooked[-1] = replace(hooked[-1], module=_WithForwardHooks(hooked[-1].module, hooks))
    return hooked


def _hooks_of_whole(model: nn.Module, layers: Sequence[Layer]) -> list[Problem]:
    kinds = [kind for kind in called_hooks(model) if kind not in _SUPPORTED_HOOKS]
    kinds += [*saved_hooks(model), *_own_overrides(model, layers)]
    others: Mapping[str, object] = {
        "a hook `with_kwargs`": model._forward_pre_hooks_with_kwargs
        or model._forward_hooks_with_kwargs,
        "a hook with `always_call`": model._forward_hooks_always_called,
        "a `__call__` of its own": type(model).__call__ is not nn.Module.__call__,
    }
    kinds += [kind for kind, there in others.items() if there]
    text = "the whole model ({}) has {}, and a pipeline calls its layers only"
    hint = "put it on a layer, or set `pipeline: 1`"
    return [_problem(text.format(type(model).__name__, kind), hint) for kind in kinds]


def _own_overrides(module: nn.Module, layers: Sequence[Layer]) -> list[str]:
    """
    Name what a module does for all its parts, where that is more than to do it for each.

    Layers around a list of blocks are copies of the model with some of its parts, and are told the
    mode by their own `train`. Hugging Face's models have one that does no more than torch's.
    """
    copies = isinstance(layers[0].module, BeforeBlocks)
    usual: dict[str, object] = {"state_dict": nn.Module.state_dict}
    usual |= {} if copies else {"train": nn.Module.train}
    return [
        f"a `{name}` of its own"
        for name, method in usual.items()
        if getattr(type(module), name) is not method or name in vars(module)
        if name != "train" or not _sets_modes_only(module)
    ]


def _sets_modes_only(module: nn.Module) -> bool:
    """Whether `train` of a module sets the mode of all parts and changes no attribute beside."""
    every = [*module.modules()]
    modes = [one.training for one in every]
    held = [{**vars(one), "training": None} for one in every]
    trained = [one.requires_grad for one in module.parameters()]
    as_usual = True
    for mode in (True, False):
        module.train(mode)
        as_usual &= all(one.training is mode for one in every)
        for one, before in zip(every, held, strict=True):
            now = {**vars(one), "training": None}
            as_usual &= now.keys() == before.keys()
            as_usual &= all(now[name] is value for name, value in before.items() if name in now)
    as_usual &= trained == [one.requires_grad for one in module.parameters()]
    for one, mode in zip(every, modes, strict=True):
        one.training = mode
    return as_usual


def _hooks_between(model: nn.Module, layers: Sequence[Layer]) -> list[Problem]:
    """Find what is on modules of which only the parts are called."""
    inside = {id(module) for layer in layers for module in layer.module.modules()}
    problems = []
    for name, module in model.named_modules():
        if id(module) in inside or module is model:
            continue
        never_called = type(module).forward is nn.Module.forward
        kinds = [*([] if never_called else called_hooks(module)), *saved_hooks(module)]
        kinds += _own_overrides(module, layers)
        text = f"{name} ({type(module).__name__}) has {{}}, and a pipeline calls its parts only"
        hint = f"have the task's `stages` name {name} itself, or set `pipeline: 1`"
        problems += [_problem(text.format(kind), hint) for kind in kinds]
    return problems


def _problem(message: str, hint: str) -> Problem:
    return Problem(_WHERE, message, hint)


class _WithPreHooks(nn.Module):
    """The model's first layer behind the whole model's forward pre-hooks."""

    def __init__(self, module: nn.Module, hooks: Sequence[Hook]) -> None:
        super().__init__()
        self.module, self._hooks = module, tuple(hooks)

    def forward(self, inputs: Any) -> Any:
        if isinstance(inputs, Batch):
            text = "the whole model has a forward pre-hook, and is called with a whole batch"
            raise SpecError(_problem(text, "hang it on a layer, or set `pipeline: 1`"))
        for hook in self._hooks:
            given = hook(_NotOnThisRank(self), (inputs,))
            if isinstance(given, tuple):  # of arguments, as torch takes it
                if len(given) != 1:
                    text = f"a forward pre-hook of the model gives {len(given)} arguments"
                    hint = "have it give one, in a tuple if that is a tuple itself"
                    raise SpecError(_problem(f"{text}, and layers take one", hint))
                inputs = given[0]
            elif given is not None:
                inputs = given
        return self.module(inputs)


class _WithForwardHooks(nn.Module):
    """The model's last layer before the whole model's forward hooks."""

    def __init__(self, module: nn.Module, hooks: Sequence[Hook]) -> None:
        super().__init__()
        self.module, self._hooks = module, tuple(hooks)

    def forward(self, inputs: Any) -> Any:
        outputs = self.module(inputs)
        for hook in self._hooks:
            given = hook(_NotOnThisRank(self), _NotOnThisRank(), outputs)
            if given is not None:
                outputs = given
        return outputs


class _NotOnThisRank:
    """
    Stands for the whole model, or its inputs, where a rank has a part of them.

    Args:
        here: the rank's part of the model, which knows the mode; None: these are the inputs.
    """

    def __init__(self, here: nn.Module | None = None) -> None:
        self.__dict__["_here"] = here

    def __getattr__(self, name: str) -> Any:
        if name == "training" and self._here is not None:
            return self._here.training
        self._refuse(f"`{name}` of the whole model" if self._here is not None else "inputs")

    def __setattr__(self, name: str, value: object) -> None:
        self._refuse(f"`{name}` of the whole model, to write it" if self._here else "inputs")

    def _refuse_items(self, *_: object) -> Any:
        self._refuse("inputs" if self._here is None else "parts of the whole model")

    __getitem__ = __iter__ = __len__ = _refuse_items

    def __call__(self, *_: object) -> Any:
        self._refuse("a call of the whole model")

    def _refuse(self, what: str) -> NoReturn:
        text = f"a hook of the whole model asks for {what}, which no stage has"
        raise SpecError(_problem(text, "hang it on a layer, or set `pipeline: 1`"))


class Chunk(nn.Module, ABC):
    """What one virtual stage computes."""

    recompute = False
    """Keep the input only, and compute again in backward."""

    def run(self, inputs: Any, seed: int) -> Any:
        """
        Go forward on one micro-batch.

        Args:
            inputs: of the virtual stage.
            seed: of the micro-batch; dropout and its like draw from generators seeded by it.
        """
        if self.recompute:
            return recomputed(_Seeded(self, seed), inputs)
        return self.seeded(inputs, seed)

    @abstractmethod
    def seeded(self, inputs: Any, seed: int) -> Any:
        """Go forward as `run` does, whatever is kept for backward."""

    @abstractmethod
    def set_mode(self, *, training: bool) -> None:
        """Switch between training and evaluation."""


class Layers(Stage, Chunk):
    """
    Layers one behind the other that run on one rank.

    Args:
        layers: of the model.
        first: number of the first of them in the model.
        recompute: see `Chunk`.
    """

    def __init__(self, layers: Sequence[Layer], first: int, *, recompute: bool = False) -> None:
        super().__init__(layers)
        self._first, self.recompute = first, recompute

    @override
    def seeded(self, inputs: Any, seed: int) -> Any:
        """Each layer draws from a generator of its own."""
        for number, module in enumerate(self.in_order, start=self._first):
            seed_quickly(derive_seed(seed, number))
            inputs = module(inputs)
        return inputs

    @override
    def set_mode(self, *, training: bool) -> None:
        """Layers made around parts, too."""
        for module in self.in_order:
            module.train(training)


class WholeModelChunk(Runner, Chunk):
    """
    The whole model, called as plain torch calls it: any inputs, any outputs, all of its hooks.

    Args:
        model: with values.
        call: how it is called.
        recompute: see `Chunk`.
    """

    def __init__(self, model: nn.Module, call: ModelCall, *, recompute: bool) -> None:
        super().__init__()
        self.model, self._call, self.recompute = model, call, recompute

    @override
    def beside(self) -> tuple[object, ...]:
        return self._call.holders

    @override
    def seeded(self, inputs: Any, seed: int) -> Any:
        """The whole model draws from one generator."""
        seed_quickly(derive_seed(seed, 0))
        return self._call(self.model, inputs)

    @override
    def set_mode(self, *, training: bool) -> None:
        self.model.train(training)


class _Seeded(nn.Module):
    """A chunk on one micro-batch: what is computed again must draw the same numbers."""

    def __init__(self, chunk: Chunk, seed: int) -> None:
        super().__init__()
        self.chunk, self._seed = chunk, seed

    def forward(self, inputs: Any) -> Any:
        # Copies: a layer may work in place, and what is computed again begins with the same values.
        return self.chunk.seeded(copied(inputs), self._seed)


@dataclass
class ModelPart:
    """What one rank holds."""

    points: list[int]
    """Where the whole model is cut: numbers of the layers with which virtual stages begin."""
    chunks: dict[int, Chunk]
    """By virtual stage."""
    module: nn.Module
    """All chunks' layers, with the names that they have in the model."""
    order: CallOrder | None = None
    """Of the whole model's parts; see `call_order.py`. None: nobody has asked."""
    specs: dict[str, ShardSpec] = field(default_factory=dict)
    """Which slice of a tensor this rank has; what is not in it is whole."""
    names: NamesById = field(default_factory=dict)
    """Of the whole model's parameters, for errors."""
    trial: SlicingTrial | None = None
    """To be compared once, by all slices together; None: there is nothing to compare."""
    flat: FlatModel = field(init=False)
    """`module` on flat vectors; once it is sliced, for then no parameter is exchanged any more."""

    def holding(self, part: int) -> Holding:
        """
        Say what of the whole model this is.

        What is not sliced is the same on all slices, and the first gives it; of a branch that is
        elsewhere there are buffers here, which are not kept up.

        Args:
            part: number of this rank's slice.
        """
        here = self.flat.model.state_dict()
        slices = {name: tensor_slice_of(t.shape, self.specs.get(name)) for name, t in here.items()}
        others = {
            name
            for name in here
            if (not self.specs[name].extent if name in self.specs else part > 0)
        }
        return Holding(slices, others)


def layers_for(task: Task, model: nn.Module, order: CallOrder | None = None) -> list[Layer]:
    """
    Give a model's layers, as the task names them or as a trace finds them.

    Args:
        task: the user's.
        model: whole.
        order: of its parts; see `call_order.py`.

    Raises:
        SpecError: neither way works, a parameter of the model is in no layer, or the layers leave
            out what the model does around them.
    """
    find = _layers_of_own_call if model_call_method(task) else _listed_or_found
    layers = find(task, model, order)
    inside = {id(t) for layer in layers for _, t in named_tensors(layer.module)}
    inside |= {id(p) for layer in layers for p in layer.parts.values() if isinstance(p, Tensor)}
    outside = [name for name, tensor in model.named_parameters() if id(tensor) not in inside]
    if outside:
        text = f"parameters of the model are in no stage: {', '.join(outside)}"
        raise SpecError(Problem((), text, "have the task's `stages` name all parts of the model"))
    return with_hooks(model, with_unread_buffers(model, layers, inside))


def _listed_or_found(task: Task, model: nn.Module, order: CallOrder | None) -> list[Layer]:
    """Give layers whose first takes the inputs, or a batch that is a mapping."""
    try:
        modules = task.stages(model)
    except NotImplementedError:
        layers = found_layers(model, ModelCall(task), order)
    else:
        layers = with_all_names(model, layers_of(model, modules))
    if isinstance(layers[0].module, BeforeBlocks):
        return layers
    of_one = None if overrides(type(task), "stages") else model
    return [replace(layers[0], module=TakesBatch(layers[0].module, of_one)), *layers[1:]]


def _layers_of_own_call(task: Task, model: nn.Module, order: CallOrder | None) -> list[Layer]:
    """Give layers that do all that the task's own `forward` or `step` does."""
    _refuse_other_draws(task)
    layers = None
    if not overrides(type(task), "stages") and not called_hooks(model):
        layers = layers_around_blocks(model, ModelCall(task), order)
    if layers is None:
        name = f"{type(task).__name__}.{model_call_method(task)}()"
        text = f"{name} calls the whole model, and only models of blocks without hooks are cut so"
        hint = (
            "leave it out: give pairs (inputs, targets), or dicts of the model's arguments, and a "
            "loss(outputs, targets); or set `pipeline: 1`"
        )
        raise SpecError(Problem(("task",), text, hint))
    return layers


def _refuse_other_draws(task: Task) -> None:
    """Refuse numbers of python's or numpy's: what torch draws is seen when it is drawn."""
    method = model_call_method(task) or ""
    named = referenced_names(getattr(type(task), method)) & {"random", "default_rng"}
    if named:
        text = f"{type(task).__name__}.{method}() names `{min(named)}`, and runs on two stages"
        hint = "draw numbers in collate(), or set `pipeline: 1`"
        raise SpecError(Problem(("task",), text, hint))


def take_part(
    layers: Sequence[Layer],
    points: Sequence[int],
    virtual_stages: Sequence[int],
    *,
    recompute: bool,
    seed: int | None,
    device: str,
) -> ModelPart:
    """
    Make what one rank holds; the rest of the model is free to go.

    Args:
        layers: of the whole model.
        points: where it is cut.
        virtual_stages: which of the pieces are this rank's, rising.
        recompute: see `Chunk`.
        seed: of the job, where layers are on `meta` and still to be given values.
        device: where the rank computes.

    Raises:
        SpecError: a tensor would be on two ranks, or a virtual stage would have nothing to train.
    """
    refuse_tied(layers, points)
    runs = bounds(points, len(layers))
    _refuse_untrained(layers, runs)
    own_layers: list[Layer] = []
    chunks: dict[int, Chunk] = {}
    for virtual_stage in virtual_stages:
        start, stop = runs[virtual_stage]
        some = layers[start:stop]
        if seed is not None:
            materialise(some, start, seed, device)
        for layer in some:
            layer.module.to(device)
        chunks[virtual_stage] = Layers(some, start, recompute=recompute)
        own_layers += some
    return ModelPart(list(points), chunks, Stage(own_layers))


def take_whole(
    task: Task, model: nn.Module, *, recompute: bool, seed: int | None, device: str
) -> ModelPart:
    """
    Make what a rank holds of a model that is not cut; see `take_part`.

    Raises:
        SpecError: values are wanted (`seed`), and the model's layers cannot be told.
    """
    if seed is not None:
        materialise(layers_for(task, model), 0, seed, device)
    whole = WholeModelChunk(model.to(device), ModelCall(task), recompute=recompute)
    return ModelPart([], {0: whole}, model)


def _refuse_untrained(layers: Sequence[Layer], runs: Sequence[tuple[int, int]]) -> None:
    """All ranks say this alike: each rank of a stage needs something to exchange and update."""
    for start, stop in runs:
        some = layers[start:stop]
        if not any(p.requires_grad for layer in some for p in layer.module.parameters()):
            text = f"a stage would have nothing to train: {', '.join(one.name for one in some)}"
            raise SpecError(Problem(("strategy", "cut"), text, "cut elsewhere, or by `cut: auto`"))
