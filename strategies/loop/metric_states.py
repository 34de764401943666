"""
Metrics with state, such as an AUC: what a task keeps from batch to batch of an evaluation.

    each rank    reset(), then for each of its batches metrics(), which calls update()
    all ranks    the states of all, as tensors and JSON, in rank order
    then         merged into one, compute(): what one process on the whole data gives
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
    """What a metric has seen on one rank."""

    path: str
    """Where the task keeps the metric."""
    tree: Any
    """See `state_tree.pack`."""
    tensors: tuple[Tensor, ...]
    """The same, on the CPU, and nobody else's."""


States = Mapping[str, MetricState]
"""By the name that metrics() gives the metric."""


class TaskMetrics:
    """
    The metrics with state that a task keeps in its attributes, alone or in lists and dicts.

    Args:
        task: the user's.
        make_group: makes the group over which states are gathered; every rank calls it, or none.
            None: evaluations of several ranks are none of this one's concern.
    """

    def __init__(
        self, task: Task, make_group: Callable[[], Collective | None] = lambda: None
    ) -> None:
        self._task, self._make_group = task, make_group
        self._group: Collective | None = None

    def found(self) -> dict[str, Any]:
        """Give the metrics by path of attributes; the same on all ranks."""
        return dict(_within(vars(self._task)))

    def begin(self, device: torch.device) -> None:
        """Forget all batches, and be on the model's device."""
        for metric in self.found().values():
            metric.reset()
            if isinstance(metric, nn.Module):
                metric.to(device)

    def states(self, given: Mapping[str, object]) -> dict[str, MetricState]:
        """
        Copy the states of what metrics() gave in an evaluation.

        Raises:
            ValueError: a metric is none of the task's attributes, or its state cannot be merged.
        """
        paths = {id(metric): path for path, metric in self.found().items()}
        states = {}
        for name, metric in given.items():
            if id(metric) not in paths:
                kind = type(metric).__name__
                text = f"metrics() gives {name!r} as a {kind} that the task does not keep"
                advice = "make it once, in __init__, as an attribute of the task"
                raise ValueError(f"{method_location(self._task, 'metrics')}{text}: {advice}")
            states[name] = _state_of(metric, name, paths[id(metric)])
        return states

    def gathered(self, mine: States, device: torch.device) -> list[States]:
        """Give the states of all ranks, in rank order; every rank calls this, or none."""
        group = self._of_all()
        if group is None:
            return [mine]
        heads = {name: [s.path, s.tree, len(s.tensors)] for name, s in mine.items()}
        tensors = [tensor for state in mine.values() for tensor in state.tensors]
        every = gather_values(heads, group, device)
        named = {str(number): tensor for number, tensor in enumerate(tensors)}
        packed = gather_bytes(save(named), group, device)
        return [_received(*pair) for pair in zip(every, packed, strict=True)]

    def _of_all(self) -> Collective | None:
        if self._group is None:
            group = self._make_group()
            self._group = group and group.subgroup("metric-states", range(group.world))
        return self._group

    def figures(self, parts: Sequence[States]) -> dict[str, float]:
        """
        Merge states, and compute what they give.

        Args:
            parts: of all ranks, in rank order; one may lack what it had no batch for.

        Raises:
            ValueError: a metric gives something else than numbers; names it.
        """
        kept, figures = self.found(), {}
        for name in dict.fromkeys(name for part in parts for name in part):
            states = [part[name] for part in parts if name in part]
            metric = kept[states[0].path]
            trees = [unpack(state.tree, state.tensors) for state in states]
            _merge_modules(metric, trees) if _is_torchmetric(metric) else _merge(metric, trees)
            value = metric.compute()
            prefix = f"compute() of the metric {name!r} gives"
            for key, one in _named(name, value):
                figures[key] = checked_number(one, prefix, key)
            metric.reset()
        return figures


def _named(name: str, value: object) -> Iterator[tuple[str, object]]:
    """Give the figures of a metric that has several, such as a dict of them."""
    if isinstance(value, Mapping):
        for key, one in value.items():
            yield from _named(f"{name}_{key}", one)
    elif isinstance(value, Tensor) and value.ndim == 1 and len(value) > 1:
        yield from ((f"{name}_{number}", one) for number, one in enumerate(value))
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


def _received(heads: Mapping[str, Any], packed: bytes) -> States:
    """Put together what another rank has sent: numbers, text and tensors, no code."""
    tensors = load(packed)
    states, at = {}, 0
    for name, (path, tree, count) in heads.items():
        several = tuple(tensors[str(number)] for number in range(at, at + count))
        states[name], at = MetricState(path, tree, several), at + count
    return states


def _state_of(metric: Any, name: str, path: str) -> MetricState:
    if _is_torchmetric(metric):
        _check_reductions(metric, name)
        state: Any = {key: one.metric_state for key, one in _torchmetrics(metric)}
    elif callable(getattr(metric, "merge", None)):
        state = {key: one for key, one in vars(metric).items() if not callable(one)}
    else:
        kind = type(metric).__name__
        raise ValueError(
            f"the metric {name!r}, a {kind}, needs merge(other): ranks have a part each"
        )
    try:
        tree, tensors = pack(state, f"metric {name!r}")
    except SpecError as error:
        what = error.problems[0].message.split(",")[0]
        keep = "keep tensors, numbers and text in it, and lists and dicts of them"
        raise ValueError(f"{what}: {keep}") from None
    return MetricState(path, tree, tuple(one.to("cpu", copy=True) for one in tensors))


def _merge(metric: Any, states: Sequence[Mapping[str, Any]]) -> None:
    """Have a metric with a `merge` of its own see what all have seen."""
    metric.reset()
    parts = []
    for state in states:
        part = copy.copy(metric)
        vars(part).update(state)
        parts.append(part)
    vars(metric).update(vars(parts[0]))
    for part in parts[1:]:
        metric.merge(part)


def _is_torchmetric(metric: object) -> bool:
    """Say so by what such a metric has: the library need not be there."""
    return isinstance(metric, nn.Module) and hasattr(metric, "metric_state")


def _torchmetrics(metric: nn.Module) -> list[tuple[str, Any]]:
    """Give a metric and those within it: `ClasswiseWrapper`, or a sum of two."""
    return [(name, one) for name, one in metric.named_modules() if _is_torchmetric(one)]


def _check_reductions(metric: nn.Module, name: str) -> None:
    """Refuse a state that ranks of unequal parts cannot put together."""
    for _, one in _torchmetrics(metric):
        for state, reduction in one._reductions.items():
            if getattr(reduction, "__name__", "") == "dim_zero_mean":
                text = (
                    f"the metric {name!r} keeps {state!r} as a mean over ranks, whose parts differ"
                )
                raise ValueError(f'{text}: keep a sum and a count, each with dist_reduce_fx="sum"')


def _merge_modules(metric: nn.Module, states: Sequence[Mapping[str, Any]]) -> None:
    """Have one of torchmetrics see what all have seen."""
    for key, one in _torchmetrics(metric):
        one.reset()
        for state, reduction in one._reductions.items():
            values = [part[key][state] for part in states]
            setattr(one, state, _reduced(values, reduction, one.device))
        one._update_count, one._computed, one._to_sync = 1, None, False


def _reduced(values: Sequence[Any], reduction: Any, device: torch.device) -> Any:
    """Put the values of one state together, as torchmetrics' own synchronization does."""
    if any(isinstance(value, list) for value in values):
        lists = [value if isinstance(value, list) else [value] for value in values]
        return [tensor.to(device) for value in lists for tensor in value]
    if getattr(reduction, "__name__", "") == "dim_zero_cat":
        return [value.to(device) for value in values]
    if len(values) == 1:
        return values[0].to(device)
    together = torch.stack([value.to(device) for value in values])
    return together if reduction is None else reduction(together)
