"""A rank's part of a model: its layers, hooks, and the chunks of its stage."""

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
    find_layers,
    layers_around_blocks,
    layers_of,
    named_tensors,
    refuse_tied,
    with_all_names,
    with_unread_buffers,
)
from distplat.strategies.model.meta import materialise
from distplat.strategies.model.model_call import Batch, BatchInput, ModelCall
from distplat.strategies.model.module_hooks import called_hooks, saved_hooks
from distplat.strategies.model.module_options import recomputed
from distplat.strategies.model.trials import Runner
from distplat.strategies.pipeline.limits import NamesById
from distplat.strategies.pipeline.slicing_trial import SlicingTrial
from distplat.strategies.pipeline.values import clone_tensors
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
    Return the layers, wrapped in the whole model's forward hooks.

    Raises:
        SpecError: the model, or a module between it and its layers, has hooks or overrides that
            calling the layers alone would skip; names each.
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
    found = [hook for hook in called_hooks(model) if hook not in _SUPPORTED_HOOKS]
    found += [*saved_hooks(model), *_own_overrides(model, layers)]
    unsupported: Mapping[str, object] = {
        "a hook `with_kwargs`": model._forward_pre_hooks_with_kwargs
        or model._forward_hooks_with_kwargs,
        "a hook with `always_call`": model._forward_hooks_always_called,
        "a `__call__` of its own": type(model).__call__ is not nn.Module.__call__,
    }
    found += [feature for feature, is_used in unsupported.items() if is_used]
    text = "the whole model ({}) has {}, and a pipeline calls its layers only"
    hint = "put it on a layer, or set `pipeline: 1`"
    return [_problem(text.format(type(model).__name__, feature), hint) for feature in found]


def _own_overrides(module: nn.Module, layers: Sequence[Layer]) -> list[str]:
    """
    Return the overridden methods of a module that calling its parts would skip.

    Layers around a list of blocks are copies of the model with some of its parts, so their `train`
    is called. Hugging Face models override `train` with one that is equivalent to torch's.
    """
    are_copies = isinstance(layers[0].module, BeforeBlocks)
    defaults: dict[str, object] = {"state_dict": nn.Module.state_dict}
    defaults |= {} if are_copies else {"train": nn.Module.train}
    return [
        f"a `{name}` of its own"
        for name, method in defaults.items()
        if getattr(type(module), name) is not method or name in vars(module)
        if name != "train" or not _sets_modes_only(module)
    ]


def _sets_modes_only(module: nn.Module) -> bool:
    """Return whether `train` sets the mode of all submodules and changes nothing else."""
    modules = [*module.modules()]
    modes = [part.training for part in modules]
    attributes = [{**vars(part), "training": None} for part in modules]
    trained = [p.requires_grad for p in module.parameters()]
    is_default = True
    for mode in (True, False):
        module.train(mode)
        is_default &= all(part.training is mode for part in modules)
        for part, before in zip(modules, attributes, strict=True):
            now = {**vars(part), "training": None}
            is_default &= now.keys() == before.keys()
            is_default &= all(now[name] is value for name, value in before.items() if name in now)
    is_default &= trained == [p.requires_grad for p in module.parameters()]
    for part, mode in zip(modules, modes, strict=True):
        part.training = mode
    return is_default


def _hooks_between(model: nn.Module, layers: Sequence[Layer]) -> list[Problem]:
    """Return problems of modules that are not called themselves, only their parts."""
    inside = {id(module) for layer in layers for module in layer.module.modules()}
    problems = []
    for name, module in model.named_modules():
        if id(module) in inside or module is model:
            continue
        never_called = type(module).forward is nn.Module.forward
        found = [*([] if never_called else called_hooks(module)), *saved_hooks(module)]
        found += _own_overrides(module, layers)
        text = f"{name} ({type(module).__name__}) has {{}}, and a pipeline calls its parts only"
        hint = f"let the task's `stages` name {name} itself, or set `pipeline: 1`"
        problems += [_problem(text.format(feature), hint) for feature in found]
    return problems


def _problem(message: str, hint: str) -> Problem:
    return Problem(_WHERE, message, hint)


class _WithPreHooks(nn.Module):
    """The model's first layer, preceded by the whole model's forward pre-hooks."""

    def __init__(self, module: nn.Module, hooks: Sequence[Hook]) -> None:
        super().__init__()
        self.module, self._hooks = module, tuple(hooks)

    @override
    def forward(self, inputs: Any) -> Any:
        if isinstance(inputs, Batch):
            text = "the whole model has a forward pre-hook, and is called with a whole batch"
            raise SpecError(_problem(text, "put it on a layer, or set `pipeline: 1`"))
        for hook in self._hooks:
            result = hook(_NotOnThisRank(self), (inputs,))
            if isinstance(result, tuple):  # as in torch, a tuple holds the arguments
                if len(result) != 1:
                    text = f"a forward pre-hook of the model returns {len(result)} arguments"
                    hint = "let it return one, wrapped in a tuple if the argument is a tuple"
                    raise SpecError(_problem(f"{text}, and layers take one", hint))
                inputs = result[0]
            elif result is not None:
                inputs = result
        return self.module(inputs)


class _WithForwardHooks(nn.Module):
    """The model's last layer, followed by the whole model's forward hooks."""

    def __init__(self, module: nn.Module, hooks: Sequence[Hook]) -> None:
        super().__init__()
        self.module, self._hooks = module, tuple(hooks)

    @override
    def forward(self, inputs: Any) -> Any:
        outputs = self.module(inputs)
        for hook in self._hooks:
            result = hook(_NotOnThisRank(self), _NotOnThisRank(), outputs)
            if result is not None:
                outputs = result
        return outputs


class _NotOnThisRank:
    """
    Placeholder passed to hooks for the whole model or its inputs, which no rank has.

    Args:
        part: the rank's part of the model, which knows the mode; None: a placeholder of inputs.
    """

    def __init__(self, part: nn.Module | None = None) -> None:
        self.__dict__["_part"] = part

    def __getattr__(self, name: str) -> Any:
        if name == "training" and self._part is not None:
            return self._part.training
        self._refuse(f"`{name}` of the whole model" if self._part is not None else "inputs")

    @override
    def __setattr__(self, name: str, value: object) -> None:
        self._refuse(f"`{name}` of the whole model, to write it" if self._part else "inputs")

    def _refuse_items(self, *_: object) -> Any:
        self._refuse("inputs" if self._part is None else "parts of the whole model")

    __getitem__ = __iter__ = __len__ = _refuse_items

    def __call__(self, *_: object) -> Any:
        self._refuse("a call of the whole model")

    def _refuse(self, what: str) -> NoReturn:
        text = f"a hook of the whole model uses {what}, which no stage has"
        raise SpecError(_problem(text, "put it on a layer, or set `pipeline: 1`"))


class Chunk(nn.Module, ABC):
    """The layers of one virtual stage."""

    recompute = False
    """Keep only the input, and recompute activations in backward."""

    def run(self, inputs: Any, seed: int) -> Any:
        """
        Run the forward of one micro-batch.

        Args:
            inputs: of the virtual stage.
            seed: of the micro-batch, for dropout and other random numbers.
        """
        if self.recompute:
            return recomputed(_Seeded(self, seed), inputs)
        return self.seeded(inputs, seed)

    @abstractmethod
    def seeded(self, inputs: Any, seed: int) -> Any:
        """Run the forward as `run` does, but without recomputation in backward."""

    @abstractmethod
    def set_mode(self, *, training: bool) -> None:
        """Switch between training and evaluation."""


class Layers(Stage, Chunk):
    """
    Consecutive layers that run on one rank.

    Args:
        layers: of the model.
        first: number of the first layer within the model.
        recompute: see `Chunk`.
    """

    def __init__(self, layers: Sequence[Layer], first: int, *, recompute: bool = False) -> None:
        super().__init__(layers)
        self._first, self.recompute = first, recompute

    @override
    def seeded(self, inputs: Any, seed: int) -> Any:
        """Each layer has its own seed."""
        for number, module in enumerate(self.in_order, start=self._first):
            seed_quickly(derive_seed(seed, number))
            inputs = module(inputs)
        return inputs

    @override
    def set_mode(self, *, training: bool) -> None:
        """Includes the wrappers around layers."""
        for module in self.in_order:
            module.train(training)


class WholeModelChunk(Runner, Chunk):
    """
    The whole model, called as in plain torch: any inputs, any outputs, all hooks.

    Args:
        model: with values.
        call: calls the model.
        recompute: see `Chunk`.
    """

    def __init__(self, model: nn.Module, call: ModelCall, *, recompute: bool) -> None:
        super().__init__()
        self.model, self._call, self.recompute = model, call, recompute

    @override
    def external_objects(self) -> tuple[object, ...]:
        return self._call.holders

    @override
    def seeded(self, inputs: Any, seed: int) -> Any:
        """The whole model has one seed."""
        seed_quickly(derive_seed(seed, 0))
        return self._call(self.model, inputs)

    @override
    def set_mode(self, *, training: bool) -> None:
        self.model.train(training)


class _Seeded(nn.Module):
    """A chunk with the seed of one micro-batch, so recomputation draws the same numbers."""

    def __init__(self, chunk: Chunk, seed: int) -> None:
        super().__init__()
        self.chunk, self._seed = chunk, seed

    @override
    def forward(self, inputs: Any) -> Any:
        # A layer may work in place, and recomputation needs the same inputs.
        return self.chunk.seeded(clone_tensors(inputs), self._seed)


@dataclass
class ModelPart:
    """One rank's part of the model."""

    points: list[int]
    """Cut points of the whole model: the first layers of virtual stages 1, 2, ..."""
    chunks: dict[int, Chunk]
    """Chunks of this rank, by virtual stage."""
    module: nn.Module
    """The layers of all chunks, with their names in the model."""
    order: CallOrder | None = None
    """Call order of the whole model's parts, see `call_order.py`; None: not needed."""
    specs: dict[str, ShardSpec] = field(default_factory=dict)
    """This rank's slice of each sliced tensor, by name."""
    names: NamesById = field(default_factory=dict)
    """Names of the whole model's parameters, for errors."""
    trial: SlicingTrial | None = None
    """Trial to be compared once, by all slices together; None: nothing to compare."""
    flat: FlatModel = field(init=False)
    """`module` on flat vectors; set after slicing, which replaces parameters."""

    def holding(self, part: int) -> Holding:
        """
        Return the position of this part in the whole model.

        The first slice holds the tensors that are not sliced. Buffers of branches on other slices
        exist here too, but are not updated.

        Args:
            part: number of this rank's slice.
        """
        state = self.flat.model.state_dict()
        slices = {name: tensor_slice_of(t.shape, self.specs.get(name)) for name, t in state.items()}
        others = {
            name
            for name in state
            if (not self.specs[name].extent if name in self.specs else part > 0)
        }
        return Holding(slices, others)


def layers_for(task: Task, model: nn.Module, order: CallOrder | None = None) -> list[Layer]:
    """
    Return a model's layers, as listed by the task or found by a trace.

    Args:
        task: the user's task.
        model: the whole model.
        order: call order of its parts; see `call_order.py`.

    Raises:
        SpecError: no layers are listed or found, a parameter of the model is in no layer, or the
            model does something around its layers.
    """
    find = _layers_of_own_call if model_call_method(task) else _listed_or_found
    layers = find(task, model, order)
    inside = {id(t) for layer in layers for _, t in named_tensors(layer.module)}
    inside |= {id(p) for layer in layers for p in layer.parts.values() if isinstance(p, Tensor)}
    outside = [name for name, tensor in model.named_parameters() if id(tensor) not in inside]
    if outside:
        text = f"parameters of the model are in no stage: {', '.join(outside)}"
        raise SpecError(Problem((), text, "let the task's `stages` name all parts of the model"))
    return with_hooks(model, with_unread_buffers(model, layers, inside))


def _listed_or_found(task: Task, model: nn.Module, order: CallOrder | None) -> list[Layer]:
    """Return layers of which the first takes the inputs, or a batch that is a mapping."""
    try:
        modules = task.stages(model)
    except NotImplementedError:
        layers = find_layers(model, ModelCall(task), order)
    else:
        layers = with_all_names(model, layers_of(model, modules))
    if isinstance(layers[0].module, BeforeBlocks):
        return layers
    of_one = None if overrides(type(task), "stages") else model
    return [replace(layers[0], module=BatchInput(layers[0].module, of_one)), *layers[1:]]


def _layers_of_own_call(task: Task, model: nn.Module, order: CallOrder | None) -> list[Layer]:
    """Return layers that together do what the task's own `forward` or `step` does."""
    _refuse_foreign_rng(task)
    layers = None
    if not overrides(type(task), "stages") and not called_hooks(model):
        layers = layers_around_blocks(model, ModelCall(task), order)
    if layers is None:
        name = f"{type(task).__name__}.{model_call_method(task)}()"
        text = f"{name} calls the whole model, which can be cut only if it has blocks and no hooks"
        hint = (
            "remove it: use pairs (inputs, targets) or dicts of the model's arguments as batches, "
            "and a loss(outputs, targets); or set `pipeline: 1`"
        )
        raise SpecError(Problem(("task",), text, hint))
    return layers


def _refuse_foreign_rng(task: Task) -> None:
    """Raise if the task uses Python's or numpy's generators; torch's are checked at runtime."""
    method = model_call_method(task) or ""
    named = referenced_names(getattr(type(task), method)) & {"random", "default_rng"}
    if named:
        text = f"{type(task).__name__}.{method}() names `{min(named)}`, and is called on two stages"
        hint = "draw numbers in collate(), or set `pipeline: 1`"
        raise SpecError(Problem(("task",), text, hint))


def build_part(
    layers: Sequence[Layer],
    points: Sequence[int],
    virtual_stages: Sequence[int],
    *,
    recompute: bool,
    seed: int | None,
    device: str,
) -> ModelPart:
    """
    Build one rank's part of a model.

    Args:
        layers: of the whole model.
        points: cut points.
        virtual_stages: of this rank, in ascending order.
        recompute: see `Chunk`.
        seed: of the job, if layers are on the meta device and must be initialised; else None.
        device: of the rank.

    Raises:
        SpecError: two ranks would hold the same tensor, or a virtual stage has nothing to train.
    """
    refuse_tied(layers, points)
    runs = bounds(points, len(layers))
    _refuse_untrained(layers, runs)
    own_layers: list[Layer] = []
    chunks: dict[int, Chunk] = {}
    for virtual_stage in virtual_stages:
        start, stop = runs[virtual_stage]
        chunk_layers = layers[start:stop]
        if seed is not None:
            materialise(chunk_layers, start, seed, device)
        for layer in chunk_layers:
            layer.module.to(device)
        chunks[virtual_stage] = Layers(chunk_layers, start, recompute=recompute)
        own_layers += chunk_layers
    return ModelPart(list(points), chunks, Stage(own_layers))


def build_whole(
    task: Task, model: nn.Module, *, recompute: bool, seed: int | None, device: str
) -> ModelPart:
    """
    Build the part of a rank for a model that is not cut; see `build_part`.

    Raises:
        SpecError: the model must be initialised (`seed`), and its layers are not found.
    """
    if seed is not None:
        materialise(layers_for(task, model), 0, seed, device)
    whole = WholeModelChunk(model.to(device), ModelCall(task), recompute=recompute)
    return ModelPart([], {0: whole}, model)


def _refuse_untrained(layers: Sequence[Layer], runs: Sequence[tuple[int, int]]) -> None:
    """Check on all ranks that each virtual stage has parameters to sync and update."""
    for start, stop in runs:
        stage = layers[start:stop]
        if not any(p.requires_grad for layer in stage for p in layer.module.parameters()):
            names = ", ".join(layer.name for layer in stage)
            text = f"a stage would have nothing to train: {names}"
            raise SpecError(Problem(("strategy", "cut"), text, "cut elsewhere, or by `cut: auto`"))
