"""
Losses of several terms, each a mean over something else: their weights, before any forward.

    each rank    micro-batches of the step ── weights() ──▶ {term: weight}, summed
    all ranks    the sums of all, in rank order
    then         forward, {term: sum} ──▶ the sums over these weights, added up
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from distplat.strategies.collective import Collective, gather_bytes
from distplat.strategies.loop.checks import checked_weight, place
from distplat.strategies.task import Task, method_of


class Terms(NamedTuple):
    """What a loss of several terms is divided by."""

    totals: Mapping[str, float]
    """By term."""
    samples: int
    """Of all micro-batches that these are the weights of."""


class TermWeights:
    """
    One rank's part in the weights of a step, in one attempt.

    Args:
        task: has `weights`.
        meet: makes the group of all ranks, or gives it; every rank calls it, or none.
        world: ranks that make a step together; 1: each by itself.
    """

    def __init__(
        self, task: Task, meet: Callable[[], Collective | None] = lambda: None, world: int = 1
    ) -> None:
        self._task, self._meet, self._world = task, meet, world
        self._group: Collective | None = None

    def of_step(
        self, batches: Sequence[Any], samples: int, of_all: int, device: torch.device
    ) -> Terms:
        """
        Add up the weights of a step; every rank calls this, also one without samples.

        Args:
            batches: this rank's.
            samples: of them.
            of_all: samples of the step.
            device: of the model.

        Raises:
            ValueError: the task gave something else than weights.
            CollectiveError: a rank is missing.
        """
        mine = _added(weights_of(self._task, batch) for batch in batches)
        if self._world == 1:
            return Terms(mine, samples)
        if self._group is None:
            group = self._meet()
            assert group is not None, "strategies whose ranks keep step have a group, or make one"
            self._group = group.subgroup("term-weights", range(group.world))
        texts = gather_bytes(json.dumps(mine).encode(), self._group, device)
        return Terms(_added(map(json.loads, texts)), of_all)


def weights_of(task: Task, batch: Any) -> dict[str, float]:
    """
    Ask a task for the weights of a batch.

    Raises:
        ValueError: it gave something else; says what.
    """
    found = method_of(task, "weights")(batch)
    if not isinstance(found, Mapping) or not all(isinstance(name, str) for name in found):
        what = "None: is there a `return`?" if found is None else f"a {type(found).__name__}"
        text = "weights() must return a mapping of terms to numbers; got"
        raise ValueError(f"{place(task, 'weights')}{text} {what}")
    return {name: checked_weight(task, one, "weights") for name, one in found.items()}


def _added(parts: Any) -> dict[str, float]:
    """Add mappings up, in their order."""
    total: dict[str, float] = {}
    for part in parts:
        for name, weight in part.items():
            total[name] = total.get(name, 0.0) + weight
    return total
