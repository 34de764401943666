"""A model as a sequence of layers: listed by the user, traced, or around a list of blocks."""

import threading
from collections import defaultdict
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from typing_extensions import override

from distplat.platform.errors import Problem, SpecError
from distplat.strategies.algorithms.partition import bounds
from distplat.strategies.model.block_layers import CallOrder, block_modules, number_of_blocks
from distplat.strategies.model.model_call import ModelCall, changed_modes, torch_modes
from distplat.strategies.model.module_hooks import called_hooks
from distplat.strategies.model.trials import ModuleSnapshot, Runner
from distplat.strategies.task_methods import referenced_names
from distplat.strategies.torch_compat import RandomOpWatch

ModuleOrTensor = nn.Module | Tensor


@dataclass(frozen=True)
class Layer:
    """A module of the sequence."""

    name: str
    """Name in the model, for example `blocks.3`."""
    module: nn.Module
    parts: Mapping[str, ModuleOrTensor]
    """The model's modules and tensors in the layer, by name; several for a module built around
    them. They include every parameter and buffer of the layer."""


def layers_of(model: nn.Module, modules: Sequence[nn.Module] | None = None) -> list[Layer]:
    """
    Return a model's layers with their names.

    Args:
        model: an `nn.Sequential`; with `modules` any model.
        modules: the layers in order, as returned by a task's `stages`: modules of the model, or
            modules built around its parts.

    Raises:
        SpecError: the order is unknown, a module occurs twice, or a module has parameters that the
            model does not have.
    """
    if modules is None:
        if not isinstance(model, nn.Sequential):
            raise _layer_error(
                f"{type(model).__name__} does not say in which order its parts run",
                "give the task a `stages(model)`, or have the model traced",
            )
        modules = list(model)
    names: dict[int, str] = {}
    for name, part in (*model.named_modules(), *named_tensors(model)):
        names.setdefault(id(part), name)
    seen: dict[int, int] = {}
    layers = []
    for number, module in enumerate(modules):
        parts = dict(_parts(module, names, f"layer {number}"))
        name = names.get(id(module)) or next(iter(parts), f"{type(module).__name__}_{number}")
        if (first := seen.setdefault(id(module), number)) != number:
            raise _layer_error(
                f"layers {first} and {number} are one module, {name}",
                "use two modules, or one module around all that lies between them",
            )
        layers.append(Layer(name, module, parts))
    return layers


def _parts(
    module: nn.Module, names: Mapping[int, str], layer: str
) -> Iterator[tuple[str, ModuleOrTensor]]:
    """Yield the largest parts of a module that belong to the model."""
    name = names.get(id(module))
    if name:  # "" is the model
        yield name, module
        return
    for own, tensor in named_tensors(module, recurse=False):
        if id(tensor) not in names:
            raise _layer_error(
                f"{layer} has a parameter or buffer that the model does not have: {own}",
                "make it a part of the model",
            )
        yield names[id(tensor)], tensor
    for child in module.children():
        yield from _parts(child, names, layer)


class Stage(Runner):
    """A sequence of layers; parameters have the same names as in the model."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        super().__init__()
        # A tuple does not register its modules a second time.
        self.in_order = tuple(layer.module for layer in layers)
        modules = (module for layer in layers for module in layer.module.modules())
        unsaved = {id(m._buffers[n]) for m in modules for n in m._non_persistent_buffers_set}
        for layer in layers:
            for name, part in layer.parts.items():
                self._attach(name, part, saved=id(part) not in unsaved)

    @override
    def forward(self, inputs: Any) -> Any:
        """Run all layers; each is called with the outputs of the previous one."""
        for module in self.in_order:
            inputs = module(inputs)
        return inputs

    def _attach(self, name: str, part: ModuleOrTensor, *, saved: bool) -> None:
        # add_module() would refuse a user's part with the name of a method of this class.
        owner: nn.Module = self
        *path, last = name.split(".")
        for step in path:
            inner = owner._modules.setdefault(step, nn.Module())
            assert inner is not None, "parts are modules"
            owner = inner
        if isinstance(part, nn.Module):
            owner._modules[last] = part
        elif isinstance(part, nn.Parameter):
            owner._parameters[last] = part
        else:
            owner.register_buffer(last, part, persistent=saved)


def refuse_tied(layers: Sequence[Layer], points: Sequence[int]) -> None:
    """
    Refuse cuts between layers that share a parameter or a buffer.

    Each stage would train its own copy, and the copies would diverge silently.

    Raises:
        SpecError: names every such tensor with all its names and stages.
    """
    stages_by_name: defaultdict[int, dict[str, int]] = defaultdict(dict)
    for number, (start, stop) in enumerate(bounds(points, len(layers))):
        for layer in layers[start:stop]:
            for name, tensor in _saved_tensors(layer):
                # The same name in two stages means that both run the module.
                stages_by_name[id(tensor)].setdefault(f"{name} (stage {number})", number)
    problems = []
    for names in stages_by_name.values():
        if len({*names.values()}) > 1:
            hint = "cut so that they are in one stage, or give each layer a parameter of its own"
            problems.append(Problem((), f"{' and '.join(names)} are one tensor", hint))
    if problems:
        raise SpecError(*problems)


def _saved_tensors(layer: Layer) -> Iterator[tuple[str, Tensor]]:
    """Yield parameters and persistent buffers; other buffers are computed equally in each stage."""
    for name, part in layer.parts.items():
        if isinstance(part, nn.Module):
            computed = {
                f"{path}.{buffer}".lstrip(".")
                for path, module in part.named_modules()
                for buffer in module._non_persistent_buffers_set
            }
            saved = ((own, tensor) for own, tensor in named_tensors(part) if own not in computed)
            yield from ((f"{name}.{own}", tensor) for own, tensor in saved)
        else:
            yield name, part


def named_tensors(module: nn.Module, *, recurse: bool = True) -> Iterator[tuple[str, Tensor]]:
    """Yield parameters and buffers under all of their names."""
    yield from module.named_parameters(recurse=recurse, remove_duplicate=False)
    yield from module.named_buffers(recurse=recurse, remove_duplicate=False)


def _layer_error(message: str, hint: str) -> SpecError:
    return SpecError(Problem((), message, hint))


TRACE_LOCK = threading.Lock()
"""torch.fx patches `nn.Module.__call__` for all threads while it traces."""


class _Tracer(fx.Tracer):
    def __init__(self) -> None:
        super().__init__()
        self._modes = torch_modes()

    @override
    def create_node(self, kind: str, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """
        Create a node of the graph.

        Raises:
            ValueError: it runs inside a context such as `no_grad` or autocast, which traces omit.
        """
        changed = changed_modes(self._modes)
        if changed:
            raise ValueError(f"it runs {target} inside of {changed}, which a trace leaves out")
        return super().create_node(kind, target, *args, **kwargs)

    @override
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Trace only into `nn.Sequential` without hooks: a trace would run hooks only once."""
        return type(m) is not nn.Sequential or bool(called_hooks(m))


def traced_layers(model: nn.Module) -> list[Layer]:
    """
    Trace a model and cut it into as many layers as possible.

    A layer has the name of its first part.

    Args:
        model: with one input tensor and one output tensor.

    Raises:
        SpecError: the model cannot be traced, or has more than one input or output.
    """
    graph = _trace(model)
    nodes, result = _call_nodes(graph), _result(graph)
    runs: list[list[fx.Node]] = [[]]
    for node, values in zip(nodes, _live_values(graph), strict=True):
        runs[-1].append(node)
        if values == [node]:
            runs.append([])
    tail = runs.pop()
    if tail:  # the graph ends with a node whose value is unused, such as an in-place operation
        runs = [*runs[:-1], [*runs[-1], *tail]] if runs and result in runs[-1] else [*runs, tail]
    entering = next(node for node in graph.nodes if node.op == "placeholder")
    modules = []
    for run in runs:
        leaving = result if run is runs[-1] else run[-1]
        modules.append(_segment(model, run, entering, leaving))
        entering = leaving
    layers = layers_of(model, modules)
    return [
        layer if layer.parts else replace(layer, name=run[0].name)
        for layer, run in zip(layers, runs, strict=True)
    ]


def find_layers(
    model: nn.Module, call: ModelCall | None = None, order: CallOrder | None = None
) -> list[Layer]:
    """
    Find a model's layers by a trace, or around its list of blocks if that yields more layers.

    Args:
        model: any model.
        call: how the model is called; None: with its inputs.
        order: see `block_modules`.

    Raises:
        SpecError: the model has no list of blocks and cannot be traced; says why.
    """
    try:
        traced = traced_layers(model)
    except SpecError:
        layers = layers_around_blocks(model, call or ModelCall(), order)
        if layers is None:
            raise
        return layers
    if len(traced) >= number_of_blocks(model):
        return traced
    return layers_around_blocks(model, call or ModelCall(), order) or traced


def layers_around_blocks(
    model: nn.Module, call: ModelCall, order: CallOrder | None
) -> list[Layer] | None:
    """
    Return the layers of `block_modules`; None: the model has no list of blocks.

    The last layer has the name of its first part that is not in the first layer.
    """
    blocks = block_modules(model, call, order)
    if blocks is None:
        return None
    layers = layers_of(model, blocks)
    own = [name for name in layers[-1].parts if name not in layers[0].parts]
    if own:
        layers[-1] = replace(layers[-1], name=own[0])
    return with_all_names(model, layers)


def with_all_names(model: nn.Module, layers: Sequence[Layer]) -> list[Layer]:
    """Add all names of shared parameters to the first layer that contains them."""
    layers = list(layers)
    first_layers: dict[int, int] = {}
    for number, layer in enumerate(layers):
        for _, tensor in _saved_tensors(layer):
            first_layers.setdefault(id(tensor), number)
    named = {name for layer in layers for name, _ in _saved_tensors(layer)}
    for name, tensor in model.named_parameters(remove_duplicate=False):
        if name not in named and (owner := first_layers.get(id(tensor))) is not None:
            layers[owner] = replace(layers[owner], parts={**layers[owner].parts, name: tensor})
    return layers


def with_unread_buffers(
    model: nn.Module, layers: Sequence[Layer], inside: Container[int]
) -> list[Layer]:
    """
    Add buffers that no layer reads, such as a version, to the first layer, to save them.

    Args:
        model: the whole model.
        layers: of the model.
        inside: the ids of all tensors in the layers.
    """
    saved = model.state_dict()
    unread = {n: b for n, b in model.named_buffers() if n in saved and id(b) not in inside}
    return [replace(layers[0], parts={**layers[0].parts, **unread}), *layers[1:]]


def _trace(model: nn.Module) -> fx.Graph:
    modes = [(module, module.training) for module in model.modules()]
    snapshot, graphs = ModuleSnapshot(model.named_modules(), trained=True), []
    try:
        for mode in (True, False):
            model.train(mode)
            # One trace runs inside autocast, to detect a forward that disables it.
            with TRACE_LOCK, torch.autocast("cpu", enabled=mode), RandomOpWatch(_refuse_draws):
                graphs.append(_Tracer().trace(model))
    except Exception as error:
        raise _layer_error(f"{type(model).__name__} cannot be traced: {error}", _LIST) from error
    finally:
        for module, was_training in modes:
            module.training = was_training
        changed = snapshot.changed()
        snapshot.restore()
    _refuse_side_effects(model, changed)
    _check_graphs(model, *graphs)
    return graphs[0]


_LIST = "give the task a `stages(model)` that lists the parts in order"


def _refuse_draws() -> None:
    raise ValueError("it draws random numbers, which a trace does once for all")


def _refuse_side_effects(model: nn.Module, changed: Sequence[str]) -> None:
    """
    Refuse side effects of forward: traced layers would not repeat them.

    Raises:
        SpecError: forward writes state, draws random numbers, or creates constant tensors.
    """
    name = f"{type(model).__name__}.forward"
    written = [attribute for attribute in changed if not attribute.startswith(_CONSTANT)]
    if written:
        text = f"{name} writes {', '.join(written)}, which a trace does once for all"
        raise _layer_error(text, f"write it in a part of the model that has a forward, or {_LIST}")
    if named := referenced_names(type(model).forward) & {"random", "default_rng"}:
        text = f"{name} names `{min(named)}`, and a trace draws random numbers once for all"
        raise _layer_error(text, f"draw them in a part of the model that has a forward, or {_LIST}")
    if changed:
        text = f"{name} makes a tensor without its inputs, which a trace would keep for all steps"
        raise _layer_error(text, f"make it in a part of the model that has a forward, or {_LIST}")


_CONSTANT = "_tensor_constant"
"""Prefix of the attributes in which torch.fx stores constant tensors."""


def _check_graphs(model: nn.Module, training: fx.Graph, evaluating: fx.Graph) -> None:
    name = type(model).__name__
    if str(training) != str(evaluating):
        raise _layer_error(
            f"{name}.forward differs between training and evaluation, and a trace has only one way",
            "use modules that know the mode themselves, such as nn.Dropout for F.dropout",
        )
    inputs = [node.name for node in training.nodes if node.op == "placeholder"]
    if len(inputs) != 1:
        raise _layer_error(
            f"{name}.forward takes {len(inputs)} inputs ({', '.join(inputs)}), and a pipeline one",
            "wrap the model in one that takes a single tensor",
        )
    if _result(training) not in _call_nodes(training):
        raise _layer_error(
            f"{name}.forward gives something else than one tensor that it has computed",
            "wrap the model in one that gives a single tensor",
        )


def _call_nodes(graph: fx.Graph) -> list[fx.Node]:
    """Return the nodes that compute; a `get_attr` node belongs to the node that uses it."""
    return [node for node in graph.nodes if node.op not in ("placeholder", "output", "get_attr")]


def _result(graph: fx.Graph) -> Any:
    return graph.output_node().args[0]


def _live_values(graph: fx.Graph) -> list[list[fx.Node]]:
    """Return, for the position after each node, the values created before it and used after it."""
    nodes = _call_nodes(graph)
    numbers = {node: number for number, node in enumerate(nodes)}
    entering = [node for node in graph.nodes if node.op == "placeholder"]
    last_use = {
        value: max((numbers.get(user, len(nodes)) for user in value.users), default=-1)
        for value in (*entering, *nodes)
    }
    return [
        [value for value in (*entering, *nodes[: place + 1]) if last_use[value] > place]
        for place in range(len(nodes))
    ]


def _segment(
    model: nn.Module, run: Sequence[fx.Node], entering: fx.Node, leaving: fx.Node
) -> fx.GraphModule:
    """Build a module of some nodes, which shares the model's own parts."""
    graph = fx.Graph()
    copies = {entering: graph.placeholder("inputs")}
    for node in run:
        for source in node.all_input_nodes:
            if source.op == "get_attr" and source not in copies:
                copies[source] = graph.node_copy(source)
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(copies[leaving])
    return fx.GraphModule(model, graph)
