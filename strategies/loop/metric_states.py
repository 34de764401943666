"""
Stateful metrics of a task, such as an AUC, accumulated over the batches of an evaluation.

    each rank    reset(), then for each of its batches metrics(), which calls update()
    all ranks    gather the states of all ranks, as tensors and JSON, in rank order
    then         merge the states, and compute(): the result of one process on the whole data
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from distplat.platform.errors import SpecError
from distplat.strategies.collective import Collective, gather_bytes, gather_values
from distplat.strategies.loop.checks import checked_number, has_state, method_location
from distplat.strategies.state_tree import pack, unpack
from distplat.strategies.task import Task


@dataclass(frozen=True)
class MetricState:
    """A metric's state on one rank."""

    path: str
    """Attribute path of the metric in the task."""
    tree: Any
    """See `state_tree.pack`."""
    tensors: tuple[Tensor, ...]
    """The tensors of `tree`, copied to the CPU."""


States = Mapping[str, MetricState]
"""States by the metric's name in metrics()."""


class TaskMetrics:
    """
    The stateful metrics in a task's attributes, also in lists and dicts.

    Args:
        task: the user's task.
        make_group: makes the group that gathers states; all ranks call it, or none. If it returns
            None, states are not gathered.
    """

    def __init__(
        self, task: Task, make_group: Callable[[], Collective | None] = lambda: None
    ) -> None:
        self._task, self._make_group = task, make_group
        self._group: Collective | None = None

    def found(self) -> dict[str, Any]:
        """Return the metrics by attribute path; the same on all ranks."""
        return dict(_within(vars(self._task)))

    def begin(self, device: torch.device) -> None:
        """Reset the metrics and move them to the model's device."""
        for metric in self.found().values():
            metric.reset()
            if isinstance(metric, nn.Module):
                metric.to(device)

    def states(self, metrics: Mapping[str, object]) -> dict[str, MetricState]:
        """
        Copy the states of the metrics that metrics() returned in an evaluation.

        Raises:
            ValueError: a metric is not among the task's attributes, or its state cannot be merged.
        """
        paths = {id(metric): path for path, metric in self.found().items()}
        states = {}
        for name, metric in metrics.items():
            if id(metric) not in paths:
                cls = type(metric).__name__
                text = f"metrics() returns {name!r}, a {cls} that is not an attribute of the task"
                advice = "create it once, in __init__, as an attribute of the task"
                raise ValueError(f"{method_location(self._task, 'metrics')}{text}: {advice}")
            states[name] = _state_of(metric, name, paths[id(metric)])
        return states

    def gathered(self, local: States, device: torch.device) -> list[States]:
        """Return the states of all ranks, in rank order; all ranks call this, or none."""
        group = self._gather_group()
        if group is None:
            return [local]
        heads = {name: [s.path, s.tree, len(s.tensors)] for name, s in local.items()}
        tensors = [tensor for state in local.values() for tensor in state.tensors]
        all_heads = gather_values(heads, group, device)
        named = {str(number): tensor for number, tensor in enumerate(tensors)}
        packed = gather_bytes(save(named), group, device)
        return [_unpack_states(*pair) for pair in zip(all_heads, packed, strict=True)]

    def _gather_group(self) -> Collective | None:
        if self._group is None:
            group = self._make_group()
            self._group = group and group.subgroup("metric-states", range(group.world))
        return self._group

    def figures(self, parts: Sequence[States]) -> dict[str, float]:
        """
        Merge states, and compute the metrics.

        Args:
            parts: states of all ranks, in rank order; a rank without batches may lack a metric.

        Raises:
            ValueError: a metric's result is not a number; names the metric.
        """
        metrics, figures = self.found(), {}
        for name in dict.fromkeys(name for part in parts for name in part):
            states = [part[name] for part in parts if name in part]
            metric = metrics[states[0].path]
            trees = [unpack(state.tree, state.tensors) for state in states]
            _merge_modules(metric, trees) if _is_torchmetric(metric) else _merge(metric, trees)
            value = metric.compute()
            prefix = f"compute() of the metric {name!r} gives"
            for key, number in _named(name, value):
                figures[key] = checked_number(number, prefix, key)
            metric.reset()
        return figures


def _named(name: str, value: object) -> Iterator[tuple[str, object]]:
    """Flatten a metric's result, such as a dict or a vector, into named numbers."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _named(f"{name}_{key}", item)
    elif isinstance(value, Tensor) and value.ndim == 1 and len(value) > 1:
        yield from ((f"{name}_{index}", item) for index, item in enumerate(value))
    else:
        yield name, value


def _within(value: Any) -> Iterator[tuple[str, Any]]:
    items: Iterator[tuple[Any, Any]] = iter(())
    if isinstance(value, Mapping | nn.ModuleDict):
        items = iter(value.items())
    elif isinstance(value, list | tuple | nn.ModuleList):
        items = iter(enumerate(value))
    for key, item in items:
        if has_state(item) and not isinstance(item, nn.ModuleDict):
            yield str(key), item
        else:
            yield from ((f"{key}.{rest}", metric) for rest, metric in _within(item))


def _unpack_states(heads: Mapping[str, Any], packed: bytes) -> States:
    """Build the states of a rank from received numbers, text and tensors; executes no code."""
    tensors = load(packed)
    states, start = {}, 0
    for name, (path, tree, count) in heads.items():
        of_metric = tuple(tensors[str(number)] for number in range(start, start + count))
        states[name], start = MetricState(path, tree, of_metric), start + count
    return states


def _state_of(metric: Any, name: str, path: str) -> MetricState:
    if _is_torchmetric(metric):
        _check_reductions(metric, name)
        state: Any = {key: module.metric_state for key, module in _torchmetrics(metric)}
    elif callable(getattr(metric, "merge", None)):
        state = {key: value for key, value in vars(metric).items() if not callable(value)}
    else:
        cls = type(metric).__name__
        raise ValueError(
            f"the metric {name!r}, a {cls}, needs merge(other): each rank has a part of the data"
        )
    try:
        tree, tensors = pack(state, f"metric {name!r}")
    except SpecError as error:
        reason = error.problems[0].message.split(",")[0]
        hint = "its state may have tensors, numbers and text, and lists and dicts of them"
        raise ValueError(f"{reason}: {hint}") from None
    return MetricState(path, tree, tuple(tensor.to("cpu", copy=True) for tensor in tensors))


def _merge(metric: Any, states: Sequence[Mapping[str, Any]]) -> None:
    """Merge the states of all ranks into a metric by its `merge`."""
    examples = {key: copy.copy(v) for key, v in vars(metric).items() if isinstance(v, dict)}
    metric.reset()
    parts = []
    for state in states:
        part = copy.copy(metric)
        values = {key: _like(value, examples.get(key)) for key, value in state.items()}
        vars(part).update(values)
        parts.append(part)
    vars(metric).update(vars(parts[0]))
    for part in parts[1:]:
        metric.merge(part)


def _like(value: Any, example: Any) -> Any:
    """Convert received dicts to the classes of an example, such as `Counter` or `defaultdict`."""
    if type(value) is not dict or not isinstance(example, dict):
        return value
    restored = copy.copy(example)
    restored.clear()
    make = getattr(example, "default_factory", None)
    other = make() if make is not None else next(iter(example.values()), None)
    for key, item in value.items():
        restored[key] = _like(item, example.get(key, other))
    return restored


def _is_torchmetric(metric: object) -> bool:
    """Return whether it is a torchmetrics metric, without importing torchmetrics."""
    return isinstance(metric, nn.Module) and hasattr(metric, "metric_state")


def _torchmetrics(metric: nn.Module) -> list[tuple[str, Any]]:
    """Return a metric and its nested ones, as in `ClasswiseWrapper` or a sum of metrics."""
    return [(name, module) for name, module in metric.named_modules() if _is_torchmetric(module)]


def _check_reductions(metric: nn.Module, name: str) -> None:
    """Raise for states that cannot be merged over ranks with unequal numbers of samples."""
    for _, module in _torchmetrics(metric):
        for state, reduction in module._reductions.items():
            if getattr(reduction, "__name__", "") == "dim_zero_mean":
                text = f"the metric {name!r} has {state!r} as a mean over ranks, whose parts differ"
                raise ValueError(f'{text}: use a sum and a count, each with dist_reduce_fx="sum"')


def _merge_modules(metric: nn.Module, states: Sequence[Mapping[str, Any]]) -> None:
    """Merge the states of all ranks into a torchmetrics metric."""
    for key, module in _torchmetrics(metric):
        module.reset()
        for state, reduction in module._reductions.items():
            values = [part[key][state] for part in states]
            setattr(module, state, _reduced(values, reduction, module.device))
        module._update_count, module._computed, module._to_sync = 1, None, False


def _reduced(values: Sequence[Any], reduction: Any, device: torch.device) -> Any:
    """Reduce the values of one state, as the synchronization of torchmetrics does."""
    if any(isinstance(value, list) for value in values):
        lists = [value if isinstance(value, list) else [value] for value in values]
        return [tensor.to(device) for value in lists for tensor in value]
    if getattr(reduction, "__name__", "") == "dim_zero_cat":
        return [value.to(device) for value in values]
    if len(values) == 1:
        return values[0].to(device)
    stacked = torch.stack([value.to(device) for value in values])
    return stacked if reduction is None else reduction(stacked)
