"""
Layers of any model whose `forward` torch.fx can trace: cut wherever one tensor is all that crosses.

    x = self.stem(x)                stem   | down   | up, add | head        layers
    y = self.down(x)                     1 |      2 |       1 |             values that cross
    x = self.up(y) + x                cut          no        cut
    return self.head(x)             stem   | down, up, add    | head

The model's own modules are taken whole: only `forward` of the model itself and of `nn.Sequential`s
is traced (Reed et al., "torch.fx", 2022). So dropout and the like keep
their switch between training and evaluation. Nothing is computed: a model on `meta` can be traced.
"""

import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn

from distplat.platform.errors import Problem, SpecError
from distplat.strategies.training.module_hooks import called_hooks
from distplat.strategies.training.stages import Layer, layers_of

_tracing = threading.Lock()
"""While torch.fx traces, it changes what calling a module does, for all threads."""


class _Tracer(fx.Tracer):
    def __init__(self) -> None:
        super().__init__()
        self._modes = _modes()

    def create_node(self, kind: str, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """
        Note a step.

        Raises:
            ValueError: it runs without gradients, or in another precision: a trace has no contexts.
        """
        changed = [what for what, mode in _modes().items() if mode != self._modes[what]]
        if changed:
            text = f"it runs {target} inside of {' and '.join(changed)}, which a trace leaves out"
            raise ValueError(text)
        return super().create_node(kind, target, *args, **kwargs)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Take a module whole; one with hooks always, for a trace would call them once for all."""
        return type(m) is not nn.Sequential or bool(called_hooks(m))


def traced_layers(model: nn.Module) -> list[Layer]:
    """
    Trace a model and cut it into as many layers as there are places to cut.

    A layer is named by the first of the model's parts in it.

    Args:
        model: takes one tensor and gives one.

    Raises:
        SpecError: the model cannot be traced, or takes or gives more than one tensor.
    """
    graph = _trace(model)
    nodes, result = _computed(graph), _result(graph)
    runs: list[list[fx.Node]] = [[]]
    for node, values in zip(nodes, _crossing(graph), strict=True):
        runs[-1].append(node)
        if values == [node]:
            runs.append([])
    tail = runs.pop()
    if tail:  # ends with a step whose value nobody takes, such as one in place
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


def _modes() -> dict[str, object]:
    """Give what contexts of torch change."""
    return {
        "torch.no_grad or its like": torch.is_grad_enabled(),
        "torch.inference_mode": torch.is_inference_mode_enabled(),
        "torch.autocast": [
            (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
            for device in ("cpu", "cuda")
        ],
    }


def _trace(model: nn.Module) -> fx.Graph:
    modes = [(module, module.training) for module in model.modules()]
    graphs = []
    try:
        for mode in (True, False):
            model.train(mode)
            # Once inside of autocast, so that one that is switched off is seen, too.
            with _tracing, torch.autocast("cpu", enabled=mode):
                graphs.append(_Tracer().trace(model))
    except Exception as error:
        raise _problem(
            f"{type(model).__name__} cannot be traced: {error}",
            "give the task a `stages(model)` that lists the parts in order",
        ) from error
    finally:
        for module, was_training in modes:
            module.training = was_training
    _check(model, *graphs)
    return graphs[0]


def _check(model: nn.Module, training: fx.Graph, evaluating: fx.Graph) -> None:
    name = type(model).__name__
    if str(training) != str(evaluating):
        raise _problem(
            f"{name}.forward differs between training and evaluation, and a trace has only one way",
            "use modules that know the mode themselves, such as nn.Dropout for F.dropout",
        )
    inputs = [node.name for node in training.nodes if node.op == "placeholder"]
    if len(inputs) != 1:
        raise _problem(
            f"{name}.forward takes {len(inputs)} inputs ({', '.join(inputs)}), and a pipeline one",
            "wrap the model in one that takes a single tensor",
        )
    if _result(training) not in _computed(training):
        raise _problem(
            f"{name}.forward gives something else than one tensor that it has computed",
            "wrap the model in one that gives a single tensor",
        )


def _computed(graph: fx.Graph) -> list[fx.Node]:
    """Give the steps; a parameter that a step takes directly belongs to the step."""
    return [node for node in graph.nodes if node.op not in ("placeholder", "output", "get_attr")]


def _result(graph: fx.Graph) -> Any:
    return graph.output_node().args[0]


def _crossing(graph: fx.Graph) -> list[list[fx.Node]]:
    """Give, for the place behind each step, the values made before it and used after it."""
    nodes = _computed(graph)
    at = {node: number for number, node in enumerate(nodes)}
    entering = [node for node in graph.nodes if node.op == "placeholder"]
    last_use = {
        value: max((at.get(user, len(nodes)) for user in value.users), default=-1)
        for value in (*entering, *nodes)
    }
    return [
        [value for value in (*entering, *nodes[: place + 1]) if last_use[value] > place]
        for place in range(len(nodes))
    ]


def _segment(
    model: nn.Module, run: Sequence[fx.Node], entering: fx.Node, leaving: fx.Node
) -> fx.GraphModule:
    """Make a module of some steps, around the model's own parts."""
    graph = fx.Graph()
    copies = {entering: graph.placeholder("inputs")}
    for node in run:
        for needed in node.all_input_nodes:
            if needed.op == "get_attr" and needed not in copies:
                copies[needed] = graph.node_copy(needed)
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(copies[leaving])
    return fx.GraphModule(model, graph)


def _problem(message: str, hint: str) -> SpecError:
    return SpecError(Problem((), message, hint))
