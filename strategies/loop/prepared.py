"""A worker's task, model and data: made before it meets other ranks, kept over all attempts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.data import Dataset

from distplat.platform.sampler import Sampler
from distplat.platform.spec import Job
from distplat.strategies.checkpoint.checkpoint_types import Holding
from distplat.strategies.checkpoint.frozen_base import FrozenBase
from distplat.strategies.loop.agreement import RankFacts
from distplat.strategies.loop.losses import LossScale, TermWeights
from distplat.strategies.model.flat import FlatModel
from distplat.strategies.model.model_state import ModelState
from distplat.strategies.model.parameter_layout import first_non_finite
from distplat.strategies.model.task_optimizer import MadeOptimizers
from distplat.strategies.sparse.lookups import Lookups
from distplat.strategies.strategy_spec import Roles
from distplat.strategies.task import Task


@dataclass
class Prepared:
    """A worker's task, model and data, before it connects to the others."""

    job: Job
    task: Task
    model: torch.nn.Module | None
    """The whole model, where the strategy cuts it and has not yet done so."""
    data: Dataset[Any]
    eval_data: Dataset[Any] | None
    sampler: Sampler
    total_steps: int
    device: str
    roles: Roles
    """Of the strategy."""
    part: FlatModel | None = None
    """The parameters that this worker trains; None: the strategy has not cut the model yet."""
    lookups: Lookups | None = None
    """The model's embedding tables, if it has some."""
    state: ModelState | None = None
    """Buffers and frozen parameters of `part`; None before `join`."""
    facts: RankFacts | None = None
    """Fingerprints of model, data and code, to be compared with other ranks'; see `describe`."""
    made: MadeOptimizers = ()
    """Optimizers that the task made; empty: the job names the optimizer."""
    weights: TermWeights | None = None
    """Weights of a loss of several terms, in the present attempt; None: the loss is one term."""
    loss_scale: LossScale | None = None
    """Of a run in float16."""
    frozen: FrozenBase | None = None
    """Frozen parameters that checkpoints and the trained model leave out, if the job says so."""
    initial: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """Values of the job's `initial_weights`, as long as the model is on `meta`."""
    holding: Holding | None = None
    """Which part of the whole model `part` is; None: all of it."""
    warnings: list[str] = field(default_factory=list)
    """Warnings that rank 0 logs."""

    @property
    def flat(self) -> FlatModel:
        """The parameters that this worker trains, once the strategy has cut the model."""
        assert self.part is not None, "join() comes first: the strategy cuts the model"
        return self.part

    def not_finite(self) -> str | None:
        """Give the name of the first parameter that holds NaN or infinity; None: none does."""
        flat = self.flat
        slot = first_non_finite(flat.params, flat.segments, flat.layout.pieces)
        return None if slot is None else flat.name(slot)
